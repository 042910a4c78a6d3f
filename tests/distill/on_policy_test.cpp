// SPDX-License-Identifier: Apache-2.0
#include "distill/on_policy.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>

#include "checkpoints/hf_folder.h"
#include "core/files.h"
#include "core/random.h"
#include "distill/distill.h"
#include "distill/imitation.h"
#include "lora/initialise.h"
#include "models/fused_blocks.h"
#include "models/generate.h"
#include "tests/closeness.h"
#include "tests/support.h"
#include "tests/distill/tiny_run.h"
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
const auto everyone = [](const data::Origin&) { return true; };

DistillConfig tiny_config(const fs::path& folder, const std::string& run, const fs::path& teacher) {
  DistillConfig config = testing::tiny_config(folder, run, teacher);
  config.distill.alpha = 0.75;
  config.distill.on_policy = {.lambda = 1, .max_new_tokens = 6, .prompt_tokens = 4};
  return config;
}

std::vector<std::int64_t> ids_of(const at::Tensor& tensor) {
  const at::Tensor flat = tensor.contiguous();
  return {flat.const_data_ptr<std::int64_t>(), flat.const_data_ptr<std::int64_t>() + flat.numel()};
}

models::Decoder decoder_of(const Golden& golden, const std::string& name) {
  models::Decoder decoder = models::make_decoder(models::read_model_config(parse_json(golden.metadata().at(name + ".config"), "config.json"), "config.json"));
  for (const models::NamedTensor& named : decoder.tensors()) *named.tensor = golden[name + "." + named.name].clone();
  if (decoder.head_tied) decoder.head.weight_OI = decoder.embedding_VD;
  return decoder;
}

// Documents of the lengths, trained from the targets `first` on; ids count up.
data::Batch corpus_of(const std::vector<std::int64_t>& ids, const std::vector<std::int64_t>& lengths, const std::vector<std::int64_t>& first) {
  const auto T = static_cast<std::int64_t>(ids.size());
  data::Batch batch{.tokens_T = at::zeros({T}, at::kLong), .positions_T = at::zeros({T}, at::kLong), .targets_T = at::zeros({T}, at::kLong), .keep_T = at::zeros({T}, at::kBool), .document_lengths = lengths, .origins = {}};
  std::int64_t begin = 0;
  for (std::size_t i = 0; i < lengths.size(); begin += lengths[i], ++i) {
    batch.origins.push_back({.document = i});
    for (std::int64_t t = 0; t < lengths[i]; ++t) {
      batch.tokens_T[begin + t] = ids[static_cast<std::size_t>(begin + t)], batch.positions_T[begin + t] = t;
      if (t + 1 < lengths[i]) batch.targets_T[begin + t] = ids[static_cast<std::size_t>(begin + t + 1)];
      const bool kept = first[i] >= 0 && t >= first[i] && t + 1 < lengths[i];
      batch.keep_T[begin + t] = kept;
      batch.num_kept += kept;
    }
  }
  return batch;
}

