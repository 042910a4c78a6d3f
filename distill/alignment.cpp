// SPDX-License-Identifier: Apache-2.0
#include "distill/alignment.h"

#include <algorithm>
#include <string>
#include <utility>

namespace alambic::distill {
namespace {

bool is_continuation(char byte) { return (static_cast<unsigned char>(byte) & 0xc0u) == 0x80u; }

// Bytes of the UTF-8 character at `at`; 0: there is none. Unicode 16, table 3-7.
std::size_t character_size(std::string_view text, std::size_t at) {
  const auto byte = [&](std::size_t i) { return at + i < text.size() ? static_cast<unsigned char>(text[at + i]) : 0u; };
  const auto in = [&](std::size_t i, unsigned low, unsigned high) { return byte(i) >= low && byte(i) <= high; };
  const unsigned first = byte(0);
  if (first < 0x80) return 1;
  if (first >= 0xc2 && first <= 0xdf) return in(1, 0x80, 0xbf) ? 2 : 0;
  if (first >= 0xe0 && first <= 0xef) return in(1, first == 0xe0 ? 0xa0 : 0x80, first == 0xed ? 0x9f : 0xbf) && in(2, 0x80, 0xbf) ? 3 : 0;
  if (first >= 0xf0 && first <= 0xf4) return in(1, first == 0xf0 ? 0x90 : 0x80, first == 0xf4 ? 0x8f : 0xbf) && in(2, 0x80, 0xbf) && in(3, 0x80, 0xbf) ? 4 : 0;
  return 0;
}

// Bytes of `text` up to the first that is no UTF-8.
std::size_t valid_size(std::string_view text) {
  std::size_t at = 0;
  while (at < text.size()) {
    const std::size_t size = character_size(text, at);
    if (size == 0) break;
    at += size;
  }
  return at;
}

}  // namespace

std::vector<Span> align(std::span<const std::int64_t> student_ends, std::span<const std::int64_t> teacher_ends) {
  std::vector<Span> spans;
  std::int64_t student_first = 0, teacher_first = 0;
  std::size_t s = 0, t = 0;
  while (s < student_ends.size() && t < teacher_ends.size()) {
    if (student_ends[s] == kNoBoundary || (teacher_ends[t] != kNoBoundary && student_ends[s] < teacher_ends[t])) {
      ++s;
    } else if (teacher_ends[t] == kNoBoundary || teacher_ends[t] < student_ends[s]) {
      ++t;
    } else {
      ++s, ++t;
      spans.push_back({student_first, static_cast<std::int64_t>(s) - student_first, teacher_first, static_cast<std::int64_t>(t) - teacher_first});
      student_first = static_cast<std::int64_t>(s), teacher_first = static_cast<std::int64_t>(t);
    }
  }
  return spans;
}

Translator::Translator(const TokensOf& student, const Spelling& of_student, const TokensOf& teacher, const Spelling* of_teacher)
    : student_(student), of_student_(of_student), teacher_(teacher), of_teacher_(of_teacher) {
  const auto added_before = [](const data::Tokenizer& tokenizer) {
    const std::vector<std::uint32_t> with = tokenizer.encode("a", true), without = tokenizer.encode("a", false);
    const auto found = std::search(with.begin(), with.end(), without.begin(), without.end());
    return std::vector<std::uint32_t>(with.begin(), found == with.end() ? with.begin() : found);
  };
  before_ = added_before(teacher.tokenizer), before_student_ = added_before(student.tokenizer);
}

void Translator::append(std::string_view text, bool first, std::int64_t offset, std::vector<std::int64_t>& ids, std::vector<std::int64_t>& ends) const {
  if (text.empty()) return;
  const data::Encoding tokens = teacher_.tokenizer.encode_with_offsets(text, false);
  ids.insert(ids.end(), tokens.ids.begin(), tokens.ids.end());
  const std::size_t before = ends.size();
  if (of_teacher_ != nullptr) {
    // Where the tokens spell the text itself, their lengths tell every boundary, also those inside of a character.
    std::string spelt;
    for (const std::uint32_t id : tokens.ids) {
      spelt += of_teacher_->bytes_of(id);
      ends.push_back(offset + static_cast<std::int64_t>(spelt.size()));
    }
    if (spelt == text) return;
    const bool may_begin = of_teacher_->prefix() == Spelling::Prefix::kAlways || (first && of_teacher_->prefix() == Spelling::Prefix::kFirst);
    if (may_begin && spelt.size() == text.size() + 1 && spelt.front() == ' ' && std::string_view(spelt).substr(1) == text) {
      for (std::size_t i = before; i < ends.size(); ++i) --ends[i];
      return;
    }
    ends.resize(before);
  }
  // Else what the tokenizer says of each token's place: tokens of one place (a character in bytes) end with the last of them.
  for (std::size_t i = 0; i < tokens.ids.size(); ++i) {
    const bool inside = i + 1 < tokens.ids.size() && tokens.begin_byte[i + 1] < tokens.end_byte[i];
    ends.push_back(inside ? kNoBoundary : offset + tokens.end_byte[i]);
  }
}

Translation Translator::translate(std::span<const std::int64_t> student_ids, bool from_begin) const {
  Translation result;
  result.ids.assign(before_.begin(), before_.end());
  std::vector<std::int64_t> student_ends, teacher_ends(before_.size(), 0);  // in a count of bytes that both sides share
  std::string text;
  std::size_t valid = 0;  // bytes of it that are UTF-8
  std::int64_t offset = 0, at = 0;  // where `text` begins; where the student is
  bool first = true;
  const auto flush = [&] {
    append(text, first, offset, result.ids, teacher_ends);
    first = first && text.empty();
    text.clear(), valid = 0;
    offset = at;
  };
  const Spelling::Prefix prefix = of_student_.prefix();
  bool bare = from_begin && prefix != Spelling::Prefix::kNone;  // a space here is the tokenizer's
  bool readable = true;
  std::size_t index = 0;
  // A character that was begun before: its rest says nothing.
  std::size_t skipped = 0;
  std::int64_t first_whole = 0;  // the first token of which all is read
  for (; index < student_ids.size() && !from_begin; ++index) {
    const auto id = static_cast<std::uint32_t>(student_ids[index]);
    const std::string& bytes = of_student_.bytes_of(id);
    if (of_student_.is_special(id) || bytes.empty() || !is_continuation(bytes.front())) break;
    const auto end = std::find_if_not(bytes.begin(), bytes.end(), is_continuation);
    skipped = static_cast<std::size_t>(end - bytes.begin());
    first_whole = static_cast<std::int64_t>(index) + 1;
    if (end != bytes.end()) break;
    student_ends.push_back(0), skipped = 0;
  }
  for (; index < student_ids.size() && readable; ++index) {
    const auto id = static_cast<std::uint32_t>(student_ids[index]);
    const bool special = of_student_.is_special(id);
    if (special) {
      const std::optional<std::uint32_t> same = special_counterpart(id, student_, teacher_, of_teacher_);
      const bool begins = (!before_student_.empty() && id == before_student_.front()) || (same && !before_.empty() && *same == before_.front());
      if (index == 0 && begins) {  // each side has its own begin, or none
        student_ends.push_back(0);
        bare = from_begin && prefix != Spelling::Prefix::kNone;
        continue;
      }
      if (same) {
        if (valid != text.size()) break;
        flush();
        result.ids.push_back(*same), teacher_ends.push_back(++at), student_ends.push_back(at);
        offset = at, first = false;
        bare = prefix == Spelling::Prefix::kAlways;
        continue;
      }
    }
    std::string_view bytes = of_student_.bytes_of(id);
    bytes.remove_prefix(std::exchange(skipped, 0));
    if (bare && !special && bytes.starts_with(' ')) bytes.remove_prefix(1);
    bare = special && prefix == Spelling::Prefix::kAlways;
    text += bytes;
    at += static_cast<std::int64_t>(bytes.size());
    student_ends.push_back(at);
    // Three bytes may be a character that is not finished; what is longer is none.
    valid += valid_size(std::string_view(text).substr(valid));
    readable = text.size() - valid < 4;
  }
  text.resize(valid);
  flush();
  result.spans = align(student_ends, teacher_ends);
  // Tokens without text before the first byte: a begin on one side is no part of the first span.
  for (Span& span : result.spans) {
    while (span.student_count > 1 && student_ends[static_cast<std::size_t>(span.student_first)] == 0) ++span.student_first, --span.student_count;
    while (span.teacher_count > 1 && teacher_ends[static_cast<std::size_t>(span.teacher_first)] == 0) ++span.teacher_first, --span.teacher_count;
  }
  std::erase_if(result.spans, [&](const Span& span) { return span.student_first < first_whole || student_ends[static_cast<std::size_t>(span.student_first)] == 0 || teacher_ends[static_cast<std::size_t>(span.teacher_first)] == 0; });
  return result;
}

}  // namespace alambic::distill
