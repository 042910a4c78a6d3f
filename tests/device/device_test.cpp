// SPDX-License-Identifier: Apache-2.0
// All that train does with a decoder, on a device whose memory the program cannot see (pretend_device.h): the code that a GPU runs, its
// operators the processor's. The same goldens as for the processor's own paths, and whole runs compared with theirs.
#include <ATen/ops/arange.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/roll.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <map>

#include "checkpoints/hf_folder.h"
#include "checkpoints/safetensors.h"
#include "core/files.h"
#include "core/log.h"
#include "lora/adapter.h"
#include "lora/initialise.h"
#include "lora/int8.h"
#include "lora/nf4.h"
#include "models/device.h"
#include "models/fused_blocks.h"
#include "models/generate.h"
#include "models/neftune.h"
#include "models/sharded_blocks.h"
#include "tests/closeness.h"
#include "tests/device/pretend_device.h"
#include "tests/forked_ranks.h"
#include "tests/golden.h"
#include "tests/models/tiny_model.h"
#include "tests/support.h"
#include "tests/train/tiny_run.h"
#include "train/cross_entropy.h"
#include "train/device.h"
#include "train/finetune.h"
#include "train/muon.h"
#include "train/recipe.h"
#include "train/schedule.h"
#include "train/step.h"

namespace alambic::train {
namespace {

using testing::fails_with;
using testing::Golden;
using testing::is_close;
using testing::is_close_to_scale;
using testing::kPretendDevice;
using testing::ScratchFolder;
using testing::tiny_config;

const auto never = [] { return false; };

at::Tensor there(const at::Tensor& tensor) { return tensor.to(kPretendDevice); }

TEST(PretendDevice, ClosesItsMemoryAndRefusesMixtures) {
  const at::Tensor here = at::randn({3, 4}), far = there(here);
  EXPECT_FALSE(far.is_cpu());
  EXPECT_TRUE(at::equal(far.cpu(), here));
  EXPECT_TRUE(at::equal((far * 2 + far.t().contiguous().t()).cpu(), here * 2 + here));
  EXPECT_ANY_THROW(static_cast<void>(far + here));
  EXPECT_DEATH(static_cast<void>(*static_cast<const volatile float*>(far.const_data_ptr())), "");
}

class FamilyThere : public ::testing::TestWithParam<std::string> {
 protected:
  Golden golden_{"families/" + GetParam() + ".safetensors"};
};
INSTANTIATE_TEST_SUITE_P(Families, FamilyThere, ::testing::ValuesIn(testing::family_goldens()), [](const auto& test) { return test.param; });

TEST_P(FamilyThere, LogitsAndEveryGradientEqualTransformers) {
  SCOPED_TRACE(golden_.provenance());
  models::Decoder decoder = testing::decoder_of(golden_);
  for (const models::NamedTensor& named : decoder.tensors()) named.tensor->requires_grad_(true);
  models::move_to(decoder, kPretendDevice);
  EXPECT_EQ(models::use_fused_blocks(decoder), "the weights are not in the processor's memory");
  const at::Tensor logits_TV = decoder.logits_TV(decoder.hidden_TD(testing::input_of(golden_)));
  EXPECT_EQ(logits_TV.device(), kPretendDevice);
  EXPECT_TRUE(is_close_to_scale(logits_TV.cpu(), golden_["logits"], 1e-5));
  (at::cross_entropy_loss(logits_TV, there(golden_["targets"]), {}, 0) * there(golden_["weights"])).sum().backward();
  for (const models::NamedTensor& named : decoder.tensors()) {
    ASSERT_TRUE(named.tensor->grad().defined()) << named.name;
    EXPECT_TRUE(is_close_to_scale(named.tensor->grad().cpu(), golden_["grad." + named.name], 1e-5)) << named.name;
  }
}

TEST_P(FamilyThere, GreedyEqualsTransformersTokenForToken) {
  models::Decoder decoder = testing::decoder_of(golden_);
  models::move_to(decoder, kPretendDevice);
  const auto prompt = testing::ids_of(golden_["prompt"]);
  EXPECT_EQ(models::generate(decoder, prompt, {.max_new_tokens = 24}, {}), testing::ids_of(golden_["greedy"]));
  EXPECT_EQ(models::generate(decoder, prompt, {.repetition_penalty = 1.7, .max_new_tokens = 24}, {}), testing::ids_of(golden_["greedy_penalised"]));
  // Documents that end at other times, and log-probabilities.
  const models::Decoder here = testing::decoder_of(golden_);
  const std::vector<models::Prompt> prompts = {{.ids = prompt, .max_new_tokens = 3}, {.ids = {prompt.begin(), prompt.begin() + 2}, .max_new_tokens = 9}};
  const auto expected = models::generate_many(here, prompts, {}, {}, true), got = models::generate_many(decoder, prompts, {}, {}, true);
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    EXPECT_EQ(got[i].ids, expected[i].ids);
    EXPECT_NEAR(got[i].sum_log_probability, expected[i].sum_log_probability, 1e-4);
  }
  const std::vector<double> scores = models::score(decoder, prompt), wanted = models::score(here, prompt);
  for (std::size_t i = 0; i < wanted.size(); ++i) EXPECT_NEAR(scores[i], wanted[i], 1e-5);
}

TEST(MoveTo, KeepsTiesAndWhatTrains) {
  models::Decoder decoder = checkpoints::load_decoder(testing::golden_path("peft/llama_tied"), at::kFloat);
  lora::attach(decoder, {.rank = 2, .alpha = 4, .dora = true, .trainable_tokens = {"3..5"}}, 0);
  const std::size_t trained = lora::trainable(decoder).size();
  models::move_to(decoder, kPretendDevice);
  EXPECT_EQ(decoder.head.weight_OI.unsafeGetTensorImpl(), decoder.embedding_VD.unsafeGetTensorImpl());
  EXPECT_EQ(decoder.head.token_rows_ND.unsafeGetTensorImpl(), decoder.token_rows_ND.unsafeGetTensorImpl());
  EXPECT_EQ(lora::trainable(decoder).size(), trained);
  for (const models::NamedTensor& named : lora::trainable(decoder)) EXPECT_TRUE(named.tensor->requires_grad() && named.tensor->is_leaf() && named.tensor->device() == kPretendDevice) << named.name;
  for (const models::NamedTensor& named : decoder.tensors()) EXPECT_EQ(named.tensor->device(), kPretendDevice) << named.name;

  models::Decoder fused = checkpoints::load_decoder(testing::golden_path("peft/llama_tied"), at::kFloat);
  ASSERT_EQ(models::use_fused_blocks(fused), "");
  EXPECT_TRUE(fails_with(ErrorKind::kBug, "fused blocks", [&] { models::move_to(fused, kPretendDevice); }));
}

TEST(QuantisedThere, Int8HasTheProcessorsBitsAndNf4MovesWhole) {
  const at::Tensor weight_OI = at::randn({33, 130});
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    const lora::Int8Weight here(lora::quantize_int8(weight_OI));
    const auto far = here.on(kPretendDevice);
    const at::Tensor expected_OI = at::zeros({33, 130}, type), got_OI = at::zeros({33, 130}, at::TensorOptions(type).device(kPretendDevice));
    here.dense_into(expected_OI), far->dense_into(got_OI);
    EXPECT_TRUE(at::equal(got_OI.cpu(), expected_OI)) << type;
    EXPECT_TRUE(fails_with(ErrorKind::kBug, "cannot be made dense on", [&] { far->dense_into(expected_OI); }));
  }
  const lora::Nf4Weight here(33, 130, lora::quantize_nf4(weight_OI, true));
  const auto far = std::dynamic_pointer_cast<const lora::Nf4Weight>(here.on(kPretendDevice));
  ASSERT_NE(far, nullptr);
  const lora::Nf4Parts &was = here.parts(), &is = far->parts();
  for (const auto& [before, after] : {std::pair{was.packed, is.packed}, {was.absmax, is.absmax}, {was.nested_absmax, is.nested_absmax}, {was.nested_map, is.nested_map}}) {
    EXPECT_EQ(after.device(), kPretendDevice);
    EXPECT_TRUE(at::equal(after.cpu(), before));
  }
  EXPECT_EQ(is.offset, was.offset);
  EXPECT_TRUE(fails_with(ErrorKind::kBug, "no kernel for NF4", [&] { far->dense_into(at::zeros({33, 130}, at::TensorOptions(at::kFloat).device(kPretendDevice))); }));
}

