// SPDX-License-Identifier: Apache-2.0
#include "models/row_kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/vectorised.h"

namespace alambic::models::kernels {
namespace {

using at::BFloat16;

inline float load(const float* p) { return *p; }
inline float load(const BFloat16* p) {
  const std::uint32_t bits = static_cast<std::uint32_t>(p->x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
inline void store(float* p, float value) { *p = value; }
// Rounds to nearest even, as c10 does; written without a branch so that it vectorises. NaN keeps its top bits and a set quiet bit.
inline void store(BFloat16* p, float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->x = static_cast<std::uint16_t>(value != value ? 0x7fc0u : rounded);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

struct Gate {
  float value, slope;
};
inline Gate silu(float x) {
  const float s = sigmoid(x);
  return {x * s, s * (1.0f + x * (1.0f - s))};
}
// 0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
inline Gate gelu(float x) {
  constexpr float kRoot = 0.7978845608028654f, kCube = 0.044715f;
  const float s = sigmoid(2.0f * kRoot * (x + kCube * x * x * x));
  return {x * s, s + x * s * (1.0f - s) * 2.0f * kRoot * (1.0f + 3.0f * kCube * x * x)};
}

}  // namespace

template <class X, class Y>
ALAMBIC_VECTORISED void norm_rows(const X* x, std::int64_t ldx, const float* w, float epsilon, Y* y, float* rstd, std::int64_t rows, std::int64_t D) {
  for (std::int64_t t = 0; t < rows; ++t) {
    const X* const from = x + t * ldx;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < D; ++i) sum += load(from + i) * load(from + i);
    const float scale = 1.0f / std::sqrt(sum / static_cast<float>(D) + epsilon);
    rstd[t] = scale;
    Y* const to = y + t * D;
#pragma omp simd
    for (std::int64_t i = 0; i < D; ++i) store(to + i, load(from + i) * scale * w[i]);
  }
}

template <class X, class Y>
ALAMBIC_VECTORISED void norm_again_rows(const X* x, std::int64_t ldx, const float* w, const float* rstd, Y* y, std::int64_t rows, std::int64_t D) {
  for (std::int64_t t = 0; t < rows; ++t) {
    const X* const from = x + t * ldx;
    const float scale = rstd[t];
    Y* const to = y + t * D;
#pragma omp simd
    for (std::int64_t i = 0; i < D; ++i) store(to + i, load(from + i) * scale * w[i]);
  }
}

template <class X, class DY, class Out>
ALAMBIC_VECTORISED void norm_backward_rows(const X* x, std::int64_t ldx, const float* w, const float* rstd, const DY* dy, Out* out, std::int64_t ld_out, bool add,
                                           float* dw, std::int64_t rows, std::int64_t D) {
  for (std::int64_t t = 0; t < rows; ++t) {
    const X* const from = x + t * ldx;
    const DY* const d = dy + t * D;
    Out* const to = out + t * ld_out;
    const float scale = rstd[t];
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (std::int64_t i = 0; i < D; ++i) dot += load(d + i) * w[i] * load(from + i);
    const float along = dot * scale * scale / static_cast<float>(D);
    if (add) {
#pragma omp simd
      for (std::int64_t i = 0; i < D; ++i) store(to + i, load(to + i) + scale * (load(d + i) * w[i] - load(from + i) * along));
    } else {
#pragma omp simd
      for (std::int64_t i = 0; i < D; ++i) store(to + i, scale * (load(d + i) * w[i] - load(from + i) * along));
    }
    if (dw != nullptr) {
#pragma omp simd
      for (std::int64_t i = 0; i < D; ++i) dw[i] += load(d + i) * load(from + i) * scale;
    }
  }
}

template <class Y>
ALAMBIC_VECTORISED void add_rows(const float* x, const Y* y, std::int64_t ldy, float* out, std::int64_t rows, std::int64_t D) {
  for (std::int64_t t = 0; t < rows; ++t) {
#pragma omp simd
    for (std::int64_t i = 0; i < D; ++i) out[t * D + i] = x[t * D + i] + load(y + t * ldy + i);
  }
}

template <class From, class To>
ALAMBIC_VECTORISED void copy_rows(const From* from, std::int64_t ld_from, To* to, std::int64_t ld_to, std::int64_t rows, std::int64_t D) {
  for (std::int64_t t = 0; t < rows; ++t) {
#pragma omp simd
    for (std::int64_t i = 0; i < D; ++i) store(to + t * ld_to + i, load(from + t * ld_from + i));
  }
}

template <class T>
ALAMBIC_VECTORISED void add_delta_rows(T* y, std::int64_t ldy, const float* delta, std::int64_t rows, std::int64_t D) {
  for (std::int64_t t = 0; t < rows; ++t) {
#pragma omp simd
    for (std::int64_t i = 0; i < D; ++i) store(y + t * ldy + i, load(y + t * ldy + i) + delta[t * D + i]);
  }
}

template <class T>
ALAMBIC_VECTORISED void add_bias_rows(T* y, std::int64_t ldy, const float* bias, std::int64_t rows, std::int64_t D) {
  for (std::int64_t t = 0; t < rows; ++t) {
#pragma omp simd
    for (std::int64_t i = 0; i < D; ++i) store(y + t * ldy + i, load(y + t * ldy + i) + bias[i]);
  }
}

template <class T>
ALAMBIC_VECTORISED void gate_rows(const T* gate_up, std::int64_t ld, bool gelu_tanh, T* act, std::int64_t ld_act, std::int64_t rows, std::int64_t F) {
  for (std::int64_t t = 0; t < rows; ++t) {
    const T *const gate = gate_up + t * ld, *const up = gate + F;
    T* const to = act + t * ld_act;
    if (gelu_tanh) {
#pragma omp simd
      for (std::int64_t i = 0; i < F; ++i) store(to + i, gelu(load(gate + i)).value * load(up + i));
    } else {
#pragma omp simd
      for (std::int64_t i = 0; i < F; ++i) store(to + i, silu(load(gate + i)).value * load(up + i));
    }
  }
}

template <class T>
ALAMBIC_VECTORISED void gate_backward_rows(T* gate_up, std::int64_t ld, bool gelu_tanh, T* act, std::int64_t ld_act, std::int64_t rows, std::int64_t F) {
  for (std::int64_t t = 0; t < rows; ++t) {
    T *const gate = gate_up + t * ld, *const up = gate + F, *const both = act + t * ld_act;
    const auto turn = [&](std::int64_t i, Gate g) __attribute__((always_inline)) {
      const float u = load(up + i), d = load(both + i);
      store(both + i, g.value * u);
      store(up + i, d * g.value);
      store(gate + i, d * u * g.slope);
    };
    if (gelu_tanh) {
#pragma omp simd
      for (std::int64_t i = 0; i < F; ++i) turn(i, gelu(load(gate + i)));
    } else {
#pragma omp simd
      for (std::int64_t i = 0; i < F; ++i) turn(i, silu(load(gate + i)));
    }
  }
}

template <class T>
ALAMBIC_VECTORISED void cross_entropy_rows(T* logits, const std::int64_t* targets, double smoothing, double z_loss, bool differentiable, double* nats,
                                           std::int64_t rows, std::int64_t vocabulary) {
  const auto smooth_each = static_cast<float>(smoothing / static_cast<double>(vocabulary));
  for (std::int64_t t = 0; t < rows; ++t) {
    T* const row = logits + t * vocabulary;
    float highest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : highest)
    for (std::int64_t i = 0; i < vocabulary; ++i) highest = load(row + i) > highest ? load(row + i) : highest;
    const float target = load(row + targets[t]);
    // Partial sums of 1024 in f32, their sum in f64: the error of a long row of small terms stays that of a short one.
    double sum = 0, plain = 0;
    for (std::int64_t begin = 0; begin < vocabulary; begin += 1024) {
      const std::int64_t end = std::min(vocabulary, begin + 1024);
      float part = 0;
#pragma omp simd reduction(+ : part)
      for (std::int64_t i = begin; i < end; ++i) part += fast_exp(load(row + i) - highest);
      sum += part;
      if (smoothing > 0) {
        float values = 0;
#pragma omp simd reduction(+ : values)
        for (std::int64_t i = begin; i < end; ++i) values += load(row + i);
        plain += values;
      }
    }
    const double log_sum = static_cast<double>(highest) + std::log(sum);
    nats[t] = log_sum - (1 - smoothing) * target - (smoothing > 0 ? smoothing * plain / static_cast<double>(vocabulary) : 0) + z_loss * log_sum * log_sum;
    if (!differentiable) continue;
    // d / d logit_i = p_i (1 + 2 z log_sum) - target_i
    const auto factor = static_cast<float>((1 + 2 * z_loss * log_sum) / sum);
    const float p_target = fast_exp(target - highest) * factor;
#pragma omp simd
    for (std::int64_t i = 0; i < vocabulary; ++i) store(row + i, fast_exp(load(row + i) - highest) * factor - smooth_each);
    store(row + targets[t], p_target - smooth_each - static_cast<float>(1 - smoothing));
  }
}

// Which combinations exist.
template void norm_rows(const float*, std::int64_t, const float*, float, float*, float*, std::int64_t, std::int64_t);
template void norm_rows(const float*, std::int64_t, const float*, float, BFloat16*, float*, std::int64_t, std::int64_t);
template void norm_rows(const BFloat16*, std::int64_t, const float*, float, float*, float*, std::int64_t, std::int64_t);
template void norm_again_rows(const float*, std::int64_t, const float*, const float*, float*, std::int64_t, std::int64_t);
template void norm_again_rows(const float*, std::int64_t, const float*, const float*, BFloat16*, std::int64_t, std::int64_t);
template void norm_backward_rows(const float*, std::int64_t, const float*, const float*, const float*, float*, std::int64_t, bool, float*, std::int64_t, std::int64_t);
template void norm_backward_rows(const float*, std::int64_t, const float*, const float*, const BFloat16*, float*, std::int64_t, bool, float*, std::int64_t, std::int64_t);
template void norm_backward_rows(const BFloat16*, std::int64_t, const float*, const float*, const float*, BFloat16*, std::int64_t, bool, float*, std::int64_t, std::int64_t);
template void add_rows(const float*, const float*, std::int64_t, float*, std::int64_t, std::int64_t);
template void add_rows(const float*, const BFloat16*, std::int64_t, float*, std::int64_t, std::int64_t);
template void copy_rows(const float*, std::int64_t, float*, std::int64_t, std::int64_t, std::int64_t);
template void copy_rows(const float*, std::int64_t, BFloat16*, std::int64_t, std::int64_t, std::int64_t);
template void copy_rows(const BFloat16*, std::int64_t, float*, std::int64_t, std::int64_t, std::int64_t);
template void copy_rows(const BFloat16*, std::int64_t, BFloat16*, std::int64_t, std::int64_t, std::int64_t);
template void add_delta_rows(BFloat16*, std::int64_t, const float*, std::int64_t, std::int64_t);
template void add_bias_rows(float*, std::int64_t, const float*, std::int64_t, std::int64_t);
template void add_bias_rows(BFloat16*, std::int64_t, const float*, std::int64_t, std::int64_t);
template void gate_rows(const float*, std::int64_t, bool, float*, std::int64_t, std::int64_t, std::int64_t);
template void gate_rows(const BFloat16*, std::int64_t, bool, BFloat16*, std::int64_t, std::int64_t, std::int64_t);
template void gate_backward_rows(float*, std::int64_t, bool, float*, std::int64_t, std::int64_t, std::int64_t);
template void gate_backward_rows(BFloat16*, std::int64_t, bool, BFloat16*, std::int64_t, std::int64_t, std::int64_t);
template void cross_entropy_rows(float*, const std::int64_t*, double, double, bool, double*, std::int64_t, std::int64_t);
template void cross_entropy_rows(BFloat16*, const std::int64_t*, double, double, bool, double*, std::int64_t, std::int64_t);

}  // namespace alambic::models::kernels
