// SPDX-License-Identifier: Apache-2.0
#pragma once
// Cross-entropy through the head in chunks of rows: tokens x vocabulary never exists at once.
// Letters: T = tokens, D = hidden size, V = vocabulary, K = kept tokens.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>

#include "models/linear.h"

namespace alambic {
class FieldVisitor;
}

namespace alambic::train {

struct LossConfig {
  double label_smoothing = 0;  // e: the target becomes 1 - e, and e / V everywhere
  double z_loss = 0;           // z: adds z (log sum exp)^2 to each kept token's nats
  void visit(FieldVisitor& fields);
};

/// A loss of rows of logits: gets logits_KV (the head's type) of the kept rows from `first` on, returns their sum in nats, and
/// where `differentiable` overwrites the logits with its gradient.
using RowLoss = std::function<double(at::Tensor& logits_KV, std::int64_t first, bool differentiable)>;

/// The head on the rows index_K of hidden_TD, a chunk at a time, through `row_loss`: an f64 scalar, differentiable in whatever of
/// hidden_TD and the head trains. Every loss over the vocabulary goes this way.
at::Tensor head_loss_sum(const at::Tensor& hidden_TD, const models::Linear& head, const at::Tensor& index_K, std::uint64_t dropout_seed, const RowLoss& row_loss);

/// sum over T of keep_T * -ln softmax(head(hidden_TD))[targets_T], in nats: an f64 scalar, differentiable in hidden_TD,
/// in the head's weight and bias where they train, and in its adapter. A SUM: the step divides once.
///
/// targets_T and keep_T are in a processor's memory wherever the decoder is; the result is where hidden_TD is, and nothing waits for the device.
/// Only kept rows pass the head. All gradients are made during the forward pass, chunk by chunk, and wait there for the
/// backward pass; so memory is num_rows_in_chunk(V) x V whatever T is, plus one gradient of each trained head tensor.
/// The matrix products run in the head's type; softmax and sums are f32, the sum over rows f64.
///   hidden_TD     f32 or bf16
///   targets_T     i64, in 0 .. V - 1 where keep_T is true
///   keep_T        bool; with no true element the result is 0 without a gradient
///   dropout_seed  of the head's adapter; 0: evaluating
/// Error(kBug) if shapes do not agree; Error(kData) if a kept target is outside the vocabulary.
at::Tensor cross_entropy_sum(const at::Tensor& hidden_TD, const models::Linear& head, const at::Tensor& targets_T,
                             const at::Tensor& keep_T, std::uint64_t dropout_seed, const LossConfig& loss = {});

/// What becomes of a chunk of rows elsewhere than in a processor's memory: the nats of each, f64 [K], where the logits are. targets_K are there, too.
/// As a RowLoss it overwrites the logits (f32 or bf16) with the gradient of the sum, where `differentiable`; else it leaves them.
at::Tensor cross_entropy_rows_by_operators(at::Tensor& logits_KV, const at::Tensor& targets_K, const LossConfig& loss, bool differentiable);

/// The same for evaluation: -ln p of each kept row, in order, f32 [K] in a processor's memory; no gradients.
at::Tensor cross_entropy_of_kept(const at::Tensor& hidden_TD, const models::Linear& head, const at::Tensor& targets_T,
                                 const at::Tensor& keep_T);

/// Bytes that a loss through this head takes besides hidden states and gradients, for so many rows: a chunk of logits, or tiles.
std::uint64_t head_bytes(const models::Linear& head, std::int64_t rows);

/// Rows of logits in memory at once: about 64 MiB of f32 (what stays cheap to allocate), at least 32, at most 512.
std::int64_t num_rows_in_chunk(std::int64_t vocabulary_size);

}  // namespace alambic::train
