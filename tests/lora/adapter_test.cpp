// SPDX-License-Identifier: Apache-2.0
#include "lora/adapter.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>

#include <cmath>
#include <set>

#include "checkpoints/hf_folder.h"
#include "core/config.h"
#include "core/json.h"
#include "core/log.h"
#include "lora/merge.h"
#include "tests/closeness.h"
#include "tests/golden.h"
#include "tests/support.h"

namespace alambic::lora {
namespace {

using testing::fails_with;
using testing::golden_path;
using testing::is_close;

models::Decoder base(const std::string& name, at::ScalarType type = at::kFloat) { return checkpoints::load_decoder(golden_path("peft/" + name), type); }

models::Linear& linear_at(models::Decoder& decoder, const std::string& path) {
  for (const models::NamedLinear& linear : decoder.linears())
    if (linear.path == path) return *linear.linear;
  throw std::runtime_error("no Linear " + path);
}

std::set<std::string> names_of(const std::vector<models::NamedTensor>& tensors) {
  std::set<std::string> names;
  for (const models::NamedTensor& tensor : tensors) names.insert(tensor.name);
  return names;
}

at::Tensor logits_of(const models::Decoder& decoder) {
  const testing::Golden golden("peft/logits.safetensors");
  const at::Tensor ids = golden["ids"][0];
  const at::NoGradGuard evaluating;
  const models::Input input{.tokens_T = ids, .positions_T = at::empty_like(ids).copy_((ids * 0 + 1).cumsum(0) - 1), .document_lengths = {ids.numel()}};
  return decoder.logits_TV(decoder.hidden_TD(input));
}

/// Silences warnings that a test provokes on purpose, and keeps them.
class Warnings {
 public:
  Warnings() : old_(set_log_sink([this](LogLevel, std::string_view line) { text += std::string(line) + "\n"; })) {}
  ~Warnings() { set_log_sink(old_); }
  std::string text;