TEST(DropoutThere, DropsTheShareItShouldAndIsAFunctionOfTheSeed) {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    const at::Tensor x_TI = at::randn({1000, 997}).to(type), y_TI = models::with_dropout(there(x_TI), 0.1, 5).cpu();
    const at::Tensor dropped_TI = y_TI == 0;
    EXPECT_NEAR(dropped_TI.sum().item<double>() / static_cast<double>(y_TI.numel()), 0.1, 5 * std::sqrt(0.09 / 997000));
    for (const at::Tensor& given_TI : {y_TI, models::dropout_by_operators(x_TI, 0.1, 5)})
      EXPECT_TRUE(is_close(given_TI, x_TI.to(at::kFloat) / 0.9 * given_TI.ne(0), {.relative = type == at::kFloat ? 2e-7 : 8e-3}));
    EXPECT_TRUE(at::equal(models::with_dropout(there(x_TI), 0.1, 5).cpu(), y_TI));
    EXPECT_FALSE(at::equal(models::with_dropout(there(x_TI), 0.1, 6).cpu(), y_TI));
  }
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "dropout must be", [] { models::with_dropout(there(at::ones({2, 2})), 1, 5); }));
}

TEST(NeftuneThere, HasTheBoundAndSpreadOfTheProcessors) {
  const std::vector<std::int64_t> lengths = {100, 25};
  const auto noise = [&](std::uint64_t seed) {
    at::Tensor h_TD = there(at::ones({125, 64}));
    models::add_neftune_noise_in_place(h_TD, lengths, 5, seed);
    return h_TD.cpu() - 1;
  };
  const at::Tensor one = noise(3);
  EXPECT_TRUE(at::equal(noise(3), one));
  EXPECT_FALSE(at::equal(noise(4), one));
  for (const auto& [first, length] : {std::pair{0, 100}, std::pair{100, 25}}) {
    const at::Tensor part = one.narrow(0, first, length);
    const double bound = 5 / std::sqrt(length * 64.0);
    EXPECT_LE(part.abs().max().item<double>(), bound * (1 + 1e-5));
    EXPECT_NEAR(part.square().mean().item<double>(), bound * bound / 3, 0.06 * bound * bound / 3);
    EXPECT_NEAR(part.mean().item<double>(), 0, 4 * bound / std::sqrt(3.0 * static_cast<double>(part.numel())));
  }
  EXPECT_EQ(noise(0).abs().max().item<double>(), 0);  // evaluating
}

at::Tensor leaf_there(const at::Tensor& tensor) { return there(tensor).requires_grad_(true); }

