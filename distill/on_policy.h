// SPDX-License-Identifier: Apache-2.0
#pragma once
// On-policy distillation (GKD, arXiv:2306.13649, algorithm 1): a share of the micro-batches is text that the student writes itself,
// and the teacher says of each of its tokens what it would have written. docs/on_policy.md.
#include <cstdint>
#include <functional>
#include <optional>

#include "data/batch.h"
#include "distill/imitation.h"
#include "models/decoder.h"

namespace alambic {
class FieldVisitor;
}

namespace alambic::distill {

struct OnPolicyConfig {
  double lambda = 0;                  // share of micro-batches; 0: none
  std::int64_t max_new_tokens = 128;  // of each document
  double temperature = 1, top_p = 1;  // of the student's draws; temperature 0: the likeliest tokens
  std::int64_t prompt_tokens = 16;    // of documents in which all is learnt, which have no prompt
  void visit(FieldVisitor& fields);
};

/// Whether the micro-batch of this seed is the student's own.
bool is_on_policy(const OnPolicyConfig& config, std::uint64_t dropout_seed);

/// The corpus batch with all behind the prompts written by the student; what was drawn is kept, nothing else. A prompt is a document up to its
/// first kept target, or where that is the second token its first prompt_tokens. Documents have at most row_length tokens, the
/// batch at most max_tokens: those that would not fit, in order, are left out, and so are those that `is_taught` is false of.
/// nullopt where none is left. Each draw depends on the seed, the document's place in the batch and the student alone.
std::optional<data::Batch> on_policy_batch(const OnPolicyConfig& config, const models::Decoder& student, const data::Batch& corpus, std::uint64_t dropout_seed, std::int64_t row_length,
                                           std::int64_t max_tokens, const std::function<bool(const data::Origin&)>& is_taught);

/// What of the loss counts on the student's own text: the divergence. There is no truth that cross-entropy could be to.
inline Mix on_policy_mix(Mix mix) {
  mix.cross_entropy = 0;
  return mix;
}

}  // namespace alambic::distill
