// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/gguf_names.h"

#include <ATen/TensorOperators.h>

#include <algorithm>
#include <map>

#include "core/error.h"
#include "models/decoder.h"

namespace alambic::checkpoints {
namespace {

using models::Slot;

// What GGUF calls the modules of a decoder; {L} stands for the layer number.
struct SlotName {
  Slot slot;
  const char* gguf;
};
constexpr SlotName kSlotNames[] = {
    {Slot::kEmbedding, "token_embd"},
    {Slot::kAttentionNorm, "blk.{L}.attn_norm"},
    {Slot::kQuery, "blk.{L}.attn_q"},
    {Slot::kKey, "blk.{L}.attn_k"},
    {Slot::kValue, "blk.{L}.attn_v"},
    {Slot::kQueryKeyValue, "blk.{L}.attn_qkv"},
    {Slot::kOutput, "blk.{L}.attn_output"},
    {Slot::kQueryNorm, "blk.{L}.attn_q_norm"},
    {Slot::kKeyNorm, "blk.{L}.attn_k_norm"},
    {Slot::kAfterAttentionNorm, "blk.{L}.post_attention_norm"},
    {Slot::kMlpNorm, "blk.{L}.ffn_norm"},
    {Slot::kGate, "blk.{L}.ffn_gate"},
    {Slot::kUp, "blk.{L}.ffn_up"},
    {Slot::kGateUp, "blk.{L}.ffn_up"},
    {Slot::kDown, "blk.{L}.ffn_down"},
    {Slot::kAfterMlpNorm, "blk.{L}.post_ffw_norm"},
    {Slot::kFinalNorm, "output_norm"},
    {Slot::kHead, "output"},
};

constexpr GgufArchitecture kArchitectures[] = {
    {.gguf = "llama", .model_type = "llama", .rotated_in_pairs = true, .output_and_mlp_bias = true, .llama3_scaling = true},
    {.gguf = "llama", .model_type = "mistral", .rotated_in_pairs = true, .output_and_mlp_bias = true, .llama3_scaling = true},
    {.gguf = "smollm3", .model_type = "smollm3", .rotated_in_pairs = true},
    {.gguf = "qwen2", .model_type = "qwen2"},
    {.gguf = "qwen3", .model_type = "qwen3"},
    {.gguf = "gemma2", .model_type = "gemma2"},
    {.gguf = "gemma3", .model_type = "gemma3_text"},
    {.gguf = "phi3", .model_type = "phi3"},
};

std::string with_layer(std::string_view pattern, std::int64_t layer) {
  const std::size_t at = pattern.find("{L}");
  if (at == std::string_view::npos) return std::string(pattern);
  return std::string(pattern.substr(0, at)) + std::to_string(layer) + std::string(pattern.substr(at + 3));
}

// llama.cpp's rotation turns rows 2i and 2i+1 of a head together, transformers' rows i and i + half. The rows of each head as
// a table of so many columns, turned on its side.
at::Tensor turned(const at::Tensor& tensor, std::int64_t heads, std::int64_t columns) {
  std::vector<std::int64_t> split = {heads, tensor.size(0) / heads / columns, columns};
  split.insert(split.end(), tensor.sizes().begin() + 1, tensor.sizes().end());
  return tensor.reshape(split).transpose(1, 2).reshape(tensor.sizes());
}

}  // namespace

std::span<const GgufArchitecture> gguf_architectures() { return kArchitectures; }

std::int64_t gemma_layers_of_27b(std::string_view model_type) { return model_type == "gemma2" ? 46 : 62; }

std::vector<GgufMove> gguf_moves(const models::ModelConfig& config, const GgufArchitecture& architecture) {
  struct Place {
    std::string gguf;
    Slot slot;
  };
  std::map<std::string, Place> places;  // published module -> GGUF module
  for (const models::WeightName& row : config.family->names) {
    const auto name = std::find_if(std::begin(kSlotNames), std::end(kSlotNames), [&](const SlotName& candidate) { return candidate.slot == row.slot; });
    if (name == std::end(kSlotNames)) fail(ErrorKind::kBug, "no GGUF name for ", row.published);
    const bool layered = row.published.find("{L}") != std::string_view::npos;
    for (std::int64_t layer = 0; layer < (layered ? config.num_layers : 1); ++layer)
      places.emplace(with_layer(row.published, layer), Place{with_layer(name->gguf, layer), row.slot});
  }
  std::vector<GgufMove> moves;
  for (const auto& [published, shape] : models::expected_shapes(config)) {
    const std::size_t dot = published.rfind('.');
    const auto place = places.find(published.substr(0, dot));
    if (place == places.end()) fail(ErrorKind::kBug, "no GGUF name for ", published);
    GgufMove move{.gguf = place->second.gguf + published.substr(dot), .published = published, .shape = shape, .slot = place->second.slot};
    if (architecture.rotated_in_pairs && move.slot == Slot::kQuery) move.pairs_of_heads = config.num_heads;
    if (architecture.rotated_in_pairs && move.slot == Slot::kKey) move.pairs_of_heads = config.num_kv_heads;
    if (move.gguf.ends_with("norm.weight")) move.offset = config.family->norm_weight_offset;
    moves.push_back(std::move(move));
  }
  return moves;
}

at::Tensor to_gguf(const at::Tensor& published, const GgufMove& move) {
  at::Tensor tensor = published;
  if (move.pairs_of_heads > 0) tensor = turned(tensor, move.pairs_of_heads, tensor.size(0) / move.pairs_of_heads / 2);
  if (move.offset != 0) tensor = tensor.to(at::kFloat) + move.offset;
  return tensor;
}

at::Tensor from_gguf(const at::Tensor& stored, const GgufMove& move) {
  at::Tensor tensor = stored;
  if (move.pairs_of_heads > 0) tensor = turned(tensor, move.pairs_of_heads, 2);
  if (move.offset != 0) tensor = tensor.to(at::kFloat) - move.offset;
  return tensor;
}

}  // namespace alambic::checkpoints
