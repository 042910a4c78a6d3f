// SPDX-License-Identifier: Apache-2.0
#include "distill/distill.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/nonzero.h>
#include <gtest/gtest.h>

#include <fstream>

#include "checkpoints/hf_folder.h"
#include "checkpoints/peft_folder.h"
#include "core/files.h"
#include "distill/imitation.h"
#include "distill/write_cache.h"
#include "lora/initialise.h"
#include "models/fused_blocks.h"
#include "tests/closeness.h"
#include "tests/support.h"
#include "tests/distill/tiny_run.h"
#include "train/memory.h"
#include "train/run_folder.h"

namespace alambic::distill {
namespace {

namespace fs = std::filesystem;
using testing::fails_with;
using testing::Golden;
using testing::is_close;
using testing::is_close_to_scale;
using testing::number;
using testing::other_model;
using testing::ScratchFolder;
using testing::steps_of;

const auto never = [] { return false; };
/// The loop asks before each step and after each micro-batch, so three a step.
auto after_questions(int at) {
  return [at, asked = 0]() mutable { return ++asked >= at; };
}

DistillConfig tiny_config(const fs::path& folder, const std::string& run, const fs::path& teacher) {
  DistillConfig config = testing::tiny_config(folder, run, teacher);
  config.distill.divergence.temperature = 2;
  return config;
}

TEST(Distill, AStepIsTransformersStep) {  // tests/oracle/distill_step_oracle.py
  const Golden peft("distill_step.safetensors");
  SCOPED_TRACE(peft.provenance());
  const auto decoder_of = [&](const std::string& name) {
    models::Decoder decoder = models::make_decoder(models::read_model_config(parse_json(peft.metadata().at(name + ".config"), "config.json"), "config.json"));
    for (const models::NamedTensor& named : decoder.tensors()) *named.tensor = peft[name + "." + named.name].clone();
    if (decoder.head_tied) decoder.head.weight_OI = decoder.embedding_VD;
    return decoder;
  };
  models::Decoder student = decoder_of("student"), teacher = decoder_of("teacher");
  lora::attach(student, {.rank = 4, .alpha = 8}, 0);
  std::vector<models::NamedTensor> trained = lora::trainable(student);
  ASSERT_EQ(trained.size(), 28u);
  {
    const at::NoGradGuard no_grad;
    for (const models::NamedTensor& named : trained) named.tensor->copy_(peft["adapter." + named.name]);
  }
  const at::Tensor ids = peft["ids"], keep = peft["keep"];
  const std::int64_t rows = ids.size(0), length = ids.size(1);
  data::Batch batch{.tokens_T = ids.flatten(), .positions_T = at::arange(length).repeat({rows}), .targets_T = ids.roll({-1}, {1}).flatten().contiguous(), .keep_T = keep.flatten().contiguous(),
                    .document_lengths = std::vector<std::int64_t>(static_cast<std::size_t>(rows), length), .origins = std::vector<data::Origin>(static_cast<std::size_t>(rows))};
  const Mix mix{.cross_entropy = 0.3, .divergence = 0.7, .text = {}, .imitation = {.objective = "forward_kl", .temperature = 2}, .shared_vocabulary = student.config.vocabulary_size};
  for (const bool fused : {false, true}) {
    SCOPED_TRACE(fused);
    if (fused) {
      ASSERT_EQ(models::use_fused_blocks(student), "");
      ASSERT_EQ(models::use_fused_blocks(teacher), "");
    }
    at::Tensor teacher_KD;
    {
      const at::NoGradGuard constant;
      teacher_KD = teacher.hidden_TD(train::input_of(batch, 0)).index_select(0, batch.keep_T.nonzero().squeeze(1));
    }
    const std::vector<TeacherRows> teachers = {{.head = &teacher.head, .hidden_KD = teacher_KD}};
    Nats nats;
    const at::Tensor loss = imitation_sum(student.hidden_TD(train::input_of(batch, 0)), student.head, batch.targets_T, batch.keep_T, 0, mix, teachers, nats);
    for (const models::NamedTensor& named : trained) named.tensor->mutable_grad() = at::Tensor();
    loss.backward();
    EXPECT_TRUE(is_close(loss, peft["loss"], {.relative = 2e-6}));
    EXPECT_NEAR(nats.cross_entropy, peft["text"].item<double>(), 2e-6 * nats.cross_entropy);
    EXPECT_NEAR(nats.divergence, peft["imitation"].item<double>(), 2e-6 * nats.divergence);
    for (const models::NamedTensor& named : trained) EXPECT_TRUE(is_close_to_scale(named.tensor->grad(), peft["gradient." + named.name], 1e-5)) << named.name;
  }
}

TEST(Distill, LearnsFromATeacherAndTellsBothPartsOfTheLoss) {
  const ScratchFolder folder;
  DistillConfig config = tiny_config(folder.path(), "run", other_model());
  config.distill.alpha = 0.75;
  const train::TrainReport report = distill(config, false, never);
  const std::vector<Json> steps = steps_of(config.train.output);
  ASSERT_EQ(steps.size(), 20u);
  for (const Json& step : steps) EXPECT_NEAR(number(step, "loss"), 0.25 * number(step, "cross_entropy") + 0.75 * number(step, "divergence"), 1e-9);
  EXPECT_LT(number(steps.back(), "divergence"), 0.8 * number(steps.front(), "divergence"));
  EXPECT_EQ(report.json["config"]["distill"]["alpha"], 0.75);
  EXPECT_EQ(read_json_file(config.train.output / "config.json")["distill"]["teachers"][0]["model"], other_model().string());
  EXPECT_EQ(report.json["teachers"][0]["sha256"], checkpoints::base_hash(other_model()));
}

TEST(Distill, StoppedTwiceAndResumedEqualsTheRunThatWasNot) {
  const ScratchFolder folder;
  // One teacher of its own, one that is the student's base.
  const auto config_of = [&](const std::string& run) {
    DistillConfig config = tiny_config(folder.path(), run, other_model());
    config.distill.teachers.push_back({.model = config.train.model});
    return config;
  };
  const DistillConfig whole = config_of("whole"), parts = config_of("parts");
  distill(whole, false, never);
  EXPECT_TRUE(fails_with(ErrorKind::kStopped, "alambic distill", [&] { distill(parts, false, after_questions(7 * 3 + 1)); }));
  EXPECT_TRUE(fails_with(ErrorKind::kStopped, "after step 13 of 20", [&] { distill(parts, true, after_questions(6 * 3 + 2)); }));  // in the middle of a step
  EXPECT_EQ(distill(parts, true, never).steps, 20);
  for (const char* name : {"metrics.jsonl", "adapter/adapter_model.safetensors", "checkpoint-20/state.safetensors", "checkpoint-20/progress.json"})
    EXPECT_EQ(sha256_of_file(parts.train.output / name), sha256_of_file(whole.train.output / name)) << name;
}

TEST(Distill, WithoutAnyOfTheTeacherIsTrainBitForBit) {
  const ScratchFolder folder;
  DistillConfig config = tiny_config(folder.path(), "distilled", other_model());
  config.distill.alpha = 0;
  distill(config, false, never);
  const train::TrainConfig trained = testing::tiny_config(folder.path(), "trained");
  train::finetune(trained, false, never);
  EXPECT_EQ(sha256_of_file(config.train.output / "checkpoint-20/state.safetensors"), sha256_of_file(trained.output / "checkpoint-20/state.safetensors"));
  const std::vector<Json> ours = steps_of(config.train.output), trains = steps_of(trained.output);
  ASSERT_EQ(ours.size(), trains.size());
  for (std::size_t i = 0; i < ours.size(); ++i) {
    EXPECT_EQ(ours[i]["loss"], trains[i]["loss"]);
    EXPECT_EQ(ours[i]["cross_entropy"], trains[i]["loss"]);
    EXPECT_EQ(ours[i]["divergence"], 0);
  }
}

TEST(Distill, AStudentThatBeginsAsItsTeacherBeginsAtZero) {
  const ScratchFolder folder;
  DistillConfig config = tiny_config(folder.path(), "run", testing::golden_path("peft/llama_tied"));
  config.train.limits.max_steps = 3;
  for (const std::string& objective : objective_names()) {
    config.train.output = folder / objective;
    config.distill.divergence.objective = objective;
    distill(config, false, never);
    const std::vector<Json> steps = steps_of(config.train.output);
    EXPECT_EQ(number(steps[0], "divergence"), 0) << objective;
    EXPECT_GT(number(steps[2], "divergence"), 0) << objective;  // the text has moved the student, and not the teacher
  }
}

data::Batch first_batch(const train::TrainConfig& config) { return data::BatchStream(train::stream_config(config), testing::kTinyVocabulary).next_step().front(); }

at::Tensor hidden_of(const models::Decoder& decoder, const data::Batch& batch) {
  const at::NoGradGuard constant;
  return decoder.hidden_TD(train::input_of(batch, 0));
}

// Trains what the config says by a few steps of nothing but size, then asks the base.
TEST(Distill, TheStudentsBaseTeachesWhateverTheStudentHasLearnt) {
  const ScratchFolder folder;
  const std::vector<std::pair<std::string, std::function<void(train::TrainConfig&)>>> cases = {
      {"lora", [](train::TrainConfig&) {}},
      {"dora", [](train::TrainConfig& config) { config.lora.dora = true; }},
      {"rows", [](train::TrainConfig& config) { config.lora.trainable_tokens = {"5", "7..9"}; }},
      {"saved", [](train::TrainConfig& config) { config.lora.modules_to_save = {"embed_tokens", "lm_head", "norm"}; }},
      {"head", [](train::TrainConfig& config) { config.lora.targets = {"q_proj", "down_proj", "lm_head"}; }},
      {"int8", [](train::TrainConfig& config) { config.quantize_base = "int8"; }},
      {"pissa", [](train::TrainConfig& config) { config.lora.init = "pissa"; }},
  };
  for (const auto& [name, change] : cases)
    for (const bool fused : {false, true}) {
      SCOPED_TRACE(name + (fused ? ", fused" : ""));
      train::TrainConfig config = testing::tiny_config(folder.path(), name);
      change(config);
      const data::Batch batch = first_batch(config);
      models::Decoder plain = checkpoints::load_decoder(config.model, at::kFloat, train::quantization_of(config)), student = checkpoints::load_decoder(config.model, at::kFloat, train::quantization_of(config));
      const models::Decoder outside = outside_of_linears(student);
      train::make_trainable(student, config);
      if (fused && name != "dora") {
        ASSERT_EQ(models::use_fused_blocks(student), "");
        ASSERT_EQ(models::use_fused_blocks(plain), "");
      }
      lora::initialise(student, config.lora, 3);
      {
        const at::NoGradGuard no_grad;
        for (const models::NamedTensor& tensor : lora::trainable(student)) tensor.tensor->add_(0.05);
      }
      const at::Tensor before_TD = hidden_of(student, batch), expected_TD = hidden_of(plain, batch);
      EXPECT_FALSE(is_close(before_TD, expected_TD, {.absolute = 1e-3}));
      const std::optional<models::Decoder> base = base_of(student, outside);
      ASSERT_TRUE(base);
      EXPECT_TRUE(is_close(hidden_of(*base, batch), expected_TD, {.absolute = name == "pissa" ? 1e-5 : 0}));
      EXPECT_TRUE(base->head.weight_OI.equal(plain.head.weight_OI));
      EXPECT_FALSE(base->head.adapter || base->head.token_rows_ND.defined());
      EXPECT_TRUE(hidden_of(student, batch).equal(before_TD));  // the student is as it was
      models::Decoder shared = *base;
      const std::vector<models::NamedLinear> theirs = shared.linears(), own = student.linears();
      for (std::size_t i = 0; i < own.size(); ++i) {  // and nothing is there twice
        if (own[i].layer < 0 || !own[i].linear->weight_OI.defined()) continue;
        EXPECT_EQ(own[i].linear->weight_OI.const_data_ptr(), theirs[i].linear->weight_OI.const_data_ptr()) << own[i].path;
      }
    }
  train::TrainConfig config = testing::tiny_config(folder.path(), "trains-a-linear");
  config.lora.targets = {"q_proj"};
  config.lora.modules_to_save = {"model.layers.0.mlp.down_proj"};
  models::Decoder student = checkpoints::load_decoder(config.model, at::kFloat);
  const models::Decoder outside = outside_of_linears(student);
  train::make_trainable(student, config);
  EXPECT_FALSE(base_of(student, outside));
}

TEST(Distill, TeachersOfPartsOfTheTextComeToTheTeacherOfAll) {
  const ScratchFolder folder;
  const auto first_step = [&](const std::string& run, std::vector<TeacherConfig> teachers) {
    DistillConfig config = tiny_config(folder.path(), run, other_model());
    for (TeacherConfig& teacher : teachers) teacher.model = other_model();
    config.distill.teachers = teachers;
    config.train.limits.max_steps = 1;
    config.train.data.batches_per_step = 12;  // enough to draw documents of both sources
    distill(config, false, never);
    return number(steps_of(config.train.output).front(), "divergence");
  };
  const TeacherConfig all{}, counted{.sources = {"counted"}}, maltese{.languages = {"mt"}},
      heavy{.weight = 3};
  const double whole = first_step("all", {all}), one = first_step("counted", {counted}), other = first_step("maltese", {maltese});
  EXPECT_GT(one, 0);
  EXPECT_GT(other, 0);
  EXPECT_NEAR(one + other, whole, 1e-6 * whole);
  EXPECT_NEAR(first_step("both", {counted, maltese}), whole, 1e-6 * whole);
  EXPECT_NEAR(first_step("twice", {all, heavy}), whole, 1e-6 * whole);            // weights are relative
  EXPECT_NEAR(first_step("overlap", {heavy, counted}), whole, 1e-6 * whole);      // also where only some of the text has both
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "no store that is learnt from has \"counter\"; did you mean \"counted\"?", [&] { first_step("wrong", {{.sources = {"counter"}}}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "teach nothing", [&] { first_step("none", {{.sources = {"counted"}, .languages = {"mt"}}}); }));
}

TEST(Distill, AnAdapterTeachesOnTheBaseThatItShares) {
  const ScratchFolder folder;
  const train::TrainConfig config = testing::tiny_config(folder.path(), "run");
  const data::Batch batch = first_batch(config);
  const at::Tensor index_K = batch.keep_T.nonzero().squeeze(1);
  train::Inputs inputs = train::open_inputs(config);
  models::Decoder expected = checkpoints::load_decoder(config.model, at::kFloat), student = checkpoints::load_decoder(config.model, at::kFloat);
  checkpoints::load_adapter(expected, testing::golden_path("peft/llama_tied.lora"));
  Teacher teacher({.model = config.model, .adapter = testing::golden_path("peft/llama_tied.lora")}, {}, config, inputs);
  const models::Decoder outside = outside_of_linears(student);
  train::make_trainable(student, config);
  ASSERT_EQ(models::use_fused_blocks(student), "");
  teacher.load(student, outside);
  lora::initialise(student, config.lora, 3);
  EXPECT_TRUE(teacher.shares_the_base());
  EXPECT_EQ(teacher.num_bytes(), 0u);
  EXPECT_TRUE(teacher.rows(batch, index_K, {}).hidden_KD.equal(hidden_of(expected, batch).index_select(0, index_K)));
  hidden_of(student, batch);  // its adapters go into the memory behind the shared weights
  EXPECT_TRUE(teacher.rows(batch, index_K, {}).hidden_KD.equal(hidden_of(expected, batch).index_select(0, index_K)));
}

// A cache of all 48 tokens of a tiny vocabulary holds the whole distribution, but for what 32-bit entries round off.
TEST(Distill, ACachedTeacherTeachesAsTheLiveOneDoes) {
  const ScratchFolder folder;
  DistillConfig live = tiny_config(folder.path(), "live", other_model()), cached = tiny_config(folder.path(), "cached", "");
  const CacheConfig cache{.model = other_model(), .output = folder.path() / "cache", .stores = {{.store = live.train.data.mixture.at(0).store}}, .kind = "top_k", .k = 48, .temperature = 2,
                          .row_length = live.train.data.row_length, .split_long = live.train.data.split_long, .compute_type = "f32", .tokenizer = live.train.model};
  EXPECT_TRUE(write_cache(cache, never).complete);
  cached.distill.teachers = {{.model = {}, .cache = cache.output}};
  const train::TrainReport of_live = distill(live, false, never), of_cache = distill(cached, false, never);
  const std::vector<Json> with_teacher = steps_of(live.train.output), without = steps_of(cached.train.output);
  ASSERT_EQ(with_teacher.size(), without.size());
  for (std::size_t i = 0; i < without.size(); ++i) {
    for (const char* part : {"cross_entropy", "divergence"}) EXPECT_NEAR(number(without[i], part), number(with_teacher[i], part), 1e-4 * number(with_teacher[i], part)) << part;
  }
  EXPECT_EQ(of_cache.json["teachers"][0]["sha256"], of_live.json["teachers"][0]["sha256"]);

  const auto refused = [&](ErrorKind kind, const char* why, const std::function<void(DistillConfig&)>& change) {
    DistillConfig wrong = cached;
    wrong.train.output = folder.path() / "refused";
    change(wrong);
    EXPECT_TRUE(fails_with(kind, why, [&] { distill(wrong, false, never); }));
  };
  refused(ErrorKind::kUsage, "whole distribution", [](DistillConfig& wrong) { wrong.distill.divergence.objective = "reverse_kl"; });
  refused(ErrorKind::kUsage, "temperature", [](DistillConfig& wrong) { wrong.distill.divergence.temperature = 1; });
  refused(ErrorKind::kUsage, "row_length", [](DistillConfig& wrong) { wrong.train.data.row_length /= 2; });
  refused(ErrorKind::kData, "teacher", [](DistillConfig& wrong) { wrong.distill.teachers[0].model = wrong.train.model; });
  refused(ErrorKind::kUsage, "knows nothing of what the student will write", [](DistillConfig& wrong) { wrong.distill.on_policy.lambda = 0.5; });
  refused(ErrorKind::kUsage, "neither a model nor a cache", [](DistillConfig& wrong) { wrong.distill.teachers[0].cache.clear(); });
}

TEST(Distill, AnotherTeacherIsAnotherRun) {
  const ScratchFolder folder;
  DistillConfig config = tiny_config(folder.path(), "run", other_model());
  config.train.limits.max_steps = 2;
  distill(config, false, never);
  EXPECT_TRUE(distill(config, true, never).was_finished);
  DistillConfig changed = config;
  changed.distill.teachers[0].model = testing::golden_path("peft/qwen2");
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "teachers[0].sha256", [&] { distill(changed, true, never); }));
  changed = config;
  changed.distill.divergence.objective = "reverse_kl";
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "distill.objective", [&] { distill(changed, true, never); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "", [&] { train::finetune(config.train, true, never); }));
}

