// SPDX-License-Identifier: Apache-2.0
// Merge-and-restart: the sum of the merged updates has a rank that no adapter of the run has, a stop anywhere changes no bit,
// and what comes out is a model folder.
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linalg_svd.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <numbers>

#include "checkpoints/hf_folder.h"
#include "checkpoints/merge_folder.h"
#include "checkpoints/run_state.h"
#include "core/files.h"
#include "core/log.h"
#include "lora/initialise.h"
#include "tests/closeness.h"
#include "tests/support.h"
#include "tests/train/tiny_run.h"
#include "train/evaluate.h"
#include "train/finetune.h"
#include "train/schedule.h"

namespace alambic::train {
namespace {

using testing::fails_with;
using testing::is_close_to_scale;
using testing::ScratchFolder;
using testing::tiny_config;

constexpr std::int64_t kRank = 2;

struct SilentLog {
  LogSink former = set_log_sink([](LogLevel, std::string_view) {});
  ~SilentLog() { set_log_sink(former); }
};

TrainConfig restarting(const fs::path& folder, const std::string& run) {
  TrainConfig config = tiny_config(folder, run);
  config.lora.rank = kRank;
  config.lora.alpha = 4;
  config.lora.restart_every = 5;
  config.lora.restart_warmup_steps = 2;
  return config;
}

/// Singular values of a matrix's change above 1e-4 of the largest.
std::int64_t rank_of_change(const at::Tensor& after, const at::Tensor& before) {
  const at::Tensor values = std::get<1>(at::linalg_svd((after - before).to(at::kDouble), false));
  return (values > values.max() * 1e-4).sum().item<std::int64_t>();
}

TEST(Restart, TheSumOfUpdatesHasARankThatNoAdapterHas) {
  const SilentLog silent;
  const ScratchFolder folder;
  const TrainConfig config = restarting(folder.path(), "run");
  const TrainReport report = finetune(config, false, [] { return false; });
  EXPECT_EQ(report.result, config.output / "weights");
  EXPECT_EQ(report.json["restarts"], 3);
  EXPECT_LT(report.json["evaluation"][0]["after"]["loss"].get<double>(), report.json["evaluation"][0]["before"]["loss"].get<double>() - 0.1);
  const checkpoints::FolderTensors before(config.model), after(report.result);
  std::int64_t adapted = 0;
  for (const std::string& name : before.names()) {
    if (name.find("_proj") == std::string::npos) {
      EXPECT_TRUE(at::equal(after.tensor(name), before.tensor(name))) << name;
      continue;
    }
    const std::int64_t rank = rank_of_change(after.tensor(name), before.tensor(name));
    EXPECT_GT(rank, kRank) << name;
    EXPECT_LE(rank, 4 * kRank) << name;
    ++adapted;
  }
  EXPECT_EQ(adapted, 14);

  // The folder is a model whose loss is the report's, and a merge publishes it.
  const data::TokenStore held(folder / "held");
  EXPECT_NEAR(evaluate(checkpoints::load_decoder(report.result, at::kFloat), held, config.data.row_length).total.loss(), report.json["evaluation"][0]["after"]["loss"].get<double>(), 1e-5);
  checkpoints::MergeConfig merge;
  merge.base = config.model;
  merge.adapter = report.result;
  merge.output = folder / "merged";
  EXPECT_EQ(checkpoints::merge_folder(merge).relation, "finetune");
  EXPECT_NE(read_file(folder / "merged/README.md").find("merged into it and begun anew"), std::string::npos);
  const checkpoints::FolderTensors merged(folder / "merged");
  for (const std::string& name : after.names()) EXPECT_TRUE(at::equal(merged.tensor(name), after.tensor(name))) << name;

  // Without restarts the same run stays at the adapter's rank.
  TrainConfig plain = restarting(folder.path(), "plain");
  plain.lora.restart_every = 0;
  merge.adapter = finetune(plain, false, [] { return false; }).result;
  merge.output = folder / "plain-merged";
  checkpoints::merge_folder(merge);
  EXPECT_LE(rank_of_change(checkpoints::FolderTensors(merge.output).tensor("model.layers.0.mlp.down_proj.weight"), before.tensor("model.layers.0.mlp.down_proj.weight")), kRank);
}

TEST(Restart, AStopAnywhereAroundARestartChangesNoBit) {
  const SilentLog silent;
  const ScratchFolder folder;
  const TrainConfig whole = restarting(folder.path(), "whole");
  finetune(whole, false, [] { return false; });
  struct Killed {};
  // Three questions a step, the first of them before the restart. Checkpoints are at every 4th step and every 6th (evaluations).
  for (const auto& [at, kill] : {std::pair{5 * 3 + 1, false}, {5 * 3 + 2, false}, {5 * 3 + 2, true}, {10 * 3 + 2, true}}) {
    SCOPED_TRACE(std::to_string(at) + (kill ? " killed" : " stopped"));
    const TrainConfig parts = restarting(folder.path(), "parts-" + std::to_string(at) + (kill ? "k" : "s"));
    const auto end = [at = at, kill = kill, asked = 0]() mutable {
      if (++asked < at) return false;
      if (kill) throw Killed();
      return true;
    };
    if (kill) EXPECT_THROW(finetune(parts, false, end), Killed);
    else EXPECT_TRUE(fails_with(ErrorKind::kStopped, "everything is saved", [&] { finetune(parts, false, end); }));
    const TrainReport report = finetune(parts, true, [] { return false; });
    EXPECT_EQ(report.json["restarts"], 3);
    for (const char* file : {"checkpoint-20/state.safetensors", "checkpoint-20/progress.json", "metrics.jsonl", "weights/model.safetensors"})
      EXPECT_EQ(sha256_of_file(parts.output / file), sha256_of_file(whole.output / file)) << file;
  }
}

TEST(Restart, ACheckpointHoldsTheMergedBaseAndAnOptimiserBegunAnew) {
  const SilentLog silent;
  const ScratchFolder folder;
  TrainConfig config = restarting(folder.path(), "run");
  config.checkpoint.keep = 20;
  config.checkpoint.every = 1;
  config.limits.max_steps = 9;
  finetune(config, false, [] { return false; });
  const auto state = [&](int step) { return checkpoints::load_checkpoint(config.output / ("checkpoint-" + std::to_string(step))); };
  const auto tensor = [](const checkpoints::RunState& run, const std::string& name) {
    for (const auto& [key, value] : run.tensors)
      if (key == name) return value;
    throw std::runtime_error("no tensor " + name);
  };
  const std::string path = "model.layers.1.self_attn.q_proj", a = "weights.base_model.model." + path + ".lora_A.weight", b = "weights.base_model.model." + path + ".lora_B.weight";
  const checkpoints::RunState before = state(5), after = state(6), later = state(9);
  EXPECT_EQ(before.progress["restarts"], 0);
  EXPECT_EQ(before.progress["optimizer_steps"], 5);
  EXPECT_EQ(after.progress["restarts"], 1);
  EXPECT_EQ(after.progress["optimizer_steps"], 1);
  const at::Tensor merged = tensor(before, "base." + path + ".weight") + tensor(before, b).mm(tensor(before, a)) * (4.0 / kRank);
  EXPECT_TRUE(is_close_to_scale(tensor(after, "base." + path + ".weight"), merged, 1e-6));
  EXPECT_FALSE(is_close_to_scale(merged, tensor(before, "base." + path + ".weight"), 1e-4));
  EXPECT_TRUE(at::equal(tensor(later, "base." + path + ".weight"), tensor(after, "base." + path + ".weight"))) << "between restarts the base is frozen";
  // The first step after a restart is at learning rate 0: A and B are as drawn, the moments of one gradient.
  EXPECT_EQ(tensor(after, b).abs().max().item<double>(), 0);
  EXPECT_FALSE(at::equal(tensor(after, a), tensor(before, a)));
  const at::Tensor mean = tensor(after, "mean.base_model.model." + path + ".lora_B.weight"), square = tensor(after, "square.base_model.model." + path + ".lora_B.weight");
  EXPECT_TRUE(is_close_to_scale((mean / 0.1).pow(2) * 0.001, square, 1e-3)) << "more than one step is in the moments";
  EXPECT_FALSE(fs::exists(config.output / "checkpoint-6/adapter")) << "an adapter on another base than the published one";
}

TEST(Restart, TheModelComputesWhatItComputed) {
  models::Decoder decoder = checkpoints::load_decoder(testing::golden_path("peft/llama_tied"), at::kFloat);
  const lora::LoraConfig config{.rank = 2, .alpha = 4, .targets = {"q_proj", "down_proj", "lm_head"}};
  lora::attach(decoder, config, 1);
  const at::NoGradGuard no_gradients;
  for (const models::NamedLinear& linear : decoder.linears())
    if (linear.linear->adapter) linear.linear->adapter->b_OR.add_(0.1);
  const at::Tensor ids = at::arange(12);
  const auto logits = [&] { return decoder.logits_TV(decoder.hidden_TD({.tokens_T = ids, .positions_T = ids, .document_lengths = {12}})); };
  const at::Tensor before = logits(), embedding = decoder.embedding_VD.clone();
  lora::merge_and_restart(decoder, config, 1, 1);
  EXPECT_TRUE(is_close_to_scale(logits(), before, 1e-5));
  EXPECT_FALSE(decoder.head_tied) << "the head was changed and the embedding was not";
  EXPECT_TRUE(at::equal(decoder.embedding_VD, embedding));
  EXPECT_EQ(decoder.head.adapter->b_OR.abs().max().item<double>(), 0);
}

// arXiv:2307.05695's jagged cosine: with 100 steps, 10 of warm-up, restarts every 30 with 5 of re-warm-up, 0.1 of the peak at the end.
TEST(Restart, TheLearningRateRisesAnew) {
  const ScheduleConfig schedule{.shape = "cosine", .learning_rate = 2e-3, .warmup_steps = 10, .final_share = 0.1};
  const auto cosine = [](double step) { return 2e-3 * (0.1 + 0.9 * 0.5 * (1 + std::cos(std::numbers::pi * (step - 10) / 90))); };
  const auto rate = [&](std::int64_t step) { return learning_rate_at(schedule, step, 100, 30, 5); };
  EXPECT_DOUBLE_EQ(rate(5), 1e-3);
  EXPECT_NEAR(rate(29), cosine(29), 1e-15);
  EXPECT_EQ(rate(30), 0);
  EXPECT_NEAR(rate(32), cosine(35) * 2 / 5, 1e-15);
  EXPECT_NEAR(rate(35), cosine(35), 1e-15);
  EXPECT_NEAR(rate(61), cosine(65) / 5, 1e-15);
  EXPECT_NEAR(rate(99), cosine(99), 1e-15);
  EXPECT_EQ(learning_rate_at(schedule, 32, 100, 0, 5), learning_rate_at(schedule, 32, 100));
}

TEST(Restart, TokenRowsAndAHeadGoIntoTheWeights) {
  const SilentLog silent;
  const ScratchFolder folder;
  TrainConfig rows = restarting(folder.path(), "rows"), head = restarting(folder.path(), "head");
  rows.lora.trainable_tokens = {"3", "10..20"};
  head.lora.targets = {"q_proj", "lm_head"};
  head.limits.max_steps = rows.limits.max_steps = 12;
  const data::TokenStore held(folder / "held");
  for (const TrainConfig& config : {rows, head}) {
    const TrainReport report = finetune(config, false, [] { return false; });
    const models::Decoder decoder = checkpoints::load_decoder(report.result, at::kFloat);
    EXPECT_EQ(decoder.head_tied, config.output == rows.output);
    EXPECT_NEAR(evaluate(decoder, held, config.data.row_length).total.loss(), report.json["evaluation"][0]["after"]["loss"].get<double>(), 1e-5);
    const at::Tensor before = checkpoints::FolderTensors(config.model).tensor("model.embed_tokens.weight");
    EXPECT_EQ(at::equal(decoder.embedding_VD, before), config.output == head.output);
    EXPECT_TRUE(at::equal(decoder.embedding_VD[21], before[21]));
  }
}

TEST(Restart, IsRefusedWhereItCannotBeExact) {
  const ScratchFolder folder;
  const auto refused = [&](const std::string& words, const std::function<void(TrainConfig&)>& change) {
    TrainConfig config = restarting(folder.path(), "run");
    change(config);
    return fails_with(ErrorKind::kUsage, words, [&] { finetune(config, false, [] { return false; }); });
  };
  EXPECT_TRUE(refused("a bf16 base", [](TrainConfig& config) { config.compute_type = "bf16"; }));
  EXPECT_TRUE(refused("DoRA", [](TrainConfig& config) { config.lora.dora = true; }));
  EXPECT_TRUE(refused("must be kaiming or gaussian", [](TrainConfig& config) { config.lora.init = "pissa"; }));
  EXPECT_TRUE(refused("must be less than lora.restart_every", [](TrainConfig& config) { config.lora.restart_warmup_steps = 5; }));
  TrainConfig config = restarting(folder.path(), "run");
  config.compute_type = "auto";
  EXPECT_EQ(compute_type_of(config), at::kFloat);
}

}  // namespace
}  // namespace alambic::train
