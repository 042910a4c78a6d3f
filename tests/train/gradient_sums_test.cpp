// SPDX-License-Identifier: Apache-2.0
#include "train/gradient_sums.h"

#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <tuple>

#include "lora/adapter.h"
#include "models/fused_blocks.h"
#include "tests/models/tiny_model.h"
#include "tests/support.h"
#include "train/cross_entropy.h"
#include "train/shared_optimizer.h"

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
  void start_reduce_scatter(std::span<const std::vector<at::Tensor>> parts, std::span<at::Tensor> own, std::string_view) override {
    if (on_start) on_start();
    for (std::size_t i = 0; i < own.size(); ++i) begun.push_back(own[i].copy_(parts[0].at(i)));
  }
  void finish_sums(std::string_view) override {
    for (at::Tensor& tensor : begun) tensor.mul_(2);
  }
  at::Tensor all_gather(const at::Tensor& own, std::string_view) override { return at::stack({own, own}); }
  std::unique_ptr<parallel::Gather> start_gather(const at::Tensor& all, const at::Tensor& own, int, std::string_view) override {
    struct Done : parallel::Gather {
      void wait() override {}
    };
    at::Tensor(all).copy_(own);
    return std::make_unique<Done>();
  }
  std::unique_ptr<parallel::Gather> start_exchange(const at::Tensor&, int, const at::Tensor&, int, std::string_view) override { return nullptr; }
  void broadcast_in_place(std::span<at::Tensor>, int, std::string_view) override {}
  void barrier(std::string_view) override {}
  void at_step(std::int64_t) override {}
  void check() override {}
  double seconds_in_calls() const override { return 0; }
  void tell_failure(std::string_view) noexcept override {}

  std::vector<at::Tensor> begun;
  std::function<void()> on_start;
};

class Sums : public ::testing::TestWithParam<std::tuple<bool, bool>> {};
INSTANTIATE_TEST_SUITE_P(Paths, Sums, ::testing::Combine(::testing::Bool(), ::testing::Bool()), [](const auto& paths) {
  return std::string(std::get<0>(paths.param) ? "Fused" : "Aten") + (std::get<1>(paths.param) ? "Full" : "Lora");
});

struct Model {
  testing::Golden golden{"families/llama_tied.safetensors"};
  models::Decoder decoder = testing::decoder_of(golden);
  std::unique_ptr<Optimizer> optimizer;

  explicit Model(bool fused, bool full, parallel::Communicator* shared_by = nullptr) {
    if (full) lora::train_everything(decoder);
    else lora::attach(decoder, {.rank = 3, .alpha = 6}, 1);
    EXPECT_EQ(fused ? models::use_fused_blocks(decoder) : "", "");
    optimizer = make_optimizer(lora::trainable(decoder), {}, shared_by);
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

/// What is alive of tensors that nobody here holds.
class Alive {
 public:
  void watch(const at::Tensor& tensor) { storages_.emplace_back(tensor.storage().getWeakStorageImpl()); }
  std::size_t bytes() const {
    std::size_t bytes = 0;
    for (const auto& weak : storages_)
      if (const auto storage = weak.lock()) bytes += storage->nbytes();
    return bytes;
  }

 private:
  std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> storages_;
};

TEST_P(Sums, ThatRanksShareFreeEachBlocksGradientsInTheBackwardPass) {
  const auto [fused, full] = GetParam();
  Model plain(fused, full);
  plain.backward();
  Twin ranks;
  Model shared(fused, full, &ranks);
  const std::vector<Trained>& trained = shared.optimizer->trained();
  Alive pending_alive;
  std::vector<Gradients> pending(2);
  std::vector<at::Tensor> expected;
  std::vector<std::int64_t> sizes;
  std::map<std::string, std::size_t> of_block;
  std::size_t in_blocks = 0, largest_block = 0, outside = 0;
  for (std::size_t i = 0; i < trained.size(); ++i) {
    for (Gradients& sums : pending) sums.push_back(at::randn(trained[i].tensor.sizes())), pending_alive.watch(sums.back());
    expected.push_back(2 * (pending[0][i] + (pending[1][i] + plain.optimizer->gradients()[i])).flatten());
    sizes.push_back(trained[i].tensor.numel());
    const std::string& name = trained[i].name;
    const std::size_t bytes = trained[i].tensor.nbytes();
    if (!is_in_block(name)) outside += bytes;
    else in_blocks += bytes, largest_block = std::max(largest_block, of_block[name.substr(0, name.find('.', name.find(".layers.") + 8))] += bytes);
  }
  const auto whole_bytes = [&] {
    std::size_t bytes = 0;
    for (const Trained& one : trained)
      if (one.tensor.grad().defined()) bytes += one.tensor.grad().nbytes();
    return bytes;
  };
  std::size_t most = 0;
  ranks.on_start = [&] { most = std::max(most, whole_bytes()); };
  GradientSums sums(*shared.optimizer, ranks, /*in_backward=*/true, /*bucket_bytes=*/1);
  sums.expect_last(std::move(pending));
  shared.backward();
  EXPECT_GT(most, 0u);
  EXPECT_LE(most, largest_block + outside);
  EXPECT_LT(largest_block, in_blocks);
  EXPECT_LE(whole_bytes(), outside);
  EXPECT_EQ(pending_alive.bytes(), 2 * outside);  // which wait for finish()
  sums.finish();
  EXPECT_EQ(whole_bytes(), 0u);
  EXPECT_EQ(pending_alive.bytes(), 0u);
  const std::vector<Slice> slices = slices_of(sizes, buckets_of(trained), 2)[0];
  const std::span<at::Tensor> own = shared.optimizer->sums();
  std::size_t k = 0, own_bytes = 0;
  for (std::size_t i = 0; i < trained.size(); ++i)
    if (slices[i].count > 0) {
      ASSERT_LT(k, own.size());
      own_bytes += own[k].nbytes();
      EXPECT_TRUE(own[k++].equal(expected[i].narrow(0, slices[i].first, slices[i].count))) << trained[i].name;
    }
  EXPECT_EQ(k, own.size());
  EXPECT_LT(own_bytes, (in_blocks + outside) * 3 / 4);
  shared.optimizer->step(1e-3);
  EXPECT_EQ(whole_bytes(), 0u);
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
