// SPDX-License-Identifier: Apache-2.0
// Follows transformers' integrations/gguf/gguf_tokenizer_mapping.py, which is what the ids are compared with. Where the two
// part, on purpose: an unknown pre-tokenizer is an error there a silent GPT-2 split; tokenizer.ggml.add_space_prefix and
// precompiled_charsmap are obeyed as llama.cpp and sentencepiece obey them; tokens that the file does not hold (GPT-2's
// <|endoftext|>, Llama's <s>) are never added, for their ids would lie outside the model's embedding.
#include "checkpoints/gguf_tokenizer.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/error.h"
#include "core/log.h"

namespace alambic::checkpoints {
namespace {

constexpr std::size_t kMostTokens = 1u << 24, kMostTokenBytes = 1u << 12;
constexpr std::size_t kMostImpliedMergeBytes = 1u << 27;  // the half a million merges of Gemma take about 50 MB
const std::string kBlank = "\u2581";  // SentencePiece's visible space

enum TokenType { kUnknown = 2, kControl = 3, kUserDefined = 4, kByte = 6 };

// ---- what the file says ----

struct Vocabulary {
  std::string source, model, pre, architecture;
  std::vector<std::string> tokens;
  std::vector<std::int64_t> types;   // empty where the file has none
  std::vector<double> scores;        // the same
  std::vector<std::string> merges;   // the same
  std::optional<std::int64_t> bos, eos, unknown, pad;
  bool add_bos = false, add_eos = false, add_space_prefix = true;
  std::string charsmap;

