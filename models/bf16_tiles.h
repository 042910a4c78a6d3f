// SPDX-License-Identifier: Apache-2.0
#pragma once
// Tile products of bf16 with f32 sums, by the instruction that processors with AVX512-BF16 have for them. It adds two products at a time: of
// neighbours of a row of the left factor, and of the right factor's two rows. The right factor is therefore kept in pairs.
//
// Letters: M, N, K = rows, columns and the summed axis of one tile.
#include <c10/util/BFloat16.h>

#include <cstdint>

namespace alambic::models {

/// Two bf16 of one column, one below the other: the upper one in the low half.
using Bf16Pair = std::uint32_t;

/// Whether this processor has the instruction. Without it nothing below may be called but the functions that lay out pairs.
bool has_bf16_tiles();
/// Whether it has a unit for whole matrices besides (AMX), which libraries use and these tiles do not.
bool has_bf16_matrix_unit();

/// c (+)= a b of one thread. a: [M, K], rows lda apart; b: [(K + 1) / 2, N] pairs, rows ldb apart, of which the last has zeros below where K
/// is odd; c: f32, or bf16 that is rounded once, rows ldc apart. Like the instruction, it takes subnormal bf16 for zeros.
template <class C>
void tile_product(std::int64_t m, std::int64_t n, std::int64_t k, const at::BFloat16* a, std::int64_t lda, const Bf16Pair* b, std::int64_t ldb, C* c, std::int64_t ldc, bool add);

/// c (+)= the transpose of a times b, both with K rows: a in pairs [(K + 1) / 2, M], b [K, N] as it is. Its pairs are made in registers, once for each
/// eight columns of a, which pays where those are few. Sums of a call are added to c when they are complete.
void tile_product_over_rows(std::int64_t m, std::int64_t n, std::int64_t k, const Bf16Pair* a, std::int64_t lda, const at::BFloat16* b, std::int64_t ldb, float* c, std::int64_t ldc, bool add);

/// The pairs of a matrix [rows, columns]: to [(rows + 1) / 2, columns], of rows ld_to apart. f32 is rounded to the nearest.
template <class T>
void pair_rows(const T* from, std::int64_t ld_from, Bf16Pair* to, std::int64_t ld_to, std::int64_t rows, std::int64_t columns);
/// The pairs of its transpose: to [(columns + 1) / 2, rows].
void pair_columns(const at::BFloat16* from, std::int64_t ld_from, Bf16Pair* to, std::int64_t ld_to, std::int64_t rows, std::int64_t columns);

}  // namespace alambic::models
