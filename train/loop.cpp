// SPDX-License-Identifier: Apache-2.0
#include "train/loop.h"

#include <array>
#include <chrono>
#include <cmath>
#include <cstring>

#include "checkpoints/run_state.h"
#include "checkpoints/safetensors.h"
#include "core/error.h"
#include "core/log.h"
#include "core/random.h"
#include "train/schedule.h"

namespace alambic::train {
namespace {

constexpr double kLossSmoothing = 0.9;  // of progress lines: about the last ten steps

/// Of all bits of some tensors: what ranks that have drifted apart do not share.
std::string checksum(const NamedTensors& tensors) {
  std::uint64_t sum = 0;
  for (const auto& [name, tensor] : tensors) {
    const at::Tensor whole = tensor.cpu().contiguous();
    const char* const bytes = static_cast<const char*>(whole.const_data_ptr());
    // Four sums side by side: a chain of multiplications is slow, and this reads all weights and moments.
    std::array<std::uint64_t, 4> lanes = {1, 2, 3, 4};
    std::size_t i = 0;
    for (; i + 32 <= whole.nbytes(); i += 32)
      for (std::size_t lane = 0; lane < 4; ++lane) {
        std::uint64_t word;
        std::memcpy(&word, bytes + i + 8 * lane, 8);
        lanes[lane] = (lanes[lane] ^ word) * 0x9e3779b97f4a7c15ull;
        lanes[lane] ^= lanes[lane] >> 29;
      }
    for (; i < whole.nbytes(); ++i) lanes[0] = (lanes[0] ^ static_cast<unsigned char>(bytes[i])) * 0x9e3779b97f4a7c15ull;
    for (const std::uint64_t lane : lanes) sum = mix64(sum ^ lane);
  }
  return std::to_string(sum);
}

class Loop {
 public:
  Loop(const TrainConfig& config, const LoopParts& parts, const std::optional<Progress>& resumed)
      : config_(config), parts_(parts), progress_(resumed.value_or(Progress{})), saved_step_(resumed ? resumed->step : -1),
        writes_(parts.ranks.rank() == 0) {
    if (writes_) log_.emplace(parts.run, progress_.metrics_bytes, progress_.step, parts.total_steps);
    parts_.ranks.at_step(progress_.step);
    if (resumed) return;
    progress_.data = parts_.batches.state();
    sample();
    evaluate();
    progress_.before = progress_.latest;
  }

  Progress run() {
    while (progress_.ended.empty()) {
      if (parallel::any(parts_.ranks, parts_.stop_requested(), "whether to stop")) stop();
      restart_if_due();
      train_one_step();
      const bool improved = (!progress_.ended.empty() || due(config_.evaluation.every)) && evaluate();  // may end the run early
      if (!progress_.ended.empty() || due(config_.samples.every)) sample();
      if (!progress_.ended.empty() || improved || due(config_.checkpoint.every)) save();
    }
    return progress_;
  }

 private:
  bool due(std::int64_t every) const { return every > 0 && progress_.step % every == 0; }

  /// Before the step that follows every restart_every-th one. The counter, and not the step alone, decides: a run may have been
  /// stopped between the restart and the end of its next step.
  void restart_if_due() {
    if (!restarts(config_) || progress_.step == 0 || progress_.restarts >= progress_.step / config_.lora.restart_every) return;
    progress_.restarts += 1;
    parts_.restart(progress_.restarts);
    parts_.optimizer.reset();
    log_info("step ", progress_.step, "  restart ", progress_.restarts, ": the adapters are merged and begin anew");
    if (log_) log_->metrics(progress_.step, "restart", {{"number", progress_.restarts}});
  }

