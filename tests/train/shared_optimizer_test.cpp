// SPDX-License-Identifier: Apache-2.0
// Gradients and moments that ranks share against one optimiser that has them all: the same bits.
#include "train/shared_optimizer.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "tests/forked_ranks.h"
#include "tests/support.h"
#include "train/gradient_sums.h"
#include "train/step.h"

namespace alambic::train {
namespace {

using parallel::Communicator;

// Of no, one and several pieces of 16,384; of vectors with and without a tail; a large one that all ranks share.
const std::vector<std::pair<std::string, std::vector<std::int64_t>>> kShapes = {
    {"embed_tokens.weight", {611, 190}}, {"input_layernorm.weight", {190}}, {"q_proj.weight", {64, 64}}, {"k_proj.weight", {63, 65}},
    {"up_proj.weight", {190, 521}},      {"norm.weight", {7}},              {"one.weight", {1, 1}},      {"down_proj.weight", {128, 128}}};

at::Tensor numbers(const std::vector<std::int64_t>& shape, std::uint64_t seed) { return at::randn(shape, at::make_generator<at::CPUGeneratorImpl>(seed), at::kFloat); }

struct Model {
  std::vector<at::Tensor> weights;
  std::vector<models::NamedTensor> named;
  Model() {
    for (std::size_t i = 0; i < kShapes.size(); ++i) weights.push_back(numbers(kShapes[i].second, 100 + i).set_requires_grad(true));
    for (std::size_t i = 0; i < kShapes.size(); ++i) named.push_back({kShapes[i].first, &weights[i]});
  }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;
};

/// The gradients of a rank in a step; some tensors take no part in some.
void learn(Model& model, std::int64_t step, int rank) {
  for (std::size_t i = 0; i < kShapes.size(); ++i)
    if ((step + rank + static_cast<std::int64_t>(i)) % 5 != 0) model.weights[i].mutable_grad() = numbers(kShapes[i].second, 1000 * static_cast<std::uint64_t>(step + 1) + 10 * static_cast<std::uint64_t>(rank) + i);
}

std::string difference(const std::map<std::string, at::Tensor>& whole, const std::string& name, const at::Tensor& other) {
  const auto found = whole.find(name);
  if (found == whole.end()) return name + " is unknown; ";
  if (found->second.scalar_type() != other.scalar_type()) return name + " has another type; ";
  return at::equal(found->second, other) ? "" : name + " differs; ";
}

/// Weights and moments of both.
std::string difference(const Optimizer& whole, Optimizer& shared) {
  const NamedState state = whole.state();
  const std::map<std::string, at::Tensor> wanted(state.begin(), state.end());
  std::string wrong;
  std::size_t seen = 0;
  for (const auto& [name, tensor] : shared.state()) wrong += difference(wanted, name, tensor), ++seen;
  const std::vector<checkpoints::TensorToWrite> moments = shared.shared_moments();
  for (const std::size_t i : checkpoints::order_in_file(moments)) {
    const at::Tensor whole_moment = shared.gather_moment(i);
    if (whole_moment.sizes() != at::IntArrayRef(moments[i].shape) || whole_moment.scalar_type() != moments[i].type) wrong += moments[i].name + " is not as announced; ";
    wrong += difference(wanted, moments[i].name, whole_moment), ++seen;
  }
  return seen == wanted.size() ? wrong : wrong + std::to_string(seen) + " tensors of " + std::to_string(wanted.size()) + "; ";
}

/// Three steps with the sum of the ranks' gradients, by one optimiser that keeps all and by one whose moments the ranks share.
std::string three_steps(Model& model_of_whole, Optimizer& whole, Model& model, Optimizer& shared, std::int64_t first, double max_norm, Communicator& ranks) {
  std::string wrong;
  for (std::int64_t number = first; number < first + 3; ++number) {
    learn(model_of_whole, number, ranks.rank());
    learn(model, number, ranks.rank());
    GradientSums(whole, ranks, /*in_backward=*/false).finish();
    GradientSums(shared, ranks, /*in_backward=*/true).finish();
    const double norm = whole.clip(max_norm, ranks), norm_of_shared = shared.clip(max_norm, ranks);
    if (norm != norm_of_shared || !(norm > 0)) wrong += "norms " + std::to_string(norm) + " and " + std::to_string(norm_of_shared) + "; ";
    whole.step(1e-2), shared.step(1e-2);
  }
  return wrong + difference(whole, shared);
}

/// So many ranks, in groups that share for themselves; 0: one group.
struct Sharers {
  int ranks, group = 0;
};
void PrintTo(const Sharers& sharers, std::ostream* out) { *out << sharers.ranks << "In" << sharers.group; }
const auto name_of_kind = [](const auto& each) {
  const auto& [kind, sharers] = each.param;
  return std::string(kind) + "Of" + std::to_string(sharers.ranks) + (sharers.group > 0 ? "InGroupsOf" + std::to_string(sharers.group) : "");
};

class SharedMoments : public ::testing::TestWithParam<std::tuple<const char*, Sharers>> {};
INSTANTIATE_TEST_SUITE_P(Kinds, SharedMoments, ::testing::Combine(::testing::Values("adamw", "adamw8bit"), ::testing::Values(Sharers{2}, Sharers{3}, Sharers{4}, Sharers{7}, Sharers{4, 2}, Sharers{6, 2}, Sharers{2, 1})), name_of_kind);

TEST_P(SharedMoments, HaveTheBitsOfTheWhole) {
  const OptimizerConfig config{.kind = std::get<0>(GetParam()), .weight_decay = 0.1, .embedding_lr_ratio = 0.5};
  const Sharers sharers = std::get<1>(GetParam());
  testing::expect_all_fine(testing::run_ranks(sharers.ranks, testing::kPatient, [&](Communicator& ranks) {
    at::set_num_threads(1);
    Model one, other;
    const auto whole = make_optimizer(one.named, config), shared = make_optimizer(other.named, config, &ranks, sharers.group);
    std::string wrong;
    for (const double max_norm : {0.0, 1.0}) wrong += three_steps(one, *whole, other, *shared, max_norm > 0 ? 3 : 0, max_norm, ranks);
    // Gone on with from what rank 0 alone has read.
    Model again;
    const auto resumed = make_optimizer(again.named, config, &ranks, sharers.group);
    if (ranks.rank() == 0) resumed->restore(whole->state(), whole->num_steps());
    resumed->share(whole->num_steps(), ranks);
    if (const std::string after = difference(*whole, *resumed); !after.empty()) wrong += "resumed: " + after;
    wrong += three_steps(one, *whole, again, *resumed, 6, 1, ranks);
    // Of all moments this rank keeps its part, give or take the pieces at its ends.
    std::int64_t own = 0;
    for (const auto& [name, moment] : shared->moments()) own += static_cast<std::int64_t>(moment.nbytes());
    const std::int64_t all = whole->state_bytes(), sharing = sharers.group > 0 ? sharers.group : ranks.size(), piece = config.kind == std::string("adamw") ? 8 * (2 << 14) : 9 * (2 << 14) / 4;
    if (shared->state_bytes() != all) wrong += "moments of " + std::to_string(shared->state_bytes()) + " bytes, not " + std::to_string(all) + "; ";
    if (std::abs(own - all / sharing) > piece) wrong += std::to_string(own) + " bytes of its own of " + std::to_string(all) + "; ";
    return wrong;
  }));
}

/// A net of three blocks, whose table also makes the logits, of more gradients than one bucket holds.
struct Net {
  std::vector<std::pair<std::string, at::Tensor>> weights;
  std::vector<models::NamedTensor> named;
  Net() {
    weights.emplace_back("model.embed_tokens.weight", numbers({600, 64}, 1) * 0.5);
    for (const std::uint64_t layer : {0, 1, 2}) {
      const std::string block = "model.layers." + std::to_string(layer) + ".";
      weights.emplace_back(block + "norm.weight", numbers({64}, 10 + layer) * 0.1 + 1);
      weights.emplace_back(block + "up.weight", numbers({8800, 64}, 20 + layer) * 0.1);
      weights.emplace_back(block + "down.weight", numbers({64, 8800}, 30 + layer) * 0.01);
    }
    weights.emplace_back("model.norm.weight", numbers({64}, 2) * 0.1 + 1);
    for (auto& [name, weight] : weights) weight.requires_grad_(true), named.push_back({name, &weight});
  }
  Net(const Net&) = delete;
  Net& operator=(const Net&) = delete;
  /// Not finite for the batch `bad`.
  at::Tensor loss_sum(const data::Batch& batch, std::uint64_t bad) const {
    const at::Tensor& table = weights[0].second;
    at::Tensor h = table.index_select(0, batch.tokens_T);
    for (std::size_t i = 1; i + 3 < weights.size(); i += 3)
      h = h + at::linear(at::linear(h * weights[i].second, weights[i + 1].second).tanh(), weights[i + 2].second);
    const at::Tensor loss = -at::linear(h * weights.back().second, table).log_softmax(1).gather(1, batch.targets_T.unsqueeze(1)).sum(at::kDouble);
    return batch.first_sample == bad ? loss * std::numeric_limits<double>::infinity() : loss;
  }
  bool has_gradients() const {
    return std::any_of(weights.begin(), weights.end(), [](const auto& each) { return each.second.grad().defined(); });
  }
};

data::Batch batch_of(std::uint64_t sample, bool masked) {
  data::Batch batch;
  batch.tokens_T = (at::arange(9, at::kLong) * (2 * static_cast<std::int64_t>(sample) + 1)).remainder(600);
  batch.targets_T = batch.tokens_T.roll(1);
  batch.num_kept = masked ? 0 : 9;
  batch.first_sample = sample;
  return batch;
}

std::string difference(const StepReport& one, const StepReport& other) {
  if (one.nats_per_token != other.nats_per_token && std::isfinite(one.nats_per_token)) return "losses " + std::to_string(one.nats_per_token) + " and " + std::to_string(other.nats_per_token) + "; ";
  if (one.grad_norm != other.grad_norm) return "norms " + std::to_string(one.grad_norm) + " and " + std::to_string(other.grad_norm) + "; ";
  return one.applied != other.applied || one.stopped != other.stopped || one.bad_samples != other.bad_samples ? "reports differ; " : "";
}

class SharedGradients : public ::testing::TestWithParam<std::tuple<const char*, Sharers>> {};
INSTANTIATE_TEST_SUITE_P(Kinds, SharedGradients, ::testing::Combine(::testing::Values("adamw", "adamw8bit"), ::testing::Values(Sharers{2}, Sharers{4}, Sharers{4, 2})), name_of_kind);

TEST_P(SharedGradients, GiveStepsTheBitsOfTheWhole) {
  const OptimizerConfig config{.kind = std::get<0>(GetParam()), .weight_decay = 0.1};
  const Sharers sharers = std::get<1>(GetParam());
  testing::expect_all_fine(testing::run_ranks(sharers.ranks, testing::kPatient, [&](Communicator& ranks) {
    at::set_num_threads(1);
    const std::unique_ptr<Communicator> nobody = parallel::single();
    const auto size = static_cast<std::size_t>(ranks.size()), self = static_cast<std::size_t>(ranks.rank());
    std::string wrong;
    for (const Order order : {Order::kAsTheyCome, Order::kTree})
      for (const std::size_t own : {1, 2, 3}) {  // micro-batches
        Net net_of_one, net_of_whole, net;
        const auto of_one = make_optimizer(net_of_one.named, config), whole = make_optimizer(net_of_whole.named, config), shared = make_optimizer(net.named, config, &ranks, sharers.group);
        for (std::uint64_t number = 0; number < 5; ++number) {
          // Rank 0 learns nothing of its last micro-batch in one step, another rank's first has no finite loss in another, and rank 0 stops a third.
          const std::size_t masked = number == 1 ? (own - 1) * size : own * size;
          const std::uint64_t bad = number == 2 ? 100 * number + size - 1 : 99;
          std::vector<data::Batch> all, mine;
          for (std::size_t i = 0; i < own * size; ++i) all.push_back(batch_of(100 * number + i, i == masked));
          for (std::size_t i = self; i < all.size(); i += size) mine.push_back(all[i]);
          const auto report_of = [&](const std::vector<data::Batch>& batches, const Net& of, Optimizer& optimizer, Communicator& together) {
            return step(batches, [&](const data::Batch& batch, std::uint64_t) { return of.loss_sum(batch, bad); }, optimizer, 1e-2, 0.5, 1, together,
                        [&] { return number == 3 && ranks.rank() == 0; }, order);
          };
          const StepReport expected = report_of(mine, net_of_whole, *whole, ranks), report = report_of(mine, net, *shared, ranks);
          std::string found = difference(expected, report);
          if (order == Order::kTree && number != 3) found += difference(report_of(all, net_of_one, *of_one, *nobody), report);
          if (report.applied != (number != 2 && number != 3) || report.stopped != (number == 3)) found += "not as it was meant; ";
          if (net.has_gradients()) found += "a gradient is left; ";
          if (!found.empty()) wrong += "step " + std::to_string(number) + " of " + std::to_string(own) + (order == Order::kTree ? " in a tree: " : ": ") + found;
        }
        wrong += difference(*whole, *shared);
        if (order == Order::kTree) wrong += difference(*of_one, *shared);
      }
    return wrong;
  }));
}

TEST(SharedOptimizer, OnlyRulesThatGoElementByElement) {
  for (const char* kind : {"adafactor", "muon"})
    testing::expect_all_fine(testing::run_ranks(2, testing::kPatient, [&](Communicator& ranks) -> std::string {
      Model model;
      try {
        make_optimizer(model.named, {.kind = kind}, &ranks);
      } catch (const Error& error) {
        return error.kind() == ErrorKind::kUsage && std::string(error.what()).find(std::string("optimizer.kind: ") + kind) != std::string::npos ? "" : error.what();
      }
      return "it is made";
    }));
}

TEST(SharedOptimizer, ACheckpointThatDoesNotFitIsRefused) {
  testing::expect_all_fine(testing::run_ranks(2, testing::kPatient, [&](Communicator& ranks) -> std::string {
    Model model;
    const auto shared = make_optimizer(model.named, {}, &ranks);
    NamedState state = make_optimizer(model.named, {})->state();
    state.pop_back();
    state.front().first = "weights.other";
    state[kShapes.size()].second = at::empty({3}, at::kFloat);
    try {
      shared->restore(state, 1);
    } catch (const Error& error) {
      for (const char* word : {"missing square.down_proj.weight", "unknown weights.other", "another shape or type of mean."})
        if (std::string(error.what()).find(word) == std::string::npos) return error.what();
      return "";
    }
    return "it is taken";
  }));
}

// As many small buckets as a real model has: what is rounded in each must not add up.
const std::vector<std::int64_t> kManySizes(300, 3 * (1 << 14));

TEST(Slices, LeaveNothingOutAndAreEven) {
  for (const int ranks : {1, 2, 3, 4, 8, 64})
    for (const std::vector<std::int64_t>& sizes : {std::vector<std::int64_t>{1 << 20, 5, 1 << 14, (1 << 15) + 1, 100'000}, {7, 8, 9}, {1}, {(1 << 14) - 1, (1 << 14) + 1}, kManySizes}) {
      std::vector<std::vector<std::size_t>> buckets(1);
      for (std::size_t i = sizes.size(); i-- > 0;) {
        if (sizes.size() > 5 && buckets.back().size() == 2) buckets.emplace_back();
        buckets.back().push_back(i);
      }
      const std::vector<std::vector<Slice>> slices = slices_of(sizes, buckets, ranks);
      ASSERT_EQ(slices.size(), static_cast<std::size_t>(ranks));
      std::int64_t all = 0, longest = 0;
      for (const std::int64_t size : sizes) all += size;
      for (std::size_t i = 0; i < sizes.size(); ++i) {
        std::int64_t next = 0;
        for (const std::vector<Slice>& part : slices) {
          EXPECT_EQ(part[i].first, next);
          EXPECT_TRUE(part[i].count == 0 || part[i].count >= std::min(sizes[i], kPieceOfNorm));
          EXPECT_EQ(part[i].first % kPieceOfNorm == 0 || part[i].count == 0, true);
          next += part[i].count;
        }
        EXPECT_EQ(next, sizes[i]);
      }
      for (const std::vector<Slice>& part : slices) {
        std::int64_t length = 0;
        for (const Slice& slice : part) length += slice.count;
        longest = std::max(longest, length);
      }
      EXPECT_LE(longest, all / ranks + 2 * kPieceOfNorm);
      for (const std::vector<std::size_t>& bucket : buckets)
        for (const std::vector<Slice>& part : slices) {
          std::int64_t own = 0, of_all = 0;
          for (const std::size_t i : bucket) own += part[i].count, of_all += sizes[i];
          EXPECT_LE(own, of_all / ranks + 2 * kPieceOfNorm);
        }
    }
}

}  // namespace
}  // namespace alambic::train
