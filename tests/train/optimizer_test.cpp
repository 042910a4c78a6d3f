// SPDX-License-Identifier: Apache-2.0
// Every optimiser, and what is common to them, against those who made them: tests/oracle/adamw_oracle.py, optimizer_oracle.py.
#include "train/optimizer.h"

#include <ATen/ops/equal.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/roll.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>

#include "checkpoints/hf_folder.h"
#include "lora/adapter.h"
#include "tests/closeness.h"
#include "tests/golden.h"
#include "tests/support.h"
#include "train/adafactor.h"
#include "train/adamw8bit.h"
#include "train/dynamic_map.h"
#include "train/muon.h"
#include "train/schedule.h"

namespace alambic::train {
namespace {

using testing::fails_with;
using testing::Golden;
using testing::is_close;

constexpr int kSteps = 20;
constexpr double kRate = 1e-2, kDecay = 0.1;

/// The tensors of a golden, trained by an optimiser.
struct Parameters {
  explicit Parameters(const Golden& from) : golden(from) {
    for (const auto& [name, entry] : from.file().entries())
      if (name.starts_with("initial.")) tensors[name.substr(8)] = from[name].clone().requires_grad_(true);
    for (auto& [name, tensor] : tensors) named.push_back({name, &tensor});
  }
  /// One step with the gradients of optimizer_oracle.py: one tensor, rolled and scaled.
  void step(Optimizer& optimizer, int number) {
    for (auto& [name, tensor] : tensors) {
      const at::Tensor base = golden["gradient." + name];
      tensor.mutable_grad() = at::roll(base.flatten(), 37 * number).view(base.sizes()) * (number % 3 == 0 ? 0.02 : 0.5);
    }
    optimizer.step(kRate);
  }
  const Golden& golden;
  std::map<std::string, at::Tensor> tensors;
  std::vector<models::NamedTensor> named;
};

const std::vector<std::string> kNames = {"layers.0.lora_A.weight", "layers.0.lora_B.weight", "embed_tokens.weight", "q_proj.bias", "input_layernorm.weight", "norm.weight"};

TEST(AdamW, TwentyClippedStepsAgreeWithTorch) {  // tests/oracle/adamw_oracle.py
  const Golden torch("adamw.safetensors");
  SCOPED_TRACE(torch.provenance());
  std::vector<at::Tensor> parameters;
  for (const std::string& name : kNames) parameters.push_back(torch["initial." + name].clone().requires_grad_(true));
  std::vector<models::NamedTensor> named;
  for (std::size_t i = 0; i < kNames.size(); ++i) {
    named.push_back({kNames[i], &parameters[i]});
    EXPECT_EQ(decays(kNames[i]), torch["decays"][static_cast<std::int64_t>(i)].item<bool>()) << kNames[i];
  }
  const auto optimizer = make_optimizer(named, {.beta1 = 0.9, .beta2 = 0.98, .epsilon = 1e-7, .weight_decay = 0.1});
  const ScheduleConfig schedule{.shape = "cosine", .learning_rate = 1e-2, .warmup_steps = 3};
  for (int step = 0; step < kSteps; ++step) {
    for (std::size_t i = 0; i < kNames.size(); ++i) parameters[i].mutable_grad() = torch["gradient." + std::to_string(step) + "." + kNames[i]].clone();
    EXPECT_NEAR(clip_to_norm(optimizer->gradients(), 1.0), torch["norms"][step].item<double>(), 1e-6);
    optimizer->step(learning_rate_at(schedule, step, kSteps));
  }
  for (std::size_t i = 0; i < kNames.size(); ++i)
    EXPECT_TRUE(is_close(parameters[i], torch["final." + kNames[i]], {.relative = 1e-6, .absolute = 1e-6})) << kNames[i];
}

TEST(DynamicMap, ValuesAreThoseOfBitsandbytes) {
  const Golden golden("adamw8bit.safetensors");
  SCOPED_TRACE(golden.provenance());
  for (const auto& [name, map] : {std::pair{"signed_map", &signed_map()}, std::pair{"unsigned_map", &unsigned_map()}}) {
    const at::Tensor values = golden[name];
    for (std::size_t i = 0; i < 256; ++i) EXPECT_EQ(map->values[i], values[static_cast<std::int64_t>(i)].item<float>()) << name << " " << i;
  }
}

const OptimizerConfig k8bit{.kind = "adamw8bit", .beta1 = 0.9, .beta2 = 0.98, .epsilon = 1e-7, .weight_decay = kDecay};

TEST(AdamW8bit, StatesEqualThoseOfBitsandbytesBitForBit) {
  const Golden golden("adamw8bit.safetensors");
  SCOPED_TRACE(golden.provenance());
  Parameters parameters(golden);
  const auto optimizer = make_optimizer(parameters.named, k8bit);
  std::size_t compared = 0;
  for (int step = 0; step < kSteps; ++step) {
    parameters.step(*optimizer, step);
    for (const auto& [name, moment] : optimizer->moments()) {
      const std::string key = std::to_string(step) + "." + name;
      if (!golden.file().entries().contains(key)) continue;
      EXPECT_EQ(moment.scalar_type(), golden[key].scalar_type());
      EXPECT_TRUE(at::equal(moment, golden[key])) << key << ": " << (moment != golden[key]).sum().item<std::int64_t>() << " of " << moment.numel() << " differ";
      ++compared;
    }
  }
  EXPECT_EQ(compared, 3u * 2 * 4);  // steps, large tensors, parts of a state
  // The weights to a last bit or two: torch's square root of whole tensors is not always the correctly rounded one.
  for (const auto& [name, tensor] : parameters.tensors)
    EXPECT_TRUE(is_close(tensor, golden["final." + name], {.relative = 4e-7, .absolute = tensor.numel() < kSmallest8bitTensor ? 1e-6 : 2e-7})) << name;
}

TEST(AdamW8bit, StaysNearAdamWWithAQuarterOfItsMemory) {
  at::Tensor in_f32 = at::zeros({64, 1024}).requires_grad_(true), in_8_bits = at::zeros({64, 1024}).requires_grad_(true);
  const auto exact = make_optimizer({{"w", &in_f32}}, {}), rounded = make_optimizer({{"w", &in_8_bits}}, {.kind = "adamw8bit"});
  const at::Tensor drift = 0.2 * at::randn({64, 1024});
  for (int step = 0; step < 100; ++step) {
    in_f32.mutable_grad() = 1e-3 * (at::randn({64, 1024}) + drift);
    in_8_bits.mutable_grad() = in_f32.grad().clone();
    exact->step(1e-3), rounded->step(1e-3);
  }
  const double moved = in_f32.detach().abs().mean().item<double>(), apart = (in_f32 - in_8_bits).abs().mean().item<double>();
  EXPECT_GT(apart, 0);
  EXPECT_LT(apart, 0.03 * moved);
  EXPECT_EQ(exact->state_bytes(), 64 * 1024 * 8);
  EXPECT_EQ(rounded->state_bytes(), 64 * 1024 * 2 + 64 * 4 * 2 * 4);
}

TEST(AdamW8bit, ABlockWithoutGradientsStaysWhereItIs) {  // of zeros the share of the largest is NaN
  at::Tensor weight = at::randn({32, 256}).requires_grad_(true);
  const at::Tensor before = weight.detach().clone();
  const auto optimizer = make_optimizer({{"w", &weight}}, {.kind = "adamw8bit"});
  at::Tensor gradient = at::randn({32, 256});
  gradient.narrow(0, 10, 5).zero_();
  for (int step = 0; step < 5; ++step) {
    weight.mutable_grad() = gradient.clone();
    optimizer->step(0.1);
  }
  EXPECT_TRUE(at::equal(weight.detach().narrow(0, 10, 5), before.narrow(0, 10, 5)));
  EXPECT_FALSE(at::equal(weight.detach().narrow(0, 0, 5), before.narrow(0, 0, 5)));
}

TEST(Adafactor, TwentyStepsAgreeWithTransformers) {
  const Golden golden("adafactor.safetensors");
  SCOPED_TRACE(golden.provenance());
  for (const bool scaled : {false, true}) {
    Parameters parameters(golden);
    const auto optimizer = make_optimizer(parameters.named, {.kind = "adafactor", .weight_decay = kDecay, .adafactor_scale_parameter = scaled});
    for (int step = 0; step < kSteps; ++step) parameters.step(*optimizer, step);
    for (const auto& [name, tensor] : parameters.tensors)
      EXPECT_TRUE(is_close(tensor, golden[(scaled ? "scaled." : "plain.") + name], {.relative = 2e-6, .absolute = 2e-6})) << name;
    EXPECT_EQ(optimizer->state_bytes(), 4 * ((24 + 40) + (40 + 24) + (16 + 16) + (30 + 8) + 40 + 24));
  }
}

TEST(Adafactor, ResultsDoNotDependOnHowRowsAreCut) {  // 300 rows of 700: several pieces
  at::Tensor weight = at::randn({300, 700}).requires_grad_(true);
  const at::Tensor before = weight.detach().clone(), gradient = at::randn({300, 700});
  const auto optimizer = make_optimizer({{"w", &weight}}, {.kind = "adafactor"});
  weight.mutable_grad() = gradient.clone();
  optimizer->step(1);
  const at::Tensor square = gradient.to(at::kDouble).square(), row = square.mean(1, true), column = square.mean(0, true);
  at::Tensor update = gradient / (row * column / row.mean()).sqrt();
  update = update / std::max(1.0, update.square().mean().sqrt().item<double>());
  EXPECT_TRUE(is_close(weight, before - update, {.relative = 1e-6, .absolute = 1e-6}));
}

TEST(Muon, TwentyStepsAgreeWithTorch) {
  const Golden golden("muon.safetensors");
  SCOPED_TRACE(golden.provenance());
  for (const auto& [products, type] : {std::pair{"bf16", at::kBFloat16}, std::pair{"f32", at::kFloat}})
    for (const std::string rule : {"match_rms_adamw", "original", "spectral_unclamped"}) {
      Parameters parameters(golden);
      const OptimizerConfig config{.kind = "muon", .weight_decay = kDecay, .muon_momentum = 0.9, .muon_rate = rule};
      Muon optimizer(with_rates(parameters.named, config), config, type);
      for (int step = 0; step < kSteps; ++step) parameters.step(optimizer, step);
      // In bf16 a last bit of a product may fall otherwise on another processor: 2^-8 of an update of at most 1.
      const double absolute = type == at::kFloat ? 2e-6 : kSteps * kRate * 2e-2;
      for (const auto& [name, tensor] : parameters.tensors)
        EXPECT_TRUE(is_close(tensor, golden[std::string(products) + "." + rule + "." + name], {.relative = 1e-6, .absolute = absolute})) << products << " " << rule << " " << name;
    }
}

TEST(Muon, MadeByTheConfigItKeepsMomentaOfMatricesAndMomentsOfTheRest) {
  const Golden golden("muon.safetensors");
  Parameters parameters(golden);
  const auto optimizer = make_optimizer(parameters.named, {.kind = "muon"});
  std::vector<std::string> names;
  for (const auto& [name, moment] : optimizer->moments()) names.push_back(name);
  std::sort(names.begin(), names.end());
  const std::vector<std::string> expected = {"mean.embed_tokens.weight", "mean.layers.0.input_layernorm.weight", "mean.layers.0.self_attn.q_proj.bias",
                                             "momentum.layers.0.mlp.down_proj.weight", "momentum.layers.0.self_attn.o_proj.weight", "momentum.layers.0.self_attn.q_proj.weight",
                                             "square.embed_tokens.weight", "square.layers.0.input_layernorm.weight", "square.layers.0.self_attn.q_proj.bias"};
  EXPECT_EQ(names, expected);
  at::Tensor a = at::randn({2, 3}).requires_grad_(true);
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "method: full", [&] { make_optimizer({{"q_proj.lora_A.weight", &a}}, {.kind = "muon"}); }));
}

