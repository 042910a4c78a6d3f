// SPDX-License-Identifier: Apache-2.0
#include "distill/smaller_vocabulary.h"

#include <algorithm>
#include <cstdio>
#include <functional>
#include <limits>
#include <set>
#include <unordered_map>

#include "core/error.h"
#include "core/files.h"
#include "models/config.h"

namespace alambic::distill {
namespace {

constexpr std::uint64_t kTokensChecked = 1 << 20;  // of each store
constexpr const char* kMapFile = "vocabulary_map.json";

using Container = Json::object_t::Container;  // to append a key known to be new without the search for it

std::string utf8_of(std::uint32_t code) {  // below 0x800, which is all that is asked for
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xC0 | (code >> 6)), static_cast<char>(0x80 | (code & 0x3F))};
}

std::vector<std::string> letters_of(const std::string& text) {
  std::vector<std::string> letters;
  for (const char byte : text) {
    if ((static_cast<unsigned char>(byte) & 0xC0) == 0x80 && !letters.empty()) letters.back() += byte;
    else letters.emplace_back(1, byte);
  }
  return letters;
}

/// The letters that byte-level tokenizers write bytes as (GPT-2's bytes_to_unicode).
std::vector<std::string> byte_letters() {
  std::vector<std::string> letters;
  std::uint32_t next = 256;
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    const bool itself = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    letters.push_back(utf8_of(itself ? byte : next++));
  }
  return letters;
}

std::string byte_token(unsigned char byte) {
  char name[8];
  std::snprintf(name, sizeof name, "<0x%02X>", byte);
  return name;
}

bool holds_type(const Json& json, std::string_view type) {
  if (!json.is_structured()) return false;
  if (json.is_object() && json.contains("type") && json["type"] == type) return true;
  return std::any_of(json.begin(), json.end(), [&](const Json& part) { return holds_type(part, type); });
}

/// A BPE over ids: what it makes of a text without spaces to split at, and the tokens it passes through.
class Bpe {
 public:
  Bpe(const Json& model, const std::string& source) : byte_fallback_(value_or<bool>(model, "byte_fallback", false, source)) {
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
      if (!value_or<std::string>(model, key, "", source).empty())
        fail(ErrorKind::kUsage, source, ": a BPE with ", key, " cannot be made smaller yet", Remedy{"leave vocabulary.stores out"});
    const Json vocabulary = require<Json>(model, "vocab", source);
    for (const auto& [token, id] : vocabulary.items()) ids_.emplace(token, id.get<std::int64_t>());
    for (const Json& merge : require<Json>(model, "merges", source)) {
      const auto [left, right] = parts_of(merge, source);
      const auto a = ids_.find(left), b = ids_.find(right), both = ids_.find(left + right);
      if (a == ids_.end() || b == ids_.end() || both == ids_.end()) fail(ErrorKind::kData, source, ": a merge of ", to_line(Json(left)), " and ", to_line(Json(right)), " names tokens that are not in the vocabulary");
      merges_.emplace(pair_of(a->second, b->second), Merge{merges_.size(), both->second});
    }
  }

  static std::pair<std::string, std::string> parts_of(const Json& merge, const std::string& source) {
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) return {merge[0].get<std::string>(), merge[1].get<std::string>()};
    if (merge.is_string()) {
      const std::string text = merge.get<std::string>();
      if (const std::size_t space = text.find(' '); space != std::string::npos) return {text.substr(0, space), text.substr(space + 1)};
    }
    fail(ErrorKind::kData, source, ": ", to_line(merge).substr(0, 60), " is no merge");
  }

  /// passed: every token that stood there at some time. Empty: a letter that neither the vocabulary nor its bytes can spell.
  std::vector<std::int64_t> pieces(const std::string& text, std::set<std::int64_t>* passed = nullptr) const {
    std::vector<std::int64_t> symbols;
    for (const std::string& letter : letters_of(text)) {
      if (const auto found = ids_.find(letter); found != ids_.end()) {
        symbols.push_back(found->second);
        continue;
      }
      if (!byte_fallback_) return {};
      for (const char byte : letter) {
        const auto found = ids_.find(byte_token(static_cast<unsigned char>(byte)));
        if (found == ids_.end()) return {};
        symbols.push_back(found->second);
      }
    }
    if (passed != nullptr) passed->insert(symbols.begin(), symbols.end());
    while (true) {
      std::size_t best = 0;
      const Merge* merge = nullptr;
      for (std::size_t i = 0; i + 1 < symbols.size(); ++i)
        if (const auto found = merges_.find(pair_of(symbols[i], symbols[i + 1])); found != merges_.end() && (merge == nullptr || found->second.rank < merge->rank)) merge = &found->second, best = i;
      if (merge == nullptr) return symbols;
      symbols[best] = merge->made;
      symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(best) + 1);
      if (passed != nullptr) passed->insert(merge->made);
    }
  }

 private:
  struct Merge {
    std::size_t rank;
    std::int64_t made;
  };
  static std::uint64_t pair_of(std::int64_t a, std::int64_t b) { return (static_cast<std::uint64_t>(a) << 32) | static_cast<std::uint64_t>(b); }
  bool byte_fallback_;
  std::unordered_map<std::string, std::int64_t> ids_;
  std::unordered_map<std::uint64_t, Merge> merges_;
};

