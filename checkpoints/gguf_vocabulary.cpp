// SPDX-License-Identifier: Apache-2.0
// What llama.cpp's converter writes (conversion/base.py, gguf-py/gguf/vocab.py), with two differences on purpose: the
// pre-tokenizer is recognised by what it does and not by the ids it gives one text, so that a trimmed or extended vocabulary
// keeps it; and a SentencePiece vocabulary gets its scores from the order of the merges, where the converter needs a
// tokenizer.model or writes one score for all.
#include "checkpoints/gguf_vocabulary.h"

#include <algorithm>
#include <map>
#include <optional>
#include <unordered_map>
#include <unordered_set>

#include "checkpoints/gguf_tokenizer.h"
#include "checkpoints/hf_folder.h"
#include "core/error.h"
#include "core/files.h"
#include "core/json.h"

namespace alambic::checkpoints {
namespace {

enum TokenType : std::int32_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };
const std::string kBlank = "\u2581";  // SentencePiece's visible space
constexpr float kAddedScore = -1000;
constexpr std::uint64_t kLongestTemplate = 4 << 20;

Json json_of(const fs::path& folder, const std::string& name) {
  const fs::path file = file_of_folder(folder, name);
  return file.empty() ? Json() : read_json_file(file, 512ull << 20, kVocabularyJson);
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  for (std::size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size()) text.replace(at, from.size(), to);
  return text;
}

/// Steps of a normaliser, pre-tokenizer or post-processor, whether it is one or a "Sequence".
std::vector<Json> steps_of(const Json& pipeline) {
  if (!pipeline.is_object()) return {};
  for (const char* list : {"normalizers", "pretokenizers", "processors", "decoders"})
    if (pipeline.value("type", "") == "Sequence" && pipeline.contains(list) && pipeline[list].is_array()) return {pipeline[list].begin(), pipeline[list].end()};
  return {pipeline};
}

/// Tokens that the converter takes for control tokens although nobody marked them.
bool looks_special(const std::string& token) {
  const auto within = [&](const std::string& begin, const std::string& end) {
    return token.size() >= begin.size() + end.size() && token.starts_with(begin) && token.ends_with(end);
  };
  return token == "<pad>" || token == "<mask>" || token == "<2mass>" || token == "[@BOS@]" || within("<|", "|>") || within("<\uFF5C", "\uFF5C>") || within("<unused", ">");
}

bool is_byte_token(const std::string& token) {
  const auto is_digit = [](char letter) { return std::string_view("0123456789abcdefABCDEF").find(letter) != std::string_view::npos; };
  return token.size() == 6 && token.starts_with("<0x") && token.back() == '>' && is_digit(token[3]) && is_digit(token[4]);
}

struct Added {
  std::int64_t id = 0;
  std::string content;
  bool special = false;
};

class Exporter {
 public:
  Exporter(const fs::path& folder, const models::ModelConfig& config) : folder_(folder), config_(config), source_((folder / "tokenizer.json").string()) {}

  GgufVocabulary run() {
    if (file_of_folder(folder_, "tokenizer.json").empty())
      fail(ErrorKind::kData, folder_.string(), ": holds no tokenizer.json, and a GGUF file without a tokenizer cannot be used",
           Remedy{"put the model's tokenizer.json into the folder (save_pretrained of a fast tokenizer writes it)"});
    tokenizer_ = json_of(folder_, "tokenizer.json");
    settings_ = json_of(folder_, "tokenizer_config.json");
    if (!settings_.is_object()) settings_ = Json::object();
    model_ = require<Json>(tokenizer_, "model", source_);
    if (value_or<std::string>(model_, "type", "", source_) != "BPE")
      fail(ErrorKind::kData, source_, ": a tokenizer of type \"", value_or<std::string>(model_, "type", "?", source_), "\" is not exported; BPE is");
    read_tokens();
    const bool in_bytes = has_byte_level();
    if (!in_bytes && !value_or<bool>(model_, "byte_fallback", false, source_))
      fail(ErrorKind::kData, source_, ": neither byte-level BPE nor one with byte fallback; llama.cpp has no name for it");
    const bool prefix = in_bytes ? false : check_sentencepiece();
    const std::string pre = in_bytes ? pre_tokenizer() : "default";
    add("tokenizer.ggml.model", std::string(in_bytes ? "gpt2" : "llama"));
    add("tokenizer.ggml.pre", pre);
    const std::vector<std::string> merges = merge_lines();
    const std::vector<float> all_scores = in_bytes ? std::vector<float>() : scores(merges);
    mark_types(in_bytes);
    add("tokenizer.ggml.tokens", tokens_);
    if (!in_bytes) add("tokenizer.ggml.scores", all_scores);
    add("tokenizer.ggml.token_type", types_);
    if (in_bytes) add("tokenizer.ggml.merges", merges);
    else add("tokenizer.ggml.add_space_prefix", prefix);
    add_special_ids();
    add_chat_templates();
    return std::move(out_);
  }

