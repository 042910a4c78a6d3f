// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/merge_probe.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/tensor.h>

#include <algorithm>

#include "core/error.h"
#include "core/random.h"
#include "data/tokenizer.h"

namespace alambic::checkpoints {

std::int64_t Probe::num_tokens() const {
  std::int64_t count = 0;
  for (const auto& document : documents) count += static_cast<std::int64_t>(document.size());
  return count;
}

Probe make_probe(const std::filesystem::path& model_folder, std::int64_t vocabulary_size, const std::string& text) {
  constexpr std::uint64_t kDocuments = 2, kLength = 24;
  constexpr std::size_t kMostTextTokens = 64;
  Probe probe;
  for (std::uint64_t d = 0; d < kDocuments; ++d) {
    std::vector<std::int64_t>& ids = probe.documents.emplace_back();
    for (std::uint64_t i = 0; i < kLength; ++i) ids.push_back(static_cast<std::int64_t>(mix64(d * kLength + i) % static_cast<std::uint64_t>(vocabulary_size)));
  }
  if (!std::filesystem::exists(model_folder / "tokenizer.json")) return probe;
  const data::Tokenizer tokenizer = data::Tokenizer::from_file(model_folder);
  std::vector<std::int64_t> ids;
  for (const std::uint32_t id : tokenizer.encode(text, true)) {
    if (id >= vocabulary_size) fail(ErrorKind::kData, model_folder.string(), ": tokenizer.json gives id ", id, ", the model has ", vocabulary_size, " tokens");
    if (ids.size() < kMostTextTokens) ids.push_back(id);
  }
  if (!ids.empty()) probe.documents.push_back(std::move(ids));
  return probe;
}

at::Tensor probe_logits(const models::Decoder& decoder, const Probe& probe) {
  const at::NoGradGuard evaluating;
  std::vector<at::Tensor> tokens, positions;
  std::vector<std::int64_t> lengths;
  for (const auto& document : probe.documents) {
    lengths.push_back(static_cast<std::int64_t>(document.size()));
    tokens.push_back(at::tensor(document, at::kLong));
    positions.push_back(at::arange(lengths.back(), at::kLong));
  }
  return decoder.logits_TV(decoder.hidden_TD({.tokens_T = at::cat(tokens), .positions_T = at::cat(positions), .document_lengths = lengths}));
}

LogitDistance logit_distance(const at::Tensor& a_TV, const at::Tensor& b_TV) {
  constexpr std::int64_t kRows = 16;  // at once: f64 copies of a large vocabulary stay small
  LogitDistance distance;
  for (std::int64_t begin = 0; begin < a_TV.size(0); begin += kRows) {
    const std::int64_t count = std::min(kRows, a_TV.size(0) - begin);
    const at::Tensor a = a_TV.narrow(0, begin, count).to(at::kDouble), b = b_TV.narrow(0, begin, count).to(at::kDouble);
    const double difference = (a - b).abs().max().item<double>();
    if (!(difference <= distance.largest_difference)) distance.largest_difference = difference;  // NaN wins, and stays
    distance.largest_logit = std::max(distance.largest_logit, a.abs().max().item<double>());
    const at::Tensor log_p = at::log_softmax(a, 1), log_q = at::log_softmax(b, 1);
    distance.kl += (log_p.exp() * (log_p - log_q)).sum().item<double>();
  }
  distance.kl = std::max(0.0, distance.kl / static_cast<double>(a_TV.size(0)));  // rounding may take 0 below 0
  return distance;
}

}  // namespace alambic::checkpoints