TEST(CrossEntropyThere, AgreesWithTorchOnEveryHead) {  // tests/oracle/cross_entropy_oracle.py, in f64
  const Golden torch("cross_entropy.safetensors");
  SCOPED_TRACE(torch.provenance());
  const auto loss_of = [&](const models::Linear& head, const at::Tensor& hidden) {
    const at::Tensor loss = cross_entropy_sum(hidden, head, torch["targets"], torch["keep"], 1);
    EXPECT_EQ(loss.device(), kPretendDevice);
    (loss * 3).backward();
    return loss.detach().cpu();
  };
  {  // frozen, as with most adapters
    const at::Tensor hidden = leaf_there(torch["hidden"]);
    EXPECT_TRUE(is_close(loss_of({.weight_OI = there(torch["weight"]), .bias_O = {}, .adapter = {}}, hidden), torch["plain.loss"], {.relative = 1e-6}));
    EXPECT_TRUE(is_close(hidden.grad().cpu(), torch["plain.d_hidden"] * 3, {.absolute = 6e-5}));
  }
  {
    const at::Tensor hidden = leaf_there(torch["hidden"]), weight = leaf_there(torch["weight"]);
    EXPECT_TRUE(is_close(loss_of({.weight_OI = weight, .bias_O = {}, .adapter = {}}, hidden), torch["plain.loss"], {.relative = 1e-6}));
    EXPECT_TRUE(is_close(hidden.grad().cpu(), torch["plain.d_hidden"] * 3, {.absolute = 6e-5}));
    EXPECT_TRUE(is_close_to_scale(weight.grad().cpu(), torch["plain.d_weight"] * 3, 1e-5));
  }
  {
    const at::Tensor hidden = leaf_there(torch["hidden"]), weight = leaf_there(torch["weight"]), bias = leaf_there(torch["bias"]);
    EXPECT_TRUE(is_close(loss_of({.weight_OI = weight, .bias_O = bias, .adapter = {}}, hidden), torch["bias.loss"], {.relative = 1e-6}));
    EXPECT_TRUE(is_close_to_scale(weight.grad().cpu(), torch["bias.d_weight"] * 3, 1e-5));
    EXPECT_TRUE(is_close_to_scale(bias.grad().cpu(), torch["bias.d_bias"] * 3, 1e-5));
  }
  {
    models::Linear head{.weight_OI = there(torch["weight"]), .bias_O = {}, .adapter = models::Adapter{.a_RI = leaf_there(torch["a"]), .b_OR = leaf_there(torch["b"]), .magnitude_O = {}}};
    head.adapter->scale = std::stod(torch.metadata().at("scale"));
    const at::Tensor hidden = leaf_there(torch["hidden"]);
    EXPECT_TRUE(is_close(loss_of(head, hidden), torch["lora.loss"], {.relative = 1e-6}));
    EXPECT_TRUE(is_close(hidden.grad().cpu(), torch["lora.d_hidden"] * 3, {.absolute = 1e-4}));
    EXPECT_TRUE(is_close_to_scale(head.adapter->a_RI.grad().cpu(), torch["lora.d_a"] * 3, 1e-5));
    EXPECT_TRUE(is_close_to_scale(head.adapter->b_OR.grad().cpu(), torch["lora.d_b"] * 3, 1e-5));
  }
  const models::Linear head{.weight_OI = torch["weight"], .bias_O = {}, .adapter = {}}, far{.weight_OI = there(torch["weight"]), .bias_O = {}, .adapter = {}};
  const at::Tensor nats_K = cross_entropy_of_kept(there(torch["hidden"]), far, torch["targets"], torch["keep"]);
  EXPECT_TRUE(nats_K.is_cpu());
  EXPECT_TRUE(is_close(nats_K, cross_entropy_of_kept(torch["hidden"], head, torch["targets"], torch["keep"]), {.relative = 1e-5, .absolute = 1e-5}));
  EXPECT_EQ(cross_entropy_of_kept(there(torch["hidden"]), far, torch["targets"], at::zeros_like(torch["keep"])).numel(), 0);
  EXPECT_EQ(cross_entropy_sum(there(torch["hidden"]), far, torch["targets"], at::zeros_like(torch["keep"]), 1).item<double>(), 0);
}

/// Golden tensors that train there.
struct Parameters {
  explicit Parameters(const Golden& from) : golden(from) {
    for (const auto& [name, entry] : from.file().entries())
      if (name.starts_with("initial.")) tensors[name.substr(8)] = leaf_there(from[name]);
    for (auto& [name, tensor] : tensors) named.push_back({name, &tensor});
  }
  void step(Optimizer& optimizer, int number) {  // as in optimizer_test.cpp
    for (auto& [name, tensor] : tensors) {
      const at::Tensor base = golden["gradient." + name];
      tensor.mutable_grad() = there(at::roll(base.flatten(), 37 * number).view(base.sizes()) * (number % 3 == 0 ? 0.02 : 0.5));
    }
    optimizer.step(1e-2);
  }
  const Golden& golden;
  std::map<std::string, at::Tensor> tensors;
  std::vector<models::NamedTensor> named;
};

