// SPDX-License-Identifier: Apache-2.0
// Moments that ranks share against one optimiser that has them all: the same bits.
#include "train/shared_optimizer.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include <map>

#include "tests/forked_ranks.h"
#include "tests/support.h"
#include "train/gradient_sums.h"

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
  for (std::int64_t step = first; step < first + 3; ++step) {
    learn(model_of_whole, step, ranks.rank());
    learn(model, step, ranks.rank());
    GradientSums(whole, ranks, /*in_backward=*/false).finish();
    GradientSums(shared, ranks, /*in_backward=*/true).finish();
    const double norm = whole.clip(max_norm, ranks), norm_of_shared = shared.clip(max_norm, ranks);
    if (norm != norm_of_shared || !(norm > 0)) wrong += "norms " + std::to_string(norm) + " and " + std::to_string(norm_of_shared) + "; ";
    whole.step(1e-2), shared.step(1e-2);
  }
  return wrong + difference(whole, shared);
}

class SharedMoments : public ::testing::TestWithParam<std::tuple<const char*, int>> {};
INSTANTIATE_TEST_SUITE_P(Kinds, SharedMoments, ::testing::Combine(::testing::Values("adamw", "adamw8bit"), ::testing::Values(2, 3, 4, 7)),
                         [](const auto& each) { return std::string(std::get<0>(each.param)) + "Of" + std::to_string(std::get<1>(each.param)); });

TEST_P(SharedMoments, HaveTheBitsOfTheWhole) {
  const OptimizerConfig config{.kind = std::get<0>(GetParam()), .weight_decay = 0.1, .embedding_lr_ratio = 0.5};
  testing::expect_all_fine(testing::run_ranks(std::get<1>(GetParam()), testing::kPatient, [&](Communicator& ranks) {
    at::set_num_threads(1);
    Model one, other;
    const auto whole = make_optimizer(one.named, config), shared = make_optimizer(other.named, config, &ranks);
    std::string wrong;
    for (const double max_norm : {0.0, 1.0}) wrong += three_steps(one, *whole, other, *shared, max_norm > 0 ? 3 : 0, max_norm, ranks);
    // Gone on with from what rank 0 alone has read.
    Model again;
    const auto resumed = make_optimizer(again.named, config, &ranks);
    if (ranks.rank() == 0) resumed->restore(whole->state(), whole->num_steps());
    resumed->share(whole->num_steps(), ranks);
    if (const std::string after = difference(*whole, *resumed); !after.empty()) wrong += "resumed: " + after;
    wrong += three_steps(one, *whole, again, *resumed, 6, 1, ranks);
    // Of all moments this rank keeps its part, give or take the pieces at its ends.
    std::int64_t own = 0;
    for (const auto& [name, moment] : shared->moments()) own += static_cast<std::int64_t>(moment.nbytes());
    const std::int64_t all = whole->state_bytes(), piece = config.kind == std::string("adamw") ? 8 * (2 << 14) : 9 * (2 << 14) / 4;
    if (shared->state_bytes() != all) wrong += "moments of " + std::to_string(shared->state_bytes()) + " bytes, not " + std::to_string(all) + "; ";
    if (std::abs(own - all / ranks.size()) > piece) wrong += std::to_string(own) + " bytes of its own of " + std::to_string(all) + "; ";
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

TEST(Slices, LeaveNothingOutAndAreEven) {
  for (const int ranks : {1, 2, 3, 4, 8, 64})
    for (const std::vector<std::int64_t>& sizes : {std::vector<std::int64_t>{1 << 20, 5, 1 << 14, (1 << 15) + 1, 100'000}, {7, 8, 9}, {1}, {(1 << 14) - 1, (1 << 14) + 1}}) {
      const std::vector<std::vector<Slice>> slices = slices_of(sizes, ranks);
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
    }
}

}  // namespace
}  // namespace alambic::train
