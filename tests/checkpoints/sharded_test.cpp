// SPDX-License-Identifier: Apache-2.0
// A folder that several ranks load, each its part of the blocks: against the same folder loaded whole.
#include <ATen/Parallel.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <iostream>
#include <limits>
#include <map>

#include "checkpoints/hf_folder.h"
#include "checkpoints/safetensors.h"
#include "core/files.h"
#include "lora/sharded_weight.h"
#include "models/allocation.h"
#include "models/sharded_blocks.h"
#include "tests/forked_ranks.h"
#include "tests/golden.h"
#include "tests/support.h"

namespace alambic::checkpoints {
namespace {

using parallel::Communicator;

/// Sizes at which no weight is a whole number of blocks of 64, let alone of 64 x 256, and few are shared evenly.
Json odd_config() {
  return {{"architectures", {"LlamaForCausalLM"}}, {"model_type", "llama"}, {"vocab_size", 97}, {"hidden_size", 190}, {"intermediate_size", 521}, {"num_hidden_layers", 3}, {"num_attention_heads", 6},
          {"num_key_value_heads", 2}, {"head_dim", 32}, {"max_position_embeddings", 2048}, {"rms_norm_eps", 1e-5}, {"rope_theta", 10000.0}, {"hidden_act", "silu"}, {"tie_word_embeddings", true},
          {"torch_dtype", "float32"}};
}

/// `change` may alter a tensor before it is written.
void write_folder(const std::filesystem::path& folder, const Json& config, at::ScalarType type = at::kFloat, const std::function<void(const std::string&, at::Tensor&)>& change = {}) {
  at::set_num_threads(1);  // a pool of threads would not survive the fork
  std::filesystem::create_directories(folder);
  write_file(folder / "config.json", config.dump());
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto& [name, shape] : models::expected_shapes(models::read_model_config(config, "config.json"))) {
    at::Tensor tensor = at::randn(shape, at::kFloat);
    if (change) change(name, tensor);
    tensors.emplace_back(name, tensor.to(type));
  }
  write_safetensors(folder / "model.safetensors", tensors);
}

/// What differs between a decoder that these ranks share and the same loaded whole.
std::string difference(const std::filesystem::path& folder, at::ScalarType type, const lora::BaseQuantization& quantization, Communicator& ranks) {
  models::Decoder whole = load_decoder(folder, type, quantization, Linears::kAsStored), shared = load_decoder(folder, type, quantization, Linears::kDense, Sharing{ranks, ranks.size()});
  if (ranks.size() == 1) return shared.shards ? "one rank shares with nobody" : "";
  std::string wrong;
  const auto wholes = whole.linears(), shareds = shared.linears();
  std::uint64_t own = 0, all = 0;
  for (std::size_t i = 0; i < wholes.size(); ++i) {
    const models::Linear &a = *wholes[i].linear, &b = *shareds[i].linear;
    if (a.compute_type() != b.compute_type() || a.outputs() != b.outputs() || a.inputs() != b.inputs()) wrong += wholes[i].path + ": another type or shape; ";
    for (const at::ScalarType computed : {at::kFloat, type})
      if (!a.dense_OI(computed).equal(b.dense_OI(computed))) wrong += wholes[i].path + ": other values as " + toString(computed) + "; ";
    if (wholes[i].layer < 0) continue;
    if (!b.quantized) wrong += wholes[i].path + ": whole; ";
    else own += b.quantized->num_bytes();
    all += a.quantized ? a.quantized->num_bytes() : a.weight_OI.nbytes();
  }
  shared.shards->end_pass(false);
  std::size_t listed = 0;
  const auto others = shared.tensors();
  for (const models::NamedTensor& named : whole.tensors())
    for (const models::NamedTensor& other : others)
      if (other.name == named.name) listed += named.tensor->equal(*other.tensor);
  if (listed != others.size()) wrong += "a tensor that is not shared; ";
  const std::vector<std::string> told = gather_text(ranks, std::to_string(own), "own bytes");
  std::uint64_t together = 0;
  for (const std::string& text : told) together += std::stoull(text);
  // What quantisation adds to parts that end within a block of scales is nothing: cuts lie between such blocks.
  if (together != all) wrong += "the ranks keep " + std::to_string(together) + " bytes of " + std::to_string(all) + "; ";
  return wrong;
}

class OnRanks : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Sizes, OnRanks, ::testing::Values(1, 2, 3, 4, 7), ::testing::PrintToStringParamName());

