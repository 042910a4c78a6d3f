// SPDX-License-Identifier: Apache-2.0
#pragma once
// Which narrower format the frozen base is kept in, as a config chooses it and as an adapter's folder remembers it.
#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <string_view>

#include "models/frozen_weight.h"

namespace alambic::lora {

/// For the Linears of the blocks; embedding, head and norms stay as they are.
struct BaseQuantization {
  std::string format = "none";  // none, nf4, int8
  bool double_quant = true;     // nf4: the scales in 8 bits
  bool is_on() const { return format != "none"; }
  bool operator==(const BaseQuantization&) const = default;
};

/// "nf4", "nf4-single" (without double quantisation), "int8", "none"; and back, or Error(kData) that begins with `where`.
std::string name_of(const BaseQuantization& quantization);
BaseQuantization quantization_of_name(std::string_view name, std::string_view where);

/// weight_OI: f32, bf16 or f16, contiguous, finite. quantization must be on.
std::shared_ptr<const models::FrozenWeight> quantize(const at::Tensor& weight_OI, const BaseQuantization& quantization);

}  // namespace alambic::lora
