// SPDX-License-Identifier: Apache-2.0
#pragma once
// The safetensors format (header of JSON, then bytes), read from a mapping and written whole or not at all.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace alambic::checkpoints {

struct TensorEntry {
  at::ScalarType type;
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0, end = 0;  // in the file's data section
};

/// A file whose header was checked by every rule of the format before a tensor is handed out (safetensors_header.h).
class SafetensorsFile {
 public:
  /// Error(kData) naming the file when it is missing or breaks a rule. Nothing but the header is read.
  explicit SafetensorsFile(const std::filesystem::path& path);
  const std::map<std::string, TensorEntry>& entries() const;
  const std::map<std::string, std::string>& metadata() const;
  /// A view into the mapping; it stays valid after this object is gone. Pages are read from disk when first touched.
  /// Writing into it is allowed and never reaches the file (copy on write), but other views of the same tensor see it.
  /// Where the file places a tensor at an address its type cannot have, a copy is returned. Error(kData): no such tensor.
  at::Tensor tensor(const std::string& name) const;
  /// Values [first, first + count) of the flattened tensor, likewise: nothing else of it is read or copied.
  at::Tensor slice(const std::string& name, std::int64_t first, std::int64_t count) const;
  /// The tensor in `type`: the view where it is stored so, else a copy, after which the mapping's pages are given back, so
  /// that converting a whole file holds one copy of it and not two.
  at::Tensor tensor_as(const std::string& name, at::ScalarType type) const;
  /// Gives the mapping's pages of a tensor back, after it was read for good; touching it again reads the file again.
  void release(const std::string& name) const;
  const std::filesystem::path& path() const;

 private:
  struct State;
  std::shared_ptr<const State> state_;
};

/// A tensor yet to be written.
struct TensorToWrite {
  std::string name;
  at::ScalarType type;
  std::vector<std::int64_t> shape;
};

/// Writes tensors in the format's order (widest element type first, then name) and returns the file's SHA-256.
/// make(i) is called once for each element of `tensors`, in the file's order, so that one tensor is in memory at a time; what
/// it returns must have the type and shape announced. The file appears under `path` only when it is whole (a mapping of
/// an older file of that name stays intact). Error(kNumerics) names the first value that is not finite.
std::string write_safetensors(const std::filesystem::path& path, const std::vector<TensorToWrite>& tensors,
                              const std::function<at::Tensor(std::size_t)>& make,
                              const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

/// That order, as places among the tensors.
std::vector<std::size_t> order_in_file(const std::vector<TensorToWrite>& tensors);

/// The same for tensors that exist already.
std::string write_safetensors(const std::filesystem::path& path, const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                              const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

/// Index (of the flattened tensor) of the first NaN or infinity, or -1. One pass over memory, on all threads.
/// tensor: contiguous, on the CPU; integer types hold none.
std::int64_t first_non_finite(const at::Tensor& tensor);

}  // namespace alambic::checkpoints
