// SPDX-License-Identifier: Apache-2.0
// Generation and scoring against transformers: tests/oracle/generate_oracle.py and families_oracle.py.
#include "models/generate.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/topk.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "core/json.h"
#include "models/key_value_cache.h"
#include "tests/closeness.h"
#include "tests/models/tiny_model.h"
#include "tests/support.h"

namespace alambic::models {
namespace {

using testing::decoder_of;
using testing::fails_with;
using testing::Golden;
using testing::ids_of;
using testing::is_close;

class GenerateTest : public ::testing::TestWithParam<std::string> {
 protected:
  Golden golden_{"families/" + GetParam() + ".safetensors"};
};
INSTANTIATE_TEST_SUITE_P(Families, GenerateTest, ::testing::ValuesIn(testing::family_goldens()), [](const auto& test) { return test.param; });

// 24 tokens after 6: past every window of these models, and past the length where phi3's LongRoPE changes.
TEST_P(GenerateTest, GreedyEqualsTransformersTokenForToken) {
  SCOPED_TRACE(golden_.provenance());
  const Decoder decoder = decoder_of(golden_);
  const auto prompt = ids_of(golden_["prompt"]);
  EXPECT_EQ(generate(decoder, prompt, {.max_new_tokens = 24}, {}), ids_of(golden_["greedy"]));
  EXPECT_EQ(generate(decoder, prompt, {.repetition_penalty = 1.7, .max_new_tokens = 24}, {}), ids_of(golden_["greedy_penalised"]));
}

TEST_P(GenerateTest, CachedStepsEqualOnePass) {
  const at::NoGradGuard constant;
  const Decoder decoder = decoder_of(golden_);
  Input whole;
  whole.tokens_T = golden_["tokens"].narrow(0, 0, 8);  // as long as LongRoPE's first range
  whole.positions_T = at::arange(8, at::kLong);
  whole.document_lengths = {8};
  const at::Tensor expected_TD = decoder.hidden_TD(whole);
  // Beside another document, four tokens at once, then the others singly.
  KeyValueCache cache(decoder, 2, 8);
  for (const std::int64_t count : {4, 1, 1, 1, 1}) {
    const std::int64_t first = cache.lengths_B[1];
    Input part;
    part.tokens_T = whole.tokens_T.narrow(0, first, count);
    part.positions_T = whole.positions_T.narrow(0, first, count);
    part.document_lengths = {count};
    part.cache = &cache, part.cache_rows = {1};
    EXPECT_TRUE(testing::is_close_to_scale(decoder.hidden_TD(part), expected_TD.narrow(0, first, count), 1e-5)) << "from token " << first;
  }
  EXPECT_EQ(cache.lengths_B, (std::vector<std::int64_t>{0, 8}));
  EXPECT_TRUE(fails_with(ErrorKind::kBug, "2 new tokens behind 8", [&] { CachedPass(cache, {1}, {2}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kBug, "some are new", [&] { CachedPass(cache, {0, 1}, {1, 1}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kBug, "holds 8 tokens, 9 are needed", [&] { CachedPass(cache, {1}, {1}); }));
  KeyValueCache other(decoder, 2, 4);
  EXPECT_TRUE(fails_with(ErrorKind::kBug, "0 of a key-value cache behind 1; they must rise", [&] { CachedPass(other, {1, 0}, {1, 1}); }));
  cache.make_room(9);
  EXPECT_EQ(cache.capacity(), 16);
  EXPECT_TRUE(cache.keys_BKCS[0].narrow(2, 8, 8).eq(0).all().item<bool>());
  cache.keep_only({1});
  EXPECT_EQ(cache.lengths_B, (std::vector<std::int64_t>{8}));
}

TEST_P(GenerateTest, ScoresAreTheLogProbabilitiesOfTransformersLogits) {
  const Decoder decoder = decoder_of(golden_);
  const std::int64_t first_document = golden_["documents"][0].item<std::int64_t>();
  const at::Tensor tokens = golden_["tokens"].narrow(0, 0, first_document);
  const at::Tensor expected = at::log_softmax(golden_["logits"].narrow(0, 0, first_document - 1), 1).gather(1, tokens.narrow(0, 1, first_document - 1).unsqueeze(1));
  const std::vector<double> scores = score(decoder, ids_of(tokens));
  ASSERT_EQ(static_cast<std::int64_t>(scores.size()), first_document - 1);
  for (std::size_t i = 0; i < scores.size(); ++i) EXPECT_NEAR(scores[i], expected[static_cast<std::int64_t>(i)].item<double>(), 1e-4) << "token " << i + 1;
}

TEST(Filters, EqualTransformersLogitsProcessors) {
  const Golden golden("generate.safetensors");
  SCOPED_TRACE(golden.provenance());
  const Json cases = parse_json(golden.metadata().at("cases"), "cases");
  ASSERT_GE(cases.size(), 8u);
  for (const auto& [name, settings] : cases.items()) {
    Sampling sampling;
    sampling.temperature = value_or<double>(settings, "temperature", 0, name);
    sampling.top_k = value_or<std::int64_t>(settings, "top_k", 0, name);
    sampling.top_p = value_or<double>(settings, "top_p", 1, name);
    sampling.min_p = value_or<double>(settings, "min_p", 0, name);
    sampling.repetition_penalty = value_or<double>(settings, "repetition_penalty", 1, name);
    for (std::int64_t row = 0; row < golden["logits"].size(0); ++row) {
      const at::Tensor left_V = filtered_logits_V(golden["logits"][row], ids_of(golden["seen"][row]), sampling);
      const at::Tensor expected_V = golden[name][row];
      // The very same logits survive, with the same values.
      EXPECT_TRUE(left_V.isinf().logical_not().equal(golden[name + ".kept"][row])) << name << ", row " << row;
      EXPECT_TRUE(is_close(left_V.masked_fill(left_V.isinf(), 0), expected_V, {.relative = 1e-6})) << name << ", row " << row;
    }
  }
}

TEST(Generate, DrawsFollowTheDistributionAndTheSeed) {
  const Golden golden("families/llama.safetensors");
  const Decoder decoder = decoder_of(golden);
  const auto prompt = ids_of(golden["prompt"]);
  const Sampling sampling{.temperature = 1, .max_new_tokens = 8, .seed = 5};
  EXPECT_EQ(generate(decoder, prompt, sampling, {}), generate(decoder, prompt, sampling, {}));
  // 2000 first draws against the model's own probabilities: chi-square over the five likeliest tokens and the rest.
  const at::NoGradGuard constant;
  Input input;
  input.tokens_T = golden["prompt"];
  input.positions_T = at::arange(golden["prompt"].numel(), at::kLong);
  input.document_lengths = {golden["prompt"].numel()};
  const at::Tensor chance_V = at::log_softmax(decoder.logits_TV(decoder.hidden_TD(input))[-1], 0).exp();
  const auto [top_chance, top_id] = chance_V.topk(5);
  std::vector<double> count(6, 0);
  constexpr int kDraws = 2000;
  for (std::uint64_t seed = 0; seed < kDraws; ++seed) {
    const std::int64_t id = generate(decoder, prompt, {.temperature = 1, .max_new_tokens = 1, .seed = seed}, {})[0];
    std::size_t bin = 5;
    for (std::size_t i = 0; i < 5; ++i)
      if (top_id[static_cast<std::int64_t>(i)].item<std::int64_t>() == id) bin = i;
    ++count[bin];
  }
  double chi_square = 0, rest = 1;
  for (std::size_t i = 0; i < 6; ++i) {
    const double chance = i < 5 ? top_chance[static_cast<std::int64_t>(i)].item<double>() : rest;
    rest -= chance;
    chi_square += (count[i] - kDraws * chance) * (count[i] - kDraws * chance) / (kDraws * chance);
  }
  EXPECT_LT(chi_square, 20.5);  // five degrees of freedom, 0.1 %
}

TEST(Generate, StopsAtAStopIdAndWhenAsked) {
  const Golden golden("families/qwen3.safetensors");
  const Decoder decoder = decoder_of(golden);
  const auto prompt = ids_of(golden["prompt"]);
  const auto all = ids_of(golden["greedy"]);
  const auto first_of = [&](std::int64_t id) { return static_cast<std::size_t>(std::find(all.begin(), all.end(), id) - all.begin()) + 1; };
  const auto stopped = generate(decoder, prompt, {.max_new_tokens = 24}, {all[5]});
  EXPECT_EQ(stopped.size(), first_of(all[5]));
  EXPECT_EQ(stopped.back(), all[5]);
  std::vector<std::int64_t> seen;
  const auto asked = generate(decoder, prompt, {.max_new_tokens = 24}, {}, [&](std::int64_t id) { seen.push_back(id); return seen.size() < 3; });
  EXPECT_EQ(asked.size(), 3u);
  EXPECT_EQ(seen, asked);
}

TEST(Generate, RefusesWhatCannotBe) {
  const Decoder decoder = decoder_of(Golden("families/llama.safetensors"));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "prompt 0 is empty", [&] { generate(decoder, {}, {}, {}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "token id 64 (number 1) is outside the vocabulary of 64", [&] { generate(decoder, {1, 64}, {}, {}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "token id -1", [&] { score(decoder, {-1, 2}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "at least two token ids", [&] { score(decoder, {1}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "temperature must be", [&] { generate(decoder, {1}, {.temperature = -1}, {}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "top_k must be", [&] { generate(decoder, {1}, {.top_k = -1}, {}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "top_p must be", [&] { generate(decoder, {1}, {.top_p = 1.5}, {}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "min_p must be", [&] { generate(decoder, {1}, {.min_p = std::nan("")}, {}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "repetition_penalty must be", [&] { generate(decoder, {1}, {.repetition_penalty = 0}, {}); }));
}

}  // namespace
}  // namespace alambic::models
