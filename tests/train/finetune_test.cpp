// SPDX-License-Identifier: Apache-2.0
#include "train/finetune.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <map>

#include "checkpoints/hf_folder.h"
#include "checkpoints/peft_folder.h"
#include "checkpoints/run_state.h"
#include "core/files.h"
#include "core/log.h"
#include "tests/support.h"
#include "tests/train/tiny_run.h"
#include "train/evaluate.h"

namespace alambic::train {
namespace {

using testing::fails_with;
using testing::ScratchFolder;
using testing::tiny_config;

const auto never = [] { return false; };

/// Counts the questions; true from question `at` on. The loop asks before each step and after each micro-batch, so three a step.
auto after_questions(int at) {
  return [at, asked = 0]() mutable { return ++asked >= at; };
}

struct Interrupted {};  // a death without a last word: nothing of it is caught on the way

auto dies_after_questions(int at) {
  return [at, asked = 0]() mutable -> bool {
    if (++asked >= at) throw Interrupted();
    return false;
  };
}

struct CapturedLog {
  std::string text;
  LogSink former = set_log_sink([this](LogLevel, std::string_view line) { text += std::string(line) + "\n"; });
  ~CapturedLog() { set_log_sink(former); }
};

/// Hashes of everything that must be the same bytes.
std::map<std::string, std::string> fingerprint(const fs::path& run) {
  std::map<std::string, std::string> hashes;
  for (const char* name : {"metrics.jsonl", "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "checkpoint-20/state.safetensors",
                           "checkpoint-20/progress.json", "checkpoint-20/adapter/adapter_model.safetensors"})
    hashes[name] = sha256_of_file(run / name);
  return hashes;
}

TEST(Finetune, LearnsAndReportsWhatItDid) {
  const ScratchFolder folder;
  const TrainConfig config = tiny_config(folder.path(), "run");
  const TrainReport report = finetune(config, false, never);
  EXPECT_EQ(report.steps, 20);
  EXPECT_EQ(report.result, config.output / "adapter");
  const Json& held = report.json["evaluation"][0];
  EXPECT_EQ(held["name"], "held");
  EXPECT_LT(held["after"]["loss"].get<double>(), held["before"]["loss"].get<double>());
  EXPECT_GT(held["after"]["bits_per_byte"].get<double>(), 0);
  EXPECT_EQ(held["after"]["by_language"].size(), 2u);
  EXPECT_EQ(report.json["licence"]["verdict"], "unknown");  // the second source has none
  EXPECT_EQ(report.json["data"][0]["sources"][0]["licence"], "CC0-1.0");

  // The figures of the report are those of the adapter in the folder.
  models::Decoder decoder = checkpoints::load_decoder(config.model, at::kFloat);
  checkpoints::load_adapter(decoder, report.result);
  const StoreEvaluation again = evaluate(decoder, data::TokenStore(folder / "held"), config.data.row_length, 1);
  EXPECT_NEAR(again.total.loss(), held["after"]["loss"].get<double>(), 1e-5);

  // Every step has its line, in order, beginning with the evaluation of the base.
  std::ifstream lines(config.output / "metrics.jsonl");
  std::string line;
  std::int64_t steps = 0;
  ASSERT_TRUE(std::getline(lines, line));
  EXPECT_EQ(parse_json(line, "metrics")["kind"], "evaluation/held");
  while (std::getline(lines, line)) {
    const Json json = parse_json(line, "metrics");
    if (json["kind"] != "train") continue;
    EXPECT_EQ(json["step"], ++steps);
  }
  EXPECT_EQ(steps, 20);
}

TEST(Finetune, TheSameRunTwiceGivesTheSameBytes) {
  const ScratchFolder folder;
  const TrainConfig one = tiny_config(folder.path(), "one"), two = tiny_config(folder.path(), "two");
  finetune(one, false, never);
  finetune(two, false, never);
  EXPECT_EQ(fingerprint(one.output), fingerprint(two.output));
}

TEST(Finetune, StoppedTwiceAndResumedEqualsTheRunThatWasNot) {
  const ScratchFolder folder;
  const TrainConfig whole = tiny_config(folder.path(), "whole"), parts = tiny_config(folder.path(), "parts");
  finetune(whole, false, never);
  // The second stop is in the middle of a step, which then is made again.
  EXPECT_TRUE(fails_with(ErrorKind::kStopped, "after step 7 of 20", [&] { finetune(parts, false, after_questions(7 * 3 + 1)); }));
  EXPECT_TRUE(fails_with(ErrorKind::kStopped, "after step 13 of 20", [&] { finetune(parts, true, after_questions(6 * 3 + 2)); }));
  EXPECT_EQ(finetune(parts, true, never).steps, 20);
  EXPECT_EQ(fingerprint(parts.output), fingerprint(whole.output));
}

TEST(Finetune, KilledTwiceAndResumedEqualsTheRunThatWasNot) {
  const ScratchFolder folder;
  const TrainConfig whole = tiny_config(folder.path(), "whole"), parts = tiny_config(folder.path(), "parts");
  finetune(whole, false, never);
  EXPECT_THROW(finetune(parts, false, dies_after_questions(7 * 3 + 2)), Interrupted);  // the last checkpoint is of step 6
  EXPECT_THROW(finetune(parts, true, dies_after_questions(8 * 3)), Interrupted);
  EXPECT_EQ(finetune(parts, true, never).steps, 20);
  EXPECT_EQ(fingerprint(parts.output), fingerprint(whole.output));
}

TEST(Finetune, ADamagedNewestCheckpointIsNamedAndTheOneBeforeLeadsToTheSameEnd) {
  const ScratchFolder folder;
  const TrainConfig whole = tiny_config(folder.path(), "whole"), parts = tiny_config(folder.path(), "parts");
  finetune(whole, false, never);
  EXPECT_THROW(finetune(parts, false, dies_after_questions(10 * 3)), Interrupted);
  std::ofstream(parts.output / "checkpoint-8/progress.json", std::ios::app) << " ";
  CapturedLog log;
  finetune(parts, true, never);
  EXPECT_NE(log.text.find("passing over checkpoint-8"), std::string::npos) << log.text;
  EXPECT_NE(log.text.find("progress.json"), std::string::npos) << log.text;
  EXPECT_NE(log.text.find("resuming from checkpoint-6"), std::string::npos) << log.text;
  EXPECT_EQ(fingerprint(parts.output), fingerprint(whole.output));
}

TEST(Finetune, AFullFineTuneStopsAndResumesToo) {
  const ScratchFolder folder;
  TrainConfig whole = tiny_config(folder.path(), "whole"), parts = tiny_config(folder.path(), "parts");
  for (TrainConfig* config : {&whole, &parts}) config->method = "full", config->schedule.learning_rate = 2e-3;
  const TrainReport report = finetune(whole, false, never);
  EXPECT_LT(report.json["evaluation"][0]["after"]["loss"].get<double>(), report.json["evaluation"][0]["before"]["loss"].get<double>());
  EXPECT_TRUE(fails_with(ErrorKind::kStopped, "after step 9", [&] { finetune(parts, false, after_questions(9 * 3 + 1)); }));
  finetune(parts, true, never);
  EXPECT_EQ(sha256_of_file(parts.output / "checkpoint-20/state.safetensors"), sha256_of_file(whole.output / "checkpoint-20/state.safetensors"));
  EXPECT_EQ(sha256_of_file(parts.output / "metrics.jsonl"), sha256_of_file(whole.output / "metrics.jsonl"));
  // The folder is a model of its own.
  const models::Decoder decoder = checkpoints::load_decoder(report.result, at::kFloat);
  const StoreEvaluation again = evaluate(decoder, data::TokenStore(folder / "held"), whole.data.row_length);
  EXPECT_NEAR(again.total.loss(), report.json["evaluation"][0]["after"]["loss"].get<double>(), 1e-4);
}

TEST(Finetune, AFinishedRunIsLeftAloneAndSaysSo) {
  const ScratchFolder folder;
  TrainConfig config = tiny_config(folder.path(), "run");
  config.limits.max_steps = 2;
  finetune(config, false, never);
  CapturedLog log;
  const TrainReport again = finetune(config, true, [] { ADD_FAILURE() << "nothing is trained"; return true; });
  EXPECT_TRUE(again.was_finished);
  EXPECT_EQ(again.steps, 2);
  EXPECT_NE(log.text.find("is finished"), std::string::npos);
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "holds a finished run", [&] { finetune(config, false, never); }));
}