TEST_P(OnRanks, HaveTheBitsOfTheWholeFolder) {
  const testing::ScratchFolder folder;
  const std::pair<const char*, at::ScalarType> stored[] = {{"f32", at::kFloat}, {"bf16", at::kBFloat16}, {"f16", at::kHalf}};
  for (const auto& [name, type] : stored) write_folder(folder.path() / name, odd_config(), type);
  testing::expect_all_fine(testing::run_ranks(GetParam(), testing::kPatient, [&](Communicator& ranks) {
    std::string wrong;
    for (const auto& [name, ignored] : stored)
      for (const at::ScalarType type : {at::kFloat, at::kBFloat16})
        for (const lora::BaseQuantization& quantization : {lora::BaseQuantization{}, lora::BaseQuantization{.format = "nf4"}, lora::BaseQuantization{.format = "nf4", .double_quant = false}, lora::BaseQuantization{.format = "int8"}})
          if (const std::string found = difference(folder.path() / name, type, quantization, ranks); !found.empty()) wrong += lora::name_of(quantization) + " of " + name + " in " + toString(type) + ": " + found;
    return wrong;
  }));
}

TEST_P(OnRanks, HaveTheBitsOfPublishedFolders) {  // tiny ones: fused projections, an own head, and those that bitsandbytes quantised
  testing::expect_all_fine(testing::run_ranks(GetParam(), testing::kPatient, [](Communicator& ranks) {
    std::string wrong;
    for (const char* name : {"peft/phi3", "peft/llama_untied", "peft/gemma2", "peft/gemma3", "bitsandbytes/nf4", "bitsandbytes/int8"})
      for (const at::ScalarType type : {at::kFloat, at::kBFloat16})
        if (const std::string found = difference(testing::golden_path(name), type, {}, ranks); !found.empty()) wrong += std::string(name) + ": " + found;
    return wrong;
  }));
}

TEST(Cut, LeavesNothingOutAndIsEven) {
  for (const char* format : {"none", "nf4", "int8"})
    for (const int ranks : {1, 2, 3, 4, 8, 64}) {
      SCOPED_TRACE(std::string(format) + " on " + std::to_string(ranks));
      std::vector<lora::WeightToCut> weights;
      for (const auto& [outputs, inputs] : {std::pair{576, 576}, {192, 576}, {192, 576}, {576, 576}, {1536, 576}, {1536, 576}, {576, 1536}, {1, 1}, {3, 5}}) weights.push_back({.outputs = outputs, .inputs = inputs, .quantization = {.format = format}});
      const lora::CutBlock cut = lora::cut(weights, ranks);
      std::int64_t all = 0;
      for (std::size_t i = 0; i < weights.size(); ++i) {
        std::int64_t next = 0;
        for (const lora::Piece& piece : cut.pieces[i]) {
          EXPECT_EQ(piece.first, next);
          EXPECT_GE(piece.count, 0);
          EXPECT_LE(piece.offset + lora::bytes_of_piece(weights[i], piece.count), cut.part_bytes);
          next += piece.count;
        }
        EXPECT_EQ(next, weights[i].outputs * weights[i].inputs);
        all += lora::bytes_of_piece(weights[i], next);
      }
      const std::int64_t unit = format == std::string("nf4") ? 8452 : format == std::string("int8") ? 1540 : 256;
      EXPECT_LE(cut.part_bytes, all / ranks + unit + 64 * static_cast<std::int64_t>(weights.size()));
    }
}

std::uint64_t anonymous_kibibytes() {
  std::ifstream lines("/proc/self/status");
  for (std::string line; std::getline(lines, line);)
    if (line.starts_with("RssAnon:")) return std::stoull(line.substr(8));
  return 0;
}