class EveryOptimizer : public ::testing::TestWithParam<const char*> {};

TEST_P(EveryOptimizer, StateMovesToAnotherAndRefusesWhatDoesNotFit) {
  const auto make = [](at::Tensor& large, at::Tensor& small) { return make_optimizer({{"w", &large}, {"norm.weight", &small}}, {.kind = GetParam()}); };
  const auto random = [](at::IntArrayRef shape) { return at::randn(shape).requires_grad_(true); };
  at::Tensor one = random({70, 66}), one_small = random({5}), other = random({70, 66}), other_small = random({5});
  const auto first = make(one, one_small), second = make(other, other_small);
  const auto step = [&](Optimizer& optimizer, const at::Tensor& gradient, at::Tensor& large, at::Tensor& small) {
    large.mutable_grad() = gradient.clone();
    small.mutable_grad() = at::ones_like(small.detach());
    optimizer.step(0.1);
  };
  step(*first, at::randn({70, 66}), one, one_small);
  step(*first, at::randn({70, 66}), one, one_small);
  second->restore(first->state(), first->num_steps());
  EXPECT_TRUE(at::equal(other.detach(), one.detach()));
  EXPECT_EQ(second->num_steps(), 2);
  const at::Tensor gradient = at::randn({70, 66});
  step(*first, gradient, one, one_small);
  step(*second, gradient, other, other_small);
  EXPECT_TRUE(at::equal(other.detach(), one.detach()));
  EXPECT_TRUE(at::equal(other_small.detach(), one_small.detach()));
  const NamedState then = first->state(), now = second->state();
  for (std::size_t i = 0; i < then.size(); ++i) EXPECT_TRUE(at::equal(then[i].second, now[i].second)) << then[i].first;

  at::Tensor narrow = random({70, 65});
  const at::Tensor before = narrow.detach().clone();
  const auto third = make(narrow, one_small);
  EXPECT_TRUE(fails_with(ErrorKind::kData, "another shape or type of weights.w", [&] { third->restore(then, 1); }));
  EXPECT_TRUE(at::equal(narrow.detach(), before));
  const auto fourth = make_optimizer({{"v", &narrow}}, {.kind = GetParam()});
  EXPECT_TRUE(fails_with(ErrorKind::kData, "unknown weights.w", [&] { fourth->restore(then, 1); }));
}
INSTANTIATE_TEST_SUITE_P(Kinds, EveryOptimizer, ::testing::Values("adamw", "adamw8bit", "adafactor", "muon"), [](const auto& name) { return std::string(name.param); });

