// SPDX-License-Identifier: Apache-2.0
// Adapters with trained rows of some tokens (trainable_token_indices), in PEFT's folders: tests/oracle/token_rows_oracle.py.
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "checkpoints/hf_folder.h"
#include "checkpoints/merge_folder.h"
#include "checkpoints/peft_folder.h"
#include "checkpoints/safetensors.h"
#include "core/files.h"
#include "core/json.h"
#include "core/log.h"
#include "tests/closeness.h"
#include "tests/golden.h"
#include "tests/support.h"

namespace alambic::checkpoints {
namespace {

using testing::fails_with;
using testing::Golden;
using testing::golden_path;
using testing::is_close;
using testing::ScratchFolder;

const char* const kCases[] = {"llama_tied.rows", "llama_tied.rows_of_both", "llama_untied.rows", "llama_untied.rows_of_both", "llama_untied.rows_and_head", "gemma3.rows"};
const std::vector<std::int64_t> kRows = {5, 9, 40, 2};

fs::path base_of(const std::string& name) { return golden_path("peft/" + name.substr(0, name.find('.'))); }

at::Tensor logits_of(const models::Decoder& decoder) {
  const at::Tensor ids = Golden("rows/rows.safetensors")["ids"][0];
  const at::NoGradGuard evaluating;
  return decoder.logits_TV(decoder.hidden_TD({.tokens_T = ids, .positions_T = at::arange(ids.numel()), .document_lengths = {ids.numel()}}));
}

class TokenRows : public ::testing::TestWithParam<const char*> {};

TEST_P(TokenRows, OfPeftGivePeftsLogitsAndAreWrittenAsPeftWritesThem) {
  const std::string name = GetParam();
  const ScratchFolder scratch;
  const char* const kept = std::getenv("ALAMBIC_TEST_OUTPUT");
  const fs::path theirs = golden_path("rows/" + name), ours = (kept ? fs::path(kept) : scratch.path()) / name;
  const Golden peft("rows/rows.safetensors");
  SCOPED_TRACE(peft.provenance());
  models::Decoder decoder = load_decoder(base_of(name), at::kFloat);
  const at::Tensor before = logits_of(decoder);
  const at::Tensor table_VD = decoder.embedding_VD.clone();
  const lora::LoraConfig config = load_adapter(decoder, theirs);
  EXPECT_EQ(decoder.token_row_ids, kRows);
  EXPECT_EQ(decoder.token_rows_ND.sizes(), (std::vector<std::int64_t>{4, 16}));
  EXPECT_TRUE(is_close(logits_of(decoder), peft[name + ".logits"], {.relative = 1e-4, .absolute = 1e-4}));
  EXPECT_FALSE(is_close(logits_of(decoder), before, {.absolute = 1e-2})) << "the adapter changes nothing: the test is void";
  EXPECT_TRUE(at::equal(decoder.embedding_VD, table_VD)) << "the frozen table was written to";

  write_adapter(decoder, config, "some/base", ours);
  const SafetensorsFile expected(theirs / "adapter_model.safetensors"), written(ours / "adapter_model.safetensors");
  EXPECT_EQ(written.entries().size(), expected.entries().size());
  for (const auto& [key, entry] : expected.entries()) {
    ASSERT_TRUE(written.entries().contains(key)) << key;
    EXPECT_TRUE(at::equal(written.tensor(key), expected.tensor(key))) << key;
  }
  const Json said = read_json_file(ours / "adapter_config.json"), meant = read_json_file(theirs / "adapter_config.json");
  std::string last;
  for (const auto& [key, value] : said.items()) EXPECT_LT(std::exchange(last, key), key);
  // Of a tied pair one is enough.
  EXPECT_EQ(to_line(said["trainable_token_indices"]), name == "llama_tied.rows_of_both" ? to_line(Json(kRows)) : to_line(meant["trainable_token_indices"]));
  models::Decoder again = load_decoder(base_of(name), at::kFloat);
  load_adapter(again, ours);
  EXPECT_TRUE(at::equal(logits_of(again), logits_of(decoder)));
}

TEST_P(TokenRows, AreMergedAndNoOtherRowChanges) {
  const std::string name = GetParam();
  const ScratchFolder scratch;
  const LogSink old = set_log_sink([](LogLevel, std::string_view) {});
  MergeConfig merge;
  merge.base = base_of(name);
  merge.adapter = golden_path("rows/" + name);
  merge.output = scratch / "merged";
  const MergeReport report = merge_folder(merge);
  set_log_sink(old);
  EXPECT_LT(report.kl, 1e-8);
  const Golden peft("rows/rows.safetensors");
  EXPECT_TRUE(is_close(logits_of(load_decoder(merge.output, at::kFloat)), peft[name + ".logits"], {.relative = 1e-4, .absolute = 1e-4}));
  const FolderTensors before(merge.base), after(merge.output);
  EXPECT_EQ(after.names(), before.names()) << "a tied head stays tied";
  const SafetensorsFile rows(merge.adapter / "adapter_model.safetensors");
  for (const std::string path : {"model.embed_tokens", "lm_head"}) {
    const std::string key = "base_model.model." + path + ".token_adapter.trainable_tokens_delta", weight = path + ".weight";
    if (!rows.entries().contains(key)) continue;
    for (std::int64_t row = 0; row < 48; ++row) {
      const auto trained = std::find(kRows.begin(), kRows.end(), row);
      const at::Tensor wanted = trained == kRows.end() ? before.tensor(weight)[row] : rows.tensor(key)[trained - kRows.begin()];
      EXPECT_TRUE(at::equal(after.tensor(weight)[row], wanted)) << weight << " " << row;
    }
  }
}

TEST_P(TokenRows, OnAStoredBaseAreThoseOfItsDenseCopy) {
  const std::string name = GetParam();
  const ScratchFolder scratch;
  fs::copy(base_of(name), scratch / "base");
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  {
    const FolderTensors base(scratch / "base");
    for (const std::string& tensor : base.names()) tensors.emplace_back(tensor, base.tensor_as(tensor, at::kBFloat16).clone());
  }
  write_safetensors(scratch / "base" / "model.safetensors", tensors);
  models::Decoder dense = load_decoder(scratch / "base", at::kFloat), stored = load_decoder(scratch / "base", at::kFloat, {}, Linears::kAsStored);
  EXPECT_TRUE(stored.head.quantized);
  for (models::Decoder* decoder : {&dense, &stored}) load_adapter(*decoder, golden_path("rows/" + name));
  EXPECT_TRUE(at::equal(logits_of(stored), logits_of(dense)));
  EXPECT_FALSE(at::equal(stored.token_rows_ND, stored.token_rows_ND.to(at::kBFloat16).to(at::kFloat))) << "rounded rows would pass: the test is void";
}

INSTANTIATE_TEST_SUITE_P(Cases, TokenRows, ::testing::ValuesIn(kCases), [](const auto& test) {
  std::string name = test.param;
  name[name.find('.')] = '_';
  return name;
});

TEST(TokenRowFolders, WhatDoesNotFitIsRefused) {
  const ScratchFolder scratch;
  fs::copy(golden_path("rows/llama_untied.rows"), scratch / "adapter");
  const auto refused = [&](const Json& rows, const std::string& words) {
    Json json = read_json_file(scratch / "adapter/adapter_config.json");
    json["trainable_token_indices"] = rows;
    write_file(scratch / "adapter/adapter_config.json", json.dump());
    models::Decoder decoder = load_decoder(base_of("llama_untied"), at::kFloat);
    return fails_with(ErrorKind::kData, words, [&] { load_adapter(decoder, scratch / "adapter"); });
  };
  EXPECT_TRUE(refused({5, 9, 40}, "shape [4, 16], must be [3, 16]"));
  EXPECT_TRUE(refused(nullptr, "trainable_tokens_delta: unexpected"));
  EXPECT_TRUE(refused({5, 9, 40, 48}, "48 is outside the model's 48 tokens"));
  EXPECT_TRUE(refused({5, 9, 40, 9}, "the id 9 is named twice"));
  EXPECT_TRUE(refused({5, 9, 40, -1}, "must be a list of token ids, has -1"));
  EXPECT_TRUE(refused({5, 9, 40, "2"}, "must be a list of token ids"));
  EXPECT_TRUE(refused(5, "must be a list of token ids"));
  EXPECT_TRUE(refused({{"lm_head", {5, 9, 40, 2}}}, "rows of the head alone"));
  EXPECT_TRUE(refused({{"embed_tokens", {5, 9, 40, 2}}, {"lm_head", {5, 9, 40, 3}}}, "other rows of the head"));
  EXPECT_TRUE(refused({{"embed_tokens", {5, 9, 40, 2}}, {"lm_head", {5, 9, 40, 2}}}, "lm_head.token_adapter.trainable_tokens_delta: missing"));
  EXPECT_TRUE(refused({{"wte", {5}}}, "rows of \"wte\" are not implemented"));
}

}  // namespace
}  // namespace alambic::checkpoints