TEST(OptimizersThere, TwentyClippedStepsOfAdamwAgreeWithTorch) {
  const Golden torch("adamw.safetensors");
  SCOPED_TRACE(torch.provenance());
  const std::vector<std::string> names = {"layers.0.lora_A.weight", "layers.0.lora_B.weight", "embed_tokens.weight", "q_proj.bias", "input_layernorm.weight", "norm.weight"};
  std::vector<at::Tensor> parameters;
  for (const std::string& name : names) parameters.push_back(leaf_there(torch["initial." + name]));
  std::vector<models::NamedTensor> named;
  for (std::size_t i = 0; i < names.size(); ++i) named.push_back({names[i], &parameters[i]});
  const auto optimizer = make_optimizer(named, {.beta1 = 0.9, .beta2 = 0.98, .epsilon = 1e-7, .weight_decay = 0.1});
  const ScheduleConfig schedule{.shape = "cosine", .learning_rate = 1e-2, .warmup_steps = 3};
  for (int step = 0; step < 20; ++step) {
    for (std::size_t i = 0; i < names.size(); ++i) parameters[i].mutable_grad() = there(torch["gradient." + std::to_string(step) + "." + names[i]]);
    EXPECT_NEAR(clip_to_norm(optimizer->gradients(), 1.0), torch["norms"][step].item<double>(), 1e-6);
    optimizer->step(learning_rate_at(schedule, step, 20));
  }
  for (std::size_t i = 0; i < names.size(); ++i) EXPECT_TRUE(is_close(parameters[i].detach().cpu(), torch["final." + names[i]], {.relative = 1e-6, .absolute = 1e-6})) << names[i];
}

TEST(OptimizersThere, AdafactorAgreesWithTransformersAndMuonWithTorch) {
  const Golden adafactor("adafactor.safetensors"), muon("muon.safetensors");
  for (const bool scaled : {false, true}) {
    Parameters parameters(adafactor);
    const auto optimizer = make_optimizer(parameters.named, {.kind = "adafactor", .weight_decay = 0.1, .adafactor_scale_parameter = scaled});
    for (int step = 0; step < 20; ++step) parameters.step(*optimizer, step);
    for (const auto& [name, tensor] : parameters.tensors)
      EXPECT_TRUE(is_close(tensor.detach().cpu(), adafactor[(scaled ? "scaled." : "plain.") + name], {.relative = 2e-6, .absolute = 2e-6})) << name;
  }
  for (const auto& [products, type] : {std::pair{"bf16", std::optional<at::ScalarType>()}, std::pair{"f32", std::optional(at::kFloat)}}) {  // bf16 unless said otherwise
    Parameters parameters(muon);
    const OptimizerConfig config{.kind = "muon", .weight_decay = 0.1, .muon_momentum = 0.9};
    Muon optimizer(with_rates(parameters.named, config), config, type);
    for (int step = 0; step < 20; ++step) parameters.step(optimizer, step);
    for (const auto& [name, tensor] : parameters.tensors)
      EXPECT_TRUE(is_close(tensor.detach().cpu(), muon[std::string(products) + ".match_rms_adamw." + name], {.relative = 1e-6, .absolute = type ? 2e-6 : 4e-3})) << products << " " << name;
  }
}

TEST(OptimizersThere, NormsAreTheProcessorsAndWhatIsNotFiniteIsLeft) {
  std::vector<at::Tensor> here = {at::randn({200, 300}), at::randn({7}), at::randn({1})}, far;
  for (const at::Tensor& tensor : here) far.push_back(there(tensor));
  const std::vector<double> squares = squares_of(far), expected = squares_of(here);
  ASSERT_EQ(squares.size(), 4u + 1 + 1);  // 60,000 elements in pieces of 16,384
  ASSERT_EQ(squares.size(), expected.size());
  for (std::size_t i = 0; i < squares.size(); ++i) EXPECT_NEAR(squares[i], expected[i], 1e-12 * expected[i]) << i;
  EXPECT_NEAR(clip_to_norm(far, 0.5), clip_to_norm(here, 0.5), 1e-9);
  for (std::size_t i = 0; i < here.size(); ++i) EXPECT_TRUE(is_close(far[i].cpu(), here[i], {.relative = 2e-7}));
  for (const float bad : {1e20f, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    at::Tensor one = at::randn({4, 4});
    one[3][3] = bad;
    std::vector<at::Tensor> gradients = {there(one)};
    EXPECT_FALSE(std::isfinite(clip_to_norm(gradients, 1e-3))) << bad;
    EXPECT_TRUE(at::equal(gradients[0].cpu().nan_to_num(), one.nan_to_num())) << bad;
  }
}

TEST(OptimizersThere, EightBitsAreRefused) {
  at::Tensor weight = leaf_there(at::randn({70, 66}));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "adamw8bit computes on processors alone", [&] { make_optimizer({{"w", &weight}}, {.kind = "adamw8bit"}); }));
}

// ---- whole runs

struct Method {
  const char* name;
  std::function<void(TrainConfig&)> set;
  double tolerance = 2e-5;  // of losses and, relative to its largest element, of each trained tensor, after eight steps
  const char* model = "llama_tied";
};
void PrintTo(const Method& method, std::ostream* out) { *out << method.name; }

