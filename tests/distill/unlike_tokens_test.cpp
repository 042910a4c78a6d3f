// SPDX-License-Identifier: Apache-2.0
#include "distill/unlike_tokens.h"

#include <ATen/ops/eye.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <sstream>

#include "distill/alignment.h"
#include "distill/imitation.h"
#include "tests/closeness.h"
#include "tests/golden.h"
#include "tests/support.h"

namespace alambic::distill {
namespace {

using testing::Golden;
using testing::is_close;
using testing::is_close_to_scale;

const std::vector<std::string> kCases = {"uld", "uld.warm", "gold", "gold.warm", "gold.forward", "gold.reverse"};

std::vector<std::int64_t> numbers(const at::Tensor& tensor) { return {tensor.const_data_ptr<std::int64_t>(), tensor.const_data_ptr<std::int64_t>() + tensor.numel()}; }

models::Linear identity_head(std::int64_t size) {
  models::Linear head;
  head.weight_OI = at::eye(size);
  return head;
}

std::shared_ptr<VocabularyMap> map_of(const std::vector<std::pair<std::int64_t, std::int64_t>>& pairs, std::int64_t student, std::int64_t teacher) {
  auto map = std::make_shared<VocabularyMap>();
  map->student_size = student, map->teacher_size = teacher;
  map->teacher_of.assign(static_cast<std::size_t>(student), -1);
  std::vector<bool> taken(static_cast<std::size_t>(teacher));
  for (const auto& [ours, theirs] : pairs) {
    map->student_ids.push_back(ours), map->teacher_ids.push_back(theirs);
    map->teacher_of[static_cast<std::size_t>(ours)] = theirs, taken[static_cast<std::size_t>(theirs)] = true;
  }
  for (std::int64_t id = 0; id < teacher; ++id)
    if (!taken[static_cast<std::size_t>(id)]) map->teacher_alone.push_back(id);
  return map;
}

// The golden's text `copies` times, behind `before` rows of no span, through the whole path of the loss.
struct Path {
  const Golden& trl;
  DivergenceConfig divergence;
  UnlikeConfig unlike;
  models::Linear head = identity_head(60), teacher_head = identity_head(70);
  std::vector<StudentSpan> spans;

  Path(const Golden& golden, const std::string& name) : trl(golden) {
    std::istringstream setting(golden.metadata().at(name));
    std::string hybrid;
    setting >> hybrid >> divergence.objective >> divergence.beta >> divergence.temperature >> unlike.matched_share;
    unlike.hybrid = hybrid == "True";
  }

