// SPDX-License-Identifier: Apache-2.0
#pragma once
// The head of a GGUF file (versions 2 and 3, little endian): metadata and the list of tensors, every count and offset
// checked against the file before it is used. Free of libtorch, so that it can be fuzzed by itself.
// Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoints/gguf_blocks.h"
#include "core/json.h"

namespace alambic::checkpoints {

struct GgufEntry {
  std::string name;
  const GgufType* type = nullptr;
  std::vector<std::int64_t> shape;      // slowest axis first, as in PyTorch (the file has it the other way round)
  std::uint64_t begin = 0, end = 0;     // in the file
};

struct GgufHeader {
  std::uint32_t version = 0;
  Json metadata = Json::object();  // key -> scalar, string or array, in the file's order
  std::vector<GgufEntry> entries;  // in the file's order
};

/// file: all bytes of the file. Error(kData) naming `source` and the key or tensor at the first thing that is wrong.
/// f32 values in metadata become the shortest decimal number that rounds to them (1e-05, not 9.99999974e-06).
GgufHeader parse_gguf_header(std::string_view file, std::string_view source);

}  // namespace alambic::checkpoints
