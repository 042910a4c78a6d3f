// SPDX-License-Identifier: Apache-2.0
#include "models/device.h"

#include <map>

#include "core/error.h"
#include "models/decoder.h"
#include "models/sharded_blocks.h"

namespace alambic::models {

void move_to(Decoder& decoder, at::Device device) {
  if (decoder.fused) fail(ErrorKind::kBug, "a decoder with fused blocks cannot be moved to ", device.str());
  std::map<const c10::TensorImpl*, std::pair<at::Tensor, at::Tensor>> moved;  // both: an address may not be used again meanwhile
  const auto move = [&](at::Tensor& tensor) {
    if (!tensor.defined()) return;
    auto& [before, after] = moved[tensor.unsafeGetTensorImpl()];
    if (!after.defined()) before = tensor, after = tensor.detach().to(device).set_requires_grad(tensor.requires_grad());
    tensor = after;
  };
  for (const NamedTensor& named : decoder.tensors()) move(*named.tensor);
  move(decoder.token_rows_ND);
  for (const NamedLinear& named : decoder.linears()) {
    Linear& linear = *named.linear;
    move(linear.weight_OI), move(linear.bias_O), move(linear.token_rows_ND);
    if (linear.quantized && linear.quantized->device() != device) linear.quantized = linear.quantized->on(device);
    if (!linear.adapter) continue;
    for (at::Tensor* const tensor : {&linear.adapter->a_RI, &linear.adapter->b_OR, &linear.adapter->magnitude_O, &linear.adapter->initial_a_RI, &linear.adapter->initial_b_OR}) move(*tensor);
  }
  if (decoder.shards) decoder.shards->move_to(device);
}

}  // namespace alambic::models