TEST(Optimizer, MomentsOfAnotherKindAreRefused) {
  at::Tensor weight = at::randn({70, 66}).requires_grad_(true);
  const auto in_f32 = make_optimizer({{"w", &weight}}, {}), in_8_bits = make_optimizer({{"w", &weight}}, {.kind = "adamw8bit"});
  EXPECT_TRUE(fails_with(ErrorKind::kData, "another shape or type of mean.w", [&] { in_8_bits->restore(in_f32->state(), 1); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "unknown mean_scale.w", [&] { in_f32->restore(in_8_bits->state(), 1); }));
}

TEST(Optimizer, NothingToTrainIsRefused) {
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "nothing trains", [] { make_optimizer({}, {}); }));
}

TEST(Optimizer, NormsAreKnownByWholeWords) {
  for (const char* name : {"model.layers.0.self_attn.q_norm.weight", "model.norm.weight", "norm", "a.RMSNorm_1.b", "q_proj.bias"}) EXPECT_FALSE(decays(name)) << name;
  for (const char* name : {"model.normal.weight", "q_norms.weight", "up_proj.weight", ""}) EXPECT_TRUE(decays(name)) << name;
}

TEST(Optimizer, RatesAndDecaysAreThoseOfPeftsLoraPlus) {
  const Golden golden("loraplus.safetensors");
  SCOPED_TRACE(golden.provenance());
  const Json expected = parse_json(golden.metadata().at("rates"), "rates");
  models::Decoder decoder = checkpoints::load_decoder(testing::golden_path("peft/llama_untied"), at::kFloat);
  lora::attach(decoder, {.rank = 4, .alpha = 8, .dora = true, .modules_to_save = {"embed_tokens", "lm_head", "norm"}}, 0);
  const std::vector<Trained> all = with_rates(lora::trainable(decoder), {.weight_decay = kDecay, .lora_plus_ratio = 16});
  EXPECT_EQ(all.size(), expected.size());
  for (const Trained& one : all) {
    ASSERT_TRUE(expected.contains(one.name)) << one.name;
    EXPECT_EQ(one.rate, expected[one.name][0].get<double>()) << one.name;
    // PEFT's function knows norms by class and takes only torch's LayerNorm for one; here, as in the Trainer, no norm decays.
    const bool is_norm = one.name.find("norm") != std::string::npos;
    EXPECT_EQ(one.weight_decay, is_norm ? 0 : expected[one.name][1].get<double>()) << one.name;
  }
}

