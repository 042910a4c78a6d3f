// SPDX-License-Identifier: Apache-2.0
#include "distill/parts.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/tensor.h>

#include <cmath>
#include <map>

#include "core/error.h"

namespace alambic::distill {
namespace {

using models::Slot;

at::Tensor index_of(const std::vector<std::int64_t>& numbers) { return at::tensor(numbers, at::kLong); }

// Rows of heads from the numbers of heads.
at::Tensor rows_of_heads(const at::Tensor& heads_H, std::int64_t head_size) {
  return (heads_H.unsqueeze(1) * head_size + at::arange(head_size).unsqueeze(0)).flatten();
}

at::Tensor take(const at::Tensor& x, std::int64_t axis, const at::Tensor& index) { return index.defined() ? x.index_select(axis, index) : x; }

const at::Tensor& of_layer(const std::vector<at::Tensor>& list, std::int64_t layer) {
  static const at::Tensor kAll;
  return list.empty() ? kAll : list.at(static_cast<std::size_t>(layer));
}

// Rows of one matrix out of those of its parts, each a number of rows and an index into them.
at::Tensor stacked(const std::vector<std::pair<std::int64_t, at::Tensor>>& parts) {
  bool any = false;
  for (const auto& [size, index] : parts) any = any || index.defined();
  if (!any) return {};
  std::vector<at::Tensor> rows;
  std::int64_t first = 0;
  for (const auto& [size, index] : parts) {
    rows.push_back((index.defined() ? index : at::arange(size)) + first);
    first += size;
  }
  return at::cat(rows);
}

struct Cut {
  at::Tensor outputs, inputs;
};

Cut cut_of(const TensorPlace& place, const Parts& parts, const models::ModelConfig& config) {
  const std::int64_t S = config.head_size;
  const auto rows = [&](const std::vector<at::Tensor>& list) {
    const at::Tensor& heads = of_layer(list, place.layer);
    return heads.defined() ? rows_of_heads(heads, S) : at::Tensor();
  };
  const auto neurons = [&] { return of_layer(parts.neurons, place.layer); };
  switch (place.slot) {
    case Slot::kEmbedding:
    case Slot::kHead: return {parts.tokens, parts.channels};
    case Slot::kQuery: return {rows(parts.heads), parts.channels};
    case Slot::kKey:
    case Slot::kValue: return {rows(parts.kv_heads), parts.channels};
    case Slot::kQueryKeyValue: {
      const at::Tensor keys = rows(parts.kv_heads);
      return {stacked({{config.num_heads * S, rows(parts.heads)}, {config.num_kv_heads * S, keys}, {config.num_kv_heads * S, keys}}), parts.channels};
    }
    case Slot::kOutput: return {parts.channels, rows(parts.heads)};
    case Slot::kGate:
    case Slot::kUp: return {neurons(), parts.channels};
    case Slot::kGateUp: return {stacked({{config.intermediate_size, neurons()}, {config.intermediate_size, neurons()}}), parts.channels};
    case Slot::kDown: return {parts.channels, neurons()};
    case Slot::kAttentionNorm:
    case Slot::kAfterAttentionNorm:
    case Slot::kMlpNorm:
    case Slot::kAfterMlpNorm:
    case Slot::kFinalNorm: return {parts.channels, {}};
    case Slot::kQueryNorm:
    case Slot::kKeyNorm: return {};  // one for all heads, of a head's size
  }
  fail(ErrorKind::kBug, "slot ", static_cast<int>(place.slot), " has no rule for pruning");
}

bool same_layers(const std::vector<models::LayerConfig>& a, const std::vector<models::LayerConfig>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const models::LayerConfig& x, const models::LayerConfig& y) {
    return x.window == y.window && x.use_rope == y.use_rope && x.local_rope == y.local_rope;
  });
}

}  // namespace

Parts chosen_parts(const models::ModelConfig& base, const Shape& shape, const std::vector<std::int64_t>& layers, const Importance& importance) {
  Parts parts{.layers = layers, .rows = shape.vocabulary};
  if (shape.hidden < base.hidden_size) parts.channels = index_of(largest(importance.channels_D, shape.hidden));
  const bool fewer_neurons = shape.intermediate < base.intermediate_size, fewer_heads = shape.heads < base.num_heads || shape.kv_heads < base.num_kv_heads;
  const std::int64_t in_group = base.num_heads / base.num_kv_heads, kept_in_group = shape.heads / shape.kv_heads;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const auto layer = static_cast<std::int64_t>(i);
    if (fewer_neurons) parts.neurons.push_back(index_of(largest(importance.neurons_LF[layer], shape.intermediate)));
    if (!fewer_heads) continue;
    const at::Tensor scores_KG = importance.heads_LH[layer].unflatten(0, {base.num_kv_heads, in_group});
    const std::vector<std::int64_t> groups = largest(scores_KG.sum(1), shape.kv_heads);
    std::vector<std::int64_t> heads;
    for (const std::int64_t group : groups)
      for (const std::int64_t head : largest(scores_KG[group], kept_in_group)) heads.push_back(group * in_group + head);
    parts.heads.push_back(index_of(heads));
    parts.kv_heads.push_back(index_of(groups));
  }
  return parts;
}