 private:
  void warn(std::string_view text) { out_.warnings.emplace_back(text); }
  void add(const std::string& key, GgufValue value) { out_.keys.emplace_back(key, std::move(value)); }

  void read_tokens() {
    const Json vocabulary = require<Json>(model_, "vocab", source_);
    if (!vocabulary.is_object() || vocabulary.empty()) fail(ErrorKind::kData, source_, ": model.vocab must map tokens to ids");
    const std::int64_t rows = config_.vocabulary_size;
    tokens_.resize(static_cast<std::size_t>(rows));
    types_.assign(static_cast<std::size_t>(rows), kUnused);
    const auto place = [&](const std::string& token, std::int64_t id, std::int32_t type) {
      if (id < 0 || id >= rows)
        fail(ErrorKind::kData, source_, ": token \"", token, "\" has id ", id, ", and the model has ", rows, " rows of the embedding", Remedy{"tokenizer and model do not belong together"});
      const auto at = static_cast<std::size_t>(id);
      if (types_[at] != kUnused && tokens_[at] != token) fail(ErrorKind::kData, source_, ": id ", id, " is both \"", tokens_[at], "\" and \"", token, "\"");
      tokens_[at] = token;
      types_[at] = type;
      ids_[token] = id;
    };
    for (const auto& [token, id] : vocabulary.items()) {
      if (!id.is_number_integer()) fail(ErrorKind::kData, source_, ": the id of token \"", token, "\" is no integer");
      place(token, id.get<std::int64_t>(), kNormal);
    }
    for (const Json& entry : value_or<Json>(tokenizer_, "added_tokens", Json::array(), source_)) {
      Added one{.id = require<std::int64_t>(entry, "id", source_ + ": added_tokens"), .content = require<std::string>(entry, "content", source_ + ": added_tokens"),
                .special = value_or<bool>(entry, "special", false, source_)};
      place(one.content, one.id, kUserDefined);
      added_.push_back(std::move(one));
    }
    std::unordered_set<std::string> seen;
    for (std::size_t id = 0; id < tokens_.size(); ++id) {
      if (types_[id] == kUnused) tokens_[id] = "[PAD" + std::to_string(id) + "]";
      // llama.cpp ends at once over two tokens of one text.
      if (!seen.insert(tokens_[id]).second) fail(ErrorKind::kData, source_, ": the token \"", tokens_[id], "\" has two ids");
    }
  }

  bool has_byte_level() const {
    for (const Json& step : steps_of(tokenizer_.value("pre_tokenizer", Json())))
      if (step.value("type", "") == "ByteLevel") return true;
    return false;
  }

  std::string pre_tokenizer() {
    for (const Json& step : steps_of(tokenizer_.value("normalizer", Json()))) {
      const std::string type = step.value("type", "");
      if (type == "NFC") warn("text that is not in Unicode's form C is brought into it by the folder's tokenizer and not by llama.cpp");
      else fail(ErrorKind::kData, source_, ": the normaliser ", type, " has no counterpart in llama.cpp for byte-level BPE");
    }
    const bool whole_words = value_or<bool>(model_, "ignore_merges", false, source_);
    const PreTokenizerName found = gguf_pre_tokenizer(tokenizer_.value("pre_tokenizer", Json()), whole_words, source_);
    if (found.ignore_merges != whole_words)
      warn(found.ignore_merges ? "llama.cpp looks a whole word up before it merges its parts; the folder's tokenizer does not"
                               : "the folder's tokenizer looks a whole word up before it merges its parts; llama.cpp does not");
    return found.name;
  }

  /// Whether a space is put in front of a text. Error(kData) for what is no SentencePiece-like pipeline.
  bool check_sentencepiece() {
    bool prefix = false;
    std::vector<Json> steps = steps_of(tokenizer_.value("normalizer", Json()));
    const std::vector<Json> more = steps_of(tokenizer_.value("pre_tokenizer", Json()));
    steps.insert(steps.end(), more.begin(), more.end());
    for (const Json& step : steps) {
      const std::string type = step.value("type", "");
      const Json pattern = step.value("pattern", Json::object());
      const std::string from = pattern.is_object() ? pattern.value("String", "") : "";
      if (type == "Prepend" && step.value("prepend", "") == kBlank) prefix = true;
      else if (type == "Replace" && from == " " && step.value("content", "") == kBlank) continue;
      else if (type == "Split" && from == " ") continue;  // never finds one after the replacement
      else if (type == "Metaspace" && step.value("replacement", "") == kBlank && !step.value("split", true))
        prefix = step.contains("prepend_scheme") ? step.value("prepend_scheme", "always") != "never" : step.value("add_prefix_space", true);
      else fail(ErrorKind::kData, source_, ": the step ", type, " has no counterpart in llama.cpp for SentencePiece-like BPE");
    }
    return prefix;
  }

