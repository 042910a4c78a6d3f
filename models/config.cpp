// SPDX-License-Identifier: Apache-2.0
#include "models/config.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/log.h"
#include "models/config_reader.h"
#include "models/decoder.h"
#include "models/rope_config.h"

namespace alambic::models {
namespace {

// Far above any model there is, and small enough that no product of them overflows 63 bits.
constexpr std::int64_t kMostLayers = 10000, kWidest = 1 << 20, kMostTokens = 1 << 24, kMostHeads = 1 << 14, kLongest = 1ll << 40;

// Keys outside a family's own that change the result when they hold anything else than one of these values.
struct Refused {
  const char* key;
  std::vector<Json> harmless;  // null always is
};
const std::vector<Refused>& refused_switches() {
  static const std::vector<Refused> kSwitches = {
      {"compression_config", {}},
      {"per_layer_config", {}},
      {"final_logit_softcapping", {}},
      {"attn_logit_softcapping", {}},
      {"logits_soft_cap", {}},
      {"pretraining_tp", {1}},
      {"use_bidirectional_attention", {false}},
      {"is_encoder_decoder", {false}},
      {"add_cross_attention", {false}},
      {"is_decoder", {true, false}},
  };
  return kSwitches;
}

void check_switches(ConfigReader& reader, const Family& family) {
  for (const Refused& refused : refused_switches()) {
    if (family.soft_caps && std::string_view(refused.key).ends_with("_logit_softcapping")) continue;
    const Json& value = reader[refused.key];
    const bool harmless = value.is_null() || std::find(refused.harmless.begin(), refused.harmless.end(), value) != refused.harmless.end();
    if (!harmless) reader.problem(refused.key, " = ", shown(value), " is not implemented");
  }
  // How the weights are stored concerns those who read them, which know one method (checkpoints/bitsandbytes.h).
  const Json& quantization = reader["quantization_config"];
  if (!quantization.is_null() && !(quantization.is_object() && quantization.value("quant_method", Json()) == "bitsandbytes"))
    reader.problem("quantization_config = ", shown(quantization), " is not implemented");
}

std::vector<std::int64_t> read_ids(ConfigReader& reader, const char* key) {
  const Json& value = reader[key];
  std::vector<std::int64_t> ids;
  const Json list = value.is_array() ? value : value.is_null() ? Json::array() : Json::array({value});
  for (const Json& id : list) {
    if (id.is_number_integer()) ids.push_back(id.get<std::int64_t>());
    else reader.problem(key, " must be a token id or a list of them, got ", shown(value));
  }
  return ids;
}

void read_sizes(ConfigReader& reader, ModelConfig& config) {
  config.vocabulary_size = reader.integer("vocab_size", 1, kMostTokens);
  config.hidden_size = reader.integer("hidden_size", 1, kWidest);
  config.intermediate_size = reader.integer("intermediate_size", 1, kWidest);
  config.num_layers = reader.integer("num_hidden_layers", 1, kMostLayers);
  config.num_heads = reader.integer("num_attention_heads", 1, kMostHeads);
  config.num_kv_heads = reader.is_null("num_key_value_heads") ? config.num_heads : reader.integer("num_key_value_heads", 1, kMostHeads);
  config.max_positions = reader.integer("max_position_embeddings", 1, kLongest);
  if (config.num_heads % config.num_kv_heads != 0)
    reader.problem("num_attention_heads = ", config.num_heads, " is not a multiple of num_key_value_heads = ", config.num_kv_heads);
  if (!reader.is_null("head_dim")) config.head_size = reader.integer("head_dim", 2, kMostHeads);
  else if (config.hidden_size % config.num_heads == 0) config.head_size = config.hidden_size / config.num_heads;
  else reader.problem("hidden_size = ", config.hidden_size, " is not a multiple of num_attention_heads = ", config.num_heads, ", and head_dim is absent");
}

bool read_is_gelu_tanh(ConfigReader& reader) {
  const std::string key = reader.knows("hidden_activation") ? "hidden_activation" : "hidden_act";
  const Json& name = reader[key];
  if (name == "silu" || name == "swish") return false;
  if (name != "gelu_pytorch_tanh") reader.problem(key, " = ", shown(name), " is not implemented (silu and gelu_pytorch_tanh are)");
  return true;
}

// Which layers slide where config.json does not list them.
bool slides(ConfigReader& reader, const ModelConfig& config, std::int64_t layer, std::int64_t from, std::int64_t pattern) {
  switch (config.family->sliding_layers) {
    case SlidingLayers::kAll: return true;
    case SlidingLayers::kFromLayer: return layer >= from;
    case SlidingLayers::kPattern: return (layer + 1) % pattern != 0;
    case SlidingLayers::kWithoutRope: return !config.layers[static_cast<std::size_t>(layer)].use_rope;
  }
  reader.problem("bug: no rule for sliding layers");
  return false;
}

void read_layers(ConfigReader& reader, ModelConfig& config) {
  config.layers.resize(static_cast<std::size_t>(config.num_layers));
  if (reader.knows("no_rope_layers")) {
    const Json& listed = reader["no_rope_layers"];
    const std::int64_t interval = listed.is_null() ? reader.integer("no_rope_layer_interval", 1, kLongest) : 1;
    if (!listed.is_null() && (!listed.is_array() || listed.size() < config.layers.size()))
      reader.problem("no_rope_layers must list all ", config.num_layers, " layers, got ", shown(listed));
    else for (std::size_t layer = 0; layer < config.layers.size(); ++layer) {
      if (listed.is_null()) config.layers[layer].use_rope = (static_cast<std::int64_t>(layer) + 1) % interval != 0;
      else if (listed[layer] == 0 || listed[layer] == 1) config.layers[layer].use_rope = listed[layer] == 1;
      else reader.problem("no_rope_layers[", layer, "] must be 0 or 1, got ", shown(listed[layer]));
    }
  }

  const bool may_slide = reader.knows("sliding_window") && (!reader.knows("use_sliding_window") || reader.boolean("use_sliding_window"));
  const std::int64_t window = may_slide && !reader.is_null("sliding_window") ? reader.integer("sliding_window", 1, kLongest) : 0;
  const SlidingLayers rule = config.family->sliding_layers;
  const std::int64_t from = rule == SlidingLayers::kFromLayer ? reader.integer("max_window_layers", 0, kLongest) : 0;
  const std::int64_t pattern =
      rule == SlidingLayers::kPattern && !reader.is_null("sliding_window_pattern") ? reader.integer("sliding_window_pattern", 1, kLongest) : config.family->sliding_pattern;

  const Json& types = reader["layer_types"];
  if (!types.is_null() && (!types.is_array() || types.size() != config.layers.size())) {
    reader.problem("layer_types must list all ", config.num_layers, " layers, got ", shown(types));
    return;
  }
  for (std::size_t layer = 0; layer < config.layers.size(); ++layer) {
    LayerConfig& made = config.layers[layer];
    const bool by_rule = (window > 0 || config.family->local_rope_theta != 0) && slides(reader, config, static_cast<std::int64_t>(layer), from, pattern);
    bool sliding = by_rule;
    if (!types.is_null()) {
      const Json& type = types[layer];
      sliding = type == "sliding_attention";
      if (!sliding && type != "full_attention") reader.problem("layer_types[", layer, "] = ", shown(type), " is not implemented");
      else if (sliding != by_rule && !reader.knows("layer_types"))
        reader.problem("layer_types[", layer, "] = ", shown(type), ", but layers of ", config.family->model_type, " are all of one kind");
    }
    if (sliding && window == 0) reader.problem("layer ", layer, " is a sliding_attention layer, but no sliding window is set");
    made.window = sliding ? window : 0;
    made.local_rope = sliding && config.family->local_rope_theta != 0;
  }
}

void read_token_ids(ConfigReader& reader, ModelConfig& config) {
  config.eos_ids = read_ids(reader, "eos_token_id");
  if (const auto ids = read_ids(reader, "bos_token_id"); !ids.empty()) config.bos_id = ids.front();
  if (!reader.is_null("pad_token_id")) {
    config.pad_id = reader.integer("pad_token_id", -config.vocabulary_size, config.vocabulary_size - 1);
    if (config.pad_id < 0) config.pad_id += config.vocabulary_size;  // counted from the end, as an index of PyTorch
  }
}

[[noreturn]] void refuse(std::string_view source, const std::vector<std::string>& problems) {
  std::string all;
  for (const std::string& problem : problems) all += (all.empty() ? "" : "; ") + problem;
  fail(ErrorKind::kData, source, ": ", problems.size() == 1 ? "" : std::to_string(problems.size()) + " problems: ", all,
       Remedy{"this model, or this version of it, cannot be used; see docs for the families and switches that are implemented"});
}

}  // namespace

std::int64_t ModelConfig::num_parameters() const {
  std::int64_t total = 0;
  for (const auto& [name, shape] : expected_shapes(*this)) {
    std::int64_t count = 1;
    for (const std::int64_t size : shape) count *= size;
    total += count;
  }
  return total;
}

ModelConfig read_model_config(const Json& json, std::string_view source) {
  ModelConfig config;
  const std::string model_type = require<std::string>(json, "model_type", source);
  try {
    config.family = &find_family(model_type);
  } catch (const Error& error) {
    fail(error.kind(), source, ": ", error.what());
  }
  config.source = json;
  const Json defaults = parse_json(config.family->defaults, config.family->model_type);
  std::vector<std::string> problems;
  ConfigReader reader(json, defaults, problems);

  if (const Json& names = reader["architectures"]; !names.is_null()) {
    const std::string wanted(config.family->architecture);
    if (!names.is_array() || std::find(names.begin(), names.end(), Json(wanted)) == names.end())
      reader.problem("architectures = ", shown(names), " does not hold ", wanted);
  }
  check_switches(reader, *config.family);
  read_sizes(reader, config);
  config.norm_epsilon = reader.number("rms_norm_eps", 0, 1);
  config.tied_head = reader.boolean("tie_word_embeddings");
  const bool attention_bias = reader.knows("attention_bias") && reader.boolean("attention_bias");
  config.qkv_bias = config.family->qkv_bias || attention_bias;
  config.output_bias = attention_bias;
  config.mlp_bias = reader.knows("mlp_bias") && reader.boolean("mlp_bias");
  config.gelu_tanh = read_is_gelu_tanh(reader);
  const double scaled_by = reader.knows("query_pre_attn_scalar") ? reader.number("query_pre_attn_scalar", 1e-6) : static_cast<double>(config.head_size);
  config.attention_scale = 1 / std::sqrt(scaled_by);
  const auto soft_cap = [&](const char* key) { return config.family->soft_caps && !reader.is_null(key) ? reader.number(key, 1e-6) : 0; };
  config.attention_soft_cap = soft_cap("attn_logit_softcapping");
  config.logit_soft_cap = soft_cap("final_logit_softcapping");
  read_token_ids(reader, config);
  for (const char* key : {"attention_dropout", "resid_pdrop", "embd_pdrop"}) {
    if (!reader.knows(key) || reader.is_null(key)) continue;
    const double probability = reader.number(key, 0, 1);
    if (probability > 0) log_warning(source, ": ", key, " = ", probability, " is not applied: training runs without dropout in the base model");
  }
  if (problems.empty()) {  // what follows divides by the sizes and makes one entry a layer
    read_layers(reader, config);
    read_rope(reader, config, problems);
  }
  if (!problems.empty()) refuse(source, problems);
  return config;
}

ModelConfig read_model_config(const std::filesystem::path& model_folder) {
  const std::filesystem::path file = model_folder / "config.json", generation_file = model_folder / "generation_config.json";
  ModelConfig config = read_model_config(read_json_file(file), file.string());
  if (std::filesystem::exists(generation_file)) {
    const Json generation = read_json_file(generation_file), no_defaults = Json::object();
    if (!generation.is_object()) fail(ErrorKind::kData, generation_file.string(), ": expected a JSON object");
    std::vector<std::string> problems;
    ConfigReader reader(generation, no_defaults, problems);
    if (const auto ids = read_ids(reader, "eos_token_id"); !ids.empty()) config.eos_ids = ids;
    if (!problems.empty()) refuse(generation_file.string(), problems);
  }
  return config;
}

}  // namespace alambic::models
