// SPDX-License-Identifier: Apache-2.0
#pragma once
// Small model, adapter and token store for tests of the command line. The numbers in them mean nothing.
#include <ATen/ops/full.h>
#include <ATen/ops/sin.h>
#include <ATen/ops/arange.h>

#include <filesystem>

#include "checkpoints/hf_folder.h"
#include "checkpoints/peft_folder.h"
#include "core/files.h"
#include "core/json.h"
#include "data/token_store.h"
#include "data/tokenizer.h"
#include "lora/adapter.h"
#include "models/decoder.h"

namespace alambic::testing {

inline constexpr std::int64_t kTinyVocabulary = 32;

/// Words w0 .. w27 and four special tokens; spaces separate.
inline std::string tiny_tokenizer_json() {
  Json vocabulary = {{"<unk>", 0}, {"<s>", 1}, {"</s>", 2}, {"user", 3}};
  for (int i = 4; i < kTinyVocabulary; ++i) vocabulary["w" + std::to_string(i)] = i;
  const Json special = [](int id, const char* text) {
    return Json{{"id", id}, {"content", text}, {"single_word", false}, {"lstrip", false}, {"rstrip", false}, {"normalized", false}, {"special", true}};
  }(2, "</s>");
  return to_line({{"version", "1.0"},
                  {"truncation", nullptr},
                  {"padding", nullptr},
                  {"added_tokens", Json::array({special})},
                  {"normalizer", nullptr},
                  {"pre_tokenizer", {{"type", "WhitespaceSplit"}}},
                  {"post_processor", nullptr},
                  {"decoder", nullptr},
                  {"model", {{"type", "WordLevel"}, {"vocab", vocabulary}, {"unk_token", "<unk>"}}}});
}

/// A llama of two layers; `phase` makes another one of the same shape.
inline void write_tiny_model(const std::filesystem::path& folder, bool tokenizer = true, double phase = 0) {
  std::filesystem::create_directories(folder);
  const Json config = {{"architectures", {"LlamaForCausalLM"}}, {"model_type", "llama"}, {"vocab_size", kTinyVocabulary}, {"hidden_size", 16}, {"intermediate_size", 32},
                       {"num_hidden_layers", 2}, {"num_attention_heads", 4}, {"num_key_value_heads", 2}, {"max_position_embeddings", 64}, {"rms_norm_eps", 1e-5},
                       {"rope_theta", 10000.0}, {"hidden_act", "silu"}, {"tie_word_embeddings", true}, {"bos_token_id", 1}, {"eos_token_id", 2}, {"torch_dtype", "float32"}};
  write_file(folder / "config.json", to_line(config));
  const auto shapes = models::expected_shapes(models::read_model_config(folder));
  checkpoints::write_weights(folder, shapes, at::kFloat, [&](std::size_t i) {
    std::int64_t count = 1;
    for (const std::int64_t size : shapes[i].second) count *= size;
    const at::Tensor values = at::sin(at::arange(count, at::kFloat) * 1.7 + static_cast<double>(i) + phase);
    return (shapes[i].second.size() == 1 ? values * 0.1 + 1 : values * 0.3).reshape(shapes[i].second);
  });
  write_file(folder / "README.md", "---\nlicense: apache-2.0\n---\n# Tiny\n");
  if (tokenizer) {
    write_file(folder / "tokenizer.json", tiny_tokenizer_json());
    write_file(folder / "tokenizer_config.json", R"({"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"})");
  }
}

/// An adapter on the attention of the model in `base`, with a visible effect.
inline void write_tiny_adapter(const std::filesystem::path& base, const std::filesystem::path& folder) {
  models::Decoder decoder = checkpoints::load_decoder(base, at::kFloat);
  lora::LoraConfig config;
  config.rank = 2;
  config.targets = {"q_proj", "v_proj"};
  lora::attach(decoder, config, 1);
  for (const models::NamedTensor& tensor : lora::trainable(decoder))
    if (tensor.name.find("lora_B") != std::string::npos) {
      const at::NoGradGuard no_gradients;
      tensor.tensor->fill_(0.2);
    }
  std::filesystem::create_directories(folder);
  checkpoints::write_adapter(decoder, config, base.string(), folder, checkpoints::base_hash(base));
}

/// Four documents of the tiny tokenizer.
inline void write_tiny_store(const std::filesystem::path& folder, const std::string& tokenizer_hash) {
  data::TokenStoreWriter writer(folder, {.tokenizer_hash = tokenizer_hash, .vocabulary_size = kTinyVocabulary, .sources = {{"words", "nowhere", "CC0-1.0", "en"}}});
  for (std::uint32_t number = 0; number < 4; ++number) {
    data::Document document;
    for (std::uint32_t i = 0; i < 12; ++i) document.ids.push_back(4 + (number * 5 + i * 3) % 28);
    document.mask.assign(document.ids.size(), 1);
    document.mask[0] = 0;
    document.num_bytes = 44;
    document.num_words = 12;
    writer.append(document);
  }
  writer.finish();
}

inline std::string tiny_tokenizer_hash() { return data::Tokenizer::from_json(tiny_tokenizer_json(), "tiny").hash(); }

}  // namespace alambic::testing
