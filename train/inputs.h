// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a run reads, opened and checked against each other before anything is computed.
#include <string>
#include <utility>
#include <vector>

#include "checkpoints/licence.h"
#include "core/json.h"
#include "data/token_store.h"
#include "models/config.h"
#include "train/train_config.h"

namespace alambic::train {

/// A model besides the base that the result is made from (a teacher): its terms reach the result too.
struct Contributor {
  std::filesystem::path folder;  // of the model, or of what was kept of it (a teacher cache)
  std::string sha256;            // of the model
  checkpoints::Licence licence;
  Json more = Json::object();  // further facts for the report
};

struct Inputs {
  models::ModelConfig model;
  std::string base_hash;       // checkpoints::FolderTensors::hash
  std::string tokenizer_hash;  // "": the model folder has no tokenizer.json, so stores cannot be checked against it
  std::vector<data::TokenStore> learnt;                             // in the order of data.mixture
  std::vector<std::pair<std::string, data::TokenStore>> held_out;   // in the order of evaluation.stores
  std::vector<std::string> warnings;
  /// What a recipe reads besides (train/finetune.h): its own sections of the config, resolved, and what of them identifies the run.
  std::vector<Contributor> contributors;
  Json sections = Json::object(), sections_identity = Json::object();
};

/// Error(kUsage) for a contradictory config; Error(kData) for a store that is damaged, was made with another tokenizer
/// than the model's (both hashes are shown), or holds ids the model has not.
Inputs open_inputs(const TrainConfig& config);

/// The whole config, resolved: TrainConfig's fields and a recipe's own sections.
Json resolved_config_of(const TrainConfig& config, const Inputs& inputs);

/// RunState::identity. "run" holds what must be the same for a resumed run to equal the one that was not stopped (paths
/// and what only concerns display or retention are left out; data and base stand by their hashes); "machine" what the bits
/// of floating-point sums depend on besides.
Json identity_of(const TrainConfig& config, const Inputs& inputs);

/// {"use", "store", "sha256", "documents", "tokens", "trained_tokens", "sources": [{name, origin, licence, language}]}
Json describe_store(const std::string& use, const std::filesystem::path& folder, const data::TokenStore& store);
/// That of all stores of a run; "use" is "train", or the name of an evaluation.
Json describe_data(const TrainConfig& config, const Inputs& inputs);

/// [{"folder", "sha256", "licence", ...}]: a contributor each.
Json describe_contributors(const Inputs& inputs);

/// {"verdict": "open" | "restricted" | "unknown", "reasons": [...]} over the base, every contributor and every source that is learnt from.
Json licence_verdict(const TrainConfig& config, const Inputs& inputs);

}  // namespace alambic::train
