// SPDX-License-Identifier: Apache-2.0
#pragma once
// Checkpoints of a run: <run>/checkpoint-<step>/ with safetensors + JSON, a manifest of hashes written last, renamed into
// place, read back, and only then older ones removed. docs/run_state.md is the format.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/json.h"

namespace alambic::checkpoints {

struct RunState {
  std::int64_t step = 0;
  std::vector<std::pair<std::string, at::Tensor>> tensors;  // trained weights and optimiser moments, by name
  Json progress;     // everything else that continues: data position, counters, best metric, log length
  Json identity;     // config, base hash, data hashes, adapter config: what a resume is compared with
};

/// Commits <run>/checkpoint-<step>. `more(folder)` writes further files (the PEFT folder) into the temporary folder.
std::filesystem::path save_checkpoint(const std::filesystem::path& run, const RunState& state,
                                      const std::function<void(const std::filesystem::path&)>& more = {});

/// The newest checkpoint whose manifest and hashes hold; says which ones it passed over and why. nullopt when none is there.
/// Stale temporary folders are removed.
std::optional<std::filesystem::path> newest_checkpoint(const std::filesystem::path& run);
RunState load_checkpoint(const std::filesystem::path& checkpoint);

/// Removes all but the newest `keep` checkpoints and those named in `also_keep`.
void apply_retention(const std::filesystem::path& run, std::int64_t keep, const std::vector<std::int64_t>& also_keep);

}  // namespace alambic::checkpoints
