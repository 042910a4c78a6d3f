// SPDX-License-Identifier: Apache-2.0
#pragma once
// GGUF's quantised blocks to f32, bit for bit as the gguf package does (gguf/quants.py). Free of libtorch.
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace alambic::checkpoints {

/// A tensor type of GGUF. A block of `block_size` values takes `block_bytes` bytes.
struct GgufType {
  std::uint32_t id;  // ggml_type in the file
  std::string_view name;
  std::int64_t block_size;
  std::int64_t block_bytes;
  /// Writes num_blocks * block_size values; nullptr where the stored values are used as they are (F32, F16, BF16).
  void (*dequantise)(const std::byte* blocks, std::int64_t num_blocks, float* values);
};

/// F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K.
std::span<const GgufType> gguf_types();
const GgufType* find_gguf_type(std::uint32_t id);  // nullptr: not read here
std::string_view gguf_type_name(std::uint32_t id);  // also of types that are not read; "?" for unknown numbers

}  // namespace alambic::checkpoints
