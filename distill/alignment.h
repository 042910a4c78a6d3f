// SPDX-License-Identifier: Apache-2.0
#pragma once
// One text as two tokenizers cut it: the spans that begin and end at the same bytes in both. docs/across_tokenizers.md.
#include <cstdint>
#include <span>
#include <vector>

#include "distill/vocabulary.h"

namespace alambic::distill {

inline constexpr std::int64_t kNoBoundary = -1;

/// A stretch of text that is whole tokens of both sides.
struct Span {
  std::int64_t student_first = 0, student_count = 0, teacher_first = 0, teacher_count = 0;
  bool operator==(const Span&) const = default;
};

/// The finest such spans, in order. What is given is the byte at which each token ends, which never falls; kNoBoundary: inside
/// of a character or of what a normaliser made one, where no span can end. A token without text belongs to the span behind it, or
/// to none. Behind the last common end there is no span.
std::vector<Span> align(std::span<const std::int64_t> student_ends, std::span<const std::int64_t> teacher_ends);

/// A document as the teacher reads it.
struct Translation {
  std::vector<std::int64_t> ids;  // what the teacher's tokenizer puts before a text, then the text
  std::vector<Span> spans;        // indices into the student's ids given, and into `ids`
};

/// From the ids of one model to those of another, through the text.
class Translator {
 public:
  /// What is handed in must outlive it.
  Translator(const TokensOf& student, const Spelling& of_student, const TokensOf& teacher, const Spelling* of_teacher);

  /// from_begin: the ids are the begin of a document (a space that the student's tokenizer put there is no text).
  /// A character cut in two at an end is left out; what follows bytes that are no UTF-8 is not read by the teacher.
  Translation translate(std::span<const std::int64_t> student_ids, bool from_begin) const;

 private:
  const TokensOf& student_;
  const Spelling& of_student_;
  const TokensOf& teacher_;
  const Spelling* of_teacher_;
  std::vector<std::uint32_t> before_, before_student_;  // what the tokenizers add in front

  /// The teacher's tokens of a text, and where in it they end.
  void append(std::string_view text, bool first, std::int64_t offset, std::vector<std::int64_t>& ids, std::vector<std::int64_t>& ends) const;
};

}  // namespace alambic::distill
