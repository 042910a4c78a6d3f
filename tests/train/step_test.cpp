// SPDX-License-Identifier: Apache-2.0
#include "train/step.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "lora/adapter.h"
#include "models/fused_blocks.h"
#include "tests/closeness.h"
#include "tests/golden.h"
#include "tests/support.h"
#include "train/cross_entropy.h"
#include "train/schedule.h"

namespace alambic::train {
namespace {

using testing::Golden;
using testing::is_close;

/// A batch of rows ids[0 .. length), with targets and keep made from a per-token mask.
data::Batch batch_of(const std::vector<std::vector<std::int64_t>>& rows, const std::vector<std::vector<bool>>& mask) {
  std::vector<std::int64_t> tokens, positions, targets;
  data::Batch batch;
  std::vector<bool> keep;
  for (std::size_t row = 0; row < rows.size(); ++row) {
    for (std::size_t i = 0; i < rows[row].size(); ++i) {
      const bool last = i + 1 == rows[row].size();
      tokens.push_back(rows[row][i]);
      positions.push_back(static_cast<std::int64_t>(i));
      targets.push_back(last ? 0 : rows[row][i + 1]);
      keep.push_back(!last && mask[row][i + 1]);
      batch.num_kept += keep.back();
    }
    batch.document_lengths.push_back(static_cast<std::int64_t>(rows[row].size()));
    batch.origins.push_back({});
  }
  batch.tokens_T = at::tensor(tokens);
  batch.positions_T = at::tensor(positions);
  batch.targets_T = at::tensor(targets);
  batch.keep_T = at::empty({static_cast<std::int64_t>(keep.size())}, at::kBool);
  std::copy(keep.begin(), keep.end(), batch.keep_T.data_ptr<bool>());
  return batch;
}

/// The ATen operators, or the fused blocks with a memory policy.
struct Path {
  const char* name;
  std::optional<models::Keep> keep;
};
void PrintTo(const Path& path, std::ostream* out) { *out << path.name; }
constexpr Path kPaths[] = {{"Operators", std::nullopt}, {"Store", models::Keep::kAll}, {"Mlp", models::Keep::kNoMlp}, {"Block", models::Keep::kInputs}};

class PeftTraining : public ::testing::TestWithParam<std::tuple<std::string, Path>> {};

TEST_P(PeftTraining, TwentyStepsGiveTheSameLossesAndTheSameAdapter) {  // tests/oracle/peft_training_oracle.py
  const auto [family, path] = GetParam();
  const Golden peft("peft_training_" + family + ".safetensors");
  SCOPED_TRACE(peft.provenance());
  models::Decoder decoder = models::make_decoder(models::read_model_config(parse_json(peft.metadata().at("config"), "config.json"), "config.json"));
  for (const models::NamedTensor& named : decoder.tensors()) *named.tensor = peft["base." + named.name].clone();
  if (decoder.head_tied) decoder.head.weight_OI = decoder.embedding_VD;
  lora::attach(decoder, {.rank = 4, .alpha = 8}, 0);
  std::vector<models::NamedTensor> trained = lora::trainable(decoder);
  ASSERT_EQ(trained.size(), 28u);
  {
    const at::NoGradGuard no_grad;
    for (const models::NamedTensor& named : trained) named.tensor->copy_(peft["initial." + named.name]);
  }
  if (path.keep) {
    ASSERT_EQ(models::use_fused_blocks(decoder), "");
    decoder.keep = *path.keep;
  }
  const std::unique_ptr<Optimizer> optimizer = make_optimizer(trained, {.weight_decay = 0.01});
  const ScheduleConfig schedule{.shape = "cosine", .learning_rate = 5e-3, .warmup_steps = 4};
  const LossSum loss_sum = [&](const data::Batch& batch, std::uint64_t seed) {
    return cross_entropy_sum(decoder.hidden_TD(input_of(batch, seed)), decoder.head, batch.targets_T, batch.keep_T, seed);
  };
  const auto ranks = parallel::single();
  const at::Tensor ids = peft["ids"], mask = peft["mask"], lengths = peft["lengths"];
  for (std::int64_t number = 0; number < 20; ++number) {
    std::vector<data::Batch> micro_batches;
    for (std::int64_t micro = 0; micro < ids.size(1); ++micro) {
      std::vector<std::vector<std::int64_t>> rows;
      std::vector<std::vector<bool>> masks;
      for (std::int64_t row = 0; row < ids.size(2); ++row) {
        rows.emplace_back();
        masks.emplace_back();
        for (std::int64_t i = 0; i < lengths[number][micro][row].item<std::int64_t>(); ++i) {
          rows.back().push_back(ids[number][micro][row][i].item<std::int64_t>());
          masks.back().push_back(mask[number][micro][row][i].item<bool>());
        }
      }
      micro_batches.push_back(batch_of(rows, masks));
    }
    const StepReport report = step(micro_batches, loss_sum, *optimizer, learning_rate_at(schedule, number, 20), 0.5, 1, *ranks);
    EXPECT_TRUE(report.applied);
    EXPECT_NEAR(report.nats_per_token, peft["losses"][number].item<double>(), 1e-5) << "step " << number;
    EXPECT_NEAR(report.grad_norm, peft["norms"][number].item<double>(), 2e-5 * std::max(1.0, report.grad_norm)) << "step " << number;
  }
  for (const models::NamedTensor& named : trained)
    EXPECT_TRUE(is_close(*named.tensor, peft["final." + named.name], {.absolute = 1e-5})) << named.name;
}
INSTANTIATE_TEST_SUITE_P(Families, PeftTraining, ::testing::Combine(::testing::Values(std::string("llama"), std::string("qwen2")), ::testing::ValuesIn(kPaths)),
                         [](const auto& test) { return std::get<0>(test.param) + std::get<1>(test.param).name; });

// A model of one matrix: logits = embedding row of the token.
struct Toy {
  at::Tensor weight = at::randn({8, 8}).requires_grad_(true);
  std::unique_ptr<Optimizer> optimizer = make_optimizer({{"weight", &weight}}, {});
  LossSum loss_sum = [this](const data::Batch& batch, std::uint64_t) {
    return -weight.index_select(0, batch.tokens_T).log_softmax(1).gather(1, batch.targets_T.unsqueeze(1)).squeeze(1).masked_select(batch.keep_T).sum(at::kDouble);
  };
  std::unique_ptr<parallel::Communicator> ranks = parallel::single();
};

const std::vector<std::vector<std::int64_t>> kRows = {{1, 2, 3, 4, 5}, {6, 7}, {2, 2, 3}};
const std::vector<std::vector<bool>> kMask = {{false, true, true, true, true}, {false, true}, {false, false, true}};

TEST(Step, EachTokenWeighsTheSameHoweverTheBatchIsCut) {
  std::vector<at::Tensor> results;
  std::vector<double> losses;
  const at::Tensor start = at::randn({8, 8});
  for (const std::vector<std::vector<std::size_t>>& cut :
       std::vector<std::vector<std::vector<std::size_t>>>{{{0, 1, 2}}, {{0}, {1}, {2}}, {{0, 1}, {2}}, {{0}, {1, 2}}}) {
    Toy toy;
    toy.weight.detach().copy_(start);
    std::vector<data::Batch> batches;
    for (const std::vector<std::size_t>& part : cut) {
      std::vector<std::vector<std::int64_t>> rows;
      std::vector<std::vector<bool>> mask;
      for (const std::size_t i : part) rows.push_back(kRows[i]), mask.push_back(kMask[i]);
      batches.push_back(batch_of(rows, mask));
    }
    const StepReport report = step(batches, toy.loss_sum, *toy.optimizer, 0.1, 1.0, 1, *toy.ranks);
    EXPECT_EQ(report.num_tokens, 6);
    losses.push_back(report.nats_per_token);
    // The first moment is the gradient times (1 - beta1): AdamW itself would hide a wrong divisor.
    results.push_back(toy.optimizer->state()[1].second.clone());
  }
  for (std::size_t i = 1; i < results.size(); ++i) {
    EXPECT_NEAR(losses[i], losses[0], 1e-6);
    EXPECT_TRUE(is_close(results[i], results[0], {.absolute = 1e-7}));
  }
}

TEST(Step, TheTreeAddsTheGradientsOfMicroBatches) {
  std::vector<data::Batch> batches;
  for (const std::size_t i : {0, 1, 2, 0, 2}) batches.push_back(batch_of({kRows[i]}, {kMask[i]}));
  std::int64_t num_tokens = 0;
  for (const data::Batch& batch : batches) num_tokens += batch.num_kept;
  Toy toy, by_hand, as_they_come;
  for (Toy* other : {&by_hand, &as_they_come}) other->weight.detach().copy_(toy.weight.detach());
  std::vector<at::Tensor> gradients;
  for (const data::Batch& batch : batches) {
    (by_hand.loss_sum(batch, 1) / static_cast<double>(num_tokens)).backward();
    gradients.push_back(by_hand.weight.grad().clone());
    by_hand.optimizer->forget_gradients();
  }
  by_hand.weight.mutable_grad() = parallel::tree_sum(gradients);
  by_hand.optimizer->step(0.1);
  const StepReport tree = step(batches, toy.loss_sum, *toy.optimizer, 0.1, 0, 1, *toy.ranks, {}, Order::kTree);
  EXPECT_TRUE(toy.weight.equal(by_hand.weight));
  EXPECT_TRUE(toy.optimizer->state()[1].second.equal(by_hand.optimizer->state()[1].second));
  const StepReport plain = step(batches, as_they_come.loss_sum, *as_they_come.optimizer, 0.1, 0, 1, *as_they_come.ranks);
  EXPECT_EQ(tree.nats_per_token, plain.nats_per_token);
  EXPECT_NEAR(tree.grad_norm, plain.grad_norm, 1e-6);
  EXPECT_TRUE(is_close(toy.optimizer->state()[1].second, as_they_come.optimizer->state()[1].second, {.absolute = 1e-7}));
}

TEST(Step, FiguresAddUpTheSameWhoeverAddsThem) {
  const std::vector<data::Batch> batches = {batch_of({kRows[0]}, {kMask[0]}), batch_of({kRows[1]}, {kMask[1]}), batch_of({kRows[2]}, {kMask[2]})};
  std::vector<Json> told;
  for (const Order order : {Order::kAsTheyCome, Order::kTree}) {
    Toy toy;
    double sum = 0;
    std::int64_t count = 0;
    const LossSum noting = [&](const data::Batch& batch, std::uint64_t seed) {
      sum += 0.5 * static_cast<double>(batch.tokens_T.numel()), count += batch.num_kept;
      return toy.loss_sum(batch, seed);
    };
    const Figures figures = [&](std::int64_t divisor) {
      return Json{{"half", std::exchange(sum, 0) / static_cast<double>(divisor)}, {"count", std::exchange(count, 0)}, {"none", nullptr}};
    };
    told.push_back(step(batches, noting, *toy.optimizer, 0.1, 0, 1, *toy.ranks, {}, order, figures).figures);
  }
  EXPECT_EQ(told[0], told[1]);
  EXPECT_EQ(told[0], (Json{{"half", 5.0 / 6}, {"count", 6}, {"none", nullptr}}));
}

TEST(Step, ThreeRanksHaveNoTree) {
  for (const int size : {1, 2, 4, 64}) require_tree(size);
  for (const int size : {3, 6, 12}) EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, std::to_string(size) + " ranks cannot share", [&] { require_tree(size); }));
}