TEST(OnPolicy, AStepIsTheOneOfTransformersAndTrl) {  // tests/oracle/on_policy_oracle.py
  const Golden models("distill_step.safetensors"), golden("on_policy.safetensors");
  SCOPED_TRACE(golden.provenance());
  models::Decoder student = decoder_of(models, "student"), teacher = decoder_of(models, "teacher");
  lora::attach(student, {.rank = 4, .alpha = 8}, 0);
  const std::vector<models::NamedTensor> trained = lora::trainable(student);
  {
    const at::NoGradGuard no_grad;
    for (const models::NamedTensor& named : trained) named.tensor->copy_(models["adapter." + named.name]);
  }
  student.config.eos_ids = ids_of(golden["stop"]);
  // The corpus: each prompt, and behind it two tokens that are learnt, of which nothing must be seen.
  const std::vector<std::int64_t> prompts = ids_of(golden["prompts"]), prompt_lengths = ids_of(golden["prompt_lengths"]);
  std::vector<std::int64_t> ids, lengths, first;
  for (std::size_t i = 0, begin = 0; i < prompt_lengths.size(); begin += static_cast<std::size_t>(prompt_lengths[i]), ++i) {
    ids.insert(ids.end(), prompts.begin() + static_cast<std::ptrdiff_t>(begin), prompts.begin() + static_cast<std::ptrdiff_t>(begin) + prompt_lengths[i]);
    ids.push_back(33), ids.push_back(34);
    lengths.push_back(prompt_lengths[i] + 2), first.push_back(prompt_lengths[i] - 1);
  }
  const OnPolicyConfig config{.lambda = 1, .max_new_tokens = 12, .temperature = 0, .prompt_tokens = 1};
  for (const bool fused : {false, true}) {
    SCOPED_TRACE(fused);
    if (fused) {
      ASSERT_EQ(models::use_fused_blocks(student), "");
      ASSERT_EQ(models::use_fused_blocks(teacher), "");
    }
    const std::optional<data::Batch> batch = on_policy_batch(config, student, corpus_of(ids, lengths, first), 1, 64, 1000, everyone);
    ASSERT_TRUE(batch);
    EXPECT_EQ(ids_of(batch->tokens_T), ids_of(golden["ids"]));
    EXPECT_EQ(batch->document_lengths, ids_of(golden["lengths"]));
    at::Tensor teacher_KD;
    {
      const at::NoGradGuard constant;
      teacher_KD = teacher.hidden_TD(train::input_of(*batch, 0)).index_select(0, batch->keep_T.nonzero().squeeze(1));
    }
    const std::vector<TeacherRows> teachers = {{.head = &teacher.head, .hidden_KD = teacher_KD}};
    for (const auto& [name, objective, beta] : {std::tuple{"jensen_shannon", "jensen_shannon", 0.5}, std::tuple{"skewed", "jensen_shannon", 0.1}, std::tuple{"reverse_kl", "reverse_kl", 0.5}}) {
      SCOPED_TRACE(name);
      const Mix mix = on_policy_mix({.cross_entropy = 0.4, .divergence = 1, .text = {}, .imitation = {.objective = objective, .temperature = 2, .beta = beta}, .shared_vocabulary = student.config.vocabulary_size});
      Nats nats;
      const at::Tensor loss = imitation_sum(student.hidden_TD(train::input_of(*batch, 0)), student.head, batch->targets_T, batch->keep_T, 0, mix, teachers, nats);
      for (const models::NamedTensor& named : trained) named.tensor->mutable_grad() = at::Tensor();
      loss.backward();
      EXPECT_TRUE(is_close(loss, golden[std::string(name) + ".loss"], {.relative = 2e-6}));
      for (const models::NamedTensor& named : trained)
        EXPECT_TRUE(is_close_to_scale(named.tensor->grad(), golden[std::string(name) + ".gradient." + named.name], 1e-5)) << named.name;
    }
  }
}