  void train_one_step() {
    const auto began = std::chrono::steady_clock::now();
    const double learning_rate = learning_rate_at(config_.schedule, progress_.step, parts_.total_steps, restarts(config_) ? config_.lora.restart_every : 0,
                                                  config_.lora.restart_warmup_steps);
    const std::vector<data::Batch> micro_batches = parts_.batches.next_step();
    const std::uint64_t seed = derive_seed(config_.seed, "dropout", {static_cast<std::uint64_t>(progress_.step)});
    const StepReport report = step(micro_batches, parts_.loss_sum, parts_.optimizer, learning_rate, config_.optimizer.max_grad_norm,
                                   seed, parts_.ranks, parts_.stop_requested, config_.deterministic ? Order::kTree : Order::kAsTheyCome, parts_.figures, static_cast<int>(config_.ranks.context), parts_.shards);
    if (report.stopped) stop();  // progress_ still says where this step began: a resumed run makes it again

    const data::StreamCounts counts = parts_.batches.counts();
    const std::int64_t step_tokens = static_cast<std::int64_t>(counts.tokens) - progress_.tokens;
    progress_.step += 1;
    parts_.ranks.at_step(progress_.step);
    progress_.tokens += step_tokens;
    progress_.kept_tokens += report.num_tokens;
    progress_.data = parts_.batches.state();
    if (report.applied) {
      progress_.bad_steps_in_row = 0;
      progress_.smoothed_loss = progress_.step - progress_.bad_steps == 1  // the first that counts
                                    ? report.nats_per_token
                                    : kLossSmoothing * progress_.smoothed_loss + (1 - kLossSmoothing) * report.nats_per_token;
    } else {
      count_bad_step(report);
    }
    // JSON has no NaN: a figure that is not finite is written as null, and "applied" says what came of it.
    const auto figure = [](double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); };
    Json line = {{"loss", figure(report.nats_per_token)}, {"learning_rate", learning_rate}, {"grad_norm", figure(report.grad_norm)},
                 {"kept_tokens", report.num_tokens}, {"tokens", progress_.tokens}, {"applied", report.applied}};
    line.update(report.figures);
    if (log_) {
      log_->metrics(progress_.step, "train", line);
      log_->stepped(progress_.step, step_tokens, std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
    }
    if (config_.limits.max_tokens > 0 && progress_.tokens >= config_.limits.max_tokens) progress_.ended = "tokens";
    if (progress_.step >= parts_.total_steps) progress_.ended = "steps";
    if (log_ && (due(config_.log_every) || !progress_.ended.empty())) log_->progress(progress_.step, progress_.smoothed_loss, learning_rate);
  }

  void count_bad_step(const StepReport& report) {
    progress_.bad_steps += 1;
    progress_.bad_steps_in_row += 1;
    std::string samples;
    for (const std::uint64_t sample : report.bad_samples) samples += " " + std::to_string(sample);
    log_warning("step ", progress_.step, ": loss ", report.nats_per_token, ", gradient norm ", report.grad_norm,
                "; not applied. Batches beginning at samples:", samples);
    if (progress_.bad_steps_in_row < kMaxBadSteps) return;
    if (log_) log_->sync();
    fail(ErrorKind::kNumerics, kMaxBadSteps, " steps in a row, the last of them ", progress_.step, ", had a loss or gradient that is not finite (loss ",
         report.nats_per_token, ", gradient norm ", report.grad_norm, "); the last one at samples", samples,
         Remedy{"lower schedule.learning_rate or look at these samples; the last good checkpoint is kept"});
  }

  /// Returns whether this is the best so far.
  bool evaluate() {
    progress_.latest = parts_.evaluate();
    if (progress_.latest.is_null()) return false;
    for (const auto& [name, figures] : progress_.latest.items()) {
      Json flat = Json::object();
      for (const auto& [key, value] : figures.items())
        if (!value.is_object()) flat[key] = value;
      if (log_) log_->metrics(progress_.step, "evaluation/" + name, flat);
      const auto shown = [&](const char* key) { return figures[key].is_number() ? printed("%.4f", figures[key].get<double>()) : "unknown"; };
      log_info("step ", progress_.step, "  ", name, ": loss ", shown("loss"), ", bits per byte ", shown("bits_per_byte"));
    }
    if (progress_.step == 0) return false;  // the base is what the best is compared with, not a result of the run
    const double loss = progress_.latest[parts_.chosen_by]["loss"].get<double>();
    const bool first = progress_.best_step < 0, improved = first || loss < progress_.best_loss;
    // A fall of less than min_delta makes a new best, but does not buy more patience.
    const bool enough = first || loss < progress_.best_loss - config_.limits.min_delta;
    if (improved) {
      progress_.best_step = progress_.step;
      progress_.best_loss = loss;
      progress_.best = progress_.latest;
    }
    if (enough) {
      progress_.without_improvement = 0;
    } else if (++progress_.without_improvement >= config_.limits.patience && config_.limits.patience > 0 && progress_.ended.empty()) {
      log_info("step ", progress_.step, ": too little improvement in ", progress_.without_improvement, " evaluations; stopping early");
      progress_.ended = "early stop";
    }
    return improved;
  }

