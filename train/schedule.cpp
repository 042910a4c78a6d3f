// SPDX-License-Identifier: Apache-2.0
#include "train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace alambic::train {
namespace {

std::int64_t share_of(double share, std::int64_t total) { return static_cast<std::int64_t>(std::ceil(share * static_cast<double>(total))); }

}  // namespace

std::int64_t warmup_steps(const ScheduleConfig& schedule, std::int64_t total_steps) {
  return schedule.warmup_steps >= 0 ? schedule.warmup_steps : share_of(schedule.warmup_share, total_steps);
}

double learning_rate_at(const ScheduleConfig& schedule, std::int64_t step, std::int64_t total_steps, std::int64_t restart_every, std::int64_t restart_warmup) {
  const std::int64_t since = restart_every > 0 ? step % restart_every : 0;
  if (restart_every == 0 || step < restart_every || since >= restart_warmup) return learning_rate_at(schedule, step, total_steps);
  return learning_rate_at(schedule, step - since + restart_warmup, total_steps) * static_cast<double>(since) / static_cast<double>(restart_warmup);
}

double learning_rate_at(const ScheduleConfig& schedule, std::int64_t step, std::int64_t total_steps) {
  const std::int64_t warmup = warmup_steps(schedule, total_steps);
  if (step < warmup) return schedule.learning_rate * static_cast<double>(step) / static_cast<double>(std::max<std::int64_t>(1, warmup));
  if (schedule.shape == "constant") return schedule.learning_rate;
  // wsd stays at the peak until its last part; the others fall from the end of the warm-up on.
  const std::int64_t falling = schedule.shape == "wsd" ? std::min(share_of(schedule.decay_share, total_steps), total_steps - warmup) : total_steps - warmup;
  const std::int64_t fallen = step - (total_steps - falling);
  const double done = std::clamp(static_cast<double>(fallen) / static_cast<double>(std::max<std::int64_t>(1, falling)), 0.0, 1.0);
  const double rest = schedule.shape == "linear" ? 1 - done : 0.5 * (1 + std::cos(std::numbers::pi * done));
  return schedule.learning_rate * (schedule.final_share + (1 - schedule.final_share) * rest);
}

}  // namespace alambic::train