// Anonymous memory of the process, beside that of one rank that converts the whole: it falls as 1/N, but for the blocks at hand.
TEST(ShardedLoad, TakesOnePartOfTheMemory) {
  const testing::ScratchFolder folder;
  Json config = odd_config();
  config["hidden_size"] = 384, config["num_attention_heads"] = 12, config["intermediate_size"] = 1024, config["num_hidden_layers"] = 24;
  // By a process of its own, whose heap the others do not inherit.
  testing::expect_all_fine(testing::run_ranks(1, testing::kPatient, [&](Communicator&) { return write_folder(folder.path() / "large", config), ""; }));
  for (const char* format : {"none", "nf4"}) {
    std::map<int, double> mebibytes;
    for (const int size : {1, 2, 4, 8}) {
      const auto ends = testing::run_ranks(size, testing::kPatient, [&](Communicator& ranks) {
        at::set_num_threads(1);
        use_tensor_heaps();  // as the program
        ranks.barrier("all are here");
        const std::uint64_t before = anonymous_kibibytes();
        const models::Decoder decoder = load_decoder(folder.path() / "large", at::kBFloat16, {.format = format}, Linears::kDense, Sharing{ranks, ranks.size()});
        if (decoder.shards) decoder.shards->end_pass(true);  // all buffers have been used
        return std::to_string(anonymous_kibibytes() - before);
      });
      for (const testing::End& end : ends) ASSERT_EQ(end.status, 0) << end.said;
      for (const testing::End& end : ends) mebibytes[size] = std::max(mebibytes[size], std::stod(end.said) / 1024);
    }
    const double block = 1523712 * (format == std::string("none") ? 2.0 : 33.0 / 64) / (1 << 20), all = 24 * block;
    std::cout << format << ", block " << block << " MiB:";
    for (const auto& [size, taken] : mebibytes) std::cout << "  " << taken << " MiB by " << size;
    std::cout << "\n";
    EXPECT_NEAR(mebibytes[1], all, 3) << format;
    for (const int size : {2, 4, 8}) EXPECT_NEAR(mebibytes[size], all / size + 2 * block, 3) << format << " on " << size;
  }
}

// A rank reads its own part alone: what is damaged in another's it does not see.
TEST(ShardedLoad, OnlyTheRankWhosePartIsDamagedSaysSo) {
  const testing::ScratchFolder folder;
  for (const char* format : {"none", "nf4", "int8"}) {
    const std::filesystem::path damaged = folder.path() / format;
    write_folder(damaged, odd_config(), at::kFloat, [](const std::string& name, at::Tensor& tensor) {
      if (name == "model.layers.1.mlp.down_proj.weight") tensor.view(-1)[tensor.numel() - 3] = 1e38f;
    });
    // write_safetensors() refuses infinities, so that one is made of the largest value here.
    std::string bytes = read_file(damaged / "model.safetensors");
    const float finite = 1e38f, infinite = std::numeric_limits<float>::infinity();
    bytes.replace(bytes.find(std::string(reinterpret_cast<const char*>(&finite), 4)), 4, reinterpret_cast<const char*>(&infinite), 4);
    std::ofstream(damaged / "model.safetensors", std::ios::binary) << bytes;
    const auto ends = testing::run_ranks(3, testing::kPatient, [&](Communicator& ranks) {
      try {
        load_decoder(damaged, at::kFloat, {.format = format}, Linears::kDense, Sharing{ranks, ranks.size()});
      } catch (const Error& error) {
        if (error.kind() != ErrorKind::kPeer) ranks.tell_failure(error.what());
        throw;
      }
      ranks.barrier("loaded");
      return "";
    });
    const auto owner = std::find_if(ends.begin(), ends.end(), [](const testing::End& end) { return WEXITSTATUS(end.status) == 3; });
    ASSERT_NE(owner, ends.end()) << format;
    EXPECT_NE(owner->said.find("\"model.layers.1.mlp.down_proj.weight\" is not finite at element " + std::to_string(190 * 521 - 3)), std::string::npos) << owner->said;
    testing::expect_lost(ends, static_cast<std::size_t>(owner - ends.begin()), 20, {"failed", "is not finite"});
  }
}

}  // namespace
}  // namespace alambic::checkpoints
