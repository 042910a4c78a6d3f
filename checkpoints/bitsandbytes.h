// SPDX-License-Identifier: Apache-2.0
#pragma once
// Model folders whose linear layers bitsandbytes quantised (transformers' BitsAndBytesConfig, saved with save_pretrained).
// For each such weight W of shape [O, I], n = O I, b = ceil(n / 64), as bitsandbytes 0.50 writes it:
//   4 bits  W u8 [ceil(n / 2), 1]; W.absmax u8 [b]; W.quant_map f32 [16]; W.nested_absmax f32 [ceil(b / 256)];
//           W.nested_quant_map f32 [256]; W.quant_state.bitsandbytes__nf4, the bytes of a JSON text.
//           Without double quantisation W.absmax is f32 and nothing is nested.
//   8 bits  W i8 [O, I]; <module>.SCB f32 [O]; <module>.weight_format u8, 0
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoints/hf_folder.h"
#include "core/json.h"
#include "models/frozen_weight.h"

namespace alambic::checkpoints {

/// What config.json says its linear layers are kept in: "none", "nf4", "int8". Error(kData) lists what of its
/// quantization_config is not read here: fp4, other storage types, unknown keys, contradictions.
std::string stored_format(const Json& config, std::string_view source);

/// The tensors that belong to the quantised weight `name` besides itself; empty where it is stored dense.
std::vector<std::string> quantized_parts(const FolderTensors& tensors, const std::string& name, const std::string& format);

/// The weight, with views of the mapping for all that is large. Everything that could make its values other than finite and
/// of the shape asked for is checked: Error(kData) names the tensor.
std::shared_ptr<const models::FrozenWeight> load_quantized(const FolderTensors& tensors, const std::string& name, const std::vector<std::int64_t>& shape,
                                                           const std::string& format, const std::string& folder);

}  // namespace alambic::checkpoints
