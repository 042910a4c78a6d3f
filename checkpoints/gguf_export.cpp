// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/gguf_export.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <optional>
#include <set>

#include "checkpoints/base_weights.h"
#include "checkpoints/gguf_mix.h"
#include "checkpoints/gguf_names.h"
#include "checkpoints/gguf_quantise.h"
#include "checkpoints/gguf_vocabulary.h"
#include "checkpoints/gguf_write.h"
#include "checkpoints/hf_folder.h"
#include "checkpoints/peft_folder.h"
#include "core/error.h"
#include "core/files.h"
#include "core/log.h"
#include "lora/adapter.h"

namespace alambic::checkpoints {
namespace {

constexpr std::uint32_t kQuantisationVersion = 2;  // of ggml's block formats

std::string joined(const std::vector<std::string>& lines) {
  std::string all;
  for (const std::string& line : lines) all += (all.empty() ? "" : "; ") + line;
  return all;
}

/// "1.5B", "135M": as llama.cpp labels sizes, two digits at least.
std::string size_label(std::int64_t parameters) {
  const auto count = static_cast<double>(parameters);
  const auto [divisor, letter] = count > 1e12 ? std::pair{1e12, 'T'} : count > 1e9 ? std::pair{1e9, 'B'} : count > 1e6 ? std::pair{1e6, 'M'} : std::pair{1e3, 'K'};
  const double scaled = count / divisor;
  char text[32];
  std::snprintf(text, sizeof text, "%.*f%c", std::nearbyint(scaled) >= 10 ? 0 : std::nearbyint(scaled) >= 1 ? 1 : 2, scaled, letter);
  return text;
}

// ---- what the model is: keys of the architecture, and what stands against it ----

struct Described {
  const GgufArchitecture* architecture = nullptr;
  GgufKeys keys;
  std::vector<std::pair<std::string, at::Tensor>> tensors;  // that describe the rotation
  std::vector<std::string> warnings;
};

class Describer {
 public:
  Describer(const models::ModelConfig& config, std::string source) : config_(config), source_(std::move(source)) {}

  Described run() {
    const std::string model_type(config_.family->model_type);
    std::string known;
    for (const GgufArchitecture& candidate : gguf_architectures()) {
      if (candidate.model_type == model_type) out_.architecture = &candidate;
      known += (known.empty() ? "" : ", ") + std::string(candidate.model_type);
    }
    if (out_.architecture == nullptr) fail(ErrorKind::kData, source_, ": llama.cpp has no architecture for the family ", model_type, "; these are exported: ", known);
    const bool gemma2 = model_type == "gemma2", gemma = gemma2 || model_type == "gemma3_text", phi = model_type == "phi3";

    whole("block_count", config_.num_layers);
    whole("context_length", config_.max_positions);
    whole("embedding_length", config_.hidden_size);
    whole("feed_forward_length", config_.intermediate_size);
    whole("attention.head_count", config_.num_heads);
    whole("attention.head_count_kv", config_.num_kv_heads);
    number("attention.layer_norm_rms_epsilon", config_.norm_epsilon);
    if (!gemma2) number("rope.freq_base", config_.rope.theta);
    else if (config_.rope.theta != config_.family->rope_theta) problem("a rope_theta other than ", config_.family->rope_theta);
    const bool own_head_size = config_.head_size * config_.num_heads != config_.hidden_size;
    if (own_head_size || gemma || (config_.source.contains("head_dim") && !config_.source["head_dim"].is_null())) {
      whole("attention.key_length", config_.head_size);
      whole("attention.value_length", config_.head_size);
    }
    if (own_head_size && (model_type == "qwen2" || phi)) problem("heads of ", config_.head_size, " times ", config_.num_heads, " that are not the hidden size ", config_.hidden_size);
    if (out_.architecture->rotated_in_pairs) {
      whole("vocab_size", config_.vocabulary_size);
      whole("rope.dimension_count", config_.rope.rotary_size);
    }
    if (phi) whole("rope.dimension_count", config_.rope.rotary_size);
    if (config_.gelu_tanh != gemma) problem("the activation ", config_.gelu_tanh ? "gelu_pytorch_tanh" : "silu");
    if ((config_.output_bias || config_.mlp_bias) && !out_.architecture->output_and_mlp_bias) problem("biases of the attention's output or of the MLP");
    scaling(phi, gemma && !gemma2);
    layers(model_type, gemma, phi);
    if (!problems_.empty())
      fail(ErrorKind::kData, source_, ": llama.cpp's ", out_.architecture->gguf, " has not: ", joined(problems_), Remedy{"this model computes something that llama.cpp would leave out, so it is not exported"});
    return std::move(out_);
  }

