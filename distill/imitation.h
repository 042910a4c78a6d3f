// SPDX-License-Identifier: Apache-2.0
#pragma once
// The loss of a student that is taught by text and by teachers, through the heads of all of them in chunks of rows: tokens x
// vocabulary exists of none.
// Letters: T = tokens, D = hidden size (each model's own), V = vocabulary, K = kept rows.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <span>

#include "distill/divergence.h"
#include "distill/signal.h"
#include "distill/unlike_tokens.h"
#include "distill/vocabulary.h"
#include "models/linear.h"
#include "train/cross_entropy.h"

namespace alambic::distill {

/// What one teacher says of the kept rows of a batch: its hidden states and head (live), a sparse signal (cached), or spans of text
/// (live, with other tokens; their weights stand in the signal).
struct TeacherRows {
  const models::Linear* head = nullptr;  // live
  at::Tensor hidden_KD = {};             // of the kept rows, in their order; the head's compute type
  const SparseSignal* signal = nullptr;  // cached
  bool sampled = false;                  // the signal holds counts / draws (sampled_row), else the likeliest tokens (top_k_row)
  at::Tensor weights_K = {};             // f32, of the divergence of each row; undefined: 1 each. Rows of weight 0 are passed over
  std::shared_ptr<const VocabularyMap> map = {};    // live: the divergence is of the pairs of ids; null: of the shared vocabulary
  std::shared_ptr<const UnlikeSignal> unlike = {};  // spans
};

/// What the loss is made of: cross_entropy * ce + divergence * weights_K * D, summed over the kept rows.
struct Mix {
  double cross_entropy = 0, divergence = 1;
  train::LossConfig text;        // label smoothing and z-loss of the cross-entropy
  DivergenceConfig imitation;
  /// Ids that teacher and student share: 0 .. shared - 1. Logits behind them are padding to the divergence: they get no mass and
  /// no gradient from it. (To the cross-entropy they are what they are in train.)
  std::int64_t shared_vocabulary = 0;
};

/// Sums over kept rows in nats, as they are before `Mix` weighs them.
struct Nats {
  double cross_entropy = 0, divergence = 0;
};

/// An f64 scalar, differentiable as train::cross_entropy_sum is; where the divergence's weight or `teachers` is nothing it is that
/// function, bit for bit. What it is made of is added to `nats`.
at::Tensor imitation_sum(const at::Tensor& hidden_TD, const models::Linear& head, const at::Tensor& targets_T, const at::Tensor& keep_T, std::uint64_t dropout_seed, const Mix& mix,
                         std::span<const TeacherRows> teachers, Nats& nats);

}  // namespace alambic::distill