  std::int64_t type(std::size_t id) const { return types.empty() ? 1 : types[id]; }
};

const Json* find(const Json& metadata, const std::string& key) {
  const auto found = metadata.find(key);
  return found == metadata.end() ? nullptr : &*found;
}

template <class T>
std::vector<T> list_of(const Json& metadata, const std::string& key, std::string_view source) {
  const Json* array = find(metadata, key);
  if (!array) return {};
  if (!array->is_array()) fail(ErrorKind::kData, source, ": ", key, " is not an array but ", array->type_name());
  if (array->size() > kMostTokens) fail(ErrorKind::kData, source, ": ", key, " has ", array->size(), " entries; the most is ", kMostTokens);
  std::vector<T> out;
  out.reserve(array->size());
  for (const Json& entry : *array) {
    const bool fits = std::is_same_v<T, std::string> ? entry.is_string() : std::is_same_v<T, double> ? entry.is_number() : entry.is_number_integer();
    if (!fits) fail(ErrorKind::kData, source, ": ", key, "[", out.size(), "] is ", entry.type_name());
    out.push_back(entry.get<T>());
  }
  return out;
}

Vocabulary read_vocabulary(const Json& metadata, std::string_view source) {
  if (!metadata.is_object()) fail(ErrorKind::kData, source, ": no metadata");
  const auto text = [&](const std::string& key) { return value_or<std::string>(metadata, key, "", source); };
  Vocabulary v;
  v.source = source;
  v.model = text("tokenizer.ggml.model");
  v.pre = text("tokenizer.ggml.pre");
  v.architecture = text("general.architecture");
  if (v.model.empty())
    fail(ErrorKind::kData, source, ": the file holds no tokenizer (tokenizer.ggml.model is missing)",
         Remedy{"take the tokenizer from the model's Hugging Face folder"});
  v.tokens = list_of<std::string>(metadata, "tokenizer.ggml.tokens", source);
  if (v.tokens.empty()) fail(ErrorKind::kData, source, ": tokenizer.ggml.tokens is missing or empty");
  for (std::size_t id = 0; id < v.tokens.size(); ++id)
    if (v.tokens[id].size() > kMostTokenBytes)
      fail(ErrorKind::kData, source, ": tokenizer.ggml.tokens[", id, "] has ", v.tokens[id].size(), " bytes; the most is ", kMostTokenBytes);
  v.types = list_of<std::int64_t>(metadata, "tokenizer.ggml.token_type", source);
  v.scores = list_of<double>(metadata, "tokenizer.ggml.scores", source);
  v.merges = list_of<std::string>(metadata, "tokenizer.ggml.merges", source);
  const auto same_length = [&](const char* key, std::size_t length) {
    if (length != 0 && length != v.tokens.size())
      fail(ErrorKind::kData, source, ": ", key, " has ", length, " entries, tokenizer.ggml.tokens has ", v.tokens.size());
  };
  same_length("tokenizer.ggml.token_type", v.types.size());
  same_length("tokenizer.ggml.scores", v.scores.size());
  for (std::size_t i = 0; i < v.scores.size(); ++i)  // merges are sorted by them, and NaN has no place in an order
    if (!std::isfinite(v.scores[i])) fail(ErrorKind::kData, source, ": tokenizer.ggml.scores[", i, "] is not a finite number");

  const auto id = [&](const std::string& key) -> std::optional<std::int64_t> {
    const Json* value = find(metadata, key);
    if (!value) return std::nullopt;
    const auto number = require<std::int64_t>(metadata, key, source);
    if (number < 0 || number >= static_cast<std::int64_t>(v.tokens.size()))
      fail(ErrorKind::kData, source, ": ", key, " is ", number, ", and there are ", v.tokens.size(), " tokens");
    return number;
  };
  v.bos = id("tokenizer.ggml.bos_token_id");
  v.eos = id("tokenizer.ggml.eos_token_id");
  v.unknown = id("tokenizer.ggml.unknown_token_id");
  v.pad = id("tokenizer.ggml.padding_token_id");
  // Files without the flag: llama.cpp puts BOS before a SentencePiece vocabulary and before no other.
  v.add_bos = value_or<bool>(metadata, "tokenizer.ggml.add_bos_token", v.model == "llama", source) && v.bos;
  v.add_eos = value_or<bool>(metadata, "tokenizer.ggml.add_eos_token", false, source) && v.eos;
  v.add_space_prefix = value_or<bool>(metadata, "tokenizer.ggml.add_space_prefix", true, source);
  if (const Json* map = find(metadata, "tokenizer.ggml.precompiled_charsmap")) {
    if (!map->is_array()) fail(ErrorKind::kData, source, ": tokenizer.ggml.precompiled_charsmap is not an array of bytes");
    for (const Json& byte : *map) {
      if (!byte.is_number_integer() || byte.get<std::int64_t>() < -128 || byte.get<std::int64_t>() > 255)
        fail(ErrorKind::kData, source, ": tokenizer.ggml.precompiled_charsmap is not an array of bytes");
      v.charsmap.push_back(static_cast<char>(byte.get<std::int64_t>()));
    }
  }
  return v;
}

// ---- text ----

/// Where each character begins, and the end.
std::vector<std::size_t> character_starts(const std::string& text) {
  std::vector<std::size_t> starts;
  for (std::size_t i = 0; i < text.size(); ++i)
    if ((static_cast<unsigned char>(text[i]) & 0xC0) != 0x80) starts.push_back(i);
  starts.push_back(text.size());
  return starts;
}

std::string utf8(unsigned code) {
  if (code < 0x80) return {static_cast<char>(code)};
  return {static_cast<char>(0xC0 | (code >> 6)), static_cast<char>(0x80 | (code & 0x3F))};  // below 0x800 is all that occurs here
}

/// GPT-2's spelling of bytes: printable ones as themselves, the others as letters from U+0100 on (bytes_to_unicode).
const std::array<std::string, 256>& byte_letters() {
  static const auto letters = [] {
    std::array<std::string, 256> out;
    unsigned next = 0x100;
    for (unsigned byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
      out[byte] = utf8(printable ? byte : next++);
    }
    return out;
  }();
  return letters;
}

bool is_spelled_in_bytes(const std::string& token) {
  static const auto alphabet = [] {
    std::unordered_map<std::string, bool> out;
    for (const std::string& letter : byte_letters()) out.emplace(letter, true);
    return out;
  }();
  const auto starts = character_starts(token);
  for (std::size_t i = 0; i + 1 < starts.size(); ++i)
    if (!alphabet.contains(token.substr(starts[i], starts[i + 1] - starts[i]))) return false;
  return true;
}

std::string base64(std::string_view bytes) {
  static constexpr std::string_view kLetters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    const auto at = [&](std::size_t j) { return i + j < bytes.size() ? static_cast<unsigned char>(bytes[i + j]) : 0u; };
    const unsigned word = at(0) << 16 | at(1) << 8 | at(2);
    for (unsigned j = 0; j < 4; ++j) out.push_back(i + j <= bytes.size() ? kLetters[word >> (18 - 6 * j) & 63] : '=');
  }
  return out;
}

// ---- the parts of tokenizer.json ----

using Ids = std::unordered_map<std::string, std::size_t>;

Ids ids_of(const std::vector<std::string>& tokens) {
  Ids ids;
  for (std::size_t id = 0; id < tokens.size(); ++id) ids[tokens[id]] = id;  // of equal tokens the last counts
  return ids;
}

/// Written in order of ids. Json's objects look through all their keys at each insertion; so this appends.
Json vocabulary_json(const std::vector<std::string>& tokens, const Ids& ids) {
  Json out = Json::object();
  auto& entries = out.get_ref<Json::object_t&>();
  entries.reserve(tokens.size());
  for (std::size_t id = 0; id < tokens.size(); ++id)
    if (ids.at(tokens[id]) == id) entries.emplace_back(tokens[id], id);
  return out;
}

Json bpe_json(Json vocabulary, Json merges) {
  return {{"type", "BPE"},          {"dropout", nullptr},   {"unk_token", nullptr},    {"continuing_subword_prefix", nullptr},
          {"end_of_word_suffix", nullptr}, {"fuse_unk", false},    {"byte_fallback", false},  {"ignore_merges", false},
          {"vocab", std::move(vocabulary)}, {"merges", std::move(merges)}};
}

/// The file's merges: "left right", both known, as is what they make (the crate would panic or refuse with no place named).
Json given_merges(const Vocabulary& v, const Ids& ids) {
  Json out = Json::array();
  for (std::size_t i = 0; i < v.merges.size(); ++i) {
    const std::string& merge = v.merges[i];
    const std::size_t blank = merge.find(' ');
    const auto complain = [&](const char* what) {
      fail(ErrorKind::kData, v.source, ": tokenizer.ggml.merges[", i, "] \"", merge, "\": ", what);
    };
    if (blank == std::string::npos || merge.find(' ', blank + 1) != std::string::npos) complain("not two tokens with one space between them");
    const std::string left = merge.substr(0, blank), right = merge.substr(blank + 1);
    if (!ids.contains(left) || !ids.contains(right) || !ids.contains(left + right)) complain("a token of it is not in the vocabulary");
    out.push_back(Json::array({left, right}));
  }
  return out;
}

/// Merges that a scored vocabulary implies (transformers' generate_merges): every cut of every token into two tokens, best
/// score first, then the longer left part, then the longer right one; ties in the order of the vocabulary and of ids.
Json implied_merges(const std::vector<std::string>& tokens, const Ids& ids, const std::vector<double>& scores, std::string_view source) {
  struct Merge {
    double score;
    std::size_t left_length, right_length;  // in characters
    std::string left, right;
  };
  std::vector<Merge> merges;
  std::size_t num_bytes = 0;
  for (std::size_t id = 0; id < tokens.size(); ++id) {
    const std::string& token = tokens[id];
    if (ids.at(token) != id) continue;
    const auto starts = character_starts(token);
    const std::size_t length = starts.size() - 1, first = merges.size();
    for (std::size_t cut = 1; cut < length; ++cut) {
      std::string left = token.substr(0, starts[cut]), right = token.substr(starts[cut]);
      if (!ids.contains(left) || !ids.contains(right)) continue;
      num_bytes += sizeof(Merge) + token.size();  // grows with the square of a token's length
      if (num_bytes > kMostImpliedMergeBytes)
        fail(ErrorKind::kData, source, ": the tokens can be put together in so many ways that their merges would take more than ", kMostImpliedMergeBytes >> 20, " MiB");
      merges.push_back({scores[id], cut, length - cut, std::move(left), std::move(right)});
    }
    std::sort(merges.begin() + static_cast<std::ptrdiff_t>(first), merges.end(), [&](const Merge& a, const Merge& b) {
      return std::pair(ids.at(a.left), ids.at(a.right)) < std::pair(ids.at(b.left), ids.at(b.right));
    });
  }
  std::stable_sort(merges.begin(), merges.end(), [](const Merge& a, const Merge& b) {
    return std::tuple(a.score, a.left_length, a.right_length) > std::tuple(b.score, b.left_length, b.right_length);
  });
  Json out = Json::array();
  for (Merge& merge : merges) out.push_back(Json::array({std::move(merge.left), std::move(merge.right)}));
  return out;
}

Json metaspace(const char* prepend_scheme, bool split) {
  return {{"type", "Metaspace"}, {"replacement", kBlank}, {"prepend_scheme", prepend_scheme}, {"split", split}};
}

Json replace(const std::string& from, const std::string& to) {
  return {{"type", "Replace"}, {"pattern", {{"String", from}}}, {"content", to}};
}

Json byte_level(bool use_regex) {
  return {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", use_regex}};
}

Json split_by(const char* pattern) {
  return {{"type", "Sequence"},
          {"pretokenizers",
           {{{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}, {"invert", false}}, byte_level(false)}}};
}

/// [BOS] text [EOS].
Json post_processor(const Vocabulary& v) {
  Json single = Json::array(), pair = Json::array(), special = Json::object();
  const auto token = [&](Json& list, std::int64_t id, int type) {
    const std::string& text = v.tokens[static_cast<std::size_t>(id)];
    list.push_back({{"SpecialToken", {{"id", text}, {"type_id", type}}}});
    special[text] = {{"id", text}, {"ids", {id}}, {"tokens", {text}}};
  };
  const auto text = [](Json& list, const char* which, int type) { list.push_back({{"Sequence", {{"id", which}, {"type_id", type}}}}); };
  if (v.add_bos) token(single, *v.bos, 0);
  text(single, "A", 0);
  if (v.add_eos) token(single, *v.eos, 0);
  pair = single;
  if (v.add_bos) token(pair, *v.bos, 1);
  text(pair, "B", 1);
  if (v.add_eos) token(pair, *v.eos, 1);
  return {{"type", "TemplateProcessing"}, {"single", single}, {"pair", pair}, {"special_tokens", special}};
}

/// Control tokens, and those named as BOS and so on, are found whole in a text and skipped by decode; user-defined ones are
/// found whole, runs of spaces (Gemma) once they are blanks, as longest first is another cut than merges make. In a byte-level vocabulary a control token with a letter outside the byte alphabet is one that llama.cpp's
/// converter marked by mistake (transformers' add_gguf_special_tokens).
Json added_tokens(const Vocabulary& v, const std::vector<std::string>& spelled) {
  Json out = Json::array();
  const bool in_bytes = v.model == "gpt2";
  for (std::size_t id = 0; id < v.tokens.size(); ++id) {
    const auto number = static_cast<std::int64_t>(id);
    const bool named = v.bos == number || v.eos == number || v.unknown == number || v.pad == number;
    const bool control = v.type(id) == kControl && (!in_bytes || is_spelled_in_bytes(v.tokens[id]));
    const bool user = v.type(id) == kUserDefined && (!in_bytes || spelled[id] == v.tokens[id]);
    if (!named && !control && !user) continue;
    const bool blanks = user && spelled[id] != v.tokens[id];
    out.push_back({{"id", id}, {"content", blanks ? spelled[id] : v.tokens[id]}, {"single_word", false}, {"lstrip", false}, {"rstrip", false},
                   {"normalized", blanks}, {"special", named || control}});
  }
  return out;
}

Json whole(const Vocabulary& v, const std::vector<std::string>& spelled, Json normalizer, Json pre_tokenizer, Json decoder, Json model) {
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", added_tokens(v, spelled)},
          {"normalizer", std::move(normalizer)},
          {"pre_tokenizer", std::move(pre_tokenizer)},
          {"post_processor", post_processor(v)},
          {"decoder", std::move(decoder)},
          {"model", std::move(model)}};
}

// ---- byte-level BPE ----

constexpr const char* kLlama3 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen2 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen35 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kTekken =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+)"
    R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*)"
    R"(|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kGpt4o =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
    R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
    R"(|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

