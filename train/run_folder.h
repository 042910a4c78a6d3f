// SPDX-License-Identifier: Apache-2.0
#pragma once
// The run folder and what a fine-tune keeps in it: who may write, where to go on, what comes out at the end.
#include <filesystem>
#include <optional>

#include "core/files.h"
#include "core/json.h"
#include "models/decoder.h"
#include "train/finetune.h"
#include "train/inputs.h"
#include "train/loop.h"

namespace alambic::train {

/// Makes the run folder and holds it. Error(kUsage) when another process does, or when it cannot be made.
class RunFolder {
 public:
  explicit RunFolder(const std::filesystem::path& folder);

 private:
  FolderLock lock_;
};
/// Error(kUsage) when the folder holds something and `resume` is false.
void require_new_or_resumed(const TrainConfig& config, bool resume);

/// The report of a run that has ended; nullopt while it has not. Error(kUsage) lists what differs from the run that ended.
std::optional<TrainReport> finished_run(const TrainConfig& config, const Inputs& inputs);

void use_threads(const TrainConfig& config);
/// Attaches the adapter, still empty (its first values are lora::initialise's or a checkpoint's), or makes every weight train.
void make_trainable(models::Decoder& decoder, const TrainConfig& config);

/// Parameters that train and are none of the model's (kBesideModel).
std::int64_t parameters_beside(const Optimizer& optimizer);

/// Bytes of one checkpoint of a model of num_parameters, at most.
std::uint64_t checkpoint_bytes(const TrainConfig& config, const Optimizer& optimizer, std::int64_t num_parameters);
/// Error(kResource) when the checkpoints that are kept at once will not fit on the disk.
void require_disk(const TrainConfig& config, const Optimizer& optimizer, std::int64_t num_parameters);

/// The first limit reached, in steps. A limit in tokens is turned into steps by the mean of the first steps' tokens.
std::int64_t total_steps(const TrainConfig& config, const data::BatchStream& batches, const Inputs& inputs);

/// Name of the evaluation store that decides which checkpoint is best; "" where there is none.
std::string chosen_by(const TrainConfig& config);

/// All held-out stores, by name, each by all ranks; null where there are none.
Json evaluate_all(const TrainConfig& config, const models::Decoder& decoder, const Inputs& inputs, parallel::Communicator& ranks);

/// Puts weights, moments and data position of the newest valid checkpoint back; nullopt when there is none. Writes
/// <run>/config.json. Error(kUsage) lists what differs from the run that wrote it; another thread count or processor is a warning.
std::optional<Progress> restore(const TrainConfig& config, const Inputs& inputs, const LoopParts& parts);

/// LoRA: <folder>/adapter. Full, and LoRA with restarts: nothing, as the checkpoint's own tensors are (or make) the weights.
void write_result(const TrainConfig& config, models::Decoder& decoder, const Inputs& inputs, const std::filesystem::path& folder);

/// Copies the chosen checkpoint's result to <run>/adapter (or makes <run>/weights of it) and writes report.json, last.
TrainReport finish(const TrainConfig& config, const Inputs& inputs, const Progress& progress);

}  // namespace alambic::train
