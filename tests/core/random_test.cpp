// SPDX-License-Identifier: Apache-2.0
#include "core/random.h"

#include <gtest/gtest.h>

#include <set>
#include <vector>

namespace alambic {
namespace {

TEST(KeyedPermutation, VisitsEveryElementOnce) {
  for (const std::uint64_t size : {1ull, 2ull, 3ull, 7ull, 64ull, 1000ull, 4097ull}) {
    const KeyedPermutation permutation(size, 42);
    std::set<std::uint64_t> seen;
    for (std::uint64_t i = 0; i < size; ++i) {
      EXPECT_LT(permutation(i), size);
      seen.insert(permutation(i));
    }
    EXPECT_EQ(seen.size(), size);
  }
}

TEST(KeyedPermutation, DependsOnTheKeyAndNotOnTheCall) {
  const KeyedPermutation one(1000, 1), again(1000, 1), other(1000, 2);
  int same_as_other = 0, unmoved = 0;
  for (std::uint64_t i = 0; i < 1000; ++i) {
    EXPECT_EQ(one(i), again(i));
    same_as_other += one(i) == other(i);
    unmoved += one(i) == i;
  }
  EXPECT_LT(same_as_other, 20);  // about 1 is expected by chance
  EXPECT_LT(unmoved, 20);
}

TEST(KeyedPermutation, CostsNothingAtAnySize) {
  const KeyedPermutation huge(1'000'000'000'000ull, 7);
  std::set<std::uint64_t> seen;
  for (std::uint64_t i = 999'999'999'000ull; i < 1'000'000'000'000ull; ++i) seen.insert(huge(i));
  EXPECT_EQ(seen.size(), 1000u);
}

// Checkpoints and stores hold positions in these sequences: a change makes every resume go on with other data.
TEST(Random, TheSequencesNeverChange) {
  EXPECT_EQ(mix64(0), 0xe220a8397b1dcdafull);  // the first two outputs of splitmix64 with seed 0
  EXPECT_EQ(mix64(0x9e3779b97f4a7c15ull), 0x6e789e6aa1b965f4ull);
  EXPECT_EQ(derive_seed(7, "document order", {1, 2}), 13772781882010417176ull);
  const KeyedPermutation permutation(1000, 42);
  EXPECT_EQ((std::vector<std::uint64_t>{permutation(0), permutation(1), permutation(999)}), (std::vector<std::uint64_t>{504, 348, 308}));
}

TEST(DeriveSeed, SeparatesPurposesAndNumbers) {
  std::set<std::uint64_t> seen;
  for (const char* purpose : {"dropout", "order", ""})
    for (std::uint64_t step = 0; step < 50; ++step)
      for (std::uint64_t layer = 0; layer < 4; ++layer) seen.insert(derive_seed(1, purpose, {step, layer}));
  EXPECT_EQ(seen.size(), 3u * 50 * 4);
  EXPECT_EQ(derive_seed(1, "order", {2, 3}), derive_seed(1, "order", {2, 3}));
}

}  // namespace
}  // namespace alambic
