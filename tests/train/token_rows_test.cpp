// SPDX-License-Identifier: Apache-2.0
// Training the rows of some tokens: gradients beside PEFT's (tests/oracle/token_rows_oracle.py), and what a run's config may say.
#include "models/token_rows.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include "checkpoints/hf_folder.h"
#include "checkpoints/peft_folder.h"
#include "core/files.h"
#include "core/log.h"
#include "tests/closeness.h"
#include "tests/golden.h"
#include "tests/support.h"
#include "train/optimizer.h"
#include "train/cross_entropy.h"
#include "train/train_config.h"

namespace alambic::train {
namespace {

using testing::fails_with;
using testing::Golden;
using testing::golden_path;
using testing::is_close_to_scale;
using testing::ScratchFolder;

/// Sum of the cross-entropy of each token after the first, of the golden's ids.
at::Tensor nats_of(const models::Decoder& decoder, const at::Tensor& ids) {
  const std::int64_t count = ids.numel();
  const at::Tensor hidden_TD = decoder.hidden_TD({.tokens_T = ids, .positions_T = at::arange(count), .document_lengths = {count}});
  at::Tensor targets_T = ids.roll(-1), keep_T = at::ones({count}, at::kBool);
  keep_T[count - 1].fill_(false);
  return cross_entropy_sum(hidden_TD, decoder.head, targets_T, keep_T, 0);
}

class TokenRowGradients : public ::testing::TestWithParam<const char*> {};

TEST_P(TokenRowGradients, ArePefts) {
  const std::string name = GetParam();
  const Golden peft("rows/rows.safetensors");
  SCOPED_TRACE(peft.provenance());
  models::Decoder decoder = checkpoints::load_decoder(golden_path("peft/" + name.substr(0, name.find('.'))), at::kFloat);
  checkpoints::load_adapter(decoder, golden_path("rows/" + name));
  nats_of(decoder, peft["ids"][0]).backward();
  std::size_t compared = 0;
  for (const models::NamedTensor& tensor : lora::trainable(decoder)) {
    ASSERT_TRUE(tensor.tensor->grad().defined()) << tensor.name;
    EXPECT_TRUE(is_close_to_scale(tensor.tensor->grad(), peft[name + ".grad." + tensor.name], 2e-5)) << tensor.name;
    ++compared;
  }
  EXPECT_GE(compared, 5u);
  EXPECT_FALSE(decoder.embedding_VD.requires_grad());
}

INSTANTIATE_TEST_SUITE_P(Cases, TokenRowGradients,
                         ::testing::Values("llama_tied.rows", "llama_tied.rows_of_both", "llama_untied.rows", "llama_untied.rows_of_both", "llama_untied.rows_and_head", "gemma3.rows"),
                         [](const auto& test) {
                           std::string name = test.param;
                           name[name.find('.')] = '_';
                           return name;
                         });

TEST(TokenRowTraining, APaddingTokenGivesNoGradient) {
  models::Decoder decoder = checkpoints::load_decoder(golden_path("peft/llama_untied"), at::kFloat);
  decoder.config.pad_id = 9;
  lora::attach(decoder, {.targets = {"q_proj"}, .trainable_tokens = {"5", "9"}}, 1);
  nats_of(decoder, Golden("rows/rows.safetensors")["ids"][0]).backward();
  const at::Tensor gradient_ND = decoder.token_rows_ND.grad();
  EXPECT_GT(gradient_ND[0].abs().max().item<double>(), 0);
  EXPECT_EQ(gradient_ND[1].abs().max().item<double>(), 0);
}

TEST(TokenRowTraining, OnlyTheRowsHaveOptimiserState) {
  models::Decoder decoder = checkpoints::load_decoder(golden_path("peft/llama_tied"), at::kFloat);
  lora::attach(decoder, {.rank = 2, .alpha = 2, .targets = {"q_proj"}, .trainable_tokens = {"40..42"}}, 1);
  EXPECT_EQ(decoder.token_row_ids, (std::vector<std::int64_t>{40, 41, 42}));
  EXPECT_TRUE(at::equal(decoder.token_rows_ND, decoder.embedding_VD.narrow(0, 40, 3)));
  EXPECT_TRUE(decoder.head.token_rows_ND.is_same(decoder.token_rows_ND)) << "a tied head follows";
  EXPECT_TRUE(decoder.head_tied);
  const std::unique_ptr<Optimizer> optimizer = make_optimizer(lora::trainable(decoder), {});
  EXPECT_EQ(optimizer->num_parameters(), 2 * 2 * (16 + 16) + 3 * 16);
}

TEST(TokenRowTraining, InBf16TheRowsStayF32AndAreRoundedWhereTheTableIs) {
  models::Decoder decoder = checkpoints::load_decoder(golden_path("peft/llama_tied"), at::kBFloat16);
  lora::attach(decoder, {.targets = {"q_proj"}, .trainable_tokens = {"5", "40"}}, 1);
  EXPECT_EQ(decoder.token_rows_ND.scalar_type(), at::kFloat);
  nats_of(decoder, Golden("rows/rows.safetensors")["ids"][0]).backward();
  EXPECT_EQ(decoder.token_rows_ND.grad().scalar_type(), at::kFloat);
  const at::NoGradGuard no_gradients;
  decoder.token_rows_ND.add_(1e-5);  // below bf16's last bit for most
  const at::Tensor tokens = at::arange(48);
  const at::Tensor embedded = models::embedded_TD(decoder.embedding_VD, decoder.token_rows_ND, decoder.token_row_ids, tokens, -1, decoder.compute_type());
  EXPECT_TRUE(at::equal(embedded[40], decoder.token_rows_ND[1].to(at::kBFloat16).to(at::kFloat)));
  EXPECT_TRUE(at::equal(embedded[41], decoder.embedding_VD[41].to(at::kFloat)));
}

TEST(TokenRowTraining, TokensAreNamedByIdRangeOrText) {
  const ScratchFolder scratch;
  write_file(scratch / "tokenizer.json",
             R"({"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,"pre_tokenizer":{"type":"WhitespaceSplit"},"post_processor":null,"decoder":null,)"
             R"("model":{"type":"WordLevel","vocab":{"<unk>":0,"new word":7,"7":3},"unk_token":"<unk>"}})");
  TrainConfig config;
  config.model = scratch.path();
  config.lora.trainable_tokens = {"5", "new word", "7..9"};
  EXPECT_EQ(with_token_ids(config).lora.trainable_tokens, (std::vector<std::string>{"5", "7", "7..9"}));
  config.lora.trainable_tokens = {"5", "nowhere", "7 ..9"};
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "has no token \"nowhere\"", [&] { with_token_ids(config); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "has no token \"7 ..9\"", [&] { with_token_ids(config); }));
  EXPECT_EQ(lora::token_ids_of({"5", "7..9"}, 48), (std::vector<std::int64_t>{5, 7, 8, 9}));
}

