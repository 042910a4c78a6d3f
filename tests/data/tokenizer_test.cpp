// SPDX-License-Identifier: Apache-2.0
#include "data/tokenizer.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>

#include "core/files.h"
#include "core/json.h"
#include "tests/golden.h"
#include "tests/support.h"

namespace alambic::data {
namespace {

using ::alambic::testing::fails_with;
using ::alambic::testing::golden_path;
using ::alambic::testing::ScratchFolder;

using Numbers = std::vector<std::uint32_t>;

Tokenizer small(const std::string& name) {
  return Tokenizer::from_json(to_line(read_json_file(golden_path("tokenizers.json"))["cases"][name]["tokenizer"]), name);
}

// Rows of tests/oracle/tokenizer_oracle.py: text, ids, ids with special tokens, begins, ends, decoded, decoded without them.
void expect_rows(const std::string& name, const Json& entry) {
  const Tokenizer tokenizer = Tokenizer::from_json(to_line(entry["tokenizer"]), name);
  ASSERT_GT(entry["rows"].size(), 50u);
  std::size_t wrong = 0;
  for (const Json& row : entry["rows"]) {
    const auto text = row[0].get<std::string>();
    const Encoding with_offsets = tokenizer.encode_with_offsets(text, false);
    const auto added = row[2].get<Numbers>();
    const bool right = tokenizer.encode(text, false) == row[1].get<Numbers>() && tokenizer.encode(text, true) == added &&
                       with_offsets.ids == row[1].get<Numbers>() && with_offsets.begin_byte == row[3].get<Numbers>() &&
                       with_offsets.end_byte == row[4].get<Numbers>() && tokenizer.decode(added, false) == row[5].get<std::string>() &&
                       tokenizer.decode(added, true) == row[6].get<std::string>();
    if (!right && ++wrong <= 3)
      ADD_FAILURE() << name << ": " << Json(text) << "\n ids " << Json(tokenizer.encode(text, false)) << "\n expected " << row << "\n begins "
                    << Json(with_offsets.begin_byte) << "\n ends " << Json(with_offsets.end_byte);
  }
  EXPECT_EQ(wrong, 0u) << "of " << entry["rows"].size();
}

TEST(Tokenizer, AgreesWithPython) {
  const Json golden = read_json_file(golden_path("tokenizers.json"));
  SCOPED_TRACE(to_line(golden["script"]) + " " + to_line(golden["versions"]));
  ASSERT_EQ(golden["cases"].size(), 5u);
  for (const auto& [name, entry] : golden["cases"].items()) expect_rows(name, entry);
}

TEST(TokenizerOracle, AgreesWithPythonOnManyTexts) {
  const char* input = std::getenv("ALAMBIC_ORACLE_INPUT");
  if (!input) GTEST_SKIP() << "run by tests/oracle/tokenizer_oracle.py";
  for (const auto& [name, entry] : read_json_file(input, 1ull << 30)["cases"].items()) expect_rows(name, entry);
}

TEST(Tokenizer, KnowsItsVocabulary) {
  const Json golden = read_json_file(golden_path("tokenizers.json"));
  for (const auto& [name, entry] : golden["cases"].items()) {
    const Tokenizer tokenizer = small(name);
    EXPECT_EQ(tokenizer.vocabulary_size(), entry["vocabulary_size"].get<std::uint32_t>()) << name;
    EXPECT_FALSE(tokenizer.token_of(tokenizer.vocabulary_size()).has_value());
    EXPECT_FALSE(tokenizer.token_of(0xFFFFFFFFu).has_value());
    EXPECT_TRUE(tokenizer.token_of(tokenizer.vocabulary_size() - 1).has_value());
  }
  const Tokenizer tokenizer = small("byte_level_bpe");
  EXPECT_EQ(tokenizer.id_of("<|im_start|>"), std::optional<std::uint32_t>(2));
  EXPECT_EQ(tokenizer.token_of(2), "<|im_start|>");
  EXPECT_EQ(tokenizer.id_of("no such token"), std::nullopt);
  EXPECT_EQ(tokenizer.id_of("\xff"), std::nullopt);
}

TEST(Tokenizer, HashIsThatOfTheIds) {
  const std::string json = small("byte_level_bpe").json();
  const auto hash_after = [&](const std::function<void(Json&)>& change) {
    Json changed = parse_json(json, "test");
    change(changed);
    return Tokenizer::from_json(to_line(changed), "test").hash();
  };
  const std::string hash = Tokenizer::from_json(json, "test").hash();
  EXPECT_EQ(hash.size(), 64u);
  // The golden asks for truncation and padding: neither decides an id, nor does the decoder, nor the order of keys.
  EXPECT_EQ(hash, hash_after([](Json& t) { t["truncation"] = nullptr; }));
  EXPECT_EQ(hash, hash_after([](Json& t) { t["padding"] = nullptr; }));
  EXPECT_EQ(hash, hash_after([](Json& t) { t["decoder"] = nullptr; }));
  EXPECT_EQ(hash, hash_after([](Json& t) {
              Json reversed = Json::object();
              std::vector<std::pair<std::string, Json>> entries;
              for (const auto& [token, id] : t["model"]["vocab"].items()) entries.emplace_back(token, id);
              for (auto entry = entries.rbegin(); entry != entries.rend(); ++entry) reversed[entry->first] = entry->second;
              t["model"]["vocab"] = reversed;
            }));
  EXPECT_NE(hash, hash_after([](Json& t) { std::swap(t["model"]["merges"][0], t["model"]["merges"][1]); }));
  EXPECT_NE(hash, hash_after([](Json& t) { t["normalizer"] = nullptr; }));
  EXPECT_NE(hash, hash_after([](Json& t) { t["post_processor"] = nullptr; }));
  EXPECT_NE(hash, hash_after([](Json& t) {
              auto& vocab = t["model"]["vocab"];
              std::swap(vocab["a"], vocab["b"]);
            }));
  EXPECT_NE(hash, small("sentencepiece_bpe").hash());
}

TEST(Tokenizer, IgnoresTruncationAndPadding) {
  const Tokenizer tokenizer = small("byte_level_bpe");
  EXPECT_GT(tokenizer.encode("a longer text than three tokens hold, 1 2 3 4 5 6 7 8", true).size(), 20u);
  EXPECT_EQ(tokenizer.encode("a", false).size(), 1u);
}

TEST(Tokenizer, IsReadFromAFolderOrAFile) {
  const ScratchFolder scratch;
  write_file(scratch / "tokenizer.json", small("unigram").json());
  EXPECT_EQ(Tokenizer::from_file(scratch.path()).hash(), small("unigram").hash());
  EXPECT_EQ(Tokenizer::from_file(scratch / "tokenizer.json").hash(), small("unigram").hash());
  EXPECT_TRUE(fails_with(ErrorKind::kData, "no such file", [&] { Tokenizer::from_file(scratch / "elsewhere"); }));
}

TEST(Tokenizer, EncodesOnSeveralThreads) {
  const Json golden = read_json_file(golden_path("tokenizers.json"));
  const Tokenizer tokenizer = small("byte_level_bpe");
  const Json& rows = golden["cases"]["byte_level_bpe"]["rows"];
  std::atomic<std::size_t> wrong = 0, done = 0;
  {
    std::vector<std::jthread> threads;
    for (int t = 0; t < 4; ++t)
      threads.emplace_back([&] {
        for (int round = 0; round < 5; ++round)
          for (const Json& row : rows) {
            if (tokenizer.encode(row[0].get<std::string>(), false) != row[1].get<Numbers>()) ++wrong;
            ++done;
          }
      });
  }
  EXPECT_EQ(wrong, 0u);
  EXPECT_EQ(done, 20 * rows.size());
}

TEST(Tokenizer, RefusesTextThatIsNotUtf8) {
  const Tokenizer tokenizer = small("byte_level_bpe");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "not UTF-8 at byte 2", [&] { (void)tokenizer.encode("ab\xff", false); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "not UTF-8", [&] { (void)tokenizer.encode_with_offsets("\xed\xa0\x80", false); }));
}

TEST(Tokenizer, DecodesIdsThatDoNotExistToNothing) {
  const Tokenizer tokenizer = small("byte_level_bpe");
  const Numbers ids = {0xFFFFFFFFu, 123456789u};
  EXPECT_EQ(tokenizer.decode(ids, false), "");
  EXPECT_EQ(tokenizer.decode({}, false), "");
}

// ---- damage ----

TEST(TokenizerDamage, EveryPrefixIsRefused) {
  const std::string json = small("word_level").json();
  for (std::size_t size = 0; size < json.size(); size += 1 + json.size() / 300)
    EXPECT_TRUE(fails_with(ErrorKind::kData, "cut: not a tokenizer", [&] { Tokenizer::from_json(std::string_view(json).substr(0, size), "cut"); }));
}

TEST(TokenizerDamage, WrongTypesAreRefused) {
  const std::string json = small("byte_level_bpe").json();
  for (const char* key : {"model", "added_tokens", "pre_tokenizer", "normalizer"}) {
    Json changed = parse_json(json, "test");
    changed[key] = 17;
    EXPECT_TRUE(fails_with(ErrorKind::kData, "not a tokenizer", [&] { Tokenizer::from_json(to_line(changed), "changed"); })) << key;
  }
  for (const char* text : {"null", "[]", "{}", "\"x\"", "{\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[]}}", "\xff\xfe", ""})
    EXPECT_TRUE(fails_with(ErrorKind::kData, "not a tokenizer", [&] { Tokenizer::from_json(text, "odd"); })) << text;
}

TEST(TokenizerDamage, DeepNestingIsRefused) {
  std::string json = "{\"version\":\"1.0\",\"normalizer\":";
  for (int i = 0; i < 100'000; ++i) json += "{\"type\":\"Sequence\",\"normalizers\":[";
  EXPECT_TRUE(fails_with(ErrorKind::kData, "not a tokenizer", [&] { Tokenizer::from_json(json, "deep"); }));
}

TEST(TokenizerDamage, AHugeIdIsRefused) {
  Json changed = parse_json(small("word_level").json(), "test");
  changed["model"]["vocab"]["far"] = 4294967295u;
  EXPECT_TRUE(fails_with(ErrorKind::kData, "4294967295", [&] { Tokenizer::from_json(to_line(changed), "huge"); }));
}

TEST(TokenizerDamage, DropoutIsRefused) {
  Json changed = parse_json(small("byte_level_bpe").json(), "test");
  changed["model"]["dropout"] = 0.1;
  EXPECT_TRUE(fails_with(ErrorKind::kData, "dropout", [&] { Tokenizer::from_json(to_line(changed), "random"); }));
}

// A crafted file that makes the crate panic: the process goes on.
TEST(TokenizerDamage, APanicIsAnError) {
  Json changed = parse_json(small("unigram").json(), "test");
  changed["normalizer"] = {{"type", "Precompiled"}, {"precompiled_charsmap", "BAAAAAAAAAA="}};
  EXPECT_TRUE(fails_with(ErrorKind::kData, "panicked", [&] {
    const Tokenizer tokenizer = Tokenizer::from_json(to_line(changed), "crafted");
    (void)tokenizer.encode("abc", false);
  }));
  EXPECT_EQ(small("unigram").encode("", false).size(), 0u);  // the bridge still works
}

// The same charsmap with a length that lies: it asks for 16 GB.
TEST(TokenizerDamage, AFileThatAsksForTooMuchMemoryIsRefused) {
  Json changed = parse_json(small("unigram").json(), "test");
  changed["normalizer"] = {{"type", "Precompiled"}, {"precompiled_charsmap", "/////w=="}};
  EXPECT_TRUE(fails_with(ErrorKind::kData, "more than 1024 MiB of memory", [&] { Tokenizer::from_json(to_line(changed), "crafted"); }));
  EXPECT_EQ(small("unigram").encode("", false).size(), 0u);
}

TEST(TokenizerDamage, AnEndlessPatternIsAnErrorInTime) {
  Json changed = parse_json(small("byte_level_bpe").json(), "test");
  changed["pre_tokenizer"] = {{"type", "Split"}, {"pattern", {{"Regex", "(?:a|aa)+c"}}}, {"behavior", "Isolated"}, {"invert", false}};
  std::string text(50'000, 'a');
  text.append("dc");
  const auto start = std::chrono::steady_clock::now();
  EXPECT_TRUE(fails_with(ErrorKind::kData, "retry-limit", [&] {
    const Tokenizer tokenizer = Tokenizer::from_json(to_line(changed), "endless");
    (void)tokenizer.encode(text, false);
  }));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
}

}  // namespace
}  // namespace alambic::data
