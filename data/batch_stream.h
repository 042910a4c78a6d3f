// SPDX-License-Identifier: Apache-2.0
#pragma once
// An endless, reproducible stream of packed batches from weighted token stores. Which documents make up global batch n
// is a function of (seed, n) and of the stores alone: not of the number of ranks, threads, or of earlier stops.
//
// How a row comes about: the schedule (data/mixture.h) names a store; that store's current window (data/packer.h), some
// thousands of documents taken in the order of a keyed permutation that changes with each epoch, gives its next row.
// A row therefore holds documents of one store, so that a weight is a share of tokens, whatever the documents' lengths.
// All of this is decided by lengths alone, so that each rank walks the whole sequence and reads only its own rows.
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/json.h"
#include "data/batch.h"
#include "data/token_store.h"

namespace alambic::data {

struct MixtureEntry {
  std::filesystem::path store;
  double weight = 1;  // share of rows drawn from this store, relative to the others; six decimals count
};

struct StreamConfig {
  std::vector<MixtureEntry> mixture;
  std::int64_t row_length = 1024;        // most tokens in a row
  std::int64_t rows_per_batch = 1;       // rows in a micro-batch
  std::int64_t batches_per_step = 1;     // micro-batches of one optimiser step, over all ranks; a multiple of num_ranks
  bool pack = true;                      // false: one document a row
  /// What happens to a document longer than row_length. false: its end is cut off, counted and reported (chats, whose
  /// later parts mean little without their beginning). true: it becomes consecutive pieces that overlap by one token, so
  /// that each of its tokens is still predicted exactly once (plain text); nothing is lost, context restarts.
  bool split_long = false;
  std::uint64_t seed = 0;
};

/// Sums over all ranks since sample 0 (they travel in the state).
struct StreamCounts {
  std::uint64_t rows = 0, documents = 0, tokens = 0;  // a split document counts once a piece
  std::uint64_t truncated_documents = 0, truncated_tokens = 0;
  std::uint64_t skipped_documents = 0;  // of fewer than 2 tokens: nothing to predict
  bool operator==(const StreamCounts&) const = default;
};

/// What the stream needs of a token store; a test or a bench may simulate one.
class Corpus {
 public:
  virtual ~Corpus() = default;
  virtual std::string name() const = 0;  // for messages
  virtual std::string hash() const = 0;  // equal iff the data are
  virtual std::uint64_t num_documents() const = 0;
  virtual std::uint64_t num_trained_tokens() const = 0;
  virtual std::uint32_t length(std::uint64_t document) const = 0;  // in tokens
  virtual Document read(std::uint64_t document) const = 0;         // called from the prefetching thread
};

class BatchStream {
 public:
  /// rank, num_ranks: this process takes micro-batches rank, rank + num_ranks, ... of each step.
  /// Error(kUsage): an empty mixture, a weight or size out of range, batches_per_step not a multiple of num_ranks, stores
  /// made by different tokenizers, or with ids that a model of `vocabulary_size` has not. Error(kData): a store that is
  /// damaged, empty or without a trained token.
  BatchStream(const StreamConfig& config, std::uint32_t vocabulary_size, int rank = 0, int num_ranks = 1);
  /// The same over given corpora, one for each mixture entry (whose paths are then not opened).
  BatchStream(const StreamConfig& config, std::vector<std::unique_ptr<Corpus>> corpora, int rank = 0, int num_ranks = 1);
  ~BatchStream();

  /// The micro-batches of the next step for this rank. Prepared ahead on a thread, whose errors are thrown here (again at
  /// every later call). Error(kData) when this rank sees 64 batches in a row without a token to learn from.
  std::vector<Batch> next_step();

  /// A few integers a store: enough to continue exactly, at once, on any number of ranks.
  Json state() const;  // the position after the last next_step()
  /// Error(kUsage) with the difference if stores, weights, seed, row_length, pack, split_long or rows a step are not the same;
  /// Error(kData) if the state is damaged.
  void restore(const Json& state);
  StreamCounts counts() const;  // after the last next_step()

  /// Passes over the leading store after the last next_step(): that of the largest weight, the first of equals. (The
  /// others are replayed beside it; a huge store with a small weight must not stretch what "one epoch" means.) Counts finished
  /// windows, and the current one by its share of drawn rows.
  double epochs() const;
  /// ceil(epochs * R / (p * S)): R = rows of one epoch of the leading store, p = its share of all rows, S = rows a step.
  /// R is exact for the first epoch where it has at most 64 windows, else extrapolated by documents from the first 64.
  std::int64_t steps_for_epochs(double epochs) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// One forward pass of evaluation, with what bits per byte and figures by language need of each document.
struct EvaluationBatch {
  Batch batch;
  /// One value for each of batch.document_lengths. A document longer than row_length is cut into pieces that overlap by
  /// one token, so that each token is predicted exactly once; its bytes are all counted with its first piece.
  std::vector<std::uint16_t> document_source;  // index into StoreInfo::sources
  std::vector<std::uint64_t> document_bytes;   // UTF-8 bytes of its trained tokens; sums to the bytes of all nats
};

/// Documents of a held-out store, each exactly once, always in the same batches.
class EvaluationBatches {
 public:
  /// max_tokens: 0 = the whole store; else whole documents spread evenly over the store (not its beginning), at most so many
  /// tokens, but at least one document; the choice depends on the store and max_tokens alone. Error(kData): no trained token.
  /// rank, num_ranks: every num_ranks-th batch, from number `rank` on. The store must outlive this object.
  EvaluationBatches(const TokenStore& store, std::int64_t row_length, std::int64_t rows_per_batch, std::uint64_t max_tokens = 0,
                    int rank = 0, int num_ranks = 1);
  EvaluationBatches(const Corpus& corpus, std::int64_t row_length, std::int64_t rows_per_batch, std::uint64_t max_tokens = 0,
                    int rank = 0, int num_ranks = 1);
  ~EvaluationBatches();
  std::optional<EvaluationBatch> next();  // nullopt at the end
  std::uint64_t num_documents() const;    // chosen, without those of fewer than 2 tokens

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace alambic::data
