// SPDX-License-Identifier: Apache-2.0
#pragma once
// Files that are whole or absent. All writes go to a temporary name, are fsynced, and are renamed into place.
// Every failure is Error: kData when a file that is read is missing or wrong, kResource when writing fails.
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace alambic {

namespace fs = std::filesystem;

/// SHA-256, fed in pieces; hex() ends it.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(Sha256&&) noexcept;
  Sha256& operator=(Sha256&&) noexcept;
  void add(const void* data, std::size_t num_bytes);
  void add(std::string_view text) { add(text.data(), text.size()); }
  std::string hex();  // 64 lower-case digits; the object may not be used afterwards

 private:
  struct State;
  std::unique_ptr<State> state_;
};

std::string sha256_of(std::string_view bytes);
std::string sha256_of_file(const fs::path& path);

/// The whole file; Error(kData) if it is missing, not a regular file, or larger than max_bytes (checked before allocating).
std::string read_file(const fs::path& path, std::uint64_t max_bytes = 1ull << 30);

/// A file descriptor or socket that closes itself; -1: none.
class Descriptor {
 public:
  explicit Descriptor(int value = -1) : value_(value) {}
  ~Descriptor() { close(); }
  Descriptor(Descriptor&& other) noexcept : value_(other.release()) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(value_, other.value_);
    return *this;
  }
  int get() const { return value_; }
  bool is_open() const { return value_ >= 0; }
  int release() { return std::exchange(value_, -1); }
  void close();

 private:
  int value_;
};

/// A file being written under a temporary name beside `path`. commit() fsyncs it, renames it and fsyncs the folder;
/// without commit() the destructor removes it. The SHA-256 is taken while writing.
class AtomicFile {
 public:
  explicit AtomicFile(fs::path path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  void write(const void* data, std::size_t num_bytes);
  void write(std::string_view text) { write(text.data(), text.size()); }
  std::uint64_t num_bytes() const { return num_bytes_; }
  std::string commit();  // returns the SHA-256 in hex

 private:
  fs::path path_, temporary_;
  int descriptor_ = -1;
  std::uint64_t num_bytes_ = 0;
  Sha256 hash_;
};

/// Writes `bytes` as one AtomicFile; returns the SHA-256 in hex.
std::string write_file(const fs::path& path, std::string_view bytes);

void fsync_file(const fs::path& path);
void fsync_folder(const fs::path& folder);

/// Renames a finished folder into place: fsyncs the folder, refuses an existing target, renames, fsyncs the parent.
void commit_folder(const fs::path& temporary, const fs::path& target);

/// Free space in bytes on the file system that holds `path` (or its nearest existing parent).
std::uint64_t free_bytes(const fs::path& path);

/// A file mapped copy on write; the view stays valid while the object lives. Empty files have an empty view. Tensors made
/// of it may be trained in place: a page that is written to becomes this process's own, and the file never changes.
class MappedFile {
 public:
  explicit MappedFile(const fs::path& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;
  std::span<const std::byte> bytes() const { return {data_, size_}; }
  std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }
  /// Gives the memory of the whole pages within [begin, end) back; reading them again reads the file, and what was
  /// written into them is lost.
  void release(std::size_t begin, std::size_t end) const;

 private:
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

/// An exclusive lock on a folder (flock on <folder>/.lock, which names host, process and start). A second holder gets
/// Error(kUsage) that names the first. Released by the destructor or by the death of the process.
class FolderLock {
 public:
  explicit FolderLock(const fs::path& folder);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  int descriptor_ = -1;
};

}  // namespace alambic
