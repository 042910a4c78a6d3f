// SPDX-License-Identifier: Apache-2.0
#include "distill/signal_rows.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "core/random.h"
#include "tests/support.h"

namespace alambic::distill {
namespace {

// Logits as a language model has them: a few large ones, many small. Columns from `real` on are padding with the largest of all.
at::Tensor logits_of(std::int64_t rows, std::int64_t columns, std::int64_t real, std::uint64_t seed) {
  at::Tensor logits = at::empty({rows, columns}, at::kFloat);
  for (std::int64_t i = 0; i < rows * columns; ++i) {
    const double u = static_cast<double>(mix64(seed + static_cast<std::uint64_t>(i)) >> 11) * 0x1p-53;
    logits.data_ptr<float>()[i] = i % columns >= real ? 30.0f : static_cast<float>(-1.1 * std::log(u + 1e-6));
  }
  return logits;
}

struct Signal {
  std::vector<std::int32_t> ids;
  std::vector<std::uint32_t> codes;
  std::vector<float> tails;
  std::int64_t bad = 0;
};

Signal signal_of(const RowSettings& settings, const at::Tensor& logits, std::uint64_t seed = 1) {
  const auto rows = static_cast<std::size_t>(logits.size(0)), slots = static_cast<std::size_t>(settings.form.slots);
  Signal signal{.ids = std::vector<std::int32_t>(rows * slots), .codes = std::vector<std::uint32_t>(rows * slots), .tails = std::vector<float>(rows)};
  std::vector<std::uint64_t> seeds(rows);
  for (std::size_t row = 0; row < rows; ++row) seeds[row] = derive_seed(seed, "row", {row});
  signal.bad = signal_of_rows(settings, logits, seeds.data(), signal.ids.data(), signal.codes.data(), signal.tails.data());
  return signal;
}

TEST(SignalRows, TopKIsThatOfTheSoftmax) {
  for (const double temperature : {1.0, 0.5, 3.0}) {
    for (const auto type : {at::kFloat, at::kBFloat16}) {
      constexpr std::int64_t kReal = 1000, kK = 40;
      const at::Tensor logits = logits_of(9, 1024, kReal, 7).to(type);
      const RowSettings settings{.form = {.kind = SignalKind::kTopK, .slots = kK, .vocabulary_size = kReal}, .temperature = temperature};
      const Signal found = signal_of(settings, logits);
      EXPECT_EQ(found.bad, -1);
      const at::Tensor p = at::softmax(logits.narrow(1, 0, kReal).to(at::kDouble) / temperature, -1);
      const auto [values, ids] = at::topk(p, kK, -1);
      for (std::int64_t row = 0; row < 9; ++row) {
        double rest = 1;
        for (std::int64_t n = 0; n < kK; ++n) {
          const auto i = static_cast<std::size_t>(row * kK + n);
          const double wanted = values[row][n].item<double>(), given = static_cast<double>(widen(found.codes[i], settings.form.mantissa_bits()));
          EXPECT_NEAR(given, wanted, wanted * (std::exp2(-(settings.form.mantissa_bits() + 1)) + 3e-6) + 0x1p-31);
          EXPECT_NEAR(p[row][found.ids[i]].item<double>(), wanted, 1e-12);  // the same id, or one that is equal
          if (n > 0 && p[row][found.ids[i]].item<double>() == p[row][found.ids[i - 1]].item<double>()) { EXPECT_GT(found.ids[i], found.ids[i - 1]); }
          rest -= wanted;
        }
        EXPECT_NEAR(static_cast<double>(found.tails[static_cast<std::size_t>(row)]), rest, 1e-6 * rest + 1e-12);
      }
    }
  }
}

TEST(SignalRows, ASmallTailKeepsItsDigits) {
  at::Tensor logits = at::zeros({1, 1000}, at::kFloat);
  logits[0][17] = 30.0f;
  const Signal found = signal_of({.form = {.kind = SignalKind::kTopK, .slots = 1, .vocabulary_size = 1000}}, logits);
  EXPECT_EQ(found.ids[0], 17);
  EXPECT_NEAR(static_cast<double>(found.tails[0]) / (999 * std::exp(-30.0)), 1, 1e-5);
}

TEST(SignalRows, DrawsAreAFunctionOfTheSeed) {
  const RowSettings settings{.form = {.kind = SignalKind::kSampled, .slots = 12, .vocabulary_size = 1000}};
  const at::Tensor logits = logits_of(9, 1000, 1000, 7);
  const Signal one = signal_of(settings, logits, 1), same = signal_of(settings, logits, 1), other = signal_of(settings, logits, 2);
  EXPECT_EQ(one.ids, same.ids);
  EXPECT_EQ(one.codes, same.codes);
  EXPECT_NE(one.ids, other.ids);
  for (std::size_t row = 0; row < 9; ++row) {
    std::uint32_t sum = 0;
    for (std::size_t n = 0; n < 12; ++n) sum += one.codes[row * 12 + n];
    EXPECT_EQ(sum, 12u);
  }
}

// Weights of every id, and of the gradient that a student with other probabilities gets, meaned over many tokens of one teacher
// distribution, against the full softmax within their standard errors.
void expect_unbiased(const RowSettings& settings, double largest_sigma) {
  const auto columns = static_cast<std::int64_t>(settings.form.vocabulary_size), slots = settings.form.slots;
  constexpr std::int64_t kRows = 60'000;
  const at::Tensor row = logits_of(1, columns, columns, 99), p_V = at::softmax(row[0].to(at::kDouble) / settings.temperature, -1);
  const at::Tensor q_V = at::softmax(logits_of(1, columns, columns, 5)[0].to(at::kDouble), -1);
  const Signal found = signal_of(settings, row.expand({kRows, columns}).contiguous(), 11);
  const auto size = static_cast<std::size_t>(columns);
  std::vector<double> sum(size), squares(size), gradient(size), gradient_squares(size);
  const double *p = p_V.const_data_ptr<double>(), *q = q_V.const_data_ptr<double>();
  std::vector<double> w(size);
  for (std::int64_t k = 0; k < kRows; ++k) {
    std::fill(w.begin(), w.end(), 0.0);
    double total = 0;
    for (std::int64_t n = 0; n < slots; ++n) {
      const auto i = static_cast<std::size_t>(k * slots + n);
      if (found.ids[i] < 0) break;
      const double weight = settings.form.kind == SignalKind::kSampled ? static_cast<double>(found.codes[i]) / static_cast<double>(slots)
                                                                       : static_cast<double>(widen(found.codes[i], kWeightMantissaBits) * kLargestWeight);
      w[static_cast<std::size_t>(found.ids[i])] = weight;
      total += weight;
    }
    for (std::size_t v = 0; v < size; ++v) {
      const double g = total * q[v] - w[v];  // d / d logits of -sum w ln q
      sum[v] += w[v], squares[v] += w[v] * w[v], gradient[v] += g, gradient_squares[v] += g * g;
    }
  }
  int seldom = 0;
  double sum_of_squares = 0, compared = 0;
  for (std::size_t v = 0; v < size; ++v) {
    const auto check = [&](double mean, double square, double wanted, const char* what) {
      const double sigma = std::sqrt(std::max(0.0, square - mean * mean) / kRows);
      EXPECT_LE(std::abs(mean - wanted), largest_sigma * sigma + 1e-15) << what << " of " << v << ", p " << p[v];
      return (mean - wanted) / sigma;
    };
    if (p[v] * static_cast<double>(slots) * kRows < 100) {  // the standard error of so few draws is no normal one
      ++seldom;
      continue;
    }
    const double z = check(sum[v] / kRows, squares[v] / kRows, p[v], "weight");
    sum_of_squares += z * z, compared += 1;
    check(gradient[v] / kRows, gradient_squares[v] / kRows, q[v] - p[v], "gradient");
  }
  EXPECT_LT(seldom, columns / 2);
  // Neither too far nor too near: the z have variance 1.
  EXPECT_NEAR(sum_of_squares / compared, 1, 5 * std::sqrt(2 / compared));
}

TEST(SignalRows, SampledSignalsHaveTheSoftmaxAsTheirMean) {
  expect_unbiased({.form = {.kind = SignalKind::kSampled, .slots = 12, .vocabulary_size = 700}}, 4.5);
  expect_unbiased({.form = {.kind = SignalKind::kSampled, .slots = 3, .vocabulary_size = 300}, .temperature = 2.0}, 4.5);
}

TEST(SignalRows, WeightedSignalsHaveTheSoftmaxAsTheirMean) {
  expect_unbiased({.form = {.kind = SignalKind::kWeighted, .slots = 12, .vocabulary_size = 700}, .proposal_exponent = 0.7}, 4.5);
  expect_unbiased({.form = {.kind = SignalKind::kWeighted, .slots = 12, .vocabulary_size = 300}, .proposal_exponent = 1.2}, 4.5);
}

TEST(SignalRows, NamesTheFirstRowThatIsNotFinite) {
  for (const SignalKind kind : {SignalKind::kTopK, SignalKind::kSampled, SignalKind::kWeighted}) {
    for (const float wrong : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
      at::Tensor logits = logits_of(50, 300, 300, 3);
      EXPECT_EQ(signal_of({.form = {.kind = kind, .slots = 4, .vocabulary_size = 300}}, logits).bad, -1);
      logits[40][299] = wrong, logits[23][5] = wrong;
      EXPECT_EQ(signal_of({.form = {.kind = kind, .slots = 4, .vocabulary_size = 300}}, logits).bad, 23);
    }
    at::Tensor masked = logits_of(2, 300, 300, 3);
    masked.narrow(1, 3, 100).fill_(-std::numeric_limits<float>::infinity());
    const Signal found = signal_of({.form = {.kind = kind, .slots = 4, .vocabulary_size = 300}}, masked);
    EXPECT_EQ(found.bad, -1);
    for (const std::int32_t id : found.ids) EXPECT_TRUE(id < 3 || id >= 103);
  }
}

}  // namespace
}  // namespace alambic::distill