bool names_one_id(const std::string& key) { return key.ends_with("_token_id") || key.ends_with("_token_ids"); }
bool lists_ids(const std::string& key) { return key == "suppress_tokens" || key == "begin_suppress_tokens" || key == "bad_words_ids"; }

/// config.json with the ids of tokens that the family supposes where the file names none.
Json with_supposed_ids(Json config, const std::filesystem::path& file) {
  const models::Family& family = models::find_family(require<std::string>(config, "model_type", file.string()));
  const Json defaults = parse_json(family.defaults, family.model_type);
  for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"})
    if (!config.contains(key) && defaults.contains(key) && defaults[key].is_number_integer()) config[key] = defaults[key];
  return config;
}

/// Every id that a config's keys name, as it stands there.
void collect_ids(const Json& value, std::vector<std::int64_t>& ids) {
  if (value.is_number_integer()) ids.push_back(value.get<std::int64_t>());
  else if (value.is_array())
    for (const Json& part : value) collect_ids(part, ids);
}

}  // namespace

void VocabularyConfig::visit(FieldVisitor& fields) {
  fields.field("stores", stores, {.help = "token stores whose tokens stay, with all special, added and byte tokens and what merges need; none: the vocabulary stays whole"});
  fields.field("min_count", min_count, {.help = "how often a token must stand in the stores to stay", .low = 1, .high = 1e15});
  fields.field("pad_to_multiple", pad_to_multiple, {.help = "rows of the embedding are rounded up to it", .low = 1, .high = 1 << 20});
}

