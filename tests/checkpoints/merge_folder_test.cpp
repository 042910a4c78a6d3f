// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/merge_folder.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <fstream>
#include <thread>

#include "checkpoints/hf_folder.h"
#include "checkpoints/manifest.h"
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

const char* const kFolders[] = {"llama_tied.lora", "llama_tied.patterns", "llama_tied.dora", "llama_tied.save_embedding", "llama_tied.save_head",
                                "llama_tied.save_both", "llama_tied.save_tied", "llama_tied.head", "llama_untied.save_both", "llama_untied.exclude",
                                "qwen2.dora_rslora", "phi3.lora", "phi3.dora", "gemma3.lora", "gemma2.lora"};

at::Tensor logits_of(const models::Decoder& decoder) {
  const Golden golden("peft/logits.safetensors");
  const at::Tensor ids = golden["ids"][0];
  const at::NoGradGuard evaluating;
  return decoder.logits_TV(decoder.hidden_TD({.tokens_T = ids, .positions_T = at::arange(ids.numel()), .document_lengths = {ids.numel()}}));
}

/// Keeps what is logged instead of showing it.
class Log {
 public:
  Log() : old_(set_log_sink([this](LogLevel, std::string_view line) { text += std::string(line) + "\n"; })) {}
  ~Log() { set_log_sink(old_); }
  std::string text;

 private:
  LogSink old_;
};

/// A base with companions, and an adapter, both free to be changed.
struct Case {
  ScratchFolder scratch;
  MergeConfig config;
  Log log;

  explicit Case(const std::string& adapter) {
    config.base = scratch / "some-base";
    config.adapter = scratch / "adapter";
    config.output = scratch / "merged";
    fs::copy(golden_path("peft/" + adapter.substr(0, adapter.find('.'))), config.base);
    if (adapter.find('.') != std::string::npos) fs::copy(golden_path("peft/" + adapter), config.adapter);
    write_file(config.base / "README.md", "---\nlicense: apache-2.0\n---\n# Some base\n");
    write_file(config.base / "LICENSE", "terms\n");
    write_file(config.base / "NOTICE", "names\n");
    write_file(config.base / "generation_config.json", "{\"eos_token_id\": 2}\n");
    write_file(config.base / "chat_template.jinja", "{{ messages }}\n");
  }
  void adapter_tensors(const std::function<void(std::map<std::string, at::Tensor>&)>& change) const {
    std::map<std::string, at::Tensor> all;
    {
      const SafetensorsFile file(config.adapter / "adapter_model.safetensors");
      for (const auto& [key, entry] : file.entries()) all[key] = file.tensor(key).clone();
    }
    change(all);
    write_safetensors(config.adapter / "adapter_model.safetensors", {all.begin(), all.end()});
  }
  /// After a refusal nothing is left: neither the output nor a temporary folder.
  ::testing::AssertionResult refused(ErrorKind kind, const std::string& words) const {
    const bool was_there = fs::exists(config.output);
    const ::testing::AssertionResult result = fails_with(kind, words, [&] { merge_folder(config); });
    if (fs::exists(config.output) && !was_there) return ::testing::AssertionFailure() << "something was published";
    for (const auto& entry : fs::directory_iterator(scratch.path()))
      if (entry.path().filename().string().starts_with(".tmp-")) return ::testing::AssertionFailure() << "left behind: " << entry.path();
    return result;
  }
};

class MergeFolder : public ::testing::TestWithParam<const char*> {};

