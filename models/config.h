// SPDX-License-Identifier: Apache-2.0
#pragma once
// config.json of a Hugging Face model folder, read strictly into the sizes and switches a decoder needs.
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
  std::vector<double> inverse_frequency;    // rotary_size / 2 values
  double attention_factor = 1;              // multiplies cos and sin
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
  bool qkv_bias = false, output_bias = false, mlp_bias = false;
  bool tied_head = false;
  Rope rope, local_rope;
  std::vector<LayerConfig> layers;
  std::vector<std::int64_t> eos_ids;           // of config.json or generation_config.json
  std::int64_t bos_id = -1;
  Json source;                                 // the whole config.json, passed through when a folder is written
  std::int64_t num_parameters() const;         // head counted once where it is tied
};

/// Error(kData) that lists every problem: unknown model_type, unknown switch values, absurd or contradictory sizes.
ModelConfig read_model_config(const Json& config, std::string_view source);
ModelConfig read_model_config(const std::filesystem::path& model_folder);  // also reads generation_config.json

}  // namespace alambic::models
