// SPDX-License-Identifier: Apache-2.0
#include "data/mixture.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "core/random.h"
#include "tests/support.h"

namespace alambic::data {
namespace {

using Integers = std::vector<std::uint64_t>;

Integers integers(std::vector<double> weights) { return integer_weights(weights); }

TEST(IntegerWeights, KeepTheRatioOfWhatAPersonWrites) {
  EXPECT_EQ(integers({0.7, 0.3}), (Integers{7, 3}));
  EXPECT_EQ(integers({3, 1.5}), (Integers{2, 1}));
  EXPECT_EQ(integers({5}), Integers{1});
  EXPECT_EQ(integers({0.333333, 0.666667}), (Integers{333333, 666667}));
  EXPECT_EQ(integers({1e9, 1e-6}), (Integers{1000000000000000, 1}));
}

TEST(IntegerWeights, RefuseWhatIsNoWeight) {
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, "data.mixture is empty", [] { integers({}); }));
  for (const double bad : {0.0, -1.0, 1e-7, 2e9, std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()})
    EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, "data.mixture[1].weight", [&] { integers({1, bad}); })) << bad;
}

// |draws - n w / W| < 1, in integers.
void expect_fair(const Schedule& schedule) {
  for (std::size_t i = 0; i < schedule.weights().size(); ++i) {
    const __int128 is = static_cast<__int128>(schedule.counts()[i]) * schedule.sum_of_weights();
    const __int128 should = static_cast<__int128>(schedule.num_draws()) * schedule.weights()[i];
    const __int128 apart = is > should ? is - should : should - is;
    ASSERT_LT(apart, static_cast<__int128>(schedule.sum_of_weights())) << "store " << i << " after " << schedule.num_draws() << " draws";
  }
}

TEST(Schedule, NeverDeviatesByADraw) {
  std::vector<Integers> cases = {{1}, {1, 1}, {7, 3}, {1, 1, 1}, {1, 999999}, {500000, 1, 1, 1}, {6, 3, 2, 1, 1, 1, 1, 1, 1, 1}, {1000000000000000, 1}};
  // Many stores of uneven weights are where simpler rules (largest arrears first) drift beyond one draw.
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    Integers weights(2 + mix64(seed) % 30);
    for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = 1 + mix64(derive_seed(seed, "weight", {i})) % (seed % 2 == 0 ? 10 : 100000);
    cases.push_back(weights);
  }
  for (const Integers& weights : cases) {
    Schedule schedule(weights);
    for (int n = 0; n < 3000; ++n) {
      schedule.next();
      expect_fair(schedule);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Schedule, RepeatsItselfAfterTheSumOfItsWeights) {
  Schedule schedule({6, 3, 2, 1});
  std::vector<std::size_t> first, second;
  for (int n = 0; n < 12; ++n) first.push_back(schedule.next());
  EXPECT_EQ(schedule.counts(), (Integers{6, 3, 2, 1}));
  for (int n = 0; n < 12; ++n) second.push_back(schedule.next());
  EXPECT_EQ(first, second);
  EXPECT_EQ(first, (std::vector<std::size_t>{0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 3}));
}

TEST(Schedule, GoesOnFromItsCountsAnywhere) {
  // A period further on the order is the same: so a position of 10^12 draws can be written down without drawing them.
  Schedule near({6, 3, 2, 1}), far({6, 3, 2, 1});
  for (int n = 0; n < 5; ++n) near.next();
  Integers counts = near.counts();
  for (std::size_t i = 0; i < 4; ++i) counts[i] += near.weights()[i] * 100'000'000'000;
  far.restore(counts);
  EXPECT_EQ(far.num_draws(), 1'200'000'000'005u);
  for (int n = 0; n < 100; ++n) {
    EXPECT_EQ(near.next(), far.next());
    expect_fair(far);
  }
}

TEST(Schedule, RefusesCountsThatItNeverHas) {
  Schedule schedule({3, 1});
  EXPECT_TRUE(testing::fails_with(ErrorKind::kData, "2 counts for 3 stores", [] { Schedule({1, 1, 1}).restore({1, 1}); }));
  EXPECT_TRUE(testing::fails_with(ErrorKind::kData, "store 0 has 3 rows", [&] { schedule.restore({3, 5}); }));
}

}  // namespace
}  // namespace alambic::data
