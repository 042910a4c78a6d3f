// SPDX-License-Identifier: Apache-2.0
#pragma once
// A model folder whose blocks several ranks share.
#include <ATen/core/ScalarType.h>

#include <filesystem>

#include "checkpoints/base_weights.h"
#include "lora/quantize.h"
#include "models/decoder.h"
#include "parallel/communicator.h"

namespace alambic::checkpoints {

/// Makes the linear layers of all blocks frozen weights that the ranks share (lora/sharded_weight.h), as load_decoder() would load or quantise
/// them, bit for bit. A rank reads its own part of each tensor, and holds no more of it at any time. Collective.
void load_shards(models::Decoder& decoder, const BaseWeights& weights, at::ScalarType compute_type, const lora::BaseQuantization& quantization, const Sharing& sharing,
                 const std::filesystem::path& folder);

}  // namespace alambic::checkpoints
