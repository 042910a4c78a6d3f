// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/peft_folder.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <cstdlib>
#include <limits>

#include "checkpoints/hf_folder.h"
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

// Folders made by PEFT: tests/oracle/peft_adapter_oracle.py.
const char* const kFolders[] = {"llama_tied.lora", "llama_tied.patterns", "llama_tied.dora", "llama_tied.save_embedding", "llama_tied.save_head",
                                "llama_tied.save_both", "llama_tied.save_tied", "llama_tied.head", "llama_untied.save_both", "llama_untied.exclude",
                                "qwen2.dora_rslora", "phi3.lora", "phi3.dora", "gemma3.lora", "gemma2.lora"};

std::string model_of(const std::string& folder) { return folder.substr(0, folder.find('.')); }

models::Decoder base(const std::string& folder, at::ScalarType type = at::kFloat) { return load_decoder(golden_path("peft/" + model_of(folder)), type); }

at::Tensor logits_of(const models::Decoder& decoder) {
  const Golden golden("peft/logits.safetensors");
  const at::Tensor ids = golden["ids"][0];
  const at::NoGradGuard evaluating;
  return decoder.logits_TV(decoder.hidden_TD({.tokens_T = ids, .positions_T = at::arange(ids.numel()), .document_lengths = {ids.numel()}}));
}

/// Silences warnings that a test provokes on purpose.
class Quiet {
 public:
  Quiet() : old_(set_log_sink([](LogLevel, std::string_view) {})) {}
  ~Quiet() { set_log_sink(old_); }

 private:
  LogSink old_;
};

class PeftFolder : public ::testing::TestWithParam<const char*> {};

TEST_P(PeftFolder, OfPeftGivesPeftsLogits) {
  const Quiet quiet;
  const Golden peft("peft/logits.safetensors");
  SCOPED_TRACE(peft.provenance());
  models::Decoder decoder = base(GetParam());
  EXPECT_TRUE(is_close(logits_of(decoder), peft[model_of(GetParam())], {.relative = 1e-4, .absolute = 1e-4}));
  load_adapter(decoder, golden_path("peft/" + std::string(GetParam())));
  EXPECT_TRUE(is_close(logits_of(decoder), peft[GetParam()], {.relative = 1e-4, .absolute = 1e-4}));
  EXPECT_FALSE(is_close(logits_of(decoder), peft[model_of(GetParam())], {.absolute = 1e-2})) << "the adapter changes nothing: the test is void";
}

// What we write holds the same tensors under the same keys, and no field of the config says another thing. The oracle script
// lets PEFT itself load these folders (ALAMBIC_TEST_OUTPUT) and compares logits.
TEST_P(PeftFolder, WritesWhatPeftReads) {
  const Quiet quiet;
  const ScratchFolder scratch;
  const char* const kept = std::getenv("ALAMBIC_TEST_OUTPUT");
  const fs::path theirs = golden_path("peft/" + std::string(GetParam())), ours = (kept ? fs::path(kept) : scratch.path()) / GetParam();
  models::Decoder decoder = base(GetParam());
  const lora::LoraConfig config = load_adapter(decoder, theirs);
  write_adapter(decoder, config, "some/base", ours, std::string(64, 'a'));

  const SafetensorsFile expected(theirs / "adapter_model.safetensors"), written(ours / "adapter_model.safetensors");
  std::size_t num_compared = 0;
  for (const auto& [key, entry] : expected.entries()) {
    if (key.ends_with(".base_layer.weight")) continue;  // PEFT's copy of a base weight: read and checked, not written
    ASSERT_TRUE(written.entries().contains(key)) << key;
    EXPECT_TRUE(at::equal(written.tensor(key), expected.tensor(key))) << key;
    ++num_compared;
  }
  EXPECT_EQ(written.entries().size(), num_compared);
  EXPECT_EQ(written.metadata().at("format"), "pt");

  const Json said = read_json_file(ours / "adapter_config.json"), meant = read_json_file(theirs / "adapter_config.json");
  for (const auto& [key, value] : said.items()) {
    if (key == "base_model_name_or_path" || key == "init_lora_weights") continue;
    EXPECT_EQ(to_line(value), to_line(meant[key])) << key;
  }
  std::string last;
  for (const auto& [key, value] : said.items()) EXPECT_LT(std::exchange(last, key), key);
  EXPECT_EQ(said["base_model_name_or_path"], "some/base");

  models::Decoder again = base(GetParam());
  load_adapter(again, ours, std::string(64, 'a'));
  EXPECT_TRUE(at::equal(logits_of(again), logits_of(decoder)));
}

std::string test_name(const ::testing::TestParamInfo<const char*>& test) {
  std::string name = test.param;
  name[name.find('.')] = '_';
  return name;
}
INSTANTIATE_TEST_SUITE_P(Folders, PeftFolder, ::testing::ValuesIn(kFolders), test_name);

