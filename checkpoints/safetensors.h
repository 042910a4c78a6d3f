// SPDX-License-Identifier: Apache-2.0
#pragma once
// The safetensors format (header of JSON, then bytes), read from a mapping and written whole or not at all.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
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

/// Every rule of the format is checked before a tensor is handed out (reference: safetensors/src/tensor.rs).
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path);
  const std::map<std::string, TensorEntry>& entries() const;
  const std::map<std::string, std::string>& metadata() const;
  /// A view into the mapping (no copy; the mapping lives as long as the tensor). Do not write into it.
  at::Tensor tensor(const std::string& name) const;
  const std::filesystem::path& path() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

/// Writes the tensors in the format's order (alignment descending, then name); returns the file's SHA-256.
/// Refuses non-finite values: Error(kNumerics) naming the tensor and the first bad index.
std::string write_safetensors(const std::filesystem::path& path, const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                              const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

}  // namespace alambic::checkpoints
