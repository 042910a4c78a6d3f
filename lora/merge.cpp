// SPDX-License-Identifier: Apache-2.0
#include "lora/merge.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/linalg_vector_norm.h>

namespace alambic::lora {

at::Tensor merged_weight(const at::Tensor& base_OI, const models::Adapter& adapter) {
  const at::NoGradGuard no_gradients;
  const at::Tensor sum_OI = at::addmm(base_OI.to(at::kFloat), adapter.b_OR.to(at::kFloat), adapter.a_RI.to(at::kFloat), 1, adapter.scale);
  if (!adapter.magnitude_O.defined()) return sum_OI;
  const at::Tensor norm_O = at::linalg_vector_norm(sum_OI, 2, at::IntArrayRef{1});
  return sum_OI * (adapter.magnitude_O.to(at::kFloat) / norm_O).unsqueeze(1);
}

}  // namespace alambic::lora
