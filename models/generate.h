// SPDX-License-Identifier: Apache-2.0
#pragma once
// Next tokens, one after the other, with key-value caches; and the log-probabilities of given tokens.
// Letters: V = vocabulary.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "models/decoder.h"

namespace alambic::models {

struct Sampling {
  double temperature = 0;         // 0 = greedy
  std::int64_t top_k = 0;         // 0 = off
  double top_p = 1, min_p = 0;    // 1, 0 = off
  double repetition_penalty = 1;  // CTRL's (arXiv:1909.05858): as transformers applies it, prompt included
  std::int64_t max_new_tokens = 256;
  std::uint64_t seed = 0;
};

/// Logits after all filters, in transformers' order: repetition penalty of the ids seen so far, then, unless greedy,
/// temperature, top-k, top-p, min-p. What is filtered out is -infinity. logits_V f32. Error(kUsage) names a setting out of range.
at::Tensor filtered_logits_V(const at::Tensor& logits_V, const std::vector<std::int64_t>& seen, const Sampling& sampling);

/// Error(kUsage) names what is out of range: a setting, an id outside the vocabulary.
void check(const Sampling& sampling);
void check_ids(const Decoder& decoder, const std::vector<std::int64_t>& ids);

/// The n-th token drawn: the likeliest of the filtered logits where the temperature is 0, else by a number that depends on seed and n alone.
std::int64_t next_id(const at::Tensor& logits_V, const std::vector<std::int64_t>& seen, const Sampling& sampling, std::uint64_t seed, std::uint64_t n);

struct Prompt {
  std::vector<std::int64_t> ids;
  std::uint64_t seed = 0;           // in place of Sampling's
  std::int64_t max_new_tokens = 0;  // 0: Sampling's
};

struct Continuation {
  std::vector<std::int64_t> ids;   // after the prompt, up to and including the first stop id
  bool stopped = false;            // by a stop id
  double sum_log_probability = 0;  // of the ids, by the model as it is: no temperature, no filter. Only when asked for
};

/// Several prompts at once: each has its own cache, length, seed and end, and all share each product. One continuation does not
/// change the draws of another, but for the rounding of products of another height. The n-th draw depends on the seed, n and the
/// filtered distribution alone; filters apply in transformers' order. on_token sees each id as it is drawn and ends its
/// continuation by returning false (stop strings live there). Caches are as long as the longest document. Error(kUsage): an
/// empty prompt, an id outside the vocabulary.
std::vector<Continuation> generate_many(const Decoder& decoder, const std::vector<Prompt>& prompts, const Sampling& sampling, const std::vector<std::int64_t>& stop_ids,
                                        bool log_probabilities = false, const std::function<bool(std::size_t prompt, std::int64_t id)>& on_token = {});

/// The ids of one prompt's continuation.
std::vector<std::int64_t> generate(const Decoder& decoder, const std::vector<std::int64_t>& prompt, const Sampling& sampling,
                                   const std::vector<std::int64_t>& stop_ids,
                                   const std::function<bool(std::int64_t)>& on_token = {});

/// result[i] = ln p(ids[i+1] | ids[0..i]); size ids.size() - 1. f32 softmax over row chunks, so no tokens x vocabulary in
/// memory. Error(kUsage): fewer than two ids, an id outside the vocabulary.
std::vector<double> score(const Decoder& decoder, const std::vector<std::int64_t>& ids);

}  // namespace alambic::models
