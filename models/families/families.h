// SPDX-License-Identifier: Apache-2.0
#pragma once
// The families, and the parts of their name tables that several of them share.
#include <array>
#include <cstddef>

#include "models/family.h"

namespace alambic::models {

/// One table out of several, at compile time.
template <std::size_t... kSizes>
constexpr auto join(const WeightName (&... parts)[kSizes]) {
  std::array<WeightName, (kSizes + ...)> all{};
  std::size_t next = 0;
  const auto append = [&](const auto& part) {
    for (const WeightName& name : part) all[next++] = name;
  };
  (append(parts), ...);
  return all;
}

inline constexpr WeightName kEnds[] = {
    {Slot::kEmbedding, "model.embed_tokens"},
    {Slot::kFinalNorm, "model.norm"},
    {Slot::kHead, "lm_head"},
};
inline constexpr WeightName kTwoNorms[] = {
    {Slot::kAttentionNorm, "model.layers.{L}.input_layernorm"},
    {Slot::kMlpNorm, "model.layers.{L}.post_attention_layernorm"},
};
inline constexpr WeightName kFourNorms[] = {
    {Slot::kAttentionNorm, "model.layers.{L}.input_layernorm"},
    {Slot::kAfterAttentionNorm, "model.layers.{L}.post_attention_layernorm"},
    {Slot::kMlpNorm, "model.layers.{L}.pre_feedforward_layernorm"},
    {Slot::kAfterMlpNorm, "model.layers.{L}.post_feedforward_layernorm"},
};
inline constexpr WeightName kHeadNorms[] = {
    {Slot::kQueryNorm, "model.layers.{L}.self_attn.q_norm"},
    {Slot::kKeyNorm, "model.layers.{L}.self_attn.k_norm"},
};
inline constexpr WeightName kProjections[] = {
    {Slot::kQuery, "model.layers.{L}.self_attn.q_proj"},
    {Slot::kKey, "model.layers.{L}.self_attn.k_proj"},
    {Slot::kValue, "model.layers.{L}.self_attn.v_proj"},
    {Slot::kOutput, "model.layers.{L}.self_attn.o_proj"},
    {Slot::kGate, "model.layers.{L}.mlp.gate_proj"},
    {Slot::kUp, "model.layers.{L}.mlp.up_proj"},
    {Slot::kDown, "model.layers.{L}.mlp.down_proj"},
};
inline constexpr auto kCommonNames = join(kEnds, kTwoNorms, kProjections);  // llama's, which most families took over

extern const Family kGemma2, kGemma3Text, kLlama, kMistral, kPhi3, kQwen2, kQwen3, kSmolLm3;

}  // namespace alambic::models
