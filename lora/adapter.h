// SPDX-License-Identifier: Apache-2.0
#pragma once
// Which Linears get an adapter, with which rank; attaching them; the list of everything that trains.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "models/decoder.h"

namespace alambic::lora {

struct LoraConfig {
  std::int64_t rank = 16;
  double alpha = 32;
  double dropout = 0;
  /// Module names or path suffixes ("q_proj", "mlp.down_proj"), or one regular expression over whole paths prefixed
  /// "regex:", or "all-linear" (all but the head), as PEFT matches them.
  std::vector<std::string> targets = {"all-linear"};
  std::map<std::string, std::int64_t> rank_pattern;  // path suffix or regex -> rank, PEFT's rule
  std::map<std::string, double> alpha_pattern;
  bool rslora = false, dora = false;
  std::vector<std::string> modules_to_save;          // trained and saved whole: "embed_tokens", "lm_head"
};

/// Adds adapters: A Kaiming-uniform as PEFT does (seeded by name, not by order), B zero; DoRA magnitudes from the base.
/// modules_to_save become trained copies. Everything else is frozen. Error(kUsage) when a target matches nothing.
void attach(models::Decoder& decoder, const LoraConfig& config, std::uint64_t seed);

/// Makes all base tensors train (full fine-tune).
void train_everything(models::Decoder& decoder);

/// Everything that trains, with the name it is saved under: PEFT's key for adapters
/// ("base_model.model.<path>.lora_A.weight"), the published name for base tensors of a full fine-tune.
std::vector<models::NamedTensor> trainable(models::Decoder& decoder);

}  // namespace alambic::lora
