// SPDX-License-Identifier: Apache-2.0
#pragma once
// Rotary position embedding (arXiv:2104.09864), rotating the two halves of a head against each other as the Hugging Face
// weights are laid out. Letters: T = tokens, H = heads, S = head size, F = rotated pairs of a head.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "models/config.h"

namespace alambic::models {

/// Made once a forward pass; f32 [T, 1, F].
struct RotaryTable {
  at::Tensor cos_T1F, sin_T1F;
};

/// positions_T: i64. document_lengths: how the tokens are cut into documents, which LongRoPE tells apart by their length.
/// positions_T are in a processor's memory, the table is where it is wanted.
RotaryTable rotary_table(const Rope& rope, const at::Tensor& positions_T, const std::vector<std::int64_t>& document_lengths, at::Device device = at::kCPU);

/// x_THS rotated in f32, returned in its own type. The part of a head beyond 2 F passes unchanged.
at::Tensor rotate(const at::Tensor& x_THS, const RotaryTable& table);

}  // namespace alambic::models