 private:
  LogSink old_;
};

/// A PEFT LoraConfig (keyword arguments) as ours. Only what the cases of matching.json use.
LoraConfig config_of(const Json& peft) {
  LoraConfig config{.rank = 8, .alpha = 8};
  const auto names = [&](const char* key) -> std::vector<std::string> {
    if (!peft.contains(key)) return {};
    if (peft[key].is_array()) return peft[key].get<std::vector<std::string>>();
    const std::string text = peft[key].get<std::string>();
    return {text == "all-linear" || text == "All-Linear" ? "all-linear" : "regex:" + text};
  };
  config.targets = names("target_modules");
  config.exclude = names("exclude_modules");
  config.modules_to_save = names("modules_to_save");
  if (peft.contains("rank_pattern")) config.rank_pattern = peft["rank_pattern"].get<std::map<std::string, std::int64_t>>();
  if (peft.contains("alpha_pattern")) config.alpha_pattern = peft["alpha_pattern"].get<std::map<std::string, double>>();
  config.rslora = peft.value("use_rslora", false);
  return config;
}

TEST(Adapter, EveryConfigMeansToUsWhatItMeansToPeft) {
  const Json cases = read_json_file(golden_path("peft/matching.json"));
  SCOPED_TRACE(to_line(cases[""]));
  int num_adapted = 0, num_refused = 0;
  for (const auto& [name, peft] : cases.items()) {
    if (name.empty()) continue;
    SCOPED_TRACE(name);
    const Warnings silenced;
    models::Decoder decoder = base(name.substr(0, name.find('.')));
    const LoraConfig config = config_of(peft["config"]);
    if (peft.contains("refused")) {
      EXPECT_TRUE(fails_with(ErrorKind::kUsage, "lora.", [&] { attach(decoder, config, 1, Unmatched::kWarned); }));
      ++num_refused;
      continue;
    }
    attach(decoder, config, 1, Unmatched::kWarned);
    Json adapted = Json::object();
    for (const models::NamedLinear& linear : decoder.linears()) {
      if (!linear.linear->adapter) continue;
      const auto found = peft["adapted"].find(linear.path);
      ASSERT_NE(found, peft["adapted"].end()) << linear.path << " is adapted here and not by PEFT";
      EXPECT_EQ(linear.linear->adapter->a_RI.size(0), (*found)[0].get<std::int64_t>()) << linear.path;
      EXPECT_DOUBLE_EQ(linear.linear->adapter->scale, (*found)[1].get<double>()) << linear.path;
      adapted[linear.path] = true;
      ++num_adapted;
    }
    EXPECT_EQ(adapted.size(), peft["adapted"].size());
    EXPECT_EQ(names_of(trainable(decoder)), peft["trained"].get<std::set<std::string>>());
  }
  EXPECT_GT(num_adapted, 100);
  EXPECT_GT(num_refused, 5);
}

TEST(Adapter, StartsAsPeftStarts) {
  models::Decoder decoder = base("llama_untied");
  const at::Tensor before = logits_of(decoder);
  attach(decoder, {.rank = 64, .alpha = 8, .dora = true}, 5);
  const models::Adapter& adapter = *linear_at(decoder, "model.layers.1.mlp.down_proj").adapter;
  // Uniform on [-1/sqrt(24), 1/sqrt(24)): the standard deviation is the bound over sqrt(3).
  const double bound = 1 / std::sqrt(24.0);
  EXPECT_LE(adapter.a_RI.abs().max().item<double>(), bound);
  EXPECT_GT(adapter.a_RI.abs().max().item<double>(), 0.98 * bound);
  EXPECT_NEAR(adapter.a_RI.std().item<double>(), bound / std::sqrt(3.0), 0.03 * bound);
  EXPECT_NEAR(adapter.a_RI.mean().item<double>(), 0, 0.05 * bound);
  EXPECT_EQ(adapter.b_OR.abs().max().item<double>(), 0);
  EXPECT_TRUE(is_close(adapter.magnitude_O, linear_at(decoder, "model.layers.1.mlp.down_proj").weight_OI.pow(2).sum(1).sqrt(), {.relative = 1e-6}));
  EXPECT_TRUE(is_close(logits_of(decoder), before, {.absolute = 1e-5})) << "a new adapter changes nothing";
}

TEST(Adapter, FirstWeightsDependOnSeedAndNameAlone) {
  models::Decoder one = base("llama_untied"), other = base("llama_untied"), third = base("llama_untied");
  attach(one, {.targets = {"q_proj", "up_proj"}}, 5);
  attach(other, {.targets = {"up_proj"}}, 5);
  attach(third, {.targets = {"up_proj"}}, 6);
  const std::string path = "model.layers.1.mlp.up_proj";
  EXPECT_TRUE(at::equal(linear_at(one, path).adapter->a_RI, linear_at(other, path).adapter->a_RI));
  EXPECT_FALSE(at::equal(linear_at(one, path).adapter->a_RI, linear_at(third, path).adapter->a_RI));
  EXPECT_FALSE(at::equal(linear_at(one, path).adapter->a_RI, linear_at(one, "model.layers.0.mlp.up_proj").adapter->a_RI));
}

TEST(Adapter, OnlyWhatIsAskedTrains) {
  models::Decoder decoder = base("llama_tied");
  attach(decoder, {.targets = {"q_proj"}}, 5);
  EXPECT_EQ(names_of(trainable(decoder)),
            (std::set<std::string>{"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
                                   "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight", "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"}));
  for (const models::NamedTensor& tensor : decoder.tensors()) EXPECT_FALSE(tensor.tensor->requires_grad()) << tensor.name;
}

TEST(Adapter, ATiedPairPartsUnlessAskedNotTo) {
  Warnings warnings;
  const auto trained = [](models::Decoder& decoder) {
    std::set<std::string> names;
    for (const std::string& name : names_of(trainable(decoder)))
      if (name.find("lora_") == std::string::npos) names.insert(name);
    return names;
  };
  const std::string embedding = "base_model.model.model.embed_tokens.weight", head = "base_model.model.lm_head.weight";
  LoraConfig config{.targets = {"q_proj"}};
  {
    models::Decoder decoder = base("llama_tied");
    config.modules_to_save = {"embed_tokens"};
    attach(decoder, config, 5);
    EXPECT_EQ(trained(decoder), std::set<std::string>{embedding});
    EXPECT_FALSE(decoder.head_tied);
    EXPECT_FALSE(decoder.head.weight_OI.requires_grad());
    EXPECT_NE(warnings.text.find("ensure_weight_tying"), std::string::npos);
  }
  {
    models::Decoder decoder = base("llama_tied");
    config.modules_to_save = {"lm_head"};
    attach(decoder, config, 5);
    EXPECT_EQ(trained(decoder), std::set<std::string>{head});
    EXPECT_FALSE(decoder.head_tied);
    EXPECT_FALSE(decoder.embedding_VD.requires_grad());
  }
  {
    models::Decoder decoder = base("llama_tied");
    config.modules_to_save = {"lm_head", "embed_tokens"};
    attach(decoder, config, 5);
    EXPECT_EQ(trained(decoder), (std::set<std::string>{embedding, head}));
    EXPECT_FALSE(decoder.head.weight_OI.is_same(decoder.embedding_VD));
  }
  {
    models::Decoder decoder = base("llama_tied");
    config.ensure_weight_tying = true;
    attach(decoder, config, 5);
    EXPECT_EQ(trained(decoder), std::set<std::string>{embedding});
    EXPECT_TRUE(decoder.head_tied);
    EXPECT_TRUE(decoder.head.weight_OI.is_same(decoder.embedding_VD));
  }
}

TEST(Adapter, TrainedWeightsAreF32CopiesWhateverTheBaseIs) {
  const Warnings silenced;
  models::Decoder decoder = base("llama_tied", at::kBFloat16);
  const at::Tensor stored = decoder.embedding_VD;
  attach(decoder, {.targets = {"q_proj"}, .dora = true, .modules_to_save = {"embed_tokens", "lm_head", "norm"}}, 5);
  for (const models::NamedTensor& tensor : trainable(decoder)) {
    EXPECT_EQ(tensor.tensor->scalar_type(), at::kFloat) << tensor.name;
    EXPECT_TRUE(tensor.tensor->is_leaf() && tensor.tensor->requires_grad()) << tensor.name;
  }
  EXPECT_FALSE(decoder.embedding_VD.data_ptr() == stored.data_ptr()) << "training would write into the base";
  const at::Tensor ids = at::arange(12);
  const at::Tensor logits = decoder.logits_TV(decoder.hidden_TD({.tokens_T = ids, .positions_T = ids, .document_lengths = {12}}));
  logits.pow(2).sum().backward();
  for (const models::NamedTensor& tensor : trainable(decoder)) {
    ASSERT_TRUE(tensor.tensor->grad().defined()) << tensor.name;
    EXPECT_EQ(tensor.tensor->grad().scalar_type(), at::kFloat) << tensor.name;
  }
  EXPECT_EQ(linear_at(decoder, "model.layers.0.self_attn.k_proj").weight_OI.scalar_type(), at::kBFloat16);
}

TEST(Adapter, AWholeLinearTrainsInF32Only) {
  models::Decoder narrow = base("llama_tied", at::kBFloat16), wide = base("llama_tied");
  const LoraConfig config{.targets = {"q_proj"}, .modules_to_save = {"o_proj"}};
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "o_proj can be trained whole only when computing in f32", [&] { attach(narrow, config, 1); }));
  EXPECT_NO_THROW(attach(wide, config, 1));
}