const Method kMethods[] = {
    {"Lora", [](TrainConfig&) {}},
    {"LoraDeterministic", [](TrainConfig& config) { config.deterministic = true; }},
    {"LoraSmoothed", [](TrainConfig& config) { config.loss = {.label_smoothing = 0.1, .z_loss = 1e-3}; }},
    {"LoraOnTheHead", [](TrainConfig& config) { config.lora.targets = {"q_proj", "lm_head"}; }},
    {"LoraBf16", [](TrainConfig& config) { config.compute_type = "bf16"; }, 2e-1},
    {"LoraInt8", [](TrainConfig& config) { config.quantize_base = "int8"; }},
    {"LoraInt8Bf16", [](TrainConfig& config) { config.quantize_base = "int8", config.compute_type = "bf16"; }, 2e-1},
    {"Dora", [](TrainConfig& config) { config.lora.dora = true; }},
    {"Pissa", [](TrainConfig& config) { config.lora.init = "pissa"; }, 1e-4},
    {"Olora", [](TrainConfig& config) { config.lora.init = "olora"; }, 1e-4},
    {"Restarts", [](TrainConfig& config) { config.lora.restart_every = 3, config.lora.restart_warmup_steps = 1; }, 1e-4},
    {"TokenRows", [](TrainConfig& config) { config.lora.trainable_tokens = {"3..9"}; }},
    {"SavedWhole", [](TrainConfig& config) { config.lora.modules_to_save = {"embed_tokens", "lm_head"}; }, 1e-4},
    {"Adafactor", [](TrainConfig& config) { config.optimizer.kind = "adafactor"; }, 1e-4},
    {"Full", [](TrainConfig& config) { config.method = "full", config.schedule.learning_rate = 1e-3; }, 1e-4},
    {"FullMuon", [](TrainConfig& config) { config.method = "full", config.optimizer.kind = "muon", config.schedule.learning_rate = 1e-3; }, 2e-2},
    {"FullUntied", [](TrainConfig& config) { config.method = "full", config.schedule.learning_rate = 1e-3; }, 1e-4, "llama_untied"},
    {"GemmaSoftCaps", [](TrainConfig&) {}, 1e-4, "gemma2"},
    {"GemmaWindows", [](TrainConfig&) {}, 1e-4, "gemma3"},
    {"Phi", [](TrainConfig&) {}, 1e-4, "phi3"},
};

TrainReport run_there(const TrainConfig& config, bool resume, const std::function<bool()>& stop_requested) {
  Recipe recipe = text_recipe(config);
  recipe.device = kPretendDevice;
  return run_recipe(config, resume, stop_requested, recipe);
}

std::vector<Json> metrics_of(const std::filesystem::path& run) {
  std::ifstream lines(run / "metrics.jsonl");
  std::vector<Json> all;
  for (std::string line; std::getline(lines, line);) all.push_back(parse_json(line, "metrics"));
  return all;
}

class MethodThere : public ::testing::TestWithParam<Method> {
 protected:
  TrainConfig config(const ScratchFolder& folder, const std::string& run) const {
    TrainConfig made = tiny_config(folder.path(), run);
    made.model = testing::golden_path(std::string("peft/") + GetParam().model);
    made.lora.dropout = 0;  // masks are others there
    made.limits.max_steps = 8;
    made.optimizer.max_grad_norm = 0.5;
    GetParam().set(made);
    return made;
  }
};
INSTANTIATE_TEST_SUITE_P(Methods, MethodThere, ::testing::ValuesIn(kMethods), [](const auto& test) { return std::string(test.param.name); });

TEST_P(MethodThere, LearnsWhatTheProcessorLearnsAndResumesToTheSameBits) {
  const ScratchFolder folder;
  const TrainConfig here = config(folder, "here"), far = config(folder, "there"), parts = config(folder, "parts");
  finetune(here, false, never);
  const std::int64_t before = testing::operators_run();
  EXPECT_EQ(run_there(far, false, never).steps, 8);
  EXPECT_GT(testing::operators_run() - before, 8 * 2 * 100);  // it was there

  const std::vector<Json> expected = metrics_of(here.output), got = metrics_of(far.output);
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    EXPECT_EQ(got[i]["kind"], expected[i]["kind"]);
    for (const char* figure : {"loss", "grad_norm"}) {
      if (!expected[i].contains(figure)) continue;
      const double wanted = expected[i][figure].get<double>();
      EXPECT_NEAR(got[i][figure].get<double>(), wanted, GetParam().tolerance * std::max(1.0, wanted)) << figure << " of line " << i;
    }
  }
  const checkpoints::SafetensorsFile expected_state(here.output / "checkpoint-8/state.safetensors"), state(far.output / "checkpoint-8/state.safetensors");
  ASSERT_EQ(state.entries().size(), expected_state.entries().size());
  for (const auto& [name, entry] : expected_state.entries())
    if (name.starts_with("weights.")) {
      EXPECT_TRUE(is_close_to_scale(state.tensor(name), expected_state.tensor(name), 10 * GetParam().tolerance)) << name;
    }

  // Stopped in the middle of a step, which then is made again.
  EXPECT_TRUE(fails_with(ErrorKind::kStopped, "after step 5 of 8", [&] { run_there(parts, false, [asked = 0]() mutable { return ++asked >= 5 * 3 + 2; }); }));
  EXPECT_EQ(run_there(parts, true, never).steps, 8);
  for (const char* file : {"metrics.jsonl", "checkpoint-8/state.safetensors"}) EXPECT_EQ(sha256_of_file(parts.output / file), sha256_of_file(far.output / file)) << file;
}

TEST(RunThere, DropoutAndNoiseResumeToTheSameBits) {
  const ScratchFolder folder;
  TrainConfig whole = tiny_config(folder.path(), "whole"), parts = tiny_config(folder.path(), "parts");
  for (TrainConfig* const config : {&whole, &parts}) config->limits.max_steps = 6, config->neftune_alpha = 5, config->lora.dropout = 0.2;
  run_there(whole, false, never);
  EXPECT_TRUE(fails_with(ErrorKind::kStopped, "after step 3 of 6", [&] { run_there(parts, false, [asked = 0]() mutable { return ++asked >= 3 * 3 + 2; }); }));
  run_there(parts, true, never);
  for (const char* file : {"metrics.jsonl", "checkpoint-6/state.safetensors"}) EXPECT_EQ(sha256_of_file(parts.output / file), sha256_of_file(whole.output / file)) << file;
  TrainConfig without = tiny_config(folder.path(), "without");
  without.limits.max_steps = 6, without.lora.dropout = 0;
  run_there(without, false, never);
  EXPECT_NE(sha256_of_file(without.output / "checkpoint-6/state.safetensors"), sha256_of_file(whole.output / "checkpoint-6/state.safetensors"));
}

