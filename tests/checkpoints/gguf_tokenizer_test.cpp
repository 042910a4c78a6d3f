// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/gguf_tokenizer.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <limits>

#include "checkpoints/gguf.h"
#include "core/files.h"
#include "core/log.h"
#include "data/chat_template.h"
#include "data/tokenizer.h"
#include "tests/golden.h"
#include "tests/support.h"

namespace alambic::checkpoints {
namespace {

using ::alambic::testing::fails_with;
using ::alambic::testing::golden_path;
using Numbers = std::vector<std::uint32_t>;

// A case of tests/oracle/gguf_tokenizer_oracle.py: metadata (or a GGUF file), and rows of text, ids, ids with BOS (or null).
void expect_case(const std::string& name, const Json& entry) {
  const Json metadata = entry.contains("gguf") ? GgufFile(entry["gguf"].get<std::string>()).metadata() : entry["metadata"];
  const auto tokenizer = data::Tokenizer::from_json(to_line(tokenizer_json_from_gguf(metadata, name)), name);
  EXPECT_EQ(tokenizer.vocabulary_size(), metadata["tokenizer.ggml.tokens"].size()) << name << ": no id may lie outside the embedding";
  ASSERT_GT(entry["rows"].size(), 30u);
  std::size_t wrong = 0;
  for (const Json& row : entry["rows"]) {
    const auto text = row[0].get<std::string>();
    const Numbers ids = tokenizer.encode(text, false), added = tokenizer.encode(text, true);
    if (ids == row[1].get<Numbers>() && (row[2].is_null() || added == row[2].get<Numbers>())) continue;
    if (++wrong <= 3) ADD_FAILURE() << name << ": " << Json(text) << "\n ids " << Json(ids) << "\n with BOS " << Json(added) << "\n expected " << row;
  }
  EXPECT_EQ(wrong, 0u) << name << ": of " << entry["rows"].size();
}

TEST(GgufTokenizer, AgreesWithTransformers) {
  const Json golden = read_json_file(golden_path("gguf_tokenizers.json"));
  SCOPED_TRACE(to_line(golden["script"]) + " " + to_line(golden["versions"]));
  ASSERT_GE(golden["cases"].size(), 11u);
  for (const auto& [name, entry] : golden["cases"].items()) expect_case(name, entry);
}

TEST(GgufTokenizerOracle, AgreesOnManyTexts) {
  const char* input = std::getenv("ALAMBIC_ORACLE_INPUT");
  if (!input) GTEST_SKIP() << "run by tests/oracle/gguf_tokenizer_oracle.py";
  for (const auto& [name, entry] : read_json_file(input, 1ull << 30)["cases"].items()) expect_case(name, entry);
}

Json metadata_of(const std::string& name) { return read_json_file(golden_path("gguf_tokenizers.json"))["cases"][name]["metadata"]; }

TEST(GgufTokenizer, AddSpacePrefixIsObeyed) {
  Json metadata = metadata_of("sentencepiece bpe");
  const auto encode = [&](const char* text) {
    return data::Tokenizer::from_json(to_line(tokenizer_json_from_gguf(metadata, "test")), "test").encode(text, false);
  };
  const Numbers with = encode("the");
  metadata["tokenizer.ggml.add_space_prefix"] = false;
  EXPECT_NE(with, encode("the"));
  EXPECT_EQ(with, encode(" the"));
}

TEST(GgufTokenizer, ConfigNamesTheSpecialTokens) {
  Json metadata = metadata_of("byte_level llama-bpe");
  metadata["tokenizer.chat_template"] = "{{ bos_token }}";
  metadata["llama.context_length"] = 2048;
  const Json config = tokenizer_config_from_gguf(metadata, "test");
  EXPECT_EQ(config["bos_token"], "<|im_start|>");
  EXPECT_EQ(config["eos_token"], "<|im_end|>");
  EXPECT_EQ(config["unk_token"], "<|endoftext|>");
  EXPECT_EQ(config["pad_token"], "<|im_end|>");
  EXPECT_EQ(config["add_bos_token"], true);
  EXPECT_EQ(config["add_eos_token"], false);
  EXPECT_EQ(config["model_max_length"], 2048);
  EXPECT_EQ(config["chat_template"], "{{ bos_token }}");
  EXPECT_FALSE(tokenizer_config_from_gguf(metadata_of("byte_level qwen2"), "test").contains("chat_template"));
}

TEST(GgufTokenizer, AMissingPreTokenizerIsSaid) {
  Json metadata = metadata_of("byte_level default");
  metadata.erase("tokenizer.ggml.pre");
  std::string said;
  const LogSink before = set_log_sink([&](LogLevel, std::string_view line) { said += line; });
  const Json made = tokenizer_json_from_gguf(metadata, "x.gguf");
  set_log_sink(before);
  EXPECT_EQ(made["pre_tokenizer"]["type"], "ByteLevel");
  EXPECT_NE(said.find("x.gguf: names no pre-tokenizer"), std::string::npos);
}

TEST(GgufTokenizerDamage, IsRefusedByName) {
  const auto refuses = [](const char* words, const std::function<void(Json&)>& change, const char* name = "byte_level qwen2") {
    Json metadata = metadata_of(name);
    change(metadata);
    return fails_with(ErrorKind::kData, words, [&] { (void)tokenizer_json_from_gguf(metadata, "x.gguf"); });
  };
  EXPECT_TRUE(refuses("tokenizer.ggml.pre is \"martian\"; known are default, gpt-2", [](Json& m) { m["tokenizer.ggml.pre"] = "martian"; }));
  EXPECT_TRUE(refuses("tokenizer.ggml.model is \"bert\"; known are gpt2, llama, t5", [](Json& m) { m["tokenizer.ggml.model"] = "bert"; }));
  EXPECT_TRUE(refuses("tokenizer.ggml.model is missing", [](Json& m) { m.erase("tokenizer.ggml.model"); }));
  EXPECT_TRUE(refuses("tokenizer.ggml.tokens is missing", [](Json& m) { m.erase("tokenizer.ggml.tokens"); }));
  EXPECT_TRUE(refuses("tokenizer.ggml.tokens is not an array", [](Json& m) { m["tokenizer.ggml.tokens"] = "a"; }));
  EXPECT_TRUE(refuses("tokenizer.ggml.tokens[3] is number", [](Json& m) { m["tokenizer.ggml.tokens"][3] = 3; }));
  EXPECT_TRUE(refuses("has 5000 bytes", [](Json& m) { m["tokenizer.ggml.tokens"][3] = std::string(5000, 'a'); }));
  EXPECT_TRUE(refuses("tokenizer.ggml.token_type has 1 entries", [](Json& m) { m["tokenizer.ggml.token_type"] = {1}; }));
  EXPECT_TRUE(refuses("tokenizer.ggml.merges is missing", [](Json& m) { m.erase("tokenizer.ggml.merges"); }));
  EXPECT_TRUE(refuses("tokenizer.ggml.merges[0] \"ab\": not two tokens", [](Json& m) { m["tokenizer.ggml.merges"][0] = "ab"; }));
  EXPECT_TRUE(refuses("tokenizer.ggml.merges[0] \"a qqq\": a token of it is not", [](Json& m) { m["tokenizer.ggml.merges"][0] = "a qqq"; }));
  EXPECT_TRUE(refuses("tokenizer.ggml.bos_token_id is 99999, and there are", [](Json& m) { m["tokenizer.ggml.bos_token_id"] = 99999; }));
  EXPECT_TRUE(refuses("tokenizer.ggml.eos_token_id", [](Json& m) { m["tokenizer.ggml.eos_token_id"] = "2"; }));
  EXPECT_TRUE(refuses("tokenizer.ggml.add_bos_token", [](Json& m) { m["tokenizer.ggml.add_bos_token"] = 3; }));
  EXPECT_TRUE(refuses("neither tokenizer.ggml.merges nor tokenizer.ggml.scores", [](Json& m) { m.erase("tokenizer.ggml.scores"); }, "sentencepiece bpe"));
  EXPECT_TRUE(refuses("tokenizer.ggml.scores[1] is string", [](Json& m) { m["tokenizer.ggml.scores"][1] = "x"; }, "sentencepiece bpe"));
  for (const double score : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()})
    EXPECT_TRUE(refuses("tokenizer.ggml.scores[1] is not a finite number", [&](Json& m) { m["tokenizer.ggml.scores"][1] = score; }, "sentencepiece bpe"));
  EXPECT_TRUE(refuses("their merges would take more than 128 MiB", [](Json& m) {
    for (const char* key : {"tokens", "scores"}) m[std::string("tokenizer.ggml.") + key] = Json::array();
    m.erase("tokenizer.ggml.token_type");
    for (std::size_t length = 1; length <= 1200; ++length) {  // each token is any two that are shorter
      m["tokenizer.ggml.tokens"].push_back(std::string(length, 'a'));
      m["tokenizer.ggml.scores"].push_back(0);
    }
  }, "sentencepiece bpe"));
  EXPECT_TRUE(refuses("not an array of bytes", [](Json& m) { m["tokenizer.ggml.precompiled_charsmap"] = {300}; }, "sentencepiece bpe"));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "no metadata", [] { (void)tokenizer_json_from_gguf(nullptr, "x.gguf"); }));
}

}  // namespace
}  // namespace alambic::checkpoints