SmallerVocabulary::SmallerVocabulary(const fs::path& folder, std::int64_t rows, const std::vector<data::TokenStore>& stores, const VocabularyConfig& config)
    : folder_(folder), old_rows_(rows), old_tokenizer_(std::make_unique<data::Tokenizer>(data::Tokenizer::from_file(folder))) {
  const data::Tokenizer& old = *old_tokenizer_;
  const std::string source = (folder / "tokenizer.json").string();
  Json json = parse_json(old.json(), source, kVocabularyJson);
  Json& model = json["model"];
  const std::string type = value_or<std::string>(model, "type", model.contains("merges") ? "BPE" : "", source);
  if (type != "BPE" && type != "Unigram") fail(ErrorKind::kUsage, source, ": a tokenizer of type ", type, " cannot be made smaller; BPE and Unigram can", Remedy{"leave vocabulary.stores out"});
  const auto used = static_cast<std::int64_t>(old.vocabulary_size());
  if (used > rows) fail(ErrorKind::kData, source, ": has ", used, " tokens, the model only ", rows, " rows", Remedy{"tokenizer and weights belong to different versions: fetch the folder again"});

  // What the texts use.
  std::vector<std::int64_t> counts(static_cast<std::size_t>(used));
  for (const data::TokenStore& store : stores) {
    if (store.info().tokenizer_hash != old.hash())
      fail(ErrorKind::kData, store.folder().string(), ": made by another tokenizer: its hash is ", store.info().tokenizer_hash, ", the model's is ", old.hash(), Remedy{"prepare the text again with this model's tokenizer"});
    for (std::uint64_t document = 0; document < store.num_documents(); ++document)
      for (const std::uint32_t id : store.read(document).ids) ++counts.at(id);
  }
  std::set<std::int64_t> kept;
  for (std::size_t id = 0; id < counts.size(); ++id)
    if (counts[id] >= config.min_count) kept.insert(static_cast<std::int64_t>(id));

  // What is always kept.
  const auto keep_token = [&](const std::string& token) {
    if (const auto id = old.id_of(token)) kept.insert(*id);
  };
  for (const Json& added : value_or<Json>(json, "added_tokens", Json::array(), source)) kept.insert(require<std::int64_t>(added, "id", source));
  if (const auto unknown = old.unknown_id()) kept.insert(*unknown);
  const bool byte_level = holds_type(value_or<Json>(json, "pre_tokenizer", nullptr, source), "ByteLevel") || holds_type(value_or<Json>(json, "normalizer", nullptr, source), "ByteLevel");
  const bool byte_fallback = value_or<bool>(model, "byte_fallback", false, source);
  if (byte_level)
    for (const std::string& letter : byte_letters()) keep_token(letter);
  if (byte_fallback)
    for (int byte = 0; byte < 256; ++byte) keep_token(byte_token(static_cast<unsigned char>(byte)));
  for (const char* name : {"config.json", "generation_config.json"}) {
    if (!fs::exists(folder / name)) continue;
    Json file = read_json_file(folder / name);
    if (name == std::string("config.json")) file = with_supposed_ids(file, folder / name);
    std::vector<std::int64_t> ids;
    for (const auto& [key, value] : file.items())
      if (names_one_id(key)) collect_ids(value, ids);
    for (const std::int64_t id : ids) {
      if (id >= rows || id < -rows) fail(ErrorKind::kData, (folder / name).string(), ": names the token id ", id, ", the model has ", rows, " rows");
      if (id >= 0 || name == std::string("config.json")) kept.insert(id < 0 ? id + rows : id);
    }
  }

  // What spelling needs, and the new model.
  if (type == "BPE") {
    const Bpe bpe(model, source);
    const Json vocabulary = std::move(model["vocab"]);
    std::vector<std::pair<std::int64_t, std::string>> tokens;
    for (const auto& [token, id] : vocabulary.items()) tokens.emplace_back(id.get<std::int64_t>(), token);
    std::sort(tokens.begin(), tokens.end());
    const std::set<std::int64_t> wanted = kept;
    for (const auto& [id, token] : tokens) {
      if (!byte_level && !byte_fallback && letters_of(token).size() == 1) kept.insert(id);
      if (!wanted.contains(id)) continue;
      std::set<std::int64_t> passed;
      if (bpe.pieces(token, &passed) == std::vector<std::int64_t>{id}) kept.insert(passed.begin(), passed.end());
    }
    old_ids_.assign(kept.begin(), kept.end());
    for (std::size_t i = 0; i < old_ids_.size(); ++i) new_ids_.emplace(old_ids_[i], static_cast<std::int64_t>(i));
    Json restricted = Json::object();
    std::set<std::string> names;
    for (const auto& [id, token] : tokens)
      if (kept.contains(id)) restricted.get_ref<Json::object_t&>().Container::emplace_back(token, Json(new_id(id))), names.insert(token);
    Json merges = Json::array();
    for (const Json& merge : model["merges"]) {
      const auto [left, right] = Bpe::parts_of(merge, source);
      if (names.contains(left) && names.contains(right) && names.contains(left + right)) merges.push_back(merge);
    }
    model["vocab"] = std::move(restricted);
    model["merges"] = std::move(merges);
  } else {
    const Json vocabulary = std::move(model["vocab"]);
    double least = std::numeric_limits<double>::infinity();
    std::size_t least_id = 0;
    for (std::size_t id = 0; id < vocabulary.size(); ++id) {
      const Json& piece = vocabulary[id];
      if (!piece.is_array() || piece.size() != 2 || !piece[0].is_string() || !piece[1].is_number()) fail(ErrorKind::kData, source, ": piece ", id, " of the vocabulary must be [text, score]");
      if (!byte_level && !byte_fallback && letters_of(piece[0].get<std::string>()).size() == 1) kept.insert(static_cast<std::int64_t>(id));
      if (piece[1].get<double>() < least) least = piece[1].get<double>(), least_id = id;
    }
    kept.insert(static_cast<std::int64_t>(least_id));  // the least score decides what unknown text costs
    old_ids_.assign(kept.begin(), kept.end());
    for (std::size_t i = 0; i < old_ids_.size(); ++i) new_ids_.emplace(old_ids_[i], static_cast<std::int64_t>(i));
    Json restricted = Json::array();
    for (const std::int64_t id : old_ids_)
      if (id < static_cast<std::int64_t>(vocabulary.size())) restricted.push_back(vocabulary[static_cast<std::size_t>(id)]);
    model["vocab"] = std::move(restricted);
    if (model.contains("unk_id") && model["unk_id"].is_number_integer()) model["unk_id"] = new_id(model["unk_id"].get<std::int64_t>());
  }

  // All other places of tokenizer.json that hold ids.
  const auto mapped = [&](const Json& id) {
    const std::int64_t now = id.is_number_integer() ? new_id(id.get<std::int64_t>()) : -1;
    if (now < 0) fail(ErrorKind::kData, source, ": names ", to_line(id).substr(0, 60), " where the id of a token is expected");
    return now;
  };
  if (json.contains("added_tokens"))
    for (Json& added : json["added_tokens"]) added["id"] = mapped(added["id"]);
  const std::function<void(Json&)> map_processor = [&](Json& part) {
    if (!part.is_object()) return;
    const std::string kind = value_or<std::string>(part, "type", "", source);
    if (kind == "Sequence") {
      for (Json& each : part["processors"]) map_processor(each);
    } else if (kind == "TemplateProcessing") {
      for (auto& [name, token] : part["special_tokens"].items())
        for (Json& id : token["ids"]) id = mapped(id);
    } else if (kind == "BertProcessing" || kind == "RobertaProcessing") {
      for (const char* end : {"sep", "cls"}) part[end][1] = mapped(part[end][1]);
    } else if (kind != "ByteLevel") {
      fail(ErrorKind::kUsage, source, ": post_processor of type \"", kind, "\" is not known, and may hold ids of tokens", Remedy{"leave vocabulary.stores out"});
    }
  };
  if (json.contains("post_processor")) map_processor(json["post_processor"]);
  if (json.contains("padding") && json["padding"].is_object() && json["padding"].contains("pad_id")) {
    const std::int64_t now = new_id(json["padding"]["pad_id"].get<std::int64_t>());
    if (now >= 0) json["padding"]["pad_id"] = now;
    else json["padding"] = nullptr;
  }
  tokenizer_ = std::make_unique<data::Tokenizer>(data::Tokenizer::from_json(json.dump(1, ' ', false, Json::error_handler_t::replace), "the smaller tokenizer.json"));
  rows_ = (static_cast<std::int64_t>(old_ids_.size()) + config.pad_to_multiple - 1) / config.pad_to_multiple * config.pad_to_multiple;

  // The proof: every token under its new id, and the texts as they were.
  for (std::size_t i = 0; i < old_ids_.size(); ++i) {
    const auto then = old.token_of(static_cast<std::uint32_t>(old_ids_[i])), now = tokenizer_->token_of(static_cast<std::uint32_t>(i));
    if (then != now) fail(ErrorKind::kData, source, ": token ", to_line(Json(then.value_or(""))), " with the id ", old_ids_[i], " does not come out as ", i, " when the ids are made dense",
                          Remedy{"its ids have holes or an order that tokenizers do not keep; leave vocabulary.stores out"});
  }
  for (const data::TokenStore& store : stores) {
    std::uint64_t tokens = 0;
    for (std::uint64_t document = 0; document < store.num_documents() && tokens < kTokensChecked; ++document) {
      const std::vector<std::uint32_t> ids = store.read(document).ids;
      const std::string text = old.decode(ids, /*skip_special_tokens=*/false);
      std::vector<std::uint32_t> wanted = old.encode(text, /*add_special_tokens=*/false);
      tokens += ids.size();
      if (std::any_of(wanted.begin(), wanted.end(), [&](std::uint32_t id) { return new_id(id) < 0; })) continue;  // rarer than min_count
      for (std::uint32_t& id : wanted) id = static_cast<std::uint32_t>(new_id(id));
      if (tokenizer_->encode(text, false) != wanted) fail(ErrorKind::kBug, store.folder().string(), ": document ", document, " would become other pieces with the smaller vocabulary");
    }
  }
}