  void sample() {
    if (!log_ && parts_.shards == nullptr) return;
    const Json samples = parts_.sample(progress_.step);
    if (parts_.shards != nullptr) parts_.shards->end_common_pass();
    if (!log_) return;
    for (std::size_t i = 0; i < samples.size(); ++i) {
      log_->metrics(progress_.step, "sample/" + std::to_string(i), samples[i]);
      log_->text(progress_.step, "sample/" + std::to_string(i), samples[i]["prompt"].get<std::string>() + samples[i]["text"].get<std::string>());
      log_info("step ", progress_.step, "  sample: ", to_line(samples[i]["prompt"]), " -> ", to_line(samples[i]["text"]));
    }
  }

  void save() {
    if (saved_step_ == progress_.step) return;  // resumed here, and nothing was done since
    if (log_) progress_.metrics_bytes = log_->sync();
    progress_.optimizer_steps = parts_.optimizer.num_steps();
    NamedTensors tensors = parts_.optimizer.state();
    for (auto& [name, tensor] : parts_.base_state()) tensors.emplace_back(name, tensor);
    if (parts_.ranks.size() > 1) parallel::require_agreement(parts_.ranks, {{"step", progress_.step}, {"weights", checksum(tensors)}}, "what is to be saved");
    const std::vector<checkpoints::TensorToWrite> shared = parts_.optimizer.shared_moments();
    const auto gather = [&](std::size_t i) { return parts_.optimizer.gather_moment(i); };
    if (writes_)
      checkpoints::save_checkpoint(parts_.run, {.step = progress_.step, .tensors = tensors, .progress = to_json(progress_), .identity = parts_.identity, .made = shared, .make = gather},
                                   parts_.write_result);
    else
      for (const std::size_t i : checkpoints::order_in_file(shared)) gather(i);
    parts_.ranks.barrier("commit of checkpoint-" + std::to_string(progress_.step));
    saved_step_ = progress_.step;
    if (writes_) checkpoints::apply_retention(parts_.run, config_.checkpoint.keep, {progress_.best_step});
  }

  [[noreturn]] void stop() {
    save();
    fail(ErrorKind::kStopped, "stopped on request after step ", progress_.step, " of ", parts_.total_steps, "; everything is saved in ", parts_.run.string(),
         Remedy{"go on with: alambic " + parts_.verb + ", the same config and --resume"});
  }

  const TrainConfig& config_;
  const LoopParts& parts_;
  Progress progress_;
  std::int64_t saved_step_;  // the newest committed checkpoint; -1: none
  bool writes_;               // rank 0
  std::optional<RunLog> log_;  // of rank 0
};

}  // namespace

Json to_json(const Progress& progress) {
  return {{"step", progress.step}, {"tokens", progress.tokens}, {"kept_tokens", progress.kept_tokens}, {"smoothed_loss", progress.smoothed_loss},
          {"bad_steps", progress.bad_steps}, {"bad_steps_in_row", progress.bad_steps_in_row}, {"before", progress.before}, {"latest", progress.latest},
          {"best_step", progress.best_step}, {"best_loss", progress.best_loss}, {"best", progress.best},
          {"without_improvement", progress.without_improvement}, {"restarts", progress.restarts}, {"optimizer_steps", progress.optimizer_steps}, {"ended", progress.ended}, {"data", progress.data}, {"metrics_bytes", progress.metrics_bytes}};
}

Progress progress_from_json(const Json& json, std::string_view source) {
  const auto integer = [&](std::string_view key) { return require<std::int64_t>(json, key, source); };
  const auto any = [&](const std::string& key) {
    if (!json.contains(key)) fail(ErrorKind::kData, source, ": \"", key, "\" is missing");
    return json[key];
  };
  return {.step = integer("step"), .tokens = integer("tokens"), .kept_tokens = integer("kept_tokens"), .smoothed_loss = require<double>(json, "smoothed_loss", source),
          .bad_steps = integer("bad_steps"), .bad_steps_in_row = integer("bad_steps_in_row"), .before = any("before"), .latest = any("latest"),
          .best_step = integer("best_step"), .best_loss = require<double>(json, "best_loss", source), .best = any("best"),
          .without_improvement = integer("without_improvement"),
          // Checkpoints older than restarts have neither.
          .restarts = value_or<std::int64_t>(json, "restarts", 0, source),
          .optimizer_steps = value_or<std::int64_t>(json, "optimizer_steps", integer("step") - integer("bad_steps"), source),
          .ended = require<std::string>(json, "ended", source), .data = any("data"),
          .metrics_bytes = static_cast<std::uint64_t>(integer("metrics_bytes"))};
}

Progress run(const TrainConfig& config, const LoopParts& parts, const std::optional<Progress>& resumed) { return Loop(config, parts, resumed).run(); }

}  // namespace alambic::train
