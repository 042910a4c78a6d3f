// SPDX-License-Identifier: Apache-2.0
#include "data/hdf5.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <fstream>

#include "core/error.h"

namespace alambic::data {
namespace {

// zlib's format cannot shrink data by more than this, so a larger claim is a lie (zlib's technical notes: 1032:1).
constexpr std::uint64_t kLargestRatio = 1032;

// Level 1 is twice as fast as level 6 on shuffled ids and its result 7 % larger (docs/token_store.md).
constexpr unsigned kDeflateLevel = 1;

constexpr std::array<H5Z_filter_t, 3> kFilters = {H5Z_FILTER_SHUFFLE, H5Z_FILTER_DEFLATE, H5Z_FILTER_FLETCHER32};

// HDF5 prints its error stack and loads filters from a folder of plug-ins unless it is told not to. Where the library is
// built for threads, as Debian's is, each thread has an error stack of its own and must be told.
void quieten() {
  static thread_local const bool done = [] {
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
    H5PLset_loading_state(0);
    return true;
  }();
  (void)done;
}

void must_write(bool fine, const std::string& what) {
  if (!fine) fail(ErrorKind::kResource, "HDF5 could not write ", what, Remedy{"check the free space and the health of the disk"});
}

Hdf5Handle made(hid_t id, herr_t (*close)(hid_t), const std::string& what) {
  must_write(id >= 0, what);
  return {id, close, what};
}

[[noreturn]] void refuse(const std::filesystem::path& path, const std::string& why) {
  fail(ErrorKind::kData, path.string(), ": not an HDF5 file as alambic writes it: ", why, Remedy{"copy its folder again, or make it again"});
}

std::uint64_t little_endian(const unsigned char* bytes) {
  std::uint64_t value = 0;
  for (int i = 7; i >= 0; --i) value = value << 8 | bytes[i];
  return value;
}

// The superblock is read by hand first: free-space managers, cache images and drivers, where most of the library's own
// faults lie, need a superblock extension, and our files never have one.
void check_superblock(const std::filesystem::path& path) {
  std::array<unsigned char, 48> head{};
  std::ifstream file(path, std::ios::binary);
  file.read(reinterpret_cast<char*>(head.data()), static_cast<std::streamsize>(head.size()));
  if (file.gcount() != static_cast<std::streamsize>(head.size())) refuse(path, "it ends within the superblock");
  if (std::memcmp(head.data(), "\x89HDF\r\n\x1a\n", 8) != 0) refuse(path, "it does not begin with HDF5's signature");
  if (head[8] != 2 && head[8] != 3) refuse(path, "superblock version " + std::to_string(head[8]));
  if (head[9] != 8 || head[10] != 8 || head[11] != 0) refuse(path, "odd sizes or flags in the superblock");
  if (little_endian(&head[12]) != 0) refuse(path, "a user block");
  if (little_endian(&head[20]) != ~0ull) refuse(path, "a superblock extension");
  if (little_endian(&head[28]) != std::filesystem::file_size(path)) refuse(path, "its size is not the one in the superblock");
}

}  // namespace

std::mutex& hdf5_mutex() {
  static std::mutex mutex;
  return mutex;
}

Hdf5Handle::Hdf5Handle(hid_t id, herr_t (*closer)(hid_t), const std::string& what) : id_(id), close_(closer) {
  if (id < 0) fail(ErrorKind::kData, what);
}

Hdf5Handle::~Hdf5Handle() { close(); }

Hdf5Handle& Hdf5Handle::operator=(Hdf5Handle&& other) noexcept {
  if (this != &other) {
    close();
    id_ = std::exchange(other.id_, -1);
    close_ = other.close_;
  }
  return *this;
}

herr_t Hdf5Handle::close() { return id_ < 0 ? 0 : close_(std::exchange(id_, -1)); }

Hdf5Handle create_hdf5(const std::filesystem::path& path) {
  quieten();
  const std::string what = path.string();
  const Hdf5Handle creation = made(H5Pcreate(H5P_FILE_CREATE), H5Pclose, what);
  must_write(H5Pset_obj_track_times(creation, false) >= 0, what);
  const Hdf5Handle access = made(H5Pcreate(H5P_FILE_ACCESS), H5Pclose, what);
  must_write(H5Pset_libver_bounds(access, H5F_LIBVER_V110, H5F_LIBVER_V110) >= 0, what);
  must_write(H5Pset_file_locking(access, false, true) >= 0, what);  // fails on NFS and Lustre; the writer has its own lock
  return made(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, creation, access), H5Fclose, what);
}

void write_column(hid_t file, const std::string& name, hid_t type, std::uint64_t count, std::uint64_t chunk_values, const void* values) {
  const hsize_t length = count, chunk = std::min(count, chunk_values);
  const Hdf5Handle creation = made(H5Pcreate(H5P_DATASET_CREATE), H5Pclose, name);
  const std::uint64_t zero = 0;
  must_write(H5Pset_chunk(creation, 1, &chunk) >= 0 && H5Pset_shuffle(creation) >= 0 && H5Pset_deflate(creation, kDeflateLevel) >= 0 &&
                 H5Pset_fletcher32(creation) >= 0 && H5Pset_obj_track_times(creation, false) >= 0 &&
                 H5Pset_fill_value(creation, H5T_STD_U64LE, &zero) >= 0,
             name);
  const Hdf5Handle space = made(H5Screate_simple(1, &length, nullptr), H5Sclose, name);
  Hdf5Handle column = made(H5Dcreate2(file, name.c_str(), type, space, H5P_DEFAULT, creation, H5P_DEFAULT), H5Dclose, name);
  must_write(H5Dwrite(column, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, values) >= 0, name);
  must_write(column.close() >= 0, name);
}