std::int64_t SmallerVocabulary::new_id(std::int64_t old_id) const {
  const auto found = new_ids_.find(old_id);
  return found == new_ids_.end() ? -1 : found->second;
}

Json SmallerVocabulary::with_new_ids(Json json) const {
  if (json.contains("vocab_size")) {
    json = with_supposed_ids(json, folder_ / "config.json");
    json["vocab_size"] = rows_;
  }
  const std::function<void(Json&)> map_ids = [&](Json& value) {
    if (value.is_number_integer()) {
      const std::int64_t id = value.get<std::int64_t>();
      if (const std::int64_t now = new_id(id < 0 ? id + old_rows_ : id); now >= 0) value = now;  // else -1 and such, which mean none
    } else if (value.is_array()) {
      for (Json& part : value) map_ids(part);
    }
  };
  // Of lists that forbid tokens, those that are gone need no word any more.
  const std::function<bool(const Json&)> is_gone = [&](const Json& value) {
    if (value.is_number_integer()) return new_id(value.get<std::int64_t>()) < 0;
    return value.is_array() && std::any_of(value.begin(), value.end(), is_gone);
  };
  for (auto& [key, value] : json.items()) {
    if (lists_ids(key) && value.is_array()) {
      Json left = Json::array();
      for (const Json& entry : value)
        if (!is_gone(entry)) left.push_back(entry);
      value = left;
    }
    if (names_one_id(key) || lists_ids(key)) map_ids(value);
  }
  return json;
}

