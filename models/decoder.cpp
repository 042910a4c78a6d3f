// SPDX-License-Identifier: Apache-2.0
#include "models/decoder.h"

#include <ATen/ops/gelu.h>
#include <ATen/ops/silu.h>

#include <cmath>
#include <numeric>
#include <optional>

#include "core/error.h"
#include "models/attention.h"
#include "models/fused_blocks.h"
#include "models/key_value_cache.h"
#include "models/neftune.h"
#include "models/norm.h"
#include "models/rope.h"
#include "models/token_rows.h"

namespace alambic::models {
namespace {

constexpr Slot kBlockLinears[] = {Slot::kQuery, Slot::kKey, Slot::kValue, Slot::kQueryKeyValue, Slot::kOutput,
                                  Slot::kGate, Slot::kUp, Slot::kGateUp, Slot::kDown};
constexpr Slot kBlockNorms[] = {Slot::kAttentionNorm, Slot::kQueryNorm, Slot::kKeyNorm, Slot::kAfterAttentionNorm,
                                Slot::kMlpNorm, Slot::kAfterMlpNorm};

// "model.layers.{L}.self_attn.q_proj" with the layer's number.
std::string published_path(const Family& family, Slot slot, std::int64_t layer) {
  for (const WeightName& name : family.names) {
    if (name.slot != slot) continue;
    std::string path(name.published);
    if (const std::size_t at = path.find("{L}"); at != std::string::npos) path.replace(at, 3, std::to_string(layer));
    return path;
  }
  fail(ErrorKind::kBug, "family ", family.model_type, " has no name for slot ", static_cast<int>(slot));
}

// [outputs, inputs] of a Linear's weight.
std::pair<std::int64_t, std::int64_t> linear_shape(const ModelConfig& config, Slot slot) {
  const std::int64_t queries = config.num_heads * config.head_size, keys = config.num_kv_heads * config.head_size;
  switch (slot) {
    case Slot::kQuery: return {queries, config.hidden_size};
    case Slot::kKey:
    case Slot::kValue: return {keys, config.hidden_size};
    case Slot::kQueryKeyValue: return {queries + 2 * keys, config.hidden_size};
    case Slot::kOutput: return {config.hidden_size, queries};
    case Slot::kGate:
    case Slot::kUp: return {config.intermediate_size, config.hidden_size};
    case Slot::kGateUp: return {2 * config.intermediate_size, config.hidden_size};
    case Slot::kDown: return {config.hidden_size, config.intermediate_size};
    case Slot::kHead: return {config.vocabulary_size, config.hidden_size};
    default: fail(ErrorKind::kBug, "slot ", static_cast<int>(slot), " is not a Linear");
  }
}

std::int64_t norm_size(const ModelConfig& config, Slot slot) {
  return slot == Slot::kQueryNorm || slot == Slot::kKeyNorm ? config.head_size : config.hidden_size;
}

bool has_bias(const ModelConfig& config, Slot slot) {
  switch (slot) {
    case Slot::kQuery:
    case Slot::kKey:
    case Slot::kValue:
    case Slot::kQueryKeyValue: return config.qkv_bias;
    case Slot::kOutput: return config.output_bias;
    case Slot::kGate:
    case Slot::kUp:
    case Slot::kGateUp:
    case Slot::kDown: return config.mlp_bias;
    default: return false;
  }
}

// What one forward pass computes once for all of its layers.
struct Pass {
  const Input& input;
  Documents documents;
  RotaryTable rope, local_rope;
  at::ScalarType type;
  std::optional<CachedPass> cached = {};

