// SPDX-License-Identifier: Apache-2.0
// Adapters that took a part of the base out at their start (PiSSA, OLoRA), in PEFT's folders: tests/oracle/adapter_start_oracle.py.
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
#include "lora/initialise.h"
#include "tests/closeness.h"
#include "tests/golden.h"
#include "tests/support.h"

namespace alambic::checkpoints {
namespace {

using testing::fails_with;
using testing::Golden;
using testing::golden_path;
using testing::is_close;
using testing::is_close_to_scale;
using testing::ScratchFolder;

const fs::path kBase = golden_path("peft/llama_tied");
const char* const kCases[] = {"pissa", "pissa_rslora", "pissa_dora", "pissa_patterns", "olora"};

at::Tensor logits_of(const models::Decoder& decoder) {
  const at::Tensor ids = Golden("start/logits.safetensors")["ids"][0];
  const at::NoGradGuard evaluating;
  return decoder.logits_TV(decoder.hidden_TD({.tokens_T = ids, .positions_T = at::arange(ids.numel()), .document_lengths = {ids.numel()}}));
}

/// As PEFT saved it, and converted; peft 0.21.2 loses DoRA's magnitudes when it converts, so there is no such folder.
std::vector<std::string> folders_of(const std::string& name) {
  std::vector<std::string> folders = {name + ".raw"};
  if (name != "pissa_dora") folders.push_back(name);
  return folders;
}

class StartedInside : public ::testing::TestWithParam<const char*> {};

TEST_P(StartedInside, FoldersOfPeftGivePeftsLogitsOnTheBaseAsItIs) {
  const Golden peft("start/logits.safetensors");
  SCOPED_TRACE(peft.provenance());
  for (const std::string& folder : folders_of(GetParam())) {
    models::Decoder decoder = load_decoder(kBase, at::kFloat);
    const lora::LoraConfig config = load_adapter(decoder, golden_path("start/" + folder));
    EXPECT_EQ(config.init, "kaiming");
    EXPECT_TRUE(is_close(logits_of(decoder), peft[GetParam()], {.relative = 1e-4, .absolute = 1e-4})) << folder;
    EXPECT_FALSE(is_close(logits_of(decoder), peft["llama_tied"], {.absolute = 1e-2})) << "the adapter changes nothing: the test is void";
    const FolderTensors base(kBase);
    for (const models::NamedTensor& tensor : decoder.tensors()) EXPECT_TRUE(at::equal(*tensor.tensor, base.tensor(tensor.name))) << tensor.name;
  }
}

/// A decoder that was started as the case says and trained to what PEFT trained it to (the folder it saved as it was).
models::Decoder trained(const std::string& name, lora::LoraConfig& config) {
  const fs::path raw = golden_path("start/" + name + ".raw");
  config = read_adapter_config(raw);
  models::Decoder decoder = load_decoder(kBase, at::kFloat);
  lora::attach(decoder, config, 1);
  const SafetensorsFile file(raw / "adapter_model.safetensors");
  const at::NoGradGuard no_gradients;
  for (const models::NamedTensor& tensor : lora::trainable(decoder)) tensor.tensor->copy_(file.tensor(tensor.name));
  return decoder;
}

// The residual base with A and B computes what PEFT computes; what is written is what PEFT's own conversion writes.
TEST_P(StartedInside, IsWrittenAsPeftConvertsIt) {
  const std::string name = GetParam();
  const ScratchFolder scratch;
  const char* const kept = std::getenv("ALAMBIC_TEST_OUTPUT");
  const fs::path theirs = golden_path("start/" + name), ours = (kept ? fs::path(kept) : scratch.path()) / name;
  lora::LoraConfig config;
  models::Decoder decoder = trained(name, config);
  const Golden peft("start/logits.safetensors");
  EXPECT_TRUE(is_close(logits_of(decoder), peft[name], {.relative = 1e-4, .absolute = 1e-4}));
  write_adapter(decoder, config, "some/base", ours);

  models::Decoder again = load_decoder(kBase, at::kFloat);
  load_adapter(again, ours);
  EXPECT_TRUE(is_close(logits_of(again), peft[name], {.relative = 1e-4, .absolute = 1e-4}));
  if (folders_of(name).size() == 1) return;

  const SafetensorsFile expected(theirs / "adapter_model.safetensors"), written(ours / "adapter_model.safetensors");
  EXPECT_EQ(written.entries().size(), expected.entries().size());
  for (const auto& [key, entry] : expected.entries()) {
    ASSERT_TRUE(written.entries().contains(key)) << key;
    EXPECT_TRUE(is_close_to_scale(written.tensor(key), expected.tensor(key), 1e-5)) << key;
  }
  const Json said = read_json_file(ours / "adapter_config.json"), meant = read_json_file(theirs / "adapter_config.json");
  for (const char* key : {"init_lora_weights", "r", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora", "use_dora"}) EXPECT_EQ(to_line(said[key]), to_line(meant[key])) << key;
  EXPECT_NEAR(said["lora_alpha"].get<double>(), meant["lora_alpha"].get<double>(), 1e-12);
}

TEST_P(StartedInside, MergesIntoTheBaseAsItIs) {
  const ScratchFolder scratch;
  const LogSink old = set_log_sink([](LogLevel, std::string_view) {});
  const Golden peft("start/logits.safetensors");
  for (const std::string& folder : folders_of(GetParam())) {
    MergeConfig merge;
    merge.base = kBase;
    merge.adapter = golden_path("start/" + folder);
    merge.output = scratch / folder;
    EXPECT_LT(merge_folder(merge).kl, 1e-8);
    EXPECT_TRUE(is_close(logits_of(load_decoder(merge.output, at::kFloat)), peft[GetParam()], {.relative = 1e-4, .absolute = 1e-4})) << folder;
  }
  set_log_sink(old);
}

INSTANTIATE_TEST_SUITE_P(Cases, StartedInside, ::testing::ValuesIn(kCases), [](const auto& test) { return std::string(test.param); });

TEST(StartedInsideFolders, WhatCannotBeMadeAgainIsRefused) {
  const ScratchFolder scratch;
  fs::copy(golden_path("start/pissa.raw"), scratch / "adapter");
  const auto refused = [&](const Json& init, const std::string& words) {
    Json json = read_json_file(scratch / "adapter/adapter_config.json");
    json["init_lora_weights"] = init;
    write_file(scratch / "adapter/adapter_config.json", json.dump());
    models::Decoder decoder = load_decoder(kBase, at::kFloat);
    return fails_with(ErrorKind::kData, words, [&] { load_adapter(decoder, scratch / "adapter"); });
  };
  EXPECT_TRUE(refused("pissa_niter_4", "path_initial_model_for_weight_conversion"));
  EXPECT_TRUE(refused("loftq", "\"loftq\" is not implemented"));
  EXPECT_TRUE(refused(3, "3 is not implemented"));
}

}  // namespace
}  // namespace alambic::checkpoints