struct PreTokenizer {
  const char* name;
  const char* pattern;  // nullptr: GPT-2's own, which ByteLevel holds
};

// transformers' GGUF_PRE_TOKENIZER_SPLITS, and the names for which it takes GPT-2's split. smollm is one of those: the
// model's own tokenizer.json also cuts digits off, which only shows where white space stands before a digit.
constexpr PreTokenizer kPreTokenizers[] = {
    {"default", nullptr},     {"gpt-2", nullptr},        {"gpt2", nullptr},           {"smollm", nullptr},     {"llama-bpe", kLlama3},
    {"llama3", kLlama3},      {"llama-v3", kLlama3},     {"falcon3", kLlama3},        {"falcon-h1", kLlama3},  {"pixtral", kLlama3},
    {"midm-2.0", kLlama3},    {"lfm2", kLlama3},         {"jina-v5-nano", kLlama3},   {"dbrx", kLlama3},       {"smaug-bpe", kLlama3},
    {"tekken", kTekken},      {"qwen2", kQwen2},         {"deepseek-r1-qwen", kQwen2}, {"kormo", kQwen2},      {"f2llmv2", kQwen2},
    {"megrez", kQwen2},       {"qwen35", kQwen35},       {"gpt-4o", kGpt4o},          {"llama4", kGpt4o},      {"kanana2", kGpt4o},
    {"talkie", kGpt4o},       {"minimax-m2", kGpt4o},
};