TEST(Finetune, AFinishedRunIsNotTakenForAnother) {
  const ScratchFolder folder;
  TrainConfig config = tiny_config(folder.path(), "run");
  config.limits.max_steps = 2;
  finetune(config, false, never);
  const auto refuses = [&](const std::string& difference, const std::function<void(TrainConfig&)>& change) {
    TrainConfig changed = config;
    change(changed);
    EXPECT_TRUE(fails_with(ErrorKind::kUsage, difference, [&] { finetune(changed, true, never); })) << difference;
  };
  refuses("limits.max_steps: 2 then, 3 now", [](TrainConfig& changed) { changed.limits.max_steps = 3; });
  refuses("seed", [](TrainConfig& changed) { changed.seed = 77; });
  refuses("base_sha256", [](TrainConfig& changed) { changed.model = testing::golden_path("peft/llama_untied"); });
  testing::write_store(folder / "another", 61, 3);
  refuses("data.mixture[0].sha256", [&](TrainConfig& changed) { changed.data.mixture[0].store = folder / "another"; });
  config.log_every = 3;  // of display alone
  EXPECT_TRUE(finetune(config, true, never).was_finished);
  for (const fs::directory_entry& entry : fs::directory_iterator(config.output))
    if (entry.path().filename().string().starts_with("checkpoint-")) fs::remove_all(entry.path());
  EXPECT_TRUE(fails_with(ErrorKind::kData, "without its checkpoints", [&] { finetune(config, true, never); }));
}