  at::Tensor operator()(std::int64_t copies, std::int64_t before, at::Tensor& hidden_TD, Nats& nats, double factor = 1) {
    const std::vector<std::int64_t> ours = numbers(trl["student_ends"]), theirs = numbers(trl["teacher_ends"]), teacher_ids = numbers(trl["teacher_ids"]);
    std::vector<std::pair<std::int64_t, std::int64_t>> pairs;
    const std::vector<std::int64_t> flat = numbers(trl["pairs"]);
    for (std::size_t i = 0; i < flat.size(); i += 2) pairs.emplace_back(flat[i], flat[i + 1]);
    auto signal = std::make_shared<UnlikeSignal>();
    signal->map = map_of(pairs, 57, 66), signal->config = unlike, signal->head = &teacher_head;
    const auto rows = static_cast<std::int64_t>(ours.size());
    const std::vector<double> known = log_probabilities(trl["teacher"], teacher_head, teacher_ids, 66, divergence.temperature);
    std::vector<at::Tensor> teacher_rows;
    for (std::int64_t copy = 0; copy < copies; ++copy)
      for (const Span& span : align(ours, theirs)) {
        signal->spans.push_back({.first = before + copy * rows + span.student_first, .count = span.student_count});
        double log_prefix = 0;
        for (std::int64_t i = span.teacher_first; i + 1 < span.teacher_first + span.teacher_count; ++i) log_prefix += known[static_cast<std::size_t>(i)];
        signal->log_prefix_S.push_back(log_prefix);
        teacher_rows.push_back(trl["teacher"][span.teacher_first + span.teacher_count - 1]);
      }
    signal->hidden_SD = at::zeros({static_cast<std::int64_t>(teacher_rows.size()), 70});
    for (std::size_t i = 0; i < teacher_rows.size(); ++i) signal->hidden_SD[static_cast<std::int64_t>(i)].copy_(teacher_rows[i]);
    spans = signal->spans;
    hidden_TD = at::zeros({before + copies * rows, 60});
    at::Tensor targets_T = at::zeros({before + copies * rows}, at::kLong);
    hidden_TD.narrow(0, before, copies * rows).copy_(trl["student"].repeat({copies, 1}));
    targets_T.narrow(0, before, copies * rows).copy_(trl["student_ids"].repeat({copies}));
    hidden_TD.requires_grad_(true);
    const Mix mix{.cross_entropy = 0, .divergence = factor, .text = {}, .imitation = divergence, .shared_vocabulary = 57};
    const std::vector<TeacherRows> teachers = {{.unlike = signal}};
    return imitation_sum(hidden_TD, head, targets_T, at::ones({before + copies * rows}, at::kBool), 0, mix, teachers, nats);
  }
};

TEST(UnlikeTokens, SpansAreTheOraclesSpans) {
  const Golden trl("unlike_tokens.safetensors");
  const std::vector<std::int64_t> expected = numbers(trl["spans"]);
  const std::vector<Span> spans = align(numbers(trl["student_ends"]), numbers(trl["teacher_ends"]));
  ASSERT_EQ(spans.size() * 4, expected.size());
  for (std::size_t i = 0; i < spans.size(); ++i) EXPECT_EQ(spans[i], (Span{expected[4 * i], expected[4 * i + 1], expected[4 * i + 2], expected[4 * i + 3]}));
}

TEST(UnlikeTokens, AgreesWithTrl) {  // tests/oracle/unlike_tokens_oracle.py
  const Golden trl("unlike_tokens.safetensors");
  SCOPED_TRACE(trl.provenance());
  for (const std::string& name : kCases) {
    SCOPED_TRACE(name);
    Path path(trl, name);
    Nats nats;
    at::Tensor hidden_TD;
    const at::Tensor loss = path(1, 0, hidden_TD, nats, 0.5);
    loss.backward();
    EXPECT_TRUE(is_close(loss, trl[name + ".value"] * 0.5, {.relative = 1e-6}));
    EXPECT_NEAR(nats.divergence, trl[name + ".value"].item<double>(), 1e-6 * std::abs(nats.divergence));
    EXPECT_TRUE(is_close_to_scale(hidden_TD.grad(), trl[name + ".gradient"] * 0.5, 2e-6));
    EXPECT_EQ(hidden_TD.grad().narrow(1, 57, 3).abs().max().item<float>(), 0);  // padding
  }
}

// A chunk of 60 tokens has 512 rows.
TEST(UnlikeTokens, ASpanInTwoChunksIsLikeAnyOther) {
  const Golden trl("unlike_tokens.safetensors");
  const std::int64_t rows = trl["student"].size(0), copies = 90;
  for (const std::string& name : kCases)
    for (const std::int64_t before : {0, 1, 5, 6, 9}) {
      Path path(trl, name);
      Nats nats;
      at::Tensor hidden_TD;
      const at::Tensor loss = path(copies, before, hidden_TD, nats);
      loss.backward();
      EXPECT_TRUE(is_close(loss, trl[name + ".value"] * static_cast<double>(copies), {.relative = 1e-6})) << name << before;
      EXPECT_TRUE(is_close_to_scale(hidden_TD.grad().narrow(0, before, copies * rows), trl[name + ".gradient"].repeat({copies, 1}), 2e-6)) << name << before;
      std::size_t cut = 0;
      for (const StudentSpan& span : path.spans) cut += span.first / 512 != (span.first + span.count - 1) / 512;
      if (before == 0) {
        EXPECT_GT(cut, 0u);
      }
    }
}

TEST(UnlikeTokens, IsNothingAtEquality) {
  const at::Tensor logits = at::randn({120}) * 3;
  const float* const row = logits.const_data_ptr<float>();
  std::vector<std::pair<std::int64_t, std::int64_t>> all, half;
  for (std::int64_t id = 0; id < 120; ++id) {
    all.emplace_back(id, id);
    if (id % 2 == 0) half.emplace_back(id, id);
  }
  for (const std::string objective : {"forward_kl", "reverse_kl", "jensen_shannon"})
    for (const bool hybrid : {false, true})
      for (const auto& pairs : {all, half}) {
        std::vector<float> gradient(120);
        const SpanValue value = unlike_row({.objective = objective, .temperature = 2}, {.hybrid = hybrid, .matched_share = 0.5}, *map_of(pairs, 120, 120), {row, -1.5}, {row, -1.5}, 1, gradient.data());
        EXPECT_EQ(value.value, 0) << objective;
        EXPECT_EQ(value.d_log_prefix, 0) << objective;
        for (const float one : gradient) ASSERT_EQ(one, 0) << objective;
      }
}

// Where all tokens are common and spans are single tokens, the hybrid with the whole weight on them is the plain divergence.
TEST(UnlikeTokens, GoldOfCommonTokensIsThePlainDivergence) {
  const at::Tensor student = at::randn({80}) * 2, teacher = at::randn({80}) * 2;
  std::vector<std::pair<std::int64_t, std::int64_t>> all;
  for (std::int64_t id = 0; id < 80; ++id) all.emplace_back(id, id);
  for (const std::string objective : {"forward_kl", "reverse_kl", "jensen_shannon"}) {
    const DivergenceConfig config{.objective = objective, .temperature = 1.5, .beta = 0.3};
    at::Tensor ours = at::zeros({80}), plain = at::zeros({80}), scratch = at::zeros({160});
    const SpanValue value = unlike_row(config, {.hybrid = true}, *map_of(all, 80, 80), {teacher.const_data_ptr<float>(), 0}, {student.const_data_ptr<float>(), 0}, 0.7, ours.mutable_data_ptr<float>());
    const double expected = divergence_row(config, teacher.const_data_ptr<float>(), student.const_data_ptr<float>(), 80, 0.7, plain.mutable_data_ptr<float>(), scratch.mutable_data_ptr<float>());
    EXPECT_NEAR(value.value, expected, 1e-5 * expected) << objective;
    EXPECT_TRUE(is_close_to_scale(ours, plain, 1e-5)) << objective;
  }
}

TEST(UnlikeTokens, IsFiniteAtExtremes) {
  const float none = -std::numeric_limits<float>::infinity();
  at::Tensor one = at::randn({50}) * 1e4, other = at::randn({40}) * 1e4;
  one[3] = none, other[5] = none;
  std::vector<std::pair<std::int64_t, std::int64_t>> pairs;
  for (std::int64_t id = 0; id < 30; ++id) pairs.emplace_back(id, 39 - id);
  for (const std::string objective : {"forward_kl", "reverse_kl", "jensen_shannon"})
    for (const bool hybrid : {false, true})
      for (const double log_prefix : {0.0, -5.0, -1e5, -1e30}) {
        at::Tensor gradient = at::zeros({50});
        const SpanValue value = unlike_row({.objective = objective, .temperature = 0.5}, {.hybrid = hybrid}, *map_of(pairs, 50, 40), {other.const_data_ptr<float>(), log_prefix}, {one.const_data_ptr<float>(), -3}, 1,
                                           gradient.mutable_data_ptr<float>());
        EXPECT_TRUE(std::isfinite(value.value) && std::isfinite(value.d_log_prefix)) << objective << log_prefix;
        EXPECT_TRUE(gradient.isfinite().all().item<bool>()) << objective << log_prefix;
        EXPECT_GE(value.value, 0) << objective;
      }
  one[7] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(unlike_row({}, {}, *map_of(pairs, 50, 40), {other.const_data_ptr<float>(), 0}, {one.const_data_ptr<float>(), 0}, 1, nullptr).value));
}

}  // namespace
}  // namespace alambic::distill
