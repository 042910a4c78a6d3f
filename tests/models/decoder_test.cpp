// SPDX-License-Identifier: Apache-2.0
// Every family against transformers: tests/oracle/families_oracle.py.
#include "models/decoder.h"

#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/log_softmax.h>
#include <gtest/gtest.h>

#include <set>

#include "tests/closeness.h"
#include "tests/models/tiny_model.h"
#include "tests/support.h"

namespace alambic::models {
namespace {

using testing::decoder_of;
using testing::Golden;
using testing::input_of;
using testing::is_close;
using testing::is_close_to_scale;

at::Tensor loss_of(const Golden& golden, const at::Tensor& logits_TV) {
  return (at::cross_entropy_loss(logits_TV, golden["targets"], {}, 0) * golden["weights"]).sum();
}

class FamilyTest : public ::testing::TestWithParam<std::string> {
 protected:
  FamilyTest() : golden_("families/" + GetParam() + ".safetensors") {}
  Golden golden_;
};
INSTANTIATE_TEST_SUITE_P(Families, FamilyTest, ::testing::ValuesIn(testing::family_goldens()), [](const auto& test) { return test.param; });

TEST_P(FamilyTest, LogitsAndEveryGradientEqualTransformers) {
  SCOPED_TRACE(golden_.provenance());
  Decoder decoder = decoder_of(golden_);
  for (const NamedTensor& named : decoder.tensors()) named.tensor->requires_grad_(true);
  const at::Tensor logits_TV = decoder.logits_TV(decoder.hidden_TD(input_of(golden_)));
  EXPECT_TRUE(is_close_to_scale(logits_TV, golden_["logits"], 1e-5));
  loss_of(golden_, logits_TV).backward();
  std::size_t gradients = 0;
  for (const auto& [name, entry] : golden_.file().entries()) gradients += name.starts_with("grad.") ? 1 : 0;
  EXPECT_EQ(decoder.tensors().size(), gradients);
  for (const NamedTensor& named : decoder.tensors())
    EXPECT_TRUE(is_close_to_scale(named.tensor->grad(), golden_["grad." + named.name], 1e-5)) << named.name;
}

TEST_P(FamilyTest, NamesAndShapesAreThoseOfThePublishedWeights) {
  Decoder decoder = decoder_of(golden_);
  const auto shapes = expected_shapes(decoder.config);
  const auto tensors = decoder.tensors();
  ASSERT_EQ(shapes.size(), tensors.size());
  std::set<std::string> seen;
  std::int64_t parameters = 0;
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    EXPECT_EQ(shapes[i].first, tensors[i].name);
    EXPECT_EQ(at::IntArrayRef(shapes[i].second), golden_[shapes[i].first].sizes()) << shapes[i].first;
    EXPECT_TRUE(seen.insert(shapes[i].first).second) << shapes[i].first << " is listed twice";
    parameters += tensors[i].tensor->numel();
  }
  for (const auto& [name, entry] : golden_.file().entries())
    EXPECT_TRUE(!name.starts_with("grad.") || seen.contains(name.substr(5))) << name.substr(5) << " is not listed";
  EXPECT_EQ(decoder.config.num_parameters(), parameters);
  for (const NamedLinear& named : decoder.linears()) {
    EXPECT_TRUE(named.slot == Slot::kHead || seen.contains(named.path + ".weight")) << named.path;
    EXPECT_TRUE(named.linear->weight_OI.defined()) << named.path;
  }
  EXPECT_EQ(decoder.linears().back().slot, Slot::kHead);
}

TEST_P(FamilyTest, DocumentsDoNotSeeEachOther) {
  const at::NoGradGuard constant;
  const Decoder decoder = decoder_of(golden_);
  const Input both = input_of(golden_);
  const at::Tensor together_TD = decoder.hidden_TD(both);
  std::int64_t first = 0;
  for (const std::int64_t length : both.document_lengths) {
    Input one;
    one.tokens_T = both.tokens_T.narrow(0, first, length);
    one.positions_T = both.positions_T.narrow(0, first, length);
    one.document_lengths = {length};
    EXPECT_TRUE(is_close_to_scale(decoder.hidden_TD(one), together_TD.narrow(0, first, length), 1e-5));
    first += length;
  }
}

// The hidden states in bf16 differ from those in f32 by the rounding of about ten products a layer, 2^-8 each.
TEST_P(FamilyTest, Bf16IsNearF32) {
  const at::NoGradGuard constant;
  const Decoder wide = decoder_of(golden_), narrow = decoder_of(golden_, at::kBFloat16);
  const Input input = input_of(golden_);
  const at::Tensor hidden_TD = narrow.hidden_TD(input);
  EXPECT_EQ(hidden_TD.scalar_type(), at::kBFloat16);
  const at::Tensor expected_TV = wide.logits_TV(wide.hidden_TD(input)), logits_TV = narrow.logits_TV(hidden_TD);
  EXPECT_EQ(logits_TV.scalar_type(), at::kFloat);
  const double error = (logits_TV - expected_TV).norm().item<double>() / expected_TV.norm().item<double>();
  EXPECT_LT(error, 0.03);
  EXPECT_GT(error, 1e-4) << "suspiciously equal: was bf16 used?";
}

}  // namespace
}  // namespace alambic::models
