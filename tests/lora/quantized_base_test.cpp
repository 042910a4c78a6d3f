// SPDX-License-Identifier: Apache-2.0
// A quantised base computes, bit for bit, what a dense base with the de-quantised weights computes: values and gradients.
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/empty.h>
#include <gtest/gtest.h>

#include "core/random.h"
#include "lora/adapter.h"
#include "lora/quantize.h"
#include "models/fused_blocks.h"
#include "tests/models/tiny_model.h"
#include "tests/support.h"

namespace alambic::lora {
namespace {

using testing::decoder_of;
using testing::fails_with;
using testing::Golden;

at::Tensor uneven(at::IntArrayRef shape, std::uint64_t seed) {
  at::Tensor made = at::empty(shape, at::kFloat);
  for (std::int64_t i = 0; i < made.numel(); ++i)
    made.data_ptr<float>()[i] = static_cast<float>(mix64(seed + static_cast<std::uint64_t>(i)) >> 40) / 8388608.0f - 1.0f;
  return made;
}

const BaseQuantization kNf4{.format = "nf4"}, kInt8{.format = "int8"};

void quantize_blocks(models::Decoder& decoder, const BaseQuantization& quantization, at::ScalarType type) {
  for (const models::NamedLinear& named : decoder.linears()) {
    if (named.layer < 0) continue;
    named.linear->quantized = quantize(named.linear->weight_OI.detach().to(at::kFloat).contiguous(), quantization);
    named.linear->quantized_compute = type;
    named.linear->weight_OI = at::Tensor();
  }
}

void make_dense(models::Decoder& decoder) {
  for (const models::NamedLinear& named : decoder.linears()) {
    if (!named.linear->quantized) continue;
    named.linear->weight_OI = named.linear->dense_OI(named.linear->compute_type());
    named.linear->quantized = nullptr;
  }
}

struct Case {
  const char* name;
  bool dora;
  double dropout;
  at::ScalarType type;
};
class QuantizedLinear : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Cases, QuantizedLinear,
                         ::testing::Values(Case{"lora", false, 0, at::kFloat}, Case{"lora_dropout_bf16", false, 0.25, at::kBFloat16}, Case{"dora", true, 0, at::kFloat},
                                           Case{"dora_dropout", true, 0.25, at::kFloat}, Case{"dora_bf16", true, 0, at::kBFloat16}),
                         [](const auto& test) { return std::string(test.param.name); });

TEST_P(QuantizedLinear, EqualsADenseOneOfTheSameValues) {
  const Case& test = GetParam();
  constexpr std::int64_t kInputs = 70, kOutputs = 33;
  const auto adapter = [&](std::uint64_t id) {
    models::Adapter made{.a_RI = uneven({3, kInputs}, 2).requires_grad_(true), .b_OR = uneven({kOutputs, 3}, 3).requires_grad_(true), .magnitude_O = {}};
    if (test.dora) made.magnitude_O = uneven({kOutputs}, 4).requires_grad_(true);
    made.dropout = test.dropout;
    made.id = id;
    return made;
  };
  models::Linear narrow{.weight_OI = {}, .bias_O = uneven({kOutputs}, 5), .adapter = adapter(7)};
  narrow.quantized = quantize(uneven({kOutputs, kInputs}, 1), kNf4);
  narrow.quantized_compute = test.type;
  EXPECT_EQ(narrow.outputs(), kOutputs);
  EXPECT_EQ(narrow.inputs(), kInputs);
  EXPECT_EQ(narrow.compute_type(), test.type);
  const models::Linear wide{.weight_OI = narrow.dense_OI(test.type), .bias_O = narrow.bias_O, .adapter = adapter(7)};
  // Others that use the buffer between the forward and the backward pass: a larger one and a smaller one.
  models::Linear larger{.weight_OI = {}, .bias_O = {}, .adapter = {}}, smaller = larger;
  larger.quantized = quantize(uneven({100, 64}, 8), kInt8);
  smaller.quantized = quantize(uneven({3, 5}, 9), kNf4);

  const at::Tensor x_TI = uneven({6, kInputs}, 10), gradient_TO = uneven({6, kOutputs}, 11).to(test.type);
  const at::Tensor to_narrow = x_TI.clone().requires_grad_(true), to_wide = x_TI.clone().requires_grad_(true);
  const at::Tensor a = narrow(to_narrow, 99);
  larger(uneven({2, 64}, 12), 0);
  smaller(uneven({2, 5}, 13), 0);
  const at::Tensor b = wide(to_wide, 99);
  EXPECT_EQ(a.scalar_type(), test.type);
  EXPECT_TRUE(a.equal(b));
  a.backward(gradient_TO);
  b.backward(gradient_TO);
  EXPECT_TRUE(to_narrow.grad().equal(to_wide.grad()));
  EXPECT_TRUE(narrow.adapter->a_RI.grad().equal(wide.adapter->a_RI.grad()));
  EXPECT_TRUE(narrow.adapter->b_OR.grad().equal(wide.adapter->b_OR.grad()));
  if (test.dora) {
    EXPECT_TRUE(narrow.adapter->magnitude_O.grad().equal(wide.adapter->magnitude_O.grad()));
  }
}

TEST(QuantizedLinear, LivesAsLongAsItsBackwardPassNeeds) {
  models::Linear linear{.weight_OI = {}, .bias_O = {}, .adapter = {}};
  linear.quantized = quantize(uneven({5, 64}, 1), kNf4);
  const at::Tensor dense_OI = linear.dense_OI(at::kFloat), x_TI = uneven({2, 64}, 2).requires_grad_(true), gradient_TO = uneven({2, 5}, 3);
  const at::Tensor y_TO = linear(x_TI, 0);
  linear.quantized = nullptr;
  y_TO.backward(gradient_TO);
  EXPECT_TRUE(x_TI.grad().equal(gradient_TO.mm(dense_OI)));
}

TEST(QuantizedLinear, TheBufferIsReused) {
  const auto small = quantize(uneven({8, 64}, 1), kNf4), large = quantize(uneven({16, 64}, 2), kNf4);
  const void* const place = models::dense_in_buffer(*large, at::kFloat).const_data_ptr();
  EXPECT_EQ(models::dense_in_buffer(*small, at::kFloat).const_data_ptr(), place);
  EXPECT_EQ(models::dense_in_buffer(*large, at::kBFloat16).const_data_ptr(), place);
}

class QuantizedFamily : public ::testing::TestWithParam<std::string> {
 protected:
  QuantizedFamily() : golden_("families/" + GetParam() + ".safetensors") {}
  Golden golden_;
};
INSTANTIATE_TEST_SUITE_P(Families, QuantizedFamily, ::testing::ValuesIn(testing::family_goldens()), [](const auto& test) { return test.param; });

TEST_P(QuantizedFamily, TrainsAsADenseOneOfTheSameValues) {
  SCOPED_TRACE(golden_.provenance());
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16})
    for (const BaseQuantization& quantization : {kNf4, kInt8})
      for (const auto& [dora, fused] : {std::pair{false, false}, std::pair{true, false}, std::pair{false, true}}) {
        SCOPED_TRACE(name_of(quantization) + " " + toString(type) + (dora ? " dora" : "") + (fused ? " fused" : ""));
        models::Decoder narrow = decoder_of(golden_, type), wide = decoder_of(golden_, type), untouched = decoder_of(golden_, type);
        quantize_blocks(narrow, quantization, type);
        quantize_blocks(wide, quantization, type);
        make_dense(wide);
        EXPECT_EQ(narrow.compute_type(), type);
        LoraConfig config;
        config.rank = 4;
        config.dropout = 0.1;
        config.dora = dora;
        std::vector<at::Tensor> losses;
        for (models::Decoder* decoder : {&narrow, &wide, &untouched}) {
          attach(*decoder, config, 11);
          for (const models::NamedLinear& named : decoder->linears())
            if (named.linear->adapter) named.linear->adapter->b_OR.detach().copy_(uneven(named.linear->adapter->b_OR.sizes(), 3) * 0.1);
          if (fused) {
            ASSERT_EQ(models::use_fused_blocks(*decoder), "");
          }
          models::Input input = testing::input_of(golden_);
          input.dropout_seed = 5;
          const at::Tensor logits_TV = decoder->logits_TV(decoder->hidden_TD(input));
          losses.push_back((at::cross_entropy_loss(logits_TV, golden_["targets"], {}, 0) * golden_["weights"]).sum());
          losses.back().backward();
        }
        EXPECT_TRUE(losses[0].equal(losses[1]));
        EXPECT_FALSE(losses[0].equal(losses[2])) << "nothing was quantised";
        const auto narrow_trained = trainable(narrow), wide_trained = trainable(wide);
        ASSERT_EQ(narrow_trained.size(), wide_trained.size());
        for (std::size_t i = 0; i < narrow_trained.size(); ++i) {
          EXPECT_EQ(narrow_trained[i].name, wide_trained[i].name);
          EXPECT_TRUE(narrow_trained[i].tensor->grad().equal(wide_trained[i].tensor->grad())) << narrow_trained[i].name;
        }
      }
}

