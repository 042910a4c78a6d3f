// SPDX-License-Identifier: Apache-2.0
#include "models/bf16_tiles.h"

#include <immintrin.h>

#include <algorithm>

#include "core/vectorised.h"

namespace alambic::models {
namespace {

using at::BFloat16;

// An attribute list can be named in no other way.
#define ALAMBIC_BF16 gnu::target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

constexpr std::int64_t kLanes = 16;

[[ALAMBIC_BF16, gnu::always_inline]] inline __m512 load(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
[[ALAMBIC_BF16, gnu::always_inline]] inline __m512 load(const BFloat16* from, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}
[[ALAMBIC_BF16, gnu::always_inline]] inline void store(float* to, __mmask16 mask, __m512 values) { _mm512_mask_storeu_ps(to, mask, values); }
[[ALAMBIC_BF16, gnu::always_inline]] inline void store(BFloat16* to, __mmask16 mask, __m512 values) {
  _mm256_mask_storeu_epi16(to, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

// kRows x (kVectors * 16) sums in registers; `last`: the columns of the last vector that exist.
template <int kRows, int kVectors, class C>
[[ALAMBIC_BF16, gnu::always_inline]] inline void block(std::int64_t k, const BFloat16* a, std::int64_t lda, const Bf16Pair* b, std::int64_t ldb, C* c, std::int64_t ldc, bool add,
                                                       __mmask16 last) {
  constexpr __mmask16 kAll = 0xffff;
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[i][j] = add ? load(c + i * ldc + kLanes * j, j == kVectors - 1 ? last : kAll) : _mm512_setzero_ps();
  const auto step = [&](std::int64_t pair, auto left) __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))) {
    __m512bh right[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) right[j] = reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi32(j == kVectors - 1 ? last : kAll, b + pair * ldb + kLanes * j));
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const __m512bh both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(left(a + i * lda + 2 * pair)));
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], both, right[j]);
    }
  };
  for (std::int64_t pair = 0; pair < k / 2; ++pair)
    step(pair, [](const BFloat16* from) {
      int both;
      __builtin_memcpy(&both, from, sizeof both);
      return both;
    });
  if (k % 2 != 0) step(k / 2, [](const BFloat16* from) { return static_cast<int>(from->x); });
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store(c + i * ldc + kLanes * j, j == kVectors - 1 ? last : kAll, sums[i][j]);
}

// All rows of kVectors * 16 columns, kRows at a time.
template <int kRows, int kVectors, class C>
[[ALAMBIC_BF16]] void panel(std::int64_t m, std::int64_t k, const BFloat16* a, std::int64_t lda, const Bf16Pair* b, std::int64_t ldb, C* c, std::int64_t ldc, bool add, __mmask16 last) {
  std::int64_t i = 0;
  for (; i + kRows <= m; i += kRows) block<kRows, kVectors>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add, last);
  for (; i + 4 <= m; i += 4) block<4, kVectors>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add, last);
  for (; i < m; ++i) block<1, kVectors>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add, last);
}

// kRows x 32 sums over `k` rows of b. Two rows of it become pairs by interleaving, which leaves the columns of one vector in the halves of two: they
// return to their places with the sums. `columns`: those that exist.
template <int kRows, bool kAll>
[[ALAMBIC_BF16, gnu::always_inline]] inline void strip(std::int64_t k, const Bf16Pair* a, std::int64_t lda, const BFloat16* b, std::int64_t ldb, float* c, std::int64_t ldc, bool add, __mmask32 columns) {
  __m512 sums[kRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
  const auto row_of = [&](std::int64_t row) __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))) {
    return kAll ? _mm512_loadu_si512(b + row * ldb) : _mm512_maskz_loadu_epi16(columns, b + row * ldb);
  };
  const auto step = [&](std::int64_t pair, __m512i upper, __m512i lower) __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))) {
    const auto low = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(upper, lower)), high = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(upper, lower));
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[pair * lda + i])));
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], both, low);
      sums[i][1] = _mm512_dpbf16_ps(sums[i][1], both, high);
    }
  };
  for (std::int64_t pair = 0; pair < k / 2; ++pair) step(pair, row_of(2 * pair), row_of(2 * pair + 1));
  if (k % 2 != 0) step(k / 2, row_of(k - 1), _mm512_setzero_si512());
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23), second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const auto first_mask = static_cast<__mmask16>(columns), second_mask = static_cast<__mmask16>(columns >> kLanes);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    float* const to = c + i * ldc;
    __m512 one = _mm512_permutex2var_ps(sums[i][0], first, sums[i][1]), two = _mm512_permutex2var_ps(sums[i][0], second, sums[i][1]);
    if (kAll) {
      if (add) one = _mm512_add_ps(_mm512_loadu_ps(to), one), two = _mm512_add_ps(_mm512_loadu_ps(to + kLanes), two);
      _mm512_storeu_ps(to, one);
      _mm512_storeu_ps(to + kLanes, two);
    } else {
      if (add) one = _mm512_add_ps(load(to, first_mask), one), two = _mm512_add_ps(load(to + kLanes, second_mask), two);
      store(to, first_mask, one);
      store(to + kLanes, second_mask, two);
    }
  }
}

