// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/gguf_mix.h"

#include "core/error.h"

namespace alambic::checkpoints {
namespace {

using models::Slot;

constexpr GgufMix kMixes[] = {
    {"f32", 0, "F32"},       {"f16", 1, "F16"},       {"bf16", 32, "BF16"},    {"q8_0", 7, "Q8_0"},     {"q4_0", 2, "Q4_0"},
    {"q4_1", 3, "Q4_1"},     {"q5_0", 8, "Q5_0"},     {"q5_1", 9, "Q5_1"},     {"q4_k_s", 14, "Q4_K"},  {"q4_k_m", 15, "Q4_K"},
    {"q5_k_s", 16, "Q5_K"},  {"q5_k_m", 17, "Q5_K"},  {"q6_k", 18, "Q6_K"},
};

const GgufType& type_named(std::string_view name) {
  for (const GgufType& type : gguf_types())
    if (type.name == name) return type;
  fail(ErrorKind::kBug, "no GGUF type ", name);
}

// What stands in where a row is no whole number of blocks of 256.
std::string_view stand_in(std::string_view type) { return type == "Q4_K" ? "Q5_0" : type == "Q5_K" ? "Q5_1" : type == "Q6_K" ? "Q8_0" : ""; }

// The first and the last eighth of the layers, and each third between them, are the more sensitive ones.
bool more_bits(std::int64_t layer, std::int64_t num_layers) {
  return layer < num_layers / 8 || layer >= 7 * num_layers / 8 || (layer - num_layers / 8) % 3 == 2;
}

// Models whose eight query heads share a value head: that matrix is small, and a few more bits for it cost little.
bool is_70b(const models::ModelConfig& config) {
  constexpr std::int64_t kLayers = 80;
  if (config.num_layers != kLayers) return false;
  return config.family->model_type == "qwen2" || ((config.family->model_type == "llama" || config.family->model_type == "mistral") && config.num_heads != config.num_kv_heads);
}

}  // namespace

std::span<const GgufMix> gguf_mixes() { return kMixes; }

const GgufMix& find_gguf_mix(const std::string& name) {
  std::vector<std::string> names;
  std::string known;
  for (const GgufMix& mix : kMixes) {
    if (mix.name == name) return mix;
    names.emplace_back(mix.name);
    known += (known.empty() ? "" : ", ") + names.back();
  }
  const std::string near = nearest_name(name, names);
  fail(ErrorKind::kUsage, "type ", name, " is not one of ", known, near.empty() ? "" : "; did you mean " + near + "?");
}

std::vector<const GgufType*> gguf_types_of(const GgufMix& mix, const models::ModelConfig& config, const std::vector<GgufMove>& moves, bool has_importance) {
  const bool quantised = type_named(mix.type).dequantise != nullptr;
  std::int64_t value_layer = 0, down_layer = 0;  // llama-quantize counts them in the order of layers
  std::vector<const GgufType*> types;
  for (const GgufMove& move : moves) {
    if (move.shape.size() < 2 || move.gguf.ends_with("_norm.weight") || !move.gguf.ends_with(".weight")) {
      types.push_back(&type_named("F32"));
      continue;
    }
    std::string_view type = mix.type;
    const std::int64_t row = move.shape.back(), layers = config.num_layers;
    if (quantised) {
      switch (move.slot) {
        case Slot::kHead:
        case Slot::kEmbedding:
          if (move.slot == Slot::kEmbedding && !config.tied_head) break;
          if (row % type_named(type).block_size != 0) type = "Q8_0";
          else if (type != "Q8_0") type = "Q6_K";
          break;
        case Slot::kValue:
        case Slot::kQueryKeyValue:
          if ((mix.name == "q4_k_m" || mix.name == "q5_k_m") && more_bits(value_layer, layers)) type = "Q6_K";
          else if (mix.name == "q4_k_s" && value_layer < 4) type = "Q5_K";
          if (is_70b(config) && type == "Q4_K") type = "Q5_K";
          ++value_layer;
          break;
        case Slot::kDown:
          if ((mix.name == "q4_k_m" || mix.name == "q5_k_m") && more_bits(down_layer, layers)) type = "Q6_K";
          else if (mix.name == "q4_k_s" && down_layer < layers / 8) type = "Q5_K";
          // With importances, the first layers' outliers upset a type without a minimum.
          else if ((mix.name == "q4_0" || mix.name == "q5_0") && has_importance && down_layer < layers / 8) type = mix.name == "q4_0" ? "Q4_1" : "Q5_1";
          ++down_layer;
          break;
        default: break;
      }
      if (row % type_named(type).block_size != 0 && !stand_in(type).empty()) {
        type = stand_in(type);
        if (row % type_named(type).block_size != 0) type = "F16";
      }
    }
    if (row % type_named(type).block_size != 0)
      fail(ErrorKind::kData, "tensor \"", move.published, "\": rows of ", row, " values are not a multiple of the ", type_named(type).block_size, " in a block of ", type,
           Remedy{"this model cannot be quantised so: write it as f16, bf16 or f32"});
    types.push_back(&type_named(type));
  }
  return types;
}

}  // namespace alambic::checkpoints
