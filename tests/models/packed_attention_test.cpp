// SPDX-License-Identifier: Apache-2.0
// Tiled attention against the formula in f64, whose gradients are checked by finite differences.
#include "models/packed_attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/logspace.h>
#include <ATen/ops/tanh.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "models/tiles.h"
#include "tests/closeness.h"
#include "tests/models/plain_attention.h"

namespace alambic::models {
namespace {

using testing::is_close_to_scale;
using testing::plain_attention;
using testing::uneven;

struct Case {
  const char* name;
  AttentionShape shape;
};
AttentionShape shape_of(std::int64_t kv_heads, std::int64_t group, std::int64_t head_size, std::vector<std::int64_t> lengths, std::int64_t window = 0, double soft_cap = 0) {
  AttentionShape shape{.kv_heads = kv_heads, .group = group, .head_size = head_size, .document_lengths = lengths, .window = window, .soft_cap = soft_cap};
  for (const std::int64_t length : lengths) shape.tokens += length;
  return shape;
}
const Case kCases[] = {
    {"OneToken", shape_of(1, 1, 8, {1})},
    {"Odd", shape_of(2, 3, 20, {37})},
    {"Documents", shape_of(1, 2, 16, {5, 64, 1, 31, 33, 100})},
    {"ManyTiles", shape_of(1, 3, 64, {700})},
    {"ManyGroups", shape_of(1, 12, 16, {150, 40})},
    {"LongIsSplit", shape_of(1, 1, 8, {1500, 7, 1100})},
    {"Window", shape_of(2, 1, 16, {300, 20}, 50)},
    {"WindowOfOne", shape_of(1, 1, 8, {70}, 1)},
    {"NarrowWindowLong", shape_of(1, 2, 8, {1300}, 33)},
    {"SoftCap", shape_of(1, 2, 16, {90, 10}, 0, 1.5)},
    {"SoftCapFarAway", shape_of(1, 2, 16, {90, 10}, 0, 1e5)},
    {"SoftCapAndWindow", shape_of(1, 2, 16, {90, 300}, 40, 1.5)},
};

struct Passes {
  at::Tensor out_TQ, d_qkv_TN;
};
Passes tiled(const AttentionShape& shape, const at::Tensor& qkv_TN, const at::Tensor& d_out_TQ, double scale) {
  const HeadTransform transform{.scale = static_cast<float>(scale)};
  AttentionHeads heads = make_heads(shape, false, qkv_TN.scalar_type());
  split_heads(shape, qkv_TN, transform, heads, false);
  Passes passes{.out_TQ = at::empty_like(d_out_TQ), .d_qkv_TN = at::empty_like(qkv_TN)};
  const at::Tensor lse_KR = attention_forward(shape, heads, passes.out_TQ);
  AttentionHeads again = make_heads(shape, true, qkv_TN.scalar_type());
  split_heads(shape, qkv_TN, transform, again, true);
  const AttentionGradients gradients = attention_backward(shape, again, passes.out_TQ, lse_KR, d_out_TQ);
  merge_head_gradients(shape, qkv_TN, transform, gradients, passes.d_qkv_TN, {}, {});
  return passes;
}

class PackedAttention : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Cases, PackedAttention, ::testing::ValuesIn(kCases), [](const auto& test) { return test.param.name; });

TEST_P(PackedAttention, EqualsTheFormula) {
  const AttentionShape& shape = GetParam().shape;
  const std::int64_t queries = shape.kv_heads * shape.group * shape.head_size;
  const double scale = 3 / std::sqrt(static_cast<double>(shape.head_size));
  const at::Tensor qkv_TN = uneven({shape.tokens, queries + 2 * shape.kv_heads * shape.head_size}, 1).to(at::kFloat), d_out_TQ = uneven({shape.tokens, queries}, 2).to(at::kFloat);
  const at::Tensor leaf = qkv_TN.to(at::kDouble).requires_grad_(true);
  const at::Tensor expected_TQ = plain_attention(shape, leaf, scale);
  (expected_TQ * d_out_TQ.to(at::kDouble)).sum().backward();
  const Passes passes = tiled(shape, qkv_TN, d_out_TQ, scale);
  EXPECT_TRUE(is_close_to_scale(passes.out_TQ, expected_TQ, 2e-6));
  EXPECT_TRUE(is_close_to_scale(passes.d_qkv_TN, leaf.grad(), 5e-6));

  // Finite differences of the formula along one direction, in f64.
  const at::NoGradGuard constant;
  const at::Tensor direction = uneven(leaf.sizes().vec(), 5);
  const auto value = [&](double step) { return (plain_attention(shape, leaf + direction * step, scale) * d_out_TQ.to(at::kDouble)).sum().item<double>(); };
  const double slope = (value(1e-5) - value(-1e-5)) / 2e-5, ours = (passes.d_qkv_TN.to(at::kDouble) * direction).sum().item<double>();
  EXPECT_NEAR(ours, slope, 1e-4 * passes.d_qkv_TN.to(at::kDouble).norm().item<double>());
}

TEST_P(PackedAttention, DoesNotDependOnThreads) {
  const AttentionShape& shape = GetParam().shape;
  const std::int64_t queries = shape.kv_heads * shape.group * shape.head_size;
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    const at::Tensor qkv_TN = uneven({shape.tokens, queries + 2 * shape.kv_heads * shape.head_size}, 1).to(type), d_out_TQ = uneven({shape.tokens, queries}, 2).to(type);
    const int threads = at::get_num_threads();
    at::set_num_threads(1);
    const Passes one = tiled(shape, qkv_TN, d_out_TQ, 0.5);
    at::set_num_threads(2);
    const Passes two = tiled(shape, qkv_TN, d_out_TQ, 0.5);
    at::set_num_threads(threads);
    EXPECT_TRUE(at::equal(one.out_TQ, two.out_TQ)) << toString(type);
    EXPECT_TRUE(at::equal(one.d_qkv_TN, two.d_qkv_TN)) << toString(type);
  }
}

