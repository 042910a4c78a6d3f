// SPDX-License-Identifier: Apache-2.0
#include "distill/imitation.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>

#include "tests/closeness.h"
#include "tests/support.h"
#include "train/run_log.h"

namespace alambic::distill {
namespace {

using testing::fails_with;
using testing::is_close;
using testing::is_close_to_scale;

at::Tensor leaf(const at::Tensor& value) { return value.clone().requires_grad_(true); }

models::Linear head_of(const at::Tensor& weight_VD) {
  models::Linear head;
  head.weight_OI = weight_VD;
  return head;
}

at::Tensor capped(const at::Tensor& logits, double soft_cap) { return soft_cap > 0 ? at::tanh(logits / soft_cap) * soft_cap : logits; }

// More kept rows than a chunk of 512, masked rows, two teachers of other widths with weights of which some are 0, and heads of
// other sizes than the student's of 200 tokens.
struct Case {
  static constexpr std::int64_t kTokens = 700, kWidth = 6, kVocabulary = 200, kShared = 190;
  at::Tensor hidden_TD = at::randn({kTokens, kWidth}), weight_VD = at::randn({kVocabulary, kWidth}), targets_T = at::arange(kTokens) % kShared, keep_T = targets_T.ne(3) & targets_T.ne(4);
  at::Tensor index_K = keep_T.nonzero().squeeze(1);
  std::array<at::Tensor, 2> teacher_hidden_KD = {at::randn({index_K.numel(), 5}), at::randn({index_K.numel(), 9})};
  std::array<models::Linear, 2> teacher_head = {head_of(at::randn({256, 5})), head_of(at::randn({kShared, 9}))};
  std::array<at::Tensor, 2> weights_K = {(at::arange(index_K.numel()) % 3).to(at::kFloat), at::Tensor()};
  Mix mix{.cross_entropy = 0.3, .divergence = 0.7, .text = {.label_smoothing = 0.1, .z_loss = 1e-3}, .imitation = {.objective = "forward_kl", .temperature = 2}, .shared_vocabulary = kShared};

  std::array<TeacherRows, 2> teachers() const {
    return {TeacherRows{.head = &teacher_head[0], .hidden_KD = teacher_hidden_KD[0], .weights_K = weights_K[0]},
            TeacherRows{.head = &teacher_head[1], .hidden_KD = teacher_hidden_KD[1], .weights_K = weights_K[1]}};
  }

