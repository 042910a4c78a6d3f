// SPDX-License-Identifier: Apache-2.0
#include "distill/vocabulary.h"

#include <algorithm>
#include <unordered_map>

#include "core/error.h"
#include "core/json.h"

namespace alambic::distill {
namespace {

constexpr double kLeastShared = 0.9;

// GPT-2's table: which byte a character of a byte-level vocabulary stands for. Printable Latin-1 is itself, the other bytes in
// their order are U+0100 and on.
std::unordered_map<char32_t, char> byte_of_character() {
  std::unordered_map<char32_t, char> table;
  char32_t next = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const bool itself = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    table.emplace(itself ? static_cast<char32_t>(byte) : next++, static_cast<char>(byte));
  }
  return table;
}

// Names come from the crate, so they are UTF-8.
char32_t take_character(std::string_view text, std::size_t& at) {
  const auto first = static_cast<unsigned char>(text[at]);
  const std::size_t size = first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  char32_t character = size == 1 ? first : first & (0x7fu >> size);
  for (std::size_t i = 1; i < size && at + i < text.size(); ++i) character = character << 6 | (static_cast<unsigned char>(text[at + i]) & 0x3fu);
  at += size;
  return character;
}

std::string from_byte_level(const std::string& name, const std::unordered_map<char32_t, char>& table) {
  std::string bytes;
  for (std::size_t at = 0; at < name.size();) {
    const auto found = table.find(take_character(name, at));
    if (found == table.end()) return name;  // no byte-level name: it stands for itself
    bytes += found->second;
  }
  return bytes;
}

std::string from_sentencepiece(const std::string& name, const std::string& space, bool byte_fallback) {
  if (byte_fallback && name.size() == 6 && name.starts_with("<0x") && name[5] == '>') {
    const auto digit = [](char letter) { return letter >= '0' && letter <= '9' ? letter - '0' : letter >= 'A' && letter <= 'F' ? letter - 'A' + 10 : -1; };
    if (digit(name[3]) >= 0 && digit(name[4]) >= 0) return {static_cast<char>(digit(name[3]) * 16 + digit(name[4]))};
  }
  std::string bytes;
  for (std::size_t at = 0; at < name.size();)
    if (name.compare(at, space.size(), space) == 0) bytes += ' ', at += space.size();
    else bytes += name[at++];
  return bytes;
}

// The members of a JSON object as text, without reading what is in them: the vocabulary alone would be hundreds of MB of values.
// The text is valid JSON, for the crate has read it.
std::unordered_map<std::string, std::string_view> members_of(std::string_view object) {
  std::unordered_map<std::string, std::string_view> members;
  const auto end_of_string = [&](std::size_t at) {  // at: behind the opening quote
    while (at < object.size() && object[at] != '"') at += object[at] == '\\' ? 2 : 1;
    return std::min(at + 1, object.size());
  };
  std::size_t at = object.find('{');
  while (at < object.size()) {
    const std::size_t open = object.find_first_of("\"}", at + 1);
    if (open >= object.size() || object[open] == '}') break;
    const std::size_t close = end_of_string(open + 1), begin = object.find(':', close) + 1;
    int depth = 0;
    for (at = begin; at < object.size(); ++at) {
      const char letter = object[at];
      if (letter == '"') at = end_of_string(at + 1) - 1;
      else if (letter == '{' || letter == '[') ++depth;
      else if (depth == 0 && (letter == ',' || letter == '}')) break;
      else if (letter == '}' || letter == ']') --depth;
    }
    at = std::min(at, object.size());
    members[std::string(object.substr(open + 1, close - open - 2))] = object.substr(begin, at - begin);
    if (at < object.size() && object[at] == '}') break;
  }
  return members;
}

// Parts of a pipeline stage, the members of a Sequence one by one.
std::vector<Json> parts_of(const Json& stage, const char* members) {
  if (!stage.is_object()) return {};
  if (stage.value("type", "") != "Sequence") return {stage};
  std::vector<Json> parts;
  if (stage.contains(members))
    for (const Json& part : stage[members])
      for (Json& inner : parts_of(part, members)) parts.push_back(std::move(inner));
  return parts;
}

Spelling::Prefix prefix_of(const Json& metaspace) {
  const std::string scheme = metaspace.value("prepend_scheme", metaspace.value("add_prefix_space", true) ? "always" : "never");
  return scheme == "always" ? Spelling::Prefix::kAlways : scheme == "first" ? Spelling::Prefix::kFirst : Spelling::Prefix::kNone;
}

std::int64_t real_size(const TokensOf& of) { return std::min<std::int64_t>(of.model.vocabulary_size, of.tokenizer.vocabulary_size()); }

// Pairs found by `teacher_id_of`; the first student id keeps a teacher id that two ask for.
template <class Find>
VocabularyMap pairs(const TokensOf& student, const TokensOf& teacher, const Find& teacher_id_of) {
  VocabularyMap map;
  map.student_size = real_size(student), map.teacher_size = real_size(teacher);
  map.teacher_of.assign(static_cast<std::size_t>(map.student_size), -1);
  std::vector<bool> taken(static_cast<std::size_t>(map.teacher_size));
  for (std::int64_t id = 0; id < map.student_size; ++id) {
    const std::optional<std::uint32_t> found = teacher_id_of(static_cast<std::uint32_t>(id));
    if (!found || *found >= map.teacher_size || taken[*found]) continue;
    taken[*found] = true;
    map.student_ids.push_back(id), map.teacher_ids.push_back(*found);
    map.teacher_of[static_cast<std::size_t>(id)] = *found;
  }
  for (std::int64_t id = 0; id < map.teacher_size; ++id)
    if (!taken[static_cast<std::size_t>(id)]) map.teacher_alone.push_back(id);
  return map;
}

}  // namespace

