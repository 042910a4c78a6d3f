// SPDX-License-Identifier: Apache-2.0
// Steps of ranks that share rows (ranks.context) against steps of one rank.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "checkpoints/hf_folder.h"
#include "core/random.h"
#include "lora/initialise.h"
#include "tests/closeness.h"
#include "tests/forked_ranks.h"
#include "tests/golden.h"
#include "tests/support.h"
#include "train/memory.h"
#include "train/recipe.h"
#include "train/run_folder.h"

namespace alambic::train {
namespace {

using parallel::Communicator;
using testing::expect_all_fine, testing::kPatient, testing::run_ranks;

/// Documents of the given lengths; every third token is masked, or all of them.
data::Batch batch_of(const std::vector<std::int64_t>& lengths, std::uint64_t seed, bool masked = false) {
  data::Batch batch;
  batch.first_sample = seed;
  std::vector<std::int64_t> tokens, positions, targets;
  std::vector<bool> keep;
  for (const std::int64_t length : lengths) {
    for (std::int64_t i = 0; i < length; ++i) {
      tokens.push_back(static_cast<std::int64_t>(mix64(seed * 1000 + tokens.size()) % 48));
      positions.push_back(i);
      keep.push_back(!masked && i + 1 < length && tokens.size() % 3 != 0);
      batch.num_kept += keep.back();
    }
    batch.document_lengths.push_back(length);
    batch.origins.push_back({});
  }
  targets = tokens;
  std::rotate(targets.begin(), targets.begin() + 1, targets.end());
  batch.tokens_T = at::tensor(tokens), batch.positions_T = at::tensor(positions), batch.targets_T = at::tensor(targets);
  batch.keep_T = at::empty({static_cast<std::int64_t>(keep.size())}, at::kBool);
  std::copy(keep.begin(), keep.end(), batch.keep_T.data_ptr<bool>());
  return batch;
}

/// Two groups of ranks get the first and the third, and the second and the fourth: in one turn a batch is so short that some ranks have padding
/// alone, in the other a group has nothing to learn from.
std::vector<data::Batch> four_batches() { return {batch_of({100, 3, 160}, 1), batch_of({5}, 2), batch_of({64, 64, 150}, 3), batch_of({200}, 4, /*masked=*/true)}; }

TrainConfig config_of(const std::string& method) {
  TrainConfig config;
  config.model = testing::golden_path("peft/llama_tied");
  config.method = method;
  config.lora.rank = 4;
  config.lora.dropout = 0.1;
  config.compute_type = "f32";
  config.neftune_alpha = 5;
  config.optimizer.epsilon = 1;  // weights then move about as their gradients are; else AdamW would show the rounding of the smallest of them at full size
  return config;
}

class Student {
 public:
  explicit Student(const TrainConfig& config) : decoder_(checkpoints::load_decoder(config.model, at::kFloat)) {
    make_trainable(decoder_, config);
    if (const std::string why = prepare_blocks(decoder_, config); !why.empty()) fail(ErrorKind::kBug, why);
    std::vector<models::NamedTensor> trained = lora::trainable(decoder_);
    loss_sum = text_recipe(config).loss(decoder_, {}, trained);
    optimizer = make_optimizer(trained, config.optimizer);
    if (config.method == "lora") lora::initialise(decoder_, config.lora, 7);
  }
  void share(Communicator& ranks, int context) { decoder_.context = {.ranks = &ranks, .size = context, .member = ranks.rank() % context}; }

  LossSum loss_sum;
  std::unique_ptr<Optimizer> optimizer;

