// SPDX-License-Identifier: Apache-2.0
// The importance matrix against sums made by hand, and the comparison of two models against whole logits.
#include "train/importance.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include "data/batch_stream.h"
#include "models/norm.h"
#include "tests/cli/tiny_model.h"
#include "tests/closeness.h"
#include "tests/support.h"
#include "train/compare.h"

namespace alambic::train {
namespace {

using testing::fails_with;
using testing::is_close;
using testing::ScratchFolder;

struct Tiny {
  ScratchFolder scratch;
  Tiny() {
    testing::write_tiny_model(scratch / "model");
    testing::write_tiny_model(scratch / "other", true, 0.3);
    testing::write_tiny_store(scratch / "store", testing::tiny_tokenizer_hash());
  }
};

TEST(Importance, IsTheSumOfSquaresOfEachInput) {
  const Tiny tiny;
  models::Decoder decoder = checkpoints::load_decoder(tiny.scratch / "model", at::kFloat);
  const data::TokenStore store(tiny.scratch / "store");
  const checkpoints::ImportanceMatrix matrix = measure_importance(decoder, store, 16);
  EXPECT_EQ(matrix.entries.size(), 14u);
  EXPECT_EQ(matrix.datasets, std::vector<std::string>{"store"});
  EXPECT_EQ(matrix.chunk_size, 16u);

  // The first layer's queries read the normalised embeddings.
  at::Tensor expected_D = at::zeros({16}, at::kDouble);
  double tokens = 0;
  data::EvaluationBatches batches(store, 16, 1);
  const at::NoGradGuard no_grad;
  while (const auto next = batches.next()) {
    const at::Tensor h_TD = decoder.embedding_VD.index_select(0, next->batch.tokens_T);
    expected_D += models::rms_norm(h_TD, decoder.blocks[0].norms.at(models::Slot::kAttentionNorm), 0, decoder.config.norm_epsilon, at::kFloat).to(at::kDouble).square().sum(0);
    tokens += static_cast<double>(h_TD.size(0));
  }
  const auto& query = matrix.entries.at("blk.0.attn_q.weight");
  EXPECT_EQ(query.tokens, static_cast<float>(tokens));
  EXPECT_TRUE(is_close(query.squares_I, expected_D.to(at::kFloat), {.relative = 1e-5, .absolute = 1e-6}));
  EXPECT_TRUE(is_close(query.mean_I(), (expected_D / tokens).to(at::kFloat), {.relative = 1e-5, .absolute = 1e-6}));
  EXPECT_TRUE(at::equal(query.squares_I, matrix.entries.at("blk.0.attn_v.weight").squares_I));
  EXPECT_FALSE(at::equal(query.squares_I, matrix.entries.at("blk.1.attn_q.weight").squares_I));
  EXPECT_EQ(matrix.entries.at("blk.1.ffn_down.weight").squares_I.numel(), 32);
  for (const models::NamedLinear& named : decoder.linears()) EXPECT_FALSE(named.linear->input_squares_I.defined()) << named.path;
}

TEST(Importance, ReadsTextAsWell) {
  const Tiny tiny;
  models::Decoder decoder = checkpoints::load_decoder(tiny.scratch / "model", at::kFloat);
  write_file(tiny.scratch / "words.txt", "w4 w5 w6 w7 w8 w9 w10");
  const auto whole = measure_importance(decoder, tiny.scratch / "model", tiny.scratch / "words.txt", 4);
  EXPECT_EQ(whole.entries.at("blk.0.attn_q.weight").tokens, 7);
  EXPECT_EQ(whole.datasets, std::vector<std::string>{"words.txt"});
  EXPECT_EQ(measure_importance(decoder, tiny.scratch / "model", tiny.scratch / "words.txt", 4, 5).entries.at("blk.0.attn_q.weight").tokens, 5);
  write_file(tiny.scratch / "empty.txt", "");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "holds no token", [&] { measure_importance(decoder, tiny.scratch / "model", tiny.scratch / "empty.txt", 4); }));
}

TEST(Compare, GivesTheLossesOfBothAndTheKl) {
  const Tiny tiny;
  models::Decoder one = checkpoints::load_decoder(tiny.scratch / "model", at::kFloat), other = checkpoints::load_decoder(tiny.scratch / "other", at::kFloat);
  const data::TokenStore store(tiny.scratch / "store");
  const Comparison found = compare(one, other, store, 16);
  const StoreEvaluation before = evaluate(one, store, 16), after = evaluate(other, store, 16);
  EXPECT_EQ(found.before.tokens, before.total.tokens);
  EXPECT_EQ(found.before.bytes, before.total.bytes);
  EXPECT_EQ(found.before.documents, before.total.documents);
  EXPECT_NEAR(found.before.nats, before.total.nats, 1e-5 * before.total.nats);
  EXPECT_NEAR(found.after.nats, after.total.nats, 1e-5 * after.total.nats);
  double kl = 0;
  std::int64_t same = 0;
  data::EvaluationBatches batches(store, 16, 1);
  const at::NoGradGuard no_grad;
  while (const auto next = batches.next()) {
    const models::Input input{.tokens_T = next->batch.tokens_T, .positions_T = next->batch.positions_T, .document_lengths = next->batch.document_lengths};
    const at::Tensor p = one.logits_TV(one.hidden_TD(input)).to(at::kDouble).log_softmax(1), q = other.logits_TV(other.hidden_TD(input)).to(at::kDouble).log_softmax(1);
    for (std::int64_t t = 0; t < p.size(0); ++t) {
      if (!next->batch.keep_T[t].item<bool>()) continue;
      kl += (p[t].exp() * (p[t] - q[t])).sum().item<double>();
      same += p[t].argmax().item<std::int64_t>() == q[t].argmax().item<std::int64_t>();
    }
  }
  EXPECT_GT(kl, 0.01);
  EXPECT_NEAR(found.kl, kl, 1e-9 * kl);
  EXPECT_EQ(static_cast<std::int64_t>(found.same_first), same);
  const Comparison itself = compare(one, one, store, 16);
  EXPECT_NEAR(itself.kl, 0, 1e-12);
  EXPECT_EQ(itself.same_share(), 1);
}

}  // namespace
}  // namespace alambic::train