TEST(OnPolicy, APromptEndsWhereLearningBeginsAndOnlyWhatTheStudentWroteIsKept) {
  const models::Decoder student = checkpoints::load_decoder(testing::golden_path("peft/llama_tied"), at::kFloat);
  // A prompt of 3 tokens; none, so its first 4; none of few tokens; nothing learnt; a prompt of 2.
  const std::vector<std::int64_t> lengths = {6, 9, 3, 5, 4}, first = {2, 0, 0, -1, 1}, prompts = {3, 4, 2, 0, 2};
  std::vector<std::int64_t> ids;
  for (std::int64_t i = 0; i < 27; ++i) ids.push_back(3 + i);
  const data::Batch corpus = corpus_of(ids, lengths, first);
  const OnPolicyConfig config{.lambda = 1, .max_new_tokens = 7, .temperature = 1.2, .prompt_tokens = 4};
  const auto batch_of = [&](std::uint64_t seed, std::int64_t row_length, std::int64_t max_tokens, const std::function<bool(const data::Origin&)>& is_taught) {
    return on_policy_batch(config, student, corpus, seed, row_length, max_tokens, is_taught);
  };
  const std::optional<data::Batch> batch = batch_of(8, 32, 1000, everyone);
  ASSERT_TRUE(batch);
  std::int64_t begin = 0, corpus_begin = 0, kept = 0;
  std::size_t row = 0;
  for (std::size_t document = 0; document < lengths.size(); corpus_begin += lengths[document], ++document) {
    if (prompts[document] == 0) continue;
    SCOPED_TRACE(document);
    const std::vector<std::int64_t> prompt(ids.begin() + corpus_begin, ids.begin() + corpus_begin + prompts[document]);
    const std::vector<std::int64_t> drawn = models::generate(student, prompt, {.temperature = 1.2, .max_new_tokens = 7, .seed = derive_seed(8, "on-policy document", {document})}, student.config.eos_ids);
    std::vector<std::int64_t> all = prompt;
    all.insert(all.end(), drawn.begin(), drawn.end());
    const auto length = static_cast<std::int64_t>(all.size());
    ASSERT_EQ(batch->document_lengths[row], length);
    EXPECT_EQ(batch->origins[row].document, document);
    EXPECT_EQ(ids_of(batch->tokens_T.narrow(0, begin, length)), all);
    for (std::int64_t t = 0; t < length; ++t) {
      const bool keep = batch->keep_T[begin + t].item<bool>();
      EXPECT_EQ(keep, t >= prompts[document] - 1 && t + 1 < length);
      if (keep) {
        EXPECT_EQ(batch->targets_T[begin + t].item<std::int64_t>(), all[static_cast<std::size_t>(t + 1)]);
      }
      EXPECT_EQ(batch->positions_T[begin + t].item<std::int64_t>(), t);
      kept += keep;
    }
    begin += length, ++row;
  }
  EXPECT_EQ(row, 4u);
  EXPECT_EQ(batch->num_kept, kept);
  EXPECT_EQ(batch->tokens_T.numel(), begin);

  // The same whatever the threads are; others by another seed.
  const int threads = at::get_num_threads();
  at::set_num_threads(threads == 1 ? 2 : 1);
  EXPECT_TRUE(batch_of(8, 32, 1000, everyone)->tokens_T.equal(batch->tokens_T));
  at::set_num_threads(threads);
  EXPECT_NE(ids_of(batch_of(9, 32, 1000, everyone)->tokens_T), ids_of(batch->tokens_T));
  // What does not fit is left out, and takes no draws from the others: the first's 3 + 7 tokens and the last's 2 + 7.
  const std::optional<data::Batch> fitting = batch_of(8, 32, 19, everyone);
  EXPECT_EQ(fitting->origins.size(), 2u);
  EXPECT_EQ(fitting->origins[1].document, 2u);
  EXPECT_TRUE(fitting->tokens_T.narrow(0, 0, batch->document_lengths[0]).equal(batch->tokens_T.narrow(0, 0, batch->document_lengths[0])));
  const std::optional<data::Batch> taught = batch_of(8, 32, 1000, [](const data::Origin& origin) { return origin.document == 4; });
  ASSERT_EQ(taught->origins.size(), 1u);
  EXPECT_TRUE(taught->tokens_T.equal(batch->tokens_T.narrow(0, begin - batch->document_lengths[3], batch->document_lengths[3])));
  const std::optional<data::Batch> narrow = batch_of(8, 5, 1000, everyone);
  for (const std::int64_t length : narrow->document_lengths) EXPECT_LE(length, 5);
  EXPECT_FALSE(batch_of(8, 32, 1000, [](const data::Origin&) { return false; }));
}

TEST(OnPolicy, LambdaIsTheShareOfMicroBatches) {
  for (const double lambda : {0.0, 0.3, 1.0}) {
    int count = 0;
    for (std::uint64_t seed = 0; seed < 4000; ++seed) count += is_on_policy({.lambda = lambda}, derive_seed(7, "x", {seed}) | 1);
    EXPECT_NEAR(count, 4000 * lambda, 4 * std::sqrt(4000 * lambda * (1 - lambda)));
  }
}

