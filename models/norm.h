// SPDX-License-Identifier: Apache-2.0
#pragma once
// Root-mean-square normalisation (arXiv:1910.07467). Letters: ... = any leading axes, D = the normalised axis.
#include <ATen/core/Tensor.h>

namespace alambic::models {

/// x / sqrt(mean_D(x^2) + epsilon) * (offset + weight), computed in f32 and returned in `type`. x may be f32 or bf16.
at::Tensor rms_norm(const at::Tensor& x_D, const at::Tensor& weight_D, double offset, double epsilon, at::ScalarType type);

}  // namespace alambic::models