TEST(Optimizer, RatesOfEmbeddingAndHeadAreTheirOwn) {
  at::Tensor matrix = at::zeros({2, 2}).requires_grad_(true);
  const auto rates = [&](const OptimizerConfig& config) {
    std::map<std::string, double> found;
    for (const Trained& one : with_rates({{"model.embed_tokens.weight", &matrix}, {"base_model.model.lm_head.weight", &matrix}, {"lm_head.lora_A.weight", &matrix}, {"lm_head.lora_B.weight", &matrix}}, config))
      found[one.name] = one.rate;
    return found;
  };
  const std::map<std::string, double> expected = {{"model.embed_tokens.weight", 0.1}, {"base_model.model.lm_head.weight", 0.1}, {"lm_head.lora_A.weight", 1}, {"lm_head.lora_B.weight", 4}};
  EXPECT_EQ(rates({.lora_plus_ratio = 4, .embedding_lr_ratio = 0.1}), expected);
  models::Decoder decoder = checkpoints::load_decoder(testing::golden_path("peft/llama_untied"), at::kFloat);
  lora::attach(decoder, {.targets = {"q_proj"}, .trainable_tokens = {"5", "9"}, .trainable_tokens_head = true}, 1);
  std::size_t num_of_tokens = 0;
  for (const Trained& one : with_rates(lora::trainable(decoder), {.embedding_lr_ratio = 0.1})) {
    const bool of_tokens = one.name.find("lora_") == std::string::npos;
    num_of_tokens += of_tokens;
    EXPECT_EQ(one.rate, of_tokens ? 0.1 : 1) << one.name;
  }
  EXPECT_EQ(num_of_tokens, 2u);  // rows of the embedding, and of the head
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "neither the embedding nor the head", [&] { with_rates({{"q.lora_B.weight", &matrix}}, {.embedding_lr_ratio = 0.1}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "no adapter's B", [&] { with_rates({{"model.embed_tokens.weight", &matrix}}, {.lora_plus_ratio = 4}); }));
}

