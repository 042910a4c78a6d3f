// SPDX-License-Identifier: Apache-2.0
#pragma once
// GGUF version 3, written strictly and a tensor at a time: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "checkpoints/gguf_blocks.h"

namespace alambic::checkpoints {

using GgufValue = std::variant<std::uint32_t, std::int32_t, float, bool, std::string, std::vector<std::int32_t>, std::vector<float>, std::vector<std::string>>;
using GgufKeys = std::vector<std::pair<std::string, GgufValue>>;  // in the file's order; general.architecture comes first

struct GgufTensorToWrite {
  std::string name;
  const GgufType* type = nullptr;
  std::vector<std::int64_t> shape;  // slowest axis first, as in PyTorch
};

/// Size of the whole file.
std::uint64_t gguf_file_bytes(const GgufKeys& keys, const std::vector<GgufTensorToWrite>& tensors);

/// Writes `path` as a whole or not at all (AtomicFile): make(i, bytes) fills the bytes of tensor i, once for each and in
/// order, on the calling thread while another one writes the tensor before it; two tensors are in memory. Returns the file's SHA-256.
/// Error(kUsage): the path exists. Error(kResource): not enough room on the disk, found before anything is written.
/// Error(kBug): keys or tensors given twice, names that are too long, rows that are not whole blocks.
std::string write_gguf(const std::filesystem::path& path, const GgufKeys& keys, const std::vector<GgufTensorToWrite>& tensors,
                       const std::function<void(std::size_t, std::byte*)>& make);

}  // namespace alambic::checkpoints
