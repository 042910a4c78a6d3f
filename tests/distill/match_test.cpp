// SPDX-License-Identifier: Apache-2.0
#include "distill/match.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <set>

#include "checkpoints/hf_folder.h"
#include "checkpoints/run_state.h"
#include "core/files.h"
#include "distill/distill.h"
#include "models/fused_blocks.h"
#include "tests/closeness.h"
#include "tests/models/tiny_model.h"
#include "tests/support.h"
#include "tests/distill/tiny_run.h"
#include "train/step.h"

namespace alambic::distill {
namespace {

namespace fs = std::filesystem;
using testing::fails_with;
using testing::Golden;
using testing::is_close;
using testing::is_close_to_scale;
using testing::number;
using testing::ScratchFolder;
using testing::steps_of;

const auto never = [] { return false; };

at::Tensor leaf(const at::Tensor& value) { return value.clone().requires_grad_(true); }

models::Decoder decoder_of(const Golden& golden, const std::string& name) {
  models::Decoder decoder = models::make_decoder(models::read_model_config(parse_json(golden.metadata().at(name + ".config"), "config.json"), "config.json"));
  for (const models::NamedTensor& named : decoder.tensors()) *named.tensor = golden[name + "." + named.name].clone();
  if (decoder.head_tied) decoder.head.weight_OI = decoder.embedding_VD;
  return decoder;
}

data::Batch batch_of(const at::Tensor& ids, const at::Tensor& keep) {
  const std::int64_t rows = ids.size(0), length = ids.size(1);
  return {.tokens_T = ids.flatten().contiguous(), .positions_T = at::arange(length).repeat({rows}), .targets_T = ids.roll({-1}, {1}).flatten().contiguous(), .keep_T = keep.flatten().contiguous(),
          .document_lengths = std::vector<std::int64_t>(static_cast<std::size_t>(rows), length), .origins = std::vector<data::Origin>(static_cast<std::size_t>(rows))};
}

// Both passes and the loss.
at::Tensor matched(const Match& match, const MatchConfig& config, const models::Decoder& student, const models::Decoder& teacher, const data::Batch& batch, const at::Tensor& weights_K, MatchSums& sums,
                   std::uint64_t dropout_seed = 0) {
  const at::Tensor index_K = batch.keep_T.nonzero().squeeze(1);
  States ours, theirs;
  match.want_of_student(ours), match.want_of_teacher(theirs);
  const models::Observer of_teacher = filling(theirs, config, teacher, batch, 0, index_K), of_student = filling(ours, config, student, batch, dropout_seed, index_K);
  models::Input input = train::input_of(batch, 0);
  input.observer = &of_teacher;
  {
    const at::NoGradGuard constant;
    teacher.hidden_TD(input);
  }
  input.dropout_seed = dropout_seed, input.observer = &of_student;
  student.hidden_TD(input);
  return match.loss(ours, theirs, batch, index_K, weights_K, sums);
}

// The cases of tests/oracle/match_oracle.py.
const MatchConfig kShared{.hidden = 0.5, .attention = 2, .relations = {"qk"}};
const MatchConfig kLayer{.hidden = 2, .attention = 0.5, .loss = "cosine", .projection = "layer", .relation_heads = 4};

TEST(Match, LossAndGradientsAreThoseOfTransformersAndTorch) {
  const Golden golden("match.safetensors");
  SCOPED_TRACE(golden.provenance());
  models::Decoder student = decoder_of(golden, "student"), teacher = decoder_of(golden, "teacher");
  lora::attach(student, {.rank = 4, .alpha = 8}, 0);
  const std::vector<models::NamedTensor> trained = lora::trainable(student);
  ASSERT_EQ(trained.size(), 28u);
  {
    const at::NoGradGuard no_grad;
    for (const models::NamedTensor& named : trained) named.tensor->copy_(golden["adapter." + named.name]);
  }
  const data::Batch batch = batch_of(golden["ids"], golden["keep"]);
  for (const auto& [name, config] : {std::pair<std::string, MatchConfig>{"shared", kShared}, {"layer", kLayer}})
    for (const bool fused : {false, true}) {  // weights that lie as the fused path wants them are observed all the same
      SCOPED_TRACE(name + (fused ? ", fused" : ""));
      if (fused) {
        ASSERT_EQ(models::use_fused_blocks(student), "");
        ASSERT_EQ(models::use_fused_blocks(teacher), "");
      }
      Match match(config, student.config, teacher.config, "teacher");
      match.make_projections(1, 0);
      const std::vector<models::NamedTensor> projections = match.projections();
      ASSERT_EQ(projections.size(), name == "shared" ? 1u : 2u);
      for (std::size_t i = 0; i < projections.size(); ++i) {
        const at::NoGradGuard no_grad;
        projections[i].tensor->copy_(golden[name + ".projection." + std::to_string(i)]);
      }
      MatchSums sums;
      const at::Tensor loss = matched(match, config, student, teacher, batch, golden["weights"], sums);
      for (const models::NamedTensor& named : trained) named.tensor->mutable_grad() = at::Tensor();
      loss.backward();
      EXPECT_TRUE(is_close(loss, golden[name + ".loss"], {.relative = 3e-6}));
      EXPECT_NEAR(sums.hidden, golden[name + ".hidden"].item<double>(), 3e-6 * sums.hidden);
      EXPECT_NEAR(sums.attention, golden[name + ".attention"].item<double>(), 3e-6 * sums.attention);
      for (std::size_t i = 0; i < projections.size(); ++i)
        EXPECT_TRUE(is_close_to_scale(projections[i].tensor->grad(), golden[name + ".projection_gradient." + std::to_string(i)], 1e-5)) << i;
      for (const models::NamedTensor& named : trained) EXPECT_TRUE(is_close_to_scale(named.tensor->grad(), golden[name + ".gradient." + named.name], 2e-5)) << named.name;
    }
}

TEST(Match, EqualModelsAreAtZeroWithoutAnyGradient) {
  const Golden golden("match.safetensors");
  const data::Batch batch = batch_of(golden["ids"], golden["keep"]);
  const at::Tensor weights_K = at::ones({batch.keep_T.sum().item<std::int64_t>()});
  for (const std::string name : {"student", "teacher"})
    for (const std::string loss : {"mse", "cosine"})
      for (const std::string projection : {"shared", "layer", "none"}) {
        SCOPED_TRACE(name + " " + loss + " " + projection);
        models::Decoder student = decoder_of(golden, name), teacher = decoder_of(golden, name);
        lora::train_everything(student);
        const MatchConfig config{.hidden = 1, .attention = 1, .loss = loss, .projection = projection, .relations = {"qk", "qq", "kk", "vv"}};
        Match match(config, student.config, teacher.config, "teacher");
        match.make_projections(1, 0);
        MatchSums sums;
        matched(match, config, student, teacher, batch, weights_K, sums).backward();
        EXPECT_EQ(sums.hidden, 0);
        EXPECT_EQ(sums.attention, 0);
        for (const models::NamedTensor& named : lora::trainable(student))
          EXPECT_TRUE(!named.tensor->grad().defined() || named.tensor->grad().abs().max().item<double>() == 0) << named.name;
        for (const models::NamedTensor& named : match.projections()) EXPECT_EQ(named.tensor->grad().abs().max().item<double>(), 0) << named.name;
      }
}

// Documents of several blocks of rows, with windows and masks, against the formula on T x T by autograd; f64.
TEST(Match, RelationsOfBlocksOfRowsAreThoseOfTheWhole) {
  const std::vector<std::int64_t> lengths = {3, 900, 1, 260};
  const std::int64_t T = 1164, H = 4, S = 3;
  const auto f64 = at::TensorOptions(at::kDouble);
  const at::Tensor document_T = at::cat({at::full({3}, 0), at::full({900}, 1), at::full({1}, 2), at::full({260}, 3)}), place_T = at::arange(T);
  const at::Tensor index_K = at::rand({T}).lt(0.7).nonzero().squeeze(1), weights_K = at::rand({index_K.numel()}, f64);
  for (const std::int64_t window : {0, 1, 5, 300}) {
    SCOPED_TRACE(window);
    const at::Tensor l = at::randn({T, H, S}, f64), r = at::randn({T, H, S}, f64), teacher_l = at::randn({T, H, 5}, f64), teacher_r = at::randn({T, H, 5}, f64);
    const at::Tensor left = leaf(l), right = leaf(r), plain_left = leaf(l), plain_right = leaf(r);
    const at::Tensor value = relation_divergence_sum({left, right, 0.7}, {teacher_l, teacher_r, 0.4}, lengths, window, index_K, weights_K);
    (value * 3).backward();

    const at::Tensor distance_TT = place_T.unsqueeze(1) - place_T;
    at::Tensor seen_TT = (distance_TT >= 0) & document_T.unsqueeze(1).eq(document_T);
    if (window > 0) seen_TT = seen_TT & (distance_TT < window);
    const auto log_of = [&](const at::Tensor& a, const at::Tensor& b, double scale) {
      return at::log_softmax((at::matmul(a.transpose(0, 1), b.permute({1, 2, 0})) * scale).masked_fill(~seen_TT, -std::numeric_limits<double>::infinity()), 2).masked_fill(~seen_TT, 0);
    };
    const at::Tensor log_p = log_of(teacher_l, teacher_r, 0.4), p = log_p.exp().masked_fill(~seen_TT, 0);
    const at::Tensor kl_T = (p * (log_p - log_of(plain_left, plain_right, 0.7))).sum(2).mean(0);
    const at::Tensor expected = (kl_T.index_select(0, index_K) * weights_K).sum();
    (expected * 3).backward();
    EXPECT_TRUE(is_close(value, expected, {.relative = 1e-12, .absolute = 1e-13}));
    EXPECT_TRUE(is_close(left.grad(), plain_left.grad(), {.absolute = 1e-12}));
    EXPECT_TRUE(is_close(right.grad(), plain_right.grad(), {.absolute = 1e-12}));
  }
}

// (f(x + h) - f(x - h)) / 2h against the gradient, for every element of `x`.
void expect_slopes(const at::Tensor& x, const std::function<at::Tensor()>& f) {
  x.mutable_grad() = at::Tensor();
  f().backward();
  const at::NoGradGuard no_grad;
  double* const numbers = x.mutable_data_ptr<double>();
  const at::Tensor gradient = x.grad().contiguous();
  for (std::int64_t i = 0; i < x.numel(); ++i) {
    constexpr double kStep = 1e-6;
    const double before = numbers[i];
    numbers[i] = before + kStep;
    const double above = f().item<double>();
    numbers[i] = before - kStep;
    const double below = f().item<double>();
    numbers[i] = before;
    EXPECT_NEAR(gradient.const_data_ptr<double>()[i], (above - below) / (2 * kStep), 1e-7) << i;
  }
}

TEST(Match, GradientsAreSlopes) {
  const auto f64 = at::TensorOptions(at::kDouble);
  for (const std::string loss : {"mse", "cosine"}) {
    SCOPED_TRACE(loss);
    const at::Tensor student_KD = leaf(at::randn({5, 3}, f64)), projection = leaf(at::randn({4, 3}, f64)), teacher_KD = at::randn({5, 4}, f64), weights_K = at::rand({5}, f64);
    const auto f = [&] { return hidden_distance_sum(loss, student_KD, projection, teacher_KD, weights_K); };
    expect_slopes(student_KD, f);
    expect_slopes(projection, f);
  }
  const at::Tensor x = leaf(at::randn({9, 2, 3}, f64)), y = leaf(at::randn({9, 2, 3}, f64)), teacher = at::randn({9, 2, 2}, f64), index_K = at::arange(1, 9), weights_K = at::rand({8}, f64);
  for (const std::int64_t window : {0, 3}) {
    const auto between = [&] { return relation_divergence_sum({x, y, 0.8}, {teacher, teacher, 0.5}, {4, 5}, window, index_K, weights_K); };
    expect_slopes(x, between);
    expect_slopes(y, between);
    expect_slopes(x, [&] { return relation_divergence_sum({x, x, 0.8}, {teacher, teacher, 0.5}, {4, 5}, window, index_K, weights_K); });  // of queries to queries
  }
}

TEST(Match, DocumentsOfARowAreMatchedAsIfEachWereAlone) {
  const Golden golden("match.safetensors");
  models::Decoder student = decoder_of(golden, "student"), teacher = decoder_of(golden, "teacher");
  lora::train_everything(student);
  const at::Tensor ids = golden["ids"], keep = golden["keep"];
  for (const MatchConfig& given : {kShared, kLayer}) {
    MatchConfig config = given;
    if (given.relation_heads > 0) config.relations.push_back("qk");
    Match match(config, student.config, teacher.config, "teacher");
    match.make_projections(1, 0);
    const auto gradients_of = [&](const std::vector<data::Batch>& batches, MatchSums& sums) {
      for (const models::NamedTensor& named : lora::trainable(student)) named.tensor->mutable_grad() = at::Tensor();
      for (const models::NamedTensor& named : match.projections()) named.tensor->mutable_grad() = at::Tensor();
      for (const data::Batch& batch : batches) matched(match, config, student, teacher, batch, at::ones({batch.keep_T.sum().item<std::int64_t>()}), sums).backward();
      std::vector<at::Tensor> gradients;
      for (const models::NamedTensor& named : lora::trainable(student))
        if (named.tensor->grad().defined()) gradients.push_back(named.tensor->grad());
      for (const models::NamedTensor& named : match.projections()) gradients.push_back(named.tensor->grad());
      return gradients;
    };
    MatchSums packed, apart;
    std::vector<data::Batch> rows;
    for (std::int64_t i = 0; i < ids.size(0); ++i) rows.push_back(batch_of(ids.narrow(0, i, 1), keep.narrow(0, i, 1)));
    const std::vector<at::Tensor> together = gradients_of({batch_of(ids, keep)}, packed), separately = gradients_of(rows, apart);
    EXPECT_GT(packed.hidden, 0.1);
    EXPECT_GT(packed.attention, 0.1);
    EXPECT_NEAR(packed.hidden, apart.hidden, 1e-5 * apart.hidden);
    EXPECT_NEAR(packed.attention, apart.attention, 1e-5 * apart.attention);
    ASSERT_EQ(together.size(), separately.size());
    ASSERT_GT(together.size(), 10u);
    for (std::size_t i = 0; i < together.size(); ++i) EXPECT_TRUE(is_close_to_scale(together[i], separately[i], 2e-5)) << i;
  }
}

// What is made again of queries, keys and values, in every family and under dropout, gives the very attention of the pass.
TEST(Match, StatesAreWhatTheAttentionIsMadeOf) {
  for (const std::string& family : testing::family_goldens()) {
    const Golden golden("families/" + family + ".safetensors");
    models::Decoder decoder = testing::decoder_of(golden);
    lora::attach(decoder, {.rank = 2, .alpha = 4, .dropout = 0.5}, 0);
    {
      const at::NoGradGuard no_grad;
      for (const models::NamedTensor& named : lora::trainable(decoder)) named.tensor->add_(0.05);
    }
    models::Input input = testing::input_of(golden);
    data::Batch batch{.tokens_T = input.tokens_T, .positions_T = input.positions_T, .targets_T = {}, .keep_T = {}, .document_lengths = input.document_lengths, .origins = {}};
    const models::ModelConfig& model = decoder.config;
    const MatchConfig config{.attention = 1, .relations = {"qk", "vv"}};
    for (const std::uint64_t seed : {0, 9}) {
      SCOPED_TRACE(family + ", seed " + std::to_string(seed));
      States states;
      for (std::size_t layer = 0; layer < decoder.blocks.size(); ++layer) states[layer];
      const models::Observer fill = filling(states, config, decoder, batch, seed, at::arange(2));
      std::map<std::size_t, at::Tensor> heads_TQ;
      const models::Observer observer = [&](models::Place place, std::size_t layer, const at::Tensor& x) {
        fill(place, layer, x);
        if (place == models::Place::kHeads) heads_TQ[layer] = x.detach();
      };
      input.dropout_seed = seed, input.observer = &observer;
      decoder.hidden_TD(input);
      for (const auto& [layer, one] : states) {
        EXPECT_FALSE(one.hidden_KD.defined());  // nobody asked for it
        const at::Tensor v_THS = one.content_v_TX.unflatten(1, {model.num_kv_heads, -1}).repeat_interleave(model.num_heads / model.num_kv_heads, 1);
        std::int64_t first = 0;
        for (const std::int64_t length : batch.document_lengths) {
          const auto by_head = [&](const at::Tensor& x_THS) { return x_THS.detach().narrow(0, first, length).transpose(0, 1); };
          const at::Tensor distance = at::arange(length).unsqueeze(1) - at::arange(length);
          at::Tensor seen = distance >= 0;
          if (model.layers[layer].window > 0) seen = seen & (distance < model.layers[layer].window);
          at::Tensor scores = at::matmul(by_head(one.q_THS), by_head(one.k_THS).transpose(1, 2)) * model.attention_scale;
          if (model.attention_soft_cap > 0) scores = at::tanh(scores / model.attention_soft_cap) * model.attention_soft_cap;
          scores.masked_fill_(~seen, -std::numeric_limits<double>::infinity());
          const at::Tensor expected = at::matmul(at::log_softmax(scores, 2).exp(), by_head(v_THS)).transpose(0, 1).flatten(1);
          EXPECT_TRUE(is_close_to_scale(heads_TQ.at(layer).narrow(0, first, length), expected, 2e-5)) << "layer " << layer << ", document at " << first;
          first += length;
        }
      }
    }
  }
}

TEST(Match, WhatIsNotFiniteIsSeenAndRowsOfWeightZeroAreNot) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const Golden golden("match.safetensors");
  const models::Decoder student = decoder_of(golden, "student"), teacher = decoder_of(golden, "student");
  const MatchConfig config{.hidden = 1, .attention = 1, .layers = "last"};
  Match match(config, student.config, teacher.config, "teacher");
  match.make_projections(1, 0);
  const data::Batch batch = batch_of(golden["ids"].narrow(0, 0, 1), at::ones({1, 18}, at::kBool));
  const at::Tensor index_K = at::arange(18);
  const auto loss_of = [&](bool in_hidden, const at::Tensor& weights_K) {
    States states;
    match.want_of_student(states);
    const models::Observer fill = filling(states, config, student, batch, 0, index_K);
    models::Input input = train::input_of(batch, 0);
    input.observer = &fill;
    student.hidden_TD(input);
    States spoilt = states;
    at::Tensor& one = in_hidden ? spoilt.at(1).hidden_KD : spoilt.at(1).content_v_TX;
    one = one.clone();
    one[17].fill_(nan);
    MatchSums sums;
    return match.loss(states, spoilt, batch, index_K, weights_K, sums).item<double>();
  };
  at::Tensor weights_K = at::ones({18});
  EXPECT_TRUE(std::isnan(loss_of(true, weights_K)));
  EXPECT_TRUE(std::isnan(loss_of(false, weights_K)));
  weights_K[17] = 0;
  EXPECT_EQ(loss_of(true, weights_K), 0);
  EXPECT_EQ(loss_of(false, weights_K), 0);  // no earlier token sees it
}

TEST(Match, LayersAreSpreadOverTheDepthOfTheTeacher) {
  const auto pairs = [](const std::string& layers, std::int64_t teacher, std::int64_t student) { return layer_pairs({.layers = layers}, teacher, student, "teacher"); };
  EXPECT_EQ(pairs("uniform", 12, 4), (std::vector<LayerPair>{{2, 0}, {5, 1}, {8, 2}, {11, 3}}));  // TinyBERT's g(m) = 3 m, counted from 1
  EXPECT_EQ(pairs("uniform", 3, 2), (std::vector<LayerPair>{{1, 0}, {2, 1}}));
  EXPECT_EQ(pairs("uniform", 2, 3), (std::vector<LayerPair>{{0, 0}, {1, 1}, {1, 2}}));
  EXPECT_EQ(pairs("last", 12, 4), (std::vector<LayerPair>{{11, 3}}));
}

TEST(Match, ProjectionsBeginAsOrthogonalMapsOfTheirSeed) {
  models::ModelConfig wide, narrow;
  wide.hidden_size = 7, wide.num_layers = 3, narrow.hidden_size = 4, narrow.num_layers = 2;
  const auto made = [](const models::ModelConfig& student, const models::ModelConfig& teacher, const std::string& projection, std::uint64_t seed, std::size_t number) {
    Match match({.hidden = 1, .projection = projection}, student, teacher, "teacher");
    match.make_projections(seed, number);
    std::vector<std::pair<std::string, at::Tensor>> list;
    for (const models::NamedTensor& named : match.projections()) list.emplace_back(named.name, named.tensor->detach());
    return list;
  };
  const at::Tensor up = made(narrow, wide, "shared", 1, 0).at(0).second, down = made(wide, narrow, "shared", 1, 0).at(0).second;
  EXPECT_EQ(up.sizes(), (at::IntArrayRef{7, 4}));
  EXPECT_TRUE(is_close(at::matmul(up.t(), up), at::eye(4), {.absolute = 1e-6}));
  EXPECT_TRUE(is_close(at::matmul(down, down.t()), at::eye(4), {.absolute = 1e-6}));
  EXPECT_TRUE(made(wide, wide, "shared", 1, 0).at(0).second.equal(at::eye(7)));
  EXPECT_TRUE(made(narrow, wide, "shared", 1, 0).at(0).second.equal(up));
  EXPECT_FALSE(made(narrow, wide, "shared", 2, 0).at(0).second.equal(up));
  EXPECT_FALSE(made(narrow, wide, "shared", 1, 1).at(0).second.equal(up));
  const auto each = made(narrow, wide, "layer", 1, 2);
  ASSERT_EQ(each.size(), 2u);
  EXPECT_FALSE(each[0].second.equal(each[1].second));
  EXPECT_EQ(each[1].first, "beside.match.2.1.projection.weight");
  EXPECT_TRUE(made(wide, wide, "none", 1, 0).empty());
}

// --- Runs ---------------------------------------------------------------------------------------------------------------

fs::path other_model() { return testing::golden_path("peft/llama_untied"); }

// The golden's teacher as a folder: three blocks of width 32 with other heads than the student's of tiny_config.
fs::path wide_teacher(const ScratchFolder& folder) {
  const fs::path model = folder / "wide";
  if (fs::exists(model)) return model;
  const Golden golden("match.safetensors");
  fs::create_directories(model);
  write_file(model / "config.json", golden.metadata().at("teacher.config"));
  const auto shapes = models::expected_shapes(models::read_model_config(model));
  checkpoints::write_weights(model, shapes, at::kFloat, [&](std::size_t i) { return golden["teacher." + shapes[i].first]; });
  return model;
}

DistillConfig tiny_config(const fs::path& folder, const std::string& run, const fs::path& teacher, const MatchConfig& match) {
  DistillConfig config = testing::tiny_config(folder, run, teacher);
  config.distill.match = match;
  config.train.threads = 1;  // of many small products, each of which would wait for the other thread
  return config;
}

const MatchConfig kAcross{.hidden = 0.5, .attention = 2, .relation_heads = 2};  // of wide_teacher

TEST(MatchRun, LearnsToBeLikeTheTeacherAndTellsOfIt) {
  const ScratchFolder folder;
  DistillConfig config = tiny_config(folder.path(), "run", wide_teacher(folder), kAcross);
  config.distill.alpha = 0;  // the match alone needs the teacher
  distill(config, false, never);
  const std::vector<Json> steps = steps_of(config.train.output);
  ASSERT_EQ(steps.size(), 20u);
  for (const Json& step : steps) EXPECT_NEAR(number(step, "loss"), number(step, "cross_entropy") + 0.5 * number(step, "hidden_loss") + 2 * number(step, "attention_loss"), 1e-9);
  EXPECT_LT(number(steps.back(), "hidden_loss"), 0.9 * number(steps.front(), "hidden_loss"));
  EXPECT_LT(number(steps.back(), "attention_loss"), 0.95 * number(steps.front(), "attention_loss"));

  config.distill.match.attention = 0, config.distill.alpha = 0.5;
  config.train.output = folder / "hidden";
  config.train.limits.max_steps = 2;
  distill(config, false, never);
  const Json step = steps_of(config.train.output).at(0);
  EXPECT_TRUE(step.contains("hidden_loss") && !step.contains("attention_loss"));
  EXPECT_NEAR(number(step, "loss"), 0.5 * number(step, "cross_entropy") + 0.5 * number(step, "divergence") + 0.5 * number(step, "hidden_loss"), 1e-9);
}

TEST(MatchRun, OwnTextIsMatchedAsTheTextThatItStandsFor) {
  const ScratchFolder folder;
  DistillConfig config = tiny_config(folder.path(), "run", wide_teacher(folder), kAcross);
  config.distill.on_policy.lambda = 1, config.distill.on_policy.max_new_tokens = 6, config.distill.on_policy.prompt_tokens = 2;
  config.train.limits.max_steps = 3;
  distill(config, false, never);
  for (const Json& step : steps_of(config.train.output)) {
    EXPECT_GT(number(step, "own_tokens"), 0);
    EXPECT_GT(number(step, "hidden_loss"), 0);
    EXPECT_NEAR(number(step, "loss"), 0.5 * number(step, "cross_entropy") + 0.5 * number(step, "divergence") + 0.5 * number(step, "hidden_loss") + 2 * number(step, "attention_loss"), 1e-9);
  }
}

TEST(MatchRun, TheBaseThatTeachesItselfBeginsAtZero) {
  const ScratchFolder folder;
  DistillConfig config = tiny_config(folder.path(), "run", testing::golden_path("peft/llama_tied"), {.hidden = 1, .attention = 1, .relations = {"qk", "qq", "kk", "vv"}});
  config.train.limits.max_steps = 3;
  distill(config, false, never);
  const std::vector<Json> steps = steps_of(config.train.output);
  for (const char* figure : {"hidden_loss", "attention_loss"}) {
    EXPECT_EQ(number(steps[0], figure), 0) << figure;
    EXPECT_GT(number(steps[2], figure), 0) << figure;
  }
}

TEST(MatchRun, StoppedTwiceAndResumedEqualsTheRunThatWasNot) {
  const ScratchFolder folder;
  const auto after_questions = [](int at) { return [at, asked = 0]() mutable { return ++asked >= at; }; };
  const auto config_of = [&](const std::string& run) {
    DistillConfig config = tiny_config(folder.path(), run, wide_teacher(folder), kAcross);
    config.distill.match.projection = "layer";
    config.distill.teachers.push_back({.model = wide_teacher(folder), .sources = {"other"}});  // with projections of its own
    return config;
  };
  const DistillConfig whole = config_of("whole"), parts = config_of("parts");
  distill(whole, false, never);
  EXPECT_TRUE(fails_with(ErrorKind::kStopped, "alambic distill", [&] { distill(parts, false, after_questions(7 * 3 + 1)); }));
  EXPECT_TRUE(fails_with(ErrorKind::kStopped, "after step 13 of 20", [&] { distill(parts, true, after_questions(6 * 3 + 2)); }));  // in the middle of a step
  EXPECT_EQ(distill(parts, true, never).steps, 20);
  for (const char* name : {"metrics.jsonl", "adapter/adapter_model.safetensors", "checkpoint-20/state.safetensors", "checkpoint-20/progress.json"})
    EXPECT_EQ(sha256_of_file(parts.train.output / name), sha256_of_file(whole.train.output / name)) << name;

  // The projections learn, and are where a run goes on from.
  std::map<std::string, at::Tensor> state;
  for (const auto& [name, tensor] : checkpoints::load_checkpoint(whole.train.output / "checkpoint-20").tensors) state[name] = tensor;
  for (int teacher = 0; teacher < 2; ++teacher) {
    Match fresh(whole.distill.match, models::read_model_config(whole.train.model), models::read_model_config(wide_teacher(folder)), "teacher");
    fresh.make_projections(whole.train.seed, static_cast<std::size_t>(teacher));
    for (const models::NamedTensor& named : fresh.projections()) {
      ASSERT_TRUE(state.contains("weights." + named.name) && state.contains("mean." + named.name)) << named.name;
      EXPECT_GT((state["weights." + named.name] - *named.tensor).abs().max().item<double>(), 1e-3) << named.name;
    }
  }
  DistillConfig changed = parts;
  changed.distill.match.hidden = 0.25;
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "distill.match.hidden", [&] { distill(changed, true, never); }));
}