 private:
  models::Decoder decoder_;
};

std::vector<data::Batch> of_group(const std::vector<data::Batch>& all, int group, int groups) {
  std::vector<data::Batch> own;
  for (std::size_t i = static_cast<std::size_t>(group); i < all.size(); i += static_cast<std::size_t>(groups)) own.push_back(all[i]);
  return own;
}

/// "", or how three steps of these ranks differ from those of one.
std::string difference(Communicator& ranks, int context, const std::string& method, Order order) {
  const TrainConfig config = config_of(method);
  Student alone(config), together(config);
  together.share(ranks, context);
  const std::vector<data::Batch> all = four_batches(), own = of_group(all, ranks.rank() / context, ranks.size() / context);
  const std::unique_ptr<Communicator> single = parallel::single();
  for (std::uint64_t number = 0; number < 3; ++number) {
    const StepReport expected = step(all, alone.loss_sum, *alone.optimizer, 1e-3, 1.0, 100 + number, *single, {}, order);
    const StepReport report = step(own, together.loss_sum, *together.optimizer, 1e-3, 1.0, 100 + number, ranks, {}, order, {}, context);
    const auto is_near = [](double a, double b) { return std::abs(a - b) <= 5e-6 * std::abs(b); };
    if (!report.applied || report.num_tokens != expected.num_tokens) return "tokens: " + std::to_string(report.num_tokens);
    if (!is_near(report.nats_per_token, expected.nats_per_token)) return "loss " + std::to_string(report.nats_per_token) + ", expected " + std::to_string(expected.nats_per_token);
    if (!is_near(report.grad_norm, expected.grad_norm)) return "norm " + std::to_string(report.grad_norm) + ", expected " + std::to_string(expected.grad_norm);
    const auto state = together.optimizer->state(), wanted = alone.optimizer->state();
    for (std::size_t i = 0; i < state.size(); ++i)
      if (const auto close = testing::is_close_to_scale(state[i].second, wanted[i].second, 3e-5); wanted[i].second.abs().max().item<double>() > 0 && !close) return state[i].first + " after step " + std::to_string(number) + ": " + close.message();
  }
  return "";
}

struct Share {
  int size, context;
};
class SharedStep : public ::testing::TestWithParam<Share> {};
INSTANTIATE_TEST_SUITE_P(Ranks, SharedStep, ::testing::Values(Share{2, 2}, Share{4, 2}, Share{4, 4}), [](const auto& test) { return std::to_string(test.param.size) + "By" + std::to_string(test.param.context); });

TEST_P(SharedStep, EqualsThatOfOneRank) {
  expect_all_fine(run_ranks(GetParam().size, kPatient, [](Communicator& ranks) -> std::string {
    at::set_num_threads(1);
    for (const char* const method : {"lora", "full"})
      for (const Order order : {Order::kAsTheyCome, Order::kTree})
        if (const std::string said = difference(ranks, GetParam().context, method, order); !said.empty()) return std::string(method) + ": " + said;
    return "";
  }));
}

/// All bits of the weights after three steps, as text.
std::string weights_after_steps(Communicator& ranks, int context, Order order) {
  at::set_num_threads(1);
  Student student(config_of("lora"));
  student.share(ranks, context);
  const std::vector<data::Batch> own = of_group(four_batches(), ranks.rank() / context, ranks.size() / context);
  for (std::uint64_t number = 0; number < 3; ++number) step(own, student.loss_sum, *student.optimizer, 1e-2, 1.0, 100 + number, ranks, {}, order, {}, context);
  std::uint64_t sum = 0;
  for (const auto& [name, tensor] : student.optimizer->state()) {
    const at::Tensor bits = tensor.contiguous().view(at::kInt).flatten();
    for (std::int64_t i = 0; i < bits.numel(); ++i) sum = mix64(sum ^ static_cast<std::uint32_t>(bits[i].item<std::int32_t>()));
  }
  return std::to_string(sum);
}

TEST(SharedStep, TheTreeGivesTheSameBitsForOneAndTwoGroups) {
  const auto run = [](int size, Order order) {
    std::vector<std::string> said;
    for (const testing::End& end : run_ranks(size, kPatient, [&](Communicator& ranks) { return weights_after_steps(ranks, 2, order); })) said.push_back(end.said);
    for (const std::string& each : said) EXPECT_EQ(each, said[0]);
    EXPECT_EQ(said[0].find_first_not_of("0123456789"), std::string::npos) << said[0];
    return said[0];
  };
  const std::string tree = run(2, Order::kTree), plain = run(2, Order::kAsTheyCome);
  EXPECT_EQ(run(4, Order::kTree), tree);
  EXPECT_EQ(run(2, Order::kTree), tree);
  EXPECT_EQ(run(2, Order::kAsTheyCome), plain);
  EXPECT_NE(plain, tree) << "the order does not show, so this test sees nothing";
}

TEST(SharedStep, AWishToStopAndALossThatIsNotFiniteAreSeenByAll) {
  expect_all_fine(run_ranks(4, kPatient, [](Communicator& ranks) -> std::string {
    at::set_num_threads(1);
    Student student(config_of("lora"));
    student.share(ranks, 2);
    const std::vector<data::Batch> own = of_group(four_batches(), ranks.rank() / 2, 2);
    const StepReport stopped = step(own, student.loss_sum, *student.optimizer, 1e-3, 1.0, 1, ranks, [&] { return ranks.rank() == 3; }, Order::kAsTheyCome, {}, 2);
    if (!stopped.stopped || stopped.applied) return "not stopped";
    const LossSum bad = [&](const data::Batch& batch, std::uint64_t seed) {
      const at::Tensor loss = student.loss_sum(batch, seed);
      return ranks.rank() == 2 && batch.first_sample == 2 ? loss * std::numeric_limits<double>::quiet_NaN() : loss;
    };
    const StepReport report = step(own, bad, *student.optimizer, 1e-3, 1.0, 1, ranks, {}, Order::kAsTheyCome, {}, 2);
    if (report.applied || std::isfinite(report.nats_per_token) || report.bad_samples != std::vector<std::uint64_t>{2}) return "the bad loss";
    return step(own, student.loss_sum, *student.optimizer, 1e-3, 1.0, 1, ranks, {}, Order::kAsTheyCome, {}, 2).applied ? "" : "the step after";
  }));
}

TEST(SharedRows, ContradictionsAreNamed) {
  TrainConfig config = config_of("lora");
  config.data.mixture = {{.store = "text"}};
  config.limits.max_steps = 1;
  config.ranks.context = 4;
  config.data.row_length = 128;
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, "ranks.context: 4 ranks cannot share the 128 tokens of a micro-batch; data.row_length x data.rows_per_batch must be at least 256", [&] { check(config); }));
  config.data.row_length = 256;
  check(config);
  config.lora.dora = true;
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, "ranks.context: rows are shared by the fused blocks alone, which do not compute DoRA", [&] { check(config); }));
  config.lora.dora = false;
  {
    models::Decoder decoder = checkpoints::load_decoder(config.model, at::kFloat);
    make_trainable(decoder, config);
    EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, "ranks.context: rows are shared by the fused blocks alone, which cannot be used: the loss looks inside", [&] { prepare_blocks(decoder, config, "the loss looks inside"); }));
  }
  // This process is one rank.
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, "ranks.context: 4 ranks are to share each row, but 1 rank was started", [&] { finetune(config, false, {}); }));
}

}  // namespace
}  // namespace alambic::train