TEST(Step, ALossThatIsNotFiniteIsNotApplied) {
  Toy toy;
  const at::Tensor before = toy.weight.detach().clone();
  std::vector<data::Batch> batches = {batch_of({kRows[0]}, {kMask[0]}), batch_of({kRows[2]}, {kMask[2]})};
  batches[1].first_sample = 77;
  const LossSum bad = [&](const data::Batch& batch, std::uint64_t seed) {
    return toy.loss_sum(batch, seed) * (batch.first_sample == 77 ? std::numeric_limits<double>::quiet_NaN() : 1.0);
  };
  const StepReport report = step(batches, bad, *toy.optimizer, 0.1, 1.0, 1, *toy.ranks);
  EXPECT_FALSE(report.applied);
  EXPECT_TRUE(std::isnan(report.nats_per_token));
  EXPECT_EQ(report.bad_samples, std::vector<std::uint64_t>{77});
  EXPECT_TRUE(toy.weight.detach().equal(before));
  EXPECT_EQ(toy.optimizer->num_steps(), 0);
  // What the bad step gathered does not leak into the next one.
  const StepReport next = step(batches, toy.loss_sum, *toy.optimizer, 0.1, 0, 1, *toy.ranks);
  Toy clean;
  clean.weight.detach().copy_(before);
  EXPECT_EQ(next.grad_norm, step(batches, clean.loss_sum, *clean.optimizer, 0.1, 0, 1, *clean.ranks).grad_norm);
}

