// SPDX-License-Identifier: Apache-2.0
#include "models/norm.h"

#include <ATen/ops/mean.h>
#include <ATen/ops/rsqrt.h>

namespace alambic::models {

at::Tensor rms_norm(const at::Tensor& x_D, const at::Tensor& weight_D, double offset, double epsilon, at::ScalarType type) {
  const at::Tensor wide_D = x_D.to(at::kFloat);
  const at::Tensor normal_D = wide_D * at::mean(wide_D.square(), {-1}, true).add_(epsilon).rsqrt_();
  return (normal_D * (offset == 0 ? weight_D : weight_D + offset)).to(type);
}

}  // namespace alambic::models
