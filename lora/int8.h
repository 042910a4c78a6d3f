// SPDX-License-Identifier: Apache-2.0
#pragma once
// Eight bits a value with one scale a row, the weights of LLM.int8() (arXiv:2208.07339, section 2.1): equal to bitsandbytes
// 0.50.2's int8_vectorwise_quant() and int8_vectorwise_dequant() bit for bit. Only weights are quantised here, never what
// they are multiplied with.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

#include "models/frozen_weight.h"

namespace alambic::lora {

struct Int8Parts {
  at::Tensor codes_OI;  // i8, -127 .. 127
  at::Tensor scale_O;   // f32: the row's largest absolute value
};

/// What dense_into() does elsewhere than in a processor's memory; the same bits.
void dequantize_int8_by_operators(const Int8Parts& parts, const at::Tensor& out_OI);

/// weight_OI: f32, bf16 or f16, contiguous, finite. A row of zeros has codes 0.
Int8Parts quantize_int8(const at::Tensor& weight_OI);

class Int8Weight final : public models::FrozenWeight {
 public:
  /// Error(kBug) where the parts do not fit each other.
  explicit Int8Weight(Int8Parts parts);
  std::int64_t outputs() const override { return parts_.codes_OI.size(0); }
  std::int64_t inputs() const override { return parts_.codes_OI.size(1); }
  std::string_view format() const override { return "int8"; }
  std::uint64_t num_bytes() const override { return parts_.codes_OI.nbytes() + parts_.scale_O.nbytes(); }
  at::Device device() const override { return parts_.codes_OI.device(); }
  std::shared_ptr<const models::FrozenWeight> on(at::Device to) const override { return std::make_shared<Int8Weight>(Int8Parts{parts_.codes_OI.to(to), parts_.scale_O.to(to)}); }
  void dense_into(const at::Tensor& out_OI) const override;
  const Int8Parts& parts() const { return parts_; }

 private:
  Int8Parts parts_;
};

}  // namespace alambic::lora