TEST(RunThere, ACheckpointGoesOnOnTheProcessor) {
  const ScratchFolder folder;
  TrainConfig config = tiny_config(folder.path(), "run");
  config.limits.max_steps = 6, config.lora.dropout = 0;
  EXPECT_TRUE(fails_with(ErrorKind::kStopped, "after step 3 of 6", [&] { run_there(config, false, [asked = 0]() mutable { return ++asked >= 3 * 3 + 1; }); }));
  EXPECT_EQ(finetune(config, true, never).steps, 6);
}

TEST(RunThere, FusedBlocksAreRefused) {
  const ScratchFolder folder;
  TrainConfig config = tiny_config(folder.path(), "run");
  config.memory = "mlp";
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "memory: mlp needs the fused blocks, which cannot be used: the weights are not in the processor's memory", [&] { run_there(config, false, never); }));
}

TEST(StepThere, WaitsForTheDeviceOncePerMicroBatchAndForTheNorm) {
  models::Decoder decoder = checkpoints::load_decoder(testing::golden_path("peft/llama_tied"), at::kFloat);
  models::move_to(decoder, kPretendDevice);
  lora::attach(decoder, {.rank = 2, .alpha = 4, .dropout = 0.1}, 0);
  const auto optimizer = make_optimizer(lora::trainable(decoder), {});
  data::Batch batch;
  const std::int64_t tokens = 12;
  batch.tokens_T = at::arange(tokens, at::kLong), batch.positions_T = at::arange(tokens, at::kLong), batch.targets_T = at::arange(1, tokens + 1, at::kLong);
  batch.keep_T = at::ones({tokens}, at::kBool), batch.document_lengths = {tokens}, batch.num_kept = tokens;
  const LossSum loss_sum = [&](const data::Batch& each, std::uint64_t seed) {
    return cross_entropy_sum(decoder.hidden_TD(input_of(each, seed, 5)), decoder.head, each.targets_T, each.keep_T, seed);
  };
  const auto ranks = parallel::single();
  const std::vector<data::Batch> micro_batches = {batch, batch, batch};
  const std::int64_t before = testing::times_waited();
  EXPECT_TRUE(step(micro_batches, loss_sum, *optimizer, 1e-3, 1.0, 7, *ranks).applied);
  EXPECT_EQ(testing::times_waited() - before, 3 + 1);
}

// ---- ranks that share the base

/// The ranks of a test, which meet in the processor's memory, for tensors that lie elsewhere.
class Bounced : public parallel::Communicator {
 public:
  explicit Bounced(parallel::Communicator& ranks) : ranks_(ranks) {}
  int rank() const override { return ranks_.rank(); }
  int size() const override { return ranks_.size(); }
  void start_sum(std::span<at::Tensor> tensors, std::string_view what) override {
    for (at::Tensor& tensor : tensors) {
      at::Tensor here = tensor.cpu();
      ranks_.sum_in_place({&here, 1}, what);
      tensor.copy_(here);
    }
  }
  void start_reduce_scatter(std::span<const std::vector<at::Tensor>> parts, std::span<at::Tensor> own, std::string_view what) override {
    std::vector<std::vector<at::Tensor>> parts_here;
    std::vector<at::Tensor> own_here;
    for (const std::vector<at::Tensor>& part : parts) {
      parts_here.emplace_back();
      for (const at::Tensor& tensor : part) parts_here.back().push_back(tensor.cpu());
    }
    for (const at::Tensor& tensor : own) own_here.push_back(at::empty(tensor.sizes(), at::kFloat));
    ranks_.start_reduce_scatter(parts_here, own_here, what);
    ranks_.finish_sums(what);
    for (std::size_t i = 0; i < own.size(); ++i) own[i].copy_(own_here[i]);
  }
  void finish_sums(std::string_view what) override { ranks_.finish_sums(what); }
  at::Tensor all_gather(const at::Tensor& own, std::string_view what) override { return ranks_.all_gather(own.cpu(), what).to(own.device()); }
  std::unique_ptr<parallel::Gather> start_gather(const at::Tensor& all, const at::Tensor& own, int group, std::string_view what) override {
    EXPECT_EQ(all.device(), own.device());
    gathered_there += !all.is_cpu();
    return std::make_unique<Arriving>(ranks_, all, own.cpu(), group, what);
  }
  std::unique_ptr<parallel::Gather> start_exchange(const at::Tensor&, int, const at::Tensor&, int, std::string_view) override { throw std::logic_error("no exchange"); }
  void broadcast_in_place(std::span<at::Tensor> tensors, int root, std::string_view what) override {
    for (at::Tensor& tensor : tensors) {
      at::Tensor here = tensor.cpu();
      ranks_.broadcast_in_place({&here, 1}, root, what);
      tensor.copy_(here);
    }
  }
  void barrier(std::string_view what) override { ranks_.barrier(what); }
  void at_step(std::int64_t step) override { ranks_.at_step(step); }
  void check() override { ranks_.check(); }
  double seconds_in_calls() const override { return ranks_.seconds_in_calls(); }
  void tell_failure(std::string_view message) noexcept override { ranks_.tell_failure(message); }

  int gathered_there = 0;

