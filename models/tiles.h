// SPDX-License-Identifier: Apache-2.0
#pragma once
// What attention and the head share: a running softmax over tiles whose columns are rows of the result, and small helpers.
#include <c10/util/BFloat16.h>

#include <cstdint>

namespace alambic::models::tiles {

inline constexpr float kHidden = -1e30f;   // stands for -infinity, without making NaN of a tile that hides everything
inline constexpr std::int64_t kLanes = 32;  // columns that a loop keeps in registers: widths are multiples of it

/// One tile of a running softmax: s [rows, columns] becomes exp(s - m); m and l [columns], the highest value and the sum so far,
/// are brought up to date; factor [columns] is what earlier sums shrink by. Returns whether any factor is not 1. l is summed a
/// tile in f32: tiles are short.
bool softmax_tile(float* s, std::int64_t rows, std::int64_t columns, float* m, float* l, float* factor);

/// to[c][r] = from[r][c]; T: float or at::BFloat16.
template <class T>
void transpose(const T* from, std::int64_t ld_from, T* to, std::int64_t ld_to, std::int64_t rows, std::int64_t columns);

/// x becomes cap * tanh(x / cap), and slopes, unless nullptr, what that multiplies gradients by.
void soft_cap(float* x, float* slopes, std::int64_t count, float cap);

void scale(float* x, std::int64_t count, float factor);
/// x [rows, columns] times factor [columns].
void scale_columns(float* x, std::int64_t rows, std::int64_t columns, const float* factor);

}  // namespace alambic::models::tiles
