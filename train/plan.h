// SPDX-License-Identifier: Apache-2.0
#pragma once
// Everything `train` would check, and what the run would cost, without training.
#include <cstdint>

#include "core/json.h"
#include "data/batch.h"
#include "train/optimizer.h"
#include "train/recipe.h"
#include "train/step.h"
#include "train/train_config.h"

namespace alambic::train {

inline constexpr std::uint64_t kProbeSeed = 1;  // the dropout_seed that the probe gives to the loss

/// Opens the model and every store, as train would. Throws what train would throw at its start (all of its start-up
/// checks are made by this function). Result:
///   "steps", "tokens", "tokens_per_step" (of the first step); "model": {"parameters", "trained_parameters", "family", "compute_type"};
///   "memory": {"weights", "trained", "optimizer", "activations", "head", "library", "total", "available"} in bytes;
///   "time": {"tokens_per_second", "seconds", "measured"}: from a probe of one micro-batch where `probe`, else null;
///   "disk": {"checkpoint", "total", "free"} in bytes; "data": stores with hash, tokens, sources and licences;
///   "licence": {"verdict": "open" | "restricted" | "unknown", "reasons": [...]}; "warnings": [...].
/// Of several ranks, which are thought to be on this machine, "memory" is what one of them takes and has at hand, and "ranks" tells {"size", "micro_batches_each", "gradient_bytes", "bytes_received_a_step"}.
Json plan(const TrainConfig& config, bool probe = true, int num_ranks = 1);
/// The same of another recipe; "memory" then has "teachers", and "teachers" tells of each.
Json plan(const TrainConfig& config, bool probe, const Recipe& recipe, int num_ranks = 1);

/// Seconds of one micro-batch forwards and backwards: the second of two, as the first pays for the pages. No gradient is left.
double probe_seconds(const LossSum& loss_sum, const data::Batch& batch, Optimizer& optimizer);

}  // namespace alambic::train
