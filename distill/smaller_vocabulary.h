// SPDX-License-Identifier: Apache-2.0
#pragma once
// A tokenizer with fewer tokens that makes of the texts it is for the very pieces it made of them before.
//
// Kept are the tokens that the stores hold, all added tokens, those that config.json and generation_config.json name, what can
// spell any text (the 256 letters of a byte-level BPE, or <0x00> .. <0xFF>; where there is neither, every token of one character),
// and the tokens that merges pass through on the way to a kept one. A BPE then takes, on these texts, every merge it took before and
// in the same order, as no merge came in between. A Unigram model's best path is still the best, as others only went away.
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/config.h"
#include "core/json.h"
#include "data/token_store.h"
#include "data/tokenizer.h"

namespace alambic::distill {

struct VocabularyConfig {
  std::vector<std::string> stores;
  std::int64_t min_count = 1;
  std::int64_t pad_to_multiple = 1;
  void visit(FieldVisitor& fields);
};

class SmallerVocabulary {
 public:
  /// folder: of the model, whose embedding has `rows` rows. Error(kUsage): a model other than BPE and Unigram, or a BPE with
  /// prefixes or suffixes of words. Error(kData): a store made with another tokenizer.
  SmallerVocabulary(const std::filesystem::path& folder, std::int64_t rows, const std::vector<data::TokenStore>& stores, const VocabularyConfig& config);

  /// Old ids in the order of the new ones; first all of tokens, then those that config.json names but the tokenizer has not.
  const std::vector<std::int64_t>& old_ids() const { return old_ids_; }
  std::int64_t rows() const { return rows_; }  // of the new embedding, padding included
  const data::Tokenizer& tokenizer() const { return *tokenizer_; }
  /// -1 where the old id has no new one.
  std::int64_t new_id(std::int64_t old_id) const;

  /// A config.json or generation_config.json with the new ids; in a config.json, which has a vocab_size, that too.
  Json with_new_ids(Json config) const;
  /// Into a folder with a copy of the model's files: the new tokenizer.json, the new ids in tokenizer_config.json, added_tokens.json
  /// and generation_config.json, and vocabulary_map.json. Files of other tokenizer formats, which would still say the old ids, go.
  void write(const std::filesystem::path& folder) const;

  /// The store of a text with the new ids, for measuring: one for one, but where a token is gone, the pieces that its text becomes
  /// (BPE), which need not be those that the whole text would. False where one cannot be spelt so; nothing is left then.
  bool write_store(const data::TokenStore& from, const std::filesystem::path& to) const;

 private:
  std::filesystem::path folder_;
  std::vector<std::int64_t> old_ids_;
  std::map<std::int64_t, std::int64_t> new_ids_;
  std::int64_t old_rows_ = 0, rows_ = 0;
  std::unique_ptr<data::Tokenizer> old_tokenizer_, tokenizer_;
};

}  // namespace alambic::distill
