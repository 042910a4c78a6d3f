// SPDX-License-Identifier: Apache-2.0
#include "models/tiles.h"

#include <algorithm>

#include "core/vectorised.h"
#include "models/row_kernels.h"

namespace alambic::models::tiles {

using kernels::fast_exp;

ALAMBIC_VECTORISED bool softmax_tile(float* s, std::int64_t rows, std::int64_t columns, float* m, float* l, float* factor) {
  bool shrinks = false;
  for (std::int64_t c = 0; c < columns; c += kLanes) {
    float highest[kLanes], sum[kLanes];
    for (std::int64_t i = 0; i < kLanes; ++i) highest[i] = m[c + i], sum[i] = 0;
    for (std::int64_t j = 0; j < rows; ++j) {
      const float* const row = s + j * columns + c;
#pragma omp simd
      for (std::int64_t i = 0; i < kLanes; ++i) highest[i] = row[i] > highest[i] ? row[i] : highest[i];
    }
    for (std::int64_t j = 0; j < rows; ++j) {
      float* const row = s + j * columns + c;
#pragma omp simd
      for (std::int64_t i = 0; i < kLanes; ++i) {
        row[i] = fast_exp(row[i] - highest[i]);
        sum[i] += row[i];
      }
    }
    for (std::int64_t i = 0; i < kLanes; ++i) {
      const float shrink = fast_exp(m[c + i] - highest[i]);
      factor[c + i] = shrink;
      l[c + i] = l[c + i] * shrink + sum[i];
      shrinks = shrinks || !(shrink == 1.0f);
      m[c + i] = highest[i];
    }
  }
  return shrinks;
}

// To 2 units in the last place (Cephes' polynomial where the other form would cancel: x stays x far below a cap).
inline float tanh_of(float x) {
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float near = p * z * x + x, far = 1.0f - 2.0f / (1.0f + fast_exp(2.0f * x));
  return z < 0.625f * 0.625f ? near : far;
}

ALAMBIC_VECTORISED void soft_cap(float* x, float* slopes, std::int64_t count, float cap) {
  const float per_cap = 1.0f / cap;
  if (slopes == nullptr) {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) x[i] = cap * tanh_of(x[i] * per_cap);
  } else {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
      const float share = tanh_of(x[i] * per_cap);
      x[i] = cap * share;
      slopes[i] = 1.0f - share * share;
    }
  }
}

ALAMBIC_VECTORISED void scale_columns(float* acc, std::int64_t rows, std::int64_t R, const float* factor) {
  for (std::int64_t s = 0; s < rows; ++s) {
    float* const row = acc + s * R;
#pragma omp simd
    for (std::int64_t i = 0; i < R; ++i) row[i] *= factor[i];
  }
}

template <class T>
ALAMBIC_VECTORISED void transpose(const T* from, std::int64_t ld_from, T* to, std::int64_t ld_to, std::int64_t rows, std::int64_t columns) {
  constexpr std::int64_t kBlock = 16;
  for (std::int64_t r0 = 0; r0 < rows; r0 += kBlock)
    for (std::int64_t c0 = 0; c0 < columns; c0 += kBlock) {
      const std::int64_t r1 = std::min(rows, r0 + kBlock), c1 = std::min(columns, c0 + kBlock);
      for (std::int64_t c = c0; c < c1; ++c)
        for (std::int64_t r = r0; r < r1; ++r) to[c * ld_to + r] = from[r * ld_from + c];
    }
}

template void transpose(const float*, std::int64_t, float*, std::int64_t, std::int64_t, std::int64_t);
template void transpose(const at::BFloat16*, std::int64_t, at::BFloat16*, std::int64_t, std::int64_t, std::int64_t);

ALAMBIC_VECTORISED void scale(float* x, std::int64_t count, float factor) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) x[i] *= factor;
}

}  // namespace alambic::models::tiles
