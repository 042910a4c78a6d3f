// SPDX-License-Identifier: Apache-2.0
#pragma once
// Checkpoints of a run: <run>/checkpoint-<step>/ with safetensors + JSON, a manifest of hashes written last, renamed into
// place, read back, and only then older ones removed. docs/run_state.md is the format.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checkpoints/safetensors.h"
#include "core/json.h"

namespace alambic::checkpoints {

struct RunState {
  std::int64_t step = 0;
  std::vector<std::pair<std::string, at::Tensor>> tensors;  // trained weights and optimiser moments, by name
  Json progress;     // everything else that continues: data position, counters, best metric, log length
  Json identity;     // "run": config, base hash, data hashes: what a resume is compared with; "machine": threads, processor
  /// Further tensors, each made when it is written, in the file's order: write_safetensors().
  std::vector<TensorToWrite> made = {};
  std::function<at::Tensor(std::size_t)> make = {};
  std::optional<SafetensorsFile> file = {};  // of a loaded one: its tensors are views of this
};

/// Commits <run>/checkpoint-<step>. `more(folder)` writes further files (the PEFT folder) into the temporary folder.
/// On failure the temporary folder is removed and every earlier checkpoint is as it was. Error(kNumerics) when a tensor is
/// not finite; Error(kResource) when writing fails; Error(kUsage) when the checkpoint exists already.
std::filesystem::path save_checkpoint(const std::filesystem::path& run, const RunState& state,
                                      const std::function<void(const std::filesystem::path&)>& more = {});

/// The newest checkpoint, by its manifest's step, whose manifest and hashes hold. Those that do not hold are named in a
/// warning and renamed to <name>.damaged, so that their name is free again. Stale temporary folders are removed; the
/// caller holds the run's lock. nullopt when no valid one is there.
std::optional<std::filesystem::path> newest_checkpoint(const std::filesystem::path& run);

/// Verifies and reads. Tensors are views of the mapped file. Error(kData) naming the file whose hash does not hold.
RunState load_checkpoint(const std::filesystem::path& checkpoint);

/// "" when every file of the manifest is there with its size and hash; otherwise which one is not, and how.
std::string damage_of(const std::filesystem::path& checkpoint);

/// Removes all but the newest `keep` checkpoints and those of the steps in `also_keep`.
void apply_retention(const std::filesystem::path& run, std::int64_t keep, const std::vector<std::int64_t>& also_keep);

/// What differs between two JSON values, a line each: "data.row_length: 512 then, 1024 now". Empty: equal.
std::vector<std::string> differences(const Json& then, const Json& now);

}  // namespace alambic::checkpoints
