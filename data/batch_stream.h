// SPDX-License-Identifier: Apache-2.0
#pragma once
// An endless, reproducible stream of packed batches from weighted token stores. Which documents make up global batch n
// is a function of (seed, n) and of the stores alone: not of the number of ranks, threads, or of earlier stops.
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "core/json.h"
#include "data/batch.h"
#include "data/token_store.h"

namespace alambic::data {

struct MixtureEntry {
  std::filesystem::path store;
  double weight = 1;  // share of rows drawn from this store, relative to the others
};

struct StreamConfig {
  std::vector<MixtureEntry> mixture;
  std::int64_t row_length = 1024;        // most tokens in a row; longer documents are cut, counted and reported
  std::int64_t rows_per_batch = 1;       // rows in a micro-batch
  std::int64_t batches_per_step = 1;     // micro-batches of one optimiser step, over all ranks
  bool pack = true;                      // false: one document a row
  std::uint64_t seed = 0;
};

struct StreamCounts {
  std::uint64_t documents = 0, tokens = 0, truncated_documents = 0, truncated_tokens = 0;
};

class BatchStream {
 public:
  /// rank, num_ranks: this process takes micro-batches rank, rank + num_ranks, ... of each step.
  BatchStream(const StreamConfig& config, std::uint32_t vocabulary_size, int rank = 0, int num_ranks = 1);
  ~BatchStream();

  /// The micro-batches of the next step for this rank. Prepared ahead on a thread.
  std::vector<Batch> next_step();

  /// A few integers (position in each store, scheduler counters, carried document): enough to continue exactly.
  Json state() const;      // the position after the last next_step()
  void restore(const Json& state);  // Error(kUsage) with the difference if stores, weights or seed are not the same
  StreamCounts counts() const;
  /// Documents drawn so far divided by documents in the mixture (weighted); 1.0 is one epoch of the largest share.
  double epochs() const;
  /// Steps in `epochs` passes over the store that takes longest to exhaust, by documents and mean packing; for schedules.
  std::int64_t steps_for_epochs(double epochs) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// All documents of a store once, in order, packed the same way: for evaluation.
std::vector<Batch> evaluation_batches(const TokenStore& store, std::int64_t row_length, std::int64_t rows_per_batch, std::uint64_t max_tokens);

}  // namespace alambic::data