template <bool kAll>
[[ALAMBIC_BF16]] void strips(std::int64_t m, std::int64_t k, const Bf16Pair* a, std::int64_t lda, const BFloat16* b, std::int64_t ldb, float* c, std::int64_t ldc, bool add, __mmask32 columns) {
  std::int64_t i = 0;
  for (; i + 8 <= m; i += 8) strip<8, kAll>(k, a + i, lda, b, ldb, c + i * ldc, ldc, add, columns);
  for (; i + 4 <= m; i += 4) strip<4, kAll>(k, a + i, lda, b, ldb, c + i * ldc, ldc, add, columns);
  for (; i < m; ++i) strip<1, kAll>(k, a + i, lda, b, ldb, c + i * ldc, ldc, add, columns);
}

inline std::uint32_t bits_of(BFloat16 value) { return value.x; }
// Rounds to nearest even, without a branch.
inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return value != value ? 0x7fc0u : rounded;
}

}  // namespace

bool has_bf16_tiles() {
  static const bool has = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return has;
}

bool has_bf16_matrix_unit() { return __builtin_cpu_supports("amx-bf16"); }

template <class C>
void tile_product(std::int64_t m, std::int64_t n, std::int64_t k, const BFloat16* a, std::int64_t lda, const Bf16Pair* b, std::int64_t ldb, C* c, std::int64_t ldc, bool add) {
  // As many rows for each width as give the instruction its two a cycle: some 16 to 24 sums that do not wait for each other.
  constexpr std::int64_t kMostVectors = 4;
  for (std::int64_t column = 0; column < n;) {
    const std::int64_t vectors = (n - column + kLanes - 1) / kLanes, panels = (vectors + kMostVectors - 1) / kMostVectors, width = (vectors + panels - 1) / panels;
    const std::int64_t columns = std::min(n - column, kLanes * width);
    const auto last = static_cast<__mmask16>((1u << (columns - kLanes * (width - 1))) - 1);
    switch (width) {
      case 1: panel<16, 1>(m, k, a, lda, b + column, ldb, c + column, ldc, add, last); break;
      case 2: panel<8, 2>(m, k, a, lda, b + column, ldb, c + column, ldc, add, last); break;
      case 3: panel<8, 3>(m, k, a, lda, b + column, ldb, c + column, ldc, add, last); break;
      default: panel<6, 4>(m, k, a, lda, b + column, ldb, c + column, ldc, add, last);
    }
    column += columns;
  }
}

void tile_product_over_rows(std::int64_t m, std::int64_t n, std::int64_t k, const Bf16Pair* a, std::int64_t lda, const BFloat16* b, std::int64_t ldb, float* c, std::int64_t ldc, bool add) {
  constexpr std::int64_t kColumns = 2 * kLanes;
  std::int64_t column = 0;
  for (; column + kColumns <= n; column += kColumns) strips<true>(m, k, a, lda, b + column, ldb, c + column, ldc, add, ~__mmask32{0});
  if (column < n) strips<false>(m, k, a, lda, b + column, ldb, c + column, ldc, add, static_cast<__mmask32>((1u << (n - column)) - 1));
}

template <class T>
ALAMBIC_VECTORISED void pair_rows(const T* from, std::int64_t ld_from, Bf16Pair* to, std::int64_t ld_to, std::int64_t rows, std::int64_t columns) {
  for (std::int64_t row = 0; row < rows; row += 2) {
    const T* const upper = from + row * ld_from;
    Bf16Pair* const pairs = to + row / 2 * ld_to;
    if (row + 1 < rows) {
      const T* const lower = upper + ld_from;
#pragma omp simd
      for (std::int64_t i = 0; i < columns; ++i) pairs[i] = bits_of(upper[i]) | bits_of(lower[i]) << 16;
    } else {
#pragma omp simd
      for (std::int64_t i = 0; i < columns; ++i) pairs[i] = bits_of(upper[i]);
    }
  }
}

ALAMBIC_VECTORISED void pair_columns(const BFloat16* from, std::int64_t ld_from, Bf16Pair* to, std::int64_t ld_to, std::int64_t rows, std::int64_t columns) {
  constexpr std::int64_t kBlock = 16;
  for (std::int64_t r0 = 0; r0 < rows; r0 += kBlock) {
    const std::int64_t r1 = std::min(rows, r0 + kBlock);
    for (std::int64_t c = 0; c + 1 < columns; c += 2)
      for (std::int64_t r = r0; r < r1; ++r) __builtin_memcpy(to + c / 2 * ld_to + r, from + r * ld_from + c, sizeof *to);  // neighbours are a pair as they lie
    if (columns % 2 != 0)
      for (std::int64_t r = r0; r < r1; ++r) to[columns / 2 * ld_to + r] = bits_of(from[r * ld_from + columns - 1]);
  }
}

template void tile_product(std::int64_t, std::int64_t, std::int64_t, const BFloat16*, std::int64_t, const Bf16Pair*, std::int64_t, float*, std::int64_t, bool);
template void tile_product(std::int64_t, std::int64_t, std::int64_t, const BFloat16*, std::int64_t, const Bf16Pair*, std::int64_t, BFloat16*, std::int64_t, bool);
template void pair_rows(const BFloat16*, std::int64_t, Bf16Pair*, std::int64_t, std::int64_t, std::int64_t);
template void pair_rows(const float*, std::int64_t, Bf16Pair*, std::int64_t, std::int64_t, std::int64_t);

}  // namespace alambic::models
