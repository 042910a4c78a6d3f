// SPDX-License-Identifier: Apache-2.0
// De-quantising NF4 on a processor. The table of 16 values is multiplied by a block's scale once, and for bf16 rounded once;
// what is left for each of the 64 elements is a look-up in a register.
#include <algorithm>

#include "lora/nf4.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace alambic::lora {
namespace {

std::uint16_t stored(float value, std::uint16_t*) { return bf16_bits(value); }
float stored(float value, float*) { return value; }

template <class Out>
void plain(const std::uint8_t* packed, float scale, std::int64_t begin, std::int64_t end, Out* out) {
  for (std::int64_t i = begin; i < end; ++i) out[i - begin] = stored(nf4_value(nf4_code_at(packed, i)) * scale, out);
}

#if defined(__x86_64__)

[[gnu::target("avx2")]] __m256 low_values() {
  return _mm256_setr_ps(nf4_value(0), nf4_value(1), nf4_value(2), nf4_value(3), nf4_value(4), nf4_value(5), nf4_value(6), nf4_value(7));
}
[[gnu::target("avx2")]] __m256 high_values() {
  return _mm256_setr_ps(nf4_value(8), nf4_value(9), nf4_value(10), nf4_value(11), nf4_value(12), nf4_value(13), nf4_value(14), nf4_value(15));
}

// The 32 codes of 16 bytes, a byte each, in order.
struct Codes32 {
  __m128i first, second;
};
[[gnu::target("avx2")]] inline Codes32 codes_of(const std::uint8_t* packed) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)), four = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), four), odd = _mm_and_si128(bytes, four);
  return {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
}

[[gnu::target("avx2")]] void block_avx2(const std::uint8_t* packed, float scale, float* out) {
  const __m256 by = _mm256_set1_ps(scale), low = _mm256_mul_ps(low_values(), by), high = _mm256_mul_ps(high_values(), by);
  for (int i = 0; i < 4; ++i) {
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + 8 * i)));
    const auto value_of = [&](__m256i code) __attribute__((target("avx2"))) {  // bit 3 chooses between the two halves of the table
      return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code), _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
    };
    const __m256 even = value_of(_mm256_srli_epi32(bytes, 4)), odd = value_of(bytes);
    const __m256 a = _mm256_unpacklo_ps(even, odd), b = _mm256_unpackhi_ps(even, odd);
    _mm256_storeu_ps(out + 16 * i, _mm256_permute2f128_ps(a, b, 0x20));
    _mm256_storeu_ps(out + 16 * i + 8, _mm256_permute2f128_ps(a, b, 0x31));
  }
}

[[gnu::target("avx2")]] inline __m256i rounded_to_bf16(__m256 values) {  // in the low halves; bf16_bits() without its NaN
  const __m256i bits = _mm256_castps_si256(values), tie = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(tie, _mm256_set1_epi32(0x7fff))), 16);
}

[[gnu::target("avx2")]] void block_avx2(const std::uint8_t* packed, float scale, std::uint16_t* out) {
  const __m256 by = _mm256_set1_ps(scale);
  const __m256i low = rounded_to_bf16(_mm256_mul_ps(low_values(), by)), high = rounded_to_bf16(_mm256_mul_ps(high_values(), by));
  // 16 words in order, then their low bytes and their high bytes as two tables of 16.
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
  const auto table = [](__m256i bytes) __attribute__((target("avx2"))) {
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi16(bytes, bytes), 0xd8));
  };
  const __m128i low_bytes = table(_mm256_and_si256(words, _mm256_set1_epi16(0xff))), high_bytes = table(_mm256_srli_epi16(words, 8));
  for (int i = 0; i < 2; ++i) {
    const Codes32 codes = codes_of(packed + 16 * i);
    __m128i* const to = reinterpret_cast<__m128i*>(out + 32 * i);
    const __m128i a = _mm_shuffle_epi8(low_bytes, codes.first), b = _mm_shuffle_epi8(high_bytes, codes.first);
    const __m128i c = _mm_shuffle_epi8(low_bytes, codes.second), d = _mm_shuffle_epi8(high_bytes, codes.second);
    _mm_storeu_si128(to, _mm_unpacklo_epi8(a, b));
    _mm_storeu_si128(to + 1, _mm_unpackhi_epi8(a, b));
    _mm_storeu_si128(to + 2, _mm_unpacklo_epi8(c, d));
    _mm_storeu_si128(to + 3, _mm_unpackhi_epi8(c, d));
  }
}

#endif

}  // namespace

std::vector<Nf4Loop> nf4_loops() {
  std::vector<Nf4Loop> loops{Nf4Loop::kPlain};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) loops.push_back(Nf4Loop::kAvx2);
#endif
  return loops;
}

template <class Out>
void dequantize_nf4([[maybe_unused]] Nf4Loop loop, const std::uint8_t* packed, const float* scales, std::int64_t begin, std::int64_t end, Out* out) {
  while (begin < end) {
    const std::int64_t block = begin / kNf4Block, stop = std::min(end, (block + 1) * kNf4Block);
    [[maybe_unused]] const bool whole = stop - begin == kNf4Block;
    [[maybe_unused]] const std::uint8_t* const bytes = packed + block * (kNf4Block / 2);
#if defined(__x86_64__)
    if (whole && loop == Nf4Loop::kAvx2) block_avx2(bytes, *scales, out);
    else plain(packed, *scales, begin, stop, out);
#else
    plain(packed, *scales, begin, stop, out);
#endif
    out += stop - begin;
    begin = stop;
    ++scales;
  }
}

template void dequantize_nf4(Nf4Loop, const std::uint8_t*, const float*, std::int64_t, std::int64_t, float*);
template void dequantize_nf4(Nf4Loop, const std::uint8_t*, const float*, std::int64_t, std::int64_t, std::uint16_t*);

}  // namespace alambic::lora