  /// "left right", in order.
  std::vector<std::string> merge_lines() {
    std::vector<std::string> lines;
    const Json merges = value_or<Json>(model_, "merges", Json::array(), source_);
    if (!merges.is_array() || merges.empty()) fail(ErrorKind::kData, source_, ": model.merges is missing or empty");
    const auto spelled = [](const std::string& part) { return replaced(part, " ", "\u0120"); };  // a space separates the two
    for (const Json& merge : merges) {
      if (merge.is_string()) lines.push_back(merge.get<std::string>());
      else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) lines.push_back(spelled(merge[0].get<std::string>()) + " " + spelled(merge[1].get<std::string>()));
      else fail(ErrorKind::kData, source_, ": model.merges[", lines.size(), "] is not two tokens");
    }
    return lines;
  }

  /// llama.cpp joins the two neighbours whose whole has the highest score: so the earliest merge gets the highest.
  std::vector<float> scores(const std::vector<std::string>& merges) {
    const float never = -static_cast<float>(merges.size()) - 1;
    std::vector<float> scores(tokens_.size());
    for (std::size_t id = 0; id < tokens_.size(); ++id) {
      const auto letters = std::count_if(tokens_[id].begin(), tokens_[id].end(), [](char byte) { return (static_cast<unsigned char>(byte) & 0xC0) != 0x80; });
      scores[id] = letters <= 1 || types_[id] != kNormal ? 0 : never;
    }
    std::unordered_set<std::string> made;
    for (std::size_t rank = 0; rank < merges.size(); ++rank) {
      const std::size_t blank = merges[rank].find(' ', 1);
      const std::string whole = blank == std::string::npos ? "" : merges[rank].substr(0, blank) + merges[rank].substr(blank + 1);
      const auto id = ids_.find(whole);
      if (id == ids_.end()) fail(ErrorKind::kData, source_, ": model.merges[", rank, "] makes \"", whole, "\", which is no token");
      if (made.insert(whole).second) scores[static_cast<std::size_t>(id->second)] = -static_cast<float>(rank);
    }
    for (const Added& one : added_) scores[static_cast<std::size_t>(one.id)] = kAddedScore;
    for (std::size_t id = 0; id < tokens_.size(); ++id)
      if (types_[id] == kUnused) scores[id] = kAddedScore;
    return scores;
  }

  void mark_types(bool in_bytes) {
    if (!in_bytes)
      for (std::size_t id = 0; id < tokens_.size(); ++id)
        if (types_[id] == kNormal && is_byte_token(tokens_[id])) types_[id] = kByte;
    for (const Added& one : added_) {
      const auto at = static_cast<std::size_t>(one.id);
      const bool control = one.special || looks_special(one.content);
      types_[at] = control ? kControl : kUserDefined;
      if (!control) tokens_[at] = replaced(one.content, kBlank, " ");  // matched against text as people write it
    }
    if (const auto unknown = value_or<std::string>(model_, "unk_token", "", source_); !in_bytes && ids_.contains(unknown)) types_[static_cast<std::size_t>(ids_.at(unknown))] = kUnknown;
  }
  std::optional<std::int64_t> id_named(const std::string& kind) const {
    const Json value = settings_.value(kind + "_token", Json());
    const std::string text = value.is_string() ? value.get<std::string>() : value.is_object() ? value.value("content", "") : "";
    if (!text.empty() && ids_.contains(text)) return ids_.at(text);
    const Json id = config_.source.value(kind + "_token_id", Json());
    if (id.is_number_integer() && id.get<std::int64_t>() >= 0 && id.get<std::int64_t>() < config_.vocabulary_size) return id.get<std::int64_t>();
    return std::nullopt;
  }

