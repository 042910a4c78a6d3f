// SPDX-License-Identifier: Apache-2.0
// What import_gguf refuses, and what it commits; that the values and logits are right is tests/oracle/gguf_oracle.py.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>

#include "checkpoints/gguf.h"
#include "checkpoints/hf_folder.h"
#include "checkpoints/licence.h"
#include "core/files.h"
#include "tests/checkpoints/gguf_maker.h"
#include "tests/support.h"

namespace alambic::checkpoints {
namespace {

using testing::fails_with;
using testing::GgufMaker;
using testing::ScratchFolder;

// A llama of one layer, as numbers and texts that a test may change before it is written.
struct TinyGguf {
  std::map<std::string, std::uint32_t> numbers = {{"llama.context_length", 64}, {"llama.embedding_length", 8}, {"llama.block_count", 1}, {"llama.feed_forward_length", 12},
                                                  {"llama.attention.head_count", 2}, {"llama.attention.head_count_kv", 1}, {"llama.rope.dimension_count", 4}, {"llama.vocab_size", 259},
                                                  {"tokenizer.ggml.bos_token_id", 256}, {"tokenizer.ggml.eos_token_id", 257}};
  std::map<std::string, std::string> texts = {{"general.architecture", "llama"}, {"general.name", "tiny"}, {"general.license", "apache-2.0"}, {"tokenizer.ggml.model", "gpt2"},
                                              {"tokenizer.ggml.pre", "gpt-2"}, {"tokenizer.chat_template", "{{ messages }}"}};
  std::map<std::string, std::vector<std::uint64_t>> tensors = {  // fastest axis first
      {"token_embd.weight", {8, 259}}, {"output_norm.weight", {8}}, {"blk.0.attn_norm.weight", {8}}, {"blk.0.attn_q.weight", {8, 8}}, {"blk.0.attn_k.weight", {8, 4}},
      {"blk.0.attn_v.weight", {8, 4}}, {"blk.0.attn_output.weight", {8, 8}}, {"blk.0.ffn_norm.weight", {8}}, {"blk.0.ffn_gate.weight", {8, 12}},
      {"blk.0.ffn_up.weight", {8, 12}}, {"blk.0.ffn_down.weight", {12, 8}}};

  std::filesystem::path write(const ScratchFolder& scratch) const {
    GgufMaker file;
    file.head(tensors.size(), numbers.size() + texts.size() + 4);
    for (const auto& [key, value] : numbers) file.key(key, testing::kU32).add(value);
    for (const auto& [key, value] : texts) file.key(key, testing::kString).text(value);
    file.key("llama.attention.layer_norm_rms_epsilon", testing::kF32).add<float>(1e-5f);
    const std::vector<std::string> tokens = byte_tokens();
    file.key("tokenizer.ggml.tokens", testing::kArray).add(testing::kString).add<std::uint64_t>(tokens.size());
    for (const std::string& token : tokens) file.text(token);
    file.key("tokenizer.ggml.token_type", testing::kArray).add<std::uint32_t>(5).add<std::uint64_t>(tokens.size());
    for (std::size_t i = 0; i < tokens.size(); ++i) file.add<std::int32_t>(i == 256 || i == 257 ? 3 : 1);
    file.key("tokenizer.ggml.merges", testing::kArray).add(testing::kString).add<std::uint64_t>(1).text("\xc4\xa0 t");
    std::uint64_t offset = 0;
    std::vector<std::uint64_t> counts;
    for (const auto& [name, shape] : tensors) {
      std::uint64_t count = 1;
      for (const std::uint64_t size : shape) count *= size;
      file.tensor(name, shape, 0, offset);
      offset = (offset + 4 * count + 31) / 32 * 32;
      counts.push_back(count);
    }
    file.pad();
    float value = 0;
    for (const std::uint64_t count : counts) {
      for (std::uint64_t i = 0; i < count; ++i) file.add<float>(value += 0.25f);
      file.pad();
    }
    write_file(scratch / "tiny.gguf", file.bytes());
    return scratch / "tiny.gguf";
  }

  // The 256 letters that stand for bytes in GPT-2's vocabulary, two special tokens and one merged token.
  static std::vector<std::string> byte_tokens() {
    std::vector<std::string> tokens;
    const auto letter = [](unsigned code) {
      if (code < 128) return std::string(1, static_cast<char>(code));
      return std::string{static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 63))};
    };
    for (unsigned byte = 0, other = 256; byte < 256; ++byte) {
      const bool shown = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
      tokens.push_back(letter(shown ? byte : other++));
    }
    tokens.insert(tokens.end(), {"<|start|>", "<|end|>", "\xc4\xa0t"});
    return tokens;
  }
};

