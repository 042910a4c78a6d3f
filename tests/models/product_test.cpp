// SPDX-License-Identifier: Apache-2.0
#include "models/product.h"

#include <ATen/Parallel.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include "models/bf16_tiles.h"

namespace alambic::models {
namespace {

struct Shape {
  std::int64_t T, M, N;
};
class ProductOverRows : public testing::TestWithParam<Shape> {};

// Columns of wider rows, as adapters have them, summed in f64 by ATen.
TEST_P(ProductOverRows, IsTheTransposedProduct) {
  const auto [T, M, N] = GetParam();
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    const at::Tensor a = at::randn({T, M + 5}).to(type).narrow(1, 3, M), b = at::randn({T, N + 7}).to(type).narrow(1, 2, N);
    const at::Tensor ours = product_over_rows(a, b), wanted = at::mm(a.to(at::kDouble).t(), b.to(at::kDouble));
    ASSERT_EQ(ours.sizes(), wanted.sizes());
    // Rounding of T sums; of bf16 without tiles of it, of the result as well.
    const double tolerance = (type == at::kFloat || has_bf16_tiles() ? 1e-6 : 4e-3) * std::sqrt(static_cast<double>(T));
    EXPECT_LT((ours - wanted).abs().max().item<double>(), 4 * tolerance) << toString(type);
  }
}

TEST_P(ProductOverRows, HasTheSameBitsOnAnyNumberOfThreads) {
  const auto [T, M, N] = GetParam();
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    if (type == at::kBFloat16 && !has_bf16_tiles()) continue;
    const at::Tensor a = at::randn({T, M}).to(type), b = at::randn({T, N}).to(type);
    const int threads = at::get_num_threads();
    at::set_num_threads(1);
    const at::Tensor alone = product_over_rows(a, b);
    at::set_num_threads(3);
    const at::Tensor shared = product_over_rows(a, b);
    at::set_num_threads(threads);
    EXPECT_TRUE(at::equal(alone, shared)) << toString(type);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, ProductOverRows, testing::Values(Shape{1, 1, 1}, Shape{64, 16, 576}, Shape{320, 16, 1000}, Shape{513, 3, 385}, Shape{256, 64, 384}, Shape{700, 48, 15}),
                         [](const auto& test) { return std::to_string(test.param.T) + "x" + std::to_string(test.param.M) + "x" + std::to_string(test.param.N); });

}  // namespace
}  // namespace alambic::models
