// SPDX-License-Identifier: Apache-2.0
// Rows that several ranks share: the cut against brute force, and attention on 2, 3 and 4 ranks against the formula in f64.
#include "models/ring_attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <set>

#include "tests/closeness.h"
#include "tests/forked_ranks.h"
#include "tests/models/plain_attention.h"

namespace alambic::models {
namespace {

using parallel::Communicator;
using testing::expect_all_fine, testing::is_close_to_scale, testing::kPatient, testing::plain_attention, testing::run_ranks, testing::uneven;
using Lengths = std::vector<std::int64_t>;

std::int64_t sum(const Lengths& lengths) {
  std::int64_t sum = 0;
  for (const std::int64_t length : lengths) sum += length;
  return sum;
}

TEST(SharedRow, EachTokenIsOneMembers) {
  for (const int size : {1, 2, 3, 4, 7})
    for (const Lengths& lengths : {Lengths{1}, Lengths{64}, Lengths{5, 300, 2, 77}, Lengths{1000}, Lengths{448, 1}}) {
      const std::int64_t tokens = sum(lengths);
      std::multiset<std::int64_t> seen;
      std::int64_t chunk = 0;
      for (int member = 0; member < size; ++member) {
        const SharedRow row({.size = size, .member = member}, lengths);
        chunk = row.chunk();
        EXPECT_EQ(chunk % kChunkRound, 0);
        EXPECT_GE(2 * size * chunk, tokens);
        EXPECT_LT(2 * size * chunk - tokens, 2 * size * kChunkRound);
        EXPECT_EQ(sum(row.document_lengths()), 2 * size * chunk);
        const at::Tensor own = row.own(at::arange(1, tokens + 1));
        EXPECT_EQ(own.size(0), 2 * chunk);
        for (std::int64_t i = 0; i < own.size(0); ++i)
          if (const std::int64_t token = own[i].item<std::int64_t>(); token != 0) seen.insert(token);
      }
      EXPECT_EQ(static_cast<std::int64_t>(seen.size()), tokens);
      EXPECT_EQ(std::set<std::int64_t>(seen.begin(), seen.end()).size(), seen.size());
    }
}

TEST(SharedRow, KeysAreAskedForWhereSomeQuerySeesThem) {
  std::int64_t asked = 0, all = 0;
  for (const int size : {2, 3, 4})
    for (const Lengths& lengths : {Lengths{400}, Lengths{1, 31, 33, 200, 64, 64}, Lengths{90, 90, 90, 90, 90}, Lengths{64, 64, 64, 64, 64, 64}, Lengths{3}})
      for (const std::int64_t window : {0, 1, 2, 33, 64, 100}) {
        const SharedRow row({.size = size, .member = 0}, lengths);
        Lengths document;
        for (std::size_t i = 0; i < row.document_lengths().size(); ++i) document.insert(document.end(), static_cast<std::size_t>(row.document_lengths()[i]), static_cast<std::int64_t>(i));
        for (int queries = 0; queries < size; ++queries)
          for (int keys = 0; keys < size; ++keys)
            for (int half = 0; half < 2; ++half) {
              bool sees = false;
              for (int query_half = 0; query_half < 2; ++query_half)
                for (std::int64_t q = row.first(queries, query_half); q < row.first(queries, query_half) + row.chunk(); ++q)
                  for (std::int64_t k = row.first(keys, half); k < row.first(keys, half) + row.chunk(); ++k)
                    sees = sees || (k <= q && document[static_cast<std::size_t>(k)] == document[static_cast<std::size_t>(q)] && (window == 0 || q - k < window));
              EXPECT_EQ(row.seen(queries, keys, window)[static_cast<std::size_t>(half)], sees) << size << " ranks, queries of " << queries << ", keys of " << keys << ", half " << half << ", window " << window;
              asked += sees, all += 1;
            }
      }
  EXPECT_LT(asked, all * 2 / 3);
}

// Pairs of tokens that see each other, in a long document: the same for all members.
TEST(SharedRow, WorkIsEven) {
  for (const int size : {2, 4, 8}) {
    const std::int64_t tokens = 4096;
    std::vector<double> work;
    for (int member = 0; member < size; ++member) {
      const SharedRow row({.size = size, .member = member}, {tokens});
      double pairs = 0;
      for (int half = 0; half < 2; ++half)
        for (std::int64_t q = row.first(member, half); q < row.first(member, half) + row.chunk(); ++q) pairs += static_cast<double>(q + 1);
      work.push_back(pairs);
    }
    for (const double each : work) EXPECT_EQ(each, work[0]);
  }
}

AttentionShape shape_of(std::int64_t kv_heads, std::int64_t group, std::int64_t head_size, Lengths lengths, std::int64_t window = 0, double soft_cap = 0) {
  return {.tokens = sum(lengths), .kv_heads = kv_heads, .group = group, .head_size = head_size, .document_lengths = lengths, .window = window, .soft_cap = soft_cap};
}

struct Case {
  const char* name;
  AttentionShape shape;
};
const std::vector<Case>& cases() {
  static const std::vector<Case> kCases = {
      {"one token", shape_of(1, 1, 8, {1})},
      {"a long document", shape_of(2, 3, 20, {700})},
      {"documents", shape_of(1, 2, 16, {5, 64, 1, 31, 33, 100, 250, 2})},
      {"many groups", shape_of(1, 12, 16, {150, 240})},
      {"split", shape_of(1, 1, 8, {2500, 7, 2300})},
      {"window", shape_of(2, 1, 16, {500, 20}, 50)},
      {"window of one", shape_of(1, 1, 8, {270}, 1)},
      {"narrow window", shape_of(1, 2, 8, {1300}, 33)},
      {"soft cap", shape_of(1, 2, 16, {390, 10}, 0, 1.5)},
      {"soft cap and window", shape_of(1, 2, 16, {90, 300}, 40, 1.5)},
  };
  return kCases;
}

struct Passes {
  at::Tensor out_TQ, d_qkv_TN;
};
/// This rank's part. The shape is that of the whole.
Passes shared(const AttentionShape& whole, const SharedRow& row, const at::Tensor& qkv_TN, const at::Tensor& d_out_TQ, double scale) {
  AttentionShape shape = whole;
  shape.tokens = 2 * row.chunk();
  shape.document_lengths = row.document_lengths();
  const HeadTransform transform{.scale = static_cast<float>(scale)};
  AttentionHeads heads = make_ring_heads(shape);
  split_heads(shape, qkv_TN, transform, heads, false);
  Passes passes{.out_TQ = at::empty_like(d_out_TQ), .d_qkv_TN = at::empty_like(qkv_TN)};
  const at::Tensor lse_KR = ring_attention_forward(shape, row, heads, passes.out_TQ);
  AttentionHeads again = make_heads(shape, true, at::kFloat);
  split_heads(shape, qkv_TN, transform, again, true);
  const AttentionGradients gradients = ring_attention_backward(shape, row, again, passes.out_TQ, lse_KR, d_out_TQ);
  merge_head_gradients(shape, qkv_TN, transform, gradients, passes.d_qkv_TN, {}, {});
  return passes;
}

/// "", or how this rank's part of a case differs from the formula.
std::string difference(const Case& each, const Context& context, at::ScalarType type, double tolerance) {
  const AttentionShape& shape = each.shape;
  const std::int64_t queries = shape.kv_heads * shape.group * shape.head_size;
  const double scale = 3 / std::sqrt(static_cast<double>(shape.head_size));
  const at::Tensor qkv_TN = uneven({shape.tokens, queries + 2 * shape.kv_heads * shape.head_size}, 1).to(type), d_out_TQ = uneven({shape.tokens, queries}, 2).to(type);
  const at::Tensor leaf = qkv_TN.to(at::kDouble).requires_grad_(true);
  const at::Tensor expected_TQ = plain_attention(shape, leaf, scale);
  (expected_TQ * d_out_TQ.to(at::kDouble)).sum().backward();

  const SharedRow row(context, shape.document_lengths);
  const at::Tensor own_qkv = row.own(qkv_TN), own_d_out = row.own(d_out_TQ);
  const Passes first = shared(shape, row, own_qkv, own_d_out, scale);
  at::set_num_threads(2);
  const Passes again = shared(shape, row, own_qkv, own_d_out, scale);
  at::set_num_threads(1);
  // Scales are those of the whole: a rank's own part may be all padding.
  const auto close = [&](const at::Tensor& actual, const at::Tensor& expected) {
    return testing::is_close(actual, row.own(expected.detach()), {.absolute = tolerance * expected.abs().max().item<double>()});
  };
  if (const auto result = close(first.out_TQ, expected_TQ); !result) return std::string(each.name) + ": out: " + result.message();
  if (const auto result = close(first.d_qkv_TN, leaf.grad()); !result) return std::string(each.name) + ": gradients: " + result.message();
  if (!at::equal(first.out_TQ, again.out_TQ) || !at::equal(first.d_qkv_TN, again.d_qkv_TN)) return std::string(each.name) + ": other bits the second time, with another number of threads";

  // Finite differences of the formula along one direction, in f64, against all ranks' gradients.
  const at::NoGradGuard constant;
  const at::Tensor direction = uneven(leaf.sizes().vec(), 5);
  const auto value = [&](double step) { return (plain_attention(shape, leaf + direction * step, scale) * d_out_TQ.to(at::kDouble)).sum().item<double>(); };
  at::Tensor ours = at::zeros({context.ranks->size()}, at::kDouble);
  ours[context.ranks->rank()] = (first.d_qkv_TN.to(at::kDouble) * row.own(direction)).sum();
  context.ranks->sum_in_place({&ours, 1}, "slope");
  const double slope = (value(1e-5) - value(-1e-5)) / 2e-5, norm = leaf.grad().norm().item<double>();
  const std::int64_t base = context.ranks->rank() - context.member;
  const double found = ours.narrow(0, base, context.size).sum().item<double>();
  if (!(std::abs(found - slope) <= 50 * tolerance * norm)) return std::string(each.name) + ": slope " + std::to_string(found) + ", expected " + std::to_string(slope);
  return "";
}

class RingAttention : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, RingAttention, ::testing::Values(2, 3, 4), ::testing::PrintToStringParamName());

TEST_P(RingAttention, EqualsTheFormula) {
  expect_all_fine(run_ranks(GetParam(), kPatient, [](Communicator& ranks) -> std::string {
    at::set_num_threads(1);
    for (const Case& each : cases())
      if (const std::string said = difference(each, {.ranks = &ranks, .size = ranks.size(), .member = ranks.rank()}, at::kFloat, 5e-6); !said.empty()) return said;
    return "";
  }));
}

TEST_P(RingAttention, TakesBf16) {
  expect_all_fine(run_ranks(GetParam(), kPatient, [](Communicator& ranks) -> std::string {
    at::set_num_threads(1);
    return difference(cases()[2], {.ranks = &ranks, .size = ranks.size(), .member = ranks.rank()}, at::kBFloat16, 2e-2);
  }));
}

TEST(RingAttention, GroupsOfRanksHaveRowsOfTheirOwn) {
  expect_all_fine(run_ranks(4, kPatient, [](Communicator& ranks) -> std::string {
    at::set_num_threads(1);
    const Context context{.ranks = &ranks, .size = 2, .member = ranks.rank() % 2};
    for (std::size_t i = 0; i < cases().size(); ++i) {
      // One group's row is long where the other's is short.
      const Case& each = cases()[ranks.rank() < 2 ? i : cases().size() - 1 - i];
      if (const std::string said = difference(each, context, at::kFloat, 5e-6); !said.empty()) return said;
    }
    return "";
  }));
}

}  // namespace
}  // namespace alambic::models