  // The same from whole logits, by autograd in f64.
  at::Tensor plain(const at::Tensor& logits_TV, Nats& nats) const {
    const at::Tensor logits_KV = logits_TV.index_select(0, index_K), log_q_KV = at::log_softmax(logits_KV, 1);
    const at::Tensor log_sum_K = (logits_KV - log_q_KV).select(1, 0);
    const double e = mix.text.label_smoothing;
    const at::Tensor text = -(log_q_KV.gather(1, targets_T.index_select(0, index_K).unsqueeze(1)).sum() * (1 - e) + log_q_KV.mean(1).sum() * e) + (log_sum_K * log_sum_K).sum() * mix.text.z_loss;
    const double t = mix.imitation.temperature;
    at::Tensor imitation = at::zeros({}, at::kDouble);
    for (std::size_t i = 0; i < 2; ++i) {
      const at::Tensor teacher_KV = capped(at::matmul(teacher_hidden_KD[i].to(at::kDouble), teacher_head[i].weight_OI.to(at::kDouble).t()), teacher_head[i].soft_cap).narrow(1, 0, mix.shared_vocabulary) / t;
      const at::Tensor log_p_KV = at::log_softmax(teacher_KV, 1), log_s_KV = at::log_softmax(logits_KV.narrow(1, 0, mix.shared_vocabulary) / t, 1);
      at::Tensor kl_K = (log_p_KV.exp() * (log_p_KV - log_s_KV)).sum(1) * t * t;
      if (weights_K[i].defined()) kl_K = kl_K * weights_K[i];
      imitation = imitation + kl_K.sum();
    }
    nats = {.cross_entropy = text.item<double>(), .divergence = imitation.item<double>()};
    return text * mix.cross_entropy + imitation * mix.divergence;
  }
};

TEST(Imitation, IsTheFormulaOnWholeLogitsForEveryHead) {
  Case c;
  for (const std::string kind : {"frozen", "trained", "adapter", "capped", "capped trained", "capped adapter"}) {
    SCOPED_TRACE(kind);
    const bool trained = kind.ends_with("trained"), adapted = kind.ends_with("adapter");
    models::Linear head = head_of(trained ? leaf(c.weight_VD) : c.weight_VD);
    if (kind.starts_with("capped")) head.soft_cap = 3, c.teacher_head[0].soft_cap = 2;  // the other teacher has none
    const at::Tensor a_RI = at::randn({2, Case::kWidth}), b_OR = at::randn({Case::kVocabulary, 2});
    if (adapted) head.adapter = models::Adapter{.a_RI = leaf(a_RI), .b_OR = leaf(b_OR), .magnitude_O = {}, .scale = 0.5};
    const at::Tensor hidden_TD = leaf(c.hidden_TD);
    Nats nats, expected_nats;
    const auto teachers = c.teachers();
    const at::Tensor loss = imitation_sum(hidden_TD, head, c.targets_T, c.keep_T, 1, c.mix, teachers, nats);
    (loss * 2).backward();

    const at::Tensor h = leaf(c.hidden_TD.to(at::kDouble)), w = leaf(c.weight_VD.to(at::kDouble)), a = leaf(a_RI.to(at::kDouble)), b = leaf(b_OR.to(at::kDouble));
    at::Tensor logits_TV = at::matmul(h, w.t());
    if (adapted) logits_TV = logits_TV + at::matmul(at::matmul(h, a.t()), b.t()) * 0.5;
    const at::Tensor expected = c.plain(capped(logits_TV, head.soft_cap), expected_nats);
    (expected * 2).backward();
    EXPECT_TRUE(is_close(loss, expected, {.relative = 2e-6}));
    EXPECT_NEAR(nats.cross_entropy, expected_nats.cross_entropy, 2e-6 * expected_nats.cross_entropy);
    EXPECT_NEAR(nats.divergence, expected_nats.divergence, 2e-6 * expected_nats.divergence);
    EXPECT_TRUE(is_close_to_scale(hidden_TD.grad(), h.grad(), 5e-6));
    if (trained) {
      EXPECT_TRUE(is_close_to_scale(head.weight_OI.grad(), w.grad(), 1e-5));
    }
    if (adapted) {
      EXPECT_TRUE(is_close_to_scale(head.adapter->a_RI.grad(), a.grad(), 1e-5));
      EXPECT_TRUE(is_close_to_scale(head.adapter->b_OR.grad(), b.grad(), 1e-5));
    }
  }
}

TEST(Imitation, InBf16StaysNearF32) {
  const Case c;
  Nats exact_nats, rough_nats;
  const at::Tensor exact_TD = leaf(c.hidden_TD), rough_TD = leaf(c.hidden_TD.to(at::kBFloat16));
  auto teachers = c.teachers();
  imitation_sum(exact_TD, head_of(c.weight_VD), c.targets_T, c.keep_T, 1, c.mix, teachers, exact_nats).backward();
  std::array<models::Linear, 2> heads;
  for (std::size_t i = 0; i < 2; ++i) {
    heads[i] = head_of(c.teacher_head[i].weight_OI.to(at::kBFloat16));
    teachers[i].head = &heads[i], teachers[i].hidden_KD = teachers[i].hidden_KD.to(at::kBFloat16);
  }
  imitation_sum(rough_TD, head_of(c.weight_VD.to(at::kBFloat16)), c.targets_T, c.keep_T, 1, c.mix, teachers, rough_nats).backward();
  EXPECT_NEAR(rough_nats.divergence, exact_nats.divergence, 5e-3 * exact_nats.divergence);
  EXPECT_NEAR(rough_nats.cross_entropy, exact_nats.cross_entropy, 5e-3 * exact_nats.cross_entropy);
  ASSERT_EQ(rough_TD.grad().scalar_type(), at::kBFloat16);
  EXPECT_TRUE(is_close_to_scale(rough_TD.grad(), exact_TD.grad(), 2e-2));
}

TEST(Imitation, OfNoWeightIsTheCrossEntropyOfTrainBitForBit) {
  const Case c;
  Mix mix = c.mix;
  mix.cross_entropy = 1, mix.divergence = 0;
  const at::Tensor ours_TD = leaf(c.hidden_TD), trains_TD = leaf(c.hidden_TD);
  Nats nats;
  const at::Tensor ours = imitation_sum(ours_TD, head_of(c.weight_VD), c.targets_T, c.keep_T, 1, mix, c.teachers(), nats);
  const at::Tensor trains = train::cross_entropy_sum(trains_TD, head_of(c.weight_VD), c.targets_T, c.keep_T, 1, mix.text);
  ours.backward(), trains.backward();
  EXPECT_EQ(ours.item<double>(), trains.item<double>());
  EXPECT_EQ(nats.cross_entropy, trains.item<double>());
  EXPECT_TRUE(ours_TD.grad().equal(trains_TD.grad()));
}

TEST(Imitation, OfTheTeacherAloneStillTellsTheCrossEntropyAndPassesOverPadding) {
  Case c;
  c.mix.cross_entropy = 0, c.mix.divergence = 1;
  models::Linear head = head_of(leaf(c.weight_VD));
  Nats nats, expected;
  imitation_sum(c.hidden_TD, head, c.targets_T, c.keep_T, 1, c.mix, c.teachers(), nats).backward();
  c.plain(at::matmul(c.hidden_TD.to(at::kDouble), c.weight_VD.to(at::kDouble).t()), expected);
  EXPECT_NEAR(nats.cross_entropy, expected.cross_entropy, 2e-6 * expected.cross_entropy);
  EXPECT_EQ(head.weight_OI.grad().narrow(0, Case::kShared, Case::kVocabulary - Case::kShared).abs().max().item<float>(), 0);
  EXPECT_GT(head.weight_OI.grad().narrow(0, 0, Case::kShared).abs().min().item<float>(), 0);
}

TEST(Imitation, ASignalOfEveryTokenIsTheLiveTeacher) {
  const Case c;
  const std::int64_t K = c.index_K.numel();
  const at::Tensor p_KV = at::softmax(at::matmul(c.teacher_hidden_KD[1], c.teacher_head[1].weight_OI.t()) / 2, 1).contiguous();
  const SparseSignal signal{.ids_KN = at::arange(Case::kShared, at::kInt).expand({K, Case::kShared}).contiguous(), .probabilities_KN = p_KV, .tail_K = at::zeros({K})};
  const at::Tensor live_TD = leaf(c.hidden_TD), top_TD = leaf(c.hidden_TD), sampled_TD = leaf(c.hidden_TD);
  Nats live, top, sampled;
  const std::array<TeacherRows, 1> live_rows = {c.teachers()[1]}, top_rows = {TeacherRows{.signal = &signal}}, sampled_rows = {TeacherRows{.signal = &signal, .sampled = true}};
  imitation_sum(live_TD, head_of(c.weight_VD), c.targets_T, c.keep_T, 1, c.mix, live_rows, live).backward();
  imitation_sum(top_TD, head_of(c.weight_VD), c.targets_T, c.keep_T, 1, c.mix, top_rows, top).backward();
  imitation_sum(sampled_TD, head_of(c.weight_VD), c.targets_T, c.keep_T, 1, c.mix, sampled_rows, sampled).backward();
  EXPECT_NEAR(top.divergence, live.divergence, 1e-5 * live.divergence);
  EXPECT_TRUE(is_close_to_scale(top_TD.grad(), live_TD.grad(), 1e-5));
  EXPECT_TRUE(is_close_to_scale(sampled_TD.grad(), live_TD.grad(), 1e-5));
  EXPECT_GT(sampled.divergence, live.divergence);  // the teacher's entropy is in it
}

TEST(Imitation, ATeacherThatIsNotFiniteIsNotAveragedAway) {
  Case c;
  c.teacher_hidden_KD[1][600][0] = std::numeric_limits<float>::quiet_NaN();
  Nats nats;
  EXPECT_TRUE(std::isnan(imitation_sum(leaf(c.hidden_TD), head_of(c.weight_VD), c.targets_T, c.keep_T, 1, c.mix, c.teachers(), nats).item<double>()));
}

TEST(Imitation, NothingKeptIsZeroAndWhatDoesNotFitIsNamed) {
  const Case c;
  Nats nats;
  std::array<TeacherRows, 1> none = {TeacherRows{.head = &c.teacher_head[0], .hidden_KD = at::zeros({0, 5})}};
  EXPECT_EQ(imitation_sum(leaf(c.hidden_TD), head_of(c.weight_VD), c.targets_T, c.keep_T & ~c.keep_T, 1, c.mix, none, nats).item<double>(), 0);
  EXPECT_TRUE(fails_with(ErrorKind::kBug, "hidden states or head", [&] { imitation_sum(c.hidden_TD, head_of(c.weight_VD), c.targets_T, c.keep_T, 1, c.mix, none, nats); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "id 989", [&] { imitation_sum(c.hidden_TD, head_of(c.weight_VD), c.targets_T + 800, c.keep_T, 1, c.mix, c.teachers(), nats); }));
}

class ImitationOfAVast : public ::testing::TestWithParam<at::ScalarType> {};

TEST_P(ImitationOfAVast, MemoryIsIndependentOfAVocabularyOf262144) {
  const std::int64_t tokens = 4096, vocabulary = 262'144, width = 8;  // whole logits: 4 GiB a model, 2 in bf16
  const models::Linear head = head_of(at::randn({vocabulary, width}).to(GetParam())), teacher_head = head_of(at::randn({vocabulary, width}).to(GetParam()));
  const at::Tensor hidden_TD = leaf(at::randn({tokens, width}).to(GetParam()));
  const std::array<TeacherRows, 1> teachers = {TeacherRows{.head = &teacher_head, .hidden_KD = at::randn({tokens, width}).to(GetParam())}};
  const Mix mix{.cross_entropy = 0.5, .divergence = 0.5, .text = {}, .imitation = {.objective = "forward_kl"}, .shared_vocabulary = vocabulary};
  Nats nats;
  const std::uint64_t before = train::process_memory().peak;
  imitation_sum(hidden_TD, head, at::zeros({tokens}, at::kLong), at::ones({tokens}, at::kBool), 1, mix, teachers, nats).backward();
  EXPECT_LT(train::process_memory().peak - before, (GetParam() == at::kFloat ? 500ull : 250ull) << 20);
}

INSTANTIATE_TEST_SUITE_P(Vocabulary, ImitationOfAVast, ::testing::Values(at::kFloat, at::kBFloat16), [](const auto& test) { return test.param == at::kFloat ? std::string("Head") : std::string("Bf16Head"); });

}  // namespace
}  // namespace alambic::distill
