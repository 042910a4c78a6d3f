// SPDX-License-Identifier: Apache-2.0
// Every way to train, through a whole run: it learns, resumes to the same bits, is merged, and the merged folder read again
// computes what the run's own result computes.
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include <fstream>
#include <functional>

#include "checkpoints/base_weights.h"
#include "checkpoints/hf_folder.h"
#include "checkpoints/merge_folder.h"
#include "checkpoints/peft_folder.h"
#include "checkpoints/run_state.h"
#include "checkpoints/safetensors.h"
#include "core/files.h"
#include "core/log.h"
#include "models/allocation.h"
#include "models/fused_blocks.h"
#include "tests/support.h"
#include "tests/train/tiny_run.h"
#include "train/evaluate.h"
#include "train/finetune.h"
#include "train/run_log.h"

namespace alambic::train {
namespace {

using testing::fails_with;
using testing::ScratchFolder;
using testing::tiny_config;

struct Method {
  const char* name;
  const char* model;  // of tests/golden/peft
  std::function<void(TrainConfig&)> set;
  std::vector<std::string> whole = {};  // tensors that are trained whole and must differ from the base's
  bool head_tied = false;               // of the merged folder
  double tolerance = 1e-6;              // of the loss of the result, read again in the run's own type
};
void PrintTo(const Method& method, std::ostream* out) { *out << method.name; }

const std::string kHead = "lm_head.weight", kEmbedding = "model.embed_tokens.weight";
void save(TrainConfig& config, std::vector<std::string> modules, const char* type = "f32") {
  config.lora.modules_to_save = std::move(modules);
  config.compute_type = type;
}

const Method kMethods[] = {
    {"TiedBoth", "llama_tied", [](TrainConfig& config) { save(config, {"embed_tokens", "lm_head"}); }, {kHead, kEmbedding}},
    {"TiedBothBf16", "llama_tied", [](TrainConfig& config) { save(config, {"embed_tokens", "lm_head"}, "bf16"); }, {kHead, kEmbedding}},
    {"TiedHead", "llama_tied", [](TrainConfig& config) { save(config, {"lm_head"}); }, {kHead}},
    {"TiedEmbeddingBf16", "llama_tied", [](TrainConfig& config) { save(config, {"embed_tokens"}, "bf16"); }, {kEmbedding}},
    {"KeptTie", "llama_tied", [](TrainConfig& config) { save(config, {"lm_head"}), config.lora.ensure_weight_tying = true; }, {kEmbedding}, true},
    {"KeptTieBf16", "llama_tied", [](TrainConfig& config) { save(config, {"embed_tokens"}, "bf16"), config.lora.ensure_weight_tying = true; }, {kEmbedding}, true},
    {"UntiedBoth", "llama_untied", [](TrainConfig& config) { save(config, {"embed_tokens", "lm_head"}); }, {kHead, kEmbedding}},
    {"UntiedBothBf16", "llama_untied", [](TrainConfig& config) { save(config, {"embed_tokens", "lm_head"}, "bf16"); }, {kHead, kEmbedding}},
    {"Dora", "llama_tied", [](TrainConfig& config) { config.lora.dora = true; }, {}, true},
    {"DoraBf16", "llama_tied", [](TrainConfig& config) { config.lora.dora = true, config.compute_type = "bf16"; }, {}, true},
    {"Pissa", "llama_tied", [](TrainConfig& config) { config.lora.init = "pissa"; }, {}, true},
    {"PissaFastBf16", "llama_tied", [](TrainConfig& config) { config.lora.init = "pissa_niter_4", config.compute_type = "bf16"; }, {}, true,
     1e-3},  // the run's base was W - scale B0 A0 rounded to bf16, the published one is W
    {"PissaDora", "llama_tied", [](TrainConfig& config) { config.lora.init = "pissa", config.lora.dora = true; }, {}, true},
    {"Olora", "llama_untied", [](TrainConfig& config) { config.lora.init = "olora", config.lora.rslora = true, config.lora.alpha = 1; }},
    // A rank beyond all sense makes A and B large enough for 8-bit moments.
    {"Adamw8bit", "llama_tied", [](TrainConfig& config) { config.optimizer.kind = "adamw8bit", config.lora.rank = 512, config.lora.alpha = 64; }, {}, true},
    {"Adafactor", "llama_tied", [](TrainConfig& config) { config.optimizer.kind = "adafactor"; }, {}, true},
    {"LoraPlus", "llama_tied", [](TrainConfig& config) { config.optimizer.lora_plus_ratio = 4, config.schedule.learning_rate = 5e-3; }, {}, true},
    {"Neftune", "llama_tied", [](TrainConfig& config) { config.neftune_alpha = 5; }, {}, true},
    {"FullMuon", "llama_tied", [](TrainConfig& config) { config.method = "full", config.optimizer.kind = "muon"; }, {kEmbedding, "model.norm.weight"}, true},
    {"FullAdafactor", "llama_untied", [](TrainConfig& config) { config.method = "full", config.optimizer.kind = "adafactor", config.optimizer.embedding_lr_ratio = 0.5; }, {kHead, kEmbedding}},
    {"TokenRows", "llama_tied", [](TrainConfig& config) { config.lora.trainable_tokens = {"3", "10..20"}; }, {kEmbedding}, true},
    {"TokenRowsBf16", "llama_tied", [](TrainConfig& config) { config.lora.trainable_tokens = {"3", "10..20"}, config.compute_type = "bf16"; }, {kEmbedding}, true},
    {"TokenRowsOfBoth", "llama_untied", [](TrainConfig& config) { config.lora.trainable_tokens = {"3", "10..20"}, config.lora.trainable_tokens_head = true; }, {kHead, kEmbedding}},
    {"Nf4", "llama_tied", [](TrainConfig& config) { config.quantize_base = "nf4"; }, {}, true},
    {"Nf4Bf16SinglePhi3", "phi3", [](TrainConfig& config) { config.quantize_base = "nf4", config.nf4_double_quant = false, config.compute_type = "bf16"; }},
    {"Gemma2", "gemma2", [](TrainConfig&) {}, {}, true},
    {"Gemma2Smoothed", "gemma2", [](TrainConfig& config) { config.loss = {.label_smoothing = 0.1, .z_loss = 1e-3}, config.compute_type = "bf16"; }, {}, true},
    {"Nf4DoraGemma", "gemma3", [](TrainConfig& config) { config.quantize_base = "nf4", config.lora.dora = true; }, {}, true},
    {"StoredNf4", "../bitsandbytes/nf4", [](TrainConfig&) {}},  // a folder that transformers quantised
    {"Int8SavedQwen", "qwen2", [](TrainConfig& config) { config.quantize_base = "int8", save(config, {"embed_tokens"}); }, {kEmbedding}},
    {"Restarts", "llama_tied", [](TrainConfig& config) { config.lora.restart_every = 4, config.lora.restart_warmup_steps = 1; }, {}, true},
    {"Full", "llama_tied", [](TrainConfig& config) { config.method = "full"; }, {kEmbedding, "model.norm.weight"}, true},
    {"FullUntied", "llama_untied", [](TrainConfig& config) { config.method = "full"; }, {kHead, kEmbedding, "model.norm.weight"}},
};

/// A copy of a base with all tensors in `type`.
fs::path base_in(const fs::path& folder, const std::string& model, at::ScalarType type) {
  fs::create_directories(folder);
  fs::copy(testing::golden_path("peft/" + model) / "config.json", folder / "config.json");
  const checkpoints::FolderTensors base(testing::golden_path("peft/" + model));
  std::vector<std::pair<std::string, std::vector<std::int64_t>>> names;
  for (const std::string& name : base.names()) names.emplace_back(name, base.shape(name));
  checkpoints::write_weights(folder, names, type, [&](std::size_t i) { return base.tensor(names[i].first); });
  checkpoints::describe_weights(folder, type, model == "llama_tied");
  return folder;
}

struct SilentLog {
  LogSink former = set_log_sink([](LogLevel, std::string_view) {});
  ~SilentLog() { set_log_sink(former); }
};

checkpoints::MergeReport merge(const TrainConfig& config, const TrainReport& report, const fs::path& output, const std::string& weights = "auto") {
  checkpoints::MergeConfig merge;
  merge.base = config.model;
  merge.adapter = report.result;
  merge.output = output;
  merge.weights = weights;
  return checkpoints::merge_folder(merge);
}

class Methods : public ::testing::TestWithParam<Method> {};

TEST_P(Methods, LearnsResumesMergesAndReloads) {
  const Method& method = GetParam();
  const SilentLog silent;
  const ScratchFolder folder;
  const auto config_of = [&](const std::string& run) {
    TrainConfig config = tiny_config(folder.path(), run);
    config.model = testing::golden_path(std::string("peft/") + method.model);
    method.set(config);
    return config;
  };
  const TrainConfig config = config_of("whole"), parts = config_of("parts");
  const TrainReport report = finetune(config, false, [] { return false; });
  const Json& held = report.json["evaluation"][0];
  EXPECT_LT(held["after"]["loss"].get<double>(), held["before"]["loss"].get<double>() - 0.1);

  const auto stops = [](int at) { return [at, asked = 0]() mutable { return ++asked >= at; }; };  // three questions a step
  EXPECT_TRUE(fails_with(ErrorKind::kStopped, "after step 5 of 20", [&] { finetune(parts, false, stops(5 * 3 + 2)); }));
  EXPECT_TRUE(fails_with(ErrorKind::kStopped, "after step 14 of 20", [&] { finetune(parts, true, stops(9 * 3 + 1)); }));
  finetune(parts, true, [] { return false; });
  const fs::path weights = result_name(config) == "weights" ? "weights/model.safetensors" : "adapter/adapter_model.safetensors";
  for (const fs::path& file : {fs::path("checkpoint-20/state.safetensors"), fs::path("metrics.jsonl"), weights})
    EXPECT_EQ(sha256_of_file(config.output / file), sha256_of_file(parts.output / file)) << file;

  const checkpoints::MergeReport merged = merge(config, report, folder / "merged");
  EXPECT_EQ(merged.relation, result_name(config) == "weights" ? "finetune" : "merge");
  EXPECT_EQ(merged.head_tied, method.head_tied);
  EXPECT_EQ(merged.base_format, checkpoints::BaseWeights(config.model, quantization_of(config)).trained_format());
  EXPECT_EQ(merged.base_format != "none", config.quantize_base != "none" || std::string(method.name) == "StoredNf4");
  const std::string card = read_file(folder / "merged/README.md");
  EXPECT_NE(card.find(merged.base_format == "none" ? "the base's own weights, in f32" : "quantised (" + merged.base_format + ") and made dense again in f32"), std::string::npos) << card;
  const checkpoints::FolderTensors before(config.model), after(folder / "merged");
  EXPECT_EQ(after.contains(kHead), !method.head_tied);
  for (const std::string& name : method.whole)
    EXPECT_FALSE(at::equal(after.tensor(name), before.tensor(before.contains(name) ? name : kEmbedding))) << name;

  // In f32 the merged folder's loss is that of the run's result; in the run's own type both are what the report says.
  const data::TokenStore store(folder / "held");
  const auto loss = [&](const models::Decoder& decoder) { return evaluate(decoder, store, config.data.row_length).total.loss(); };
  const auto result_in = [&](at::ScalarType type) {
    const bool whole = result_name(config) == "weights";
    models::Decoder decoder = checkpoints::load_decoder(whole ? report.result : config.model, type, whole ? lora::BaseQuantization{} : checkpoints::adapter_quantization(report.result));
    if (!whole) checkpoints::load_adapter(decoder, report.result);
    models::use_fused_blocks(decoder);  // as training does; where it cannot, neither could training
    return decoder;
  };
  EXPECT_NEAR(loss(checkpoints::load_decoder(folder / "merged", at::kFloat)), loss(result_in(at::kFloat)), 1e-5);
  EXPECT_NEAR(loss(result_in(compute_type_of(config))), held["after"]["loss"].get<double>(), method.tolerance);
}

INSTANTIATE_TEST_SUITE_P(All, Methods, ::testing::ValuesIn(kMethods), [](const auto& test) { return test.param.name; });

TEST(FullFineTune, IsPublishedInTheTypeOfTheBaseByRoundingTheMastersOnce) {
  const SilentLog silent;
  const ScratchFolder folder;
  TrainConfig config = tiny_config(folder.path(), "run");
  config.model = base_in(folder / "base", "llama_tied", at::kBFloat16);
  config.method = "full";
  const TrainReport report = finetune(config, false, [] { return false; });
  EXPECT_EQ(read_json_file(report.result / "config.json").value("dtype", read_json_file(report.result / "config.json").value("torch_dtype", "")), "float32");

  const checkpoints::RunState masters = checkpoints::load_checkpoint(config.output / ("checkpoint-" + std::to_string(report.chosen_step)));
  for (const auto& [weights, type] : {std::pair{"auto", at::kBFloat16}, std::pair{"f16", at::kHalf}, std::pair{"f32", at::kFloat}}) {
    const fs::path output = folder / ("merged-" + std::string(weights));
    const checkpoints::MergeReport merged = merge(config, report, output, weights);
    // The proof measures what rounding costs, instead of comparing rounded weights with themselves.
    EXPECT_EQ(merged.kl > 0, type != at::kFloat) << merged.kl;
    const checkpoints::FolderTensors published(output);
    std::size_t compared = 0;
    for (const auto& [name, master] : masters.tensors) {
      if (!name.starts_with("weights.")) continue;
      const at::Tensor tensor = published.tensor(name.substr(8));
      EXPECT_EQ(tensor.scalar_type(), type);
      EXPECT_TRUE(at::equal(tensor, master.to(type))) << name;
      ++compared;
    }
    EXPECT_EQ(compared, published.names().size());
  }
}

// A process of its own, as ctest runs it: a peak would hide a lower one behind it.
TEST(FullFineTune, TakesNoMoreMemoryAtItsEndThanInItsSteps) {
  const SilentLog silent;
  use_tensor_heaps();  // as the program: they keep what the steps have freed
  const ScratchFolder folder;
  TrainConfig config = tiny_config(folder.path(), "run");
  Json model = read_json_file(config.model / "config.json");
  model["num_hidden_layers"] = 16, model["intermediate_size"] = 1 << 14;  // many tensors, of which none is much of the whole
  config.model = folder / "base";
  fs::create_directories(config.model);
  write_file(config.model / "config.json", model.dump());
  std::uint64_t bytes = 0;
  const auto shapes = models::expected_shapes(models::read_model_config(config.model));
  checkpoints::write_weights(config.model, shapes, at::kFloat, [&](std::size_t i) {
    const at::Tensor made = at::full(shapes[i].second, 0.01, at::kFloat);
    bytes += made.nbytes();
    return made;
  });
  config.method = "full";
  config.evaluation = {};
  config.limits.max_steps = 2;
  finetune(config, false, [] { return false; });
  std::ifstream lines(config.output / "speed.jsonl");
  std::uint64_t of_steps = 0;
  for (std::string line; std::getline(lines, line);) of_steps = Json::parse(line)["peak_memory_bytes"].get<std::uint64_t>();
  ASSERT_GT(of_steps, 4 * bytes);
  EXPECT_LT(process_memory().peak - of_steps, bytes / 2);
}

TEST(TrainedWeights, ABaseThatIsNotFiniteIsRefusedBeforeAnythingIsComputed) {
  const ScratchFolder folder;
  TrainConfig config = tiny_config(folder.path(), "run");
  fs::create_directories(folder / "base");
  fs::copy(config.model / "config.json", folder / "base/config.json");
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  {
    const checkpoints::FolderTensors base(config.model);
    for (const std::string& name : base.names()) tensors.emplace_back(name, base.tensor(name).clone());
  }
  // The writer refuses such values, so the bits are set in the file.
  checkpoints::write_safetensors(folder / "base/model.safetensors", tensors);
  std::string bytes = read_file(folder / "base/model.safetensors");
  bytes.replace(bytes.size() - 4, 4, std::string("\x00\x00\xc0\x7f", 4));
  write_file(folder / "base/model.safetensors", bytes);
  config.model = folder / "base";
  for (const char* method : {"lora", "full"}) {
    config.method = method;
    EXPECT_TRUE(fails_with(ErrorKind::kData, "is not finite at element", [&] { finetune(config, true, [] { return false; }); }));
    EXPECT_FALSE(fs::exists(config.output / "metrics.jsonl"));
  }
}

}  // namespace
}  // namespace alambic::train