 private:
  std::string key(const char* name) const { return std::string(out_.architecture->gguf) + "." + name; }
  void whole(const char* name, std::int64_t value) { out_.keys.emplace_back(key(name), static_cast<std::uint32_t>(value)); }
  void number(const char* name, double value) { out_.keys.emplace_back(key(name), static_cast<float>(value)); }
  void text(const char* name, const std::string& value) { out_.keys.emplace_back(key(name), value); }
  template <class... Parts>
  void problem(const Parts&... parts) {
    std::ostringstream line;
    (line << ... << parts);
    problems_.push_back(line.str());
  }

  /// The parameters of the RoPE scaling, wherever config.json keeps them. {} where there are none.
  Json parameters(const char* layers) const {
    const auto object = [](const Json& from, const char* name) { return from.is_object() && from.contains(name) && from[name].is_object() ? from[name] : Json(Json::object()); };
    const Json older = object(config_.source, "rope_scaling");
    Json newer = object(config_.source, "rope_parameters");
    if (config_.family->local_rope_theta != 0) {
      newer = object(newer, layers);
      if (std::string_view(layers) == "full_attention") newer.update(older);
      return newer;
    }
    return older.empty() ? newer : older;
  }
  static std::string type_of(const Json& scaling) {
    const auto named = [&](const char* name) { return scaling.contains(name) && scaling[name].is_string() ? scaling[name].get<std::string>() : std::string(); };
    const std::string type = named("rope_type").empty() ? named("type") : named("rope_type");
    return type.empty() ? "default" : type;
  }
  double value_of(const Json& scaling, const char* name, double otherwise) const { return value_or<double>(scaling, name, otherwise, source_); }

  void scaling(bool phi, bool gemma) {
    const Json scaling = parameters("full_attention");
    std::string type = type_of(scaling);
    if (phi) {
      whole("rope.scaling.original_context_length", config_.rope.long_from > 0 ? config_.rope.long_from : value_or<std::int64_t>(config_.source, "original_max_position_embeddings", config_.max_positions, source_));
      if (config_.rope.long_from == 0) return;
      number("rope.scaling.attn_factor", config_.rope.attention_factor);
      factors(kGgufRopeLong, scaling, "long_factor");
      factors(kGgufRopeShort, scaling, "short_factor");
    } else if (type == "linear") {
      text("rope.scaling.type", "linear");
      number("rope.scaling.factor", value_of(scaling, "factor", 1));
    } else if (type == "yarn") {
      text("rope.scaling.type", "yarn");
      number("rope.scaling.factor", value_of(scaling, "factor", 1));
      // The key beside the scaling is the stronger one, as when it is read.
      const std::int64_t beside = value_or<std::int64_t>(config_.source, "original_max_position_embeddings", 0, source_);
      whole("rope.scaling.original_context_length", beside > 0 ? beside : value_or<std::int64_t>(scaling, "original_max_position_embeddings", config_.max_positions, source_));
      for (const auto& [name, gguf] : {std::pair{"attention_factor", "rope.scaling.yarn_attn_factor"}, std::pair{"beta_fast", "rope.scaling.yarn_beta_fast"}, std::pair{"beta_slow", "rope.scaling.yarn_beta_slow"}})
        if (const double value = value_of(scaling, name, 0); value != 0) number(gguf, value);
      for (const char* other : {"mscale", "mscale_all_dim"})
        if (value_of(scaling, other, 0) != 0) problem("rope_scaling.", other);
      if (!value_or<bool>(scaling, "truncate", true, source_)) problem("rope_scaling.truncate = false");
    } else if (type == "llama3" && out_.architecture->llama3_scaling) {
      llama3(scaling);
    } else if (type != "default") {
      problem("RoPE scaling of type ", type);
    }
    if (gemma) {
      number("rope.freq_base_swa", config_.local_rope.theta);
      if (const std::string local = type_of(parameters("sliding_attention")); local != "default") problem("RoPE scaling of type ", local, " in sliding layers");
    }
  }

