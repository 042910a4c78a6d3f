// SPDX-License-Identifier: Apache-2.0
// tests/oracle/extend_oracle.py compares extended folders with transformers; here is what needs no other program.
#include "checkpoints/extend_folder.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include "checkpoints/hf_folder.h"
#include "checkpoints/manifest.h"
#include "checkpoints/safetensors.h"
#include "core/files.h"
#include "core/log.h"
#include "data/tokenizer.h"
#include "tests/closeness.h"
#include "tests/golden.h"
#include "tests/support.h"

namespace alambic::checkpoints {
namespace {

using testing::fails_with;
using testing::golden_path;
using testing::is_close;
using testing::ScratchFolder;

const std::string kEmbedding = "model.embed_tokens.weight", kHead = "lm_head.weight";
constexpr std::int64_t kRows = 48;  // of the tiny models
constexpr std::int64_t kUsed = 42;  // of the tokenizer below: the model has six rows for no token

/// Letters, two merges, words split at spaces, lower case: "abcd" is "ab" "cd".
std::string tokenizer_json() {
  Json vocabulary = {{"<unk>", 0}};
  for (char letter = 'a'; letter <= 'z'; ++letter) vocabulary[std::string(1, letter)] = vocabulary.size();
  vocabulary["ab"] = 27, vocabulary["cd"] = 28;
  for (int i = 29; i < kUsed - 1; ++i) vocabulary["unused" + std::to_string(i)] = i;
  vocabulary["</s>"] = kUsed - 1;
  return to_line({{"version", "1.0"},
                  {"truncation", nullptr},
                  {"padding", nullptr},
                  {"added_tokens", Json::array({{{"id", kUsed - 1}, {"content", "</s>"}, {"single_word", false}, {"lstrip", false}, {"rstrip", false}, {"normalized", false}, {"special", true}}})},
                  {"normalizer", {{"type", "Lowercase"}}},
                  {"pre_tokenizer", {{"type", "WhitespaceSplit"}}},
                  {"post_processor", nullptr},
                  {"decoder", {{"type", "Fuse"}}},
                  {"model", {{"type", "BPE"}, {"dropout", nullptr}, {"unk_token", "<unk>"}, {"continuing_subword_prefix", nullptr}, {"end_of_word_suffix", nullptr},
                             {"fuse_unk", false}, {"byte_fallback", false}, {"ignore_merges", false}, {"vocab", vocabulary}, {"merges", {"a b", "c d"}}}}});
}

struct Case {
  ScratchFolder scratch;
  ExtendConfig config;
  std::string log;
  LogSink old = set_log_sink([this](LogLevel, std::string_view line) { log += std::string(line) + "\n"; });
  ~Case() { set_log_sink(old); }