TEST(Optimizer, ARateScalesTheStepOfEveryKind) {
  for (const char* kind : {"adamw", "adamw8bit", "adafactor", "muon"}) {
    const at::Tensor start = at::randn({70, 66}), gradient = at::randn({70, 66});
    const auto moved = [&](double rate, double learning_rate) {
      at::Tensor weight = start.clone().requires_grad_(true);
      const auto optimizer = make_optimizer({{"lm_head.weight", &weight}}, {.kind = kind, .weight_decay = 0.1, .embedding_lr_ratio = rate});
      weight.mutable_grad() = gradient.clone();
      optimizer->step(learning_rate);
      return weight.detach();
    };
    EXPECT_TRUE(at::equal(moved(0.25, 0.1), moved(1, 0.025))) << kind;
    EXPECT_FALSE(at::equal(moved(0.25, 0.1), moved(1, 0.1))) << kind;
  }
}

TEST(ClipToNorm, OneNormOverAllTensorsWhateverTheirSizes) {
  std::vector<at::Tensor> gradients = {at::randn({200, 300}), at::randn({7}), at::randn({1}), at::randn({16384})};
  double square = 0;
  for (const at::Tensor& gradient : gradients) square += gradient.to(at::kDouble).square().sum().item<double>();
  std::vector<at::Tensor> before;
  for (const at::Tensor& gradient : gradients) before.push_back(gradient.clone());
  EXPECT_NEAR(clip_to_norm(gradients, 0), std::sqrt(square), 1e-12 * std::sqrt(square));
  for (std::size_t i = 0; i < gradients.size(); ++i) EXPECT_TRUE(at::equal(gradients[i], before[i]));
  clip_to_norm(gradients, 0.5);
  for (std::size_t i = 0; i < gradients.size(); ++i)
    EXPECT_TRUE(is_close(gradients[i], before[i] * (0.5 / (std::sqrt(square) + 1e-6)), {.relative = 3e-7}));
  // A square that f32 does not hold would make an infinite moment of a finite gradient.
  for (const float bad : {1e20f, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    std::vector<at::Tensor> one = {before[0].clone()};
    one[0][3][3] = bad;
    const at::Tensor same = one[0].clone();
    EXPECT_FALSE(std::isfinite(clip_to_norm(one, 1e-3))) << bad;
    EXPECT_TRUE(at::equal(same.nan_to_num(), one[0].nan_to_num())) << bad;
  }
}

TEST(ByOperators, NormsAndAdafactorAreThoseOfTheProcessorsLoops) {
  std::vector<at::Tensor> by_loop = {at::randn({200, 300}), at::randn({7}), at::randn({1}), at::randn({16384})}, by_operators;
  for (const at::Tensor& gradient : by_loop) by_operators.push_back(gradient.clone());
  const double norm = clip_to_norm(by_loop, 0.5);
  EXPECT_NEAR(clip_to_norm_by_operators(by_operators, 0.5), norm, 1e-12 * norm);
  for (std::size_t i = 0; i < by_loop.size(); ++i) EXPECT_TRUE(is_close(by_operators[i], by_loop[i], {.relative = 1.2e-7})) << i;

  for (const std::vector<std::int64_t>& shape : {std::vector<std::int64_t>{300, 700}, {5}}) {
    at::Tensor weight = at::randn(shape).requires_grad_(true), other = weight.detach().clone().requires_grad_(true);
    Adafactor loops({{"w", weight, 0.5, 0.1}}, {});
    const bool is_matrix = shape.size() == 2;
    const Adafactor::Moments moments = is_matrix ? Adafactor::Moments{at::zeros({300}), at::zeros({700}), {}} : Adafactor::Moments{{}, {}, at::zeros({5})};
    for (int step = 1; step <= kSteps; ++step) {
      const at::Tensor gradient = at::randn(shape) * (step % 3 == 0 ? 0.02 : 0.5);
      weight.mutable_grad() = gradient.clone(), other.mutable_grad() = gradient.clone();
      loops.step(kRate);
      Adafactor::update_by_operators({"w", other, 0.5, 0.1}, moments, 0.5 * kRate, std::pow(static_cast<double>(step), -0.8));
    }
    EXPECT_TRUE(is_close(other, weight, {.relative = 1e-6, .absolute = 1e-6})) << at::IntArrayRef(shape);
    for (const auto& [name, moment] : loops.moments()) {
      const at::Tensor& own = name.starts_with("row") ? moments.row_R : name.starts_with("column") ? moments.column_C : moments.square;
      EXPECT_TRUE(is_close(own, moment, {.relative = 2e-6})) << name;
    }
  }
}

struct Shape {
  const char* golden;
  ScheduleConfig schedule;
};

TEST(Schedule, AgreesWithTransformers) {
  const Golden torch("adamw.safetensors");
  const Shape shapes[] = {{"cosine", {.shape = "cosine"}},
                          {"cosine_floor", {.shape = "cosine", .final_share = 0.1}},
                          {"linear", {.shape = "linear"}},
                          {"constant", {.shape = "constant"}},
                          {"wsd", {.shape = "wsd", .decay_share = 0.2}}};
  for (const Shape& shape : shapes) {
    ScheduleConfig schedule = shape.schedule;
    schedule.learning_rate = 3;
    schedule.warmup_steps = 7;
    const at::Tensor expected = torch[std::string("schedule.") + shape.golden];
    for (std::int64_t step = 0; step <= 50; ++step)
      EXPECT_NEAR(learning_rate_at(schedule, step, 50), 3 * expected[step].item<double>(), 1e-12) << shape.golden << " at step " << step;
  }
}

TEST(Schedule, WarmsUpForAShareOfTheSteps) {
  const ScheduleConfig schedule{.learning_rate = 1, .warmup_share = 0.1};
  EXPECT_EQ(warmup_steps(schedule, 41), 5);  // rounded up, as the Trainer does
  EXPECT_EQ(learning_rate_at(schedule, 0, 41), 0);
  EXPECT_EQ(learning_rate_at(schedule, 5, 41), 1);
}

}  // namespace
}  // namespace alambic::train
