// SPDX-License-Identifier: Apache-2.0
#pragma once
// The one loop, whatever the loss: steps, evaluations, samples, checkpoints, early stop, limits, stop on request.
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>

#include "core/json.h"
#include "data/batch_stream.h"
#include "parallel/communicator.h"
#include "train/base_state.h"
#include "train/optimizer.h"
#include "train/run_log.h"
#include "train/step.h"
#include "train/train_config.h"

namespace alambic::train {

/// So many steps in a row that are not finite end the run.
inline constexpr std::int64_t kMaxBadSteps = 5;

/// What a loop calls; the recipe says what it means.
struct LoopParts {
  data::BatchStream& batches;
  Optimizer& optimizer;
  parallel::Communicator& ranks;
  LossSum loss_sum;
  /// Held-out figures by name, the same on all ranks: {"<name>": {"loss": ..., ...}}; null where there is nothing to evaluate on.
  std::function<Json()> evaluate;
  /// Continuations of the fixed prompts, asked of rank 0 alone, or of all ranks where they share the decoder: [{"prompt", "text"}].
  std::function<Json(std::int64_t step)> sample;
  /// What a run changes of its frozen base, as tensors of a checkpoint, and how a decoder is brought there again.
  std::function<NamedTensors()> base_state;
  std::function<void(const NamedTensors&)> restore_base;
  /// lora.restart_every: merges the adapters and begins them anew, for the number-th time.
  std::function<void(std::int64_t number)> restart = {};
  /// Writes what the run makes (a PEFT folder) into a checkpoint folder.
  std::function<void(const std::filesystem::path&)> write_result;
  std::function<bool()> stop_requested;
  std::filesystem::path run;
  Json identity;              // RunState::identity
  std::int64_t total_steps = 0;
  std::string chosen_by;      // the evaluation whose loss decides; "": the last checkpoint is chosen
  Figures figures = {};       // what a recipe tells of a step besides its loss, for the step's line in metrics.jsonl
  std::string verb = "train";  // of the command that goes on with a stopped run
  models::ShardedBlocks* shards = nullptr;  // of the decoder, where ranks share it: then all of them sample
};

/// What travels in a checkpoint besides tensors, and what a finished loop reports.
struct Progress {
  std::int64_t step = 0;             // finished steps
  std::int64_t tokens = 0, kept_tokens = 0;
  double smoothed_loss = 0;          // exponential moving average over steps, 0.98 of the past; starts at the first loss
  std::int64_t bad_steps = 0, bad_steps_in_row = 0;
  Json before, latest;               // evaluations at step 0 and last
  std::int64_t best_step = -1;       // checkpoint with the lowest loss of `chosen_by` after step 0; -1: none yet
  double best_loss = 0;
  Json best;                         // all evaluations of that step
  std::int64_t without_improvement = 0;  // evaluations in a row that fell by less than min_delta
  std::int64_t restarts = 0;         // of the adapters, so far
  std::int64_t optimizer_steps = 0;  // since the last of them
  std::string ended;                 // "": running; "steps", "tokens", "early stop"
  Json data;                         // BatchStream::state()
  std::uint64_t metrics_bytes = 0;
};
Json to_json(const Progress& progress);
Progress progress_from_json(const Json& json, std::string_view source);

/// Collective: all ranks run the same steps and end together; rank 0 alone writes and samples, and no rank goes on before a checkpoint is
/// committed. Runs from `resumed` (or from the start) to its end, with a checkpoint of the last step. Weights, moments and the data
/// position have been restored by the caller. Error(kStopped) after saving when parts.stop_requested(); Error(kNumerics)
/// after kMaxBadSteps bad steps in a row, naming their samples; errors of saving pass through.
Progress run(const TrainConfig& config, const LoopParts& parts, const std::optional<Progress>& resumed);

}  // namespace alambic::train