TEST(Adapter, EverythingTrainsUnderPublishedNames) {
  models::Decoder decoder = base("llama_tied");
  train_everything(decoder);
  EXPECT_TRUE(decoder.head_tied);
  EXPECT_TRUE(decoder.head.weight_OI.is_same(decoder.embedding_VD));
  const auto tensors = trainable(decoder);
  EXPECT_EQ(tensors.size(), decoder.tensors().size());
  EXPECT_TRUE(names_of(tensors).contains("model.layers.0.input_layernorm.weight"));
  EXPECT_FALSE(names_of(tensors).contains("lm_head.weight"));
}

// Each line names what to change; all of them come at once.
TEST(Adapter, RefusesAllProblemsAtOnce) {
  models::Decoder decoder = base("llama_tied");
  const auto message = [&](const LoraConfig& config) {
    try {
      attach(decoder, config, 1);
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kUsage);
      return std::string(error.what());
    }
    return std::string();
  };
  const std::string ranges = message({.rank = 0, .alpha = -1, .dropout = 1, .rank_pattern = {{"q_proj", -3}}});
  for (const char* words : {"lora.rank: 0", "lora.alpha: -1", "lora.dropout: 1", "lora.rank_pattern.q_proj: -3"}) EXPECT_NE(ranges.find(words), std::string::npos) << ranges;
  const std::string names = message({.targets = {"q_prj", "v_proj"}, .rank_pattern = {{"upproj", 3}}, .modules_to_save = {"embed_token"}});
  for (const char* words : {"\"q_prj\" matches no module; did you mean \"q_proj\"?", "rank_pattern: \"upproj\"", "did you mean \"embed_tokens\"?"})
    EXPECT_NE(names.find(words), std::string::npos) << names;
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "modules_to_save", [&] { attach(decoder, {.targets = {"embed_tokens", "q_proj"}}, 1); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "stand alone", [&] { attach(decoder, {.targets = {"regex:.*", "q_proj"}}, 1); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "no module is left", [&] { attach(decoder, {.targets = {"q_proj"}, .exclude = {"q_proj"}}, 1); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "tied to the trained embedding", [&] {
    attach(decoder, {.targets = {"lm_head"}, .modules_to_save = {"embed_tokens"}, .ensure_weight_tying = true}, 1);
  }));
  for (const models::NamedLinear& linear : decoder.linears()) EXPECT_FALSE(linear.linear->adapter) << "a refused config left an adapter";
}

TEST(Adapter, ConfigIsReadFromTheRunsYaml) {
  struct Run {
    LoraConfig lora;
    void visit(FieldVisitor& fields) { fields.group("lora", "the adapter", lora); }
  };
  const Run run = read_config<Run>("", {"lora.rank=8", "lora.targets=[q_proj, v_proj]", "lora.rank_pattern={q_proj: 4}", "lora.modules_to_save=[lm_head]", "lora.dora=true"});
  EXPECT_EQ(run.lora.rank, 8);
  EXPECT_EQ(run.lora.targets, (std::vector<std::string>{"q_proj", "v_proj"}));
  EXPECT_EQ(run.lora.rank_pattern.at("q_proj"), 4);
  EXPECT_TRUE(run.lora.dora);
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "lora.rank", [] { (void)read_config<Run>("", {"lora.rank=0"}); }));
}

}  // namespace
}  // namespace alambic::lora