TEST(Distill, ThePlanTellsOfTeachersAndTheirTermsReachTheStudent) {
  const ScratchFolder folder;
  const fs::path gemma = folder / "gemma";
  fs::copy(other_model(), gemma);
  std::ofstream(gemma / "README.md") << "---\nlicense: gemma\n---\n";
  const DistillConfig own = tiny_config(folder.path(), "own", testing::golden_path("peft/llama_tied")), restricted = tiny_config(folder.path(), "restricted", gemma);
  const Json plan_own = plan(own, true), plan_restricted = plan(restricted, false);
  EXPECT_EQ(plan_own["memory"]["teachers"], 0);
  EXPECT_GT(number(plan_own["time"], "tokens_per_second"), 0);
  EXPECT_GT(number(plan_restricted["memory"], "teachers"), 1000);
  EXPECT_NEAR(number(plan_restricted["memory"], "total") - number(plan_restricted["memory"], "teachers"), number(plan_own["memory"], "total"), 1);
  EXPECT_EQ(plan_restricted["teachers"][0]["licence"], "LicenseRef-gemma");
  EXPECT_EQ(plan_own["licence"]["verdict"], "unknown");
  EXPECT_EQ(plan_restricted["licence"]["verdict"], "restricted");
}

// tokenizer.json of `size` words, of which the word `strange` is another one.
void write_tokenizer(const fs::path& folder, int size, int strange = -1) {
  Json words = {{"<unk>", 0}};
  for (int i = 1; i < size; ++i) words[(i == strange ? "strange" : "w") + std::to_string(i)] = i;
  const Json model = {{"type", "WordLevel"}, {"vocab", words}, {"unk_token", "<unk>"}};
  const Json tokenizer = {{"version", "1.0"}, {"truncation", nullptr}, {"padding", nullptr}, {"added_tokens", Json::array()}, {"normalizer", nullptr},
                          {"pre_tokenizer", {{"type", "WhitespaceSplit"}}}, {"post_processor", nullptr}, {"decoder", nullptr}, {"model", model}};
  write_file(folder / "tokenizer.json", to_line(tokenizer));
}

