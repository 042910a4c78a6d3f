// SPDX-License-Identifier: Apache-2.0
#pragma once
// Rows of a teacher's logits -> sparse signals. Letters: K = rows, V = columns of the head, N = slots.
#include <ATen/core/Tensor.h>

#include <cstdint>

#include "distill/signal_codec.h"

namespace alambic::distill {

struct RowSettings {
  SignalForm form;              // softmax over its vocabulary_size ids: columns behind are padding of the head, and no tokens
  double temperature = 1;       // p = softmax(logits / temperature)
  double proposal_exponent = 1; // kWeighted: draws from q ~ p^exponent, each id weighing count p / (draws q)
};

/// Fills `rows` = logits_KV.size(0) rows of ids [K, N], codes [K, N] (as pack() takes them) and tails [K], on all threads.
/// seeds_K: what a row's draws are a function of; not read for kTopK. Returns the first row whose logits are not finite numbers
/// (-inf is: probability 0), or -1. logits_KV is f32 or bf16; arithmetic is f32, sums f64.
std::int64_t signal_of_rows(const RowSettings& settings, const at::Tensor& logits_KV, const std::uint64_t* seeds_K, std::int32_t* ids_KN, std::uint32_t* codes_KN, float* tails_K);

}  // namespace alambic::distill