  void add_special_ids() {
    std::map<std::string, std::optional<std::int64_t>> ids;
    for (const char* kind : {"bos", "eos", "unk", "sep", "pad", "mask"}) ids[kind] = id_named(kind);
    bool add_bos = false, add_eos = false;
    for (const Json& step : steps_of(tokenizer_.value("post_processor", Json()))) {
      if (step.value("type", "") != "TemplateProcessing") continue;
      const Json single = step.value("single", Json::array());
      std::vector<std::string> before, after;
      bool text_seen = false;
      for (const Json& part : single) {
        if (part.contains("Sequence")) text_seen = true;
        else if (part.contains("SpecialToken")) (text_seen ? after : before).push_back(part["SpecialToken"].value("id", ""));
      }
      const auto judge = [&](const std::vector<std::string>& found, const char* kind, bool& flag) {
        if (found.empty()) return;
        if (!ids[kind] && found.size() == 1 && ids_.contains(found[0])) ids[kind] = ids_.at(found[0]);
        flag = found.size() == 1 && ids_.contains(found[0]) && ids[kind] == ids_.at(found[0]);
        if (!flag) out_.warnings.push_back("the folder's tokenizer adds " + std::to_string(found.size()) + " special tokens (" + found[0] + " ...) to a text that llama.cpp does not add");
      };
      judge(before, "bos", add_bos);
      judge(after, "eos", add_eos);
    }
    const auto stated = [&](const char* key, bool& flag) {
      if (const Json value = settings_.value(key, Json()); value.is_boolean()) flag = value.get<bool>();
    };
    stated("add_bos_token", add_bos);
    stated("add_eos_token", add_eos);
    for (const auto& [kind, name] : {std::pair{"bos", "bos"}, std::pair{"eos", "eos"}, std::pair{"unk", "unknown"}, std::pair{"sep", "seperator"}, std::pair{"pad", "padding"}, std::pair{"mask", "mask"}})
      if (ids[kind]) add(std::string("tokenizer.ggml.") + name + "_token_id", static_cast<std::uint32_t>(*ids[kind]));
    // Further ids that end a text: generation goes on over them otherwise.
    std::vector<std::int64_t> ends;
    for (const std::int64_t id : config_.eos_ids)
      if (id >= 0 && id < config_.vocabulary_size && ids["eos"] != id) ends.push_back(id);
    if (!ends.empty()) add("tokenizer.ggml.eot_token_id", static_cast<std::uint32_t>(ends[0]));
    if (ends.size() > 1) add("tokenizer.ggml.eom_token_id", static_cast<std::uint32_t>(ends[1]));
    add("tokenizer.ggml.add_bos_token", add_bos && ids["bos"].has_value());
    add("tokenizer.ggml.add_eos_token", add_eos && ids["eos"].has_value());
  }

  void add_chat_templates() {
    std::vector<std::pair<std::string, std::string>> templates;  // name ("" = default), text
    if (const fs::path file = file_of_folder(folder_, "chat_template.jinja"); !file.empty()) {
      templates.emplace_back("", read_file(file, kLongestTemplate));
      if (fs::is_directory(folder_ / "additional_chat_templates"))
        for (const auto& entry : fs::directory_iterator(folder_ / "additional_chat_templates"))
          if (entry.path().extension() == ".jinja") templates.emplace_back(entry.path().stem().string(), read_file(file_of_folder(entry.path().parent_path(), entry.path().filename().string()), kLongestTemplate));
    } else if (const Json value = settings_.value("chat_template", Json()); value.is_string()) {
      templates.emplace_back("", value.get<std::string>());
    } else if (value.is_array()) {
      for (const Json& entry : value) {
        const auto name = require<std::string>(entry, "name", (folder_ / "tokenizer_config.json").string() + ": chat_template");
        templates.emplace_back(name == "default" ? "" : name, require<std::string>(entry, "template", (folder_ / "tokenizer_config.json").string() + ": chat_template"));
      }
    }
    std::sort(templates.begin(), templates.end());
    std::vector<std::string> names;
    for (const auto& [name, text] : templates) {
      add(name.empty() ? "tokenizer.chat_template" : "tokenizer.chat_template." + name, text);
      if (!name.empty()) names.push_back(name);
    }
    if (!names.empty()) add("tokenizer.chat_templates", names);
  }

  fs::path folder_;
  const models::ModelConfig& config_;
  std::string source_;
  Json tokenizer_, settings_, model_;
  std::vector<std::string> tokens_;
  std::vector<std::int32_t> types_;
  std::unordered_map<std::string, std::int64_t> ids_;
  std::vector<Added> added_;
  GgufVocabulary out_;
};

}  // namespace

GgufVocabulary gguf_vocabulary(const fs::path& folder, const models::ModelConfig& config) { return Exporter(folder, config).run(); }

}  // namespace alambic::checkpoints
