// SPDX-License-Identifier: Apache-2.0
#pragma once
// How well a decoder predicts held-out text: per corpus, and inside it per language and per source.
#include <cstdint>
#include <map>
#include <string>

#include "core/json.h"
#include "data/token_store.h"
#include "models/decoder.h"

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

/// Documents in order until max_tokens of them have been read (0: all), whole documents only. A document longer than
/// row_length is read in pieces that overlap by one token, so every token but a document's first is predicted once.
/// row_length and tokens_per_batch (tokens in memory at once) do not change which tokens are counted.
/// Error(kData) when an id is not in the decoder's vocabulary or the store has no token to predict;
/// Error(kNumerics) when a loss is not finite.
StoreEvaluation evaluate(const models::Decoder& decoder, const data::TokenStore& store, std::int64_t row_length,
                         std::uint64_t max_tokens = 0, std::int64_t tokens_per_batch = 2048);

/// {"loss", "perplexity", "bits_per_byte", "nats", "tokens", "bytes", "documents"}; null where a figure has no divisor.
Json to_json(const Evaluation& evaluation);
/// The same with "by_language" and "by_source".
Json to_json(const StoreEvaluation& evaluation);

}  // namespace alambic::train