std::optional<Spelling> Spelling::of(const data::Tokenizer& tokenizer, const std::string& source) {
  Spelling spelling;
  return spelling.read(tokenizer, source) ? std::optional(std::move(spelling)) : std::nullopt;
}

bool Spelling::read(const data::Tokenizer& tokenizer, const std::string& source) {
  const auto json = members_of(tokenizer.json());
  const auto stage = [&](const char* name) { return json.contains(name) ? parse_json(json.at(name), source + ": " + name) : Json(); };
  const auto model = json.contains("model") ? members_of(json.at("model")) : json;
  bool sentencepiece = false, byte_fallback = model.contains("byte_fallback") && model.at("byte_fallback").find("true") != std::string_view::npos;
  std::string space = "\u2581";
  for (const Json& part : parts_of(stage("decoder"), "decoders")) {
    const std::string type = part.value("type", "");
    if (type == "ByteLevel") byte_level_ = true;
    if (type == "ByteFallback") byte_fallback = true;
    if (type == "Metaspace") sentencepiece = true, space = part.value("replacement", space);
    if (type == "Replace" && part.value("content", "") == " " && part.contains("pattern") && part["pattern"].contains("String")) sentencepiece = true, space = part["pattern"]["String"].get<std::string>();
  }
  if (!byte_level_ && !sentencepiece) return false;
  for (const Json& part : parts_of(stage("normalizer"), "normalizers"))
    if (part.value("type", "") == "Prepend" && part.value("prepend", "") == space) prefix_ = Prefix::kAlways;
  for (const Json& part : parts_of(stage("pre_tokenizer"), "pretokenizers")) {
    if (part.value("type", "") == "Metaspace") prefix_ = prefix_of(part);
    if (part.value("type", "") == "ByteLevel" && part.value("add_prefix_space", true)) prefix_ = Prefix::kAlways;
  }

  const std::unordered_map<char32_t, char> table = byte_of_character();
  bytes_.resize(tokenizer.vocabulary_size());
  special_.resize(tokenizer.vocabulary_size());
  std::vector<bool> added(tokenizer.vocabulary_size());
  if (const Json list = stage("added_tokens"); list.is_array())
    for (const Json& token : list)
      if (const auto id = token.at("id").get<std::uint64_t>(); id < added.size()) added[id] = true, special_[id] = token.value("special", false);
  for (std::uint32_t id = 0; id < bytes_.size(); ++id) {
    const std::optional<std::string> name = tokenizer.token_of(id);
    if (!name) continue;
    bytes_[id] = added[id] ? *name : byte_level_ ? from_byte_level(*name, table) : from_sentencepiece(*name, space, byte_fallback);
  }
  return true;
}