// The first step of a run, where the student is its base, against whole logits and generate().
TEST(OnPolicy, TheLossIsTheDivergenceOnTheStudentsOwnText) {
  const ScratchFolder folder;
  DistillConfig config = tiny_config(folder.path(), "run", other_model());
  config.distill.divergence.objective = "reverse_kl";
  config.train.limits.max_steps = 1;
  distill(config, false, never);
  const Json step = steps_of(config.train.output).front();

  const at::NoGradGuard constant;
  const models::Decoder student = checkpoints::load_decoder(config.train.model, at::kFloat), teacher = checkpoints::load_decoder(other_model(), at::kFloat);
  const std::vector<data::Batch> micro_batches = data::BatchStream(train::stream_config(config.train), testing::kTinyVocabulary).next_step();
  ASSERT_EQ(micro_batches.size(), 2u);
  double sum = 0;
  std::int64_t corpus_kept = 0, own_tokens = 0;
  for (std::uint64_t index = 0; index < micro_batches.size(); ++index) {
    const data::Batch& corpus = micro_batches[index];
    const std::uint64_t seed = derive_seed(derive_seed(config.train.seed, "dropout", {0}), "micro-batch", {index}) | 1;
    double divergence = 0;
    std::int64_t begin = 0, kept = 0, room = 64;
    for (std::size_t document = 0; document < corpus.document_lengths.size(); begin += corpus.document_lengths[document], ++document) {
      std::int64_t prompt = 0;
      while (prompt < corpus.document_lengths[document] && !corpus.keep_T[begin + prompt].item<bool>()) ++prompt;
      if (prompt == corpus.document_lengths[document]) continue;
      prompt = prompt == 0 ? std::min<std::int64_t>(4, corpus.document_lengths[document] - 1) : prompt + 1;
      const std::int64_t most = std::min<std::int64_t>(6, 32 - prompt);
      if (prompt + most > room) continue;
      room -= prompt + most;
      std::vector<std::int64_t> ids = ids_of(corpus.tokens_T.narrow(0, begin, prompt));
      for (const std::int64_t id : models::generate(student, ids, {.temperature = 1, .max_new_tokens = most, .seed = derive_seed(seed, "on-policy document", {document})}, student.config.eos_ids)) ids.push_back(id);
      const auto length = static_cast<std::int64_t>(ids.size());
      models::Input input;
      input.tokens_T = at::zeros({length}, at::kLong);
      for (std::int64_t t = 0; t < length; ++t) input.tokens_T[t] = ids[static_cast<std::size_t>(t)];
      input.positions_T = at::arange(length, at::kLong), input.document_lengths = {length};
      const auto log_of = [&](const models::Decoder& decoder) { return at::log_softmax(decoder.logits_TV(decoder.hidden_TD(input)).to(at::kDouble), 1).narrow(0, prompt - 1, length - prompt); };
      const at::Tensor q = log_of(student), p = log_of(teacher);
      divergence += (q.exp() * (q - p)).sum().item<double>();
      kept += length - prompt;
    }
    ASSERT_GT(kept, 0);
    sum += divergence * static_cast<double>(corpus.num_kept) / static_cast<double>(kept);
    corpus_kept += corpus.num_kept, own_tokens += kept;
  }
  EXPECT_GT(sum, 0);
  EXPECT_NEAR(number(step, "divergence"), sum / static_cast<double>(corpus_kept), 1e-5 * sum / static_cast<double>(corpus_kept));
  EXPECT_NEAR(number(step, "loss"), 0.75 * number(step, "divergence"), 1e-9);
  EXPECT_EQ(number(step, "cross_entropy"), 0);
  EXPECT_EQ(step["own_tokens"], own_tokens);
}

TEST(OnPolicy, LambdaZeroIsWithoutItBitForBit) {
  const ScratchFolder folder;
  DistillConfig without = tiny_config(folder.path(), "without", other_model()), zero = tiny_config(folder.path(), "zero", other_model());
  without.distill.on_policy = {};
  zero.distill.on_policy = {.lambda = 0, .max_new_tokens = 3, .temperature = 2};
  distill(without, false, never), distill(zero, false, never);
  for (const char* name : {"metrics.jsonl", "checkpoint-20/state.safetensors"}) EXPECT_EQ(sha256_of_file(zero.train.output / name), sha256_of_file(without.train.output / name)) << name;
  EXPECT_FALSE(steps_of(zero.train.output).front().contains("own_tokens"));
}