TEST(Step, AGradientThatIsNotFiniteIsNotApplied) {
  Toy toy;
  const at::Tensor before = toy.weight.detach().clone();
  const LossSum bad = [&](const data::Batch& batch, std::uint64_t seed) {  // finite loss, infinite slope: sqrt at 0
    return toy.loss_sum(batch, seed) + (toy.weight - toy.weight.detach()).abs().sum(at::kDouble).sqrt();
  };
  const std::vector<data::Batch> batches = {batch_of({kRows[0]}, {kMask[0]})};
  const StepReport report = step(batches, bad, *toy.optimizer, 0.1, 1.0, 1, *toy.ranks);
  EXPECT_TRUE(std::isfinite(report.nats_per_token));
  EXPECT_FALSE(std::isfinite(report.grad_norm));
  EXPECT_FALSE(report.applied);
  EXPECT_EQ(report.bad_samples.size(), 1u);
  EXPECT_TRUE(toy.weight.detach().equal(before));
}

TEST(Step, AStepWithoutATokenToLearnFromIsRefused) {
  Toy toy;
  const std::vector<data::Batch> batches = {batch_of({{1, 2}}, {{false, false}})};
  EXPECT_TRUE(testing::fails_with(ErrorKind::kData, "is masked", [&] { step(batches, toy.loss_sum, *toy.optimizer, 0.1, 1.0, 1, *toy.ranks); }));
}

TEST(Step, StopsBetweenMicroBatchesAndLeavesNothingBehind) {
  Toy toy;
  const at::Tensor before = toy.weight.detach().clone();
  const std::vector<data::Batch> batches = {batch_of({kRows[0]}, {kMask[0]}), batch_of({kRows[2]}, {kMask[2]})};
  int asked = 0;
  const StepReport report = step(batches, toy.loss_sum, *toy.optimizer, 0.1, 1.0, 1, *toy.ranks, [&] { return ++asked == 1; });
  EXPECT_TRUE(report.stopped);
  EXPECT_FALSE(report.applied);
  EXPECT_EQ(asked, 1);
  EXPECT_TRUE(toy.weight.detach().equal(before));
  EXPECT_FALSE(toy.weight.grad().defined());
}

}  // namespace
}  // namespace alambic::train
