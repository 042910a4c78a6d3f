// SPDX-License-Identifier: Apache-2.0
#pragma once
// The teacher cache: a folder of HDF5 files with a teacher's sparse signal for each trained token of token stores.
// docs/teacher_cache.md is its format.
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/json.h"
#include "data/batch.h"
#include "distill/signal.h"
#include "distill/signal_codec.h"

namespace alambic::distill {

struct CacheTeacher {
  std::string name;          // for people
  std::string hash;          // checkpoints::base_hash: config and weights
  std::string family, licence, compute_type;  // licence: SPDX, "" = unknown
  std::int64_t parameters = 0;
  bool operator==(const CacheTeacher&) const = default;
};

struct CachedStore {
  std::string hash;  // TokenStore::hash
  std::uint64_t documents = 0;
  bool operator==(const CachedStore&) const = default;
};

/// Everything that decides what a cache holds; the same in each of its shards.
struct CacheHeader {
  CacheTeacher teacher;
  std::vector<CachedStore> stores;
  std::string tokenizer_hash;
  SignalForm form;               // its vocabulary_size is the tokenizer's: columns of padding in a head are left out
  double temperature = 1, proposal_exponent = 1;
  std::uint64_t seed = 0;
  std::int64_t row_length = 0;   // the teacher's context: documents are cut to it, or into pieces of it
  bool split_long = false;
  std::int64_t rows_per_batch = 1;  // of the teacher's passes: sums over other shapes differ in their last bits
  std::uint64_t rows_per_file = 0;

  std::uint64_t num_documents() const;  // of all stores
};
Json to_json(const CacheHeader& header);

struct CacheTotals {
  std::uint64_t documents = 0, pieces = 0, rows = 0, bytes = 0;  // bytes: of packed signals, before HDF5's filters
};

/// Documents of all stores are numbered through and dealt to the shards in groups of so many: group g belongs to shard g mod n.
/// A group is also what the teacher's passes are made of, so that the bits do not depend on n.
inline constexpr std::uint64_t kGroupDocuments = 64;

/// A stretch of a document as the trainer sees it, and the signals of its trained targets in order.
struct PieceSignal {
  std::uint64_t rows = 0;
  std::vector<std::uint8_t> bytes;  // pack()
};

/// Appends the documents of one shard. A file is committed whole (temporary name, fsync, rename, then the shard's list); opening
/// a folder that a killed writer left goes on behind the last committed file. The bytes are a function of documents and header.
class TeacherCacheWriter {
 public:
  /// Error(kUsage): another process writes this shard, the folder holds something else or a cache with another header.
  TeacherCacheWriter(const std::filesystem::path& folder, const CacheHeader& header, std::uint32_t shard = 0, std::uint32_t num_shards = 1);
  ~TeacherCacheWriter();
  std::uint64_t num_documents() const;        // of this shard
  std::uint64_t committed_documents() const;  // whole groups; the caller goes on behind them
  bool complete() const;                      // nothing is left to do
  /// The next document of the shard: its pieces, none where nothing in it can be predicted.
  void append(const std::vector<PieceSignal>& pieces);
  /// To be called behind each group: commits a file where there are rows_per_file.
  void end_group();
  /// Commits what there is, at the end of a group: for a writer that is asked to stop.
  void commit();
  /// Commits the rest and publishes the shard: from then on the cache's reader believes it.
  void finish();
  CacheTotals totals() const;        // committed
  std::uint64_t file_bytes() const;  // of the committed files

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// What a training run demands of a cache.
struct CacheUse {
  std::vector<std::string> store_hashes = {};  // of the mixture: data::Origin::store is an index into it
  std::string tokenizer_hash = {};        // of the student; "" = unknown
  std::int64_t vocabulary_size = 0;       // of the student's head; 0 = unknown
  std::int64_t row_length = 0;
  bool split_long = false;
  std::string teacher_hash = {};          // "" = any teacher
  std::optional<double> temperature = std::nullopt;
};

/// A complete cache, read at random. Everything is checked on open and on read.
class TeacherCache {
 public:
  /// Error(kData): a shard is missing, given twice or of another teacher; a file is damaged. Verifies each file's SHA-256
  /// before HDF5 sees it.
  explicit TeacherCache(const std::filesystem::path& folder);
  ~TeacherCache();
  TeacherCache(TeacherCache&&) noexcept;
  TeacherCache& operator=(TeacherCache&&) noexcept;

  const CacheHeader& header() const;
  const CacheTotals& totals() const;
  std::uint32_t num_shards() const;
  std::uint64_t file_bytes() const;
  /// SHA-256 over the shards' lists, which hold the hashes of everything: the identity of the cache.
  const std::string& hash() const;

  /// Checks that the cache fits a run, and makes signal() read batches of that run's mixture. Error(kData) for another
  /// teacher, tokenizer, vocabulary or store, Error(kUsage) for other settings; each with what was found and what was wanted.
  void use_for(const CacheUse& use);
  /// The rows of a batch in the order of its kept rows. Without use_for(), Origin::store counts the header's stores.
  /// Error(kData): a piece that the cache has not, or has with another number of rows. Safe from several threads.
  SparseSignal signal(const data::Batch& batch) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Whether a folder looks like a cache, finished or not.
bool is_teacher_cache(const std::filesystem::path& folder);

}  // namespace alambic::distill