TEST(Tiles, SoftCapIsTanhToTheLastPlaces) {
  const at::Tensor x = at::cat({at::linspace(-100, 100, 4001), at::logspace(-20, 4, 500)}).to(at::kFloat);
  for (const double cap : {1e-3, 1.0, 50.0, 1e5}) {
    const at::Tensor y = x.clone(), z = x.clone(), slopes = at::empty_like(x), wide = at::tanh(x.to(at::kDouble) / cap) * cap;
    tiles::soft_cap(y.mutable_data_ptr<float>(), nullptr, y.numel(), static_cast<float>(cap));
    tiles::soft_cap(z.mutable_data_ptr<float>(), slopes.mutable_data_ptr<float>(), z.numel(), static_cast<float>(cap));
    EXPECT_TRUE(at::equal(y, z));
    EXPECT_LT(((y - wide) / wide.abs().clamp_min(1e-30)).abs().max().item<double>(), 5e-7) << cap;
    EXPECT_LT((slopes - (1 - (wide / cap).square())).abs().max().item<double>(), 5e-7) << cap;
  }
}

TEST_P(PackedAttention, Bf16RoundsNothingButFactorsAndWhatItGives) {
  const AttentionShape& shape = GetParam().shape;
  const std::int64_t queries = shape.kv_heads * shape.group * shape.head_size;
  const at::Tensor qkv_TN = uneven({shape.tokens, queries + 2 * shape.kv_heads * shape.head_size}, 1).to(at::kBFloat16), d_out_TQ = uneven({shape.tokens, queries}, 2).to(at::kBFloat16);
  const Passes narrow = tiled(shape, qkv_TN, d_out_TQ, 0.5), wide = tiled(shape, qkv_TN.to(at::kFloat), d_out_TQ.to(at::kFloat), 0.5);
  EXPECT_TRUE(is_close_to_scale(narrow.out_TQ, wide.out_TQ, 4e-3));
  EXPECT_TRUE(is_close_to_scale(narrow.d_qkv_TN, wide.d_qkv_TN, 2e-2));
}

}  // namespace
}  // namespace alambic::models
