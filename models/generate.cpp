// SPDX-License-Identifier: Apache-2.0
// Letters: B = documents that go on, T = tokens of a pass, V = vocabulary.
#include "models/generate.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/argmax.h>
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
#include "models/key_value_cache.h"

namespace alambic::models {
namespace {

constexpr double kNever = -std::numeric_limits<double>::infinity();
constexpr std::int64_t kScoreRows = 256;  // logits rows in memory at once

constexpr std::int64_t kFirstRoom = 256;  // new tokens that a cache has room for before it grows

// A document that is being continued.
struct Document {
  std::size_t number = 0;         // among the prompts
  std::vector<std::int64_t> ids;  // prompt and what was drawn
};

// A pass over the tokens of documents that a cache has not yet, and each document's last one of them.
struct Newest {
  Input input;
  at::Tensor last_B;
};
Newest newest(const std::vector<Document>& documents, const std::vector<std::int64_t>& rows, KeyValueCache& cache) {
  std::vector<std::int64_t> tokens, positions, last;
  Newest result;
  for (const std::int64_t row : rows) {
    const std::vector<std::int64_t>& ids = documents[static_cast<std::size_t>(row)].ids;
    const std::int64_t kept = cache.lengths_B[static_cast<std::size_t>(row)], total = static_cast<std::int64_t>(ids.size());
    for (std::int64_t t = kept; t < total; ++t) tokens.push_back(ids[static_cast<std::size_t>(t)]), positions.push_back(t);
    last.push_back(static_cast<std::int64_t>(tokens.size()) - 1);
    result.input.document_lengths.push_back(total - kept);
  }
  result.input.tokens_T = at::tensor(tokens, at::kLong), result.input.positions_T = at::tensor(positions, at::kLong);
  result.input.cache = &cache, result.input.cache_rows = rows;
  result.last_B = at::tensor(last, at::kLong);
  return result;
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

std::vector<Continuation> generate_many(const Decoder& decoder, const std::vector<Prompt>& prompts, const Sampling& sampling, const std::vector<std::int64_t>& stop_ids,
                                        bool log_probabilities, const std::function<bool(std::size_t, std::int64_t)>& on_token) {
  const at::NoGradGuard constant;
  check(sampling);
  const auto limit = [&](std::size_t number) { return prompts[number].max_new_tokens > 0 ? prompts[number].max_new_tokens : sampling.max_new_tokens; };
  std::vector<Continuation> drawn(prompts.size());
  std::vector<Document> going;
  std::int64_t longest = 0, most = 0;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    if (prompts[i].ids.empty()) fail(ErrorKind::kUsage, "prompt ", i, " is empty", Remedy{"give at least one token"});
    check_ids(decoder, prompts[i].ids);
    if (limit(i) < 1) continue;
    longest = std::max(longest, static_cast<std::int64_t>(prompts[i].ids.size())), most = std::max(most, limit(i));
    going.push_back({.number = i, .ids = prompts[i].ids});
  }
  if (going.empty()) return drawn;
  const std::int64_t long_from = decoder.config.rope.long_from;
  KeyValueCache cache(decoder, static_cast<std::int64_t>(going.size()), longest + std::min(most, kFirstRoom));
  for (std::uint64_t step = 0; !going.empty(); ++step) {
    // Documents whose keys are made (again) as a whole, and those of which one token is new.
    std::vector<std::int64_t> whole, single;
    for (std::size_t row = 0; row < going.size(); ++row) {
      std::int64_t& kept = cache.lengths_B[row];
      const auto length = static_cast<std::int64_t>(going[row].ids.size());
      // Once a document is longer than this, LongRoPE rotates all of its keys by other frequencies.
      if (long_from > 0 && kept <= long_from && length > long_from) kept = 0;
      (kept == 0 ? whole : single).push_back(static_cast<std::int64_t>(row));
      cache.make_room(length);
    }
    std::vector<std::int64_t> still;
    for (const std::vector<std::int64_t>& rows : {whole, single}) {
      if (rows.empty()) continue;
      const Newest pass = newest(going, rows, cache);
      const at::Tensor hidden_TD = decoder.hidden_TD(pass.input);
      const at::Tensor logits_BV = decoder.logits_TV(hidden_TD.index_select(0, pass.last_B.to(hidden_TD.device()))).cpu();
      at::Tensor total_B;
      if (log_probabilities) total_B = at::logsumexp(logits_BV, {1});
      for (std::size_t i = 0; i < rows.size(); ++i) {
        Document& document = going[static_cast<std::size_t>(rows[i])];
        Continuation& continuation = drawn[document.number];
        const at::Tensor logits_V = logits_BV[static_cast<std::int64_t>(i)];
        const std::int64_t id = next_id(logits_V, document.ids, sampling, prompts[document.number].seed, step);
        continuation.ids.push_back(id), document.ids.push_back(id);
        if (log_probabilities) continuation.sum_log_probability += logits_V[id].item<double>() - total_B[static_cast<std::int64_t>(i)].item<double>();
        const bool goes_on = !on_token || on_token(document.number, id);
        continuation.stopped = std::find(stop_ids.begin(), stop_ids.end(), id) != stop_ids.end();
        if (goes_on && !continuation.stopped && static_cast<std::int64_t>(continuation.ids.size()) < limit(document.number)) still.push_back(rows[i]);
      }
    }
    if (still.size() == going.size()) continue;
    if (still.empty()) break;
    std::sort(still.begin(), still.end());
    cache.keep_only(still);
    std::vector<Document> left;
    for (const std::int64_t row : still) left.push_back(std::move(going[static_cast<std::size_t>(row)]));
    going = std::move(left);
  }
  return drawn;
}

std::vector<std::int64_t> generate(const Decoder& decoder, const std::vector<std::int64_t>& prompt, const Sampling& sampling,
                                   const std::vector<std::int64_t>& stop_ids, const std::function<bool(std::int64_t)>& on_token) {
  const auto each = [&](std::size_t, std::int64_t id) { return !on_token || on_token(id); };
  return generate_many(decoder, {{.ids = prompt, .seed = sampling.seed}}, sampling, stop_ids, false, each)[0].ids;
}

std::vector<double> score(const Decoder& decoder, const std::vector<std::int64_t>& ids) {
  const at::NoGradGuard constant;
  if (ids.size() < 2) fail(ErrorKind::kUsage, "scoring needs at least two token ids, got ", ids.size());
  check_ids(decoder, ids);
  Input input;
  input.tokens_T = at::tensor(ids, at::kLong), input.positions_T = at::arange(input.tokens_T.numel(), at::kLong);
  input.document_lengths = {input.tokens_T.numel()};
  const at::Tensor hidden_TD = decoder.hidden_TD(input);
  std::vector<double> log_probabilities;
  const std::int64_t rows = input.tokens_T.numel() - 1;
  for (std::int64_t first = 0; first < rows; first += kScoreRows) {
    const std::int64_t count = std::min(kScoreRows, rows - first);
    const at::Tensor logits_RV = decoder.logits_TV(hidden_TD.narrow(0, first, count));
    const at::Tensor chosen_R = logits_RV.gather(1, input.tokens_T.narrow(0, first + 1, count).unsqueeze(1).to(logits_RV.device())).squeeze(1);
    const at::Tensor log_R = (chosen_R - at::logsumexp(logits_RV, {1})).to(at::kDouble).cpu();
    for (std::int64_t row = 0; row < count; ++row) log_probabilities.push_back(log_R[row].item<double>());
  }
  return log_probabilities;
}

}  // namespace alambic::models