 private:
  /// Writes where the parts are wanted at wait(), and not before: a reader that does not wait finds what was there.
  class Arriving : public parallel::Gather {
   public:
    Arriving(parallel::Communicator& ranks, const at::Tensor& all, const at::Tensor& own, int group, std::string_view what)
        : own_(own), all_(all), here_(at::empty(all.sizes(), own.options())), gather_(ranks.start_gather(here_, own_, group, what)) {}
    void wait() override {
      if (gather_) gather_->wait(), all_.copy_(here_), gather_.reset();
    }

   private:
    at::Tensor own_, all_, here_;
    std::unique_ptr<parallel::Gather> gather_;
  };
  parallel::Communicator& ranks_;
};

/// A folder of more blocks than are gathered at once: those of the golden, three times.
void write_deeper(const std::filesystem::path& folder) {
  const std::filesystem::path from = testing::golden_path("peft/llama_tied");
  std::filesystem::create_directories(folder);
  const checkpoints::SafetensorsFile weights(from / "model.safetensors");
  std::vector<std::pair<std::string, std::vector<std::int64_t>>> tensors;
  std::vector<at::Tensor> values;
  const auto add = [&](const std::string& name, const at::Tensor& tensor) { tensors.emplace_back(name, tensor.sizes().vec()), values.push_back(tensor); };
  for (const auto& [name, entry] : weights.entries()) {
    add(name, weights.tensor(name));
    for (const auto& [block, copies] : {std::pair{"layers.0.", std::array{"layers.2.", "layers.4."}}, {"layers.1.", std::array{"layers.3.", "layers.5."}}})
      if (const std::size_t place = name.find(block); place != name.npos)
        for (const char* copy : copies) add(std::string(name).replace(place, std::strlen(block), copy), weights.tensor(name));
  }
  checkpoints::write_weights(folder, tensors, at::kFloat, [&](std::size_t i) { return values[i]; }, 1 << 30);
  Json config = read_json_file(from / "config.json");
  config["num_hidden_layers"] = 6;
  config.erase("layer_types");
  write_file(folder / "config.json", to_line(config));
}

data::Batch batch_of(std::int64_t tokens, std::int64_t first, bool masked = false) {
  return {.tokens_T = at::arange(first, first + tokens), .positions_T = at::arange(tokens), .targets_T = at::arange(first + 1, first + tokens + 1),
          .keep_T = at::full({tokens}, !masked, at::kBool), .document_lengths = {tokens}, .origins = {}, .num_kept = masked ? 0 : tokens};
}

struct Kept {
  const char* name;
  at::ScalarType type;
  lora::BaseQuantization quantization;
  bool dora = false;
};

void PrintTo(const Kept& kept, std::ostream* out) { *out << kept.name; }

class BaseSharedThere : public ::testing::TestWithParam<Kept> {};
INSTANTIATE_TEST_SUITE_P(Kept, BaseSharedThere, ::testing::Values(Kept{"F32", at::kFloat, {}}, Kept{"Bf16", at::kBFloat16, {}}, Kept{"Int8", at::kFloat, {.format = "int8"}}, Kept{"Dora", at::kFloat, {}, true}),
                         [](const auto& test) { return std::string(test.param.name); });

// In one step a rank has nothing to learn from and goes through the blocks for the other alone.
TEST_P(BaseSharedThere, RanksLearnTheBitsOfRanksThatHoldAll) {
  const ScratchFolder scratch;
  const auto ends = testing::run_ranks(2, testing::kPatient, [&](parallel::Communicator& here) -> std::string {
    Bounced ranks(here);
    const std::filesystem::path folder = scratch / std::to_string(here.rank());
    write_deeper(folder);
    const auto learnt = [&](bool shares) {
      models::Decoder decoder = checkpoints::load_decoder(folder, GetParam().type, GetParam().quantization, checkpoints::Linears::kDense,
                                                          shares ? std::optional(checkpoints::Sharing{ranks, 2}) : std::nullopt);
      models::move_to(decoder, kPretendDevice);
      const lora::LoraConfig config{.rank = 2, .alpha = 4, .dropout = 0.1, .dora = GetParam().dora};
      lora::attach(decoder, config, 0);
      lora::initialise(decoder, config, 3);
      if (decoder.shards) decoder.shards->end_common_pass();
      const auto optimizer = make_optimizer(lora::trainable(decoder), {});
      const LossSum loss_sum = [&](const data::Batch& batch, std::uint64_t seed) { return cross_entropy_sum(decoder.hidden_TD(input_of(batch, seed)), decoder.head, batch.targets_T, batch.keep_T, seed); };
      for (int number = 0; number < 4; ++number) {
        const data::Batch batch = batch_of(9 + number, 20 * ranks.rank() + number, /*masked=*/number == 2 && ranks.rank() == 1);
        if (!step({&batch, 1}, loss_sum, *optimizer, 1e-2, 1.0, 7, ranks, {}, Order::kTree, {}, 1, decoder.shards.get()).applied) throw std::runtime_error("a step was not applied");
      }
      std::vector<at::Tensor> trained;
      for (const models::NamedTensor& tensor : lora::trainable(decoder)) trained.push_back(tensor.tensor->detach().cpu());
      return trained;
    };
    const std::vector<at::Tensor> whole = learnt(false);
    if (ranks.gathered_there != 0) return "ranks that hold all have gathered";
    const std::vector<at::Tensor> shared = learnt(true);
    if (ranks.gathered_there < 4 * 6) return "nothing was gathered there";
    for (std::size_t i = 0; i < whole.size(); ++i)
      if (!shared[i].equal(whole[i])) return "tensor " + std::to_string(i) + " differs";
    return whole[1].abs().max().item<double>() > 0 ? "" : "nothing was learnt";
  });
  testing::expect_all_fine(ends);
}

