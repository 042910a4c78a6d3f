// SPDX-License-Identifier: Apache-2.0
#pragma once
// How well a decoder predicts held-out text: per corpus, and inside it per language and per source.
#include <cstdint>
#include <map>
#include <string>

#include "core/json.h"
#include "data/token_store.h"
#include "models/decoder.h"
#include "parallel/communicator.h"

namespace alambic::train {

struct Evaluation {
  double nats = 0;           // sum over predicted tokens of -ln p
  std::uint64_t tokens = 0;  // predicted tokens
  std::uint64_t bytes = 0;   // UTF-8 bytes of these tokens
  std::uint64_t documents = 0;
  double loss() const;           // nats a token; NaN without tokens
  double perplexity() const;     // exp(loss)
  double bits_per_byte() const;  // nats / ln 2 / bytes: comparable between tokenizers. NaN without bytes
  void add(const Evaluation& other);
};

struct StoreEvaluation {
  Evaluation total;
  std::map<std::string, Evaluation> by_language, by_source;  // keys of SourceInfo; "" is an unknown language
};

/// The documents data::EvaluationBatches chooses (max_tokens 0: all of the store), each token predicted once.
/// Error(kData) when the store's ids do not fit the decoder; Error(kNumerics) when a loss is not finite.
StoreEvaluation evaluate(const models::Decoder& decoder, const data::TokenStore& store, std::int64_t row_length,
                         std::int64_t rows_per_batch = 1, std::uint64_t max_tokens = 0);
/// The same by all ranks, each predicting a part of the batches: the same bits as by one, on every rank.
StoreEvaluation evaluate(const models::Decoder& decoder, const data::TokenStore& store, std::int64_t row_length,
                         std::int64_t rows_per_batch, std::uint64_t max_tokens, parallel::Communicator& ranks);

/// {"loss", "perplexity", "bits_per_byte", "nats", "tokens", "bytes", "documents"}; null where a figure has no divisor.
Json to_json(const Evaluation& evaluation);
/// The same with "by_language" and "by_source".
Json to_json(const StoreEvaluation& evaluation);

}  // namespace alambic::train
