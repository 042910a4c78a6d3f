// SPDX-License-Identifier: Apache-2.0
#pragma once
// The token store: a folder with index.json and HDF5 shards of tokenised documents. docs/token_store.md is its format.
#include <cstdint>
#include <filesystem>
#include <memory>
#include <map>
#include <span>
#include <string>
#include <vector>

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
  std::vector<std::uint8_t> mask;  // per id: 1 = this token is predicted (its loss counts), 0 = context only
  std::uint16_t source = 0;        // index into StoreInfo::sources
  std::uint64_t num_bytes = 0;     // UTF-8 bytes of the tokens whose mask is 1 (what bits per byte divides by)
  std::uint64_t num_words = 0;     // words of the whole text
};

struct StoreTotals {
  std::uint64_t documents = 0, tokens = 0, trained_tokens = 0, bytes = 0, words = 0;
};

/// Appends documents to shards in a folder. A shard is committed whole (temporary name, fsync, rename, then the index);
/// opening a folder that a killed writer left goes on behind the last committed shard.
class TokenStoreWriter {
 public:
  /// shard_index, num_shards: this process's part of a parallel prepare (its shards carry its number); 0, 1 when alone.
  TokenStoreWriter(const std::filesystem::path& folder, StoreInfo info, std::uint64_t tokens_per_shard = 64ull << 20,
                   std::uint32_t part = 0, std::uint32_t num_parts = 1);
  ~TokenStoreWriter();
  /// Documents this part has committed already; the caller skips as many inputs.
  std::uint64_t committed_documents() const;
  void append(const Document& document);
  /// Commits the last shard and marks this part complete; the store opens once all parts are complete.
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
  std::uint32_t length(std::uint64_t document) const;  // in tokens, from the index in memory (4 bytes a document)
  Document read(std::uint64_t document) const;         // safe from several threads

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace alambic::data
