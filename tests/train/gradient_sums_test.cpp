// SPDX-License-Identifier: Apache-2.0
#include "train/gradient_sums.h"

#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <tuple>

#include "lora/adapter.h"
#include "models/fused_blocks.h"
#include "tests/models/tiny_model.h"
#include "tests/support.h"
#include "train/cross_entropy.h"

namespace alambic::train {
namespace {

/// Rank 0 of two, of which the other has the same gradients. It notes which sums begin.
class Twin : public parallel::Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 2; }
  void start_sum(std::span<at::Tensor> tensors, std::string_view) override {
    for (const at::Tensor& tensor : tensors) begun.push_back(tensor);
  }
  void finish_sums(std::string_view) override {
    for (at::Tensor& tensor : begun) tensor.mul_(2);
  }
  at::Tensor all_gather(const at::Tensor& own, std::string_view) override { return own; }
  std::unique_ptr<parallel::Gather> start_gather(const at::Tensor&, const at::Tensor&, int, std::string_view) override { return nullptr; }
  std::unique_ptr<parallel::Gather> start_exchange(const at::Tensor&, int, const at::Tensor&, int, std::string_view) override { return nullptr; }
  at::Tensor reduce_scatter(const at::Tensor& parts, std::string_view) override { return parts; }
  void broadcast_in_place(std::span<at::Tensor>, int, std::string_view) override {}
  void barrier(std::string_view) override {}
  void at_step(std::int64_t) override {}
  void check() override {}
  double seconds_in_calls() const override { return 0; }
  void tell_failure(std::string_view) noexcept override {}

  std::vector<at::Tensor> begun;
};

class Sums : public ::testing::TestWithParam<std::tuple<bool, bool>> {};
INSTANTIATE_TEST_SUITE_P(Paths, Sums, ::testing::Combine(::testing::Bool(), ::testing::Bool()), [](const auto& paths) {
  return std::string(std::get<0>(paths.param) ? "Fused" : "Aten") + (std::get<1>(paths.param) ? "Full" : "Lora");
});

struct Model {
  testing::Golden golden{"families/llama_tied.safetensors"};
  models::Decoder decoder = testing::decoder_of(golden);
  std::unique_ptr<Optimizer> optimizer;

  explicit Model(bool fused, bool full) {
    if (full) lora::train_everything(decoder);
    else lora::attach(decoder, {.rank = 3, .alpha = 6}, 1);
    EXPECT_EQ(fused ? models::use_fused_blocks(decoder) : "", "");
    optimizer = make_optimizer(lora::trainable(decoder), {});
  }
  void backward() {
    const at::Tensor hidden_TD = decoder.hidden_TD(testing::input_of(golden));
    const at::Tensor targets_T = golden["tokens"].roll(1);
    cross_entropy_sum(hidden_TD, decoder.head, targets_T, targets_T >= 0, 0, {}).backward();
  }
};

TEST_P(Sums, BeginInTheBackwardPassAndHaveItsGradients) {
  const auto [fused, full] = GetParam();
  Model plain(fused, full), summed(fused, full);
  plain.backward();
  const std::vector<Trained>& trained = summed.optimizer->trained();
  Twin ranks;
  std::vector<Gradients> pending(2);
  for (Gradients& sums : pending)
    for (const Trained& one : trained) sums.push_back(at::randn(one.tensor.sizes()));
  std::vector<at::Tensor> expected;
  std::vector<std::size_t> order;  // of the sums
  for (const bool of_blocks : {true, false})
    for (std::size_t i = trained.size(); i-- > 0;)
      if (is_in_block(trained[i].name) == of_blocks) order.push_back(i);
  const auto in_blocks = static_cast<std::size_t>(std::count_if(trained.begin(), trained.end(), [](const Trained& one) { return is_in_block(one.name); }));
  for (std::size_t i = 0; i < trained.size(); ++i) expected.push_back(2 * (pending[0][i] + (pending[1][i] + plain.optimizer->gradients()[i])));
  {
    GradientSums sums(*summed.optimizer, ranks, /*in_backward=*/true, /*bucket_bytes=*/1);
    sums.expect_last(pending);
    summed.backward();
    EXPECT_EQ(ranks.begun.size(), in_blocks);  // the others may get more than one gradient in a pass
    sums.finish();
  }
  ASSERT_EQ(ranks.begun.size(), trained.size());
  for (std::size_t i = 0; i < trained.size(); ++i) {
    EXPECT_TRUE(summed.optimizer->gradients()[i].equal(expected[i])) << trained[i].name;
    EXPECT_TRUE(ranks.begun[i].is_same(trained[order[i]].tensor.grad())) << "sum " << i;
  }
}

TEST_P(Sums, OfATensorThatGetsAnotherGradientAreRefused) {
  const auto [fused, full] = GetParam();
  Model model(fused, full);
  Twin ranks;
  GradientSums sums(*model.optimizer, ranks, /*in_backward=*/true);
  sums.expect_last({});
  model.backward();
  EXPECT_TRUE(testing::fails_with(ErrorKind::kBug, "two backward passes through ", [&] { model.backward(); }));
}

}  // namespace
}  // namespace alambic::train