TEST(MomentsSharedThere, RanksThatShareMomentsLearnWhatRanksThatHoldAllLearn) {
  testing::expect_all_fine(testing::run_ranks(2, testing::kPatient, [&](parallel::Communicator& here) -> std::string {
    Bounced ranks(here);
    for (const double max_norm : {0.0, 0.3}) {
      const auto learnt = [&](bool shares) {
        models::Decoder decoder = checkpoints::load_decoder(testing::golden_path("peft/llama_tied"), at::kFloat);
        models::move_to(decoder, kPretendDevice);
        lora::train_everything(decoder);
        const auto optimizer = make_optimizer(lora::trainable(decoder), {}, shares ? &ranks : nullptr);
        const LossSum loss_sum = [&](const data::Batch& batch, std::uint64_t seed) { return cross_entropy_sum(decoder.hidden_TD(input_of(batch, seed)), decoder.head, batch.targets_T, batch.keep_T, seed); };
        for (int number = 0; number < 3; ++number) {
          const std::vector<data::Batch> batches = {batch_of(9 + number, 20 * ranks.rank()), batch_of(5, 3 + number)};
          if (!step(batches, loss_sum, *optimizer, 1e-3, max_norm, 7, ranks, {}, Order::kTree).applied) throw std::runtime_error("a step was not applied");
        }
        for (const auto& [name, moment] : optimizer->moments())
          if (moment.device() != kPretendDevice) throw std::runtime_error(name + " is elsewhere");
        std::vector<at::Tensor> result;
        for (const models::NamedTensor& tensor : lora::trainable(decoder)) result.push_back(tensor.tensor->detach().cpu());
        if (!shares) return result;
        const auto shared = optimizer->shared_moments();
        for (std::size_t i = 0; i < shared.size(); ++i)
          if (optimizer->gather_moment(i).abs().max().item<double>() == 0) throw std::runtime_error(shared[i].name + " is 0");
        return result;
      };
      const std::vector<at::Tensor> whole = learnt(false), shared = learnt(true);
      for (std::size_t i = 0; i < whole.size(); ++i)  // where nothing is clipped, by no norm's last bit
        if (!(max_norm == 0 ? ::testing::AssertionResult(shared[i].equal(whole[i])) : is_close_to_scale(shared[i], whole[i], 1e-6))) return "tensor " + std::to_string(i) + " differs";
    }
    return "";
  }));
}

// ---- which device

const parallel::Gpus kNone{.seen = {}, .memory = {}, .why_none = "this build has no CUDA"}, kTwo{.seen = {"NVIDIA H100", "NVIDIA H100"}, .memory = {80, 80}, .why_none = ""};

parallel::LaunchEnvironment place(int local_rank, int local_size) {
  parallel::LaunchEnvironment environment;
  environment.local_rank = local_rank, environment.local_size = local_size;
  return environment;
}

TEST(Device, AutoIsWhatThereIsAndCudaWithoutAGpuSaysWhy) {
  TrainConfig config;
  EXPECT_EQ(with_device(config, kNone).device, "cpu");
  EXPECT_EQ(with_device(config, kTwo).device, "cuda");
  config.device = "cpu";
  EXPECT_EQ(with_device(config, kTwo).device, "cpu");
  EXPECT_EQ(device_of(config, place(5, 8), kTwo), at::Device(at::kCPU));
  config.device = "cuda";
  EXPECT_EQ(with_device(config, kTwo).device, "cuda");
  EXPECT_TRUE(fails_with(ErrorKind::kResource, "device: cuda: there is no GPU: this build has no CUDA", [&] { with_device(config, kNone); }));
  EXPECT_EQ(compute_type_of(config), at::kBFloat16);
  config.compute_type = "f32";
  EXPECT_EQ(compute_type_of(config), at::kFloat);
  config.optimizer.kind = "adamw8bit";
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "adamw8bit computes on processors alone", [&] { with_device(config, kTwo); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "device: cuda: distill computes on processors alone", [&] { on_processor(config, "distill"); }));
  config.device = "auto";
  EXPECT_EQ(on_processor(config, "distill").device, "cpu");
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "device: auto has found a GPU", [&] { with_device(config, kTwo); }));
}

TEST(Device, EachRankOfAMachineHasItsOwn) {
  TrainConfig config;
  config.device = "cuda";
  EXPECT_EQ(device_of(config, {}, kTwo), at::Device(at::kCUDA, 0));
  EXPECT_EQ(device_of(config, place(1, 2), kTwo), at::Device(at::kCUDA, 1));
  EXPECT_TRUE(fails_with(ErrorKind::kResource, "3 ranks on this machine, but 2 GPUs", [&] { device_of(config, place(0, 3), kTwo); }));
  EXPECT_TRUE(fails_with(ErrorKind::kResource, "4 ranks on this machine, but 2 GPUs", [&] { device_of(config, place(3, 1), kTwo); }));
}

TEST(Device, OfThisMachineIsSaidBeforeAnythingIsLoaded) {
  if (!parallel::gpus().seen.empty()) GTEST_SKIP() << "this machine has a GPU";
  const ScratchFolder folder;
  TrainConfig config = tiny_config(folder.path(), "run");
  config.device = "cuda";
  EXPECT_TRUE(fails_with(ErrorKind::kResource, "device: cuda: there is no GPU: ", [&] { finetune(config, false, never); }));
}

}  // namespace
}  // namespace alambic::train

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  alambic::testing::register_pretend_device();
  alambic::set_log_sink([](alambic::LogLevel, std::string_view) {});
  return RUN_ALL_TESTS();
}
