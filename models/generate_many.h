// SPDX-License-Identifier: Apache-2.0
#pragma once
// Continuations of several prompts at once: each has its own cache, length, seed and end, and all share each product.
#include <cstdint>
#include <vector>

#include "models/generate.h"

namespace alambic::models {

struct Prompt {
  std::vector<std::int64_t> ids;
  std::uint64_t seed = 0;           // in place of Sampling's
  std::int64_t max_new_tokens = 0;  // 0: Sampling's
};

struct Continuation {
  std::vector<std::int64_t> ids;     // after the prompt, up to and including the first stop id
  bool stopped = false;              // by a stop id
  double sum_log_probability = 0;    // of the ids, by the model as it is: no temperature, no filter. Only when asked for
};

/// For each prompt what generate() gives, but for the rounding of products of another height. One continuation does not change
/// the draws of another. Caches are as long as the longest document. Error(kUsage): an empty prompt, an id outside the vocabulary.
std::vector<Continuation> generate_many(const Decoder& decoder, const std::vector<Prompt>& prompts, const Sampling& sampling, const std::vector<std::int64_t>& stop_ids,
                                        bool log_probabilities = false);

}  // namespace alambic::models
