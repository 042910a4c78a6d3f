// SPDX-License-Identifier: Apache-2.0
// Several continuations at once against generate(), which is compared with transformers in generate_test.cpp.
#include "models/generate.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "tests/models/tiny_model.h"
#include "tests/support.h"

namespace alambic::models {
namespace {

using testing::decoder_of;
using testing::fails_with;
using testing::Golden;
using testing::ids_of;

class GenerateManyTest : public ::testing::TestWithParam<std::string> {
 protected:
  Golden golden_{"families/" + GetParam() + ".safetensors"};
  /// Prompts of lengths 6, 1, 9 and 3.
  std::vector<Prompt> prompts() const {
    const auto ids = ids_of(golden_["prompt"]), more = ids_of(golden_["tokens"]);
    return {{.ids = ids, .seed = 1}, {.ids = {more[2]}, .seed = 2}, {.ids = {more.begin(), more.begin() + 9}, .seed = 3}, {.ids = {more.begin() + 3, more.begin() + 6}, .seed = 4}};
  }
};
INSTANTIATE_TEST_SUITE_P(Families, GenerateManyTest, ::testing::ValuesIn(testing::family_goldens()), [](const auto& test) { return test.param; });

// 24 tokens: past every window of these models, and past the length where phi3's LongRoPE changes, which the four pass at different steps.
TEST_P(GenerateManyTest, EqualsOneByOne) {
  const Decoder decoder = decoder_of(golden_);
  for (const double temperature : {0.0, 1.5}) {
    const Sampling sampling{.temperature = temperature, .max_new_tokens = 24};
    const std::vector<Prompt> asked = prompts();
    const std::vector<Continuation> together = generate_many(decoder, asked, sampling, {});
    ASSERT_EQ(together.size(), asked.size());
    for (std::size_t i = 0; i < asked.size(); ++i) {
      Sampling one = sampling;
      one.seed = asked[i].seed;
      EXPECT_EQ(together[i].ids, generate(decoder, asked[i].ids, one, {})) << "prompt " << i << ", temperature " << temperature;
      EXPECT_FALSE(together[i].stopped);
    }
  }
  EXPECT_EQ(generate_many(decoder, {prompts()[0]}, {.max_new_tokens = 24}, {})[0].ids, ids_of(golden_["greedy"]));  // transformers'
}

TEST_P(GenerateManyTest, EachEndsForItselfAndTellsItsProbability) {
  const Decoder decoder = decoder_of(golden_);
  std::vector<Prompt> asked = prompts();
  asked[3].max_new_tokens = 2;
  const Sampling sampling{.temperature = 0.8, .top_p = 0.95, .max_new_tokens = 12};
  const std::vector<Continuation> whole = generate_many(decoder, asked, sampling, {});
  const std::vector<std::int64_t> stops = {whole[0].ids[4], whole[2].ids[7]};
  const std::vector<Continuation> stopped = generate_many(decoder, asked, sampling, stops, true);
  EXPECT_TRUE(stopped[0].stopped && stopped[2].stopped);
  EXPECT_LE(stopped[0].ids.size(), 5u);
  EXPECT_EQ(whole[3].ids.size(), 2u);
  for (std::size_t i = 0; i < asked.size(); ++i) {
    Sampling one = sampling;
    one.seed = asked[i].seed;
    if (asked[i].max_new_tokens > 0) one.max_new_tokens = asked[i].max_new_tokens;
    EXPECT_EQ(stopped[i].ids, generate(decoder, asked[i].ids, one, stops)) << i;
    // Prefix by prefix: LongRoPE makes of a longer document another one.
    const at::NoGradGuard constant;
    std::vector<std::int64_t> all = asked[i].ids;
    double sum = 0;
    for (const std::int64_t id : stopped[i].ids) {
      const auto length = static_cast<std::int64_t>(all.size());
      Input input;
      input.tokens_T = at::tensor(all, at::kLong);
      input.positions_T = at::arange(length, at::kLong);
      input.document_lengths = {length};
      sum += at::log_softmax(decoder.logits_TV(decoder.hidden_TD(input))[-1], 0)[id].item<double>();
      all.push_back(id);
    }
    EXPECT_NEAR(stopped[i].sum_log_probability, sum, 1e-3) << i;
  }
}

TEST(GenerateMany, DrawsFollowTheDistribution) {
  const Golden golden("families/llama.safetensors");
  const Decoder decoder = decoder_of(golden);
  constexpr std::size_t kDraws = 4000;
  constexpr double kTemperature = 0.7;
  const auto ids = ids_of(golden["prompt"]);
  std::vector<Prompt> asked;
  for (std::size_t i = 0; i < kDraws; ++i) asked.push_back({.ids = ids, .seed = i});
  const std::vector<Continuation> drawn = generate_many(decoder, asked, {.temperature = kTemperature, .max_new_tokens = 2}, {});
  // The second draw given each first one that came often: chi-square over all ids with at least five expected draws, and the rest.
  const at::NoGradGuard constant;
  const auto check = [&](const std::vector<std::int64_t>& seen, std::size_t place) {
    Input input;
    input.tokens_T = at::tensor(seen, at::kLong);
    input.positions_T = at::arange(static_cast<std::int64_t>(seen.size()), at::kLong);
    input.document_lengths = {static_cast<std::int64_t>(seen.size())};
    const at::Tensor chance_V = at::log_softmax(decoder.logits_TV(decoder.hidden_TD(input))[-1] / kTemperature, 0).exp().to(at::kDouble);
    std::vector<double> count(static_cast<std::size_t>(chance_V.numel()), 0);
    double draws = 0;
    for (const Continuation& each : drawn)
      if (place == 0 || each.ids[0] == seen.back()) ++count[static_cast<std::size_t>(each.ids[place])], ++draws;
    double chi_square = 0, rest_expected = 0, rest_count = 0;
    int bins = 0;
    for (std::size_t id = 0; id < count.size(); ++id) {
      const double expected = draws * chance_V[static_cast<std::int64_t>(id)].item<double>();
      if (expected < 5) rest_expected += expected, rest_count += count[id];
      else chi_square += (count[id] - expected) * (count[id] - expected) / expected, ++bins;
    }
    if (rest_expected >= 5) chi_square += (rest_count - rest_expected) * (rest_count - rest_expected) / rest_expected, ++bins;
    ASSERT_GT(bins, 5);
    EXPECT_LT(chi_square, bins - 1 + 4 * std::sqrt(2.0 * (bins - 1))) << bins << " bins of " << draws << " draws";
  };
  check(ids, 0);
  std::map<std::int64_t, int> first;
  for (const Continuation& each : drawn) ++first[each.ids[0]];
  const auto most = std::max_element(first.begin(), first.end(), [](const auto& a, const auto& b) { return a.second < b.second; })->first;
  std::vector<std::int64_t> longer = ids;
  longer.push_back(most);
  check(longer, 1);
}

TEST(GenerateMany, RefusesWhatCannotBe) {
  const Decoder decoder = decoder_of(Golden("families/llama.safetensors"));
  EXPECT_TRUE(generate_many(decoder, {}, {}, {}).empty());
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "prompt 1 is empty", [&] { generate_many(decoder, {{.ids = {1}}, {}}, {}, {}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "outside the vocabulary of 64", [&] { generate_many(decoder, {{.ids = {1, 64}}}, {}, {}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "temperature must be", [&] { generate_many(decoder, {{.ids = {1}}}, {.temperature = -1}, {}); }));
}

}  // namespace
}  // namespace alambic::models