TEST(ImportGguf, CommitsAWholeFolder) {
  const ScratchFolder scratch;
  const auto gguf = TinyGguf().write(scratch);
  import_gguf(gguf, scratch / "model", at::kBFloat16);
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(scratch / "model")) names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  EXPECT_EQ(names, (std::vector<std::string>{"LICENSE", "README.md", "chat_template.jinja", "config.json", "generation_config.json", "manifest.json", "model.safetensors",
                                             "tokenizer.json", "tokenizer_config.json"}));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(scratch.path()), std::filesystem::directory_iterator()), 2);  // nothing temporary stays
  EXPECT_EQ(read_file(scratch / "model/chat_template.jinja"), "{{ messages }}");
  EXPECT_EQ(licence_of_model(scratch / "model").spdx, "Apache-2.0");
  const models::Decoder decoder = load_decoder(scratch / "model", at::kBFloat16);
  EXPECT_TRUE(decoder.head_tied);
  EXPECT_EQ(decoder.config.eos_ids, std::vector<std::int64_t>{257});
  EXPECT_EQ(FolderTensors(scratch / "model").type("model.norm.weight"), at::kBFloat16);
}

TEST(ImportGguf, KnowsWhetherItIsDone) {
  const ScratchFolder scratch;
  const auto gguf = TinyGguf().write(scratch);
  EXPECT_FALSE(is_complete_import(gguf, scratch / "model"));
  import_gguf(gguf, scratch / "model");
  EXPECT_TRUE(is_complete_import(gguf, scratch / "model"));
  EXPECT_FALSE(is_complete_import(gguf, scratch / "model", at::kBFloat16));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "exists already", [&] { import_gguf(gguf, scratch / "model"); }));
  std::string bytes = read_file(gguf);
  bytes.back() = static_cast<char>(bytes.back() ^ 1);
  write_file(scratch / "other.gguf", bytes);
  EXPECT_FALSE(is_complete_import(scratch / "other.gguf", scratch / "model"));
  write_file(scratch / "model/tokenizer.json", "{}");
  EXPECT_FALSE(is_complete_import(gguf, scratch / "model"));
}

TEST(ImportGguf, RefusesWhatItDoesNotUnderstand) {
  const ScratchFolder scratch;
  const auto refuses = [&](const std::string& words, const std::function<void(TinyGguf&)>& change) {
    TinyGguf gguf;
    change(gguf);
    const auto path = gguf.write(scratch);
    const auto result = fails_with(ErrorKind::kData, words, [&] { import_gguf(path, scratch / "model"); });
    EXPECT_FALSE(std::filesystem::exists(scratch / "model")) << words;
    std::filesystem::remove_all(scratch / "model");
    return result;
  };
  EXPECT_TRUE(refuses("\"mamba\" is not implemented; these are: llama, smollm3", [](TinyGguf& g) { g.texts["general.architecture"] = "mamba"; }));
  EXPECT_TRUE(refuses("\"general.architecture\" is missing", [](TinyGguf& g) { g.texts.erase("general.architecture"); }));
  EXPECT_TRUE(refuses("\"llama.block_count\" is missing", [](TinyGguf& g) { g.numbers.erase("llama.block_count"); }));
  EXPECT_TRUE(refuses("make no decoder", [](TinyGguf& g) { g.numbers["llama.attention.head_count"] = 0; }));
  EXPECT_TRUE(refuses("make no decoder", [](TinyGguf& g) { g.numbers["llama.block_count"] = 4000000000u; }));
  EXPECT_TRUE(refuses("may change the result: llama.logit_scale", [](TinyGguf& g) { g.numbers["llama.logit_scale"] = 2; }));
  EXPECT_TRUE(refuses("mixtures of experts", [](TinyGguf& g) { g.numbers["llama.expert_count"] = 8; }));
  EXPECT_TRUE(refuses("sliding window of 16", [](TinyGguf& g) { g.numbers["llama.attention.sliding_window"] = 16; }));
  EXPECT_TRUE(refuses("keys of 4 and values of 6", [](TinyGguf& g) { g.numbers["llama.attention.value_length"] = 6; }));
  EXPECT_TRUE(refuses("scaling.type \"su\" is not implemented", [](TinyGguf& g) { g.texts["llama.rope.scaling.type"] = "su"; }));
  EXPECT_TRUE(refuses("not those of a known Llama 3", [](TinyGguf& g) { g.tensors["rope_freqs.weight"] = {2}; }));
  EXPECT_TRUE(refuses("one part of a split", [](TinyGguf& g) { g.numbers["split.count"] = 2; }));
  EXPECT_TRUE(refuses("missing \"blk.0.attn_q.weight\" [8,8]", [](TinyGguf& g) { g.tensors.erase("blk.0.attn_q.weight"); }));
  EXPECT_TRUE(refuses("\"blk.0.attn_q.weight\" has shape [9,8], the metadata asks for [8,8]", [](TinyGguf& g) { g.tensors["blk.0.attn_q.weight"] = {8, 9}; }));
  EXPECT_TRUE(refuses("\"blk.0.ffn_gate_inp.weight\" [2,8] has no place in a llama model", [](TinyGguf& g) { g.tensors["blk.0.ffn_gate_inp.weight"] = {8, 2}; }));
  EXPECT_TRUE(refuses("no name for a chat template", [](TinyGguf& g) { g.texts["tokenizer.chat_template.../x"] = "y"; }));
  EXPECT_TRUE(refuses("tokenizer", [](TinyGguf& g) { g.texts["tokenizer.ggml.model"] = "unheard-of"; }));
}

}  // namespace
}  // namespace alambic::checkpoints
