// SPDX-License-Identifier: Apache-2.0
#include "train/evaluate.h"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "core/error.h"
#include "data/batch_stream.h"
#include "models/sharded_blocks.h"
#include "train/cross_entropy.h"
#include "train/step.h"

namespace alambic::train {
namespace {

double ratio(double value, double divisor) { return divisor > 0 ? value / divisor : std::numeric_limits<double>::quiet_NaN(); }

Json number_or_null(double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); }

}  // namespace

double Evaluation::loss() const { return ratio(nats, static_cast<double>(tokens)); }
double Evaluation::perplexity() const { return std::exp(loss()); }
double Evaluation::bits_per_byte() const { return ratio(nats / std::numbers::ln2, static_cast<double>(bytes)); }

void Evaluation::add(const Evaluation& other) {
  nats += other.nats;
  tokens += other.tokens;
  bytes += other.bytes;
  documents += other.documents;
}

namespace {

at::Tensor nats_of_kept(const models::Decoder& decoder, const data::Batch& batch) {
  const at::Tensor hidden_TD = decoder.hidden_TD(input_of(batch, /*dropout_seed=*/0));
  return cross_entropy_of_kept(hidden_TD, decoder.head, batch.targets_T, batch.keep_T);
}

using Predicted = std::pair<data::EvaluationBatch, at::Tensor>;  // with the nats of its kept tokens

/// The next batches, one for each rank; each is predicted by one rank and then known to all. Empty at the end.
std::vector<Predicted> next_round(const models::Decoder& decoder, data::EvaluationBatches& batches, parallel::Communicator& ranks) {
  std::vector<Predicted> round;
  std::int64_t most = 0;
  while (round.size() < static_cast<std::size_t>(ranks.size())) {
    std::optional<data::EvaluationBatch> next = batches.next();
    if (!next) break;
    most = std::max(most, next->batch.num_kept);
    round.emplace_back(std::move(*next), at::Tensor());
  }
  const auto rank = static_cast<std::size_t>(ranks.rank());
  at::Tensor own;
  if (rank < round.size()) own = round[rank].second = nats_of_kept(decoder, round[rank].first.batch);
  if (ranks.size() == 1 || round.empty()) return round;
  if (decoder.shards) decoder.shards->end_pass(/*backward=*/false);
  const at::Tensor padded = at::zeros({most}, at::kFloat);
  if (own.defined()) padded.narrow(0, 0, own.numel()).copy_(own);
  const at::Tensor all = ranks.all_gather(padded, "evaluation");
  for (std::size_t i = 0; i < round.size(); ++i) round[i].second = all[static_cast<std::int64_t>(i)];
  return round;
}

}  // namespace

StoreEvaluation evaluate(const models::Decoder& decoder, const data::TokenStore& store, std::int64_t row_length,
                         std::int64_t rows_per_batch, std::uint64_t max_tokens) {
  return evaluate(decoder, store, row_length, rows_per_batch, max_tokens, *parallel::single());
}

StoreEvaluation evaluate(const models::Decoder& decoder, const data::TokenStore& store, std::int64_t row_length,
                         std::int64_t rows_per_batch, std::uint64_t max_tokens, parallel::Communicator& ranks) {
  const at::NoGradGuard no_grad;
  if (store.info().vocabulary_size > decoder.config.vocabulary_size)
    fail(ErrorKind::kData, store.folder().string(), ": its tokenizer has ", store.info().vocabulary_size, " tokens, the model only ",
         decoder.config.vocabulary_size, Remedy{"prepare the text with the tokenizer of this model"});
  std::vector<Evaluation> of_source(store.info().sources.size());
  data::EvaluationBatches batches(store, row_length, rows_per_batch, max_tokens);
  for (auto round = next_round(decoder, batches, ranks); !round.empty(); round = next_round(decoder, batches, ranks)) {
    for (const auto& [evaluated, nats_K] : round) {  // in the order of the batches, however many ranks there are
      const data::Batch& batch = evaluated.batch;
      const float* nats = nats_K.const_data_ptr<float>();
      const bool* keep = batch.keep_T.const_data_ptr<bool>();
      for (std::size_t i = 0; i < batch.document_lengths.size(); ++i) {
        Evaluation& total = of_source.at(evaluated.document_source[i]);
        total.documents += batch.origins[i].first_token == 0;
        total.bytes += evaluated.document_bytes[i];
        for (std::int64_t t = 0; t < batch.document_lengths[i]; ++t)
          if (*keep++) total.nats += *nats++, total.tokens += 1;
        if (!std::isfinite(total.nats))
          fail(ErrorKind::kNumerics, store.folder().string(), ": document ", batch.origins[i].document, ": its loss is not finite");
      }
    }
  }

  StoreEvaluation result;
  for (std::size_t i = 0; i < of_source.size(); ++i) {
    if (of_source[i].documents == 0) continue;
    const data::SourceInfo& source = store.info().sources[i];
    result.total.add(of_source[i]);
    result.by_language[source.language].add(of_source[i]);
    result.by_source[source.name].add(of_source[i]);
  }
  return result;
}

Json to_json(const Evaluation& evaluation) {
  return {{"loss", number_or_null(evaluation.loss())}, {"perplexity", number_or_null(evaluation.perplexity())},
          {"bits_per_byte", number_or_null(evaluation.bits_per_byte())}, {"nats", evaluation.nats}, {"tokens", evaluation.tokens},
          {"bytes", evaluation.bytes}, {"documents", evaluation.documents}};
}

Json to_json(const StoreEvaluation& evaluation) {
  Json json = to_json(evaluation.total);
  json["by_language"] = json["by_source"] = Json::object();
  for (const auto& [language, part] : evaluation.by_language) json["by_language"][language] = to_json(part);
  for (const auto& [source, part] : evaluation.by_source) json["by_source"][source] = to_json(part);
  return json;
}

}  // namespace alambic::train