Json pre_tokenizer_of(const Vocabulary& v) {
  if (v.pre.empty()) {
    log_warning(v.source, ": names no pre-tokenizer (tokenizer.ggml.pre); text is split as for GPT-2, which may not be this model's way");
    return byte_level(true);
  }
  std::string known;
  for (const PreTokenizer& one : kPreTokenizers) {
    if (v.pre == one.name) return one.pattern ? split_by(one.pattern) : byte_level(true);
    known += (known.empty() ? "" : ", ") + std::string(one.name);
  }
  fail(ErrorKind::kData, v.source, ": tokenizer.ggml.pre is \"", v.pre, "\"; known are ", known,
       Remedy{"take tokenizer.json from the model's Hugging Face folder"});
}

Json byte_level_bpe(const Vocabulary& v) {
  std::vector<std::string> spelled = v.tokens;
  for (std::string& token : spelled) {
    if (is_spelled_in_bytes(token)) continue;
    std::string letters;
    for (const char byte : token) letters += byte_letters()[static_cast<unsigned char>(byte)];
    token = std::move(letters);
  }
  // A special token is looked up by its own text, so it must be in the vocabulary under that text.
  for (std::size_t id = 0; id < spelled.size(); ++id) {
    const auto number = static_cast<std::int64_t>(id);
    if (v.bos == number || v.eos == number || v.unknown == number || v.pad == number) spelled[id] = v.tokens[id];
  }
  const Ids ids = ids_of(spelled);
  if (v.merges.empty()) fail(ErrorKind::kData, v.source, ": tokenizer.ggml.merges is missing; a \"gpt2\" tokenizer has no ids without it");
  Json decoder = {{"type", "ByteLevel"}, {"add_prefix_space", true}, {"trim_offsets", true}, {"use_regex", true}};
  return whole(v, spelled, nullptr, pre_tokenizer_of(v), std::move(decoder), bpe_json(vocabulary_json(spelled, ids), given_merges(v, ids)));
}

