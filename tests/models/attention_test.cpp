// SPDX-License-Identifier: Apache-2.0
// Soft-capped attention by operators, of a document so long that its queries are cut.
#include "models/attention.h"

#include <gtest/gtest.h>

#include "tests/closeness.h"
#include "tests/models/plain_attention.h"

namespace alambic::models {
namespace {

using testing::is_close_to_scale;
using testing::plain_attention;
using testing::uneven;

TEST(SoftCappedAttention, EqualsTheFormulaInPiecesForwardsAndBackwards) {
  for (const std::int64_t window : {0, 300}) {
    const AttentionShape shape{.tokens = 1580, .kv_heads = 2, .group = 2, .head_size = 6, .document_lengths = {40, 40, 1500}, .window = window, .soft_cap = 1.5};
    const std::int64_t columns = (shape.kv_heads * shape.group + 2 * shape.kv_heads) * shape.head_size;
    const at::Tensor qkv_TN = uneven({shape.tokens, columns}, 1, 2), d_out_TQ = uneven({shape.tokens, 24}, 2);
    const at::Tensor wide_TN = qkv_TN.clone().requires_grad_(true), expected_TQ = plain_attention(shape, wide_TN, 0.4);
    expected_TQ.backward(d_out_TQ);
    const at::Tensor leaf_TN = qkv_TN.to(at::kFloat).requires_grad_(true);
    const auto heads = [&](std::int64_t first, std::int64_t count) { return leaf_TN.narrow(1, first * shape.head_size, count * shape.head_size).unflatten(1, {count, shape.head_size}); };
    const at::Tensor out_TQ = Documents(shape.document_lengths).attend(heads(0, 4), heads(4, 2), heads(6, 2), 0.4, window, shape.soft_cap);
    out_TQ.backward(d_out_TQ.to(at::kFloat));
    EXPECT_TRUE(is_close_to_scale(out_TQ, expected_TQ, 2e-6)) << window;
    EXPECT_TRUE(is_close_to_scale(leaf_TN.grad(), wide_TN.grad(), 5e-6)) << window;
  }
}

}  // namespace
}  // namespace alambic::models
