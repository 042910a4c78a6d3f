// SPDX-License-Identifier: Apache-2.0
#pragma once
// Which store gives the next row: weighted turns in exact integer arithmetic.
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace alambic::data {

/// Weights as the smallest integers in the same ratio; six decimals of a weight count. Error(kUsage) for an empty list or a
/// weight that is not a number from 0.000001 to 10^9.
std::vector<std::uint64_t> integer_weights(std::span<const double> weights);

/// Takes turns so that after any n draws the store of weight w of a sum W was drawn fewer than one time more or less than
/// n w / W: the k-th draw of a store (k from 0) may come once n w > k W and must have come by n = ceil((k + 1) W / w); of the
/// draws that may come, the one that must come earliest is taken, of equals that of the first store. Such an order exists
/// (R. Tijdeman, "The chairman assignment problem", 1980), and serving the earliest deadline finds it (G. Steiner and
/// S. Yeomans, "Level schedules for mixed-model, just-in-time processes", Management Science 39, 1993).
/// O(number of stores) a draw, nothing to precompute; the counts are the whole state.
class Schedule {
 public:
  /// weights  positive, their sum below 2^60.
  explicit Schedule(std::vector<std::uint64_t> weights);
  std::size_t next();
  std::uint64_t num_draws() const { return num_draws_; }
  const std::vector<std::uint64_t>& counts() const { return counts_; }  // draws so far, a store
  const std::vector<std::uint64_t>& weights() const { return weights_; }
  std::uint64_t sum_of_weights() const { return sum_; }
  /// Goes on from counts that another Schedule of these weights had. Error(kData) where they cannot be such.
  void restore(const std::vector<std::uint64_t>& counts);

 private:
  std::vector<std::uint64_t> weights_, counts_;
  std::uint64_t sum_ = 0, num_draws_ = 0;
};

}  // namespace alambic::data
