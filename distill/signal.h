// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a student learns from where the teacher's whole distribution is not at hand: a few tokens of each row.
// Letters: K = kept rows, in the order of the batch's kept rows; N = slots of a row.
#include <ATen/core/Tensor.h>

namespace alambic::distill {

/// A sparse distribution over the vocabulary for each kept row. Ids of one row differ from each other; slots may be unused.
struct SparseSignal {
  at::Tensor ids_KN;            // i32; -1: the slot is unused
  at::Tensor probabilities_KN;  // f32; 0 where unused
  at::Tensor tail_K;            // f32: the mass outside of the slots; 0 for a sampled target, whose probabilities sum to 1
};

}  // namespace alambic::distill
