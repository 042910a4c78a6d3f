// SPDX-License-Identifier: Apache-2.0
#include "lora/stored_weight.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/ScalarType.h>

#include <utility>

#include "core/error.h"
#include "lora/frozen_layout.h"

namespace alambic::lora {

StoredWeight::StoredWeight(at::Tensor weight_OI) : weight_OI_(std::move(weight_OI)) {
  const at::ScalarType type = weight_OI_.scalar_type();
  if ((type != at::kBFloat16 && type != at::kHalf) || weight_OI_.dim() != 2 || !weight_OI_.is_contiguous())
    fail(ErrorKind::kBug, "a weight of ", toString(type), " ", weight_OI_.sizes(), " cannot be kept as it is stored");
}

void StoredWeight::dense_into(const at::Tensor& out_OI) const {
  check_dense(*this, out_OI);
  const at::NoGradGuard constant;
  out_OI.copy_(weight_OI_);
}

void keep_as_stored(models::Linear& linear, const at::Tensor& weight_OI) {
  linear.weight_OI = at::Tensor();
  linear.quantized = std::make_shared<StoredWeight>(weight_OI);
  linear.quantized_compute = at::kFloat;
}

void tie_head(models::Decoder& decoder) {
  if (!decoder.head_tied) return;
  const bool stays = decoder.compute_type() == at::kFloat && at::isReducedFloatingType(decoder.embedding_VD.scalar_type());
  if (stays) keep_as_stored(decoder.head, decoder.embedding_VD);
  else decoder.head.weight_OI = decoder.embedding_VD, decoder.head.quantized = nullptr;
}

}  // namespace alambic::lora
