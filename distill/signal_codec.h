// SPDX-License-Identifier: Apache-2.0
#pragma once
// Sparse signals as bytes (docs/teacher_cache.md). Letters: K = rows (tokens), N = slots a row.
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace alambic::distill {

/// A non-negative number up to 1 as the upper bits of an f32: 5 bits of exponent, `mantissa_bits` below. Code 0 is zero; other codes
/// lie between 2^-31 and 1. Rounds to nearest, ties to even: the relative error is at most 2^-(mantissa_bits + 1), and what is below
/// 2^-31 becomes zero or the smallest code.
std::uint32_t narrow(float value, int mantissa_bits);
/// The same, up or down with the probabilities that make the mean exactly `value`. `random` has 32 uniform bits.
std::uint32_t narrow_unbiased(float value, int mantissa_bits, std::uint32_t random);
float widen(std::uint32_t code, int mantissa_bits);

enum class SignalKind {
  kTopK,      // the N likeliest ids, likeliest first, and the mass of all others
  kSampled,   // distinct ids of N draws from the softmax, rising, with their counts
  kWeighted,  // of N draws from another distribution, with the weights that correct for it
};

struct SignalForm {
  SignalKind kind = SignalKind::kTopK;
  std::int64_t slots = 0;             // N: k or draws
  std::uint32_t vocabulary_size = 0;  // ids are below it

  int id_bits() const;
  int mantissa_bits() const;      // kTopK: of a probability, 32 - 5 - id_bits, at most 23
  int num_entries_bits() const;   // sampled: of the number of distinct ids, less 1
  int entry_code_bits() const;    // sampled: of a count, less 1, or of a weight
  /// Bytes of `rows` rows, at most; exactly for kTopK.
  std::uint64_t most_bytes(std::uint64_t rows) const;
};

/// Error(kUsage) naming k or draws where this form cannot be packed.
void check(const SignalForm& form);

/// Weights of kWeighted are narrow_unbiased(weight / kLargestWeight, kWeightMantissaBits): 8 bits.
inline constexpr float kLargestWeight = 256;
inline constexpr int kWeightMantissaBits = 3;

/// Appends rows, from the next whole byte on. ids, -1 behind the last of a row; codes: of kTopK narrow(probability), of kSampled
/// counts, of kWeighted the weights' codes; tails only for kTopK.
void pack(const SignalForm& form, std::int64_t rows, const std::int32_t* ids_KN, const std::uint32_t* codes_KN, const float* tails_K, std::vector<std::uint8_t>& bytes);

/// Reads `rows` rows that are exactly `bytes`, of which 8 further bytes may be read. Returns "", or what is wrong with them.
std::string unpack(const SignalForm& form, std::int64_t rows, std::span<const std::uint8_t> bytes, std::int32_t* ids_KN, float* probabilities_KN, float* tails_K);

}  // namespace alambic::distill
