// SPDX-License-Identifier: Apache-2.0
#pragma once
// Next tokens, one after the other, with a key-value cache; and the log-probabilities of given tokens.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "models/decoder.h"

namespace alambic::models {

/// Keys and values of the tokens seen so far, one pair a layer, [kv heads, capacity, head size].
struct KeyValueCache {
  std::vector<at::Tensor> keys, values;
  std::int64_t length = 0;
};

struct Sampling {
  double temperature = 0;         // 0 = greedy
  std::int64_t top_k = 0;         // 0 = off
  double top_p = 1, min_p = 0;    // 1, 0 = off
  double repetition_penalty = 1;  // CTRL's (arXiv:1909.05858): as transformers applies it, prompt included
  std::int64_t max_new_tokens = 256;
  std::uint64_t seed = 0;
};

/// Ids after the prompt, up to and including the first of stop_ids. on_token sees each id as it is drawn and ends the
/// generation by returning false (stop strings live there). Filters apply in transformers' order.
std::vector<std::int64_t> generate(const Decoder& decoder, const std::vector<std::int64_t>& prompt, const Sampling& sampling,
                                   const std::vector<std::int64_t>& stop_ids,
                                   const std::function<bool(std::int64_t)>& on_token = {});

/// result[i] = ln p(ids[i+1] | ids[0..i]); size ids.size() - 1. f32 softmax over row chunks.
std::vector<double> score(const Decoder& decoder, const std::vector<std::int64_t>& ids);

}  // namespace alambic::models
