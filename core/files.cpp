// SPDX-License-Identifier: Apache-2.0
#include "core/files.h"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <utility>

#include "core/error.h"

namespace alambic {
namespace {

[[noreturn]] void fail_writing(const fs::path& path, const char* what, int code) {
  fail(ErrorKind::kResource, path.string(), ": ", what, ": ", std::strerror(code),
       code == ENOSPC || code == EDQUOT ? Remedy{"free some space or choose another output folder"}
                                        : Remedy{"check that the folder exists and can be written"});
}

int open_for_reading(const fs::path& path) {
  // NONBLOCK: a named pipe without a writer is refused by size_of_regular(), not waited for.
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
  if (descriptor < 0) fail(ErrorKind::kData, path.string(), ": cannot be read: ", std::strerror(errno));
  return descriptor;
}

std::uint64_t size_of_regular(int descriptor, const fs::path& path) {
  struct stat status {};
  if (::fstat(descriptor, &status) != 0) fail(ErrorKind::kData, path.string(), ": ", std::strerror(errno));
  if (!S_ISREG(status.st_mode)) fail(ErrorKind::kData, path.string(), ": not a regular file");
  return static_cast<std::uint64_t>(status.st_size);
}

}  // namespace

void Descriptor::close() {
  if (value_ >= 0) ::close(release());
}

struct Sha256::State {
  EVP_MD_CTX* context = EVP_MD_CTX_new();
  State() = default;
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() { EVP_MD_CTX_free(context); }
};

Sha256::Sha256() : state_(std::make_unique<State>()) {
  if (EVP_DigestInit_ex(state_->context, EVP_sha256(), nullptr) != 1) fail(ErrorKind::kBug, "OpenSSL refuses SHA-256");
}
Sha256::~Sha256() = default;
Sha256::Sha256(Sha256&&) noexcept = default;
Sha256& Sha256::operator=(Sha256&&) noexcept = default;

void Sha256::add(const void* data, std::size_t num_bytes) { EVP_DigestUpdate(state_->context, data, num_bytes); }

std::string Sha256::hex() {
  std::array<unsigned char, 32> digest{};
  EVP_DigestFinal_ex(state_->context, digest.data(), nullptr);
  std::string text;
  for (const unsigned char byte : digest) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

std::string sha256_of(std::string_view bytes) {
  Sha256 hash;
  hash.add(bytes);
  return hash.hex();
}

std::string sha256_of_file(const fs::path& path) {
  const Descriptor file(open_for_reading(path));
  size_of_regular(file.get(), path);
  Sha256 hash;
  std::vector<char> buffer(1 << 20);
  for (;;) {
    const ssize_t got = ::read(file.get(), buffer.data(), buffer.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(ErrorKind::kData, path.string(), ": cannot be read: ", std::strerror(errno));
    if (got == 0) return hash.hex();
    hash.add(buffer.data(), static_cast<std::size_t>(got));
  }
}

std::string read_file(const fs::path& path, std::uint64_t max_bytes) {
  const Descriptor file(open_for_reading(path));
  const std::uint64_t size = size_of_regular(file.get(), path);
  if (size > max_bytes) fail(ErrorKind::kData, path.string(), ": ", size, " bytes, more than the ", max_bytes, " allowed for this kind of file");
  std::string bytes(size, '\0');
  std::size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t got = ::read(file.get(), bytes.data() + done, bytes.size() - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(ErrorKind::kData, path.string(), ": cannot be read: ", std::strerror(errno));
    if (got == 0) fail(ErrorKind::kData, path.string(), ": became shorter while it was read");
    done += static_cast<std::size_t>(got);
  }
  return bytes;
}

AtomicFile::AtomicFile(fs::path path) : path_(std::move(path)) {
  temporary_ = path_;
  temporary_ += ".tmp-" + std::to_string(::getpid());
  descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (descriptor_ < 0) fail_writing(temporary_, "cannot be created", errno);
}

AtomicFile::~AtomicFile() {
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  ::unlink(temporary_.c_str());
}

void AtomicFile::write(const void* data, std::size_t num_bytes) {
  hash_.add(data, num_bytes);
  const char* from = static_cast<const char*>(data);
  for (std::size_t done = 0; done < num_bytes;) {
    const ssize_t put = ::write(descriptor_, from + done, num_bytes - done);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) fail_writing(temporary_, "cannot be written", errno);
    done += static_cast<std::size_t>(put);
  }
  num_bytes_ += num_bytes;
}

std::string AtomicFile::commit() {
  if (::fsync(descriptor_) != 0) fail_writing(temporary_, "fsync failed", errno);
  if (::close(std::exchange(descriptor_, -1)) != 0) {
    const int code = errno;
    ::unlink(temporary_.c_str());
    fail_writing(temporary_, "close failed", code);
  }
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) {
    const int code = errno;
    ::unlink(temporary_.c_str());
    fail_writing(path_, "cannot be renamed into place", code);
  }
  fsync_folder(path_.has_parent_path() ? path_.parent_path() : fs::path("."));
  return hash_.hex();
}

std::string write_file(const fs::path& path, std::string_view bytes) {
  AtomicFile file(path);
  file.write(bytes);
  return file.commit();
}

void fsync_file(const fs::path& path) {
  const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.get() < 0 || ::fsync(file.get()) != 0) fail_writing(path, "fsync failed", errno);
}

