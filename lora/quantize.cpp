// SPDX-License-Identifier: Apache-2.0
#include "lora/quantize.h"

#include "core/error.h"
#include "lora/int8.h"
#include "lora/nf4.h"

namespace alambic::lora {

std::string name_of(const BaseQuantization& quantization) {
  return quantization.format == "nf4" && !quantization.double_quant ? "nf4-single" : quantization.format;
}

BaseQuantization quantization_of_name(std::string_view name, std::string_view where) {
  for (const BaseQuantization& known : {BaseQuantization{}, BaseQuantization{.format = "nf4"}, BaseQuantization{.format = "nf4", .double_quant = false}, BaseQuantization{.format = "int8"}})
    if (name_of(known) == name) return known;
  fail(ErrorKind::kData, where, ": the base is quantised as \"", name, "\", which is not known here", Remedy{"nf4, nf4-single and int8 are"});
}

std::shared_ptr<const models::FrozenWeight> quantize(const at::Tensor& weight_OI, const BaseQuantization& quantization) {
  if (quantization.format == "nf4") return std::make_shared<Nf4Weight>(weight_OI.size(0), weight_OI.size(1), quantize_nf4(weight_OI, quantization.double_quant));
  if (quantization.format == "int8") return std::make_shared<Int8Weight>(quantize_int8(weight_OI));
  fail(ErrorKind::kBug, "a weight is to be quantised as \"", quantization.format, "\"");
}

}  // namespace alambic::lora