std::set<std::string> names_in(const fs::path& folder) {
  std::set<std::string> names;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() != ".safetensors") continue;
    const checkpoints::SafetensorsFile file(entry.path());
    for (const auto& [name, where] : file.entries()) names.insert(name);
  }
  EXPECT_FALSE(names.empty());
  return names;
}

TEST(MatchRun, NoResultHoldsAProjection) {
  const ScratchFolder folder;
  const std::vector<std::pair<std::string, std::function<void(train::TrainConfig&)>>> methods = {
      {"lora", [](train::TrainConfig&) {}},
      {"full", [](train::TrainConfig& config) { config.method = "full"; }},
      {"restarted", [](train::TrainConfig& config) { config.lora.restart_every = 4, config.lora.restart_warmup_steps = 1; }},
  };
  for (const auto& [name, change] : methods)
    for (const std::string kind : {"adamw", "adamw8bit", "adafactor"}) {
      SCOPED_TRACE(name + " " + kind);
      DistillConfig matching = tiny_config(folder.path(), name + kind, wide_teacher(folder), kAcross), plain = tiny_config(folder.path(), name + kind + "-plain", wide_teacher(folder), {});
      for (DistillConfig* config : {&matching, &plain}) {
        change(config->train);
        config->train.limits.max_steps = 6;
        config->train.optimizer.kind = kind;
      }
      const train::TrainReport report = distill(matching, false, never), expected = distill(plain, false, never);
      EXPECT_EQ(report.result.filename(), name == "lora" ? "adapter" : "weights");
      EXPECT_EQ(names_in(report.result), names_in(expected.result));
      for (const char* described : {"config.json", "adapter_config.json"})
        EXPECT_TRUE(!fs::exists(expected.result / described) || read_file(report.result / described) == read_file(expected.result / described)) << described;
      EXPECT_TRUE(name == "lora" || checkpoints::load_decoder(report.result, at::kFloat).blocks.size() == 2);
      EXPECT_TRUE(distill(matching, true, never).was_finished);
    }
}

