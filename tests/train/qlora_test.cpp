// SPDX-License-Identifier: Apache-2.0
// Steps on an NF4 base against PEFT on bitsandbytes: tests/oracle/bitsandbytes_oracle.py.
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <gtest/gtest.h>

#include "checkpoints/hf_folder.h"
#include "lora/adapter.h"
#include "tests/closeness.h"
#include "tests/golden.h"
#include "models/fused_blocks.h"
#include "train/optimizer.h"

namespace alambic::train {
namespace {

using testing::Golden;
using testing::is_close;
using testing::is_close_to_scale;

class Qlora : public ::testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Bases, Qlora, ::testing::Values("nf4", "dense"), [](const auto& test) { return test.param; });

// The folder that transformers quantised, and the dense one quantised while it is loaded.
TEST_P(Qlora, StepsAreThoseOfPeftOnBitsandbytes) {
  const Golden peft("bitsandbytes/steps.safetensors");
  SCOPED_TRACE(peft.provenance());
  const bool dense = std::string(GetParam()) == "dense";
  models::Decoder decoder = checkpoints::load_decoder(testing::golden_path(std::string("bitsandbytes/") + GetParam()), at::kFloat,
                                                      dense ? lora::BaseQuantization{.format = "nf4"} : lora::BaseQuantization{});
  lora::attach(decoder, {.rank = 4, .alpha = 8}, 0);
  const std::vector<models::NamedTensor> trained = lora::trainable(decoder);
  ASSERT_EQ(trained.size(), 28u);
  {
    const at::NoGradGuard constant;
    for (const models::NamedTensor& named : trained) named.tensor->copy_(peft["initial." + named.name]);
  }
  const at::Tensor ids_BT = peft["ids"];
  const std::int64_t rows = ids_BT.size(0), length = ids_BT.size(1);
  const models::Input input{.tokens_T = ids_BT.flatten(), .positions_T = at::arange(length).repeat({rows}), .document_lengths = std::vector<std::int64_t>(static_cast<std::size_t>(rows), length)};
  const auto logits_BTV = [&] { return decoder.logits_TV(decoder.hidden_TD(input)).view({rows, length, -1}); };
  ASSERT_EQ(models::use_fused_blocks(decoder), "");
  const std::unique_ptr<Optimizer> optimizer = make_optimizer(trained, {.weight_decay = 0.01, .max_grad_norm = 0});
  const at::Tensor losses = peft["losses"];
  for (std::int64_t step = 0; step < losses.numel(); ++step) {
    const at::Tensor loss = at::cross_entropy_loss(logits_BTV().narrow(1, 0, length - 1).flatten(0, 1), ids_BT.narrow(1, 1, length - 1).flatten());
    loss.backward();
    EXPECT_TRUE(is_close(loss, losses[step].to(at::kFloat), {.relative = 1e-5})) << "step " << step;
    for (const models::NamedTensor& named : trained) {
      EXPECT_TRUE(step > 0 || is_close_to_scale(named.tensor->grad(), peft["grad." + named.name], 1e-5)) << named.name;
    }
    optimizer->step(1e-2);
  }
  for (const models::NamedTensor& named : trained) EXPECT_TRUE(is_close_to_scale(*named.tensor, peft["final." + named.name], 1e-4)) << named.name;
  const at::NoGradGuard evaluating;
  EXPECT_TRUE(is_close_to_scale(logits_BTV(), peft["adapted.logits"], 1e-4));
}

}  // namespace
}  // namespace alambic::train
