// SPDX-License-Identifier: Apache-2.0
#include "models/generate.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/random.h"

namespace alambic::models {
namespace {

constexpr double kNever = -std::numeric_limits<double>::infinity();
constexpr std::int64_t kScoreRows = 256;  // logits rows in memory at once

Input input_of(const std::vector<std::int64_t>& ids, std::size_t first) {
  const auto begin = ids.begin() + static_cast<std::ptrdiff_t>(first);
  const auto count = static_cast<std::int64_t>(ids.size() - first);
  Input input;
  input.tokens_T = at::tensor(std::vector<std::int64_t>(begin, ids.end()), at::kLong);
  input.positions_T = at::arange(static_cast<std::int64_t>(first), static_cast<std::int64_t>(ids.size()), at::kLong);
  input.document_lengths = {count};
  return input;
}

void make_room(KeyValueCache& cache, std::int64_t tokens) {
  const std::int64_t capacity = cache.keys[0].size(1);
  if (cache.length + tokens <= capacity) return;
  const std::int64_t more = std::max(cache.length + tokens, 2 * capacity);
  for (auto* list : {&cache.keys, &cache.values})
    for (at::Tensor& old : *list) {
      const at::Tensor wider = at::empty({old.size(0), more, old.size(2)}, old.options());
      wider.narrow(1, 0, cache.length).copy_(old.narrow(1, 0, cache.length));
      old = wider;
    }
}

// The n-th draw: inverse of the distribution function at a number in [0, 1) that depends on seed and n alone.
std::int64_t draw(const at::Tensor& logits_V, std::uint64_t seed, std::uint64_t n) {
  const double at_share = static_cast<double>(derive_seed(seed, "sample", {n}) >> 11) * 0x1p-53;
  const at::Tensor chance_V = at::softmax(logits_V, 0, at::kDouble);
  const double* chance = chance_V.const_data_ptr<double>();
  double sum = 0;
  std::int64_t last_possible = 0;
  for (std::int64_t id = 0; id < chance_V.numel(); ++id) {
    if (chance[id] == 0) continue;
    last_possible = id;
    sum += chance[id];
    if (at_share < sum) return id;
  }
  return last_possible;  // the sum ended just below 1
}

}  // namespace

void check_ids(const Decoder& decoder, const std::vector<std::int64_t>& ids) {
  for (std::size_t i = 0; i < ids.size(); ++i)
    if (ids[i] < 0 || ids[i] >= decoder.config.vocabulary_size)
      fail(ErrorKind::kUsage, "token id ", ids[i], " (number ", i, ") is outside the vocabulary of ", decoder.config.vocabulary_size, " tokens");
}

void check(const Sampling& sampling) {
  if (!(sampling.temperature >= 0 && std::isfinite(sampling.temperature))) fail(ErrorKind::kUsage, "temperature must be at least 0, got ", sampling.temperature);
  if (sampling.top_k < 0) fail(ErrorKind::kUsage, "top_k must be at least 0, got ", sampling.top_k);
  if (!(sampling.top_p >= 0 && sampling.top_p <= 1)) fail(ErrorKind::kUsage, "top_p must be from 0 to 1, got ", sampling.top_p);
  if (!(sampling.min_p >= 0 && sampling.min_p <= 1)) fail(ErrorKind::kUsage, "min_p must be from 0 to 1, got ", sampling.min_p);
  if (!(sampling.repetition_penalty > 0 && std::isfinite(sampling.repetition_penalty)))
    fail(ErrorKind::kUsage, "repetition_penalty must be above 0, got ", sampling.repetition_penalty);
}

KeyValueCache make_cache(const Decoder& decoder, std::int64_t capacity) {
  KeyValueCache cache;
  for (std::size_t layer = 0; layer < decoder.blocks.size(); ++layer)
    for (auto* list : {&cache.keys, &cache.values})
      list->push_back(at::empty({decoder.config.num_kv_heads, capacity, decoder.config.head_size}, decoder.compute_type()));
  return cache;
}

at::Tensor filtered_logits_V(const at::Tensor& logits_V, const std::vector<std::int64_t>& seen, const Sampling& sampling) {
  check(sampling);
  at::Tensor left_V = logits_V.to(at::kFloat).clone();
  if (sampling.repetition_penalty != 1 && !seen.empty()) {
    const at::Tensor ids = at::tensor(seen, at::kLong);
    const at::Tensor score = left_V.index_select(0, ids);
    // Positive logits are divided, negative ones multiplied; an id that was seen twice is penalised once.
    left_V.index_copy_(0, ids, at::where(score < 0, score * sampling.repetition_penalty, score / sampling.repetition_penalty));
  }
  if (sampling.temperature == 0) return left_V;
  if (sampling.temperature != 1) left_V.div_(sampling.temperature);
  if (sampling.top_k > 0) {
    const at::Tensor best = std::get<0>(at::topk(left_V, std::min(sampling.top_k, left_V.numel())));
    left_V.masked_fill_(left_V < best[-1], kNever);
  }
  if (sampling.top_p < 1) {
    // From the least likely up: what together has at most 1 - top_p goes; the most likely one stays whatever its share.
    const auto [rising_V, order_V] = at::sort(left_V);
    const at::Tensor goes_V = at::softmax(rising_V, 0).cumsum(0) <= 1 - sampling.top_p;
    goes_V[-1].fill_(false);
    left_V.masked_fill_(at::empty_like(goes_V).scatter_(0, order_V, goes_V), kNever);
  }
  if (sampling.min_p > 0) {
    const at::Tensor chance_V = at::softmax(left_V, 0);
    const at::Tensor goes_V = chance_V < chance_V.max() * sampling.min_p;
    goes_V[chance_V.argmax()].fill_(false);
    left_V.masked_fill_(goes_V, kNever);
  }
  return left_V;
}

std::int64_t next_id(const at::Tensor& logits_V, const std::vector<std::int64_t>& seen, const Sampling& sampling, std::uint64_t seed, std::uint64_t n) {
  const at::Tensor left_V = filtered_logits_V(logits_V, seen, sampling);
  return sampling.temperature == 0 ? at::argmax(left_V).item<std::int64_t>() : draw(left_V, seed, n);
}

std::vector<std::int64_t> generate(const Decoder& decoder, const std::vector<std::int64_t>& prompt, const Sampling& sampling,
                                   const std::vector<std::int64_t>& stop_ids, const std::function<bool(std::int64_t)>& on_token) {
  const at::NoGradGuard constant;
  check(sampling);
  check_ids(decoder, prompt);
  if (prompt.empty()) fail(ErrorKind::kUsage, "the prompt is empty; at least one token is needed");
  std::vector<std::int64_t> ids = prompt, drawn;
  KeyValueCache cache = make_cache(decoder, static_cast<std::int64_t>(prompt.size()) + std::min<std::int64_t>(sampling.max_new_tokens, 256));
  const std::int64_t long_from = decoder.config.rope.long_from;
  for (std::int64_t step = 0; step < sampling.max_new_tokens; ++step) {
    // Once a document is longer than this, LongRoPE rotates all of its keys by other frequencies: they are made again.
    if (long_from > 0 && cache.length <= long_from && static_cast<std::int64_t>(ids.size()) > long_from) cache.length = 0;
    Input input = input_of(ids, static_cast<std::size_t>(cache.length));
    make_room(cache, input.tokens_T.numel());
    input.cache = &cache;
    const at::Tensor last_1D = decoder.hidden_TD(input).narrow(0, input.tokens_T.numel() - 1, 1);
    const std::int64_t next = next_id(decoder.logits_TV(last_1D).squeeze(0), ids, sampling, sampling.seed, static_cast<std::uint64_t>(step));
    drawn.push_back(next);
    ids.push_back(next);
    if (on_token && !on_token(next)) break;
    if (std::find(stop_ids.begin(), stop_ids.end(), next) != stop_ids.end()) break;
  }
  return drawn;
}

std::vector<double> score(const Decoder& decoder, const std::vector<std::int64_t>& ids) {
  const at::NoGradGuard constant;
  if (ids.size() < 2) fail(ErrorKind::kUsage, "scoring needs at least two token ids, got ", ids.size());
  check_ids(decoder, ids);
  const Input input = input_of(ids, 0);
  const at::Tensor hidden_TD = decoder.hidden_TD(input);
  std::vector<double> log_probabilities;
  const std::int64_t rows = input.tokens_T.numel() - 1;
  for (std::int64_t first = 0; first < rows; first += kScoreRows) {
    const std::int64_t count = std::min(kScoreRows, rows - first);
    const at::Tensor logits_RV = decoder.logits_TV(hidden_TD.narrow(0, first, count));
    const at::Tensor chosen_R = logits_RV.gather(1, input.tokens_T.narrow(0, first + 1, count).unsqueeze(1)).squeeze(1);
    const at::Tensor log_R = (chosen_R - at::logsumexp(logits_RV, {1})).to(at::kDouble);
    for (std::int64_t row = 0; row < count; ++row) log_probabilities.push_back(log_R[row].item<double>());
  }
  return log_probabilities;
}

}  // namespace alambic::models
