// SPDX-License-Identifier: Apache-2.0
#include "lora/initialise.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/mm.h>

#include <cmath>

#include "checkpoints/hf_folder.h"
#include "lora/adapter.h"
#include "lora/merge.h"
#include "tests/closeness.h"
#include "tests/golden.h"
#include "tests/support.h"

namespace alambic::lora {
namespace {

using testing::fails_with;
using testing::Golden;
using testing::golden_path;
using testing::is_close;
using testing::is_close_to_scale;

models::Decoder tiny(at::ScalarType type = at::kFloat) { return checkpoints::load_decoder(golden_path("peft/llama_tied"), type); }

at::Tensor logits_of(const models::Decoder& decoder) {
  const at::NoGradGuard evaluating;
  const at::Tensor ids = at::arange(12);
  return decoder.logits_TV(decoder.hidden_TD({.tokens_T = ids, .positions_T = ids, .document_lengths = {12}}));
}

// tests/oracle/adapter_start_oracle.py: peft.get_peft_model on single weights, tall, wide and in bf16.
TEST(Initialise, TakesOutOfAWeightWhatPeftTakes) {
  const Golden peft("start/start.safetensors");
  SCOPED_TRACE(peft.provenance());
  constexpr std::int64_t kRank = 4;
  constexpr double kScale = 6.0 / 4;
  for (const std::string name : {"tall", "wide", "narrow"}) {
    const at::Tensor weight_OI = peft[name];
    for (const std::string init : {"pissa", "pissa_niter_3", "olora"}) {
      SCOPED_TRACE(name + " " + init);
      const std::string key = name + "." + init;
      const Factors factors = init == "olora"   ? olora_factors(weight_OI, kRank)
                              : init == "pissa" ? pissa_factors(weight_OI, kRank, kScale)
                                                : pissa_factors(weight_OI, peft[key + ".projection"], kScale, parse_init(init).iterations);
      // Where the base is bf16, PEFT rounds A and B to it after it took their product out; here they stay f32.
      const bool wide_type = weight_OI.scalar_type() == at::kFloat;
      EXPECT_TRUE(is_close_to_scale(factors.a_RI, peft[key + ".a"], wide_type ? 1e-5 : 4e-3));
      EXPECT_TRUE(is_close_to_scale(factors.b_OR, peft[key + ".b"], wide_type ? 1e-5 : 4e-3));
      const at::Tensor residual_OI = residual_weight(weight_OI, factors, kScale);
      EXPECT_EQ(residual_OI.scalar_type(), weight_OI.scalar_type());
      // In bf16 a last bit of f32 may decide the rounding.
      EXPECT_TRUE(is_close_to_scale(residual_OI, peft[key + ".residual"], wide_type ? 1e-6 : 8e-3));
      EXPECT_FALSE(is_close_to_scale(residual_OI, weight_OI, 0.05)) << "nothing was taken out";
    }
  }
}

// In a whole model: the same A and B as PEFT's by path, and W - scale B A below them, with patterns, rsLoRA and DoRA.
TEST(Initialise, OfAModelIsPeftsAndChangesNothingAtFirst) {
  const Golden peft("start/start.safetensors");
  struct Case {
    const char* name;
    LoraConfig config;
  };
  const Case cases[] = {
      {"pissa", {.rank = 4, .alpha = 8, .targets = {"q_proj", "down_proj"}, .init = "pissa"}},
      {"pissa_rslora", {.rank = 3, .alpha = 5, .targets = {"k_proj", "up_proj"}, .rslora = true, .init = "pissa"}},
      {"pissa_dora", {.rank = 4, .alpha = 4, .targets = {"v_proj", "gate_proj"}, .dora = true, .init = "pissa"}},
      {"pissa_patterns", {.rank = 4, .alpha = 8, .targets = {"q_proj", "o_proj"}, .rank_pattern = {{"o_proj", 2}}, .alpha_pattern = {{"0.self_attn.q_proj", 6}}, .init = "pissa"}},
      {"olora", {.rank = 4, .alpha = 8, .targets = {"q_proj", "down_proj"}, .init = "olora"}},
  };
  const at::Tensor before = logits_of(tiny());
  for (const Case& one : cases) {
    SCOPED_TRACE(one.name);
    models::Decoder decoder = tiny(), base = tiny();
    attach(decoder, one.config, 3);
    int compared = 0;
    auto bases = base.linears();
    const auto linears = decoder.linears();
    for (std::size_t i = 0; i < linears.size(); ++i) {
      if (!linears[i].linear->adapter) continue;
      const models::Adapter& adapter = *linears[i].linear->adapter;
      const std::string key = std::string(one.name) + "." + linears[i].path;
      EXPECT_TRUE(is_close_to_scale(adapter.a_RI, peft[key + ".lora_A"], 1e-5)) << key;
      EXPECT_TRUE(is_close_to_scale(adapter.b_OR, peft[key + ".lora_B"], 1e-5)) << key;
      EXPECT_TRUE(at::equal(adapter.initial_a_RI, adapter.a_RI) && !adapter.initial_a_RI.is_alias_of(adapter.a_RI));
      const at::Tensor& original_OI = bases[i].linear->weight_OI;
      EXPECT_TRUE(is_close_to_scale(linears[i].linear->weight_OI + at::mm(adapter.b_OR, adapter.a_RI) * adapter.scale, original_OI, 1e-6)) << key;
      EXPECT_FALSE(is_close_to_scale(linears[i].linear->weight_OI, original_OI, 0.05)) << key;
      if (one.config.dora) {
        EXPECT_TRUE(is_close(adapter.magnitude_O, original_OI.pow(2).sum(1).sqrt(), {.relative = 1e-5}));
      }
      ++compared;
    }
    EXPECT_EQ(compared, 4);
    EXPECT_TRUE(is_close_to_scale(logits_of(decoder), before, 1e-5));
  }
}

TEST(Initialise, TheFastVariantFindsTheSameSubspaceAndDrawsBySeedAndPath) {
  const auto product_of = [](const std::string& init, std::uint64_t seed) {
    models::Decoder decoder = tiny();
    attach(decoder, {.rank = 4, .alpha = 8, .targets = {"down_proj"}, .init = init}, seed);
    const models::Adapter& adapter = *decoder.blocks[1].linears.at(models::Slot::kDown).adapter;
    return at::mm(adapter.b_OR, adapter.a_RI).detach();
  };
  EXPECT_TRUE(is_close_to_scale(product_of("pissa_niter_200", 1), product_of("pissa", 1), 1e-4));
  EXPECT_TRUE(at::equal(product_of("pissa_niter_1", 1), product_of("pissa_niter_1", 1)));
  EXPECT_FALSE(is_close_to_scale(product_of("pissa_niter_1", 1), product_of("pissa_niter_1", 2), 1e-3));
  EXPECT_TRUE(at::equal(product_of("pissa", 1), product_of("pissa", 2)));
}

TEST(Initialise, GaussianAndFalseStartAsInPeft) {
  models::Decoder decoder = tiny();
  attach(decoder, {.rank = 48, .alpha = 8, .targets = {"down_proj"}, .init = "gaussian"}, 3);
  const models::Adapter& gaussian = *decoder.blocks[0].linears.at(models::Slot::kDown).adapter;
  EXPECT_NEAR(gaussian.a_RI.std().item<double>() * 48, 1, 0.05);
  EXPECT_NEAR(gaussian.a_RI.mean().item<double>() * 48, 0, 0.1);
  EXPECT_EQ(gaussian.b_OR.abs().max().item<double>(), 0);

  decoder = tiny();
  attach(decoder, {.rank = 48, .alpha = 8, .targets = {"down_proj"}, .dora = true, .init = "false"}, 3);
  const models::Linear& down = decoder.blocks[0].linears.at(models::Slot::kDown);
  const double bound_a = 1 / std::sqrt(24.0), bound_b = 1 / std::sqrt(48.0);
  EXPECT_GT(down.adapter->a_RI.abs().max().item<double>(), 0.98 * bound_a);
  EXPECT_LE(down.adapter->a_RI.abs().max().item<double>(), bound_a);
  EXPECT_GT(down.adapter->b_OR.abs().max().item<double>(), 0.98 * bound_b);
  EXPECT_LE(down.adapter->b_OR.abs().max().item<double>(), bound_b);
  EXPECT_TRUE(is_close(down.adapter->magnitude_O, models::adapted_row_norms(down.weight_OI, *down.adapter), {.relative = 1e-6}));
}

TEST(Initialise, ARestartDrawsAnew) {
  models::Decoder decoder = tiny();
  const LoraConfig config{.rank = 4, .alpha = 8, .targets = {"down_proj"}};
  attach(decoder, config, 3);
  models::Adapter& adapter = *decoder.blocks[0].linears.at(models::Slot::kDown).adapter;
  const at::Tensor first = adapter.a_RI.detach().clone();
  initialise(decoder, config, 3, 1);
  const at::Tensor second = adapter.a_RI.detach().clone();
  EXPECT_FALSE(at::equal(first, second));
  initialise(decoder, config, 3, 2);
  EXPECT_FALSE(at::equal(second, adapter.a_RI));
  initialise(decoder, config, 3);
  EXPECT_TRUE(at::equal(first, adapter.a_RI));
}

// W + scale (B A - B0 A0), also where the alpha of rsLoRA makes the scale.
TEST(Initialise, RelativeToTheBaseTheUpdateIsTheSame) {
  for (const bool rslora : {false, true}) {
    models::Decoder decoder = tiny();
    const LoraConfig config{.rank = 3, .alpha = 5, .targets = {"down_proj"}, .rslora = rslora, .init = "pissa"};
    attach(decoder, config, 3);
    models::Linear& down = decoder.blocks[0].linears.at(models::Slot::kDown);
    const at::NoGradGuard no_gradients;
    down.adapter->a_RI.add_(0.3);
    down.adapter->b_OR.mul_(1.2);
    const Factors factors = relative_to_base(down.adapter->a_RI, down.adapter->b_OR, {down.adapter->initial_a_RI, down.adapter->initial_b_OR});
    const LoraConfig ordinary = relative_to_base(config);
    EXPECT_EQ(ordinary.rank, 6);
    models::Decoder published = tiny();
    attach(published, ordinary, 3);
    models::Linear& same = published.blocks[0].linears.at(models::Slot::kDown);
    EXPECT_NEAR(same.adapter->scale, down.adapter->scale, 1e-12);
    same.adapter->a_RI.copy_(factors.a_RI);
    same.adapter->b_OR.copy_(factors.b_OR);
    EXPECT_TRUE(is_close_to_scale(merged_weight(same.weight_OI, *same.adapter), merged_weight(down.weight_OI, *down.adapter), 1e-6));
  }
}

TEST(Initialise, RefusesWhatCannotStart) {
  models::Decoder decoder = tiny();
  const auto refused = [&](const std::string& words, const LoraConfig& config) { return fails_with(ErrorKind::kUsage, words, [&] { attach(decoder, config, 1); }); };
  EXPECT_TRUE(refused("did you mean \"pissa\"?", {.init = "pisa"}));
  EXPECT_TRUE(refused("from 0 to 1000", {.init = "pissa_niter_"}));
  EXPECT_TRUE(refused("from 0 to 1000", {.init = "pissa_niter_-1"}));
  EXPECT_TRUE(refused("from 0 to 1000", {.init = "pissa_niter_99999999999999999999"}));
  EXPECT_TRUE(refused("k_proj needs a rank of at most 8", {.rank = 9, .alpha = 8, .targets = {"k_proj"}, .init = "olora"}));
  EXPECT_TRUE(refused("tied to the embedding", {.rank = 4, .alpha = 8, .targets = {"lm_head"}, .init = "pissa"}));
  for (const models::NamedLinear& linear : decoder.linears()) EXPECT_FALSE(linear.linear->adapter);
}

}  // namespace
}  // namespace alambic::lora
