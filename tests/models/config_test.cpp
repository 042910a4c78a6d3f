// SPDX-License-Identifier: Apache-2.0
#include "models/config.h"

#include <gtest/gtest.h>

#include <fstream>
#include <set>

#include "core/error.h"
#include "core/log.h"
#include "tests/models/tiny_model.h"
#include "tests/support.h"

namespace alambic::models {
namespace {

using testing::fails_with;
using testing::Golden;

Json config_of(const std::string& golden) { return parse_json(Golden("families/" + golden + ".safetensors").metadata().at("config"), "config.json"); }

// The llama golden's config with some keys changed; a null value stays as null.
Json changed(const Json& changes, const std::string& golden = "llama") {
  Json config = config_of(golden);
  for (const auto& [key, value] : changes.items()) config[key] = value;
  return config;
}

::testing::AssertionResult refused(const Json& config, const std::string& words) {
  return fails_with(ErrorKind::kData, words, [&] { read_model_config(config, "config.json"); });
}

class DefaultsTest : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Families, DefaultsTest, ::testing::ValuesIn(testing::family_goldens()), [](const auto& test) { return test.param; });

// The goldens carry the fields and defaults of transformers' config classes.
TEST_P(DefaultsTest, AreThoseOfTransformersConfigClass) {
  const Golden golden("families/" + GetParam() + ".safetensors");
  SCOPED_TRACE(golden.provenance());
  const Family& family = *read_model_config(config_of(GetParam()), "config.json").family;
  const Json ours = parse_json(family.defaults, "ours"), theirs = parse_json(golden.metadata().at("defaults"), "theirs");
  const std::set<std::string> without_effect = {"initializer_range", "use_cache", "rope_parameters", "keys_to_ignore_at_inference"};
  std::set<std::string> keys;
  for (const auto& [key, value] : ours.items()) keys.insert(key);
  for (const auto& [key, value] : theirs.items()) keys.insert(key);
  for (const std::string& key : keys) {
    if (without_effect.contains(key)) continue;
    ASSERT_TRUE(ours.contains(key)) << key << " is a field of transformers' class and unknown here";
    ASSERT_TRUE(theirs.contains(key)) << key << " is no field of transformers' class";
    EXPECT_EQ(ours[key], theirs[key]) << key;
  }
  const Json theta = parse_json(golden.metadata().at("rope_theta"), "rope_theta");
  EXPECT_EQ(family.rope_theta, theta.is_object() ? theta["global"].get<double>() : theta.get<double>());
  EXPECT_EQ(family.local_rope_theta, theta.is_object() ? theta["local"].get<double>() : 0.0);
}

TEST(ModelConfig, OlderRopeSpellingMeansTheSame) {
  for (const std::string& name : testing::family_goldens()) {
    const Json config = config_of(name);
    Json old = config;
    old.erase("rope_parameters");
    Json rope = config.contains("rope_parameters") && config["rope_parameters"].is_object() ? config["rope_parameters"] : Json::object();
    if (rope.contains("full_attention")) {
      old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"];
      rope = Json(rope["full_attention"]);
    }
    for (const char* key : {"rope_theta", "partial_rotary_factor"})
      if (rope.contains(key)) {
        old[key] = rope[key];
        rope.erase(key);
      }
    if (rope.contains("rope_type") && rope["rope_type"] != "default") {
      if (!old.contains("rope_local_base_freq")) {  // Gemma 3 always wrote the newer key
        rope["type"] = rope["rope_type"];
        rope.erase("rope_type");
      }
      old["rope_scaling"] = rope;
    }
    const ModelConfig now = read_model_config(config, "new"), then = read_model_config(old, "old");
    EXPECT_EQ(now.rope.inverse_frequency, then.rope.inverse_frequency) << name;
    EXPECT_EQ(now.rope.long_inverse_frequency, then.rope.long_inverse_frequency) << name;
    EXPECT_EQ(now.rope.attention_factor, then.rope.attention_factor) << name;
    EXPECT_EQ(now.local_rope.inverse_frequency, then.local_rope.inverse_frequency) << name;
    EXPECT_FALSE(now.rope.inverse_frequency.empty()) << name;
  }
}

TEST(ModelConfig, OneErrorListsAllProblems) {
  const Json config = changed({{"hidden_act", "relu2"}, {"quantization_config", {{"bits", 4}}}, {"num_hidden_layers", 1000000000}, {"pretraining_tp", 2}});
  for (const char* words : {"4 problems", "hidden_act = \"relu2\" is not implemented", "quantization_config = {\"bits\":4} is not implemented",
                            "num_hidden_layers must be a whole number from 1 to 10000, got 1000000000", "pretraining_tp = 2 is not implemented"})
    EXPECT_TRUE(refused(config, words));
}

TEST(ModelConfig, RefusesAbsurdSizes) {
  EXPECT_TRUE(refused(changed({{"num_attention_heads", 0}}), "num_attention_heads must be a whole number from 1"));
  EXPECT_TRUE(refused(changed({{"num_attention_heads", 3}, {"num_key_value_heads", 2}}), "num_attention_heads = 3 is not a multiple of num_key_value_heads = 2"));
  EXPECT_TRUE(refused(changed({{"num_attention_heads", 5}, {"num_key_value_heads", 5}, {"head_dim", nullptr}}), "hidden_size = 32 is not a multiple of num_attention_heads = 5"));
  EXPECT_TRUE(refused(changed({{"vocab_size", 4294967296}, {"hidden_size", 4294967296}}), "vocab_size must be a whole number from 1 to 16777216"));
  EXPECT_TRUE(refused(changed({{"vocab_size", 18446744073709551615ull}}), "got 18446744073709551615"));
  EXPECT_TRUE(refused(changed({{"hidden_size", -32}}), "hidden_size must be"));
  EXPECT_TRUE(refused(changed({{"hidden_size", 32.5}}), "hidden_size must be a whole number"));
  EXPECT_TRUE(refused(changed({{"hidden_size", "32"}}), "got \"32\""));
  EXPECT_TRUE(refused(changed({{"head_dim", 7}}), "even size"));
  EXPECT_TRUE(refused(changed({{"rms_norm_eps", -1}}), "rms_norm_eps must be a number from 0 to 1"));
  EXPECT_TRUE(refused(changed({{"tie_word_embeddings", 1}}), "tie_word_embeddings must be true or false"));
  EXPECT_TRUE(refused(changed({{"pad_token_id", 64}}), "pad_token_id must be a whole number from -64 to 63"));
  EXPECT_TRUE(refused(changed({{"eos_token_id", "</s>"}}), "eos_token_id must be a token id"));
}

TEST(ModelConfig, SoftCapsAreGemma2sAlone) {
  const ModelConfig config = read_model_config(config_of("gemma2"), "config.json");
  EXPECT_EQ(config.attention_soft_cap, 1.5);
  EXPECT_EQ(config.logit_soft_cap, 4);
  Json absent = config_of("gemma2");
  absent.erase("attn_logit_softcapping"), absent.erase("final_logit_softcapping"), absent.erase("layer_types");
  const ModelConfig published = read_model_config(absent, "config.json");
  EXPECT_EQ(published.attention_soft_cap, 50);
  EXPECT_EQ(published.logit_soft_cap, 30);
  EXPECT_EQ(published.layers[0].window, 4);  // every second layer sees everything
  EXPECT_EQ(published.layers[1].window, 0);
  const ModelConfig none = read_model_config(changed({{"attn_logit_softcapping", nullptr}, {"final_logit_softcapping", nullptr}}, "gemma2"), "config.json");
  EXPECT_EQ(none.attention_soft_cap, 0);
  EXPECT_EQ(none.logit_soft_cap, 0);
  EXPECT_TRUE(refused(changed({{"attn_logit_softcapping", 0}}, "gemma2"), "attn_logit_softcapping must be a number of at least"));
  EXPECT_TRUE(refused(changed({{"final_logit_softcapping", "30"}}, "gemma2"), "final_logit_softcapping must be a number of at least"));
  EXPECT_TRUE(refused(changed({{"logits_soft_cap", 30.0}}, "gemma2"), "logits_soft_cap = 30.0 is not implemented"));
  for (const char* family : {"gemma3_text", "llama"}) EXPECT_EQ(read_model_config(changed({{"attn_logit_softcapping", nullptr}, {"final_logit_softcapping", nullptr}}, family), "config.json").logit_soft_cap, 0);
}

TEST(ModelConfig, RefusesWhatItDoesNotKnow) {
  EXPECT_TRUE(refused(changed({{"model_type", "mamba"}}), "config.json: model_type \"mamba\" is not one of the families implemented here: gemma2, gemma3_text, llama"));
  EXPECT_TRUE(refused(changed({{"architectures", {"LlamaForSequenceClassification"}}}), "does not hold LlamaForCausalLM"));
  EXPECT_TRUE(refused(changed({{"rope_parameters", {{"rope_type", "dynamic"}, {"factor", 2}}}}), "rope_type dynamic is not implemented"));
  EXPECT_TRUE(refused(changed({{"rope_parameters", {{"mrope_section", {1, 2}}}}}), "RoPE parameter mrope_section = [1,2] is not implemented"));
  EXPECT_TRUE(refused(changed({{"rope_parameters", {{"rope_type", "llama3"}, {"factor", 0}}}}), "factor must be a number of at least"));
  EXPECT_TRUE(refused(changed({{"rope_parameters", {{"rope_type", "linear"}}}}), "factor must be a number"));
  EXPECT_TRUE(refused(changed({{"rope_parameters", "fast"}}), "rope_parameters must be an object"));
  EXPECT_TRUE(refused(changed({{"partial_rotary_factor", 0.5}}), "partial_rotary_factor = 0.5 is not implemented for this family"));
  for (const std::string key : {"final_logit_softcapping", "attn_logit_softcapping", "logits_soft_cap"})
    for (const char* family : {"gemma3_text", "llama"}) EXPECT_TRUE(refused(changed({{key, 30.0}}, family), key + " = 30.0 is not implemented"));
  EXPECT_TRUE(refused(changed({{"use_bidirectional_attention", true}}, "gemma3_text"), "use_bidirectional_attention = true is not implemented"));
  EXPECT_TRUE(refused(changed({{"layer_types", {"full_attention", "linear_attention", "full_attention"}}}, "qwen2"), "layer_types[1] = \"linear_attention\""));
  EXPECT_TRUE(refused(changed({{"layer_types", {"full_attention"}}}, "qwen2"), "layer_types must list all 3 layers"));
  EXPECT_TRUE(refused(changed({{"layer_types", {"sliding_attention", "full_attention"}}}, "mistral"), "are all of one kind"));
  EXPECT_TRUE(refused(changed({{"use_sliding_window", false}, {"layer_types", {"sliding_attention", "full_attention", "full_attention"}}}, "qwen2"), "no sliding window is set"));
  EXPECT_TRUE(refused(changed({{"no_rope_layers", {1, 0, 2, 1}}}, "smollm3"), "no_rope_layers[2] must be 0 or 1"));
  EXPECT_TRUE(refused(changed({{"rope_scaling", {{"type", "linear"}, {"factor", 8.0}}}}, "gemma3_text"), "rope_scaling.type is not read for this family"));
  Json phi = config_of("phi3");
  phi["rope_parameters"]["long_factor"] = Json::array({1, 2});
  EXPECT_TRUE(refused(phi, "long_factor must be a list of 3 numbers"));
  phi["rope_parameters"] = Json{{"rope_type", "llama3"}};
  EXPECT_TRUE(refused(phi, "rope_type llama3 is not implemented for this family"));
  EXPECT_TRUE(refused(Json::object(), "\"model_type\" is missing"));
}

TEST(ModelConfig, SaysThatBaseDropoutIsNotApplied) {
  std::string said;
  const LogSink before = set_log_sink([&](LogLevel, std::string_view line) { said += line; });
  read_model_config(changed({{"attention_dropout", 0.1}}), "config.json");
  set_log_sink(before);
  EXPECT_EQ(said, "config.json: attention_dropout = 0.1 is not applied: training runs without dropout in the base model");
}

TEST(ModelConfig, KeepsWhatItDoesNotUse) {
  const ModelConfig config = read_model_config(changed({{"my_note", "kept"}, {"dtype", "bfloat16"}}), "config.json");
  EXPECT_EQ(config.source["my_note"], "kept");
  EXPECT_EQ(config.source["dtype"], "bfloat16");
}

TEST(ModelConfig, StopIdsComeFromTheGenerationConfigFirst) {
  const testing::ScratchFolder folder;
  std::ofstream(folder / "config.json") << to_line(changed({{"eos_token_id", 5}, {"bos_token_id", 4}}));
  EXPECT_EQ(read_model_config(folder.path()).eos_ids, std::vector<std::int64_t>{5});
  EXPECT_EQ(read_model_config(folder.path()).bos_id, 4);
  std::ofstream(folder / "generation_config.json") << R"({"eos_token_id": [6, 7]})";
  EXPECT_EQ(read_model_config(folder.path()).eos_ids, (std::vector<std::int64_t>{6, 7}));
  std::ofstream(folder / "generation_config.json") << R"({"eos_token_id": "x"})";
  EXPECT_TRUE(fails_with(ErrorKind::kData, "generation_config.json: eos_token_id", [&] { read_model_config(folder.path()); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "config.json", [&] { read_model_config(folder / "nowhere"); }));
}

}  // namespace
}  // namespace alambic::models
