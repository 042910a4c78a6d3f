// SPDX-License-Identifier: Apache-2.0
#pragma once
// The one place where y = x W^T + b + scale (dropout(x) A^T) B^T is computed.
// Letters: T = tokens, I = inputs, O = outputs, R = adapter rank.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace alambic::models {

/// Low-rank update of one Linear: LoRA (arXiv:2106.09685), with DoRA's magnitude (arXiv:2402.09353) where given.
struct Adapter {
  at::Tensor a_RI, b_OR;   // f32, trained
  at::Tensor magnitude_O;  // f32, trained; undefined: plain LoRA
  double scale = 1;        // alpha / rank, or alpha / sqrt(rank) for rsLoRA
  double dropout = 0;      // probability that an input of the adapter is zeroed while training
  std::uint64_t id = 0;    // position in the list of adapters: part of the dropout's seed
};

struct Linear {
  at::Tensor weight_OI;  // compute type; a leaf that requires_grad when it is trained itself
  at::Tensor bias_O;     // undefined: none
  std::optional<Adapter> adapter;

  /// x_TI in f32 or the compute type; the result has the weight's type. dropout_seed: 0 = evaluating, no dropout.
  at::Tensor operator()(const at::Tensor& x_TI, std::uint64_t dropout_seed) const;
};

}  // namespace alambic::models
