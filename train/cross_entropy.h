// SPDX-License-Identifier: Apache-2.0
#pragma once
// Cross-entropy through the head in chunks of rows: tokens x vocabulary never exists at once.
// Letters: T = tokens, D = hidden size, V = vocabulary, K = kept tokens.
#include <cstdint>

#include "models/linear.h"

namespace at {
class Tensor;
}

namespace alambic::train {

/// sum over T of keep_T * -ln softmax(head(hidden_TD))[targets_T], in nats: an f64 scalar, differentiable in hidden_TD,
/// in the head's weight and bias where they train, and in its adapter. A SUM: the step divides once.
///
/// Only kept rows pass the head. All gradients are made during the forward pass, chunk by chunk, and wait there for the
/// backward pass; so memory is num_rows_in_chunk(V) x V whatever T is, plus one gradient of each trained head tensor.
/// The matrix products run in the head's type; softmax and sums are f32, the sum over rows f64.
///   hidden_TD     f32 or bf16
///   targets_T     i64, in 0 .. V - 1 where keep_T is true
///   keep_T        bool; with no true element the result is 0 without a gradient
///   dropout_seed  of the head's adapter; 0: evaluating
/// Error(kBug) if shapes do not agree; Error(kData) if a kept target is outside the vocabulary.
at::Tensor cross_entropy_sum(const at::Tensor& hidden_TD, const models::Linear& head, const at::Tensor& targets_T,
                             const at::Tensor& keep_T, std::uint64_t dropout_seed);

/// The same for evaluation: -ln p of each kept row, in order, f32 [K]; no gradients.
at::Tensor cross_entropy_of_kept(const at::Tensor& hidden_TD, const models::Linear& head, const at::Tensor& targets_T,
                                 const at::Tensor& keep_T);

/// Rows of logits in memory at once: about 64 MiB of f32 (what stays cheap to allocate), at least 16, at most 512.
std::int64_t num_rows_in_chunk(std::int64_t vocabulary_size);

}  // namespace alambic::train
