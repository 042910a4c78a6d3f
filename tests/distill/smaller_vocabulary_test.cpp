// SPDX-License-Identifier: Apache-2.0
// tests/oracle/prune_oracle.py compares smaller vocabularies with Hugging Face's tokenizers; here is what needs no other program.
#include "distill/smaller_vocabulary.h"

#include <ATen/ops/equal.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "core/log.h"
#include "distill/prune.h"
#include "tests/distill/students.h"
#include "tests/support.h"

namespace alambic::distill {
namespace {

using testing::fails_with;
using testing::Golden;
using testing::ScratchFolder;

constexpr std::int64_t kRows = 64;  // of the tiny models
Json added(int id, const char* content, bool special) {
  return {{"id", id}, {"content", content}, {"single_word", false}, {"lstrip", false}, {"rstrip", false}, {"normalized", false}, {"special", special}};
}

/// Letters a to h, then merges; "abcd" is made of "ab" and "cd", or would be "abc" "d" if another merge came first. Ids 24 and 25 are added.
Json bpe_json(bool byte_fallback = false) {
  Json vocabulary = {{"<unk>", 0}};
  for (char letter = 'a'; letter <= 'h'; ++letter) vocabulary[std::string(1, letter)] = vocabulary.size();
  for (const char* token : {"ab", "cd", "abcd", "bc", "abc", "ef", "gh", "efgh", "de", "fg", "defg", "aa", "bb", "aabb"}) vocabulary[token] = vocabulary.size();
  return {{"version", "1.0"}, {"truncation", nullptr}, {"padding", {{"strategy", "BatchLongest"}, {"direction", "Right"}, {"pad_to_multiple_of", nullptr}, {"pad_id", 23}, {"pad_type_id", 0}, {"pad_token", "</s>"}}},
          {"added_tokens", Json::array({added(23, "</s>", true), added(24, "<tool>", false)})},
          {"normalizer", nullptr}, {"pre_tokenizer", {{"type", "WhitespaceSplit"}}},
          {"post_processor", {{"type", "TemplateProcessing"}, {"single", {{{"Sequence", {{"id", "A"}, {"type_id", 0}}}}, {{"SpecialToken", {{"id", "</s>"}, {"type_id", 0}}}}}}, {"pair", {{{"Sequence", {{"id", "A"}, {"type_id", 0}}}}, {{"Sequence", {{"id", "B"}, {"type_id", 1}}}}}},
                              {"special_tokens", {{"</s>", {{"id", "</s>"}, {"ids", {23}}, {"tokens", {"</s>"}}}}}}}},
          {"decoder", {{"type", "Fuse"}}},
          {"model", {{"type", "BPE"}, {"dropout", nullptr}, {"unk_token", "<unk>"}, {"continuing_subword_prefix", nullptr}, {"end_of_word_suffix", nullptr}, {"fuse_unk", false}, {"byte_fallback", byte_fallback},
                     {"ignore_merges", false}, {"vocab", vocabulary},
                     {"merges", {"a b", "c d", "ab cd", "b c", "a bc", "e f", "g h", "ef gh", "d e", "f g", "de fg", "a a", "b b", "aa bb"}}}}};
}

struct Case {
  ScratchFolder scratch;
  fs::path folder = scratch / "base";
  std::vector<data::TokenStore> stores;
  LogSink old = set_log_sink([](LogLevel, std::string_view) {});
  explicit Case(const Json& tokenizer = bpe_json(), const std::vector<std::string>& texts = {"abcd ef abcd", "efgh"}) {
    testing::write_model(Golden("families/llama.safetensors"), folder);
    Json config = read_json_file(folder / "config.json");
    config["eos_token_id"] = {23, 5}, config["bos_token_id"] = 23, config["pad_token_id"] = -1;
    write_file(folder / "config.json", to_line(config));
    write_file(folder / "generation_config.json", to_line({{"eos_token_id", 23}, {"pad_token_id", 23}, {"suppress_tokens", {1, 20}}, {"max_length", 20}, {"bad_words_ids", {{1, 2}, {20}}}}));
    write_file(folder / "tokenizer.json", to_line(tokenizer));
    write_file(folder / "tokenizer_config.json", R"({"added_tokens_decoder": {"23": {"content": "</s>"}, "24": {"content": "<tool>"}}, "eos_token": "</s>"})");
    write_file(folder / "added_tokens.json", R"({"<tool>": 24})");
    write_file(folder / "merges.txt", "a b\n");
    add_store("store", texts);
  }
  ~Case() { set_log_sink(old); }
  void add_store(const std::string& name, const std::vector<std::string>& texts) {
    const data::Tokenizer tokenizer = data::Tokenizer::from_file(folder);
    data::TokenStoreWriter writer(scratch / name, {.tokenizer_hash = tokenizer.hash(), .vocabulary_size = tokenizer.vocabulary_size(), .sources = {{"texts", "nowhere", "CC0-1.0", "en"}}});
    for (const std::string& text : texts) {
      data::Document document;
      document.ids = tokenizer.encode(text, true);
      document.mask.assign(document.ids.size(), 1);
      document.mask[0] = 0;
      document.num_bytes = text.size();
      writer.append(document);
    }
    writer.finish();
    stores.emplace_back(scratch / name);
  }
  SmallerVocabulary smaller(const VocabularyConfig& config = {}) { return SmallerVocabulary(folder, kRows, stores, config); }
};

std::vector<std::string> tokens_of(const data::Tokenizer& tokenizer) {
  std::vector<std::string> tokens;
  for (std::uint32_t id = 0; id < tokenizer.vocabulary_size(); ++id) tokens.push_back(tokenizer.token_of(id).value_or("?"));
  return tokens;
}

TEST(SmallerVocabulary, KeepsWhatIsUsedAndWhatMergesPassThrough) {
  Case test;
  const SmallerVocabulary vocabulary = test.smaller({.stores = {}, .pad_to_multiple = 8});
  // Used: abcd, ef, efgh, </s>. Passed through: ab, cd, gh. Letters stay because nothing else could spell text.
  const std::vector<std::string> expected = {"<unk>", "a", "b", "c", "d", "e", "f", "g", "h", "ab", "cd", "abcd", "ef", "gh", "efgh", "</s>", "<tool>"};
  EXPECT_EQ(tokens_of(vocabulary.tokenizer()), expected);
  EXPECT_EQ(vocabulary.rows(), 24);
  EXPECT_EQ(vocabulary.new_id(23), 15);
  EXPECT_EQ(vocabulary.new_id(12), -1) << "bc";
  const data::Tokenizer old = data::Tokenizer::from_file(test.folder);
  for (const std::string text : {"abcd ef efgh", "abcdefgh <tool> efabcd"}) {
    std::vector<std::uint32_t> ids = old.encode(text, true);
    for (std::uint32_t& id : ids) id = static_cast<std::uint32_t>(vocabulary.new_id(id));
    EXPECT_EQ(vocabulary.tokenizer().encode(text, true), ids) << text;
  }
  const std::string other = "aa bb de fg bc";
  const std::vector<std::uint32_t> ids = vocabulary.tokenizer().encode(other, false);
  EXPECT_EQ(vocabulary.tokenizer().decode(ids, false), "aabbdefgbc");
  EXPECT_GT(ids.size(), old.encode(other, false).size());
}

TEST(SmallerVocabulary, RareTokensGoWhereAsked) {
  Case test;
  const SmallerVocabulary vocabulary = test.smaller({.stores = {}, .min_count = 2});
  EXPECT_GE(vocabulary.new_id(11), 0) << "abcd stands there twice";
  EXPECT_EQ(vocabulary.new_id(16), -1) << "efgh once";
  EXPECT_EQ(vocabulary.new_id(14), -1) << "and nothing needs ef";
}

TEST(SmallerVocabulary, BytesSpellWhatHasNoLetter) {
  Json json = bpe_json(true);
  Json& vocabulary = json["model"]["vocab"];
  for (auto& [token, id] : vocabulary.items()) id = id.get<int>() + 256;  // bytes first, as in the families that have them
  for (int byte = 0; byte < 256; ++byte) {
    char name[8];
    std::snprintf(name, sizeof name, "<0x%02X>", byte);
    vocabulary[name] = byte;
  }
  json["added_tokens"][0]["id"] = 279, json["added_tokens"][1]["id"] = 280;
  json["padding"] = json["post_processor"] = nullptr;
  json["decoder"] = {{"type", "Sequence"}, {"decoders", {{{"type", "ByteFallback"}}, {{"type", "Fuse"}}}}};
  Case test(json);
  const Json rows = read_json_file(test.folder / "config.json");
  const SmallerVocabulary smaller(test.folder, 300, test.stores, {});
  for (const std::string letter : {"a", "h"}) EXPECT_TRUE(smaller.tokenizer().id_of(letter)) << "a merge begins with it";
  EXPECT_EQ(smaller.old_ids().front(), 0);
  EXPECT_EQ(smaller.new_id(255), 255);
  const std::string text = "\xc3\xa9t\xc3\xa9 \xe4\xbd\xa0";
  EXPECT_EQ(smaller.tokenizer().decode(smaller.tokenizer().encode(text, false), false), "\xc3\xa9t\xc3\xa9\xe4\xbd\xa0");
}

TEST(SmallerVocabulary, AFolderHasItsIdsEverywhere) {
  Case test;
  PruneConfig config;
  config.model = test.folder;
  config.output = test.scratch / "student";
  config.vocabulary.stores = {(test.scratch / "store").string()};
  config.vocabulary.pad_to_multiple = 8;
  test.add_store("held-out", {"aa abcd bb", "efgh"});
  config.evaluation.stores.push_back({.name = "held-out", .store = test.scratch / "held-out"});
  const PruneReport report = prune(config);
  EXPECT_EQ(report.shape.vocabulary, 24);
  const Json model = read_json_file(report.output / "config.json"), generation = read_json_file(report.output / "generation_config.json");
  EXPECT_EQ(model["eos_token_id"], (Json{15, 5}));
  EXPECT_EQ(model["bos_token_id"], 15);
  EXPECT_EQ(model["vocab_size"], 24);
  EXPECT_EQ(generation["eos_token_id"], 15);
  EXPECT_EQ(generation["pad_token_id"], 15);
  EXPECT_EQ(generation["max_length"], 20);
  EXPECT_EQ(generation["suppress_tokens"], Json::array({1}));
  EXPECT_EQ(generation["bad_words_ids"], Json::array({Json::array({1, 2})}));
  EXPECT_EQ(read_json_file(report.output / "tokenizer_config.json")["added_tokens_decoder"]["16"]["content"], "<tool>");
  EXPECT_EQ(read_json_file(report.output / "added_tokens.json"), (Json{{"<tool>", 16}}));
  EXPECT_FALSE(fs::exists(report.output / "merges.txt"));
  const Json map = read_json_file(report.output / "vocabulary_map.json");
  const std::vector<std::int64_t> old_ids = map["old_ids"].get<std::vector<std::int64_t>>();
  EXPECT_EQ(old_ids.size(), 18u) << "the last row of 64 is the padding token's, counted from the end, and has no token";
  EXPECT_EQ(model["pad_token_id"], 17);
  EXPECT_EQ(map["to"]["tokenizer"], data::Tokenizer::from_file(report.output).hash());
  EXPECT_EQ(map["from"]["rows"], kRows);
  const checkpoints::FolderTensors before(test.folder), after(report.output);
  for (const std::string& name : before.names()) {
    const at::Tensor old = before.tensor(name), now = after.tensor(name);
    if (!name.starts_with("model.embed") && !name.starts_with("lm_head")) {
      EXPECT_TRUE(at::equal(now, old)) << name;
      continue;
    }
    const at::Tensor kept = old.index_select(0, at::tensor(old_ids, at::kLong));
    EXPECT_TRUE(at::equal(now.narrow(0, 0, kept.size(0)), kept)) << name;
    EXPECT_TRUE(at::equal(now[23], kept.mean(0))) << "rows of no token";
  }
  // Measured on text whose tokens are gone: they are spelt with what is left; the bytes are the same.
  const Json& measured = report.evaluation[0];
  EXPECT_EQ(measured["before"]["bytes"], measured["after"]["bytes"]);
  EXPECT_GT(measured["after"]["tokens"].get<int>(), measured["before"]["tokens"].get<int>());
}

TEST(SmallerVocabulary, AUnigramKeepsItsPiecesAndTheLeastScore) {
  Json json = bpe_json();
  Json pieces = Json::array({Json::array({"<unk>", 0.0})});
  double score = -1;
  for (const char* token : {"a", "b", "c", "d", "e", "f", "g", "h", "ab", "cd", "abcd", "bc", "abc", "ef", "gh", "efgh", "de", "fg", "defg", "aa", "bb", "aabb"}) pieces.push_back(Json::array({token, score -= 0.25}));
  json["model"] = {{"type", "Unigram"}, {"unk_id", 0}, {"vocab", pieces}, {"byte_fallback", false}};
  Case test(json);
  const SmallerVocabulary vocabulary = test.smaller();
  EXPECT_GE(vocabulary.new_id(22), 0) << "aabb has the least score";
  EXPECT_EQ(vocabulary.new_id(12), -1);
  const data::Tokenizer old = data::Tokenizer::from_file(test.folder);
  std::vector<std::uint32_t> ids = old.encode("abcd ef xyz efgh", true);
  for (std::uint32_t& id : ids) id = static_cast<std::uint32_t>(vocabulary.new_id(id));
  EXPECT_EQ(vocabulary.tokenizer().encode("abcd ef xyz efgh", true), ids);
  test.add_store("other", {"defg ab"});
  EXPECT_FALSE(vocabulary.write_store(test.stores.back(), test.scratch / "mapped"));
  EXPECT_FALSE(fs::exists(test.scratch / "mapped"));
}

TEST(SmallerVocabulary, RefusesWhatItDoesNotKnow) {
  const auto refused = [](const Json& json, ErrorKind kind, const std::string& words) {
    Case test(json, {"a a"});
    return fails_with(kind, words, [&] { test.smaller(); });
  };
  Json json = bpe_json();
  json["model"] = {{"type", "WordLevel"}, {"vocab", {{"<unk>", 0}, {"a", 1}}}, {"unk_token", "<unk>"}};
  json["added_tokens"] = Json::array();
  json["post_processor"] = json["padding"] = nullptr;
  EXPECT_TRUE(refused(json, ErrorKind::kUsage, "type WordLevel cannot be made smaller"));
  json = bpe_json();
  json["model"]["end_of_word_suffix"] = "h";
  json["model"]["vocab"]["ah"] = 25;
  EXPECT_TRUE(refused(json, ErrorKind::kUsage, "end_of_word_suffix"));
  Case test;
  write_file(test.folder / "generation_config.json", R"({"eos_token_id": 64})");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "names the token id 64", [&] { test.smaller(); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "the model only 10 rows", [&] { SmallerVocabulary(test.folder, 10, test.stores, {}); }));
  fs::remove(test.folder / "generation_config.json");
  Json other = bpe_json();
  std::swap(other["model"]["merges"][0], other["model"]["merges"][1]);
  write_file(test.folder / "tokenizer.json", to_line(other));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "made by another tokenizer", [&] { test.smaller(); }));
}

}  // namespace
}  // namespace alambic::distill