  void show(Place place, std::size_t layer, const at::Tensor& x) const {
    if (input.observer != nullptr) (*input.observer)(place, layer, x);
  }
};

// Attention with its projections: normalised x_TD -> [T, D], before the residual.
at::Tensor attention(const ModelConfig& config, const Block& block, std::size_t layer, const at::Tensor& x_TD, Pass& pass) {
  const LayerConfig& kind = config.layers[layer];
  const std::int64_t queries = config.num_heads * config.head_size, keys = config.num_kv_heads * config.head_size;
  const auto project = [&](Slot slot) { return block.linears.at(slot)(x_TD, pass.input.dropout_seed); };
  const auto by_head = [&](const at::Tensor& x) { return x.unflatten(1, {-1, config.head_size}); };

  at::Tensor q_THS, k_TKS, v_TKS;
  if (block.linears.contains(Slot::kQueryKeyValue)) {
    const at::Tensor all = project(Slot::kQueryKeyValue);
    q_THS = by_head(all.narrow(1, 0, queries));
    k_TKS = by_head(all.narrow(1, queries, keys));
    v_TKS = by_head(all.narrow(1, queries + keys, keys));
  } else {
    q_THS = by_head(project(Slot::kQuery));
    k_TKS = by_head(project(Slot::kKey));
    v_TKS = by_head(project(Slot::kValue));
  }
  if (const auto norm = block.norms.find(Slot::kQueryNorm); norm != block.norms.end())
    q_THS = rms_norm(q_THS, norm->second, config.family->norm_weight_offset, config.norm_epsilon, pass.type);
  if (const auto norm = block.norms.find(Slot::kKeyNorm); norm != block.norms.end())
    k_TKS = rms_norm(k_TKS, norm->second, config.family->norm_weight_offset, config.norm_epsilon, pass.type);
  if (kind.use_rope) {
    const RotaryTable& table = kind.local_rope ? pass.local_rope : pass.rope;
    q_THS = rotate(q_THS, table);
    k_TKS = rotate(k_TKS, table);
  }

  const at::Tensor y_TQ = pass.cached ? pass.cached->attend(layer, q_THS, k_TKS, v_TKS, pass.documents, config.attention_scale, kind.window, config.attention_soft_cap)
                                      : pass.documents.attend(q_THS, k_TKS, v_TKS, config.attention_scale, kind.window, config.attention_soft_cap);
  pass.show(Place::kHeads, layer, y_TQ);
  return block.linears.at(Slot::kOutput)(y_TQ, pass.input.dropout_seed);
}

// Gated feed-forward (arXiv:2002.05202): normalised x_TD -> [T, D], before the residual.
at::Tensor feed_forward(const ModelConfig& config, const Block& block, std::size_t layer, const at::Tensor& x_TD, const Pass& pass) {
  const auto project = [&](Slot slot, const at::Tensor& x) { return block.linears.at(slot)(x, pass.input.dropout_seed); };
  at::Tensor gate_TF, up_TF;
  if (block.linears.contains(Slot::kGateUp)) {
    const at::Tensor both = project(Slot::kGateUp, x_TD);
    gate_TF = both.narrow(1, 0, config.intermediate_size);
    up_TF = both.narrow(1, config.intermediate_size, config.intermediate_size);
  } else {
    gate_TF = project(Slot::kGate, x_TD);
    up_TF = project(Slot::kUp, x_TD);
  }
  const at::Tensor gated_TF = (config.gelu_tanh ? at::gelu(gate_TF, "tanh") : at::silu(gate_TF)) * up_TF;
  pass.show(Place::kNeurons, layer, gated_TF);
  return project(Slot::kDown, gated_TF);
}

void check_input(const Input& input) {
  const std::int64_t tokens = input.tokens_T.numel();
  const std::int64_t in_documents = std::accumulate(input.document_lengths.begin(), input.document_lengths.end(), std::int64_t{0});
  for (const std::int64_t length : input.document_lengths)
    if (length < 1) fail(ErrorKind::kBug, "a document of ", length, " tokens in a forward pass");
  const std::int64_t sharing = input.shared != nullptr ? input.shared->context().size : 1;
  if (tokens == 0 || in_documents != tokens * sharing || input.positions_T.numel() != tokens)
    fail(ErrorKind::kBug, "a forward pass of ", tokens, " tokens with ", input.positions_T.numel(), " positions and documents of ", in_documents, " tokens");
}

}  // namespace

Decoder make_decoder(const ModelConfig& config) {
  Decoder decoder;
  decoder.config = config;
  decoder.head_tied = config.tied_head;
  decoder.head.soft_cap = config.logit_soft_cap;
  for (std::int64_t layer = 0; layer < config.num_layers; ++layer) {
    Block& block = decoder.blocks.emplace_back();
    for (const Slot slot : kBlockLinears)
      if (config.family->has(slot)) block.linears[slot];
    for (const Slot slot : kBlockNorms)
      if (config.family->has(slot)) block.norms[slot];
  }
  return decoder;
}

at::Tensor Decoder::hidden_TD(const Input& input) const {
  check_input(input);
  const at::Device device = embedding_VD.device();
  at::Tensor h_TD = embedded_TD(embedding_VD, token_rows_ND, token_row_ids, input.tokens_T.to(device), config.pad_id, compute_type());
  if (config.family->scale_embedding) {
    // Gemma multiplies in the embedding's type; in bf16 sqrt(hidden size) is rounded with it. A run in f32 widens what is stored before it multiplies.
    const double scale = std::sqrt(static_cast<double>(config.hidden_size));
    h_TD = h_TD * (embedding_VD.scalar_type() == at::kBFloat16 && compute_type() == at::kBFloat16 ? static_cast<double>(at::BFloat16(static_cast<float>(scale))) : scale);
  }
  add_neftune_noise_in_place(h_TD, input.document_lengths, input.neftune_alpha, input.dropout_seed, input.shared);
  if (input.shared != nullptr && !fused) fail(ErrorKind::kBug, "a shared row without the fused blocks");
  if (fused && input.cache == nullptr && input.observer == nullptr) return fused_hidden_TD(*this, input, h_TD);

  const double offset = config.family->norm_weight_offset, epsilon = config.norm_epsilon;
  Pass pass{input, Documents(input.document_lengths), rotary_table(config.rope, input.positions_T, input.document_lengths, device), {}, compute_type()};
  if (config.family->local_rope_theta != 0) pass.local_rope = rotary_table(config.local_rope, input.positions_T, input.document_lengths, device);
  if (input.cache != nullptr) pass.cached.emplace(*input.cache, input.cache_rows, input.document_lengths);
  for (std::size_t layer = 0; layer < blocks.size(); ++layer) {
    const Block& block = blocks[layer];
    const auto norm = [&](Slot slot, const at::Tensor& x_TD, at::ScalarType type) { return rms_norm(x_TD, block.norms.at(slot), offset, epsilon, type); };
    pass.show(Place::kBlockInput, layer, h_TD);
    at::Tensor x_TD = norm(Slot::kAttentionNorm, h_TD, pass.type);
    pass.show(Place::kAttentionInput, layer, x_TD);
    at::Tensor y_TD = attention(config, block, layer, x_TD, pass);
    if (block.norms.contains(Slot::kAfterAttentionNorm)) y_TD = norm(Slot::kAfterAttentionNorm, y_TD, at::kFloat);
    h_TD = h_TD + y_TD;
    x_TD = norm(Slot::kMlpNorm, h_TD, pass.type);
    pass.show(Place::kMlpInput, layer, x_TD);
    y_TD = feed_forward(config, block, layer, x_TD, pass);
    if (block.norms.contains(Slot::kAfterMlpNorm)) y_TD = norm(Slot::kAfterMlpNorm, y_TD, at::kFloat);
    h_TD = h_TD + y_TD;
    pass.show(Place::kBlockOutput, layer, h_TD);
  }
  if (pass.cached) pass.cached->finish();
  return rms_norm(h_TD, final_norm_D, offset, epsilon, pass.type);
}

at::Tensor Decoder::logits_TV(const at::Tensor& hidden_TD) const { return head(hidden_TD, 0).to(at::kFloat); }

std::vector<NamedTensor> Decoder::tensors() {
  std::vector<NamedTensor> list;
  const Family& family = *config.family;
  list.push_back({published_path(family, Slot::kEmbedding, 0) + ".weight", &embedding_VD});
  for (std::size_t layer = 0; layer < blocks.size(); ++layer) {
    const auto path = [&](Slot slot) { return published_path(family, slot, static_cast<std::int64_t>(layer)); };
    for (auto& [slot, norm] : blocks[layer].norms) list.push_back({path(slot) + ".weight", &norm});
    for (auto& [slot, linear] : blocks[layer].linears) {
      if (!linear.quantized) list.push_back({path(slot) + ".weight", &linear.weight_OI});
      if (has_bias(config, slot)) list.push_back({path(slot) + ".bias", &linear.bias_O});
    }
  }
  list.push_back({published_path(family, Slot::kFinalNorm, 0) + ".weight", &final_norm_D});
  if (!head_tied && !head.quantized) list.push_back({published_path(family, Slot::kHead, 0) + ".weight", &head.weight_OI});
  return list;
}

std::vector<std::pair<std::string, std::vector<std::int64_t>>> expected_shapes(const ModelConfig& config) {
  std::vector<std::pair<std::string, std::vector<std::int64_t>>> shapes;
  const Family& family = *config.family;
  shapes.push_back({published_path(family, Slot::kEmbedding, 0) + ".weight", {config.vocabulary_size, config.hidden_size}});
  for (std::int64_t layer = 0; layer < config.num_layers; ++layer) {
    for (const Slot slot : kBlockNorms)
      if (family.has(slot)) shapes.push_back({published_path(family, slot, layer) + ".weight", {norm_size(config, slot)}});
    for (const Slot slot : kBlockLinears) {
      if (!family.has(slot)) continue;
      const auto [outputs, inputs] = linear_shape(config, slot);
      shapes.push_back({published_path(family, slot, layer) + ".weight", {outputs, inputs}});
      if (has_bias(config, slot)) shapes.push_back({published_path(family, slot, layer) + ".bias", {outputs}});
    }
  }
  shapes.push_back({published_path(family, Slot::kFinalNorm, 0) + ".weight", {config.hidden_size}});
  if (!config.tied_head) shapes.push_back({published_path(family, Slot::kHead, 0) + ".weight", {config.vocabulary_size, config.hidden_size}});
  return shapes;
}

std::vector<NamedLinear> Decoder::linears() {
  std::vector<NamedLinear> list;
  for (std::size_t layer = 0; layer < blocks.size(); ++layer)
    for (auto& [slot, linear] : blocks[layer].linears) {
      const auto number = static_cast<std::int64_t>(layer);
      list.push_back({published_path(*config.family, slot, number), slot, number, &linear});
    }
  list.push_back({published_path(*config.family, Slot::kHead, 0), Slot::kHead, -1, &head});
  return list;
}

void make_head_dense(Decoder& decoder) {
  Linear& head = decoder.head;
  if (!head.quantized) return;
  head.weight_OI = head.dense_OI(head.compute_type());
  head.quantized = nullptr;
  if (decoder.head_tied) decoder.embedding_VD = head.weight_OI;
}

at::ScalarType Decoder::compute_type() const { return blocks.front().linears.at(Slot::kOutput).compute_type(); }

}  // namespace alambic::models
