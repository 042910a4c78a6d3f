// SPDX-License-Identifier: Apache-2.0
#pragma once
// The token store: a folder with index.json and HDF5 shards of tokenised documents. docs/token_store.md is its format.
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/json.h"

namespace alambic::data {

/// Where text came from and under which terms; written with every store and carried to the model card.
struct SourceInfo {
  std::string name;      // short, unique in the store
  std::string origin;    // URL, package or path it was taken from
  std::string licence;   // SPDX expression, or LicenseRef-...; "" = unknown
  std::string language;  // BCP 47, "" = unknown
  bool operator==(const SourceInfo&) const = default;
};

struct StoreInfo {
  std::string tokenizer_hash;         // Tokenizer::hash()
  std::uint32_t vocabulary_size = 0;  // every id is below it
  std::vector<SourceInfo> sources;
};

struct Document {
  std::vector<std::uint32_t> ids;
  std::vector<std::uint8_t> mask;  // per id: 1 = this token is predicted (its loss counts), 0 = context only; the first is 0
  std::uint16_t source = 0;        // index into StoreInfo::sources
  std::uint64_t num_bytes = 0;     // UTF-8 bytes of the tokens whose mask is 1 (what bits per byte divides by)
  std::uint64_t num_words = 0;     // words of the whole text
};

struct StoreTotals {
  std::uint64_t documents = 0, tokens = 0, trained_tokens = 0, bytes = 0, words = 0;
};

/// Appends documents to shards in a folder. A shard is committed whole (temporary name, fsync, rename, then this part's
/// index); opening a folder that a killed writer left goes on behind the last committed shard. The bytes written are a
/// function of the documents and settings alone.
class TokenStoreWriter {
 public:
  /// part, num_parts  this process's part of a parallel prepare (its shards carry its number); 0, 1 when alone.
  /// recipe           how the documents were made; kept in the index. Going on with another recipe or info is Error(kUsage).
  /// Error(kUsage) too when another process writes this part, or when the folder holds something else.
  TokenStoreWriter(const std::filesystem::path& folder, StoreInfo info, std::uint64_t tokens_per_shard = 16ull << 20,
                   std::uint32_t part = 0, std::uint32_t num_parts = 1, Json recipe = nullptr);
  ~TokenStoreWriter();
  /// Documents this part has committed already; the caller skips as many of its documents.
  std::uint64_t committed_documents() const;
  /// The `position` given with the last committed document; nullopt when there is none. For callers that skip inputs.
  std::optional<std::uint64_t> committed_position() const;
  /// True when the folder holds a finished store made with these settings: nothing is left to append.
  bool complete() const;
  /// Error(kBug) for an empty document, sizes that differ, an id or source out of range, or a first token that is trained.
  void append(const Document& document, std::uint64_t position = 0);
  /// Commits the last shard and marks this part complete. The last part to finish writes index.json: from then on the
  /// store opens. Returns the totals of this part. Error(kData) when the whole store would be empty.
  StoreTotals finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// A finished store, read at random. Everything is checked on open and on read; ids are below vocabulary_size.
class TokenStore {
 public:
  /// Error(kData) if unfinished, damaged, or not a token store. Verifies each shard's SHA-256 before HDF5 sees it.
  explicit TokenStore(const std::filesystem::path& folder);
  ~TokenStore();
  TokenStore(TokenStore&&) noexcept;
  TokenStore& operator=(TokenStore&&) noexcept;

  const StoreInfo& info() const;
  const StoreTotals& totals() const;
  const std::filesystem::path& folder() const;
  /// SHA-256 of index.json, which holds the hashes of all shards: the identity of the data.
  const std::string& hash() const;
  std::uint64_t num_documents() const;
  const Json& recipe() const;  // as given to the writer
  std::uint32_t length(std::uint64_t document) const;  // in tokens, from the index in memory (4 bytes a document)
  Document read(std::uint64_t document) const;         // safe from several threads

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace alambic::data
