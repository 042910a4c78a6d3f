// SPDX-License-Identifier: Apache-2.0
#include "lora/module_match.h"

#include <chrono>

#include "tests/support.h"

namespace alambic::lora {
namespace {

using testing::fails_with;

TEST(ModuleMatch, NamesAreWholeOrEndAfterADot) {
  EXPECT_TRUE(names_module("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"));
  EXPECT_TRUE(names_module("q_proj", "model.layers.0.self_attn.q_proj"));
  EXPECT_TRUE(names_module("self_attn.q_proj", "model.layers.0.self_attn.q_proj"));
  EXPECT_FALSE(names_module("proj", "model.layers.0.self_attn.q_proj"));
  EXPECT_FALSE(names_module("self_attn", "model.layers.0.self_attn.q_proj"));
}

TEST(ModuleMatch, ComponentsAreWhole) {
  EXPECT_TRUE(names_component("mlp", "model.layers.0.mlp.up_proj"));
  EXPECT_TRUE(names_component("lm_head", "lm_head"));
  EXPECT_TRUE(names_component("layers.0", "model.layers.0.mlp"));
  EXPECT_FALSE(names_component("layers.0", "model.layers.01.mlp"));
  EXPECT_FALSE(names_component("norm", "model.layers.0.input_layernorm"));
}

TEST(ModuleMatch, PatternsMatchWholePaths) {
  EXPECT_TRUE(Pattern(R"(model\.layers\.\d+\.mlp\.(gate|up)_proj)", "x").matches_whole("model.layers.11.mlp.up_proj"));
  EXPECT_FALSE(Pattern("up_proj", "x").matches_whole("model.layers.11.mlp.up_proj"));
  EXPECT_TRUE(Pattern(R"((?!.*layers\.0).*\.[qk]_proj)", "x").matches_whole("model.layers.1.self_attn.q_proj"));
  EXPECT_FALSE(Pattern(R"((?!.*layers\.0).*\.[qk]_proj)", "x").matches_whole("model.layers.0.self_attn.q_proj"));
}

// Each of these means something else, or nothing, in Python.
TEST(ModuleMatch, RefusesWhatPythonReadsDifferently) {
  for (const char* expression : {"(?P<name>a)", "(?<=a)b", "(?i)a", "\\Aa", "a\\Z", "(a)\\1", "a*+", "a++", "a{,3}", "a{2", "[[:alpha:]]", "[]a]", "a\\", "(?"})
    EXPECT_TRUE(fails_with(ErrorKind::kUsage, "not supported", [&] { Pattern(expression, "lora.targets"); })) << expression;
  for (const char* expression : {"(", "a)", "*a"})
    EXPECT_TRUE(fails_with(ErrorKind::kUsage, "lora.targets", [&] { Pattern(expression, "lora.targets"); })) << expression;
  EXPECT_NO_THROW(Pattern(R"([\w.]+?\.\d{1,2}\.(?:[a-z_]*?)(?=proj)\w{4})", "x"));
}

TEST(ModuleMatch, HostilePatternsEndSoon) {
  const std::string path = "model.layers." + std::string(60, '1') + ".self_attn.q_proj";
  const auto start = std::chrono::steady_clock::now();
  EXPECT_FALSE(Pattern("(.*1)*(1*)*(1+1+)+x", "x").matches_whole(path));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "", [] { Pattern("((a{1000}){1000}){1000}", "x"); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "characters", [] { Pattern(std::string(100'000, '('), "x"); }));
}

TEST(ModuleMatch, TheFirstPatternOfAPathsEndWins) {
  const PatternKeys keys({"layers.0.mlp.up_proj", "up_proj", "q_proj|k_proj"}, "x");
  EXPECT_EQ(keys.find("model.layers.0.mlp.up_proj"), 0u);
  EXPECT_EQ(keys.find("model.layers.1.mlp.up_proj"), 1u);
  EXPECT_EQ(keys.find("model.layers.1.self_attn.k_proj"), 2u);
  EXPECT_EQ(keys.find("model.layers.1.self_attn.v_proj"), 3u);
  EXPECT_EQ(keys.find("model.layers.1.mlp.up_proj_2"), 3u);
}

}  // namespace
}  // namespace alambic::lora
