// SPDX-License-Identifier: Apache-2.0
#pragma once
// Folding an adapter into the weight it adapts.
#include <ATen/core/Tensor.h>

#include "models/linear.h"

namespace alambic::lora {

/// f32 [O, I]: base + scale B A, or with DoRA  m * (base + scale B A) / ||base + scale B A||_row. Computed in f32.
at::Tensor merged_weight(const at::Tensor& base_OI, const models::Adapter& adapter);

}  // namespace alambic::lora