// Names under which llama.cpp b10605 splits text so, the first choice first.
constexpr struct {
  const char* name;
  const char* pattern;
  bool ignore_merges;
} kExportedPreTokenizers[] = {
    {"llama-bpe", kLlama3, true}, {"smaug-bpe", kLlama3, false}, {"qwen2", kQwen2, false}, {"qwen35", kQwen35, false},
    {"tekken", kTekken, true},    {"gpt-4o", kGpt4o, false},     {"gpt-2", nullptr, false},
};

bool same_steps(const Json& given, const Json& wanted) {
  // A pipeline of one step is that step; what is absent has its default.
  const auto listed = [](const Json& pipeline) {
    Json steps = pipeline.is_object() && pipeline.value("type", "") == "Sequence" ? pipeline.value("pretokenizers", Json::array()) : Json::array({pipeline});
    for (Json& step : steps)
      if (step.is_object() && step.value("type", "") == "ByteLevel") {
        step = {{"type", "ByteLevel"}, {"add_prefix_space", step.value("add_prefix_space", true)}, {"use_regex", step.value("use_regex", true)}};
      } else if (step.is_object() && step.value("type", "") == "Split" && step.value("behavior", "") == "Removed" && step.value("invert", false)) {
        step["behavior"] = "Isolated", step["invert"] = false;  // keeping the matches alone: these patterns match everything
      }
    return steps;
  };
  const Json left = listed(given), right = listed(wanted);
  if (left.size() != right.size()) return false;
  for (std::size_t i = 0; i < left.size(); ++i)
    for (const auto& [key, value] : right[i].items())
      if (!left[i].is_object() || !left[i].contains(key) || left[i][key] != value) return false;
  return true;
}

