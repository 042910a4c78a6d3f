// SPDX-License-Identifier: Apache-2.0
#include "models/bf16_tiles.h"

#include <ATen/ops/equal.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

namespace alambic::models {
namespace {

struct Shape {
  std::int64_t M, N, K;
};
class Bf16Tiles : public testing::TestWithParam<Shape> {
 protected:
  void SetUp() override {
    if (!has_bf16_tiles()) GTEST_SKIP() << "this processor has no AVX512-BF16";
  }
};
INSTANTIATE_TEST_SUITE_P(Shapes, Bf16Tiles,
                         testing::Values(Shape{1, 1, 1}, Shape{32, 96, 64}, Shape{64, 96, 256}, Shape{37, 20, 7}, Shape{16, 16, 33}, Shape{23, 33, 2}, Shape{29, 49, 96}, Shape{7, 130, 15}, Shape{50, 64, 30}),
                         [](const auto& test) { return std::to_string(test.param.M) + "x" + std::to_string(test.param.N) + "x" + std::to_string(test.param.K); });

// Columns of wider rows; what stands beside them is not touched.
TEST_P(Bf16Tiles, ProductEqualsTheFormula) {
  const auto [M, N, K] = GetParam();
  const at::Tensor a = at::randn({M, K + 3}).to(at::kBFloat16), b = at::randn({K, N}).to(at::kBFloat16), before = at::randn({M, N + 2});
  const at::Tensor product = at::mm(a.narrow(1, 0, K).to(at::kDouble), b.to(at::kDouble));
  std::vector<Bf16Pair> pairs(static_cast<std::size_t>((K + 1) / 2 * N)), turned(pairs.size());
  pair_rows(b.const_data_ptr<at::BFloat16>(), N, pairs.data(), N, K, N);
  const at::Tensor bt = b.t().contiguous();
  pair_columns(bt.const_data_ptr<at::BFloat16>(), K, turned.data(), N, N, K);
  EXPECT_EQ(pairs, turned);
  for (const bool add : {false, true}) {
    const at::Tensor wide = before.clone(), narrow = before.to(at::kBFloat16);
    tile_product(M, N, K, a.const_data_ptr<at::BFloat16>(), K + 3, pairs.data(), N, wide.mutable_data_ptr<float>(), N + 2, add);
    tile_product(M, N, K, a.const_data_ptr<at::BFloat16>(), K + 3, pairs.data(), N, narrow.mutable_data_ptr<at::BFloat16>(), N + 2, add);
    const at::Tensor wanted = add ? product + before.narrow(1, 0, N).to(at::kDouble) : product;
    EXPECT_LT((wide.narrow(1, 0, N) - wanted).abs().max().item<double>(), 1e-6 * static_cast<double>(K + 4));
    const at::Tensor rounded = add ? product + before.narrow(1, 0, N).to(at::kBFloat16).to(at::kDouble) : product;
    EXPECT_LT(((narrow.narrow(1, 0, N).to(at::kDouble) - rounded).abs() - rounded.abs() / 256).max().item<double>(), 1e-6 * static_cast<double>(K + 4));
    EXPECT_TRUE(at::equal(wide.narrow(1, N, 2), before.narrow(1, N, 2)));
    EXPECT_TRUE(at::equal(narrow.narrow(1, N, 2), before.narrow(1, N, 2).to(at::kBFloat16)));
  }
}

TEST_P(Bf16Tiles, ProductOverRowsEqualsTheFormula) {
  const auto [M, N, K] = GetParam();
  const at::Tensor a = at::randn({K, M + 3}).to(at::kBFloat16), b = at::randn({K, N + 1}).to(at::kBFloat16), before = at::randn({M, N + 2});
  const at::Tensor product = at::mm(a.narrow(1, 0, M).t().to(at::kDouble), b.narrow(1, 0, N).to(at::kDouble));
  std::vector<Bf16Pair> pairs(static_cast<std::size_t>((K + 1) / 2 * M));
  pair_rows(a.const_data_ptr<at::BFloat16>(), M + 3, pairs.data(), M, K, M);
  for (const bool add : {false, true}) {
    const at::Tensor sum = before.clone();
    tile_product_over_rows(M, N, K, pairs.data(), M, b.const_data_ptr<at::BFloat16>(), N + 1, sum.mutable_data_ptr<float>(), N + 2, add);
    const at::Tensor wanted = add ? product + before.narrow(1, 0, N).to(at::kDouble) : product;
    EXPECT_LT((sum.narrow(1, 0, N) - wanted).abs().max().item<double>(), 1e-6 * static_cast<double>(K + 4));
    EXPECT_TRUE(at::equal(sum.narrow(1, N, 2), before.narrow(1, N, 2)));
  }
}

TEST(Bf16Pairs, RoundAsBf16IsRoundedElsewhere) {
  const at::Tensor from = at::randn({31, 45}) * 1e3, narrow = from.to(at::kBFloat16);
  std::vector<Bf16Pair> rounded(16 * 45), given(rounded.size());
  pair_rows(from.const_data_ptr<float>(), 45, rounded.data(), 45, 31, 45);
  pair_rows(narrow.const_data_ptr<at::BFloat16>(), 45, given.data(), 45, 31, 45);
  EXPECT_EQ(rounded, given);
}

}  // namespace
}  // namespace alambic::models
