// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a run changes of the base's frozen weights, as tensors of its checkpoints (docs/run_state.md), so that a resumed run
// stands on the same bits:
//   base.<name>                                    f32: the weights that adapters were merged into (lora.restart_every), by published name
//   initial.<path>.lora_A.weight, .lora_B.weight   what PiSSA and OLoRA took out of the weight of <path> at the start
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lora/adapter.h"
#include "models/decoder.h"

namespace alambic::train {

/// What a recipe trains beside the model (the projections of distill/match.h) has a name that begins so: it is kept in checkpoints,
/// and is in no result.
inline constexpr std::string_view kBesideModel = "beside.";
/// Of a trained tensor's name, or of its name in a checkpoint ("weights.<name>", "mean.<name>", ...).
bool is_beside_model(std::string_view name);

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

/// Views, not copies.
NamedTensors base_state(models::Decoder& decoder, const lora::LoraConfig& config);

/// Whether a checkpoint's tensor of this name is one of these.
bool is_base_state(std::string_view name);

/// Puts the base of a decoder just loaded, with empty adapters attached, where the run had brought it. Error(kData) listing
/// what does not fit.
void restore_base(models::Decoder& decoder, const lora::LoraConfig& config, const NamedTensors& state);

}  // namespace alambic::train
