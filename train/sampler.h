// SPDX-License-Identifier: Apache-2.0
#pragma once
// Continuations of fixed prompts while a run goes on: the same greedy question at step 0 and later.
#include <optional>
#include <vector>

#include "core/json.h"
#include "data/tokenizer.h"
#include "models/decoder.h"
#include "train/train_config.h"

namespace alambic::train {

class Sampler {
 public:
  /// Encodes the prompts of config.samples. decoder must outlive this object. Error(kUsage) when there are prompts but
  /// the model folder has no tokenizer, or no chat template where config.samples.chat.
  Sampler(const TrainConfig& config, const models::Decoder& decoder);
  /// [{"prompt", "text"}], greedy; [] without prompts.
  Json samples() const;

 private:
  const models::Decoder& decoder_;
  SamplesConfig config_;
  std::optional<data::Tokenizer> tokenizer_;
  std::vector<std::vector<std::int64_t>> prompts_;
};

}  // namespace alambic::train