TEST(Finetune, AFolderThatIsNotEmptyOrIsInUseIsRefused) {
  const ScratchFolder folder;
  const TrainConfig config = tiny_config(folder.path(), "run");
  fs::create_directories(config.output);
  {
    const FolderLock other(config.output);
    EXPECT_TRUE(fails_with(ErrorKind::kUsage, "another process is using this folder", [&] { finetune(config, false, never); }));
  }
  std::ofstream(config.output / "notes.txt") << "mine";
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "--resume", [&] { finetune(config, false, never); }));
}

TEST(Finetune, AResumeWithOtherSettingsOrDataIsRefusedWithTheDifference) {
  const ScratchFolder folder;
  const TrainConfig config = tiny_config(folder.path(), "run");
  EXPECT_TRUE(fails_with(ErrorKind::kStopped, "", [&] { finetune(config, false, after_questions(7)); }));
  TrainConfig changed = config;
  changed.schedule.learning_rate = 3e-2;
  changed.lora.rank = 2;
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "schedule.learning_rate: 0.01 then, 0.03 now", [&] { finetune(changed, true, never); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "lora.rank: 4 then, 2 now", [&] { finetune(changed, true, never); }));
  changed = config;
  testing::write_store(folder / "another", 61, 3);
  changed.data.mixture[0].store = folder / "another";
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "data.mixture[0].sha256", [&] { finetune(changed, true, never); }));
  changed = config;
  changed.model = testing::golden_path("peft/llama_untied");
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "base_sha256", [&] { finetune(changed, true, never); }));
  // What only concerns display and retention may change, and the same data may lie elsewhere.
  changed = config;
  changed.log_every = 3;
  changed.checkpoint.every = 5;
  fs::rename(folder / "text", folder / "moved");
  changed.data.mixture[0].store = folder / "moved";
  EXPECT_EQ(finetune(changed, true, never).steps, 20);
}

