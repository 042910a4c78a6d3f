// SPDX-License-Identifier: Apache-2.0
#pragma once
// What distinguishes one decoder family from another, as data. Sizes come from the model's config.json.
#include <cstdint>
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

// Which layers attend through a sliding window, where config.json does not list the layers itself ("layer_types").
enum class SlidingLayers {
  kAll,          // every layer, as soon as the config names a window
  kFromLayer,    // those from "max_window_layers" on
  kPattern,      // all but each "sliding_window_pattern"-th, or Family::sliding_pattern-th
  kWithoutRope,  // those that "no_rope_layers" leaves without positions
};

struct Family {
  std::string_view model_type;    // as in config.json
  std::string_view architecture;  // as in config.json "architectures"
  std::string_view source;        // paper or model card the choices below were read from
  /// The keys of config.json this family reads, with the values that stand in for absent ones: the fields and defaults of
  /// transformers' config class (5.23), as JSON. A key that is not here means nothing to the family.
  std::string_view defaults;
  double rope_theta = 10000;        // where config.json names none
  double local_rope_theta = 0;      // not 0: layers with a sliding window rotate with a base of their own
  bool partial_longrope = false;    // heads may be rotated in part, and every RoPE scaling is LongRoPE ("su", "yarn": older names)
  SlidingLayers sliding_layers = SlidingLayers::kAll;
  std::int64_t sliding_pattern = 6;  // kPattern's, where config.json names none
  bool qkv_bias = false;            // always; otherwise "attention_bias" decides for q, k, v and the output
  double norm_weight_offset = 0;    // 1 where the published norm weight w means (1 + w)
  bool scale_embedding = false;     // embeddings times sqrt(hidden size), rounded to the embedding's type first
  bool soft_caps = false;           // "attn_logit_softcapping" and "final_logit_softcapping" are obeyed; elsewhere they must be null
  std::span<const WeightName> names;  // in the order of the forward pass; the slots named here are the parts the decoder has

  bool has(Slot slot) const;
};

const Family& find_family(std::string_view model_type);  // throws Error(kData) listing the known families
std::vector<const Family*> all_families();

}  // namespace alambic::models
