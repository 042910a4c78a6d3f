// SPDX-License-Identifier: Apache-2.0
#pragma once
// config.json of a Hugging Face model folder, read strictly into the sizes and switches a decoder needs.
//
// What a key means, and what stands in for an absent one, is as in transformers 5.23. Keys that change nothing here pass
// through in `source`. A key that would change the result in a way that is not implemented (another activation, soft
// capping in a family that has none, quantised weights, ...) is an error. Dropout inside the base model (attention_dropout, resid_pdrop, embd_pdrop)
// is read but never applied, in training neither; a value above 0 is said on the log.
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "core/json.h"
#include "models/family.h"

namespace alambic::models {

/// Rotary embedding of one kind of layer. inverse_frequency and attention_factor already contain all scaling
/// (default, linear, llama3, yarn, longrope as the families here use them).
struct Rope {
  double theta = 10000;
  std::int64_t rotary_size = 0;             // leading part of each head that is rotated; even
  std::vector<double> inverse_frequency;    // rotary_size / 2 values, each an exact f32
  double attention_factor = 1;              // multiplies cos and sin
  // LongRoPE only: documents of more than long_from tokens are rotated by these. 0: no such limit.
  std::vector<double> long_inverse_frequency;
  std::int64_t long_from = 0;
};

struct LayerConfig {
  std::int64_t window = 0;   // sliding attention over the last `window` tokens; 0 = full
  bool use_rope = true;      // false: SmolLM3's position-free layers
  bool local_rope = false;   // Gemma 3: the layer uses ModelConfig::local_rope
};

struct ModelConfig {
  const Family* family = nullptr;
  std::int64_t vocabulary_size = 0, hidden_size = 0, intermediate_size = 0, num_layers = 0;
  std::int64_t num_heads = 0, num_kv_heads = 0, head_size = 0, max_positions = 0;
  double norm_epsilon = 1e-6;
  double attention_scale = 0;                  // q k^T times this
  double attention_soft_cap = 0, logit_soft_cap = 0;  // scores, and the head's logits, become cap * tanh(x / cap); 0: none
  bool gelu_tanh = false;                      // gate activation: GELU (tanh form) instead of SiLU
  bool qkv_bias = false, output_bias = false, mlp_bias = false;
  bool tied_head = false;
  Rope rope, local_rope;
  std::vector<LayerConfig> layers;
  std::vector<std::int64_t> eos_ids;           // of generation_config.json, else of config.json
  std::int64_t bos_id = -1;                    // -1: none
  std::int64_t pad_id = -1;                    // -1: none. As in transformers its embedding gets no gradient
  Json source;                                 // the whole config.json, passed through when a folder is written
  std::int64_t num_parameters() const;         // head counted once where it is tied
};

/// Error(kData) that lists every problem: unknown model_type, unknown switch values, absurd or contradictory sizes.
ModelConfig read_model_config(const Json& config, std::string_view source);
ModelConfig read_model_config(const std::filesystem::path& model_folder);  // also reads generation_config.json

}  // namespace alambic::models
