// SPDX-License-Identifier: Apache-2.0
#pragma once
// Which tokens of two vocabularies are the same, and what text a token spells. docs/across_tokenizers.md has the rules.
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "data/tokenizer.h"
#include "models/config.h"

namespace alambic::distill {

/// What each token of a tokenizer spells, byte for byte, also where a token is a part of a character.
class Spelling {
 public:
  /// nullopt where tokens do not spell the text (WordPiece and such): neither a byte-level nor a SentencePiece vocabulary.
  static std::optional<Spelling> of(const data::Tokenizer& tokenizer, const std::string& source);

  /// Empty for an id without a token. What is added, special or not, spells its own name.
  const std::string& bytes_of(std::uint32_t id) const { return id < bytes_.size() ? bytes_[id] : nothing_; }
  bool is_special(std::uint32_t id) const { return id < special_.size() && special_[id]; }
  /// The tokenizer puts a space before text that begins without one; what it spells then has one byte more than the text.
  enum class Prefix { kNone, kFirst, kAlways };  // none, before the text, before the text and behind each special token
  Prefix prefix() const { return prefix_; }
  bool is_byte_level() const { return byte_level_; }

 private:
  std::vector<std::string> bytes_;
  std::vector<bool> special_;
  std::string nothing_;
  Prefix prefix_ = Prefix::kNone;
  bool byte_level_ = false;

  bool read(const data::Tokenizer& tokenizer, const std::string& source);
};

/// Ids that mean the same token. Sizes are of ids that are a token and have a logit: what is behind is padding.
struct VocabularyMap {
  std::vector<std::int64_t> student_ids, teacher_ids;  // pairs, by student id; no id twice
  std::vector<std::int64_t> teacher_of;                // by student id, student_size of them; -1: the teacher has no such token
  std::vector<std::int64_t> teacher_alone;             // the teacher's ids that are in no pair
  std::int64_t student_size = 0, teacher_size = 0;
};

/// A tokenizer and the sizes of the model that it belongs to.
struct TokensOf {
  const data::Tokenizer& tokenizer;
  const models::ModelConfig& model;
  std::string source;  // the folder, for messages
};

/// Pairs with the same name (the string in tokenizer.json).
VocabularyMap map_by_name(const TokensOf& student, const TokensOf& teacher);

/// map_by_name for a teacher that can read the student's ids, mapped. Error(kData) where less than nine tenths of the smaller
/// vocabulary is in the other: then texts are cut in other ways, and rows of the two do not speak of the same place.
VocabularyMap map_exactly(const TokensOf& student, const TokensOf& teacher);

/// Pairs that spell the same bytes (a byte-level "\u0120the" and a SentencePiece "\u2581the" are " the"); special tokens by name or by
/// their role as the models' configs tell it (begin, end).
VocabularyMap map_by_spelling(const TokensOf& student, const Spelling& of_student, const TokensOf& teacher, const Spelling& of_teacher);

/// The teacher's id for a special token of the student: the one of the same name, else of the same role; nullopt: none.
std::optional<std::uint32_t> special_counterpart(std::uint32_t student_id, const TokensOf& student, const TokensOf& teacher, const Spelling* of_teacher);

}  // namespace alambic::distill