void SmallerVocabulary::write(const fs::path& folder) const {
  write_file(folder / "tokenizer.json", tokenizer_->json());
  if (const fs::path file = folder / "generation_config.json"; fs::exists(file)) write_file(file, with_new_ids(read_json_file(file)).dump(2) + "\n");
  if (const fs::path file = folder / "tokenizer_config.json"; fs::exists(file)) {
    Json json = read_json_file(file);
    if (json.is_object() && json.contains("added_tokens_decoder") && json["added_tokens_decoder"].is_object()) {
      Json decoder = Json::object();
      for (const auto& [key, value] : json["added_tokens_decoder"].items()) {
        const std::optional<std::uint32_t> id = value.is_object() && value.contains("content") && value["content"].is_string() ? tokenizer_->id_of(value["content"].get<std::string>()) : std::nullopt;
        if (!id) fail(ErrorKind::kData, (folder_ / "tokenizer_config.json").string(), ": added_tokens_decoder names a token ", key, " that tokenizer.json has not");
        decoder[std::to_string(*id)] = value;
      }
      json["added_tokens_decoder"] = decoder;
      write_file(file, json.dump(2) + "\n");
    }
  }
  if (const fs::path file = folder / "added_tokens.json"; fs::exists(file)) {
    Json json = read_json_file(file), now = Json::object();
    for (const auto& [token, id] : json.items())
      if (const auto new_token = tokenizer_->id_of(token)) now[token] = *new_token;
    write_file(file, now.dump(2) + "\n");
  }
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (name == "merges.txt" || name == "tokenizer.model" || name.starts_with("vocab.")) fs::remove(entry.path());
  }
  Json map = {{"from", {{"tokenizer", old_tokenizer_->hash()}, {"rows", old_rows_}}}, {"to", {{"tokenizer", tokenizer_->hash()}, {"rows", rows_}}}, {"old_ids", old_ids_}};
  write_file(folder / kMapFile, to_line(map) + "\n");
}

bool SmallerVocabulary::write_store(const data::TokenStore& from, const fs::path& to) const {
  const Json json = parse_json(tokenizer_->json(), "the smaller tokenizer.json", kVocabularyJson);
  std::unique_ptr<Bpe> bpe;
  if (json["model"].contains("merges")) bpe = std::make_unique<Bpe>(json["model"], "the smaller tokenizer.json");
  std::unordered_map<std::uint32_t, std::vector<std::int64_t>> spelt;
  const auto pieces_of = [&](std::uint32_t id) -> const std::vector<std::int64_t>& {
    const auto [found, is_new] = spelt.try_emplace(id);
    if (!is_new) return found->second;
    if (const std::int64_t now = new_id(id); now >= 0) found->second = {now};
    else if (bpe) found->second = bpe->pieces(old_tokenizer_->token_of(id).value_or(""));
    return found->second;
  };
  data::StoreInfo info = from.info();
  info.tokenizer_hash = tokenizer_->hash();
  info.vocabulary_size = static_cast<std::uint32_t>(tokenizer_->vocabulary_size());
  bool all_spelt = true;
  {
    data::TokenStoreWriter writer(to, info);
    for (std::uint64_t number = 0; number < from.num_documents() && all_spelt; ++number) {
      const data::Document old = from.read(number);
      data::Document document{.ids = {}, .mask = {}, .source = old.source, .num_bytes = old.num_bytes, .num_words = old.num_words};
      for (std::size_t i = 0; i < old.ids.size(); ++i) {
        const std::vector<std::int64_t>& pieces = pieces_of(old.ids[i]);
        all_spelt = all_spelt && !pieces.empty();
        for (const std::int64_t piece : pieces) document.ids.push_back(static_cast<std::uint32_t>(piece)), document.mask.push_back(old.mask[i]);
      }
      if (all_spelt) writer.append(document);
    }
    if (all_spelt) writer.finish();
  }
  if (!all_spelt) fs::remove_all(to);
  return all_spelt;
}

}  // namespace alambic::distill