TEST_P(MergeFolder, GivesPeftsLogitsAfterReload) {
  const std::string name = GetParam();
  Case merge(name);
  const MergeReport report = merge_folder(merge.config);
  const Golden peft("peft/logits.safetensors");
  SCOPED_TRACE(peft.provenance());
  EXPECT_TRUE(is_close(logits_of(load_decoder(merge.config.output, at::kFloat)), peft[name], {.relative = 1e-4, .absolute = 1e-4}));
  EXPECT_LT(report.kl, 1e-8);
  EXPECT_GT(report.kl_of_base, 1e-3);
  EXPECT_EQ(report.weights, "f32");
  EXPECT_EQ(report.relation, "merge");

  // The config is the base's but for the tie.
  Json config = read_json_file(merge.config.output / "config.json"), before = read_json_file(merge.config.base / "config.json");
  const bool parted = name.starts_with("llama_tied.save_") ? name != "llama_tied.save_tied" : name == "llama_tied.head" || name == "gemma3.lora";
  EXPECT_EQ(FolderTensors(merge.config.output).contains("lm_head.weight"), parted || name.starts_with("llama_untied") || name.starts_with("phi3"));
  if (parted) {
    EXPECT_EQ(config["tie_word_embeddings"], false);
    config.erase("tie_word_embeddings"), before.erase("tie_word_embeddings");
  }
  EXPECT_EQ(config, before);
}

// A base of 16 bits, read as it is stored: the logits of its f32 copy, bit for bit, and the merged weights.
TEST_P(MergeFolder, OfAStoredBaseIsThatOfItsDenseCopy) {
  for (const at::ScalarType stored : {at::kBFloat16, at::kHalf}) {
    Case merge(GetParam());
    merge.adapter_tensors([](auto& all) { std::erase_if(all, [](const auto& entry) { return entry.first.ends_with("base_layer.weight"); }); });  // PEFT's copies of the base that was
    std::vector<std::pair<std::string, at::Tensor>> narrow, wide;
    {
      const FolderTensors base(merge.config.base);
      for (const std::string& name : base.names()) narrow.emplace_back(name, base.tensor_as(name, stored).clone()), wide.emplace_back(name, narrow.back().second.to(at::kFloat));
    }
    const auto result = [&](const char* output, const std::vector<std::pair<std::string, at::Tensor>>& tensors) {
      write_safetensors(merge.config.base / "model.safetensors", tensors);
      models::Decoder decoder = load_decoder(merge.config.base, at::kFloat, {}, linears_for(merge.config.adapter));
      load_adapter(decoder, merge.config.adapter);
      merge.config.output = merge.scratch / output;
      merge.config.weights = "f32";
      const MergeReport report = merge_folder(merge.config);
      return std::pair(logits_of(decoder), report);
    };
    const auto [logits, report] = result("of-narrow", narrow);
    const auto [wide_logits, wide_report] = result("of-wide", wide);
    EXPECT_TRUE(at::equal(logits, wide_logits));
    EXPECT_EQ(report.num_changed, wide_report.num_changed);
    EXPECT_EQ(report.kl_of_base, wide_report.kl_of_base);
    EXPECT_EQ(report.largest_difference, wide_report.largest_difference);
    EXPECT_EQ(sha256_of_file(merge.scratch / "of-narrow" / "model.safetensors"), sha256_of_file(merge.scratch / "of-wide" / "model.safetensors"));
  }
}

INSTANTIATE_TEST_SUITE_P(Folders, MergeFolder, ::testing::ValuesIn(kFolders), [](const auto& test) {
  std::string name = test.param;
  name[name.find('.')] = '_';
  return name;
});

TEST(MergeFolderFiles, CompanionsCardAndManifest) {
  Case merge("llama_tied.lora");
  merge.config.base_name = "some/base";
  const MergeReport report = merge_folder(merge.config);
  for (const char* name : {"LICENSE", "NOTICE", "generation_config.json", "chat_template.jinja"})
    EXPECT_EQ(read_file(merge.config.output / name), read_file(merge.config.base / name)) << name;
  const std::string card = read_file(merge.config.output / "README.md");
  for (const char* words : {"base_model:\n- some/base", "base_model_relation: finetune", "license: apache-2.0", "Proof of the merge", "No report of a training run"})
    EXPECT_NE(card.find(words), std::string::npos) << words << "\n" << card;
  const Json manifest = check_manifest(merge.config.output);
  EXPECT_EQ(manifest["files"].size(), 7u) << manifest["files"].dump(1);  // weights, config, card, and four companions
  EXPECT_EQ(manifest["merge"]["adapter_tensors"], 12);
  EXPECT_EQ(report.num_changed, 6);
  EXPECT_EQ(report.num_adapter_tensors, 12);
}

