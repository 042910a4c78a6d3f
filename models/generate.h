// SPDX-License-Identifier: Apache-2.0
#pragma once
// Next tokens, one after the other, with a key-value cache; and the log-probabilities of given tokens.
// Letters: V = vocabulary.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "models/decoder.h"

namespace alambic::models {

/// Keys and values of the tokens seen so far, one pair a layer, [kv heads, capacity, head size] in the compute type. Keys
/// are stored rotated. Only for use without gradients.
struct KeyValueCache {
  std::vector<at::Tensor> keys, values;
  std::int64_t length = 0;
};
KeyValueCache make_cache(const Decoder& decoder, std::int64_t capacity);

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

/// Ids after the prompt, up to and including the first of stop_ids. on_token sees each id as it is drawn and ends the
/// generation by returning false (stop strings live there). Filters apply in transformers' order. The n-th draw depends on
/// the seed, n and the filtered distribution alone. Error(kUsage): an empty prompt, an id outside the vocabulary.
std::vector<std::int64_t> generate(const Decoder& decoder, const std::vector<std::int64_t>& prompt, const Sampling& sampling,
                                   const std::vector<std::int64_t>& stop_ids,
                                   const std::function<bool(std::int64_t)>& on_token = {});

/// result[i] = ln p(ids[i+1] | ids[0..i]); size ids.size() - 1. f32 softmax over row chunks, so no tokens x vocabulary in
/// memory. Error(kUsage): fewer than two ids, an id outside the vocabulary.
std::vector<double> score(const Decoder& decoder, const std::vector<std::int64_t>& ids);

}  // namespace alambic::models