  void factors(const char* tensor, const Json& scaling, const char* name) {
    std::vector<float> values;
    for (const Json& value : require<Json>(scaling, name, source_)) values.push_back(value.get<float>());
    out_.tensors.emplace_back(tensor, at::tensor(values));
  }

  /// Llama 3's scaling goes in as a divisor for each frequency, in the converter's f32 steps.
  void llama3(const Json& scaling) {
    const double factor = value_of(scaling, "factor", 8), low = value_of(scaling, "low_freq_factor", 1), high = value_of(scaling, "high_freq_factor", 4);
    const std::int64_t beside = value_or<std::int64_t>(config_.source, "original_max_position_embeddings", 0, source_);
    const double original = beside > 0 ? static_cast<double>(beside) : value_of(scaling, "original_max_position_embeddings", static_cast<double>(config_.max_positions));
    const at::Tensor frequencies = at::reciprocal(at::pow(config_.rope.theta, at::arange(0, config_.head_size, 2, at::kFloat) / config_.head_size));
    std::vector<float> divisors;
    for (std::int64_t i = 0; i < frequencies.numel(); ++i) {
      const float wave_length = static_cast<float>(2 * M_PI) / frequencies.const_data_ptr<float>()[i];
      const float smooth = (static_cast<float>(original) / wave_length - static_cast<float>(low)) / static_cast<float>(high - low);
      if (wave_length < original / high) divisors.push_back(1);
      else if (wave_length > original / low) divisors.push_back(static_cast<float>(factor));
      else divisors.push_back(1 / ((1 - smooth) / static_cast<float>(factor) + smooth));
    }
    out_.tensors.emplace_back(kGgufRopeFreqs, at::tensor(divisors));
  }

  void layers(const std::string& model_type, bool gemma, bool phi) {
    std::int64_t window = 0;
    for (std::size_t i = 0; i < config_.layers.size(); ++i) {
      const models::LayerConfig& layer = config_.layers[i];
      const auto number_of = static_cast<std::int64_t>(i) + 1;
      window = std::max(window, layer.window);
      const std::int64_t pattern = config_.family->sliding_pattern;
      if (gemma && (layer.window > 0) != (number_of % pattern != 0)) return problem("layer ", i, ": every ", pattern == 2 ? "second" : "sixth", " layer sees everything, the others slide");
      if (model_type == "smollm3" && layer.use_rope != (number_of % 4 != 0)) return problem("layer ", i, ": every fourth layer is without positions, the others are rotated");
      if (model_type != "smollm3" && !layer.use_rope) return problem("layer ", i, ": layers without positions");
    }
    if (gemma) {
      whole("attention.sliding_window", window);
      const double scaled_by = static_cast<double>(config_.num_layers == gemma_layers_of_27b(model_type) ? config_.hidden_size / config_.num_heads : config_.head_size);
      if (std::abs(config_.attention_scale * std::sqrt(scaled_by) - 1) > 1e-6) problem("query_pre_attn_scalar other than ", scaled_by);
      if (model_type == "gemma2") {
        number("attn_logit_softcapping", config_.attention_soft_cap);
        number("final_logit_softcapping", config_.logit_soft_cap);
        if (config_.attention_soft_cap == 0 || config_.logit_soft_cap == 0) problem("Gemma 2 without soft caps");
      }
      return;
    }
    // Zero tells Phi-4 from the Phi-3 that llama.cpp knows by heart.
    if (phi) whole("attention.sliding_window", window);
    if (window > 0 && window < config_.max_positions)
      out_.warnings.push_back("llama.cpp attends to all tokens, this model to the last " + std::to_string(window) + ": the two agree on texts up to that length");
  }

