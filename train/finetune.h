// SPDX-License-Identifier: Apache-2.0
#pragma once
// The recipe: a base model and token stores in, a trained adapter (or trained weights) in a run folder out.
//   <run>/config.json            the resolved config
//   <run>/metrics.jsonl          what the run computed, a line an event; the same bytes however often the run was stopped
//   <run>/speed.jsonl            tokens a second and memory, which differ from run to run
//   <run>/events.out.tfevents.*  the same for TensorBoard
//   <run>/checkpoint-<step>/     docs/run_state.md
//   <run>/adapter/               the chosen PEFT folder (method lora), or <run>/weights/ (method full, or with restarts)
//   <run>/report.json            written last: the run is finished
#include <filesystem>
#include <functional>

#include "core/json.h"
#include "train/train_config.h"

namespace alambic::train {

struct TrainReport {
  std::filesystem::path result = {};  // <run>/adapter or <run>/weights
  std::int64_t steps = 0;         // of the whole run
  std::int64_t chosen_step = 0;   // the checkpoint in `result`
  int rank = 0;                   // whose report it is: those of others than rank 0 are empty
  bool was_finished = false;      // the run had ended before this call; nothing was done
  Json json = {};                   // <run>/report.json; "evaluation": [{"name", "before", "after"}], see docs/run_state.md
};

/// By this process alone, or with the other ranks that a launcher started (parallel/launch_environment.h): then all of them call it.
/// Runs, or with `resume` goes on from the newest valid checkpoint; a finished run is left alone and says so.
/// stop_requested is asked after every micro-batch; when true the run saves and throws Error(kStopped).
/// Error(kUsage): contradictory config; the run folder is not empty and resume is false; resumed with another config,
/// base or data (every difference listed); another process holds the folder. Error(kNumerics): kMaxBadSteps steps in a
/// row had a loss or gradient that is not finite. Error(kResource): disk or memory. Error(kPeer): another
/// rank died, failed, hangs or disagrees.
TrainReport finetune(const TrainConfig& config, bool resume, const std::function<bool()>& stop_requested);

}  // namespace alambic::train
