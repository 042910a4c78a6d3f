// SPDX-License-Identifier: Apache-2.0
// GGUF -> Hugging Face folder: the inverse of llama.cpp's conversion/*.py for the families implemented here.
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <map>
#include <optional>
#include <set>

#include "checkpoints/gguf.h"
#include "checkpoints/gguf_names.h"
#include "checkpoints/hf_folder.h"
#include "checkpoints/licence.h"
#include "checkpoints/manifest.h"
#include "checkpoints/model_card.h"
#include "core/error.h"
#include "core/files.h"
#include "core/json.h"
#include "models/decoder.h"

namespace alambic::checkpoints {
namespace {

// Tensors that describe the rotation; they go into config.json.
constexpr const char* kRopeTensors[] = {kGgufRopeFreqs, kGgufRopeLong, kGgufRopeShort};

/// Metadata with the keys of the architecture ("llama.block_count" as "block_count") and a record of which were read.
class Metadata {
 public:
  Metadata(const Json& json, std::string source) : json_(json), source_(std::move(source)), prefix_(require<std::string>(json, "general.architecture", source_) + ".") {}

  std::string architecture() const { return prefix_.substr(0, prefix_.size() - 1); }
  const std::string& source() const { return source_; }
  const Json& json() const { return json_; }

  template <class T>
  T need(const std::string& key) {
    used_.insert(prefix_ + key);
    return require<T>(json_, prefix_ + key, source_);
  }
  template <class T>
  T get(const std::string& key, T otherwise) {
    used_.insert(prefix_ + key);
    return value_or<T>(json_, prefix_ + key, otherwise, source_);
  }
  bool has(const std::string& key) const { return json_.contains(prefix_ + key); }
  std::string text(const std::string& key) const { return value_or<std::string>(json_, key, "", source_); }

  /// Keys of the architecture that nothing has asked for: they may change the result.
  std::vector<std::string> unread() const {
    std::vector<std::string> keys;
    for (const auto& [key, value] : json_.items())
      if (key.starts_with(prefix_) && !used_.contains(key)) keys.push_back(key);
    return keys;
  }

