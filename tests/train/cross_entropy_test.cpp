// SPDX-License-Identifier: Apache-2.0
#include "train/cross_entropy.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "core/random.h"
#include "lora/stored_weight.h"
#include "models/bf16_tiles.h"
#include "models/row_kernels.h"
#include "tests/closeness.h"
#include "tests/counted_products.h"
#include "tests/golden.h"
#include "tests/support.h"
#include "train/run_log.h"

namespace alambic::train {
namespace {

using testing::Golden;
using testing::is_close;
using testing::is_close_to_scale;

models::Linear head_of(const at::Tensor& weight, const at::Tensor& bias = {}) {
  models::Linear head;
  head.weight_OI = weight;
  head.bias_O = bias;
  return head;
}

at::Tensor leaf(const at::Tensor& value) { return value.clone().requires_grad_(true); }

TEST(CrossEntropy, AgreesWithTorchOnAPlainHead) {  // tests/oracle/cross_entropy_oracle.py, in f64
  const Golden torch("cross_entropy.safetensors");
  SCOPED_TRACE(torch.provenance());
  const models::Linear head = head_of(leaf(torch["weight"]));
  const at::Tensor hidden = leaf(torch["hidden"]);
  const at::Tensor loss = cross_entropy_sum(hidden, head, torch["targets"], torch["keep"], 1);
  loss.backward();
  EXPECT_TRUE(is_close(loss, torch["plain.loss"], {.relative = 1e-6}));
  EXPECT_TRUE(is_close(hidden.grad(), torch["plain.d_hidden"], {.absolute = 2e-5}));
  EXPECT_TRUE(is_close_to_scale(head.weight_OI.grad(), torch["plain.d_weight"], 1e-5));
}

TEST(CrossEntropy, AgreesWithTorchOnAHeadWithBias) {
  const Golden torch("cross_entropy.safetensors");
  const models::Linear head = head_of(leaf(torch["weight"]), leaf(torch["bias"]));
  const at::Tensor hidden = leaf(torch["hidden"]);
  const at::Tensor loss = cross_entropy_sum(hidden, head, torch["targets"], torch["keep"], 1);
  loss.backward();
  EXPECT_TRUE(is_close(loss, torch["bias.loss"], {.relative = 1e-6}));
  EXPECT_TRUE(is_close_to_scale(head.weight_OI.grad(), torch["bias.d_weight"], 1e-5));
  EXPECT_TRUE(is_close_to_scale(head.bias_O.grad(), torch["bias.d_bias"], 1e-5));
}

TEST(CrossEntropy, AgreesWithTorchOnAHeadWithAnAdapter) {
  const Golden torch("cross_entropy.safetensors");
  models::Linear head = head_of(torch["weight"].clone());
  models::Adapter& adapter = head.adapter.emplace();
  adapter.a_RI = leaf(torch["a"]);
  adapter.b_OR = leaf(torch["b"]);
  adapter.scale = std::stod(torch.metadata().at("scale"));
  const at::Tensor hidden = leaf(torch["hidden"]);
  const at::Tensor loss = cross_entropy_sum(hidden, head, torch["targets"], torch["keep"], 1);
  (loss * 3).backward();  // whatever the loss is multiplied by reaches every gradient
  EXPECT_TRUE(is_close(loss, torch["lora.loss"], {.relative = 1e-6}));
  EXPECT_TRUE(is_close(hidden.grad(), torch["lora.d_hidden"] * 3, {.absolute = 1e-4}));
  EXPECT_TRUE(is_close_to_scale(head.adapter->a_RI.grad(), torch["lora.d_a"] * 3, 1e-5));
  EXPECT_TRUE(is_close_to_scale(head.adapter->b_OR.grad(), torch["lora.d_b"] * 3, 1e-5));
}

TEST(CrossEntropy, AgreesWithPlainLoopsInDouble) {
  const std::int64_t tokens = 7, width = 5, vocabulary = 11;
  const at::Tensor hidden = leaf(at::randn({tokens, width})), weight = at::randn({vocabulary, width});
  const at::Tensor targets = at::arange(tokens), keep = targets.ne(3);
  const at::Tensor loss = cross_entropy_sum(hidden, head_of(weight), targets, keep, 1);
  loss.backward();
  const at::Tensor plain = hidden.detach();
  const auto h = plain.accessor<float, 2>(), w = weight.accessor<float, 2>();
  double nats = 0;
  at::Tensor expected = at::zeros({tokens, width}, at::kDouble);
  for (std::int64_t t = 0; t < tokens; ++t) {
    if (t == 3) continue;
    std::vector<double> logits(static_cast<std::size_t>(vocabulary));
    double sum = 0;
    for (std::int64_t v = 0; v < vocabulary; ++v) {
      double& logit = logits[static_cast<std::size_t>(v)];
      for (std::int64_t d = 0; d < width; ++d) logit += static_cast<double>(h[t][d]) * static_cast<double>(w[v][d]);
      sum += std::exp(logit);
    }
    nats += std::log(sum) - logits[static_cast<std::size_t>(t)];
    for (std::int64_t v = 0; v < vocabulary; ++v)
      for (std::int64_t d = 0; d < width; ++d)
        expected[t][d] += (std::exp(logits[static_cast<std::size_t>(v)]) / sum - (v == t)) * static_cast<double>(w[v][d]);
  }
  EXPECT_NEAR(loss.item<double>(), nats, 1e-5);
  EXPECT_TRUE(is_close(hidden.grad(), expected, {.absolute = 1e-5}));
}

TEST(CrossEntropy, KeptRowsAloneAreTheLossOfTheChunks) {
  const Golden torch("cross_entropy.safetensors");
  const at::Tensor nats_K = cross_entropy_of_kept(torch["hidden"], head_of(torch["weight"]), torch["targets"], torch["keep"]);
  EXPECT_EQ(nats_K.numel(), torch["keep"].sum().item<std::int64_t>());
  EXPECT_TRUE(is_close(nats_K.sum(at::kDouble), torch["plain.loss"], {.relative = 1e-6}));
}

TEST(CrossEntropy, NothingKeptIsZeroWithoutAGradient) {
  const at::Tensor hidden = leaf(at::randn({4, 3}));
  const at::Tensor loss = cross_entropy_sum(hidden, head_of(at::randn({6, 3})), at::zeros({4}, at::kLong), at::zeros({4}, at::kBool), 1);
  EXPECT_EQ(loss.item<double>(), 0);
  EXPECT_FALSE(loss.requires_grad());
}

TEST(CrossEntropy, ATargetOutsideTheVocabularyIsNamed) {
  EXPECT_TRUE(testing::fails_with(ErrorKind::kData, "id 6", [] {
    cross_entropy_sum(at::randn({1, 3}), head_of(at::randn({6, 3})), at::full({1}, 6, at::kLong), at::ones({1}, at::kBool), 1);
  }));
}

TEST(CrossEntropy, MemoryDoesNotGrowWithTokensTimesVocabulary) {
  const std::int64_t tokens = 16384, vocabulary = 32768, width = 8;  // whole logits: 2 GiB
  const models::Linear head = head_of(at::randn({vocabulary, width}));
  const at::Tensor hidden = leaf(at::randn({tokens, width}));
  const std::uint64_t before = process_memory().peak;
  cross_entropy_sum(hidden, head, at::zeros({tokens}, at::kLong), at::ones({tokens}, at::kBool), 1).backward();
  EXPECT_LT(process_memory().peak - before, 400ull << 20);
}

TEST(CrossEntropy, MakesNoGradientOfHiddenStatesThatWantNone) {
  models::Linear head = head_of(at::randn({600, 16}));
  head.adapter = models::Adapter{.a_RI = leaf(at::randn({4, 16})), .b_OR = leaf(at::randn({600, 4})), .magnitude_O = {}, .scale = 0.5};
  const at::Tensor hidden_TD = at::randn({40, 16});
  const auto gradient_and_products = [&](bool wants_hidden) {
    const at::Tensor own_TD = hidden_TD.clone().requires_grad_(wants_hidden);
    head.adapter->a_RI.mutable_grad().reset();
    const int products = testing::products_of([&] { cross_entropy_sum(own_TD, head, at::zeros({40}, at::kLong), at::ones({40}, at::kBool), 1).backward(); });
    return std::pair(head.adapter->a_RI.grad().clone(), products);
  };
  const auto [with, products_with] = gradient_and_products(true);
  const auto [without, products_without] = gradient_and_products(false);
  EXPECT_TRUE(at::equal(with, without));
  EXPECT_EQ(products_without, products_with - 1);  // by the head's weights
}

// Each in a process of its own, as ctest runs it: a peak would hide a lower one behind it.
class CrossEntropyOfAVast : public ::testing::TestWithParam<const char*> {};

TEST_P(CrossEntropyOfAVast, MemoryIsIndependentOfAVocabularyOf262144) {
  const std::int64_t tokens = 4096, vocabulary = 262'144, width = 8;  // whole logits: 4 GiB, 2 in bf16
  const std::string kind = GetParam();
  const at::ScalarType type = kind.starts_with("Bf16") ? at::kBFloat16 : at::kFloat;
  models::Linear head = head_of(at::randn({vocabulary, width}).to(type));
  if (kind == "TrainedHead") head.weight_OI.requires_grad_(true);
  if (kind.ends_with("HeadWithAnAdapter")) head.adapter = models::Adapter{.a_RI = leaf(at::randn({4, width})), .b_OR = leaf(at::randn({vocabulary, 4})), .magnitude_O = {}, .scale = 0.5};
  const at::Tensor hidden = leaf(at::randn({tokens, width}).to(type));
  const std::uint64_t before = process_memory().peak;
  cross_entropy_sum(hidden, head, at::zeros({tokens}, at::kLong), at::ones({tokens}, at::kBool), 1).backward();
  EXPECT_LT(process_memory().peak - before, (type == at::kFloat ? 400ull : 200ull) << 20);
}

INSTANTIATE_TEST_SUITE_P(Vocabulary, CrossEntropyOfAVast, ::testing::Values("Head", "TrainedHead", "HeadWithAnAdapter", "Bf16Head", "Bf16HeadWithAnAdapter"), [](const auto& test) { return std::string(test.param); });

// The formula with label smoothing and z-loss, in f64, whose gradient autograd makes and finite differences check.
at::Tensor plain_loss_of_logits(const at::Tensor& logits_TV, const at::Tensor& targets_T, const at::Tensor& keep_T, const LossConfig& loss) {
  const at::Tensor log_sum_T = at::logsumexp(logits_TV, {1});
  const at::Tensor target_T = logits_TV.gather(1, targets_T.unsqueeze(1)).squeeze(1);
  const at::Tensor nats_T = log_sum_T - target_T * (1 - loss.label_smoothing) - logits_TV.mean(1) * loss.label_smoothing + log_sum_T.square() * loss.z_loss;
  return (nats_T * keep_T.to(at::kDouble)).sum();
}
at::Tensor plain_loss(const at::Tensor& hidden_TD, const at::Tensor& weight_VD, const at::Tensor& targets_T, const at::Tensor& keep_T, const LossConfig& loss) {
  return plain_loss_of_logits(at::matmul(hidden_TD, weight_VD.t()), targets_T, keep_T, loss);
}

// The mask is a function of the step's seed, the chunk's first row and the place in the chunk; masked rows take no place.
TEST(CrossEntropy, DropoutOfAnAdapterOnTheHeadEqualsTheFormula) {
  const std::int64_t width = 7, vocabulary = 1030, rows = num_rows_in_chunk(vocabulary), tokens = rows + 101;  // two chunks
  const std::uint64_t seed = 77, id = 9;
  const double probability = 0.25, scale = 0.7;
  const at::Tensor hidden_TD = at::randn({tokens, width}), weight_VD = at::randn({vocabulary, width}), a_RD = at::randn({3, width}), b_VR = at::randn({vocabulary, 3});
  const at::Tensor targets_T = at::arange(tokens), keep_T = targets_T.ne(30);
  const at::Tensor h = leaf(hidden_TD.to(at::kDouble)), a = leaf(a_RD.to(at::kDouble)), b = leaf(b_VR.to(at::kDouble));
  const at::Tensor kept = keep_T.nonzero().squeeze(1), h_KD = h.index_select(0, kept);
  std::vector<at::Tensor> masks;
  for (std::int64_t begin = 0; begin < tokens - 1; begin += rows) {
    const std::uint64_t of_chunk = derive_seed(seed, "head", {static_cast<std::uint64_t>(begin)}) | 1;
    masks.push_back(models::with_dropout(at::ones({std::min(rows, tokens - 1 - begin), width}), probability, derive_seed(of_chunk, "adapter", {id})));
  }
  const at::Tensor mask_KD = at::cat(masks).to(at::kDouble), dropped_KD = h_KD * mask_KD;
  EXPECT_NEAR(mask_KD.eq(0).to(at::kDouble).mean().item<double>(), probability, 0.05);
  const at::Tensor logits_KV = at::matmul(h_KD, weight_VD.to(at::kDouble).t()) + at::matmul(at::matmul(dropped_KD, a.t()), b.t()) * scale;
  const at::Tensor expected = plain_loss_of_logits(logits_KV, targets_T.index_select(0, kept), at::ones({tokens - 1}), {});
  expected.backward();

  models::Linear head = head_of(weight_VD);
  head.adapter = models::Adapter{.a_RI = leaf(a_RD), .b_OR = leaf(b_VR), .magnitude_O = {}, .scale = scale, .dropout = probability, .id = id};
  const at::Tensor hidden = leaf(hidden_TD), nats = cross_entropy_sum(hidden, head, targets_T, keep_T, seed);
  nats.backward();
  EXPECT_TRUE(is_close(nats, expected, {.relative = 2e-6}));
  EXPECT_TRUE(is_close_to_scale(hidden.grad(), h.grad(), 5e-6));
  EXPECT_TRUE(is_close_to_scale(head.adapter->a_RI.grad(), a.grad(), 1e-5));
  EXPECT_TRUE(is_close_to_scale(head.adapter->b_OR.grad(), b.grad(), 1e-5));
}

TEST(CrossEntropy, EveryPathEqualsTheFormulaAndItsFiniteDifferences) {
  // More rows than a tile and a vocabulary of more than one, neither a multiple.
  const std::int64_t tokens = 101, width = 7, vocabulary = 1030;
  const at::Tensor hidden_TD = at::randn({tokens, width}), weight_VD = at::randn({vocabulary, width}), targets_T = at::arange(tokens) * 10, keep_T = targets_T.ne(30);
  for (const LossConfig& loss : {LossConfig{}, LossConfig{.label_smoothing = 0.1}, LossConfig{.z_loss = 1e-2}, LossConfig{.label_smoothing = 0.2, .z_loss = 1e-3}}) {
    const at::Tensor h = leaf(hidden_TD.to(at::kDouble)), w = leaf(weight_VD.to(at::kDouble));
    const at::Tensor expected = plain_loss(h, w, targets_T, keep_T, loss);
    expected.backward();
    {
      const at::NoGradGuard constant;
      const at::Tensor direction = at::randn({tokens, width}, at::kDouble);
      const auto value = [&](double step) { return plain_loss(h + direction * step, w, targets_T, keep_T, loss).item<double>(); };
      EXPECT_NEAR((value(1e-5) - value(-1e-5)) / 2e-5, (h.grad() * direction).sum().item<double>(), 1e-5);
    }
    for (const bool trains_head : {false, true}) {  // by tiles; by chunks
      models::Linear head = head_of(trains_head ? leaf(weight_VD) : weight_VD);
      const at::Tensor hidden = leaf(hidden_TD), nats = cross_entropy_sum(hidden, head, targets_T, keep_T, 1, loss);
      (nats * 2).backward();
      EXPECT_TRUE(is_close(nats, expected, {.relative = 2e-6})) << trains_head;
      EXPECT_TRUE(is_close_to_scale(hidden.grad(), h.grad() * 2, 5e-6)) << trains_head;
      if (trains_head) {
        EXPECT_TRUE(is_close_to_scale(head.weight_OI.grad(), w.grad() * 2, 1e-5));
      }
    }
  }
}

TEST(CrossEntropy, OfAStoredHeadHasTheBitsOfItsDenseCopy) {
  const std::int64_t width = 72, vocabulary = 131'101;  // more than a part of a product, and no multiple of a tile
  const std::int64_t tokens = 96 * 9 + 5;               // more blocks of rows than two threads take together
  const at::Tensor hidden_TD = at::randn({tokens, width}), targets_T = at::arange(tokens) * 150, keep_T = targets_T.ne(300);
  for (const at::ScalarType type : {at::kBFloat16, at::kHalf}) {
    const at::Tensor stored_VD = (at::randn({vocabulary, width}) * 0.3).to(type);
    models::Linear dense = head_of(stored_VD.to(at::kFloat)), stored;
    lora::keep_as_stored(stored, stored_VD);
    for (const std::int64_t rows : {1, 3, 4, 37}) EXPECT_TRUE(at::equal(stored(hidden_TD.narrow(0, 0, rows), 0), dense(hidden_TD.narrow(0, 0, rows), 0))) << rows;
    EXPECT_TRUE(at::equal(cross_entropy_of_kept(hidden_TD, stored, targets_T, keep_T), cross_entropy_of_kept(hidden_TD, dense, targets_T, keep_T)));
    // By tiles with a gradient, and through logits where the head has a bias.
    for (const at::Tensor& bias_V : {at::Tensor(), at::randn({vocabulary})})
      for (const LossConfig& loss : {LossConfig{}, LossConfig{.label_smoothing = 0.1, .z_loss = 1e-3}}) {
        const std::int64_t few = 130;
        dense.bias_O = stored.bias_O = bias_V;
        const at::Tensor of_dense = leaf(hidden_TD.narrow(0, 0, few)), of_stored = leaf(hidden_TD.narrow(0, 0, few));
        const auto value = [&](const at::Tensor& x_TD, const models::Linear& head) {
          const at::Tensor nats = cross_entropy_sum(x_TD, head, targets_T.narrow(0, 0, few), keep_T.narrow(0, 0, few), 1, loss);
          nats.backward();
          return nats.item<double>();
        };
        EXPECT_EQ(value(of_stored, stored), value(of_dense, dense)) << bias_V.defined();
        EXPECT_TRUE(at::equal(of_stored.grad(), of_dense.grad())) << bias_V.defined();
      }
  }
}

// The same values in bf16: logits and sums are f32, so the loss is the formula's; gradients have had a rounding on the way.
TEST(CrossEntropy, OfABf16HeadEqualsTheFormula) {
  const std::int64_t tokens = 1001, width = 37, vocabulary = 1031;
  const at::Tensor hidden_TD = at::randn({tokens, width}).to(at::kBFloat16), weight_VD = at::randn({vocabulary, width}).to(at::kBFloat16), targets_T = at::arange(tokens), keep_T = targets_T.ne(30);
  for (const LossConfig& loss : {LossConfig{}, LossConfig{.label_smoothing = 0.2, .z_loss = 1e-3}}) {
    const at::Tensor h = leaf(hidden_TD.to(at::kDouble)), hidden = leaf(hidden_TD), expected = plain_loss(h, weight_VD.to(at::kDouble), targets_T, keep_T, loss);
    expected.backward();
    const at::Tensor nats = cross_entropy_sum(hidden, head_of(weight_VD), targets_T, keep_T, 1, loss);
    nats.backward();
    // Elsewhere chunks of logits are rounded to bf16 on their way through memory.
    const bool tiled = models::has_bf16_tiles() && !models::has_bf16_matrix_unit();
    EXPECT_TRUE(is_close(nats, expected, {.relative = tiled ? 2e-6 : 1e-3}));
    EXPECT_TRUE(is_close_to_scale(hidden.grad(), h.grad(), tiled ? 6e-3 : 5e-2));
    const at::Tensor each_K = cross_entropy_of_kept(hidden, head_of(weight_VD), targets_T, keep_T);
    if (loss.label_smoothing == 0) {
      EXPECT_NEAR(each_K.sum(at::kDouble).item<double>(), nats.item<double>(), 1e-6 * nats.item<double>());
    }
  }
}

TEST(CrossEntropy, ByOperatorsRowsAreThoseOfTheProcessorsLoop) {
  const std::int64_t rows = 37, vocabulary = 2053;
  const at::Tensor logits_KV = at::randn({rows, vocabulary}) * 4, targets_K = at::arange(rows, at::kLong) * 55;
  for (const LossConfig& loss : {LossConfig{}, LossConfig{.label_smoothing = 0.1}, LossConfig{.z_loss = 1e-2}, LossConfig{.label_smoothing = 0.2, .z_loss = 1e-3}}) {
    at::Tensor by_loop = logits_KV.clone(), by_operators = logits_KV.clone();
    const at::Tensor nats_K = at::zeros({rows}, at::kDouble), only_nats_K = cross_entropy_rows_by_operators(by_operators, targets_K, loss, false);
    EXPECT_TRUE(by_operators.equal(logits_KV));  // nothing is overwritten without a gradient
    models::kernels::cross_entropy_rows(by_loop.mutable_data_ptr<float>(), targets_K.const_data_ptr<std::int64_t>(), loss.label_smoothing, loss.z_loss, true, nats_K.mutable_data_ptr<double>(), rows, vocabulary);
    EXPECT_TRUE(is_close(only_nats_K, nats_K, {.relative = 1e-6}));
    EXPECT_TRUE(cross_entropy_rows_by_operators(by_operators, targets_K, loss, true).equal(only_nats_K));
    EXPECT_TRUE(is_close(by_operators, by_loop, {.relative = 4e-6, .absolute = 2e-7}));

    // In bf16 the same values are computed with in f32; what comes out is rounded once.
    at::Tensor narrow = logits_KV.to(at::kBFloat16), wide = narrow.to(at::kFloat);
    const at::Tensor nats_of_narrow_K = cross_entropy_rows_by_operators(narrow, targets_K, loss, true);
    EXPECT_TRUE(nats_of_narrow_K.equal(cross_entropy_rows_by_operators(wide, targets_K, loss, true)));
    EXPECT_TRUE(narrow.equal(wide.to(at::kBFloat16)));
  }
}

// Every way through a head whose logits are soft-capped: tiles, chunks (smoothing, a head that trains), the head as it is stored, and the Linear's own backward.
TEST(CrossEntropy, OfASoftCappedHeadEqualsTheFormula) {
  const double cap = 3;  // logits reach four times as far
  const std::int64_t tokens = 400, width = 16, vocabulary = 1030;
  const at::Tensor stored_VD = at::randn({vocabulary, width}).to(at::kBFloat16), hidden_TD = at::randn({tokens, width}), targets_T = at::arange(tokens) * 2, keep_T = targets_T.ne(30);
  const at::Tensor bias_V = at::randn({vocabulary}), a_RI = at::randn({2, width}), b_OR = at::randn({vocabulary, 2}) * 0.3;
  for (const LossConfig& loss : {LossConfig{}, LossConfig{.z_loss = 1e-2}, LossConfig{.label_smoothing = 0.2, .z_loss = 1e-3}})
    for (const std::string kind : {"frozen", "trained", "stored", "bias", "adapter", "rows"}) {
      SCOPED_TRACE(kind + ", smoothing " + std::to_string(loss.label_smoothing) + ", z " + std::to_string(loss.z_loss));
      models::Linear head = head_of(kind == "trained" ? leaf(stored_VD.to(at::kFloat)) : stored_VD.to(at::kFloat), kind == "bias" ? leaf(bias_V) : at::Tensor());
      head.soft_cap = cap;
      if (kind.starts_with("stored")) lora::keep_as_stored(head, stored_VD);
      if (kind == "adapter") head.adapter = models::Adapter{.a_RI = leaf(a_RI), .b_OR = leaf(b_OR), .magnitude_O = {}, .scale = 0.5};
      if (kind == "rows") head.token_row_ids = {3, 900}, head.token_rows_ND = leaf(at::ones({2, width}));
      const at::Tensor hidden = leaf(hidden_TD), nats = cross_entropy_sum(hidden, head, targets_T, keep_T, 1, loss);
      (nats * 2).backward();

      const at::Tensor h = leaf(hidden_TD.to(at::kDouble)), w = leaf(stored_VD.to(at::kDouble)), bias = leaf(bias_V.to(at::kDouble)), a = leaf(a_RI.to(at::kDouble)), b = leaf(b_OR.to(at::kDouble)), rows = leaf(at::ones({2, width}, at::kDouble));
      at::Tensor logits_TV = at::matmul(h, w.t());
      if (kind == "bias") logits_TV = logits_TV + bias;
      if (kind == "adapter") logits_TV = logits_TV + at::matmul(at::matmul(h, a.t()), b.t()) * 0.5;
      if (kind == "rows") logits_TV = logits_TV.index_copy(1, at::tensor({3, 900}, at::kLong), at::matmul(h, rows.t()));
      logits_TV = at::tanh(logits_TV / cap) * cap;
      const at::Tensor expected = plain_loss_of_logits(logits_TV, targets_T, keep_T, loss);
      (expected * 2).backward();
      EXPECT_TRUE(is_close(nats, expected, {.relative = 2e-6}));
      EXPECT_TRUE(is_close_to_scale(hidden.grad(), h.grad(), 1e-5));
      const auto compare = [&](const at::Tensor& tensor, const at::Tensor& wide) {
        EXPECT_TRUE(!tensor.defined() || !tensor.requires_grad() || is_close_to_scale(tensor.grad(), wide.grad(), 1e-5));
      };
      compare(head.weight_OI, w), compare(head.bias_O, bias), compare(head.token_rows_ND, rows);
      if (head.adapter) compare(head.adapter->a_RI, a), compare(head.adapter->b_OR, b);
      if (loss.label_smoothing > 0 || loss.z_loss > 0) continue;
      EXPECT_TRUE(is_close(cross_entropy_of_kept(hidden_TD, head, targets_T, keep_T).sum(at::kDouble), expected, {.relative = 2e-6}));
      EXPECT_TRUE(is_close_to_scale(head(hidden_TD, 0), logits_TV, 2e-6));
    }
}

TEST(CrossEntropy, OfASoftCappedBf16HeadEqualsTheFormula) {
  const double cap = 3;
  const std::int64_t tokens = 301, width = 37, vocabulary = 1031;
  const at::Tensor hidden_TD = at::randn({tokens, width}).to(at::kBFloat16), weight_VD = at::randn({vocabulary, width}).to(at::kBFloat16), targets_T = at::arange(tokens), keep_T = targets_T.ne(30);
  models::Linear head = head_of(weight_VD);
  head.soft_cap = cap;
  for (const LossConfig& loss : {LossConfig{}, LossConfig{.z_loss = 1e-2}, LossConfig{.label_smoothing = 0.2}}) {
    const at::Tensor h = leaf(hidden_TD.to(at::kDouble)), hidden = leaf(hidden_TD);
    const at::Tensor expected = plain_loss_of_logits(at::tanh(at::matmul(h, weight_VD.to(at::kDouble).t()) / cap) * cap, targets_T, keep_T, loss);
    expected.backward();
    const at::Tensor nats = cross_entropy_sum(hidden, head, targets_T, keep_T, 1, loss);
    nats.backward();
    const bool tiled = models::has_bf16_tiles() && !models::has_bf16_matrix_unit() && loss.label_smoothing == 0;
    EXPECT_TRUE(is_close(nats, expected, {.relative = tiled ? 2e-6 : 1e-3}));
    EXPECT_TRUE(is_close_to_scale(hidden.grad(), h.grad(), tiled ? 6e-3 : 5e-2));
  }
}

TEST(CrossEntropy, WhatIsNotFiniteIsNotAveragedAway) {
  at::Tensor hidden_TD = at::randn({5, 3});
  hidden_TD[2][1] = std::numeric_limits<float>::quiet_NaN();
  const at::Tensor weight_VD = at::randn({40, 3}), targets_T = at::zeros({5}, at::kLong), keep_T = at::ones({5}, at::kBool);
  for (const bool trains_head : {false, true})
    EXPECT_TRUE(std::isnan(cross_entropy_sum(leaf(hidden_TD), head_of(trains_head ? leaf(weight_VD) : weight_VD), targets_T, keep_T, 1).item<double>())) << trains_head;
}

TEST(CrossEntropy, Bf16StaysNearF32) {
  const Golden torch("cross_entropy.safetensors");
  const at::Tensor keep = torch["keep"] & torch["hidden"].abs().amax(1).lt(10);
  const at::Tensor exact = cross_entropy_sum(torch["hidden"], head_of(torch["weight"]), torch["targets"], keep, 1);
  const at::Tensor hidden = leaf(torch["hidden"].to(at::kBFloat16));
  const at::Tensor rough = cross_entropy_sum(hidden, head_of(torch["weight"].to(at::kBFloat16)), torch["targets"], keep, 1);
  rough.backward();
  EXPECT_TRUE(is_close(rough, exact, {.relative = 3e-3}));
  EXPECT_EQ(hidden.grad().scalar_type(), at::kBFloat16);
}

}  // namespace
}  // namespace alambic::train
