// SPDX-License-Identifier: Apache-2.0
#include "distill/signal_codec.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>

#include "core/random.h"
#include "tests/support.h"

namespace alambic::distill {
namespace {

using testing::fails_with;

double uniform(std::uint64_t number) { return static_cast<double>(mix64(number) >> 11) * 0x1p-53; }

TEST(SignalCodec, EveryCodeComesBack) {
  for (const int mantissa_bits : {3, 9, 11, 13, 21, 23}) {
    const std::uint32_t one = 31u << mantissa_bits, step = std::max(1u, one / 100'000);
    float before = -1;
    for (std::uint32_t code = 0; code <= one; code += step) {
      const float value = widen(code, mantissa_bits);
      ASSERT_GT(value, before);
      ASSERT_EQ(narrow(value, mantissa_bits), code) << mantissa_bits;
      ASSERT_EQ(narrow_unbiased(value, mantissa_bits, 0), code);
      ASSERT_EQ(narrow_unbiased(value, mantissa_bits, 0xffffffffu), code == 0 ? 0 : code);
      before = value;
    }
    EXPECT_EQ(widen(one, mantissa_bits), 1.0f);
    EXPECT_EQ(narrow(1.0f, mantissa_bits), one);
    EXPECT_EQ(narrow(0.0f, mantissa_bits), 0u);
    EXPECT_EQ(narrow(std::nanf(""), mantissa_bits), 0u);
    EXPECT_EQ(narrow(1e-40f, mantissa_bits), 0u);
  }
}

TEST(SignalCodec, RoundsToTheNearestWithinTheErrorThatIsPromised) {
  for (const int mantissa_bits : {3, 9, 11}) {
    double worst = 0;
    for (std::uint64_t i = 0; i < 200'000; ++i) {
      const auto value = static_cast<float>(std::exp2(-30.9 * uniform(i)));
      const std::uint32_t code = narrow(value, mantissa_bits);
      const auto distance = [&](std::uint32_t other) { return std::abs(static_cast<double>(widen(other, mantissa_bits)) - static_cast<double>(value)); };
      ASSERT_LE(distance(code), std::min(distance(code - 1), distance(code + 1)));
      worst = std::max(worst, distance(code) / static_cast<double>(value));
    }
    EXPECT_LE(worst, std::exp2(-(mantissa_bits + 1)));
    EXPECT_GT(worst, 0.9 * std::exp2(-(mantissa_bits + 1)));
  }
}

TEST(SignalCodec, UnbiasedRoundingHasTheValueAsItsMean) {
  constexpr int kBits = kWeightMantissaBits;
  for (std::uint64_t i = 0; i < 20; ++i) {
    const auto value = static_cast<float>(std::exp2(-30 * uniform(i)));
    double sum = 0;
    // All that can be drawn: the mean is exact, not an estimate.
    for (std::uint32_t random = 0; random < 1u << (23 - kBits); ++random) sum += static_cast<double>(widen(narrow_unbiased(value, kBits, random), kBits));
    EXPECT_EQ(sum / (1u << (23 - kBits)), static_cast<double>(value));
  }
  const float tiny = widen(1, kBits) * 0.3f;
  int ones = 0;
  for (std::uint64_t i = 0; i < 100'000; ++i) ones += static_cast<int>(narrow_unbiased(tiny, kBits, static_cast<std::uint32_t>(mix64(i) >> 32)));
  EXPECT_NEAR(ones, 30'000, 4 * std::sqrt(100'000 * 0.3 * 0.7));
}

struct Rows {
  std::vector<std::int32_t> ids;
  std::vector<std::uint32_t> codes;
  std::vector<float> tails;
};

Rows rows_of(const SignalForm& form, std::int64_t rows, std::uint64_t seed) {
  Rows made;
  std::uint64_t state = seed;
  const auto next = [&](std::uint64_t below) { return (state = mix64(state)) % below; };
  for (std::int64_t row = 0; row < rows; ++row) {
    made.tails.push_back(form.kind == SignalKind::kTopK ? static_cast<float>(uniform(state)) : 0.0f);
    if (form.kind == SignalKind::kTopK) {
      std::uint32_t code = 31u << form.mantissa_bits();
      for (std::int64_t n = 0; n < form.slots; ++n) {
        made.ids.push_back(static_cast<std::int32_t>(next(form.vocabulary_size)));
        made.codes.push_back(code -= static_cast<std::uint32_t>(next(code / 3 + 1)));
      }
      continue;
    }
    const std::int64_t entries = 1 + static_cast<std::int64_t>(next(static_cast<std::uint64_t>(std::min<std::int64_t>(form.slots, form.vocabulary_size))));
    std::uint32_t left = static_cast<std::uint32_t>(form.slots - entries);
    // Rising ids: the largest steps that still leave room for the rest.
    std::uint64_t id = next(form.vocabulary_size - static_cast<std::uint64_t>(entries) + 1);
    for (std::int64_t n = 0; n < form.slots; ++n) {
      if (n >= entries) {
        made.ids.push_back(-1), made.codes.push_back(0);
        continue;
      }
      made.ids.push_back(static_cast<std::int32_t>(id));
      id += 1 + next(form.vocabulary_size - id - static_cast<std::uint64_t>(entries - n) + 1);
      const std::uint32_t more = n + 1 == entries ? left : static_cast<std::uint32_t>(next(left + 1));
      left -= more;
      made.codes.push_back(form.kind == SignalKind::kSampled ? 1 + more : static_cast<std::uint32_t>(next((31u << kWeightMantissaBits) + 1)));
    }
  }
  return made;
}

std::vector<SignalForm> forms() {
  std::vector<SignalForm> all;
  for (const std::uint32_t vocabulary : {2u, 5u, 48u, 49'152u, 151'936u, 262'144u, 262'145u}) {
    for (const std::int64_t slots : {1, 2, 12, 50}) {
      if (slots <= static_cast<std::int64_t>(vocabulary)) all.push_back({.kind = SignalKind::kTopK, .slots = slots, .vocabulary_size = vocabulary});
      all.push_back({.kind = SignalKind::kSampled, .slots = slots, .vocabulary_size = vocabulary});
      all.push_back({.kind = SignalKind::kWeighted, .slots = slots, .vocabulary_size = vocabulary});
    }
  }
  return all;
}

TEST(SignalCodec, GivesBackWhatWasPacked) {
  for (const SignalForm& form : forms()) {
    check(form);
    constexpr std::int64_t kRows = 37;
    const Rows made = rows_of(form, kRows, form.vocabulary_size + static_cast<std::uint64_t>(form.slots));
    std::vector<std::uint8_t> bytes;
    pack(form, kRows, made.ids.data(), made.codes.data(), made.tails.data(), bytes);
    if (form.kind == SignalKind::kTopK) { EXPECT_EQ(bytes.size(), static_cast<std::size_t>(kRows * (4 * form.slots + 4))); }
    EXPECT_LE(bytes.size(), form.most_bytes(kRows));
    const std::size_t size = bytes.size();
    bytes.resize(size + 8, 0xff);  // what stands behind must not matter
    std::vector<std::int32_t> ids(made.ids.size());
    std::vector<float> probabilities(made.ids.size()), tails(made.tails.size());
    ASSERT_EQ(unpack(form, kRows, std::span(bytes).first(size), ids.data(), probabilities.data(), tails.data()), "");
    EXPECT_EQ(ids, made.ids);
    EXPECT_EQ(tails, made.tails);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const float wanted = ids[i] < 0                            ? 0
                           : form.kind == SignalKind::kSampled ? static_cast<float>(made.codes[i]) / static_cast<float>(form.slots)
                           : form.kind == SignalKind::kTopK    ? widen(made.codes[i], form.mantissa_bits())
                                                               : widen(made.codes[i], kWeightMantissaBits) * kLargestWeight;
      ASSERT_NEAR(probabilities[i], wanted, 1e-7f);
    }
  }
}

TEST(SignalCodec, KeepsToItsBytes) {
  // The worst row, where each draw is another id.
  EXPECT_LE(SignalForm({.kind = SignalKind::kSampled, .slots = 12, .vocabulary_size = 262'144}).most_bytes(1), 34u);
  EXPECT_LE(SignalForm({.kind = SignalKind::kWeighted, .slots = 12, .vocabulary_size = 262'144}).most_bytes(1), 40u);
  EXPECT_EQ(SignalForm({.kind = SignalKind::kTopK, .slots = 64, .vocabulary_size = 151'936}).most_bytes(10), 2600u);
}

TEST(SignalCodec, EveryFlippedBitIsSeenOrGivesAValidRow) {
  for (const SignalForm& form : forms()) {
    constexpr std::int64_t kRows = 6;
    const Rows made = rows_of(form, kRows, 3);
    std::vector<std::uint8_t> bytes;
    pack(form, kRows, made.ids.data(), made.codes.data(), made.tails.data(), bytes);
    const std::size_t size = bytes.size();
    bytes.resize(size + 8);
    std::vector<std::int32_t> ids(made.ids.size());
    std::vector<float> probabilities(made.ids.size()), tails(made.tails.size());
    const auto unpacked = [&](std::size_t length) { return unpack(form, kRows, std::span(bytes).first(length), ids.data(), probabilities.data(), tails.data()); };
    for (std::size_t bit = 0; bit < size * 8; ++bit) {
      bytes[bit / 8] = static_cast<std::uint8_t>(bytes[bit / 8] ^ 1 << bit % 8);
      if (unpacked(size).empty()) {
        for (std::size_t i = 0; i < ids.size(); ++i) {
          ASSERT_TRUE(ids[i] >= -1 && ids[i] < static_cast<std::int64_t>(form.vocabulary_size));
          ASSERT_TRUE(probabilities[i] >= 0 && probabilities[i] <= (form.kind == SignalKind::kWeighted ? kLargestWeight : 1));
        }
      }
      bytes[bit / 8] = static_cast<std::uint8_t>(bytes[bit / 8] ^ 1 << bit % 8);
    }
    for (std::size_t length = 0; length < size; ++length) ASSERT_NE(unpacked(length), "") << length << " of " << size;
    ASSERT_NE(unpacked(size + 1), "");
  }
}

TEST(SignalCodec, SaysWhatIsWrong) {
  const SignalForm sampled{.kind = SignalKind::kSampled, .slots = 12, .vocabulary_size = 40'000}, top{.kind = SignalKind::kTopK, .slots = 2, .vocabulary_size = 40'000};
  const auto of_sampled = [&](std::vector<std::int32_t> ids, std::vector<std::uint32_t> counts) {
    ids.resize(12, -1), counts.resize(12);
    std::vector<std::uint8_t> bytes;
    pack(sampled, 1, ids.data(), counts.data(), nullptr, bytes);
    const std::size_t size = bytes.size();
    bytes.resize(size + 8);
    std::vector<float> values(13);
    return unpack(sampled, 1, std::span(bytes).first(size), ids.data(), values.data(), &values[12]);
  };
  EXPECT_EQ(of_sampled({4, 40'000}, {6, 6}), "row 0: id 40000 in a vocabulary of 40000");
  EXPECT_EQ(of_sampled({4, 4}, {6, 6}), "row 0: its ids do not rise");
  EXPECT_EQ(of_sampled({4, 5}, {6, 5}), "row 0: its counts sum to 11, but there were 12 draws");
  const auto of_top = [&](std::vector<std::int32_t> ids, std::vector<std::uint32_t> codes, float tail) {
    std::vector<std::uint8_t> bytes;
    pack(top, 1, ids.data(), codes.data(), &tail, bytes);
    const std::size_t size = bytes.size();
    bytes.resize(size + 8);
    std::vector<float> values(3);
    return unpack(top, 1, std::span(bytes).first(size), ids.data(), values.data(), &values[2]);
  };
  EXPECT_EQ(of_top({4, 5}, {100, 100}, 0.5f), "");
  EXPECT_EQ(of_top({4, 50'000}, {100, 100}, 0.5f), "row 0: id 50000 in a vocabulary of 40000");
  EXPECT_EQ(of_top({4, 5}, {100, 101}, 0.5f), "row 0: its probabilities rise");
  EXPECT_EQ(of_top({4, 5}, {100, 100}, std::nanf("")), "row 0: its tail is not between 0 and 1");
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "k: 49 is not between 1 and 48", [] { check({.kind = SignalKind::kTopK, .slots = 49, .vocabulary_size = 48}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "draws: 0", [] { check({.kind = SignalKind::kSampled, .slots = 0, .vocabulary_size = 48}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "no room for a probability", [] { check({.kind = SignalKind::kTopK, .slots = 4, .vocabulary_size = 1 << 25}); }));
}

}  // namespace
}  // namespace alambic::distill
