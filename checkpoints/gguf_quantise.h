// SPDX-License-Identifier: Apache-2.0
#pragma once
// f32 rows -> GGUF's blocks, with the very bits that ggml's reference quantisers give (ggml-quants.c: quantize_row_*_ref, and
// quantize_* where importances are given), as compiled for plain x86-64: one rounding for each operation.
#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "checkpoints/gguf_blocks.h"

namespace alambic::checkpoints {

/// F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K; the others are read only.
bool can_quantise(const GgufType& type);

/// Bytes of `num_values` values, which are whole blocks.
std::int64_t gguf_bytes(const GgufType& type, std::int64_t num_values);

/// values_RI      any float type, at least one dimension; rows are the last one, a multiple of the type's block size.
/// importance_I   f32, finite: how much an error in each column matters (the mean square of what the column is multiplied
///                with); undefined: none. F32, F16, BF16 and Q8_0 do not use it.
/// out            gguf_bytes(type, numel) bytes; rows are shared out among all threads.
/// Error(kData) naming `what`, row and column, when a value is not finite, or when values are too large for the type.
void quantise(const GgufType& type, const at::Tensor& values_RI, const at::Tensor& importance_I, const std::string& what, std::byte* out);

}  // namespace alambic::checkpoints