  const models::ModelConfig& config_;
  std::string source_;
  Described out_;
  std::vector<std::string> problems_;
};

// ---- where it came from ----

std::string name_of_folder(const fs::path& folder) {
  const fs::path whole = fs::absolute(folder).lexically_normal();
  return (whole.has_filename() ? whole : whole.parent_path()).filename().string();
}

struct Origin {
  GgufKeys keys;  // general.*
  CardInfo card;
};

Origin origin_of(const GgufExportConfig& config, const fs::path& folder, const GgufArchitecture& architecture, const char* type, std::int64_t parameters) {
  Origin origin;
  CardInfo& card = origin.card;
  const fs::path readme = file_of_folder(folder, "README.md");
  const std::string front = readme.empty() ? "" : read_file(readme, 16 << 20);
  card.title = config.name.empty() ? name_of_folder(folder) : config.name;
  card.licence = card.base_licence = licence_of_model(folder);
  if (const auto link = front_matter(front, "license_link"); !link.empty()) card.licence_link = link[0];
  card.base_models = config.base_name.empty() ? front_matter(front, "base_model") : std::vector<std::string>{config.base_name};
  if (!card.base_models.empty()) card.base_relation = config.base_name.empty() ? "finetune" : "quantized";
  card.languages = front_matter(front, "language");
  card.library_name = "gguf";
  card.tags = {"gguf", "llama.cpp"};

  GgufKeys& keys = origin.keys;
  keys.emplace_back("general.architecture", std::string(architecture.gguf));
  keys.emplace_back("general.type", std::string(type));
  keys.emplace_back("general.name", card.title);
  keys.emplace_back("general.size_label", size_label(parameters));
  const Licence& licence = card.licence;
  if (licence.kind != LicenceClass::kUnknown || !licence.given.empty()) {
    keys.emplace_back("general.license", licence.kind == LicenceClass::kUnknown ? std::string("other") : licence.hub_id);
    if (licence.kind == LicenceClass::kUnknown || licence.hub_id == "other") keys.emplace_back("general.license.name", licence.spdx.empty() ? licence.given : licence.spdx);
    if (!card.licence_link.empty()) keys.emplace_back("general.license.link", card.licence_link);
  }
  if (!card.base_models.empty()) {
    keys.emplace_back("general.base_model.count", static_cast<std::uint32_t>(card.base_models.size()));
    for (std::size_t i = 0; i < card.base_models.size(); ++i) {
      const std::string& id = card.base_models[i];
      const std::string prefix = "general.base_model." + std::to_string(i) + ".";
      const std::size_t slash = id.find('/');
      keys.emplace_back(prefix + "name", slash == std::string::npos ? id : id.substr(slash + 1));
      if (slash == std::string::npos || id.find('/', slash + 1) != std::string::npos) continue;
      keys.emplace_back(prefix + "organization", id.substr(0, slash));
      keys.emplace_back(prefix + "repo_url", "https://huggingface.co/" + id);
    }
  }
  if (const auto tags = front_matter(front, "tags"); !tags.empty()) keys.emplace_back("general.tags", tags);
  if (!card.languages.empty()) keys.emplace_back("general.languages", card.languages);
  return origin;
}

std::string figure(double value, const char* format) {
  char text[64];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

void finish(GgufExportReport& report, const fs::path& folder, const std::vector<GgufTensorToWrite>& tensors) {
  for (const GgufTensorToWrite& tensor : tensors) ++report.tensors_of_type[std::string(tensor.type->name)];
  report.num_bytes = fs::file_size(report.output);
  std::string types;
  for (const auto& [type, count] : report.tensors_of_type) types += (types.empty() ? "" : ", ") + std::to_string(count) + " x " + type;
  CardInfo& card = report.card;
  card.warnings.insert(card.warnings.end(), report.warnings.begin(), report.warnings.end());
  const std::vector<std::string> duties = licence_warnings(card);
  report.warnings.insert(report.warnings.begin(), duties.begin(), duties.end());
  card.origin.emplace_back("made from the folder", name_of_folder(folder));
  card.origin.emplace_back("file", report.output.filename().string());
  card.origin.emplace_back("its SHA-256", report.sha256);
  card.origin.emplace_back("size", figure(static_cast<double>(report.num_bytes) / 1e6, "%.1f MB") + ", " + figure(report.bits_per_weight(), "%.2f bits a weight"));
  card.origin.emplace_back("its tensors", types);
}

}  // namespace

double GgufExportReport::bits_per_weight() const { return num_parameters > 0 ? 8 * static_cast<double>(num_bytes) / static_cast<double>(num_parameters) : 0; }

Json GgufExportReport::json() const {
  return {{"output", output.string()},   {"type", type},         {"architecture", architecture},          {"parameters", num_parameters},
          {"bytes", num_bytes},          {"bits_per_weight", bits_per_weight()}, {"tensors", tensors_of_type}, {"weighted_tensors", num_weighted},
          {"sha256", sha256},            {"seconds", seconds},   {"warnings", warnings}};
}

GgufExportReport export_gguf(const GgufExportConfig& config) {
  const GgufMix& mix = find_gguf_mix(config.type);
  if (fs::exists(fs::symlink_status(config.output))) fail(ErrorKind::kUsage, config.output.string(), ": exists already and is never overwritten", Remedy{"choose another name, or remove it"});
  const auto start = std::chrono::steady_clock::now();
  const BaseWeights base(config.folder, {});
  const models::ModelConfig& model = base.config();
  Described described = Describer(model, (config.folder / "config.json").string()).run();
  const std::vector<GgufMove> moves = gguf_moves(model, *described.architecture);
  const std::vector<const GgufType*> types = gguf_types_of(mix, model, moves, config.importance != nullptr);

  GgufExportReport report;
  report.output = config.output;
  report.type = config.type;
  report.architecture = described.architecture->gguf;
  report.num_parameters = model.num_parameters();
  report.warnings = described.warnings;
  Origin origin = origin_of(config, config.folder, *described.architecture, "model", report.num_parameters);
  GgufKeys keys = std::move(origin.keys);
  keys.insert(keys.end(), described.keys.begin(), described.keys.end());
  keys.emplace_back("general.file_type", mix.file_type);
  keys.emplace_back("general.quantization_version", kQuantisationVersion);
  GgufVocabulary vocabulary = gguf_vocabulary(config.folder, model);
  report.warnings.insert(report.warnings.end(), vocabulary.warnings.begin(), vocabulary.warnings.end());
  keys.insert(keys.end(), std::make_move_iterator(vocabulary.keys.begin()), std::make_move_iterator(vocabulary.keys.end()));

  // Each importance must have its tensor: a matrix measured on another model would be applied in part, or not at all.
  std::vector<at::Tensor> importances(moves.size());
  if (config.importance != nullptr) {
    std::set<std::string> names;
    for (std::size_t i = 0; i < moves.size(); ++i) {
      names.insert(moves[i].gguf);
      const auto entry = config.importance->entries.find(moves[i].gguf);
      if (entry == config.importance->entries.end() || moves[i].shape.size() != 2) continue;
      if (entry->second.squares_I.numel() != moves[i].shape.back())
        fail(ErrorKind::kData, "the importance matrix has ", entry->second.squares_I.numel(), " columns for \"", moves[i].gguf, "\", the model ", moves[i].shape.back(), Remedy{"measure it on this model"});
      importances[i] = entry->second.mean_I();
      const bool used = types[i]->block_size > 1 && types[i]->name != "Q8_0";
      report.num_weighted += used;
    }
    for (const auto& [name, entry] : config.importance->entries)
      if (!names.contains(name)) fail(ErrorKind::kData, "the importance matrix has an entry \"", name, "\", and the model no such tensor", Remedy{"measure it on this model"});
    keys.emplace_back("quantize.imatrix.entries_count", static_cast<std::int32_t>(config.importance->entries.size()));
    if (!config.importance->datasets.empty()) keys.emplace_back("quantize.imatrix.dataset", joined(config.importance->datasets));
  }

  std::vector<GgufTensorToWrite> tensors;
  for (const auto& [name, tensor] : described.tensors) tensors.push_back({name, find_gguf_type(0), tensor.sizes().vec()});
  const std::size_t first = tensors.size();
  for (std::size_t i = 0; i < moves.size(); ++i) tensors.push_back({moves[i].gguf, types[i], moves[i].shape});
  report.sha256 = write_gguf(config.output, keys, tensors, [&](std::size_t i, std::byte* out) {
    if (i < first) return quantise(*tensors[i].type, described.tensors[i].second, {}, tensors[i].name, out);
    const GgufMove& move = moves[i - first];
    quantise(*tensors[i].type, to_gguf(base.tensor(move.published), move), importances[i - first], config.folder.string() + ": tensor \"" + move.published + "\"", out);
    if (!base.is_quantized(move.published)) base.tensors().release(move.published);
  });
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();

  report.card = std::move(origin.card);
  report.card.summary = "A GGUF file of type " + config.type + " for llama.cpp and the programs built on it.";
  if (config.importance != nullptr)
    report.card.origin.emplace_back("importance matrix", std::to_string(report.num_weighted) + " tensors weighed; measured on " + (config.importance->datasets.empty() ? "unnamed text" : joined(config.importance->datasets)));
  finish(report, config.folder, tensors);
  return report;
}

GgufExportReport export_gguf_adapter(const fs::path& base, const fs::path& adapter, const GgufExportConfig& config) {
  const GgufMix& mix = find_gguf_mix(config.type);
  if (mix.name != "f32" && mix.name != "f16" && mix.name != "bf16")
    fail(ErrorKind::kUsage, "type ", config.type, ": an adapter is written as f32, f16 or bf16; llama.cpp adds it to a base of any type");
  const auto start = std::chrono::steady_clock::now();
  const lora::BaseQuantization quantization = adapter_quantization(adapter);
  models::Decoder decoder = load_decoder(base, at::kFloat, quantization);
  const Described described = Describer(decoder.config, (base / "config.json").string()).run();
  std::map<std::string, GgufMove> moves;
  for (GgufMove& move : gguf_moves(decoder.config, *described.architecture)) moves.emplace(move.published, std::move(move));
  const lora::LoraConfig trained = load_adapter(decoder, adapter, base_hash(base));

  std::vector<std::string> problems;
  if (trained.dora) problems.push_back("DoRA's magnitudes");
  for (const models::NamedTensor& tensor : decoder.tensors())
    if (tensor.tensor->requires_grad()) problems.push_back(tensor.name + ", which is trained whole");
  if (decoder.token_rows_ND.defined() || decoder.head.token_rows_ND.defined()) problems.push_back("rows of single tokens");
  if (decoder.head.adapter && decoder.head_tied) problems.push_back("an adapter on a head that is the embedding");
  if (!problems.empty())
    fail(ErrorKind::kUsage, adapter.string(), ": a GGUF LoRA cannot hold ", joined(problems), Remedy{"merge it into the base (alambic merge) and export the merged folder"});

  GgufExportReport report;
  report.output = config.output;
  report.type = config.type;
  report.architecture = described.architecture->gguf;
  std::vector<GgufTensorToWrite> tensors;
  std::vector<at::Tensor> values;
  const auto alpha = static_cast<float>(trained.alpha);
  const GgufType* type = nullptr;
  for (const GgufType& candidate : gguf_types())
    if (candidate.name == mix.type) type = &candidate;
  for (const models::NamedLinear& named : decoder.linears()) {
    if (!named.linear->adapter) continue;
    const models::Adapter& one = *named.linear->adapter;
    const GgufMove& move = moves.at(named.path + ".weight");
    const auto rank = static_cast<double>(one.a_RI.size(0));
    // llama.cpp scales by alpha / rank; what the adapter's own scale (rsLoRA, alpha_pattern) differs by goes into B.
    const double extra = one.scale / (static_cast<double>(alpha) / rank);
    at::Tensor b_OR = to_gguf(one.b_OR.detach(), move);
    if (std::abs(extra - 1) > 1e-12) b_OR = b_OR * extra;
    tensors.push_back({move.gguf + ".lora_a", type, one.a_RI.sizes().vec()});
    values.push_back(one.a_RI.detach());
    tensors.push_back({move.gguf + ".lora_b", type, b_OR.sizes().vec()});
    values.push_back(b_OR);
    report.num_parameters += one.a_RI.numel() + b_OR.numel();
  }
  Origin origin = origin_of(config, base, *described.architecture, "adapter", report.num_parameters);
  GgufKeys keys = std::move(origin.keys);
  keys.emplace_back("adapter.type", std::string("lora"));
  keys.emplace_back("adapter.lora.alpha", alpha);
  keys.emplace_back("general.file_type", mix.file_type);
  keys.emplace_back("general.quantization_version", kQuantisationVersion);
  report.sha256 = write_gguf(config.output, keys, tensors, [&](std::size_t i, std::byte* out) { quantise(*tensors[i].type, values[i], {}, adapter.string() + ": " + tensors[i].name, out); });
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  report.card = std::move(origin.card);
  report.card.title = config.name.empty() ? name_of_folder(adapter) : config.name;
  report.card.summary = "A LoRA adapter as GGUF: llama.cpp adds it to the GGUF of its base (--lora).";
  if (report.card.base_models.empty()) report.card.base_models = {name_of_folder(base)};
  report.card.base_relation = "adapter";
  finish(report, adapter, tensors);
  return report;
}

fs::path export_card_path(const fs::path& output) {
  fs::path card = (output.has_parent_path() ? output.parent_path() : fs::path(".")) / "README.md";
  if (fs::exists(fs::symlink_status(card))) card = fs::path(output).replace_extension(".md");
  if (fs::exists(fs::symlink_status(card)))
    fail(ErrorKind::kUsage, card.string(), ": exists already, and so does README.md; the card is never written over another", Remedy{"remove one of them, or choose another name for the GGUF file"});
  return card;
}

fs::path write_export_card(const GgufExportReport& report, const fs::path& folder) {
  const fs::path card = export_card_path(report.output), beside = card.parent_path();
  write_file(card, model_card(report.card));
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    static constexpr std::string_view kTexts[] = {"LICENSE", "LICENCE", "COPYING", "NOTICE", "USE_POLICY"};
    const bool text = std::any_of(std::begin(kTexts), std::end(kTexts), [&](std::string_view start) { return name.starts_with(start); });
    if (text && !entry.is_directory() && !fs::exists(fs::symlink_status(beside / name))) write_file(beside / name, read_file(file_of_folder(folder, name)));
  }
  return card;
}

}  // namespace alambic::checkpoints
