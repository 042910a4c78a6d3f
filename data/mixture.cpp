// SPDX-License-Identifier: Apache-2.0
#include "data/mixture.h"

#include <cmath>
#include <numeric>

#include "core/error.h"

namespace alambic::data {

namespace {
// Counts reach 10^13 and weights 10^15: their products need more than 64 bits.
using Wide = unsigned __int128;
constexpr double kDecimals = 1e6, kLargestWeight = 1e9;
}  // namespace

std::vector<std::uint64_t> integer_weights(std::span<const double> weights) {
  if (weights.empty()) fail(ErrorKind::kUsage, "data.mixture is empty", Remedy{"name at least one token store"});
  std::vector<std::uint64_t> integers;
  std::uint64_t divisor = 0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    // Written so that NaN fails: a comparison with NaN is false.
    if (!(weights[i] >= 1 / kDecimals && weights[i] <= kLargestWeight))
      fail(ErrorKind::kUsage, "data.mixture[", i, "].weight: ", weights[i], " is not between 0.000001 and 1000000000",
           Remedy{"remove an entry that should not be drawn"});
    integers.push_back(static_cast<std::uint64_t>(std::llround(weights[i] * kDecimals)));
    divisor = std::gcd(divisor, integers.back());
  }
  for (std::uint64_t& weight : integers) weight /= divisor;
  return integers;
}

Schedule::Schedule(std::vector<std::uint64_t> weights) : weights_(std::move(weights)), counts_(weights_.size(), 0) {
  Wide sum = 0;
  for (const std::uint64_t weight : weights_) {
    if (weight == 0) fail(ErrorKind::kBug, "a schedule with a weight of 0");
    sum += weight;
  }
  if (weights_.empty() || sum >= (Wide{1} << 60)) fail(ErrorKind::kUsage, "data.mixture: the weights' sum is too large");
  sum_ = static_cast<std::uint64_t>(sum);
}

std::size_t Schedule::next() {
  const Wide n = Wide{num_draws_} + 1;
  std::size_t chosen = weights_.size();
  Wide earliest = 0;
  for (std::size_t i = 0; i < weights_.size(); ++i) {
    if (n * weights_[i] <= Wide{counts_[i]} * sum_) continue;  // its next draw may not come yet
    const Wide deadline = ((Wide{counts_[i]} + 1) * sum_ + weights_[i] - 1) / weights_[i];
    if (chosen == weights_.size() || deadline < earliest) chosen = i, earliest = deadline;
  }
  // After n - 1 draws the counts sum to n - 1 < n = sum of n w / W, so some store is behind its share and may be drawn.
  if (chosen == weights_.size()) fail(ErrorKind::kBug, "the mixture's schedule has no store to draw");
  ++counts_[chosen];
  ++num_draws_;
  return chosen;
}

void Schedule::restore(const std::vector<std::uint64_t>& counts) {
  if (counts.size() != weights_.size()) fail(ErrorKind::kData, "mixture state: ", counts.size(), " counts for ", weights_.size(), " stores");
  Wide n = 0;
  for (const std::uint64_t count : counts) n += count;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const Wide is = Wide{counts[i]} * sum_, should = n * weights_[i];
    if ((is > should ? is - should : should - is) >= sum_)
      fail(ErrorKind::kData, "mixture state: store ", i, " has ", counts[i], " rows, which no schedule of these weights gives");
  }
  counts_ = counts;
  num_draws_ = static_cast<std::uint64_t>(n);
}

}  // namespace alambic::data