void write_attribute(hid_t file, const std::string& name, std::uint64_t value) {
  const Hdf5Handle space = made(H5Screate(H5S_SCALAR), H5Sclose, name);
  const Hdf5Handle attribute = made(H5Acreate2(file, name.c_str(), H5T_STD_U64LE, space, H5P_DEFAULT, H5P_DEFAULT), H5Aclose, name);
  must_write(H5Awrite(attribute, H5T_NATIVE_UINT64, &value) >= 0, name);
}

// Fixed length: strings of variable length live in HDF5's global heap, which has no checksum.
void write_attribute(hid_t file, const std::string& name, const std::string& text) {
  const Hdf5Handle type = made(H5Tcopy(H5T_C_S1), H5Tclose, name);
  must_write(H5Tset_size(type, std::max<std::size_t>(text.size(), 1)) >= 0 && H5Tset_cset(type, H5T_CSET_UTF8) >= 0 && H5Tset_strpad(type, H5T_STR_NULLPAD) >= 0, name);
  const Hdf5Handle space = made(H5Screate(H5S_SCALAR), H5Sclose, name);
  const Hdf5Handle attribute = made(H5Acreate2(file, name.c_str(), type, space, H5P_DEFAULT, H5P_DEFAULT), H5Aclose, name);
  must_write(H5Awrite(attribute, type, text.c_str()) >= 0, name);  // an empty text writes its one NUL
}

Hdf5Handle open_hdf5(const std::filesystem::path& path, const std::vector<std::string>& names) {
  quieten();
  check_superblock(path);
  const std::string what = path.string() + ": HDF5 cannot open it";
  const Hdf5Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose, what);
  if (H5Pset_file_locking(access, false, true) < 0) fail(ErrorKind::kBug, "HDF5 refuses to go without file locking");
  Hdf5Handle file(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access), H5Fclose, what);

  H5G_info_t group{};
  if (H5Gget_info(file, &group) < 0 || group.nlinks != names.size()) refuse(path, "the root group has other members");
  for (const std::string& name : names) {
    H5L_info_t link{};
    if (H5Lget_info(file, name.c_str(), &link, H5P_DEFAULT) < 0) refuse(path, "\"" + name + "\" is missing");
    if (link.type != H5L_TYPE_HARD) refuse(path, "\"" + name + "\" is a link to elsewhere");
  }
  return file;
}

Hdf5Handle open_column(hid_t file, const std::filesystem::path& path, const std::string& name, hid_t type, std::uint64_t count, std::uint64_t chunk_values) {
  const auto check = [&](bool fine, const char* why) {
    if (!fine) refuse(path, "\"" + name + "\": " + why);
  };
  const std::string what = path.string() + ": HDF5 cannot open \"" + name + "\"";
  Hdf5Handle column(H5Dopen2(file, name.c_str(), H5P_DEFAULT), H5Dclose, what);
  const Hdf5Handle found_type(H5Dget_type(column), H5Tclose, what);
  check(H5Tequal(found_type, type) > 0, "another type");
  const Hdf5Handle space(H5Dget_space(column), H5Sclose, what);
  hsize_t length = 0, most = 0;
  check(H5Sget_simple_extent_ndims(space) == 1, "not one-dimensional");
  check(H5Sget_simple_extent_dims(space, &length, &most) == 1 && length == count && most == count, "another length than the index says");
  const Hdf5Handle creation(H5Dget_create_plist(column), H5Pclose, what);
  check(H5Pget_layout(creation) == H5D_CHUNKED, "not stored in chunks");
  check(H5Pget_external_count(creation) == 0, "stored in other files");
  hsize_t chunk = 0;
  check(H5Pget_chunk(creation, 1, &chunk) == 1 && chunk == std::min(count, chunk_values), "another chunk size");
  check(H5Pget_nfilters(creation) == static_cast<int>(kFilters.size()), "other filters than shuffle, deflate, fletcher32");
  for (unsigned i = 0; i < kFilters.size(); ++i) {
    std::size_t num_values = 0;
    unsigned flags = 0, config = 0;
    check(H5Pget_filter2(creation, i, &flags, &num_values, nullptr, 0, nullptr, &config) == kFilters[i], "other filters than shuffle, deflate, fletcher32");
  }
  const std::uint64_t width = H5Tget_size(found_type);
  check(count * width / kLargestRatio <= H5Dget_storage_size(column), "more values than its bytes could hold");
  return column;
}

void read_column(hid_t column, const std::filesystem::path& path, const std::string& name, std::uint64_t begin, std::uint64_t count, void* into) {
  quieten();  // the file may have been opened by another thread
  const std::string what = path.string() + ": \"" + name + "\" " + std::to_string(begin) + " to " + std::to_string(begin + count) + " cannot be read: the shard is damaged";
  const Hdf5Handle type(H5Dget_type(column), H5Tclose, what);
  const Hdf5Handle space(H5Dget_space(column), H5Sclose, what);
  const hsize_t start = begin, length = count;
  const Hdf5Handle memory(H5Screate_simple(1, &length, nullptr), H5Sclose, what);
  if (H5Sselect_hyperslab(space, H5S_SELECT_SET, &start, nullptr, &length, nullptr) < 0 || H5Dread(column, type, memory, space, H5P_DEFAULT, into) < 0)
    fail(ErrorKind::kData, what, Remedy{"copy its folder again, or make it again"});
}

}  // namespace alambic::data