std::vector<TensorPlace> tensor_places(const models::ModelConfig& config) {
  models::Decoder decoder = models::make_decoder(config);
  std::map<const at::Tensor*, TensorPlace> known;
  known[&decoder.embedding_VD] = {.name = "", .slot = Slot::kEmbedding, .shape = {}};
  known[&decoder.final_norm_D] = {.name = "", .slot = Slot::kFinalNorm, .shape = {}};
  known[&decoder.head.weight_OI] = {.name = "", .slot = Slot::kHead, .shape = {}};
  for (std::size_t layer = 0; layer < decoder.blocks.size(); ++layer) {
    const auto number = static_cast<std::int64_t>(layer);
    for (const auto& [slot, norm] : decoder.blocks[layer].norms) known[&norm] = {.name = "", .slot = slot, .layer = number, .shape = {}};
    for (const auto& [slot, linear] : decoder.blocks[layer].linears) {
      known[&linear.weight_OI] = {.name = "", .slot = slot, .layer = number, .shape = {}};
      known[&linear.bias_O] = {.name = "", .slot = slot, .layer = number, .is_bias = true, .shape = {}};
    }
  }
  const auto shapes = models::expected_shapes(config);
  const std::vector<models::NamedTensor> tensors = decoder.tensors();
  std::vector<TensorPlace> places;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    TensorPlace& place = places.emplace_back(known.at(tensors[i].tensor));
    place.name = shapes.at(i).first;
    place.shape = shapes[i].second;
  }
  return places;
}

at::Tensor cut_tensor(const at::Tensor& base, const TensorPlace& place, const Parts& parts, const models::ModelConfig& config) {
  const Cut cut = cut_of(place, parts, config);
  at::Tensor result = take(base, 0, cut.outputs);
  if (!place.is_bias && base.dim() == 2) result = take(result, 1, cut.inputs);
  const bool is_table = place.slot == Slot::kEmbedding || place.slot == Slot::kHead;
  if (is_table && result.size(0) < parts.rows) result = at::cat({result, result.to(at::kFloat).mean(0, true).to(result.scalar_type()).expand({parts.rows - result.size(0), -1})});
  if (config.family->scale_embedding && parts.channels.defined() && (place.slot == Slot::kEmbedding || (place.slot == Slot::kFinalNorm && config.tied_head))) {
    const double lost = std::sqrt(static_cast<double>(config.hidden_size) / static_cast<double>(parts.channels.numel())), offset = config.family->norm_weight_offset;
    const at::Tensor wide = result.to(at::kFloat);
    result = (place.slot == Slot::kEmbedding ? wide * lost : (wide + offset) / lost - offset).to(result.scalar_type());
  }
  return result;
}

Json student_config(const models::ModelConfig& base, const Shape& shape, const std::vector<std::int64_t>& layers) {
  Json json = base.source;
  const Shape was = shape_of(base);
  const Json before = was.json(), after = shape.json();
  for (const auto& [key, size] : after.items())
    if (size != before[key]) json[key] = size;
  const bool follows = shape.hidden % shape.heads == 0 && shape.hidden / shape.heads == base.head_size;
  if (!follows && base.family->partial_longrope && base.rope.long_from > 0)
    fail(ErrorKind::kUsage, base.family->model_type, " with LongRoPE: transformers takes hidden_size / num_attention_heads for a head's size there, which would be ", shape.hidden, " / ", shape.heads, " instead of ",
         base.head_size, Remedy{"give sizes.hidden_size and sizes.num_attention_heads in this proportion"});
  if (!follows && (!json.contains("head_dim") || json["head_dim"].is_null())) json["head_dim"] = base.head_size;

  std::vector<models::LayerConfig> wanted;
  for (std::int64_t layer = 0; layer < shape.layers; ++layer)
    wanted.push_back(base.layers.at(static_cast<std::size_t>(layers.empty() ? layer % was.layers : layers.at(static_cast<std::size_t>(layer)))));
  // Lists of one entry a layer first go away: where the family's own rule gives what is wanted, nothing is to be listed.
  const Json known = parse_json(base.family->defaults, base.family->model_type);
  const bool layers_stay = shape.layers == was.layers && (layers.empty() || (layers.front() == 0 && layers.back() == was.layers - 1));
  const auto reads_as_wanted = [&] { return same_layers(models::read_model_config(json, "config.json of the student").layers, wanted); };
  if (!layers_stay) {
    const bool windows = std::any_of(base.layers.begin(), base.layers.end(), [](const models::LayerConfig& layer) { return layer.window > 0; });
    if (known.contains("no_rope_layers")) {
      json["no_rope_layers"] = Json::array();
      for (const models::LayerConfig& layer : wanted) json["no_rope_layers"].push_back(layer.use_rope ? 1 : 0);
    }
    if (known.contains("layer_types") && (windows || json.contains("layer_types"))) {
      json["layer_types"] = Json::array();
      for (const models::LayerConfig& layer : wanted) json["layer_types"].push_back(layer.window > 0 ? "sliding_attention" : "full_attention");
    } else if (json.contains("layer_types") && json["layer_types"].is_array()) {
      Json list = Json::array();  // means nothing to the family, but is checked for its length
      for (std::int64_t layer = 0; layer < shape.layers; ++layer) list.push_back(json["layer_types"].at(static_cast<std::size_t>(layers.empty() ? layer % was.layers : layers[static_cast<std::size_t>(layer)])));
      json["layer_types"] = list;
    }
  }
  if (!reads_as_wanted())
    fail(ErrorKind::kUsage, "the layers that are to be kept attend in other ways than ", base.family->model_type, " can say of layers with their new numbers",
         Remedy{"keep the pattern of its layers: drop whole periods of it"});
  return json;
}

}  // namespace alambic::distill