  explicit Case(const std::string& model = "llama_tied", at::ScalarType type = at::kFloat) {
    config.base = scratch / "some-base";
    config.output = scratch / "extended";
    config.tokens = {"abcd", "wxyz", "ab!"};
    fs::create_directory(config.base);
    fs::copy(golden_path("peft/" + model) / "config.json", config.base / "config.json");
    const FolderTensors tensors(golden_path("peft/" + model));
    std::vector<TensorToWrite> list;  // norms stay f32: a folder of two types
    for (const std::string& name : tensors.names()) list.push_back({name, tensors.shape(name).size() == 2 ? type : at::kFloat, tensors.shape(name)});
    write_weights(config.base, list, [&](std::size_t i) { return tensors.tensor_as(list[i].name, list[i].type); });
    write_file(config.base / "tokenizer.json", tokenizer_json());
    write_file(config.base / "tokenizer_config.json", R"({"added_tokens_decoder": {"41": {"content": "</s>"}}, "eos_token": "</s>"})");
    write_file(config.base / "README.md", "---\nlicense: apache-2.0\n---\n# Some base\n");
    write_file(config.base / "LICENSE", "terms\n");
  }
  ::testing::AssertionResult refused(ErrorKind kind, const std::string& words) const {
    const bool was_there = fs::exists(config.output);
    const ::testing::AssertionResult result = fails_with(kind, words, [&] { extend_folder(config); });
    if (fs::exists(config.output) && !was_there) return ::testing::AssertionFailure() << "something was published";
    for (const auto& entry : fs::directory_iterator(scratch.path()))
      if (entry.path().filename().string().starts_with(".tmp-")) return ::testing::AssertionFailure() << "left behind: " << entry.path();
    return result;
  }
};

at::Tensor logits_of(const models::Decoder& decoder) {
  const at::NoGradGuard evaluating;
  const at::Tensor ids = at::arange(30);
  return decoder.logits_TV(decoder.hidden_TD({.tokens_T = ids, .positions_T = ids, .document_lengths = {30}}));
}

at::Tensor mean_of(const at::Tensor& table_VD, const std::vector<std::int64_t>& pieces) {
  return table_VD.index_select(0, at::tensor(pieces, at::kLong)).to(at::kFloat).mean(0).to(table_VD.scalar_type());
}

TEST(ExtendFolder, NewRowsAreMeansOfPiecesAndAllElseIsAsItWas) {
  for (const auto& [model, type] : {std::pair{"llama_tied", at::kFloat}, std::pair{"llama_untied", at::kFloat}, std::pair{"llama_untied", at::kBFloat16}}) {
    SCOPED_TRACE(std::string(model) + " " + toString(type));
    Case extend(model, type);
    for (int i = 0; i < 6; ++i) extend.config.tokens.push_back("word" + std::string(1, static_cast<char>('a' + i)));  // nine: three more than the rows left
    extend.config.pad_to_multiple = 16;
    const ExtendReport report = extend_folder(extend.config);
    EXPECT_EQ(report.rows_before, kRows);
    EXPECT_EQ(report.rows, 64);
    EXPECT_EQ(report.head_tied, model == std::string("llama_tied"));
    ASSERT_EQ(report.tokens.size(), 9u);
    EXPECT_EQ(report.tokens[0].id, kUsed);
    EXPECT_EQ(report.tokens[8].id, kUsed + 8);
    EXPECT_EQ(report.tokens[0].pieces, (std::vector<std::int64_t>{27, 28}));
    EXPECT_EQ(report.tokens[1].pieces, (std::vector<std::int64_t>{23, 24, 25, 26}));
    EXPECT_EQ(report.tokens[2].pieces, (std::vector<std::int64_t>{27, 0})) << "what cannot be spelt is the unknown token's row";

    const FolderTensors before(extend.config.base), after(extend.config.output);
    EXPECT_EQ(after.names(), before.names());
    int tables = 0;
    for (const std::string& name : before.names()) {
      EXPECT_EQ(after.type(name), before.type(name)) << name;
      const at::Tensor old = before.tensor(name), now = after.tensor(name);
      if (name != kEmbedding && name != kHead) {
        EXPECT_TRUE(at::equal(now, old)) << name;
        continue;
      }
      ++tables;
      EXPECT_EQ(now.sizes(), (std::vector<std::int64_t>{64, 16}));
      EXPECT_TRUE(at::equal(now.narrow(0, 0, kUsed), old.narrow(0, 0, kUsed))) << name;
      for (const NewToken& token : report.tokens) EXPECT_TRUE(at::equal(now[token.id], mean_of(old, token.pieces))) << name << " " << token.text;
      const at::Tensor mean_D = old.narrow(0, 0, kUsed).to(at::kFloat).mean(0).to(type);
      for (std::int64_t row = kUsed + 9; row < 64; ++row) EXPECT_TRUE(at::equal(now[row], mean_D)) << row;
    }
    EXPECT_EQ(tables, report.head_tied ? 1 : 2);

    // Text of before gives the logits of before, for the tokens of before.
    const models::Decoder old_model = load_decoder(extend.config.base, at::kFloat), new_model = load_decoder(extend.config.output, at::kFloat);
    EXPECT_EQ(new_model.config.vocabulary_size, 64);
    EXPECT_TRUE(is_close(logits_of(new_model).narrow(1, 0, kUsed), logits_of(old_model).narrow(1, 0, kUsed), {.relative = 1e-5, .absolute = 1e-5}));
  }
}

TEST(ExtendFolder, TheTokenizerFindsNewTokensAndReadsOldTextAsBefore) {
  Case extend;
  extend_folder(extend.config);
  const data::Tokenizer before = data::Tokenizer::from_file(extend.config.base), after = data::Tokenizer::from_file(extend.config.output);
  using Ids = std::vector<std::uint32_t>;
  EXPECT_EQ(after.encode("cd abc</s> zz", true), before.encode("cd abc</s> zz", true));
  EXPECT_EQ(after.encode("c ABCD wxyz", true), (Ids{3, kUsed, kUsed + 1})) << "found in the normalised text";
  EXPECT_EQ(after.encode("ab!ab", true), (Ids{kUsed + 2, 27}));
  EXPECT_EQ(after.decode(Ids{kUsed, 3}, true), "abcdc");
  const Json told = read_json_file(extend.config.output / "tokenizer_config.json");
  EXPECT_EQ(told["added_tokens_decoder"]["42"]["content"], "abcd");
  EXPECT_EQ(told["added_tokens_decoder"]["42"]["normalized"], true);
  EXPECT_EQ(told["added_tokens_decoder"]["41"]["content"], "</s>");
}

TEST(ExtendFolder, SpecialTokensAreFoundAsWrittenAndCanBeLeftOut) {
  Case extend;
  extend.config.tokens = {"<|Tool|>"};
  extend.config.special = true;
  const ExtendReport report = extend_folder(extend.config);
  const data::Tokenizer after = data::Tokenizer::from_file(extend.config.output);
  using Ids = std::vector<std::uint32_t>;
  EXPECT_EQ(report.tokens[0].id, kUsed);
  EXPECT_EQ(after.encode("ab<|Tool|>", true), (Ids{27, kUsed}));
  EXPECT_NE(after.encode("ab<|tool|>", true), (Ids{27, kUsed}));
  EXPECT_EQ(after.decode(Ids{27, kUsed}, true), "ab");
  EXPECT_EQ(after.decode(Ids{27, kUsed}, false), "ab<|Tool|>");
}

TEST(ExtendFolder, OtherFirstRows) {
  Case extend;
  extend.config.init = "mean-norm";
  extend_folder(extend.config);
  const at::Tensor old_VD = FolderTensors(extend.config.base).tensor(kEmbedding);
  const at::Tensor row_D = FolderTensors(extend.config.output).tensor(kEmbedding)[kUsed], mean_D = mean_of(old_VD, {27, 28});
  const double wanted = (old_VD[27].norm().item<double>() + old_VD[28].norm().item<double>()) / 2;
  EXPECT_NEAR(row_D.norm().item<double>(), wanted, 1e-5);
  EXPECT_TRUE(is_close(row_D / row_D.norm(), mean_D / mean_D.norm(), {.absolute = 1e-6}));

  extend.config.init = "random";
  const auto row_of = [&](const std::string& output, std::uint64_t seed) {
    extend.config.output = extend.scratch / output;
    extend.config.seed = seed;
    extend_folder(extend.config);
    return FolderTensors(extend.config.output).tensor(kEmbedding)[kUsed].clone();
  };
  const at::Tensor one = row_of("one", 1);
  EXPECT_TRUE(at::equal(one, row_of("again", 1)));
  EXPECT_FALSE(at::equal(one, row_of("other", 2)));
  const at::Tensor real_VD = old_VD.narrow(0, 0, kUsed);
  EXPECT_LT(((one - real_VD.mean(0)) / real_VD.std(0)).abs().max().item<double>(), 5);
}

TEST(ExtendFolder, RefusesTokensThatCannotBeAdded) {
  Case extend;
  const auto refused = [&](const std::vector<std::string>& tokens, const std::string& words, ErrorKind kind = ErrorKind::kUsage) {
    extend.config.tokens = tokens;
    return extend.refused(kind, words);
  };
  EXPECT_TRUE(refused({}, "no token was given"));
  EXPECT_TRUE(refused({"abcd", ""}, "token number 2: empty"));
  EXPECT_TRUE(refused({"abcd", "efgh", "abcd"}, "token number 3 \"abcd\": given already as number 1"));
  EXPECT_TRUE(refused({"ab"}, "has it already, with the id 27"));
  EXPECT_TRUE(refused({"</s>"}, "has it already, with the id 41"));
  EXPECT_TRUE(refused({"AB"}, "is one token already, \"ab\" with the id 27")) << "normalises to a token of the vocabulary";
  EXPECT_TRUE(refused({" "}, "makes nothing of it"));
  EXPECT_TRUE(refused({"\xff\xfe"}, "not UTF-8"));
  EXPECT_TRUE(refused({"x</s>y"}, "another token lies in its text"));
  extend.config.tokens = {"efgh", "EFGH"};  // one in the normalised text; which of the two is found there is not promised
  EXPECT_TRUE(extend.refused(ErrorKind::kUsage, "normalises to another"));
  const std::string both = [&] {
    extend.config.tokens = {"", "ab"};
    try {
      extend_folder(extend.config);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  }();
  EXPECT_NE(both.find("number 1: empty"), std::string::npos) << both;
  EXPECT_NE(both.find("number 2 \"ab\""), std::string::npos) << "all at once: " << both;
}

TEST(ExtendFolder, RefusesFoldersThatDoNotFit) {
  Case extend;
  const ExtendConfig config = extend.config;
  extend.config.init = "zero";
  EXPECT_TRUE(extend.refused(ErrorKind::kUsage, "init: \"zero\""));
  extend.config = config;
  extend.config.pad_to_multiple = 0;
  EXPECT_TRUE(extend.refused(ErrorKind::kUsage, "pad_to_multiple"));
  extend.config = config;
  fs::remove(config.base / "tokenizer.json");
  EXPECT_TRUE(extend.refused(ErrorKind::kData, "tokenizer.json"));
  std::string larger = tokenizer_json();
  larger.replace(larger.find("\"</s>\":41"), 9, "\"</s>\":60");
  write_file(config.base / "tokenizer.json", larger);
  EXPECT_TRUE(extend.refused(ErrorKind::kData, "has 61 tokens, the model only 48 rows"));
  write_file(config.base / "tokenizer.json", tokenizer_json());
  Json json = read_json_file(config.base / "config.json");
  json["vocab_size"] = 50;
  write_file(config.base / "config.json", json.dump());
  EXPECT_TRUE(extend.refused(ErrorKind::kData, "must be of a floating type and [50, 16]"));
}

TEST(ExtendFolder, TheSameExtensionIsDoneAnotherIsRefused) {
  Case extend;
  const ExtendReport first = extend_folder(extend.config);
  EXPECT_FALSE(first.already_done);
  EXPECT_EQ(read_file(extend.config.output / "LICENSE"), "terms\n");
  const std::string card = read_file(extend.config.output / "README.md");
  for (const char* words : {"license: apache-2.0", "Nothing was trained", "| token 42 | abcd |"}) EXPECT_NE(card.find(words), std::string::npos) << words << "\n" << card;
  EXPECT_EQ(check_manifest(extend.config.output)["tokens"][0]["pieces"], Json({27, 28}));
  const ExtendReport second = extend_folder(extend.config);
  EXPECT_TRUE(second.already_done);
  EXPECT_EQ(second.tokens[1].id, first.tokens[1].id);
  extend.config.tokens.pop_back();
  EXPECT_TRUE(extend.refused(ErrorKind::kUsage, "another folder than this extension would make"));

  // An extended folder is a base like any other.
  extend.config.base = extend.config.output;
  extend.config.output = extend.scratch / "twice";
  extend.config.tokens = {"abcdx"};
  const ExtendReport third = extend_folder(extend.config);
  EXPECT_EQ(third.tokens[0].pieces, (std::vector<std::int64_t>{kUsed, 24})) << "the new token is a piece now";
  EXPECT_EQ(third.tokens[0].id, kUsed + 3);
}

}  // namespace
}  // namespace alambic::checkpoints