TEST_P(QuantizedFamily, EveryMemoryPolicyGivesTheSameBits) {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16})
    for (const BaseQuantization& quantization : {kNf4, kInt8}) {
      SCOPED_TRACE(name_of(quantization) + " " + toString(type));
      models::Decoder decoder = decoder_of(golden_, type);
      quantize_blocks(decoder, quantization, type);
      LoraConfig config;
      config.rank = 4;
      config.dropout = 0.25;
      attach(decoder, config, 11);
      for (const models::NamedLinear& named : decoder.linears())
        if (named.linear->adapter) named.linear->adapter->b_OR.detach().copy_(uneven(named.linear->adapter->b_OR.sizes(), 3) * 0.1);
      ASSERT_EQ(models::use_fused_blocks(decoder), "");
      models::Input input = testing::input_of(golden_);
      input.dropout_seed = 5;
      std::vector<at::Tensor> stored;
      for (const models::Keep keep : {models::Keep::kAll, models::Keep::kNoMlp, models::Keep::kInputs}) {
        decoder.keep = keep;
        const auto trained = trainable(decoder);
        for (const models::NamedTensor& one : trained) one.tensor->mutable_grad().reset();
        (at::cross_entropy_loss(decoder.logits_TV(decoder.hidden_TD(input)), golden_["targets"], {}, 0) * golden_["weights"]).sum().backward();
        for (std::size_t i = 0; i < trained.size(); ++i) {
          if (keep == models::Keep::kAll) stored.push_back(trained[i].tensor->grad().clone());
          EXPECT_GT(stored[i].abs().max().item<double>(), 0) << trained[i].name;
          EXPECT_TRUE(stored[i].equal(trained[i].tensor->grad())) << trained[i].name;
        }
      }
    }
}

TEST_P(QuantizedFamily, QuantisedWeightsAreNotTrainedThemselves) {
  models::Decoder decoder = decoder_of(golden_);
  quantize_blocks(decoder, kNf4, at::kFloat);
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "is quantised (nf4) and cannot be trained itself", [&] { train_everything(decoder); }));
  LoraConfig config;
  config.modules_to_save = {"mlp.down_proj"};
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "model.layers.0.mlp.down_proj is quantised and cannot be trained whole", [&] { attach(decoder, config, 1); }));
  config.modules_to_save = {"embed_tokens"};
  attach(decoder, config, 1);
  EXPECT_TRUE(decoder.embedding_VD.requires_grad());
}

}  // namespace
}  // namespace alambic::lora
