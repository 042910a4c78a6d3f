// SPDX-License-Identifier: Apache-2.0
#include "distill/divergence.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/norm.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

#include "core/random.h"
#include "tests/closeness.h"
#include "tests/golden.h"
#include "tests/support.h"

namespace alambic::distill {
namespace {

using testing::fails_with;
using testing::Golden;
using testing::is_close;

struct Result {
  at::Tensor value_K, gradient_KV;
};

std::vector<float> scratch_of(std::int64_t V) { return std::vector<float>(static_cast<std::size_t>(2 * V)); }

Result rows_of(const DivergenceConfig& config, const at::Tensor& student_KV, const at::Tensor& teacher_KV, const at::Tensor& weights_K) {
  const std::int64_t K = student_KV.size(0), V = student_KV.size(1);
  Result result{at::zeros({K}, at::kDouble), at::zeros({K, V})};
  std::vector<float> scratch = scratch_of(V);
  for (std::int64_t k = 0; k < K; ++k)
    result.value_K.mutable_data_ptr<double>()[k] = divergence_row(config, teacher_KV.const_data_ptr<float>() + k * V, student_KV.const_data_ptr<float>() + k * V, V,
                                                                  weights_K[k].item<double>(), result.gradient_KV.mutable_data_ptr<float>() + k * V, scratch.data());
  return result;
}

SparseRow sparse_row(const at::Tensor& ids_KN, const at::Tensor& probabilities_KN, std::int64_t k, float tail) {
  const std::int64_t N = ids_KN.size(1);
  return {.ids = ids_KN.const_data_ptr<std::int32_t>() + k * N, .probabilities = probabilities_KN.const_data_ptr<float>() + k * N, .slots = N, .tail = tail};
}

DivergenceConfig config_of(const std::string& settings) {  // as the oracle writes them
  DivergenceConfig config;
  std::istringstream words(settings);
  words >> config.objective >> config.temperature >> config.beta >> config.skew >> config.head_share;
  EXPECT_TRUE(words) << settings;
  return config;
}

DivergenceConfig plain(const std::string& objective) { return {.objective = objective}; }

// A row's gradient to 1e-5 of what the row's own terms come to: of the logits' differences where those are extreme.
void expect_rows_close(const Result& ours, const at::Tensor& value_K, const at::Tensor& gradient_KV, const at::Tensor& student_KV, const at::Tensor& teacher_KV) {
  for (std::int64_t k = 0; k < value_K.size(0); ++k) {
    SCOPED_TRACE("row " + std::to_string(k));
    const double size = std::max(1.0, std::max(student_KV[k].abs().max().item<double>(), teacher_KV[k].abs().max().item<double>()) / 10);
    EXPECT_TRUE(is_close(ours.value_K[k], value_K[k], {.relative = 2e-6, .absolute = 1e-6 * size}));
    EXPECT_TRUE(is_close(ours.gradient_KV[k], gradient_KV[k], {.relative = 2e-6, .absolute = 1e-6 * size}));
  }
}

TEST(Divergence, ValueAndGradientAreTorchsAndTrls) {  // tests/oracle/divergence_oracle.py, in f64
  const Golden torch("divergence.safetensors");
  SCOPED_TRACE(torch.provenance());
  std::size_t cases = 0;
  for (const auto& [name, settings] : torch.metadata()) {
    if (settings.find(' ') == std::string::npos || name == "script" || name == "versions") continue;
    SCOPED_TRACE(name);
    ++cases;
    const Result ours = rows_of(config_of(settings), torch["student"], torch["teacher"], torch["weights"]);
    expect_rows_close(ours, torch[name + ".value"], torch[name + ".gradient"], torch["student"], torch["teacher"]);
  }
  EXPECT_EQ(cases, 20u);
}

TEST(Divergence, SparseSignalsAreTorchs) {
  const Golden torch("divergence.safetensors");
  SCOPED_TRACE(torch.provenance());
  const at::Tensor student_KV = torch["student"], top_ids = torch["top_k.ids"], top_p = torch["top_k.probabilities"], ids = torch["sampled.ids"], p = torch["sampled.probabilities"];
  const std::int64_t K = student_KV.size(0), V = student_KV.size(1);
  Result top{at::zeros({K}, at::kDouble), at::zeros({K, V})}, sampled{at::zeros({K}, at::kDouble), at::zeros({K, V})};
  std::vector<float> scratch = scratch_of(V);
  for (std::int64_t k = 0; k < K; ++k) {
    const float* const row = student_KV.const_data_ptr<float>() + k * V;
    const double weight = torch["weights"][k].item<double>();
    top.value_K[k] = top_k_row(2, sparse_row(top_ids, top_p, k, torch["top_k.tail"][k].item<float>()), row, V, weight, top.gradient_KV.mutable_data_ptr<float>() + k * V, scratch.data());
    sampled.value_K[k] = sampled_row(2, sparse_row(ids, p, k, 0), row, V, weight, sampled.gradient_KV.mutable_data_ptr<float>() + k * V, scratch.data());
  }
  expect_rows_close(top, torch["top_k.value"], torch["top_k.gradient"], student_KV, torch["teacher"]);
  expect_rows_close(sampled, torch["sampled.value"], torch["sampled.gradient"], student_KV, torch["teacher"]);
}

TEST(Divergence, IsExactlyZeroWithoutAGradientWhereBothAreEqual) {
  const at::Tensor logits_KV = at::randn({5, 3000}) * 5;  // more than two partial sums
  for (const std::string& objective : objective_names())
    for (const double temperature : {0.5, 1.0, 3.0}) {
      DivergenceConfig config = plain(objective);
      config.temperature = temperature;
      const Result result = rows_of(config, logits_KV, logits_KV, at::full_like(logits_KV.select(1, 0), 2));
      EXPECT_EQ(result.value_K.abs().max().item<double>(), 0) << objective;
      EXPECT_EQ(result.gradient_KV.abs().max().item<float>(), 0) << objective;
    }
}

TEST(Divergence, IsFiniteAtExtremeLogitsAndNotWhereOneIsNot) {
  at::Tensor student_KV = at::randn({4, 1500}).sign() * 1e4, teacher_KV = at::randn({4, 1500}).sign() * 1e4;
  const float infinity = std::numeric_limits<float>::infinity();
  student_KV[1] = student_KV[1] * 1e30, teacher_KV[1] = teacher_KV[1] * 1e30;
  student_KV[2][3] = -infinity, teacher_KV[2][4] = -infinity, student_KV[2][5] = -infinity, teacher_KV[2][5] = -infinity;
  student_KV[3].fill_(-1e4), teacher_KV[3].fill_(-1e4);
  student_KV[3][0] = 1e4, teacher_KV[3][1] = 1e4;  // sure of different tokens
  const at::Tensor one_K = at::full_like(student_KV.select(1, 0), 1);
  for (const std::string& objective : objective_names()) {
    DivergenceConfig config = plain(objective);
    const Result result = rows_of(config, student_KV, teacher_KV, one_K);
    EXPECT_TRUE(result.value_K.isfinite().all().item<bool>()) << objective << result.value_K;
    EXPECT_TRUE(result.gradient_KV.isfinite().all().item<bool>()) << objective;
    EXPECT_GE(result.value_K.min().item<double>(), 0) << objective;
    for (at::Tensor broken_KV : {student_KV, teacher_KV}) {
      const at::Tensor whole_KV = broken_KV.clone();
      broken_KV[0][17] = std::numeric_limits<float>::quiet_NaN();
      EXPECT_TRUE(std::isnan(rows_of(config, student_KV, teacher_KV, one_K).value_K[0].item<double>())) << objective;
      broken_KV.copy_(whole_KV);
    }
  }
}

// Independent of the goldens, and at the size of a real vocabulary: the slope uphill is the gradient's length.
TEST(Divergence, GradientsAreFiniteDifferencesOfTheValue) {
  const std::int64_t V = 49'152;
  // The same numbers each time: total variation has a kink wherever p = q, and a step across many of them is off by some thousandths.
  at::Generator numbers = at::detail::createCPUGenerator(/*seed=*/1);
  const at::Tensor student_KV = at::randn({2, V}, numbers) * 2, teacher_KV = at::randn({2, V}, numbers) * 2, weights_K = at::full_like(student_KV.select(1, 0), 3);
  for (const std::string& objective : objective_names()) {
    if (objective == "adaptive_kl") continue;  // its weight moves with a step and is a constant to the gradient
    DivergenceConfig config = plain(objective);
    config.temperature = 1.5;
    const at::Tensor gradient_KV = rows_of(config, student_KV, teacher_KV, weights_K).gradient_KV, length_K = gradient_KV.norm(2, 1).to(at::kDouble);
    const auto value = [&](double step) { return rows_of(config, student_KV + gradient_KV / length_K.unsqueeze(1).to(at::kFloat) * step, teacher_KV, weights_K).value_K; };
    EXPECT_TRUE(is_close(length_K, (value(0.1) - value(-0.1)) / 0.2, {.relative = 2e-3})) << objective;
  }
}

TEST(Divergence, TheMeanOfSampledGradientsIsTheFullOne) {
  constexpr std::int64_t V = 64, kDraws = 12, kRounds = 20'000;
  const at::Tensor student_V = at::randn({V}) * 1.5, teacher_V = at::randn({V}) * 1.5;
  const double temperature = 2;
  std::vector<float> scratch = scratch_of(V);
  at::Tensor full_V = at::zeros({V});
  DivergenceConfig config = plain("forward_kl");
  config.temperature = temperature;
  divergence_row(config, teacher_V.const_data_ptr<float>(), student_V.const_data_ptr<float>(), V, 1, full_V.mutable_data_ptr<float>(), scratch.data());
  const at::Tensor p_V = at::softmax(teacher_V.to(at::kDouble) / temperature, 0), cumulative_V = p_V.cumsum(0);
  const double cross_entropy = -(p_V * at::log_softmax(student_V.to(at::kDouble) / temperature, 0)).sum().item<double>() * temperature * temperature;

  at::Tensor sum_V = at::zeros({V}, at::kDouble), squares_V = at::zeros({V}, at::kDouble);
  double values = 0, value_squares = 0;
  std::uint64_t draw = 7;
  for (std::int64_t round = 0; round < kRounds; ++round) {
    std::vector<std::int32_t> ids;
    std::vector<float> shares;
    for (std::int64_t n = 0; n < kDraws; ++n) {
      draw = mix64(draw + 1);
      const double at = static_cast<double>(draw >> 11) * 0x1p-53;
      const auto* const begin = cumulative_V.const_data_ptr<double>();
      const auto id = static_cast<std::int32_t>(std::min<std::ptrdiff_t>(std::upper_bound(begin, begin + V, at) - begin, V - 1));
      const auto seen = std::find(ids.begin(), ids.end(), id);
      if (seen == ids.end()) ids.push_back(id), shares.push_back(1.0f / kDraws);
      else shares[static_cast<std::size_t>(seen - ids.begin())] += 1.0f / kDraws;
    }
    at::Tensor gradient_V = at::zeros({V});
    const double value = sampled_row(temperature, {.ids = ids.data(), .probabilities = shares.data(), .slots = static_cast<std::int64_t>(ids.size()), .tail = 0},
                                     student_V.const_data_ptr<float>(), V, 1, gradient_V.mutable_data_ptr<float>(), scratch.data());
    const at::Tensor wide_V = gradient_V.to(at::kDouble);
    sum_V += wide_V, squares_V += wide_V * wide_V;
    values += value, value_squares += value * value;
  }
  const at::Tensor mean_V = sum_V / kRounds, error_V = ((squares_V / kRounds - mean_V * mean_V) / kRounds).sqrt();
  const at::Tensor z_V = (mean_V - full_V.to(at::kDouble)) / error_V;
  EXPECT_LT(z_V.abs().max().item<double>(), 4.5);
  EXPECT_LT((z_V * z_V).mean().item<double>(), 1.6);  // chi-squared of 64 variables over 64: 1 with a deviation of 0.18
  const double mean = values / kRounds;
  EXPECT_NEAR(mean, cross_entropy, 4 * std::sqrt((value_squares / kRounds - mean * mean) / kRounds));
}

TEST(Divergence, TopKOfEverythingIsTheFullKl) {
  const std::int64_t V = 40;
  const at::Tensor student_V = at::randn({V}), teacher_V = at::randn({V}), p_V = at::softmax(teacher_V, 0);
  std::vector<std::int32_t> ids(V);
  for (std::int32_t i = 0; i < V; ++i) ids[static_cast<std::size_t>(i)] = i;
  at::Tensor sparse_V = at::zeros({V}), full_V = at::zeros({V});
  std::vector<float> scratch = scratch_of(V);
  for (const float tail : {0.0f, 1e-9f}) {  // a rest that rounding made, with no token left for it, is not infinite
    sparse_V.zero_(), full_V.zero_();
    const double sparse = top_k_row(1, {.ids = ids.data(), .probabilities = p_V.const_data_ptr<float>(), .slots = V, .tail = tail}, student_V.const_data_ptr<float>(), V, 1,
                                    sparse_V.mutable_data_ptr<float>(), scratch.data());
    const double full = divergence_row({}, teacher_V.const_data_ptr<float>(), student_V.const_data_ptr<float>(), V, 1, full_V.mutable_data_ptr<float>(), scratch.data());
    EXPECT_NEAR(sparse, full, 1e-6);
    EXPECT_TRUE(is_close(sparse_V, full_V, {.absolute = 1e-6}));
  }
}

TEST(Divergence, ATokenOutsideOfTheVocabularyIsNamed) {
  const std::int32_t id = 40;
  const float p = 1;
  const at::Tensor student_V = at::randn({40});
  std::vector<float> scratch = scratch_of(40);
  const SparseRow row{.ids = &id, .probabilities = &p, .slots = 1, .tail = 0};
  EXPECT_TRUE(fails_with(ErrorKind::kData, "token 40", [&] { sampled_row(1, row, student_V.const_data_ptr<float>(), 40, 1, nullptr, scratch.data()); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "token 40", [&] { top_k_row(1, row, student_V.const_data_ptr<float>(), 40, 1, nullptr, scratch.data()); }));
}

}  // namespace
}  // namespace alambic::distill
