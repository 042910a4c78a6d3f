// SPDX-License-Identifier: Apache-2.0
#pragma once
// The learning rate as a pure function of the step.
#include <cstdint>

#include "train/train_config.h"

namespace alambic::train {

/// Learning rate of step number `step` (0 is the first), of total_steps. Warm-up is linear from 0; then as transformers'
/// get_{cosine_with_min_lr,linear,constant}_schedule_with_warmup and get_wsd_schedule (linear warm-up, cosine decay).
double learning_rate_at(const ScheduleConfig& schedule, std::int64_t step, std::int64_t total_steps);

/// The same with the learning rate rising anew, linearly from 0, in the first restart_warmup steps after every restart_every-th
/// step, to where the schedule is at the end of that rise (arXiv:2307.05695, section 3: jagged schedule). restart_every 0: never.
double learning_rate_at(const ScheduleConfig& schedule, std::int64_t step, std::int64_t total_steps, std::int64_t restart_every, std::int64_t restart_warmup);

std::int64_t warmup_steps(const ScheduleConfig& schedule, std::int64_t total_steps);

}  // namespace alambic::train
