// SPDX-License-Identifier: Apache-2.0
#include "train/adamw.h"

#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include "tests/closeness.h"
#include "tests/golden.h"
#include "tests/support.h"
#include "train/schedule.h"

namespace alambic::train {
namespace {

using testing::Golden;
using testing::is_close;

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
  AdamW optimizer(named, {.beta1 = 0.9, .beta2 = 0.98, .epsilon = 1e-7, .weight_decay = 0.1});
  const ScheduleConfig schedule{.shape = "cosine", .learning_rate = 1e-2, .warmup_steps = 3};
  for (int step = 0; step < 20; ++step) {
    for (std::size_t i = 0; i < kNames.size(); ++i) parameters[i].mutable_grad() = torch["gradient." + std::to_string(step) + "." + kNames[i]].clone();
    EXPECT_NEAR(clip_to_norm(optimizer.gradients(), 1.0), torch["norms"][step].item<double>(), 1e-5);
    optimizer.step(learning_rate_at(schedule, step, 20));
  }
  for (std::size_t i = 0; i < kNames.size(); ++i)
    EXPECT_TRUE(is_close(parameters[i], torch["final." + kNames[i]], {.relative = 1e-6, .absolute = 1e-6})) << kNames[i];
}

TEST(AdamW, StateMovesToAnotherAndRefusesWhatDoesNotFit) {
  at::Tensor one = at::randn({3, 2}).requires_grad_(true), other = at::randn({3, 2}).requires_grad_(true);
  AdamW first({{"w", &one}}, {}), second({{"w", &other}}, {});
  one.mutable_grad() = at::randn({3, 2});
  first.step(0.1);
  second.restore(first.state(), first.num_steps());
  EXPECT_TRUE(other.detach().equal(one.detach()));
  EXPECT_EQ(second.num_steps(), 1);
  one.mutable_grad() = at::ones_like(one.detach());
  other.mutable_grad() = at::ones_like(one.detach());
  first.step(0.1);
  second.step(0.1);
  EXPECT_TRUE(other.detach().equal(one.detach()));
  at::Tensor narrow = at::randn({3, 1}).requires_grad_(true);
  AdamW third({{"w", &narrow}}, {}), fourth({{"v", &narrow}}, {});
  EXPECT_TRUE(testing::fails_with(ErrorKind::kData, "another shape or type of weights.w", [&] { third.restore(first.state(), 1); }));
  EXPECT_TRUE(testing::fails_with(ErrorKind::kData, "unknown weights.w", [&] { fourth.restore(first.state(), 1); }));
}

TEST(AdamW, NothingToTrainIsRefused) {
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, "nothing trains", [] { AdamW({}, {}); }));
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
