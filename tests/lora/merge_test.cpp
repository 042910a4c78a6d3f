// SPDX-License-Identifier: Apache-2.0
#include "lora/merge.h"

#include <ATen/ops/linear.h>

#include "tests/closeness.h"
#include "tests/golden.h"

namespace alambic::lora {
namespace {

using testing::Golden;
using testing::is_close;

class MergeAgreesWithPeft : public ::testing::TestWithParam<const char*> {};

TEST_P(MergeAgreesWithPeft, ElementByElement) {  // PEFT's merge_and_unload(): tests/oracle/peft_merge_oracle.py
  const Golden peft("peft_merge.safetensors");
  SCOPED_TRACE(peft.provenance());
  const std::string name = std::string(GetParam()) + ".";
  const auto optional = [&](const std::string& key) { return peft.file().entries().contains(name + key) ? peft[name + key] : at::Tensor(); };
  const models::Adapter adapter{.a_RI = peft[name + "a_RI"], .b_OR = peft[name + "b_OR"], .magnitude_O = optional("magnitude_O"),
                                .scale = peft[name + "scale"].item<double>()};
  const at::Tensor merged_OI = merged_weight(peft[name + "base_OI"], adapter);
  EXPECT_EQ(merged_OI.scalar_type(), at::kFloat);
  EXPECT_TRUE(is_close(merged_OI, peft[name + "merged_OI"], {.relative = 1e-6, .absolute = 1e-6}));
  EXPECT_FALSE(is_close(merged_OI, peft[name + "base_OI"], {.absolute = 1e-2})) << "the adapter changes nothing: the test would pass without merging";
  // Equal weights could still be the wrong weights: the merged layer must compute what the adapted one did.
  const at::Tensor bias_O = optional("bias_O");
  const at::Tensor y_TO = at::linear(peft[name + "x_TI"], merged_OI, bias_O.defined() ? std::optional(bias_O) : std::nullopt);
  EXPECT_TRUE(is_close(y_TO, peft[name + "adapted_y_TO"], {.relative = 1e-5, .absolute = 1e-5}));
  // And so must our own Linear with the adapter still apart.
  const models::Linear linear{.weight_OI = peft[name + "base_OI"], .bias_O = bias_O, .adapter = adapter};
  EXPECT_TRUE(is_close(linear(peft[name + "x_TI"], 0), peft[name + "adapted_y_TO"], {.relative = 1e-5, .absolute = 1e-5}));
}

INSTANTIATE_TEST_SUITE_P(Variants, MergeAgreesWithPeft,
                         ::testing::Values("lora", "lora.bias", "lora_alpha_below_rank", "rslora", "rslora.bias", "dora", "dora.bias",
                                           "dora_rslora", "dora_rslora.bias", "rank_one", "rank_above_size"),
                         [](const auto& test) {
                           std::string name = test.param;
                           for (char& letter : name)
                             if (letter == '.') letter = '_';
                           return name;
                         });

TEST(Merge, OfABf16BaseIsComputedInF32) {
  const Golden peft("peft_merge.safetensors");
  const at::Tensor base_OI = peft["lora.base_OI"].to(at::kBFloat16);
  const models::Adapter adapter{.a_RI = peft["lora.a_RI"], .b_OR = peft["lora.b_OR"], .magnitude_O = {}, .scale = 2};
  const at::Tensor merged_OI = merged_weight(base_OI, adapter);
  EXPECT_EQ(merged_OI.scalar_type(), at::kFloat);
  EXPECT_TRUE(is_close(merged_OI - base_OI.to(at::kFloat), peft["lora.merged_OI"] - peft["lora.base_OI"], {.absolute = 1e-6}));
}

}  // namespace
}  // namespace alambic::lora
