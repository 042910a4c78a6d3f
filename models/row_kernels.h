// SPDX-License-Identifier: Apache-2.0
#pragma once
// Element-wise work of a decoder block on rows of plain arrays; each call is one thread's share. Arithmetic is f32 whatever
// the stored type; T is float or at::BFloat16. Letters: D = row length, F = gate width, S = head size.
#include <c10/util/BFloat16.h>

#include <cstdint>

namespace alambic::models::kernels {

/// exp to 2 units in the last place (Cephes' polynomial); 0 below -87, NaN stays NaN.
inline float fast_exp(float x) {
  const float bounded = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float n = __builtin_rintf(bounded * 1.44269504f);
  float f = bounded - n * 0.693359375f;
  f += n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const std::int32_t bits = (static_cast<std::int32_t>(n) + 127) << 23;
  float scale;
  __builtin_memcpy(&scale, &bits, sizeof scale);
  return x < -87.0f ? 0.0f : p * scale;
}

/// y = x / rms(x) * w, and 1 / rms(x). Rows of x are ldx apart, those of y D.
template <class X, class Y>
void norm_rows(const X* x, std::int64_t ldx, const float* w, float epsilon, Y* y, float* rstd, std::int64_t rows, std::int64_t D);
/// The same y again from the rstd that norm_rows gave, bit for bit.
template <class X, class Y>
void norm_again_rows(const X* x, std::int64_t ldx, const float* w, const float* rstd, Y* y, std::int64_t rows, std::int64_t D);
/// out (+)= the gradient of x. `dw`, unless null, gets the sum over the rows of dy * x / rms added.
template <class X, class DY, class Out>
void norm_backward_rows(const X* x, std::int64_t ldx, const float* w, const float* rstd, const DY* dy, Out* out, std::int64_t ld_out, bool add, float* dw,
                        std::int64_t rows, std::int64_t D);

/// out = x + y (rows of x and out D apart, of y ldy apart).
template <class Y>
void add_rows(const float* x, const Y* y, std::int64_t ldy, float* out, std::int64_t rows, std::int64_t D);
/// to = from, rounded to the nearest where it is narrower.
template <class From, class To>
void copy_rows(const From* from, std::int64_t ld_from, To* to, std::int64_t ld_to, std::int64_t rows, std::int64_t D);
/// y += delta, y += bias.
template <class T>
void add_delta_rows(T* y, std::int64_t ldy, const float* delta, std::int64_t rows, std::int64_t D);
template <class T>
void add_bias_rows(T* y, std::int64_t ldy, const float* bias, std::int64_t rows, std::int64_t D);

/// act = g(gate) * up, where gate and up are columns 0 .. F - 1 and F .. 2 F - 1 of gate_up; g is SiLU or GELU (tanh form).
template <class T>
void gate_rows(const T* gate_up, std::int64_t ld, bool gelu_tanh, T* act, std::int64_t ld_act, std::int64_t rows, std::int64_t F);
/// Turns gate_up into its own gradient, and the gradient of act in `act` into act itself, which the gradients of what follows need.
template <class T>
void gate_backward_rows(T* gate_up, std::int64_t ld, bool gelu_tanh, T* act, std::int64_t ld_act, std::int64_t rows, std::int64_t F);

/// Turns logits into d nats / d logits = softmax - one-hot, rows of `vocabulary`, and returns the nats of each row. With label
/// smoothing e the target is 1 - e, and e / V everywhere; z_loss adds z * (log sum exp)^2 (arXiv:2204.02311) to the row's value.
template <class T>
void cross_entropy_rows(T* logits, const std::int64_t* targets, double smoothing, double z_loss, bool differentiable, double* nats, std::int64_t rows,
                        std::int64_t vocabulary);

}  // namespace alambic::models::kernels