TEST(Distill, TokensThatDoNotMeanTheSameAreRefusedAndPaddingIsNot) {
  const ScratchFolder folder;
  const fs::path one = folder / "one", other = folder / "other";
  fs::create_directories(one), fs::create_directories(other);
  models::ModelConfig small = models::read_model_config(other_model()), large = small;
  large.vocabulary_size = 64;
  std::vector<std::string> warnings;
  const auto shared = [&] { return shared_vocabulary(one, small, other, large, warnings); };
  EXPECT_EQ(shared(), 48);
  EXPECT_EQ(warnings.size(), 1u);  // no tokenizer
  write_tokenizer(one, 45), write_tokenizer(other, 45);
  EXPECT_EQ(shared(), 45);  // what no token has is padding of both
  EXPECT_EQ(warnings.size(), 1u);
  write_tokenizer(other, 60);  // the teacher knows more, and the student's are a part of it
  EXPECT_EQ(shared(), 45);
  EXPECT_EQ(warnings.size(), 2u);
  write_tokenizer(other, 45, 33);
  EXPECT_TRUE(fails_with(ErrorKind::kData, "id 33 is \"w33\" of the student", shared));
}

TEST(Distill, ContradictionsAreRefused) {
  const ScratchFolder folder;
  DistillConfig config = tiny_config(folder.path(), "run", other_model());
  config.distill.teachers.clear();
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "distill.teachers", [&] { distill(config, false, never); }));
  config = tiny_config(folder.path(), "run", folder / "nowhere");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "nowhere", [&] { distill(config, false, never); }));
}

}  // namespace
}  // namespace alambic::distill
