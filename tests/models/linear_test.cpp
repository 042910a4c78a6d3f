// SPDX-License-Identifier: Apache-2.0
// Linear against PEFT (tests/oracle/lora_linear_oracle.py) and against plain autograd.
#include "models/linear.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <gtest/gtest.h>

#include "core/error.h"
#include "core/random.h"
#include "tests/closeness.h"
#include "tests/golden.h"
#include "tests/support.h"

namespace alambic::models {
namespace {

using testing::fails_with;
using testing::Golden;
using testing::is_close;
using testing::is_close_to_scale;

constexpr std::uint64_t kDropoutSeed = 77, kAdapterId = 3;  // those of the oracle

// Numbers of both signs without a generator: reproducible and uneven.
at::Tensor uneven(at::IntArrayRef shape, std::uint64_t seed) {
  at::Tensor made = at::empty(shape, at::kFloat);
  for (std::int64_t i = 0; i < made.numel(); ++i)
    made.data_ptr<float>()[i] = static_cast<float>(mix64(seed + static_cast<std::uint64_t>(i)) >> 40) / 8388608.0f - 1.0f;
  return made;
}

class PeftLinear : public ::testing::TestWithParam<const char*> {
 protected:
  at::Tensor part(const std::string& name) const { return golden_[GetParam() + ("." + name)]; }
  bool has(const std::string& name) const { return golden_.file().entries().contains(GetParam() + ("." + name)); }
  at::Tensor leaf(const std::string& name, at::ScalarType type = at::kFloat) const {
    return has(name) ? part(name).to(type, false, true).requires_grad_(true) : at::Tensor();
  }
  Linear linear() const {
    Linear made{.weight_OI = leaf("weight"), .bias_O = leaf("bias"), .adapter = Adapter{.a_RI = leaf("a"), .b_OR = leaf("b"), .magnitude_O = leaf("magnitude")}};
    made.adapter->scale = part("scale").item<double>();
    made.adapter->dropout = part("dropout").item<double>();
    made.adapter->id = kAdapterId;
    return made;
  }
  Golden golden_{"lora_linear.safetensors"};
};
INSTANTIATE_TEST_SUITE_P(Cases, PeftLinear, ::testing::Values("lora", "lora_bias_dropout", "dora_bias", "dora_bias_dropout"),
                         [](const auto& test) { return std::string(test.param); });

TEST_P(PeftLinear, ValueAndEveryGradientEqualPefts) {
  SCOPED_TRACE(golden_.provenance());
  const Linear made = linear();
  const at::Tensor x_TI = leaf("x");
  const at::Tensor y_TO = made(x_TI, kDropoutSeed);
  EXPECT_TRUE(is_close(y_TO, part("y"), {.relative = 1e-5, .absolute = 1e-6}));
  y_TO.backward(part("grad.y"));
  EXPECT_TRUE(is_close_to_scale(x_TI.grad(), part("grad.x"), 1e-6)) << "x";
  EXPECT_TRUE(is_close_to_scale(made.weight_OI.grad(), part("grad.weight"), 1e-6)) << "weight";
  EXPECT_TRUE(is_close_to_scale(made.adapter->a_RI.grad(), part("grad.a"), 1e-6)) << "a";
  EXPECT_TRUE(is_close_to_scale(made.adapter->b_OR.grad(), part("grad.b"), 1e-6)) << "b";
  EXPECT_EQ(made.bias_O.defined(), has("bias"));
  if (has("bias")) {
    EXPECT_TRUE(is_close_to_scale(made.bias_O.grad(), part("grad.bias"), 1e-6)) << "bias";
  }
  EXPECT_EQ(made.adapter->magnitude_O.defined(), has("magnitude"));
  if (has("magnitude")) {
    EXPECT_TRUE(is_close_to_scale(made.adapter->magnitude_O.grad(), part("grad.magnitude"), 1e-6)) << "magnitude";
  }
}

TEST_P(PeftLinear, FrozenPartsGetNoGradientAndChangeNoOther) {
  const Linear made = linear();
  made.weight_OI.requires_grad_(false);
  if (made.bias_O.defined()) made.bias_O.requires_grad_(false);
  const at::Tensor x_TI = part("x");  // needs no gradient: the lowest trained layer of a model
  made(x_TI, kDropoutSeed).backward(part("grad.y"));
  EXPECT_FALSE(made.weight_OI.grad().defined());
  EXPECT_TRUE(is_close_to_scale(made.adapter->a_RI.grad(), part("grad.a"), 1e-6));
  EXPECT_TRUE(is_close_to_scale(made.adapter->b_OR.grad(), part("grad.b"), 1e-6));
  if (has("magnitude")) {
    EXPECT_TRUE(is_close_to_scale(made.adapter->magnitude_O.grad(), part("grad.magnitude"), 1e-6));
  }
}

TEST_P(PeftLinear, Bf16KeepsF32GradientsOfTheAdapter) {
  Linear made = linear();
  made.weight_OI = made.weight_OI.detach().to(at::kBFloat16);
  const at::Tensor x_TI = leaf("x", at::kBFloat16);
  const at::Tensor y_TO = made(x_TI, kDropoutSeed);
  EXPECT_EQ(y_TO.scalar_type(), at::kBFloat16);
  EXPECT_TRUE(is_close_to_scale(y_TO, part("y"), 0.02));
  y_TO.backward(part("grad.y").to(at::kBFloat16));
  EXPECT_EQ(made.adapter->a_RI.grad().scalar_type(), at::kFloat);
  EXPECT_TRUE(is_close_to_scale(made.adapter->a_RI.grad(), part("grad.a"), 0.02));
  EXPECT_TRUE(is_close_to_scale(made.adapter->b_OR.grad(), part("grad.b"), 0.02));
  EXPECT_TRUE(is_close_to_scale(x_TI.grad(), part("grad.x"), 0.02));
}

TEST(Linear, WithoutAnythingTrainedThereIsNoGraph) {
  const Linear frozen{.weight_OI = uneven({4, 3}, 1), .bias_O = {}, .adapter = {}};
  EXPECT_FALSE(frozen(uneven({2, 3}, 2), 0).requires_grad());
}

TEST(Linear, EvaluatingIgnoresDropout) {
  Linear made{.weight_OI = uneven({4, 8}, 1), .bias_O = {}, .adapter = Adapter{.a_RI = uneven({2, 8}, 2), .b_OR = uneven({4, 2}, 3), .magnitude_O = {}}};
  const at::Tensor x_TI = uneven({5, 8}, 4), plain_TO = made(x_TI, 9);
  made.adapter->dropout = 0.5;
  EXPECT_TRUE(made(x_TI, 0).equal(plain_TO));
  EXPECT_FALSE(made(x_TI, 9).equal(plain_TO));
  EXPECT_TRUE(made(x_TI, 9).equal(made(x_TI, 9)));
  EXPECT_FALSE(made(x_TI, 9).equal(made(x_TI, 10)));
}

TEST(Dropout, DropsTheShareItShouldAndKeepsTheMean) {
  const at::Tensor x_TI = at::ones({1000, 997});
  const at::Tensor y_TI = with_dropout(x_TI, 0.1, 5);
  const double dropped = (y_TI == 0).sum().item<double>() / static_cast<double>(y_TI.numel());
  EXPECT_NEAR(dropped, 0.1, 5 * std::sqrt(0.09 / 997000));  // five standard deviations
  EXPECT_TRUE(is_close(y_TI.max(), at::ones({}) / 0.9, {.relative = 1e-6}));
  EXPECT_TRUE(with_dropout(x_TI, 0, 5).equal(x_TI));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "dropout must be at least 0 and below 1", [&] { with_dropout(x_TI, 1, 5); }));
}

}  // namespace
}  // namespace alambic::models