TEST(Finetune, AnotherThreadCountIsAWarning) {
  const ScratchFolder folder;
  TrainConfig config = tiny_config(folder.path(), "run");
  EXPECT_TRUE(fails_with(ErrorKind::kStopped, "", [&] { finetune(config, false, after_questions(7)); }));
  config.threads = 1;
  CapturedLog log;
  finetune(config, true, never);
  EXPECT_NE(log.text.find("threads: 2 then, 1 now"), std::string::npos) << log.text;
}

TEST(Finetune, StopsEarlyWithoutImprovementAndKeepsTheBest) {
  const ScratchFolder folder;
  TrainConfig config = tiny_config(folder.path(), "run");
  config.limits.patience = 2;
  config.evaluation.every = 2;
  config.checkpoint.keep = 1;
  // The second store decides, though it is not the first.
  testing::write_store(folder / "other", 12, 7);
  config.evaluation.stores.push_back({.name = "other", .store = folder / "other"});
  config.evaluation.choose_best_by = "other";
  const auto best_of = [&](const TrainReport& report) {
    std::map<double, std::int64_t> steps;  // by loss
    std::ifstream lines(config.output / "metrics.jsonl");
    for (std::string line; std::getline(lines, line);)
      if (const Json json = parse_json(line, "metrics"); json["kind"] == "evaluation/other" && json["step"] > 0) steps[json["loss"].get<double>()] = json["step"].get<std::int64_t>();
    const std::string chosen = "checkpoint-" + std::to_string(report.chosen_step);
    EXPECT_EQ(sha256_of_file(report.result / "adapter_model.safetensors"), sha256_of_file(config.output / chosen / "adapter/adapter_model.safetensors"));
    EXPECT_EQ(report.json["evaluation"][1]["after"]["loss"].get<double>(), steps.begin()->first);
    EXPECT_FALSE(report.json["evaluation"][0]["chosen_by"].get<bool>());
    EXPECT_TRUE(report.json["evaluation"][1]["chosen_by"].get<bool>());
    return steps.begin()->second;
  };

  // A learning rate at which the loss rises again: patience runs out, and an earlier step than the last is the best.
  config.schedule = {.shape = "constant", .learning_rate = 0.3, .warmup_steps = 0};
  config.limits.max_steps = 60;
  const TrainReport rising = finetune(config, false, never);
  EXPECT_EQ(rising.json["ended"], "early stop");
  EXPECT_EQ(rising.chosen_step, best_of(rising));
  EXPECT_EQ(rising.steps, rising.chosen_step + 4);
  EXPECT_FALSE(fs::exists(config.output / ("checkpoint-" + std::to_string(rising.steps - 2))));

  // Falls below min_delta do not buy patience, yet the lowest loss is still the best.
  config.schedule = {.shape = "constant", .learning_rate = 1e-3, .warmup_steps = 0};
  config.output = folder / "slow";
  config.limits.min_delta = 50;
  const TrainReport slow = finetune(config, false, never);
  EXPECT_EQ(slow.json["ended"], "early stop");
  EXPECT_EQ(slow.steps, 6);
  EXPECT_EQ(slow.chosen_step, best_of(slow));
  EXPECT_EQ(slow.chosen_step, 6);
}

TEST(Finetune, EndsByTokensOrEpochs) {
  const ScratchFolder folder;
  TrainConfig config = tiny_config(folder.path(), "tokens");
  config.limits = {.max_tokens = 600};
  const TrainReport tokens = finetune(config, false, never);
  EXPECT_GE(tokens.json["tokens"].get<std::int64_t>(), 480);
  EXPECT_LE(tokens.json["tokens"].get<std::int64_t>(), 600 + 4 * 32);
  config.output = folder / "epochs";
  config.limits = {.max_epochs = 1};
  const TrainReport epochs = finetune(config, false, never);
  const auto stored = static_cast<double>(data::TokenStore(folder / "text").totals().tokens);
  EXPECT_NEAR(epochs.json["tokens"].get<double>(), stored, 0.15 * stored);
}