TEST(MatchRun, ThePlanCountsWhatIsHeldForIt) {
  const ScratchFolder folder;
  const Json with = plan(tiny_config(folder.path(), "with", wide_teacher(folder), kAcross), true), without = plan(tiny_config(folder.path(), "without", wide_teacher(folder), {}), false);
  EXPECT_EQ(with["model"]["trained_parameters"], without["model"]["trained_parameters"]);
  EXPECT_GT(number(with["memory"], "teachers"), number(without["memory"], "teachers") + 2 * 4 * 32 * 16);
  EXPECT_NEAR(number(with["memory"], "optimizer") - number(without["memory"], "optimizer"), 2 * 4 * 32 * 16, 1);
  EXPECT_EQ(with["blocks"]["path"], "ATen operators, as distill.match looks between the blocks");
  EXPECT_GT(number(with["time"], "tokens_per_second"), 0);
}

TEST(MatchRun, WhatCannotBeMatchedIsRefusedBeforeAnythingIsLoaded) {
  const ScratchFolder folder;
  const fs::path wide = wide_teacher(folder);
  const auto refused = [&](const std::string& words, const MatchConfig& match, const std::function<void(DistillConfig&)>& change = {}) {
    DistillConfig config = tiny_config(folder.path(), "run", wide, match);
    if (change) change(config);
    EXPECT_TRUE(fails_with(ErrorKind::kUsage, words, [&] { distill(config, false, never); })) << words;
    EXPECT_TRUE(fails_with(ErrorKind::kUsage, words, [&] { plan(config, false); })) << words;
  };
  refused("block 3 of the teacher " + wide.string() + ", which has 3 blocks / they are counted from 0: name one of 0 to 2", {.hidden = 1, .layers = "pairs", .pairs = {{3, 1}}});
  refused("block 2 of the student, which has 2 blocks", {.hidden = 1, .layers = "pairs", .pairs = {{2, 2}}});
  refused("stand twice", {.hidden = 1, .layers = "pairs", .pairs = {{2, 1}, {2, 1}}});
  refused("pairs, but distill.match.pairs has none", {.hidden = 1, .layers = "pairs"});
  refused("distill.match.layers is uniform", {.hidden = 1, .pairs = {{2, 1}}});
  refused("nothing is matched", {.layers = "pairs", .pairs = {{2, 1}}});
  refused("the student is 16 wide and the teacher " + wide.string() + " 32 / use projection: shared or layer", {.hidden = 1, .projection = "none"});
  refused("qk is compared head by head, but the student has 2 heads of queries and the teacher " + wide.string() + " 4 / use relations: [qq, kk, vv] with relation_heads", {.attention = 1, .relations = {"qk"}});
  refused("kk is compared head by head, but the student has 1 heads of keys and the teacher " + wide.string() + " 2 / set relation_heads", {.attention = 1, .relations = {"kk"}});
  refused("5 does not divide the 16 numbers of queries of the student / use a divisor of 16", {.attention = 1, .relation_heads = 5});
  refused("of distill.match.relations only qk", {.attention = 1, .relations = {"qk"}, .relation_heads = 2});
  refused("qk is not implemented for attention with soft-capped scores, which the student has / use relations: [qq, kk, vv]", {.attention = 1, .relations = {"qk"}},
          [](DistillConfig& config) { config.train.model = testing::golden_path("peft/gemma2"); });
  refused("\"qv\" is unknown", {.attention = 1, .relations = {"qv"}});
  refused("vv stands twice", {.attention = 1, .relations = {"vv", "vv"}});
  refused("relations is empty", {.attention = 1, .relations = {}});
  refused("neither its hidden states nor its attention", kAcross, [](DistillConfig& config) { config.distill.teachers = {{.model = {}, .cache = "some/cache"}}; });
  for (const std::string across : {"uld", "gold"})
    refused("across_tokenizers: " + across, kAcross, [&](DistillConfig& config) { config.distill.teachers[0].across.across_tokenizers = across; });
  for (const std::string memory : {"mlp", "block"})
    refused("memory: " + memory + " needs the fused blocks, which cannot be used: distill.match looks between the blocks", kAcross, [&](DistillConfig& config) { config.train.memory = memory; });
  EXPECT_FALSE(fs::exists(folder.path() / "run" / "metrics.jsonl"));
}