// ---- SentencePiece ----

Json sentencepiece_bpe(const Vocabulary& v) {
  const bool gemma = v.architecture == "gemma" || v.architecture == "gemma2" || v.architecture == "gemma3";
  const bool phi3 = v.architecture == "phi3";
  std::vector<std::string> spelled = v.tokens;
  std::vector<double> scores = v.scores;
  if (gemma) {
    // Gemma's tokens of several spaces are stored as spaces, and its scores do not follow the order of its merges: the
    // order of the tokens does.
    for (std::string& token : spelled) {
      if (token.empty() || token.find_first_not_of(' ') != std::string::npos) continue;
      std::string blanks;
      for (std::size_t i = 0; i < token.size(); ++i) blanks += kBlank;
      token = std::move(blanks);
    }
    scores.resize(spelled.size());
    for (std::size_t id = 0; id < scores.size(); ++id) scores[id] = -static_cast<double>(id);
  }
  const Ids ids = ids_of(spelled);
  if (v.merges.empty() && scores.empty())
    fail(ErrorKind::kData, v.source, ": neither tokenizer.ggml.merges nor tokenizer.ggml.scores is there; a \"llama\" tokenizer needs one");
  Json model = bpe_json(vocabulary_json(spelled, ids), v.merges.empty() ? implied_merges(spelled, ids, scores, v.source) : given_merges(v, ids));
  model["fuse_unk"] = true;
  model["byte_fallback"] = true;
  Json normalizer, pre_tokenizer;
  const bool prefix = v.add_space_prefix && !gemma;
  if (gemma) {
    if (v.unknown) model["unk_token"] = v.tokens[static_cast<std::size_t>(*v.unknown)];
    normalizer = replace(" ", kBlank);
    pre_tokenizer = {{"type", "Split"}, {"pattern", {{"String", " "}}}, {"behavior", "MergedWithPrevious"}, {"invert", false}};
  } else if (phi3) {
    Json steps = Json::array();
    if (prefix) steps.push_back({{"type", "Prepend"}, {"prepend", kBlank}});
    steps.push_back(replace(" ", kBlank));
    normalizer = {{"type", "Sequence"}, {"normalizers", std::move(steps)}};
  } else {
    pre_tokenizer = metaspace(prefix ? "first" : "never", false);
  }
  Json steps = Json::array({replace(kBlank, " "), {{"type", "ByteFallback"}}, {{"type", "Fuse"}}});
  if (prefix) steps.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
  Json decoder = {{"type", "Sequence"}, {"decoders", std::move(steps)}};
  return whole(v, spelled, std::move(normalizer), std::move(pre_tokenizer), std::move(decoder), std::move(model));
}

