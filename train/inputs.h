// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a run reads, opened and checked against each other before anything is computed.
#include <string>
#include <utility>
#include <vector>

#include "core/json.h"
#include "data/token_store.h"
#include "models/config.h"
#include "train/train_config.h"

namespace alambic::train {

struct Inputs {
  models::ModelConfig model;
  std::string base_hash;       // checkpoints::FolderTensors::hash
  std::string tokenizer_hash;  // "": the model folder has no tokenizer.json, so stores cannot be checked against it
  std::vector<data::TokenStore> learnt;                             // in the order of data.mixture
  std::vector<std::pair<std::string, data::TokenStore>> held_out;   // in the order of evaluation.stores
  std::vector<std::string> warnings;
};

/// Error(kUsage) for a contradictory config; Error(kData) for a store that is damaged, was made with another tokenizer
/// than the model's (both hashes are shown), or holds ids the model has not.
Inputs open_inputs(const TrainConfig& config);

/// RunState::identity. "run" holds what must be the same for a resumed run to equal the one that was not stopped (paths
/// and what only concerns display or retention are left out; data and base stand by their hashes); "machine" what the bits
/// of floating-point sums depend on besides.
Json identity_of(const TrainConfig& config, const Inputs& inputs);

/// [{"use": "train" | name, "store", "hash", "documents", "tokens", "trained_tokens", "sources": [{name, origin, licence, language}]}]
Json describe_data(const TrainConfig& config, const Inputs& inputs);

/// {"verdict": "open" | "restricted" | "unknown", "reasons": [...]} over the base and every source that is learnt from.
Json licence_verdict(const TrainConfig& config, const Inputs& inputs);

}  // namespace alambic::train
