// SPDX-License-Identifier: Apache-2.0
#pragma once
// `alambic distill --cache`: a teacher's pass over token stores into a teacher cache.
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "core/config.h"
#include "distill/teacher_cache.h"

namespace alambic::distill {

struct CacheStoreItem {
  std::filesystem::path store;
  void visit(FieldVisitor& fields);
};

struct CacheConfig {
  std::filesystem::path model, output;
  std::vector<CacheStoreItem> stores;
  std::string kind = "sampled";    // sampled, top_k
  std::int64_t k = 64, draws = 12;
  double temperature = 1, proposal_exponent = 1;
  std::int64_t row_length = 512;
  bool split_long = false;
  std::int64_t rows_per_batch = 4;
  std::string shard = "0/1";
  std::int64_t rows_per_file = 131'072;
  std::string compute_type = "auto";  // auto, f32, bf16
  std::filesystem::path tokenizer;    // of the stores, where the teacher's is written otherwise
  std::int64_t threads = 0;           // 0: all processors
  std::uint64_t seed = 0;
  void visit(FieldVisitor& fields);
};

struct CacheReport {
  CacheTotals totals;             // of this shard
  std::uint64_t file_bytes = 0;
  std::uint64_t tokens = 0;       // that the teacher read in this process
  double seconds = 0;             // of reading, the teacher's passes and writing, in this process
  bool was_complete = false;      // nothing was left to do
  bool complete = false;          // all shards are there: the cache opens
  Json json;                      // all of this, and the header
};

/// Writes one shard, going on where an earlier process was stopped or killed; a complete one is left alone. stop_requested is asked
/// between the teacher's passes; then what is whole is committed. Progress goes to the log.
/// Error(kUsage): contradictory settings, or a folder that holds something else. Error(kData): a store of another tokenizer or
/// vocabulary than the teacher's. Error(kNumerics): the teacher's logits are not finite. Error(kStopped).
CacheReport write_cache(const CacheConfig& config, const std::function<bool()>& stop_requested);

/// What write_cache() would check, and what the shard would take: {"documents", "tokens", "bytes_per_token_at_most", "model", "data",
/// "memory", "time", "disk", "teacher_licence", "warnings"} in the units of train::plan; disk is an upper bound, as files are compressed. Nothing is written; `probe`: one pass of the
/// teacher is timed.
Json plan_cache(const CacheConfig& config, bool probe = true);

}  // namespace alambic::distill