TEST(MatchRun, TheSectionIsReadStrictly) {
  const ScratchFolder folder;
  const DistillConfig tiny = tiny_config(folder.path(), "run", other_model(), {});
  const std::string head = "model: " + tiny.train.model.string() + "\noutput: " + (folder / "run").string() + "\ndata: {mixture: [{store: " + (folder / "text").string() + "}]}\n";
  const auto read = [&](const std::string& match) {
    write_file(folder / "config.yaml", head + "distill:\n  teachers: [{model: " + other_model().string() + "}]\n  match: " + match + "\n");
    return read_config<DistillConfig>(folder / "config.yaml").distill.match;
  };
  const MatchConfig config = read("{hidden: 1, layers: pairs, pairs: [{teacher: 1, student: 0}], loss: cosine, projection: none, relations: [qk], attention: 0.5}");
  EXPECT_EQ(config.pairs, (std::vector<LayerPair>{{1, 0}}));
  EXPECT_EQ(config.relations, (std::vector<std::string>{"qk"}));
  EXPECT_EQ(config.loss, "cosine");
  EXPECT_FALSE(read("{layers: last}").is_on());
  for (const auto& [match, words] : std::vector<std::pair<std::string, std::string>>{{"{hiden: 1}", "did you mean"}, {"{hidden: -1}", "from 0"}, {"{layers: unifrom}", "did you mean uniform"},
                                                                                     {"{loss: msd}", "mse"}, {"{relations: [qx]}", "qk"}, {"{pairs: [{teacher: 1}]}", "student"}, {"{pairs: [{teacher: -1, student: 0}]}", "from 0"},
                                                                                     {"{relation_heads: 1.5}", "relation_heads"}})
    EXPECT_TRUE(fails_with(ErrorKind::kUsage, words, [&, &text = match] { read(text); })) << match;
  EXPECT_NE(config_help<DistillConfig>().find("relation_heads"), std::string::npos);
}

}  // namespace
}  // namespace alambic::distill