TEST(OnPolicy, StoppedTwiceAndResumedEqualsTheRunThatWasNot) {
  const ScratchFolder folder;
  const auto config_of = [&](const std::string& run) {
    DistillConfig config = tiny_config(folder.path(), run, other_model());
    config.distill.teachers.push_back({.model = config.train.model});  // and one that is the student's base
    config.distill.on_policy.lambda = 0.4;
    return config;
  };
  const auto after_questions = [](int at) { return [at, asked = 0]() mutable { return ++asked >= at; }; };
  const DistillConfig whole = config_of("whole"), parts = config_of("parts");
  distill(whole, false, never);
  EXPECT_TRUE(fails_with(ErrorKind::kStopped, "alambic distill", [&] { distill(parts, false, after_questions(7 * 3 + 1)); }));
  EXPECT_TRUE(fails_with(ErrorKind::kStopped, "after step 13 of 20", [&] { distill(parts, true, after_questions(6 * 3 + 2)); }));  // in the middle of a step
  EXPECT_EQ(distill(parts, true, never).steps, 20);
  for (const char* name : {"metrics.jsonl", "adapter/adapter_model.safetensors", "checkpoint-20/state.safetensors", "checkpoint-20/progress.json"})
    EXPECT_EQ(sha256_of_file(parts.train.output / name), sha256_of_file(whole.train.output / name)) << name;
  int with = 0, without = 0;
  for (const Json& step : steps_of(whole.train.output)) {
    (step["own_tokens"] == 0 ? without : with) += 1;
    EXPECT_NEAR(number(step, "loss"), 0.25 * number(step, "cross_entropy") + 0.75 * number(step, "divergence"), 1e-9);
  }
  EXPECT_GT(with, 3);
  EXPECT_GT(without, 3);
}

TEST(OnPolicy, AStudentThatIsItsTeacherHasNothingToLearn) {
  const ScratchFolder folder;
  for (const std::string& objective : objective_names()) {
    DistillConfig config = tiny_config(folder.path(), objective, testing::golden_path("peft/llama_tied"));
    config.train.limits.max_steps = 2;
    config.distill.divergence.objective = objective;
    distill(config, false, never);
    for (const Json& step : steps_of(config.train.output)) {
      EXPECT_EQ(number(step, "divergence"), 0) << objective;
      EXPECT_EQ(number(step, "grad_norm"), 0) << objective;
      EXPECT_GT(number(step, "own_tokens"), 0) << objective;
    }
  }
}

TEST(OnPolicy, TheStudentComesNearerToItsTeacher) {
  const ScratchFolder folder;
  DistillConfig config = tiny_config(folder.path(), "run", other_model());
  config.distill.divergence.objective = "jensen_shannon";
  config.train.limits.max_steps = 80;
  distill(config, false, never);
  const std::vector<Json> steps = steps_of(config.train.output);
  const auto mean = [&](std::size_t first) {  // of ten steps, as each is judged on other text
    double sum = 0;
    for (std::size_t i = first; i < first + 10; ++i) sum += number(steps[i], "divergence") / 10;
    return sum;
  };
  EXPECT_LT(mean(70), 0.8 * mean(0));
}

TEST(OnPolicy, ThePlanTellsWhichKindOfMicroBatchItMeasured) {
  const ScratchFolder folder;
  for (const double lambda : {0.0, 0.001, 0.999}) {
    DistillConfig config = tiny_config(folder.path(), "run", other_model());
    config.distill.on_policy.lambda = lambda;
    const std::string warnings = to_line(plan(config, true)["warnings"]);
    EXPECT_EQ(warnings.find("on_policy.lambda") != std::string::npos, lambda > 0) << warnings;
    EXPECT_EQ(warnings.find("of the corpus;") != std::string::npos, lambda == 0.001) << warnings;
    EXPECT_EQ(warnings.find("that the student writes;") != std::string::npos, lambda == 0.999) << warnings;
  }
}

TEST(OnPolicy, ContradictionsAreRefused) {
  const ScratchFolder folder;
  DistillConfig config = tiny_config(folder.path(), "run", other_model());
  config.distill.alpha = 0;
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "distill.on_policy.lambda is 1, but distill.alpha is 0", [&] { check(config); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "distill.on_policy.lambda", [&] { read_config<DistillConfig>("", {"model=x", "output=y", "distill.on_policy.lambda=1.5"}); }));
}

}  // namespace
}  // namespace alambic::distill