/// A copy of a PEFT folder whose config or tensors a test damages.
struct Damaged {
  ScratchFolder scratch;
  fs::path folder = scratch / "adapter";
  std::string name;
  explicit Damaged(const std::string& from) : name(from) { fs::copy(golden_path("peft/" + from), folder); }
  void config(const std::function<void(Json&)>& change) const {
    Json json = read_json_file(folder / "adapter_config.json");
    change(json);
    write_file(folder / "adapter_config.json", json.dump(2));
  }
  void tensors(const std::function<void(std::map<std::string, at::Tensor>&)>& change, const std::map<std::string, std::string>& metadata = {{"format", "pt"}}) const {
    std::map<std::string, at::Tensor> all;
    {
      const SafetensorsFile file(folder / "adapter_model.safetensors");
      for (const auto& [key, entry] : file.entries()) all[key] = file.tensor(key).clone();
    }
    change(all);
    std::vector<std::pair<std::string, at::Tensor>> list(all.begin(), all.end());
    write_safetensors(folder / "adapter_model.safetensors", list, metadata);
  }
  ::testing::AssertionResult refused(const std::string& words, const std::string& base_hash = "") const {
    models::Decoder decoder = base(name);
    return fails_with(ErrorKind::kData, words, [&] { load_adapter(decoder, folder, base_hash); });
  }
};

constexpr const char* kA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
constexpr const char* kB = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";

TEST(PeftConfig, RefusesByNameWhatIsNotImplemented) {
  const std::map<std::string, Json> others = {
      {"bias", "all"}, {"fan_in_fan_out", true}, {"layers_to_transform", {0}}, {"layers_pattern", "layers"}, {"layer_replication", Json::array({{0, 1}})},
      {"init_lora_weights", "loftq"}, {"use_qalora", true}, {"lora_bias", true}, {"trainable_token_indices", {{"wte", {1, 2}}}}, {"target_parameters", {"x"}},
      {"alora_invocation_tokens", {1}}, {"loftq_config", {{"loftq_bits", 4}}}, {"peft_type", "IA3"}, {"task_type", "SEQ_CLS"}, {"use_bdlora", {{"nblocks", 2}}},
      {"kasa_config", {{"x", 1}}}, {"megatron_config", {{"x", 1}}}, {"velora_config", {{"x", 1}}}, {"monteclora_config", {{"x", 1}}}, {"arrow_config", {{"x", 1}}},
      {"corda_config", {{"x", 1}}}, {"eva_config", {{"x", 1}}}, {"lora_ga_config", {{"x", 1}}}, {"qalora_group_size", 8}, {"a_field_of_tomorrow", 1},
      {"r", "8"}, {"lora_alpha", nullptr}, {"use_dora", 1}, {"target_modules", nullptr}, {"target_modules", {1}}, {"rank_pattern", {1}}, {"lora_dropout", "0"}};
  for (const auto& [field, value] : others) {
    const Damaged adapter("llama_tied.lora");
    adapter.config([&](Json& json) { json[field] = value; });
    EXPECT_TRUE(adapter.refused(field)) << field;
  }
  const Damaged both("llama_tied.lora");
  both.config([](Json& json) { json["bias"] = "all", json["fan_in_fan_out"] = true; });
  EXPECT_TRUE(both.refused("bias"));
  EXPECT_TRUE(both.refused("fan_in_fan_out")) << "all problems come at once";
}

TEST(PeftConfig, HasEveryFieldOfPeft) {  // the goldens hold all of them
  for (const char* folder : kFolders) EXPECT_NO_THROW(read_adapter_config(golden_path("peft/" + std::string(folder)))) << folder;
  const Damaged adapter("llama_tied.lora");
  adapter.config([](Json& json) { json["a_field_of_tomorrow"] = nullptr; });
  EXPECT_NO_THROW(read_adapter_config(adapter.folder));
}

TEST(PeftConfig, PatternsOutOfOrderAreRefused) {
  const Damaged adapter("llama_tied.lora");
  adapter.config([](Json& json) { json["rank_pattern"] = {{"q_proj", 4}, {"layers.0.self_attn.q_proj", 4}}; });
  EXPECT_TRUE(adapter.refused("sorted"));
}

TEST(PeftConfig, AbsurdRankIsRefusedBeforeAnythingIsAllocated) {
  const Damaged adapter("llama_tied.lora");
  adapter.config([](Json& json) { json["r"] = 1'000'000'000'000; });
  EXPECT_TRUE(adapter.refused("lora.rank"));
}