TEST(Finetune, ContradictionsAreListedAtOnce) {
  const ScratchFolder folder;
  TrainConfig config = tiny_config(folder.path(), "run");
  config.limits = {.patience = 2};
  config.evaluation.every = 0;
  config.evaluation.choose_best_by = "helt";
  for (const char* words : {"would never end", "an early stop needs", "did you mean \"held\"?"})
    EXPECT_TRUE(fails_with(ErrorKind::kUsage, words, [&] { finetune(config, false, never); }));
  EXPECT_FALSE(fs::exists(config.output));
}

TEST(Finetune, QuantisedWeightsAreNotTrainedThemselves) {
  const ScratchFolder folder;
  TrainConfig config = tiny_config(folder.path(), "run");
  config.method = "full";
  config.quantize_base = "nf4";
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "quantize_base: a full fine-tune trains the weights themselves", [&] { finetune(config, false, never); }));
  EXPECT_FALSE(fs::exists(config.output));
  config.quantize_base = "none";
  config.model = testing::golden_path("bitsandbytes/nf4");
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "is quantised (nf4) and cannot be trained itself", [&] { finetune(config, false, never); }));
  config.method = "lora";
  config.quantize_base = "int8";
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "is quantised already, as nf4", [&] { finetune(config, true, never); }));
}

TEST(Finetune, AStoreOfALargerVocabularyIsRefused) {
  const ScratchFolder folder;
  TrainConfig config = tiny_config(folder.path(), "run");
  testing::write_store(folder / "wide", 10, 4, 50);
  config.data.mixture[0].store = folder / "wide";
  EXPECT_TRUE(fails_with(ErrorKind::kData, "has 50 tokens, the model only 48", [&] { finetune(config, false, never); }));
}

TEST(Finetune, OptimizerSettingsThatContradictAreListedBeforeAnythingIsRead) {
  const ScratchFolder folder;
  const auto refused = [&](const std::string& words, const std::function<void(TrainConfig&)>& set) {
    TrainConfig config = tiny_config(folder.path(), "run");
    set(config);
    EXPECT_TRUE(fails_with(ErrorKind::kUsage, words, [&] { finetune(config, false, never); }));
    EXPECT_FALSE(fs::exists(config.output));
  };
  refused("muon needs method: full", [](TrainConfig& config) { config.optimizer.kind = "muon"; });
  refused("lora_plus_ratio: is about adapters", [](TrainConfig& config) { config.method = "full", config.optimizer.lora_plus_ratio = 4; });
  refused("adafactor does not read beta1", [](TrainConfig& config) { config.optimizer.kind = "adafactor", config.optimizer.beta2 = 0.95; });
  refused("only kind: adafactor reads it", [](TrainConfig& config) { config.optimizer.adafactor_scale_parameter = true; });
  refused("only kind: muon reads", [](TrainConfig& config) { config.optimizer.muon_rate = "original"; });
}

TEST(Finetune, DivergenceEndsTheRunAndNamesTheSamples) {
  const ScratchFolder folder;
  TrainConfig config = tiny_config(folder.path(), "run");
  config.schedule = {.shape = "constant", .learning_rate = 1, .warmup_steps = 0};
  config.lora.alpha = 1e30;  // logits overflow as soon as B has moved
  config.optimizer.max_grad_norm = 0;
  config.evaluation = {};
  EXPECT_TRUE(fails_with(ErrorKind::kNumerics, "steps in a row", [&] { finetune(config, false, never); }));
  EXPECT_FALSE(fs::exists(config.output / "report.json"));
}

}  // namespace
}  // namespace alambic::train
