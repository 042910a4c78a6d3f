// SPDX-License-Identifier: Apache-2.0
#include "train/step.h"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "core/error.h"
#include "core/random.h"
#include "train/gradient_sums.h"

namespace alambic::train {
namespace {

/// The micro-batches of all ranks, as far as a step needs to know of them: one value each, written by the rank whose it is, then
/// shared. A sum in which all other ranks add zeros is exact, so it does not matter who wrote what. Ranks that share rows add up their parts.
class OfAll {
 public:
  OfAll(std::size_t own, parallel::Communicator& ranks, int context)
      : ranks_(ranks), groups_(static_cast<std::size_t>(ranks.size() / context)), group_(static_cast<std::size_t>(ranks.rank() / context)),
        values_(at::zeros({static_cast<std::int64_t>(own * groups_) + 1}, at::kDouble)) {}
  double& operator[](std::size_t own) { return values_.mutable_data_ptr<double>()[index(own)]; }
  /// Of a micro-batch, among those of all ranks.
  std::size_t index(std::size_t own) const { return own * groups_ + group_; }
  /// Of the micro-batches that all ranks are at, when this one is at its own.
  std::span<const double> beside(std::size_t own) const { return all().subspan(own * groups_, groups_); }
  /// One number more, of which every rank adds its own.
  double& votes() { return values_.mutable_data_ptr<double>()[values_.numel() - 1]; }
  void share(std::string_view what) { ranks_.sum_in_place({&values_, 1}, what); }
  std::span<const double> all() const { return {values_.const_data_ptr<double>(), static_cast<std::size_t>(values_.numel() - 1)}; }
  double sum() const {  // in the order of the micro-batches
    double sum = 0;
    for (const double value : all()) sum += value;
    return sum;
  }

 private:
  parallel::Communicator& ranks_;
  std::size_t groups_, group_;
  at::Tensor values_;
};

/// Figures of the micro-batches of all ranks.
class FiguresOfAll {
 public:
  FiguresOfAll(std::size_t own, parallel::Communicator& ranks, int context) : own_(own), ranks_(ranks), context_(context) {}
  void note(std::size_t own, const Json& figures) {
    for (const auto& [name, figure] : figures.items()) {
      const auto found = std::find_if(figures_.begin(), figures_.end(), [&](const Figure& each) { return each.name == name; });
      Figure& noted = found != figures_.end() ? *found : figures_.emplace_back(name, figure.is_number_integer(), OfAll(own_, ranks_, context_));
      noted.values[own] = figure.is_number() ? figure.get<double>() : std::numeric_limits<double>::quiet_NaN();
    }
  }
  Json sum(double num_tokens) {
    Json all = Json::object();
    for (auto& [name, is_count, values] : figures_) {
      values.share("figures");
      const double sum = values.sum();
      if (is_count) all[name] = static_cast<std::int64_t>(sum);
      else if (std::isfinite(sum)) all[name] = sum / num_tokens;
      else all[name] = nullptr;
    }
    return all;
  }

 private:
  struct Figure {
    std::string name;
    bool is_count;
    OfAll values;
    Figure(std::string given_name, bool counts, OfAll none) : name(std::move(given_name)), is_count(counts), values(std::move(none)) {}
  };
  std::size_t own_;
  parallel::Communicator& ranks_;
  int context_;
  std::vector<Figure> figures_;  // in the order in which the recipe names them
};

/// First samples of the micro-batches of all ranks that are marked.
std::vector<std::uint64_t> samples_of(std::span<const data::Batch> micro_batches, std::span<const double> marks, parallel::Communicator& ranks, int context) {
  OfAll first(micro_batches.size(), ranks, context);
  for (std::size_t i = 0; i < micro_batches.size() && ranks.rank() % context == 0; ++i) first[i] = static_cast<double>(micro_batches[i].first_sample);  // exact below 2^53
  first.share("samples of a bad step");
  std::vector<std::uint64_t> samples;
  for (std::size_t i = 0; i < marks.size(); ++i)
    if (marks[i] != 0) samples.push_back(static_cast<std::uint64_t>(first.all()[i]));
  return samples;
}

Gradients taken_gradients(Optimizer& optimizer) {
  const std::span<at::Tensor> gradients = optimizer.gradients();
  Gradients taken(gradients.begin(), gradients.end());
  optimizer.forget_gradients();
  return taken;
}

/// learn(i) for each micro-batch in the order of parallel::tree_walk; their gradients become the sum of that tree. What waits for gradients to
/// its right when the last micro-batch begins is given to `sums`.
class Tree {
 public:
  Tree(std::size_t size, const std::function<void(std::size_t)>& learn, Optimizer& optimizer, GradientSums& sums) : size_(size), learn_(learn), optimizer_(optimizer), sums_(sums) {
    walk(0, 1);
  }