TEST(TokenRowTraining, RefusesContradictions) {
  const LogSink old = set_log_sink([](LogLevel, std::string_view) {});
  const auto refused = [](const std::string& model, const std::string& words, const lora::LoraConfig& config) {
    models::Decoder decoder = checkpoints::load_decoder(golden_path("peft/" + model), at::kFloat);
    return fails_with(ErrorKind::kUsage, words, [&] { lora::attach(decoder, config, 1); });
  };
  EXPECT_TRUE(refused("llama_tied", "outside the model's 48 tokens", {.targets = {"q_proj"}, .trainable_tokens = {"48"}}));
  EXPECT_TRUE(refused("llama_tied", "outside the model's 48 tokens", {.targets = {"q_proj"}, .trainable_tokens = {"0..9223372036854775807"}}));
  EXPECT_TRUE(refused("llama_tied", "the range 9..7 is empty", {.targets = {"q_proj"}, .trainable_tokens = {"9..7"}}));
  EXPECT_TRUE(refused("llama_tied", "the id 8 is named twice", {.targets = {"q_proj"}, .trainable_tokens = {"8", "7..9"}}));
  EXPECT_TRUE(refused("llama_tied", "neither an id nor a range", {.targets = {"q_proj"}, .trainable_tokens = {"word"}}));
  EXPECT_TRUE(refused("llama_tied", "trains the whole embedding", {.targets = {"q_proj"}, .modules_to_save = {"embed_tokens"}, .trainable_tokens = {"5"}}));
  EXPECT_TRUE(refused("llama_tied", "trains the whole head", {.targets = {"q_proj"}, .modules_to_save = {"lm_head"}, .trainable_tokens = {"5"}}));
  EXPECT_TRUE(refused("llama_tied", "an adapter and trained rows", {.targets = {"q_proj", "lm_head"}, .trainable_tokens = {"5"}}));
  EXPECT_TRUE(refused("llama_untied", "an adapter and trained rows", {.targets = {"q_proj", "lm_head"}, .trainable_tokens = {"5"}, .trainable_tokens_head = true}));
  EXPECT_TRUE(refused("llama_untied", "names no tokens", {.targets = {"q_proj"}, .trainable_tokens_head = true}));
  models::Decoder decoder = checkpoints::load_decoder(golden_path("peft/llama_untied"), at::kFloat);
  EXPECT_NO_THROW(lora::attach(decoder, {.targets = {"q_proj", "lm_head"}, .trainable_tokens = {"5"}}, 1));
  set_log_sink(old);
}

TEST(TokenRows, OfALookUpAreAddedToTheGradientThatTheTableHas) {
  const at::Tensor tokens_T = at::tensor({3, 1, 3, 0, 8, 1, 3, 0}, at::kLong), d_TD = at::randn({8, 5}), before_VD = at::randn({9, 5});
  for (const std::int64_t pad_id : {-1, 0}) {
    const at::Tensor table_VD = at::randn({9, 5}).set_requires_grad(true), expected_VD = at::embedding_dense_backward(d_TD, tokens_T, 9, pad_id, false);
    const auto look_up = [&] { models::embedded_TD(table_VD, {}, {}, tokens_T, pad_id, at::kFloat).backward(d_TD); };
    look_up();
    EXPECT_TRUE(table_VD.grad().equal(expected_VD)) << pad_id;
    table_VD.mutable_grad() = before_VD.clone();  // as a head that shares the table leaves it
    const void* const place = table_VD.grad().const_data_ptr();
    look_up();
    EXPECT_TRUE(table_VD.grad().equal(before_VD + expected_VD)) << pad_id;
    EXPECT_EQ(table_VD.grad().const_data_ptr(), place) << "a second gradient as large as the table";
  }
}

}  // namespace
}  // namespace alambic::train
