// SPDX-License-Identifier: Apache-2.0
#pragma once
// Two models on the same held-out text: what a quantised one has lost against the one it was made from.
#include <cstdint>

#include "core/json.h"
#include "data/token_store.h"
#include "models/decoder.h"
#include "train/evaluate.h"

namespace alambic::train {

struct Comparison {
  Evaluation before, after;
  double kl = 0;             // sum over predicted tokens of KL(before || after), in nats
  std::uint64_t same_first = 0;  // tokens where the likeliest token of both is the same one
  double kl_per_token() const;
  double same_share() const;
  Json json() const;  // {"tokens", "bits_per_byte_before", "bits_per_byte_after", "loss_before", "loss_after", "kl", "same_first"}
};

/// Over the documents that data::EvaluationBatches chooses, each token predicted once. The head is applied to a few rows at a
/// time, and both take the fused blocks from then on. Error(kData): ids that do not fit, or models of other vocabularies. Error(kNumerics): a loss that is not finite.
Comparison compare(models::Decoder& before, models::Decoder& after, const data::TokenStore& store, std::int64_t row_length, std::uint64_t max_tokens = 0);

}  // namespace alambic::train
