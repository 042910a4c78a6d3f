// SPDX-License-Identifier: Apache-2.0
#pragma once
// The one place where y = x W^T + b + scale (dropout(x) A^T) B^T is computed.
// Letters: T = tokens, I = inputs, O = outputs, R = adapter rank.
//
// Its own backward: x is saved once, the gradient of a frozen W is never computed, dropout is drawn again from its seed,
// and nothing is computed for an input that needs no gradient. A quantised W is made dense for each use, once in the forward
// pass and once in the backward pass, in a buffer that the thread keeps and uses for all of them. Where W is bf16, so are the products with it and with A and
// B (their f32 masters are rounded for the product; sums inside a product are f32), and the gradients of A, B and the
// magnitude are f32 again. With an f32 W everything is f32.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "models/frozen_weight.h"

namespace alambic::models {

/// Low-rank update of one Linear: LoRA (arXiv:2106.09685), with DoRA's magnitude (arXiv:2402.09353) where given:
///   y = m / n (x W^T + scale (x A^T) B^T) + b,   n = || W + scale B A || of each row, a constant to the gradient.
/// With dropout, DoRA is as in PEFT 0.21:  y = x W^T + b + (m / n - 1) z W^T + m / n scale (z A^T) B^T,  z = dropout(x).
struct Adapter {
  at::Tensor a_RI, b_OR;   // f32, trained
  at::Tensor magnitude_O;  // f32, trained; undefined: plain LoRA
  double scale = 1;        // alpha / rank, or alpha / sqrt(rank) for rsLoRA
  double dropout = 0;      // probability that an input of the adapter is zeroed while training
  std::uint64_t id = 0;    // position in the list of adapters: part of the dropout's seed
  /// f32 constants that no forward pass reads: the A and B that were taken out of the frozen W at the start, which then is
  /// W - scale B A (PiSSA, OLoRA: lora/initialise.h); undefined where W is the published base's.
  at::Tensor initial_a_RI = {}, initial_b_OR = {};
};

struct Linear {
  at::Tensor weight_OI;  // compute type; a leaf that requires_grad when it is trained itself. Undefined: see quantized
  at::Tensor bias_O;     // undefined: none. Compute type or f32
  std::optional<Adapter> adapter;
  std::shared_ptr<const FrozenWeight> quantized = {};  // W, where weight_OI is undefined
  at::ScalarType quantized_compute = at::kFloat;  // the compute type of a quantised W: f32 or bf16
  /// Of a head whose rows for these tokens are trained apart (models/token_rows.h); undefined and empty elsewhere. f32 [N, I].
  at::Tensor token_rows_ND = {};
  std::vector<std::int64_t> token_row_ids = {};
  /// Where defined, f64 [I]: each pass without the fused blocks adds the square of its input, column by column (train/importance.h).
  at::Tensor input_squares_I = {};

  double soft_cap = 0;  // of a head whose logits are soft-capped: the result becomes cap * tanh(result / cap); 0: none

  /// x_TI in f32 or the compute type; the result has the compute type. dropout_seed: 0 = evaluating, no dropout.
  at::Tensor operator()(const at::Tensor& x_TI, std::uint64_t dropout_seed) const;
  at::Tensor uncapped(const at::Tensor& x_TI, std::uint64_t dropout_seed) const;  // the same before soft_cap

  std::int64_t outputs() const;
  std::int64_t inputs() const;
  at::ScalarType compute_type() const;
  at::Device device() const;
  /// W in f32 or bf16: weight_OI itself where it has that type, else a tensor of its own.
  at::Tensor dense_OI(at::ScalarType type) const;
};

/// Soft-caps y, in place, in f32. The slope at each y, (1 - tanh^2), in y's type, where it is wanted; else undefined.
at::Tensor soft_cap_in_place(at::Tensor& y_TO, double cap, bool wants_slope);

/// A quantised W in f32 or bf16, in this thread's buffer: it holds until the thread asks for the next one. The buffer is as
/// large as the largest that was asked for, and stays.
at::Tensor dense_in_buffer(const FrozenWeight& weight, at::ScalarType type);

/// || W + scale B A || of each row, f32: DoRA's n, and its first magnitude. Not differentiable.
at::Tensor adapted_row_norms(const at::Tensor& weight_OI, const Adapter& adapter);

/// x with each element zeroed with the given probability and the others divided by 1 - probability. Element i (row by row)
/// is zeroed when the i % 4-th 16-bit part of mix64(seed + i / 4), lowest first, is below probability * 65536. Elsewhere than in a
/// processor's memory that is dropout_by_operators().
at::Tensor with_dropout(const at::Tensor& x_TI, double probability, std::uint64_t seed);

/// The same of the device's own numbers (models/device.h): the mask is a function of seed and shape, but not that of a processor.
at::Tensor dropout_by_operators(const at::Tensor& x_TI, double probability, std::uint64_t seed);

}  // namespace alambic::models