Json sentencepiece_unigram(const Vocabulary& v) {
  if (v.scores.empty()) fail(ErrorKind::kData, v.source, ": tokenizer.ggml.scores is missing; a \"t5\" tokenizer has no ids without it");
  if (!v.unknown) fail(ErrorKind::kData, v.source, ": tokenizer.ggml.unknown_token_id is missing; a \"t5\" tokenizer needs it");
  Json vocabulary = Json::array();
  bool byte_fallback = false;
  for (std::size_t id = 0; id < v.tokens.size(); ++id) {
    vocabulary.push_back(Json::array({v.tokens[id], v.scores[id]}));
    byte_fallback = byte_fallback || v.type(id) == kByte;
  }
  Json model = {{"type", "Unigram"}, {"unk_id", *v.unknown}, {"vocab", std::move(vocabulary)}, {"byte_fallback", byte_fallback}};
  Json normalizer;
  if (!v.charsmap.empty()) normalizer = {{"type", "Precompiled"}, {"precompiled_charsmap", base64(v.charsmap)}};
  const char* scheme = v.add_space_prefix ? "always" : "never";
  Json pre_tokenizer = {{"type", "Sequence"}, {"pretokenizers", {{{"type", "WhitespaceSplit"}}, metaspace("always", true)}}};
  return whole(v, v.tokens, std::move(normalizer), std::move(pre_tokenizer), metaspace(scheme, true), std::move(model));
}

}  // namespace

PreTokenizerName gguf_pre_tokenizer(const Json& pre_tokenizer, bool ignore_merges, std::string_view source) {
  std::optional<PreTokenizerName> found;
  for (const auto& known : kExportedPreTokenizers) {
    if (!same_steps(pre_tokenizer, known.pattern ? split_by(known.pattern) : byte_level(true))) continue;
    if (!found || known.ignore_merges == ignore_merges) found = PreTokenizerName{known.name, known.ignore_merges};
  }
  const Json digits = {{"type", "Digits"}, {"individual_digits", true}};
  if (!found && same_steps(pre_tokenizer, {{"type", "Sequence"}, {"pretokenizers", Json::array({digits, byte_level(true)})}})) found = PreTokenizerName{"smollm", false};
  if (!found)
    fail(ErrorKind::kData, source, ": llama.cpp has no name for this pre-tokenizer, so it would split text otherwise: ", to_line(pre_tokenizer),
         Remedy{"llama.cpp's own converter knows further models"});
  return *found;
}

Json tokenizer_json_from_gguf(const Json& metadata, std::string_view source) {
  const Vocabulary v = read_vocabulary(metadata, source);
  if (v.model == "gpt2") return byte_level_bpe(v);
  if (v.model == "llama") return sentencepiece_bpe(v);
  if (v.model == "t5") return sentencepiece_unigram(v);
  fail(ErrorKind::kData, source, ": tokenizer.ggml.model is \"", v.model, "\"; known are gpt2, llama, t5",
       Remedy{"take tokenizer.json from the model's Hugging Face folder"});
}

Json tokenizer_config_from_gguf(const Json& metadata, std::string_view source) {
  const Vocabulary v = read_vocabulary(metadata, source);
  Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"}, {"clean_up_tokenization_spaces", false}};
  const auto name = [&](const char* key, const std::optional<std::int64_t>& id) {
    if (id) config[key] = v.tokens[static_cast<std::size_t>(*id)];
  };
  name("bos_token", v.bos);
  name("eos_token", v.eos);
  name("unk_token", v.unknown);
  name("pad_token", v.pad);
  config["add_bos_token"] = v.add_bos;
  config["add_eos_token"] = v.add_eos;
  const auto length = find(metadata, v.architecture + ".context_length");
  if (length && length->is_number_integer()) config["model_max_length"] = *length;
  const auto chat_template = value_or<std::string>(metadata, "tokenizer.chat_template", "", source);
  if (!chat_template.empty()) config["chat_template"] = chat_template;
  return config;
}

}  // namespace alambic::checkpoints
