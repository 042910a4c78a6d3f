// SPDX-License-Identifier: Apache-2.0
#pragma once
// What distinguishes one decoder family from another, as data. Sizes come from the model's config.json.
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace alambic::models {

// Every tensor a decoder can own. A family fills some of them.
enum class Slot {
  kEmbedding, kAttentionNorm, kQuery, kKey, kValue, kQueryKeyValue, kOutput, kQueryNorm, kKeyNorm, kAfterAttentionNorm,
  kMlpNorm, kGate, kUp, kGateUp, kDown, kAfterMlpNorm, kFinalNorm, kHead,
};

// One row maps one slot to its published module path, both when loading and when writing. ".weight" (and ".bias") follow.
struct WeightName {
  Slot slot;
  std::string_view published;  // {L} stands for the layer number
};

struct Family {
  std::string_view model_type;    // as in config.json
  std::string_view architecture;  // as in config.json "architectures"
  std::string_view source;        // paper or model card the choices below were read from
  bool query_key_norm = false;    // RMSNorm on each head's q and k before RoPE
  bool gelu_tanh = false;         // gate activation: GELU (tanh form) instead of SiLU; must agree with config.json
  double norm_weight_offset = 0;  // 1 where the published norm weight w means (1 + w)
  bool scale_embedding = false;   // embeddings times sqrt(hidden size), rounded to the embedding's type first
  // ... further switches that a family needs, each with its default
  std::span<const WeightName> names;       // shared by most families
  std::span<const WeightName> more_names = {};
};

const Family& find_family(std::string_view model_type);  // throws Error(kData) listing the known families
std::vector<const Family*> all_families();

}  // namespace alambic::models