 private:
  const Json& json_;
  std::string source_, prefix_;
  std::set<std::string> used_;
};

const GgufArchitecture& find_architecture(const Metadata& metadata) {
  std::string known, last;
  for (const GgufArchitecture& candidate : gguf_architectures()) {
    if (metadata.architecture() == candidate.gguf) return candidate;
    if (candidate.gguf != last) known += (known.empty() ? "" : ", ") + std::string(candidate.gguf);
    last = candidate.gguf;
  }
  fail(ErrorKind::kData, metadata.source(), ": general.architecture \"", metadata.architecture(), "\" is not implemented; these are: ", known);
}

std::vector<double> values_of(const GgufFile& file, const char* name) {
  const at::Tensor tensor = file.tensor(name).to(at::kFloat).contiguous();
  const float* values = tensor.const_data_ptr<float>();
  return {values, values + tensor.numel()};
}

/// Llama 3 stores no parameters of its RoPE scaling, only the divisor of each frequency. The parameters published with
/// Llama 3.1 to 3.3 are tried, and taken only if they give these very divisors.
Json llama3_scaling(const GgufFile& file, double theta, const std::string& source) {
  constexpr double kLow = 1, kHigh = 4;  // in all published models
  const std::vector<double> stored = values_of(file, "rope_freqs.weight");
  const double factor = stored.empty() ? 0 : std::round(*std::max_element(stored.begin(), stored.end()));
  for (const std::int64_t original : {8192, 4096, 16384, 32768, 2048, 65536, 131072}) {
    bool same = factor > 1;
    for (std::size_t i = 0; i < stored.size() && same; ++i) {
      const double wave_length = 2 * M_PI * std::pow(theta, static_cast<double>(2 * i) / static_cast<double>(2 * stored.size()));
      const double turns = static_cast<double>(original) / wave_length, smooth = (turns - kLow) / (kHigh - kLow);
      const double divisor = turns > kHigh ? 1 : turns < kLow ? factor : 1 / ((1 - smooth) / factor + smooth);
      same = std::abs(divisor - stored[i]) <= 1e-4 * divisor;
    }
    if (same)
      return {{"rope_type", "llama3"}, {"factor", factor}, {"low_freq_factor", kLow}, {"high_freq_factor", kHigh}, {"original_max_position_embeddings", original}};
  }
  fail(ErrorKind::kData, source, ": the frequency divisors in rope_freqs.weight are not those of a known Llama 3 RoPE scaling",
       Remedy{"use the model's safetensors folder, whose config.json holds the parameters"});
}

/// rope_scaling of config.json, or null.
Json rope_scaling(Metadata& metadata, const GgufFile& file, double theta) {
  const std::string type = metadata.get<std::string>("rope.scaling.type", "none");
  const double factor = metadata.get<double>("rope.scaling.factor", metadata.get<double>("rope.scale_linear", 1));
  const std::int64_t original = metadata.get<std::int64_t>("rope.scaling.original_context_length", 0);
  const double attention_factor = metadata.get<double>("rope.scaling.attn_factor", 0);
  metadata.get<bool>("rope.scaling.finetuned", false);  // says how it was trained, not what to compute

  if (file.contains("rope_freqs.weight")) return llama3_scaling(file, theta, metadata.source());
  if (file.contains("rope_factors_long.weight") || file.contains("rope_factors_short.weight")) {
    Json scaling{{"rope_type", "longrope"}, {"long_factor", values_of(file, "rope_factors_long.weight")}, {"short_factor", values_of(file, "rope_factors_short.weight")}};
    if (attention_factor > 0) scaling["attention_factor"] = attention_factor;
    return scaling;
  }
  if (type == "none" || (type == "linear" && factor == 1)) return nullptr;
  if (type == "linear") return {{"rope_type", "linear"}, {"factor", factor}};
  if (type == "yarn") {
    Json scaling{{"rope_type", "yarn"}, {"factor", factor}};
    if (original > 0) scaling["original_max_position_embeddings"] = original;
    if (attention_factor > 0) scaling["attention_factor"] = attention_factor;
    for (const auto& [key, name] : {std::pair{"rope.scaling.yarn_attn_factor", "attention_factor"}, std::pair{"rope.scaling.yarn_beta_fast", "beta_fast"},
                                    std::pair{"rope.scaling.yarn_beta_slow", "beta_slow"}})
      if (metadata.has(key)) scaling[name] = metadata.need<double>(key);
    return scaling;
  }
  fail(ErrorKind::kData, metadata.source(), ": ", metadata.architecture(), ".rope.scaling.type \"", type, "\" is not implemented");
}

/// The token ids that end a text: EOS first, then the end of a turn and of a message where the file names them.
std::vector<std::int64_t> end_ids(const Metadata& metadata) {
  std::vector<std::int64_t> ids;
  for (const char* key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"}) {
    const auto id = value_or<std::int64_t>(metadata.json(), key, -1, metadata.source());
    if (id >= 0 && std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
  }
  return ids;
}

constexpr std::int64_t kGemma2Window = 4096;  // llama.cpp's, where the file has none

Json make_config(Metadata& metadata, const GgufArchitecture& architecture, const GgufFile& file, at::ScalarType weights) {
  const models::Family& family = models::find_family(architecture.model_type);
  const std::string model_type(architecture.model_type);
  const bool gemma2 = model_type == "gemma2", gemma = gemma2 || model_type == "gemma3_text";
  const auto num_layers = metadata.need<std::int64_t>("block_count"), hidden = metadata.need<std::int64_t>("embedding_length");
  const auto num_heads = metadata.need<std::int64_t>("attention.head_count"), num_kv_heads = metadata.get<std::int64_t>("attention.head_count_kv", num_heads);
  if (num_layers < 1 || num_layers > 10000 || hidden < 1 || num_heads < 1 || num_kv_heads < 1)
    fail(ErrorKind::kData, metadata.source(), ": block_count ", num_layers, ", embedding_length ", hidden, ", head counts ", num_heads, " and ", num_kv_heads, " make no decoder");
  const auto rotary = metadata.get<std::int64_t>("rope.dimension_count", 0);
  const auto head_size = metadata.get<std::int64_t>("attention.key_length", model_type == "llama" && rotary > 0 ? rotary : hidden / num_heads);
  if (const auto value_size = metadata.get<std::int64_t>("attention.value_length", head_size); value_size != head_size)
    fail(ErrorKind::kData, metadata.source(), ": keys of ", head_size, " and values of ", value_size, " numbers a head are not implemented");

  // Rows of the embedding, where the file does not say; token lists are sometimes shorter.
  std::int64_t vocabulary = 0;
  for (const GgufTensor& tensor : file.tensors())
    if (tensor.name == "token_embd.weight" && tensor.shape.size() == 2) vocabulary = tensor.shape[0];
  metadata.get<std::int64_t>("vocab_size", vocabulary);

  const double theta = metadata.get<double>("rope.freq_base", family.rope_theta);
  const auto id_of = [&](const char* name) { return value_or<Json>(metadata.json(), std::string("tokenizer.ggml.") + name, nullptr, metadata.source()); };
  Json config{{"architectures", {family.architecture}},
              {"model_type", model_type},
              {"vocab_size", vocabulary},
              {"hidden_size", hidden},
              {"intermediate_size", metadata.need<std::int64_t>("feed_forward_length")},
              {"num_hidden_layers", num_layers},
              {"num_attention_heads", num_heads},
              {"num_key_value_heads", num_kv_heads},
              {gemma ? "hidden_activation" : "hidden_act", gemma ? "gelu_pytorch_tanh" : "silu"},
              {"max_position_embeddings", metadata.need<std::int64_t>("context_length")},
              {"rms_norm_eps", metadata.need<double>("attention.layer_norm_rms_epsilon")},
              {"rope_theta", theta},
              {"rope_scaling", rope_scaling(metadata, file, theta)},
              {"tie_word_embeddings", !file.contains("output.weight")},
              {"bos_token_id", id_of("bos_token_id")},
              {"eos_token_id", id_of("eos_token_id")},
              {"pad_token_id", id_of("padding_token_id")},
              {"torch_dtype", config_name_of(weights)}};
  if (head_size * num_heads != hidden || gemma || model_type == "qwen3") config["head_dim"] = head_size;
  const bool any_bias = file.contains("blk.0.attn_q.bias");
  if (parse_json(family.defaults, family.model_type).contains("attention_bias")) config["attention_bias"] = any_bias;
  if (model_type == "llama" || model_type == "smollm3") config["mlp_bias"] = file.contains("blk.0.ffn_up.bias");

  const auto window = metadata.get<std::int64_t>("attention.sliding_window", 0);
  if (gemma) {
    // Fixed in llama.cpp as well: every second or sixth layer sees everything; the 27B model alone scales by hidden size / heads.
    Json types = Json::array();
    for (std::int64_t layer = 1; layer <= num_layers; ++layer) types.push_back(layer % family.sliding_pattern == 0 ? "full_attention" : "sliding_attention");
    config["layer_types"] = types;
    config["sliding_window"] = gemma2 && window == 0 ? kGemma2Window : window;
    if (!gemma2) config["rope_local_base_freq"] = metadata.get<double>("rope.freq_base_swa", family.local_rope_theta);
    config["query_pre_attn_scalar"] = num_layers == gemma_layers_of_27b(model_type) ? hidden / num_heads : head_size;
    if (gemma2) {
      for (const auto& [key, published] : {std::pair{"attn_logit_softcapping", 50.0}, std::pair{"final_logit_softcapping", 30.0}}) config[key] = metadata.get<double>(key, published);
    } else if (metadata.get<double>("final_logit_softcapping", 0) != 0 || metadata.get<double>("attn_logit_softcapping", 0) != 0) {
      fail(ErrorKind::kData, metadata.source(), ": soft-capped logits are not implemented for gemma3");
    }
    metadata.get<Json>("attention.sliding_window_pattern", nullptr);
  } else if (model_type == "phi3") {
    config["sliding_window"] = window > 0 ? Json(window) : Json(nullptr);
    const std::int64_t original = metadata.get<std::int64_t>("rope.scaling.original_context_length", 0);
    config["original_max_position_embeddings"] = original > 0 ? Json(original) : config["max_position_embeddings"];
    if (rotary > 0 && rotary != head_size) config["partial_rotary_factor"] = static_cast<double>(rotary) / static_cast<double>(head_size);
  } else if (window > 0) {
    fail(ErrorKind::kData, metadata.source(), ": a sliding window of ", window, " tokens is not known for architecture ", metadata.architecture());
  }
  if (model_type == "smollm3") {
    constexpr std::int64_t kInterval = 4;  // fixed in llama.cpp as well
    Json rotated = Json::array();
    for (std::int64_t layer = 1; layer <= num_layers; ++layer) rotated.push_back(layer % kInterval != 0 ? 1 : 0);
    config["no_rope_layer_interval"] = kInterval;
    config["no_rope_layers"] = rotated;
  }
  if (model_type != "phi3" && rotary > 0 && rotary != head_size)
    fail(ErrorKind::kData, metadata.source(), ": ", rotary, " of ", head_size, " numbers a head are rotated, which is not known for architecture ", metadata.architecture());
  if (metadata.get<std::int64_t>("expert_count", 0) != 0) fail(ErrorKind::kData, metadata.source(), ": mixtures of experts are not implemented");
  metadata.get<std::int64_t>("expert_used_count", 0);
  metadata.get<std::string>("tensor_data_layout", "");

  if (const auto unread = metadata.unread(); !unread.empty()) {
    std::string names;
    for (const std::string& key : unread) names += (names.empty() ? "" : ", ") + key;
    fail(ErrorKind::kData, metadata.source(), ": metadata that is not understood and may change the result: ", names);
  }
  return config;
}

/// What becomes what. Error(kData) lists the tensors that are missing, misshapen or have no place.
std::vector<GgufMove> plan_moves(const models::ModelConfig& config, const GgufArchitecture& architecture, const GgufFile& file, const std::string& source) {
  std::map<std::string, const GgufTensor*> stored;
  for (const GgufTensor& tensor : file.tensors()) stored.emplace(tensor.name, &tensor);
  for (const char* name : kRopeTensors) stored.erase(name);
  const std::vector<GgufMove> moves = gguf_moves(config, architecture);
  std::vector<std::string> problems;
  const auto shape_text = [](const std::vector<std::int64_t>& shape) { return to_line(Json(shape)); };
  for (const GgufMove& move : moves) {
    const auto found = stored.find(move.gguf);
    if (found == stored.end()) problems.push_back("missing \"" + move.gguf + "\" " + shape_text(move.shape));
    else if (found->second->shape != move.shape) problems.push_back("\"" + move.gguf + "\" has shape " + shape_text(found->second->shape) + ", the metadata asks for " + shape_text(move.shape));
    if (found != stored.end()) stored.erase(found);
  }
  for (const auto& [name, tensor] : stored) problems.push_back("\"" + name + "\" " + shape_text(tensor->shape) + " has no place in a " + std::string(config.family->model_type) + " model");
  if (!problems.empty()) {
    std::string all;
    for (const std::string& problem : problems) all += (all.empty() ? "" : "; ") + problem;
    fail(ErrorKind::kData, source, ": metadata and tensors disagree in ", problems.size(), problems.size() == 1 ? " place: " : " places: ", all);
  }
  return moves;
}

bool is_plain_name(const std::string& name) {
  return !name.empty() && name.size() <= 64 && std::all_of(name.begin(), name.end(), [](unsigned char letter) { return std::isalnum(letter) || letter == '_' || letter == '-'; });
}

void write_templates(const Metadata& metadata, const fs::path& folder) {
  const std::string key = "tokenizer.chat_template", prefix = key + ".";
  for (const auto& [name, value] : metadata.json().items()) {
    if (name == key) write_file(folder / "chat_template.jinja", require<std::string>(metadata.json(), name, metadata.source()));
    if (!name.starts_with(prefix)) continue;
    const std::string which = name.substr(prefix.size());
    if (!is_plain_name(which)) fail(ErrorKind::kData, metadata.source(), ": \"", which, "\" is no name for a chat template");
    fs::create_directories(folder / "additional_chat_templates");
    write_file(folder / "additional_chat_templates" / (which + ".jinja"), require<std::string>(metadata.json(), name, metadata.source()));
  }
}

/// "https://huggingface.co/org/name" -> "org/name"; other addresses stay as they are.
std::string hub_id_of(const std::string& address) {
  const std::string host = "huggingface.co/";
  const std::size_t at = address.find(host);
  return at == std::string::npos ? address : address.substr(at + host.size());
}

CardInfo make_card(const Metadata& metadata, const GgufFile& file, const fs::path& gguf, at::ScalarType weights, const std::string& sha256) {
  CardInfo card;
  const std::string name = metadata.text("general.name");
  card.title = name.empty() ? gguf.stem().string() : name;
  card.licence = find_licence(metadata.text("general.license"));
  if (card.licence.kind == LicenceClass::kUnknown && !metadata.text("general.license.name").empty()) card.licence = find_licence(metadata.text("general.license.name"));
  card.licence_link = metadata.text("general.license.link");

  std::map<std::string, int> types;
  std::string type_list;
  for (const GgufTensor& tensor : file.tensors()) ++types[tensor.type];
  bool quantised = false;
  for (const auto& [type, count] : types) {
    type_list += (type_list.empty() ? "" : ", ") + std::to_string(count) + " x " + type;
    quantised = quantised || type.starts_with("Q");
  }
  card.summary = std::string("The weights of a GGUF file, ") + (quantised ? "de-quantised and " : "") + "written as a Hugging Face folder in " + config_name_of(weights) + ".";
  if (quantised) card.warnings.push_back("The GGUF file was quantised: these weights hold what was left after that, and not the precision of the original model.");

  const auto num_bases = value_or<std::int64_t>(metadata.json(), "general.base_model.count", 0, metadata.source());
  for (std::int64_t i = 0; i < std::min<std::int64_t>(num_bases, 16); ++i) {
    const std::string prefix = "general.base_model." + std::to_string(i) + ".";
    const std::string address = metadata.text(prefix + "repo_url"), base_name = metadata.text(prefix + "name");
    if (!address.empty() || !base_name.empty()) card.origin.emplace_back("base model named in the file", address.empty() ? base_name : address);
    if (!address.empty()) card.base_models.push_back(hub_id_of(address));
  }
  if (!card.base_models.empty()) card.base_relation = "finetune", card.base_licence = card.licence;
  if (const auto languages = metadata.json().find("general.languages"); languages != metadata.json().end() && languages->is_array())
    for (const Json& language : *languages)
      if (language.is_string()) card.languages.push_back(language.get<std::string>());

  for (const char* key : {"general.author", "general.organization", "general.basename", "general.finetune", "general.version", "general.size_label", "general.quantized_by",
                          "general.source.url", "general.source.huggingface.repository", "general.url", "general.repo_url", "general.license", "general.license.name", "general.license.link"})
    if (const auto found = metadata.json().find(key); found != metadata.json().end())
      card.origin.emplace_back(key, found->is_string() ? found->get<std::string>() : to_line(*found));
  card.origin.emplace_back("GGUF file", gguf.filename().string());
  card.origin.emplace_back("its SHA-256", sha256);
  card.origin.emplace_back("its tensors", type_list);
  card.tags.push_back("imported-from-gguf");
  return card;
}

constexpr const char* kMade = "imported from GGUF";

}  // namespace

void import_gguf(const fs::path& gguf, const fs::path& folder, at::ScalarType weights) {
  if (fs::exists(fs::symlink_status(folder))) fail(ErrorKind::kUsage, folder.string(), ": exists already and is never overwritten", Remedy{"choose another name, or remove it"});
  const GgufFile file(gguf);
  Metadata metadata(file.metadata(), gguf.string());
  if (value_or<std::int64_t>(file.metadata(), "split.count", 1, gguf.string()) > 1)
    fail(ErrorKind::kData, gguf.string(), ": is one part of a split GGUF file", Remedy{"join the parts first (llama.cpp: llama-gguf-split --merge)"});
  const GgufArchitecture& architecture = find_architecture(metadata);
  const Json config_json = make_config(metadata, architecture, file, weights);
  const models::ModelConfig config = models::read_model_config(config_json, gguf.string() + " (as config.json)");
  const std::vector<GgufMove> moves = plan_moves(config, architecture, file, gguf.string());
  const Json tokenizer = tokenizer_json_from_gguf(file.metadata(), gguf.string());
  const Json tokenizer_config = tokenizer_config_from_gguf(file.metadata(), gguf.string());

  const std::uint64_t needed = static_cast<std::uint64_t>(config.num_parameters()) * c10::elementSize(weights);
  if (const std::uint64_t free = free_bytes(folder); free < needed)
    fail(ErrorKind::kResource, folder.string(), ": the weights need ", needed, " bytes, ", free, " are free", Remedy{"free some space or choose another output folder"});
  const TemporaryFolder temporary(folder);
  std::vector<std::pair<std::string, std::vector<std::int64_t>>> names_and_shapes;
  for (const GgufMove& move : moves) names_and_shapes.emplace_back(move.published, move.shape);
  const auto written = write_weights(temporary.path(), names_and_shapes, weights, [&](std::size_t i) { return from_gguf(file.tensor(moves[i].gguf), moves[i]); });
  write_file(temporary.path() / "config.json", config_json.dump(2) + "\n");
  Json generation{{"_from_model_config", true}};
  for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"})
    if (!config_json[key].is_null()) generation[key] = config_json[key];
  if (const auto ids = end_ids(metadata); ids.size() > 1) generation["eos_token_id"] = ids;
  write_file(temporary.path() / "generation_config.json", generation.dump(2) + "\n");
  write_file(temporary.path() / "tokenizer.json", to_line(tokenizer));
  write_file(temporary.path() / "tokenizer_config.json", tokenizer_config.dump(2) + "\n");
  write_templates(metadata, temporary.path());
  const std::string sha256 = sha256_of_file(gguf);
  const CardInfo card = make_card(metadata, file, gguf, weights, sha256);
  write_file(temporary.path() / "README.md", model_card(card));
  if (const std::string_view text = licence_text(card.licence.spdx); !text.empty()) write_file(temporary.path() / "LICENSE", text);
  write_manifest(temporary.path(), {{"made", kMade}, {"gguf", {{"file", gguf.filename().string()}, {"sha256", sha256}}}, {"weights", config_name_of(weights)}}, written);
  commit_folder(temporary.path(), folder);
}

models::Decoder load_gguf(const fs::path& path) {
  const GgufFile file(path);
  Metadata metadata(file.metadata(), path.string());
  const GgufArchitecture& architecture = find_architecture(metadata);
  models::Decoder decoder = models::make_decoder(models::read_model_config(make_config(metadata, architecture, file, at::kFloat), path.string() + " (as config.json)"));
  const std::vector<GgufMove> moves = plan_moves(decoder.config, architecture, file, path.string());
  const std::vector<models::NamedTensor> tensors = decoder.tensors();
  for (std::size_t i = 0; i < moves.size(); ++i) {
    if (tensors.at(i).name != moves[i].published) fail(ErrorKind::kBug, "tensor ", i, " is ", tensors[i].name, " and not ", moves[i].published);
    *tensors[i].tensor = from_gguf(file.tensor(moves[i].gguf), moves[i]).to(at::kFloat);
  }
  if (decoder.head_tied) decoder.head.weight_OI = decoder.embedding_VD;
  return decoder;
}

bool is_complete_import(const fs::path& gguf, const fs::path& folder, at::ScalarType weights) {
  if (!fs::is_regular_file(folder / "manifest.json")) return false;
  try {
    const Json manifest = check_manifest(folder);
    return manifest.value("made", "") == kMade && manifest.value("weights", "") == config_name_of(weights) && manifest.contains("gguf") &&
           manifest["gguf"].value("sha256", "") == sha256_of_file(gguf);
  } catch (const Error&) {
    return false;  // damaged or of another maker: not what import_gguf left here
  }
}

}  // namespace alambic::checkpoints
