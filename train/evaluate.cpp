// SPDX-License-Identifier: Apache-2.0
#include "train/evaluate.h"

#include <cmath>
#include <limits>
#include <numbers>

#include "core/error.h"
#include "data/batch_stream.h"
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

StoreEvaluation evaluate(const models::Decoder& decoder, const data::TokenStore& store, std::int64_t row_length,
                         std::int64_t rows_per_batch, std::uint64_t max_tokens) {
  const at::NoGradGuard no_grad;
  if (store.info().vocabulary_size > decoder.config.vocabulary_size)
    fail(ErrorKind::kData, store.folder().string(), ": its tokenizer has ", store.info().vocabulary_size, " tokens, the model only ",
         decoder.config.vocabulary_size, Remedy{"prepare the text with the tokenizer of this model"});
  std::vector<Evaluation> of_source(store.info().sources.size());
  data::EvaluationBatches batches(store, row_length, rows_per_batch, max_tokens);
  while (const std::optional<data::EvaluationBatch> next = batches.next()) {
    const data::Batch& batch = next->batch;
    const at::Tensor hidden_TD = decoder.hidden_TD(input_of(batch, /*dropout_seed=*/0));
    const at::Tensor nats_K = cross_entropy_of_kept(hidden_TD, decoder.head, batch.targets_T, batch.keep_T);
    const float* nats = nats_K.const_data_ptr<float>();
    const bool* keep = batch.keep_T.const_data_ptr<bool>();
    for (std::size_t i = 0; i < batch.document_lengths.size(); ++i) {
      Evaluation& total = of_source.at(next->document_source[i]);
      total.documents += batch.origins[i].first_token == 0;
      total.bytes += next->document_bytes[i];
      for (std::int64_t t = 0; t < batch.document_lengths[i]; ++t)
        if (*keep++) total.nats += *nats++, total.tokens += 1;
      if (!std::isfinite(total.nats))
        fail(ErrorKind::kNumerics, store.folder().string(), ": document ", batch.origins[i].document, ": its loss is not finite");
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
