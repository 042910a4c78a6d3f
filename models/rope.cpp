// SPDX-License-Identifier: Apache-2.0
#include "models/rope.h"

#include <ATen/ops/addcmul.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/sin.h>
#include <ATen/ops/tensor.h>

namespace alambic::models {

RotaryTable rotary_table(const Rope& rope, const at::Tensor& positions_T, const std::vector<std::int64_t>& document_lengths, at::Device device) {
  const at::NoGradGuard constant;
  const auto row = [device](const std::vector<double>& frequency) { return at::tensor(frequency, at::kDouble).to(at::kFloat).unsqueeze(0).to(device); };
  const at::Tensor positions_T1 = positions_T.to(at::kFloat).unsqueeze(1).to(device);
  at::Tensor angle_TF = positions_T1 * row(rope.inverse_frequency);
  if (rope.long_from > 0) {
    std::int64_t first = 0;
    for (const std::int64_t length : document_lengths) {
      const std::int64_t last_position = positions_T[first + length - 1].item<std::int64_t>();
      if (last_position + 1 > rope.long_from)
        angle_TF.narrow(0, first, length).copy_(positions_T1.narrow(0, first, length) * row(rope.long_inverse_frequency));
      first += length;
    }
  }
  const auto factor = rope.attention_factor;
  at::Tensor cos_TF = at::cos(angle_TF), sin_TF = at::sin(angle_TF);
  if (factor != 1) {
    cos_TF.mul_(factor);
    sin_TF.mul_(factor);
  }
  return {cos_TF.unsqueeze(1), sin_TF.unsqueeze(1)};
}

at::Tensor rotate(const at::Tensor& x_THS, const RotaryTable& table) {
  const std::int64_t pairs = table.cos_T1F.size(2), rest = x_THS.size(2) - 2 * pairs;
  const at::Tensor wide_THS = x_THS.to(at::kFloat);
  const at::Tensor first_THF = wide_THS.narrow(2, 0, pairs), second_THF = wide_THS.narrow(2, pairs, pairs);
  const at::Tensor turned_first_THF = (first_THF * table.cos_T1F).addcmul_(second_THF, table.sin_T1F, -1);
  const at::Tensor turned_second_THF = (second_THF * table.cos_T1F).addcmul_(first_THF, table.sin_T1F);
  if (rest == 0) return at::cat({turned_first_THF, turned_second_THF}, 2).to(x_THS.scalar_type());
  return at::cat({turned_first_THF, turned_second_THF, wide_THS.narrow(2, 2 * pairs, rest)}, 2).to(x_THS.scalar_type());
}

}  // namespace alambic::models
