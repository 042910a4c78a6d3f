// SPDX-License-Identifier: Apache-2.0
#pragma once
// The little of HDF5's C interface that token stores and teacher caches need, with handles that close themselves. Not every
// build of the library is safe with threads: every function here must be called with hdf5_mutex() held.
#include <hdf5.h>

#include <cstdint>
#include <filesystem>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace alambic::data {

std::mutex& hdf5_mutex();

class Hdf5Handle {
 public:
  /// Takes over an id; Error(kData) "<what>" when it is negative.
  Hdf5Handle(hid_t id, herr_t (*closer)(hid_t), const std::string& what);
  Hdf5Handle() = default;
  ~Hdf5Handle();
  Hdf5Handle(Hdf5Handle&& other) noexcept : id_(std::exchange(other.id_, -1)), close_(other.close_) {}
  Hdf5Handle& operator=(Hdf5Handle&& other) noexcept;
  operator hid_t() const { return id_; }  // NOLINT: it stands for the id wherever the C functions want one
  herr_t close();                         // for writers, which must see that closing worked

 private:
  hid_t id_ = -1;
  herr_t (*close_)(hid_t) = nullptr;
};

/// A new file in the format of HDF5 1.10, without times, so that equal contents give equal bytes. Error(kResource).
Hdf5Handle create_hdf5(const std::filesystem::path& path);

/// A column of `count` > 0 values in chunks of at most chunk_values: shuffle, deflate, fletcher32. Error(kResource).
void write_column(hid_t file, const std::string& name, hid_t type, std::uint64_t count, std::uint64_t chunk_values, const void* values);

void write_attribute(hid_t file, const std::string& name, std::uint64_t value);
void write_attribute(hid_t file, const std::string& name, const std::string& text);

/// Opens for reading what create_hdf5 could have written and nothing else: HDF5 superblock 2 or 3 without extension or user
/// block, and exactly `names` as hard links to data sets in the root. Error(kData).
Hdf5Handle open_hdf5(const std::filesystem::path& path, const std::vector<std::string>& names);

/// A column as write_column made it: this type, length, chunk size and filters, no external or virtual storage. Error(kData).
Hdf5Handle open_column(hid_t file, const std::filesystem::path& path, const std::string& name, hid_t type, std::uint64_t count,
                       std::uint64_t chunk_values);

/// Values [begin, begin + count) in the type they are stored in. Error(kData) naming file, column and range.
void read_column(hid_t column, const std::filesystem::path& path, const std::string& name, std::uint64_t begin, std::uint64_t count, void* into);

}  // namespace alambic::data