 private:
  void walk(std::size_t first, std::size_t stride) {
    if (first + stride >= size_) {
      if (++begun_ == size_) sums_.expect_last(std::move(left_));
      learn_(first);
      return;
    }
    walk(first, 2 * stride);
    left_.push_back(taken_gradients(optimizer_));
    walk(first + stride, 2 * stride);
    if (begun_ == size_) return;
    const std::span<at::Tensor> right = optimizer_.gradients();
    for (std::size_t i = 0; i < right.size(); ++i) optimizer_.trained()[i].tensor.mutable_grad() = left_.back()[i].add_(right[i]);
    left_.pop_back();
  }

  std::size_t size_, begun_ = 0;
  const std::function<void(std::size_t)>& learn_;
  Optimizer& optimizer_;
  GradientSums& sums_;
  std::vector<Gradients> left_;
};

}  // namespace

void require_tree(int num_ranks) {
  if (!std::has_single_bit(static_cast<unsigned>(num_ranks)))
    fail(ErrorKind::kUsage, "deterministic: ", num_ranks, " ranks cannot share a binary tree of micro-batches", Remedy{"use 1, 2, 4, 8, ... ranks, or deterministic: false"});
}

StepReport step(std::span<const data::Batch> micro_batches, const LossSum& loss_sum, Optimizer& optimizer, double learning_rate,
                double max_grad_norm, std::uint64_t dropout_seed, parallel::Communicator& ranks,
                const std::function<bool()>& stop_requested, Order order, const Figures& figures, int context, models::ShardedBlocks* shards) {
  if (order == Order::kTree) require_tree(ranks.size());
  // Counted before any forward pass, over all ranks: each token then weighs the same, however the batch was cut.
  OfAll counts(micro_batches.size(), ranks, context);
  for (std::size_t i = 0; i < micro_batches.size() && ranks.rank() % context == 0; ++i) counts[i] = static_cast<double>(micro_batches[i].num_kept);
  counts.share("count of tokens");
  const double num_tokens = counts.sum();
  if (num_tokens == 0)
    fail(ErrorKind::kData, "every token of the step at sample ", micro_batches.empty() ? 0 : micro_batches.front().first_sample,
         " is masked; nothing to learn from", Remedy{"look at the loss mask with inspect, or use more batches_per_step"});

  StepReport report{.num_tokens = static_cast<std::int64_t>(num_tokens)};
  OfAll nats(micro_batches.size(), ranks, context);
  FiguresOfAll told(micro_batches.size(), ranks, context);
  const bool tells_each = figures && (ranks.size() > 1 || order == Order::kTree);  // else the figures add up by themselves, in this very order
  const auto learn = [&](std::size_t own) {
    if (report.stopped) return;
    const data::Batch& batch = micro_batches[own];
    // Where rows are shared, the passes of all ranks speak to each other: they begin together, and none is left out.
    const std::span<const double> beside = counts.beside(own);
    if (context == 1 ? batch.num_kept > 0 : std::any_of(beside.begin(), beside.end(), [](double count) { return count > 0; })) {
      const at::Tensor loss = loss_sum(batch, derive_seed(dropout_seed, "micro-batch", {nats.index(own)}) | 1);
      nats[own] = loss.item<double>();
      if (context == 1 ? std::isfinite(nats[own]) : loss.requires_grad()) (loss / num_tokens).backward();
    }
    if (shards != nullptr) shards->end_pass(/*backward=*/true);
    if (tells_each) told.note(own, figures(1));
    ranks.check();
    report.stopped = stop_requested && stop_requested();
    // A rank that stopped alone would leave the others without its part of the next pass.
    if (shards != nullptr || context > 1) report.stopped = parallel::any(ranks, report.stopped, "whether to stop");
  };
  // Where blocks are shared, a rank that skips a backward pass makes up for its gathers at the end, and no sum may have come between.
  GradientSums sums(optimizer, ranks, /*in_backward=*/shards == nullptr);
  if (order == Order::kAsTheyCome) {
    for (std::size_t own = 0; own < micro_batches.size() && !report.stopped; ++own) {
      if (own + 1 == micro_batches.size()) sums.expect_last({});
      learn(own);
    }
  } else {
    Tree(micro_batches.size(), learn, optimizer, sums);
  }
  sums.finish();  // also when a rank stops or skips a loss that is not finite: the others have begun
  nats.votes() = report.stopped ? 1 : 0;
  nats.share("loss");
  report.stopped = nats.votes() > 0;
  if (report.stopped) {
    optimizer.forget_gradients();
    return report;
  }
  report.nats_per_token = nats.sum() / num_tokens;
  if (tells_each) report.figures = told.sum(num_tokens);
  else if (figures) report.figures = figures(report.num_tokens);
  report.grad_norm = optimizer.clip(max_grad_norm, ranks);
  report.applied = std::isfinite(report.nats_per_token) && std::isfinite(report.grad_norm);
  if (report.applied) {
    optimizer.step(learning_rate);
  } else {  // never averaged away, never applied
    optimizer.forget_gradients();
    std::vector<double> bad;
    bool any_bad = false;
    for (const double value : nats.all()) bad.push_back(std::isfinite(value) ? 0 : 1), any_bad |= !std::isfinite(value);
    if (!any_bad) bad.assign(bad.size(), 1);
    report.bad_samples = samples_of(micro_batches, bad, ranks, context);
  }
  return report;
}

}  // namespace alambic::train