TEST(MergeFolderFiles, UntouchedTensorsKeepTheirBits) {
  Case merge("llama_tied.lora");
  merge_folder(merge.config);
  const FolderTensors base(merge.config.base), merged(merge.config.output);
  int num_changed = 0;
  for (const std::string& name : base.names()) {
    const bool adapted = name.find("q_proj") != std::string::npos || name.find("v_proj") != std::string::npos || name.find("down_proj") != std::string::npos;
    EXPECT_EQ(!at::equal(base.tensor(name), merged.tensor(name)), adapted) << name;
    num_changed += adapted;
  }
  EXPECT_EQ(num_changed, 6);
  EXPECT_EQ(base.names(), merged.names());
}

TEST(MergeFolderFiles, SmallShardsGiveTheSameTensors) {
  Case merge("llama_untied.exclude");
  merge_folder(merge.config);
  const fs::path whole = merge.config.output;
  // The smallest size there is, one megabyte, holds all of a tiny model: a larger vocabulary makes several files.
  Json json = read_json_file(merge.config.base / "config.json");
  json["vocab_size"] = 20'000;
  write_file(merge.config.base / "config.json", json.dump());
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  {
    const FolderTensors base(golden_path("peft/llama_untied"));
    for (const std::string& name : base.names()) {
      at::Tensor tensor = base.tensor(name);
      if (tensor.dim() == 2 && tensor.size(0) == 48) {
        const at::Tensor larger = at::zeros({20'000, 16});
        larger.narrow(0, 0, 48).copy_(tensor);
        tensor = larger;
      }
      tensors.emplace_back(name, tensor);
    }
  }
  write_safetensors(merge.config.base / "model.safetensors", tensors);
  merge.config.output = merge.scratch / "sharded";
  merge.config.max_shard_megabytes = 1;
  merge_folder(merge.config);
  EXPECT_TRUE(fs::exists(merge.config.output / "model.safetensors.index.json"));
  EXPECT_TRUE(fs::exists(merge.config.output / "model-00001-of-00003.safetensors"));
  const FolderTensors one(whole), many(merge.config.output);
  EXPECT_EQ(one.names(), many.names());
  for (const std::string& name : one.names())
    if (one.shape(name) == many.shape(name)) EXPECT_TRUE(at::equal(one.tensor(name), many.tensor(name))) << name;
    else EXPECT_TRUE(at::equal(one.tensor(name), many.tensor(name).narrow(0, 0, 48))) << name;
}

TEST(MergeFolderFiles, TheTypeIsTheBasesOrTheOneAskedFor) {
  for (const auto& [asked, stored, name] : {std::tuple{"auto", at::kBFloat16, "bfloat16"}, std::tuple{"f16", at::kFloat, "float16"}, std::tuple{"f32", at::kBFloat16, "float32"}}) {
    Case merge("llama_untied.save_both");
    std::vector<std::pair<std::string, at::Tensor>> tensors;
    {
      const FolderTensors base(merge.config.base);
      for (const std::string& tensor : base.names()) tensors.emplace_back(tensor, base.tensor_as(tensor, stored).clone());
    }
    write_safetensors(merge.config.base / "model.safetensors", tensors);
    merge.config.weights = asked;
    const MergeReport report = merge_folder(merge.config);
    const FolderTensors merged(merge.config.output);
    for (const std::string& tensor : merged.names()) EXPECT_EQ(merged.type(tensor), std::string(name) == "float32" ? at::kFloat : std::string(name) == "float16" ? at::kHalf : at::kBFloat16);
    const Json config = read_json_file(merge.config.output / "config.json");
    EXPECT_EQ(config.value("dtype", config.value("torch_dtype", "")), name);
    EXPECT_LT(report.kl, report.kl_of_base / 10);
  }
}

TEST(MergeFolderRuns, TheReportOfTheRunIsCitedAndItsLicencesAreNamed) {
  Case merge("llama_tied.lora");
  const fs::path run = merge.scratch / "run";
  fs::create_directory(run);
  fs::rename(merge.config.adapter, run / "adapter");
  merge.config.adapter = run / "adapter";
  Json report = {{"steps", 20}, {"tokens", 1000}, {"base", {{"sha256", base_hash(merge.config.base)}}},
                 {"evaluation", {{{"name", "held-out"}, {"before", {{"bits_per_byte", 1.25}, {"loss", 3.5}}}, {"after", {{"bits_per_byte", 1.0}, {"loss", 2.5}}}}}},
                 {"teachers", {{{"folder", "models/great"}, {"sha256", "0"}, {"licence", "LicenseRef-gemma"}}}},
                 {"data", {{{"use", "train"}, {"documents", 3}, {"tokens", 99}, {"sources", {{{"name", "book"}, {"licence", "CC-BY-NC-4.0"}, {"origin", "here"}, {"language", "jv"}}}}},
                           {{"use", "held-out"}, {"sources", {{{"name", "unused"}, {"licence", ""}, {"language", "en"}}}}}}}};
  write_file(run / "report.json", report.dump());
  const MergeReport merged = merge_folder(merge.config);
  const std::string card = read_file(merge.config.output / "README.md");
  for (const char* words : {"bits per UTF-8 byte, held-out | 1.2500 | 1.0000", "language:\n- jv", "| book | CC-BY-NC-4.0 | here | jv | 3 documents, 99 tokens |", "- Teacher: great (licence: ", "license: other"})
    EXPECT_NE(card.find(words), std::string::npos) << words << "\n" << card;
  EXPECT_EQ(card.find("unused"), std::string::npos);
  EXPECT_NE(merge.log.text.find("CC-BY-NC-4.0"), std::string::npos) << "named on the terminal";
  EXPECT_TRUE(std::any_of(merged.warnings.begin(), merged.warnings.end(), [](const std::string& warning) { return warning.find("the teacher great") != warning.npos; }));

  // The figures are those of the adapter that the run chose, not of any other that lies in its folder.
  fs::remove_all(merge.config.output);
  fs::create_directory(run / "checkpoint-10");
  fs::copy(run / "adapter", run / "checkpoint-10/adapter");
  merge.config.adapter = run / "checkpoint-10/adapter";
  merge_folder(merge.config);
  EXPECT_NE(read_file(merge.config.output / "README.md").find("1.2500 | 1.0000"), std::string::npos) << "the same bytes";
  fs::remove_all(merge.config.output);
  merge.adapter_tensors([](auto& all) { all.begin()->second += 0.5; });
  merge_folder(merge.config);
  const std::string other = read_file(merge.config.output / "README.md");
  EXPECT_EQ(other.find("1.2500 | 1.0000"), std::string::npos) << other;
  EXPECT_NE(other.find("not the weights that the run chose"), std::string::npos) << other;
  EXPECT_NE(other.find("| book | CC-BY-NC-4.0 |"), std::string::npos) << other;
  merge.config.adapter = run / "adapter";

  fs::remove_all(merge.config.output);
  report["base"]["sha256"] = std::string(64, '0');
  write_file(run / "report.json", report.dump());
  EXPECT_TRUE(merge.refused(ErrorKind::kData, "trained another base"));
}

TEST(MergeFolderFiles, ABaseInTheHubsCacheKeepsItsName) {
  Case merge("llama_tied.lora");
  const fs::path snapshot = merge.scratch / "hub/models--some-org--a-model-7b/snapshots/0123abcd";
  fs::create_directories(snapshot.parent_path());
  fs::rename(merge.config.base, snapshot);
  merge.config.base = snapshot / "";
  merge_folder(merge.config);
  const std::string card = read_file(merge.config.output / "README.md");
  EXPECT_NE(card.find("base_model:\n- some-org/a-model-7b\n"), std::string::npos) << card;
}

TEST(MergeFolderRuns, AnUnknownLicenceOfTheBaseIsNamed) {
  Case merge("llama_tied.lora");
  fs::remove(merge.config.base / "README.md");
  fs::remove(merge.config.base / "LICENSE");
  merge_folder(merge.config);
  EXPECT_NE(merge.log.text.find("licence of the base model some-base is not stated"), std::string::npos) << merge.log.text;
}

TEST(MergeFolderOutput, TheSameMergeIsDoneAnotherIsRefused) {
  Case merge("llama_tied.lora");
  MergeReport first = merge_folder(merge.config), second;
  EXPECT_FALSE(first.already_done);
  const auto written = fs::last_write_time(merge.config.output / "model.safetensors");
  second = merge_folder(merge.config);
  EXPECT_TRUE(second.already_done);
  Json told = first.json(), again = second.json();
  for (const char* key : {"already_done", "seconds", "megabytes_per_second"}) told.erase(key), again.erase(key);
  EXPECT_EQ(told, again);
  EXPECT_EQ(fs::last_write_time(merge.config.output / "model.safetensors"), written);
  // The adapter was trained on: an old merge must not pass for the new one.
  const fs::path adapter = merge.config.adapter;
  fs::copy(adapter, merge.scratch / "trained-on");
  merge.config.adapter = merge.scratch / "trained-on";
  merge.adapter_tensors([](auto& all) { all.begin()->second += 0.5; });
  EXPECT_TRUE(merge.refused(ErrorKind::kUsage, "another merge"));
  merge.config.adapter = adapter;
  const std::string chat_template = read_file(merge.config.base / "chat_template.jinja");
  write_file(merge.config.base / "chat_template.jinja", "{{ other }}\n");
  EXPECT_TRUE(merge.refused(ErrorKind::kUsage, "another merge"));
  write_file(merge.config.base / "chat_template.jinja", chat_template);
  EXPECT_TRUE(merge_folder(merge.config).already_done);
  std::string bytes = read_file(merge.config.output / "model.safetensors");
  bytes.back() = static_cast<char>(bytes.back() ^ 1);
  write_file(merge.config.output / "model.safetensors", bytes);
  EXPECT_TRUE(merge.refused(ErrorKind::kData, "model.safetensors has the SHA-256"));
  fs::remove_all(merge.config.output);
  fs::create_directory(merge.config.output);
  EXPECT_TRUE(merge.refused(ErrorKind::kUsage, "is no merged model"));
}

TEST(MergeFolderOutput, WhatAKilledMergeLeftIsRemoved) {
  Case merge("llama_tied.lora");
  fs::create_directories(merge.scratch / ".tmp-merged-999999999");  // no process has this number
  fs::create_directories(merge.scratch / ".tmp-merged-other-999999999");
  merge_folder(merge.config);
  EXPECT_FALSE(fs::exists(merge.scratch / ".tmp-merged-999999999"));
  EXPECT_TRUE(fs::exists(merge.scratch / ".tmp-merged-other-999999999")) << "of another output";
}

// Silent failures of merges elsewhere (reference/peers.md, section 3), a test each.

// 1: a light tune is erased by the rounding of the stored type.
/// Bytes of this process that are in memory and belong to no file.
std::int64_t anonymous_bytes() {
  std::ifstream lines("/proc/self/status");
  std::string key;
  for (std::int64_t kibibytes = 0; lines >> key;)
    if (key == "RssAnon:" && lines >> kibibytes) return kibibytes * 1024;
  return -1;
}

/// What the most of it while `act` runs is more than before.
std::int64_t growth_of_peak(const std::function<void()>& act) {
  std::atomic<bool> is_over = false;
  const std::int64_t before = anonymous_bytes();
  EXPECT_GT(before, 0);
  std::int64_t peak = before;
  std::thread watch([&] {
    while (!is_over) peak = std::max(peak, anonymous_bytes()), std::this_thread::sleep_for(std::chrono::microseconds(200));
  });
  act();
  is_over = true;
  watch.join();
  return peak - before;
}

/// An adapter of rank 2 on all linear layers of the base, in the place of the one that is there.
void write_new_adapter(const MergeConfig& config) {
  models::Decoder decoder = load_decoder(config.base, at::kFloat, {}, Linears::kAsStored);
  const lora::LoraConfig lora{.rank = 2};
  lora::attach(decoder, lora, /*seed=*/1);
  fs::remove_all(config.adapter);
  write_adapter(decoder, lora, "x", config.adapter);
}

TEST(MergeFolderMemory, IsThatOfALayerNotOfTheModel) {
  Case merge("llama_tied.lora");
  Json config = read_json_file(merge.config.base / "config.json");
  config.update({{"hidden_size", 512}, {"intermediate_size", 2048}, {"num_hidden_layers", 16}, {"num_attention_heads", 8}, {"num_key_value_heads", 8}, {"head_dim", 64}});
  write_file(merge.config.base / "config.json", config.dump());
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  std::int64_t num_parameters = 0;
  for (const auto& [name, shape] : models::expected_shapes(models::read_model_config(merge.config.base))) {
    if (name == "lm_head.weight") continue;
    tensors.emplace_back(name, at::full(shape, 0.01, at::kBFloat16));
    num_parameters += tensors.back().second.numel();
  }
  write_safetensors(merge.config.base / "model.safetensors", tensors);
  tensors.clear();
  write_new_adapter(merge.config);
  MergeReport report;
  const std::int64_t grown = growth_of_peak([&] { report = merge_folder(merge.config); });
  EXPECT_EQ(report.num_bytes, static_cast<std::uint64_t>(2 * num_parameters));
  EXPECT_LT(grown, num_parameters) << "of " << 4 * num_parameters << " bytes of the model in f32";
}

// A large vocabulary over small layers: neither embedding nor head is there in f32, which is also said of the tensors that are only copied.
TEST(MergeFolderMemory, HoldsNoEmbeddingAndNoHead) {
  Case merge("llama_untied.exclude");
  Json config = read_json_file(merge.config.base / "config.json");
  config.update({{"vocab_size", 49'152}, {"hidden_size", 1024}, {"intermediate_size", 64}, {"num_hidden_layers", 1}, {"num_attention_heads", 2}, {"num_key_value_heads", 2}, {"head_dim", 16}});
  write_file(merge.config.base / "config.json", config.dump());
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto& [name, shape] : models::expected_shapes(models::read_model_config(merge.config.base))) tensors.emplace_back(name, at::full(shape, 0.01, at::kBFloat16));
  write_safetensors(merge.config.base / "model.safetensors", tensors);
  tensors.clear();
  write_new_adapter(merge.config);
  const std::int64_t grown = growth_of_peak([&] { merge_folder(merge.config); });
  EXPECT_LT(grown, std::int64_t{4} * 49'152 * 1024) << "of the embedding in f32";
  ::testing::Test::RecordProperty("grown", std::to_string(grown));
}

TEST(MergeFails, WhenRoundingErasesTheTune) {
  Case merge("llama_tied.lora");
  merge.adapter_tensors([](auto& all) {
    for (auto& [key, tensor] : all)
      if (key.find("lora_B") != std::string::npos) tensor *= 1e-3;
  });
  const MergeConfig config = merge.config;
  merge.config.weights = "bf16";
  EXPECT_TRUE(merge.refused(ErrorKind::kNumerics, "rounding to bf16 loses what was trained"));
  merge.config = config;
  EXPECT_LT(merge_folder(merge.config).kl, 1e-8);
}

// 2: a part of the adapter is dropped, and the counts still balance.
TEST(MergeFails, WhenATensorOfTheAdapterFitsNothing) {
  Case merge("llama_tied.lora");
  merge.adapter_tensors([](auto& all) {
    auto moved = all.extract("base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight");
    moved.key() = "base_model.model.model.layers.1.self_attn.w_proj.lora_B.weight";
    all.insert(std::move(moved));
  });
  EXPECT_TRUE(merge.refused(ErrorKind::kData, "layers.1.self_attn.w_proj.lora_B.weight: unexpected"));
  EXPECT_TRUE(merge.refused(ErrorKind::kData, "layers.1.self_attn.v_proj.lora_B.weight: missing"));
}

// 3: head trained, embedding tied: the merged folder must not be read as tied. (GivesPeftsLogitsAfterReload covers the logits.)
TEST(MergeKeeps, ATrainedHeadApartFromItsEmbedding) {
  Case merge("llama_tied.save_head");
  EXPECT_FALSE(merge_folder(merge.config).head_tied);
  const FolderTensors base(merge.config.base), merged(merge.config.output);
  EXPECT_TRUE(at::equal(merged.tensor("model.embed_tokens.weight"), base.tensor("model.embed_tokens.weight")));
  EXPECT_FALSE(at::equal(merged.tensor("lm_head.weight"), base.tensor("model.embed_tokens.weight")));
}

// 3, the other way round: the embedding was trained, the head must stay what the embedding was.
TEST(MergeKeeps, AnUntrainedHeadOfATrainedEmbedding) {
  Case merge("llama_tied.save_embedding");
  EXPECT_FALSE(merge_folder(merge.config).head_tied);
  const FolderTensors base(merge.config.base), merged(merge.config.output);
  EXPECT_TRUE(at::equal(merged.tensor("lm_head.weight"), base.tensor("model.embed_tokens.weight")));
  EXPECT_FALSE(at::equal(merged.tensor("model.embed_tokens.weight"), base.tensor("model.embed_tokens.weight")));
}

TEST(MergeKeeps, TheTieWhereBothCameOutAlike) {
  Case merge("llama_tied.save_both");
  merge.adapter_tensors([](auto& all) { all.at("base_model.model.lm_head.weight").copy_(all.at("base_model.model.model.embed_tokens.weight")); });
  EXPECT_TRUE(merge_folder(merge.config).head_tied);
  EXPECT_FALSE(FolderTensors(merge.config.output).contains("lm_head.weight"));
  EXPECT_EQ(read_json_file(merge.config.output / "config.json")["tie_word_embeddings"], true);
}

// 41: an adapter lands on another base than it was trained on.
TEST(MergeFails, OnAnotherBase) {
  Case merge("llama_tied.lora");
  models::Decoder decoder = load_decoder(merge.config.base, at::kFloat);
  const lora::LoraConfig config = load_adapter(decoder, merge.config.adapter);
  write_adapter(decoder, config, "x", merge.config.adapter, std::string(64, '1'));
  EXPECT_TRUE(merge.refused(ErrorKind::kData, "trained on another base"));
  write_adapter(decoder, config, "x", merge.config.adapter, base_hash(merge.config.base));
  EXPECT_NO_THROW(merge_folder(merge.config));
}

// 42: embeddings of a resized vocabulary.
TEST(MergeFails, WhenTheVocabularyWasResized) {
  Case merge("llama_tied.save_both");
  merge.adapter_tensors([](auto& all) { all.at("base_model.model.model.embed_tokens.weight") = at::zeros({50, 16}); });
  EXPECT_TRUE(merge.refused(ErrorKind::kData, "shape [50, 16], must be [48, 16]"));
}

TEST(MergeFails, AboveTheThreshold) {
  Case merge("llama_tied.lora");
  merge.config.weights = "bf16";
  merge.config.max_kl = 1e-12;
  EXPECT_TRUE(merge.refused(ErrorKind::kNumerics, "the written weights are not base + adapter"));
}

TEST(MergeFails, OnInputsThatAreNotThere) {
  Case merge("llama_tied.lora");
  const MergeConfig config = merge.config;
  merge.config.adapter = merge.scratch / "nowhere";
  EXPECT_TRUE(merge.refused(ErrorKind::kData, "nowhere: no such folder"));
  merge.config = config;
  merge.config.base = merge.scratch / "nowhere";
  EXPECT_TRUE(merge.refused(ErrorKind::kData, "nowhere"));
  merge.config = config;
  merge.config.weights = "int8";
  EXPECT_TRUE(merge.refused(ErrorKind::kUsage, "weights"));
  merge.config = config;
  merge.config.output = "";
  EXPECT_TRUE(merge.refused(ErrorKind::kUsage, "no output folder"));
  merge.config = config;
  merge.config.run = merge.config.base;
  EXPECT_TRUE(merge.refused(ErrorKind::kUsage, "no report.json"));
}

// Full fine-tunes: a folder of all tensors under the base's names.
TEST(MergeFinetune, TakesTheTrainedTensors) {
  Case merge("llama_tied");
  fs::create_directory(merge.config.adapter);
  std::map<std::string, at::Tensor> tensors;
  {
    const FolderTensors base(merge.config.base);
    for (const std::string& name : base.names()) tensors[name] = base.tensor(name) * 1.1 + 0.01;
  }
  const auto write = [&] { write_safetensors(merge.config.adapter / "model.safetensors", {tensors.begin(), tensors.end()}); };
  write();
  const MergeReport report = merge_folder(merge.config);
  EXPECT_EQ(report.relation, "finetune");
  EXPECT_TRUE(report.head_tied);
  const FolderTensors merged(merge.config.output);
  EXPECT_EQ(merged.names().size(), tensors.size());
  for (const auto& [name, tensor] : tensors) EXPECT_TRUE(at::equal(merged.tensor(name), tensor)) << name;
  EXPECT_NE(read_file(merge.config.output / "README.md").find("base_model_relation: finetune"), std::string::npos);

  fs::remove_all(merge.config.output);
  const at::Tensor norm = tensors.at("model.norm.weight");
  tensors.erase("model.norm.weight");
  tensors["model.other.weight"] = at::zeros({3});
  write();
  EXPECT_TRUE(merge.refused(ErrorKind::kData, "model.norm.weight: missing"));
  EXPECT_TRUE(merge.refused(ErrorKind::kData, "model.other.weight: the base has no such tensor"));
}

TEST(MergeFinetune, AHeadThatPartedIsWritten) {
  Case merge("llama_tied");
  fs::create_directory(merge.config.adapter);
  std::map<std::string, at::Tensor> tensors;
  {
    const FolderTensors base(merge.config.base);
    for (const std::string& name : base.names()) tensors[name] = base.tensor(name).clone();
  }
  tensors["lm_head.weight"] = tensors.at("model.embed_tokens.weight") + 0.5;
  write_safetensors(merge.config.adapter / "model.safetensors", {tensors.begin(), tensors.end()});
  EXPECT_FALSE(merge_folder(merge.config).head_tied);
  EXPECT_TRUE(at::equal(FolderTensors(merge.config.output).tensor("lm_head.weight"), tensors.at("lm_head.weight")));
  EXPECT_EQ(read_json_file(merge.config.output / "config.json")["tie_word_embeddings"], false);
}

}  // namespace
}  // namespace alambic::checkpoints
