// SPDX-License-Identifier: Apache-2.0
#pragma once
// Which type each tensor of a GGUF file gets: the mixes of llama.cpp, chosen as its llama-quantize (b10605) chooses them.
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoints/gguf_blocks.h"
#include "checkpoints/gguf_names.h"

namespace alambic::checkpoints {

struct GgufMix {
  std::string_view name;        // "q4_k_m"
  std::uint32_t file_type = 0;  // general.file_type
  std::string_view type;        // of most tensors
};
std::span<const GgufMix> gguf_mixes();
/// Error(kUsage) that lists them, with the nearest.
const GgufMix& find_gguf_mix(const std::string& name);

/// A type for each move. Norms and biases stay f32. has_importance: an importance matrix will be used, which changes a choice
/// for q4_0 and q5_0. Error(kData) for rows that neither the mix's types nor those that stand in for them can hold.
std::vector<const GgufType*> gguf_types_of(const GgufMix& mix, const models::ModelConfig& config, const std::vector<GgufMove>& moves, bool has_importance);

}  // namespace alambic::checkpoints