void fsync_folder(const fs::path& folder) {
  const Descriptor handle(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (handle.get() < 0 || ::fsync(handle.get()) != 0) fail_writing(folder, "fsync failed", errno);
}

void commit_folder(const fs::path& temporary, const fs::path& target) {
  fsync_folder(temporary);
  if (fs::exists(fs::symlink_status(target))) fail(ErrorKind::kUsage, target.string(), ": exists already and is never overwritten", Remedy{"choose another name, or remove it"});
  if (::rename(temporary.c_str(), target.c_str()) != 0) fail_writing(target, "cannot be renamed into place", errno);
  const fs::path parent = target.parent_path();
  fsync_folder(parent.empty() ? fs::path(".") : parent);
}

std::uint64_t free_bytes(const fs::path& path) {
  fs::path existing = fs::absolute(path);
  while (!fs::exists(existing) && existing.has_relative_path()) existing = existing.parent_path();
  struct statvfs status {};
  if (::statvfs(existing.c_str(), &status) != 0) fail(ErrorKind::kResource, existing.string(), ": ", std::strerror(errno));
  return static_cast<std::uint64_t>(status.f_bavail) * status.f_frsize;
}

MappedFile::MappedFile(const fs::path& path) {
  const Descriptor file(open_for_reading(path));
  size_ = size_of_regular(file.get(), path);
  if (size_ == 0) return;
  // NORESERVE: a model larger than the machine's memory may be mapped; only what is written to needs memory of its own.
  void* address = ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file.get(), 0);
  if (address == MAP_FAILED) fail(ErrorKind::kResource, path.string(), ": cannot be mapped: ", std::strerror(errno));
  data_ = static_cast<const std::byte*>(address);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<std::byte*>(data_), size_);
}

void MappedFile::release(std::size_t begin, std::size_t end) const {
  const std::size_t page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  begin = (begin + page - 1) / page * page;  // pages shared with a neighbour stay
  end = std::min(end, size_) / page * page;
  if (begin < end) ::madvise(const_cast<std::byte*>(data_) + begin, end - begin, MADV_DONTNEED);
}

FolderLock::FolderLock(const fs::path& folder) {
  const fs::path path = folder / ".lock";
  Descriptor file(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644));
  if (file.get() < 0) fail(ErrorKind::kUsage, path.string(), ": cannot be created: ", std::strerror(errno), Remedy{"choose an output folder that can be written"});
  if (::flock(file.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) fail(ErrorKind::kResource, path.string(), ": cannot be locked: ", std::strerror(errno), Remedy{"choose an output folder on a disk that has locks"});
    std::array<char, 256> owner{};
    const ssize_t got = ::pread(file.get(), owner.data(), owner.size() - 1, 0);
    fail(ErrorKind::kUsage, folder.string(), ": another process is using this folder (", got > 0 ? owner.data() : "owner unknown", ")",
         Remedy{"wait for it to end, or choose another folder"});
  }
  std::array<char, 128> host{};
  ::gethostname(host.data(), host.size() - 1);
  const std::string owner = std::string("host ") + host.data() + ", process " + std::to_string(::getpid()) + ", since " + std::to_string(std::time(nullptr));
  if (::ftruncate(file.get(), 0) != 0 || ::pwrite(file.get(), owner.data(), owner.size(), 0) != static_cast<ssize_t>(owner.size()))
    fail_writing(path, "cannot be written", errno);
  descriptor_ = file.release();
}

FolderLock::~FolderLock() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

}  // namespace alambic