VocabularyMap map_by_name(const TokensOf& student, const TokensOf& teacher) {
  return pairs(student, teacher, [&](std::uint32_t id) -> std::optional<std::uint32_t> {
    const std::optional<std::string> name = student.tokenizer.token_of(id);
    return name ? teacher.tokenizer.id_of(*name) : std::nullopt;
  });
}

VocabularyMap map_exactly(const TokensOf& student, const TokensOf& teacher) {
  VocabularyMap map = map_by_name(student, teacher);
  if (const auto smaller = std::min(map.student_size, map.teacher_size); static_cast<double>(map.student_ids.size()) < kLeastShared * static_cast<double>(smaller))
    fail(ErrorKind::kData, "across_tokenizers: exact: only ", map.student_ids.size(), " of ", smaller, " tokens are in both ", student.source, " and ", teacher.source,
         Remedy{"use across_tokenizers: gold or uld, which need no common tokens"});
  return map;
}

VocabularyMap map_by_spelling(const TokensOf& student, const Spelling& of_student, const TokensOf& teacher, const Spelling& of_teacher) {
  // Where two tokens spell the same ("A" and "<0x41>"), the one that is no byte of last resort: it has the shorter name.
  std::unordered_map<std::string, std::uint32_t> by_bytes;
  for (std::uint32_t id = 0; id < real_size(teacher); ++id) {
    const std::string& bytes = of_teacher.bytes_of(id);
    if (bytes.empty() || of_teacher.is_special(id)) continue;
    const auto [place, is_new] = by_bytes.emplace(bytes, id);
    if (!is_new && teacher.tokenizer.token_of(id)->size() < teacher.tokenizer.token_of(place->second)->size()) place->second = id;
  }
  std::unordered_map<std::string, std::uint32_t> own;  // the same choice among the student's
  for (std::uint32_t id = 0; id < real_size(student); ++id) {
    const std::string& bytes = of_student.bytes_of(id);
    if (bytes.empty() || of_student.is_special(id)) continue;
    const auto [place, is_new] = own.emplace(bytes, id);
    if (!is_new && student.tokenizer.token_of(id)->size() < student.tokenizer.token_of(place->second)->size()) place->second = id;
  }
  return pairs(student, teacher, [&](std::uint32_t id) -> std::optional<std::uint32_t> {
    if (of_student.is_special(id)) return special_counterpart(id, student, teacher, &of_teacher);
    const std::string& bytes = of_student.bytes_of(id);
    if (bytes.empty() || own.at(bytes) != id) return std::nullopt;
    const auto found = by_bytes.find(bytes);
    return found == by_bytes.end() ? std::nullopt : std::optional(found->second);
  });
}

std::optional<std::uint32_t> special_counterpart(std::uint32_t student_id, const TokensOf& student, const TokensOf& teacher, const Spelling* of_teacher) {
  const auto exists = [&](std::int64_t id) { return id >= 0 && id < real_size(teacher) && teacher.tokenizer.token_of(static_cast<std::uint32_t>(id)); };
  if (const std::optional<std::string> name = student.tokenizer.token_of(student_id))
    if (const std::optional<std::uint32_t> id = teacher.tokenizer.id_of(*name); id && exists(*id) && (of_teacher == nullptr || of_teacher->is_special(*id))) return id;
  const std::vector<std::int64_t>& ends = student.model.eos_ids;
  if (std::find(ends.begin(), ends.end(), student_id) != ends.end() && !teacher.model.eos_ids.empty() && exists(teacher.model.eos_ids.front())) return static_cast<std::uint32_t>(teacher.model.eos_ids.front());
  if (student.model.bos_id == student_id && exists(teacher.model.bos_id)) return static_cast<std::uint32_t>(teacher.model.bos_id);
  return std::nullopt;
}

}  // namespace alambic::distill