TEST(PeftTensors, EachMisfitIsNamed) {
  const Damaged adapter("llama_tied.lora");
  adapter.tensors([](auto& all) {
    all.erase(kB);
    all[kA] = at::zeros({3, 16});
    all["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = at::zeros({4, 16});
    all["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"][1][2] = 12345.0f;
  });
  // Our writer refuses what is not finite, so the value is put into the file behind its back.
  std::string bytes = read_file(adapter.folder / "adapter_model.safetensors");
  const float before = 12345.0f, after = std::numeric_limits<float>::quiet_NaN();
  const std::size_t at = bytes.find(std::string(reinterpret_cast<const char*>(&before), 4));
  ASSERT_NE(at, std::string::npos);
  bytes.replace(at, 4, reinterpret_cast<const char*>(&after), 4);
  write_file(adapter.folder / "adapter_model.safetensors", bytes);

  EXPECT_TRUE(adapter.refused("q_proj.lora_B.weight: missing"));
  EXPECT_TRUE(adapter.refused("q_proj.lora_A.weight: shape [3, 16], must be [4, 16]"));
  EXPECT_TRUE(adapter.refused("layers.7.self_attn.q_proj.lora_A.weight: unexpected; the nearest"));
  EXPECT_TRUE(adapter.refused("layers.1.self_attn.q_proj.lora_A.weight: element 18 is not finite"));
  models::Decoder decoder = base("llama_tied.lora");
  EXPECT_THROW(load_adapter(decoder, adapter.folder), Error);
  for (const models::NamedLinear& linear : decoder.linears()) EXPECT_FALSE(linear.linear->adapter) << "a refused adapter was attached";
}

// A vocabulary that was resized in training has other rows than the base: it must not load as if it fitted (faults A10, 42).
TEST(PeftTensors, AResizedVocabularyIsRefused) {
  const Quiet quiet;
  const Damaged adapter("llama_tied.save_both");
  adapter.tensors([](auto& all) { all["base_model.model.lm_head.weight"] = at::zeros({50, 16}); });
  EXPECT_TRUE(adapter.refused("base_model.model.lm_head.weight: shape [50, 16], must be [48, 16]"));
}

TEST(PeftTensors, ABaseCopyMustBeTheBase) {
  const Damaged adapter("llama_tied.head");
  adapter.tensors([](auto& all) { all.at("base_model.model.lm_head.base_layer.weight") += 1; });
  EXPECT_TRUE(adapter.refused("not the base model's own"));
}

TEST(PeftTensors, ATieThatDoesNotHoldIsRefused) {
  const Damaged adapter("llama_tied.save_tied");
  adapter.tensors([](auto& all) { all.at("base_model.model.lm_head.weight") += 1; });
  EXPECT_TRUE(adapter.refused("but the two differ"));
}

TEST(PeftTensors, AnotherBaseIsRefused) {
  const Damaged adapter("llama_tied.lora");
  adapter.tensors([](auto&) {}, {{"format", "pt"}, {kBaseHashKey, std::string(64, 'a')}});
  models::Decoder decoder = base("llama_tied.lora");
  EXPECT_NO_THROW(load_adapter(decoder, adapter.folder, std::string(64, 'a')));
  EXPECT_TRUE(adapter.refused("another base", std::string(64, 'b')));
}

TEST(PeftTensors, AnAdapterOfAnotherModelIsRefused) {
  const Quiet quiet;
  Damaged adapter("llama_tied.lora");
  adapter.name = "phi3";
  EXPECT_TRUE(adapter.refused("layers.0.self_attn.q_proj.lora_A.weight: unexpected"));
  adapter.config([](Json& json) { json["target_modules"] = {"q_proj"}; });
  EXPECT_TRUE(adapter.refused("adapter_config.json does not fit the base model: lora.targets: no module is left"));
}

TEST(PeftTensors, MissingFilesAreNamed) {
  const Damaged adapter("llama_tied.lora");
  fs::rename(adapter.folder / "adapter_model.safetensors", adapter.folder / "adapter_model.bin");
  EXPECT_TRUE(adapter.refused("pickled"));
  fs::remove(adapter.folder / "adapter_config.json");
  EXPECT_TRUE(adapter.refused("adapter_config.json"));
}

TEST(PeftTensors, HalfPrecisionAdaptersBecomeF32) {
  const Damaged adapter("llama_tied.lora");
  adapter.tensors([](auto& all) {
    for (auto& [key, tensor] : all) tensor = tensor.to(at::kBFloat16);
  });
  models::Decoder decoder = base("llama_tied.lora", at::kBFloat16);
  load_adapter(decoder, adapter.folder);
  for (const models::NamedTensor& tensor : lora::trainable(decoder)) EXPECT_EQ(tensor.tensor->scalar_type(), at::kFloat) << tensor.name;
}

TEST(PeftTensors, NonFiniteAdaptersAreNotWritten) {
  const ScratchFolder scratch;
  models::Decoder decoder = base("llama_tied.lora");
  lora::LoraConfig config{.targets = {"q_proj"}};
  lora::attach(decoder, config, 1);
  decoder.linears().front().linear->adapter->b_OR.data().fill_(std::numeric_limits<float>::infinity());
  EXPECT_TRUE(fails_with(ErrorKind::kNumerics, "lora_B", [&] { write_adapter(decoder, config, "x", scratch / "out"); }));
}

}  // namespace
}  // namespace alambic::checkpoints
