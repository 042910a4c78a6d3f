// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/peft_folder.h"

#include <ATen/ops/equal.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <sstream>

#include "checkpoints/hf_folder.h"
#include "checkpoints/safetensors.h"
#include "core/error.h"
#include "core/files.h"
#include "core/json.h"
#include "core/log.h"
#include "lora/initialise.h"
#include "lora/stored_weight.h"

namespace alambic::checkpoints {
namespace {

constexpr const char* kConfigFile = "adapter_config.json";
constexpr const char* kWeightsFile = "adapter_model.safetensors";

enum class Use { kRead, kIgnored, kDefaultOnly };
struct PeftField {
  std::string_view name;
  Use use;
  std::string_view only = "";  // kDefaultOnly: the value that is accepted, as JSON; null is always accepted
};

// Every field of peft 0.21.2's LoraConfig, and what is done with it here. kIgnored: it tells how the adapter came about or is
// used elsewhere, and nothing of what it computes.
constexpr PeftField kFields[] = {
    {"r", Use::kRead},
    {"lora_alpha", Use::kRead},
    {"lora_dropout", Use::kRead},
    {"target_modules", Use::kRead},
    {"exclude_modules", Use::kRead},
    {"rank_pattern", Use::kRead},
    {"alpha_pattern", Use::kRead},
    {"use_rslora", Use::kRead},
    {"use_dora", Use::kRead},
    {"modules_to_save", Use::kRead},
    {"ensure_weight_tying", Use::kRead},
    {"init_lora_weights", Use::kRead},
    {"peft_type", Use::kRead},
    {"task_type", Use::kRead},
    {"auto_mapping", Use::kIgnored},
    {"base_model_name_or_path", Use::kIgnored},
    {"inference_mode", Use::kIgnored},
    {"peft_version", Use::kIgnored},
    {"revision", Use::kIgnored},
    {"runtime_config", Use::kIgnored},  // PEFT ignores it too when it stands in a file
    {"alora_invocation_tokens", Use::kDefaultOnly},
    {"arrow_config", Use::kDefaultOnly},
    {"bias", Use::kDefaultOnly, "\"none\""},
    {"corda_config", Use::kDefaultOnly},
    {"eva_config", Use::kDefaultOnly},
    {"fan_in_fan_out", Use::kDefaultOnly, "false"},
    {"kasa_config", Use::kDefaultOnly},
    {"layer_replication", Use::kDefaultOnly},
    {"layers_pattern", Use::kDefaultOnly},
    {"layers_to_transform", Use::kDefaultOnly},
    {"loftq_config", Use::kDefaultOnly},
    {"lora_bias", Use::kDefaultOnly, "false"},
    {"lora_ga_config", Use::kDefaultOnly},
    {"megatron_config", Use::kDefaultOnly},
    {"megatron_core", Use::kDefaultOnly, "\"megatron.core\""},
    {"monteclora_config", Use::kDefaultOnly},
    {"qalora_group_size", Use::kDefaultOnly, "16"},
    {"target_parameters", Use::kDefaultOnly},
    {"trainable_token_indices", Use::kRead},
    {"use_bdlora", Use::kDefaultOnly},
    {"use_qalora", Use::kDefaultOnly, "false"},
    {"velora_config", Use::kDefaultOnly},
};

/// Null, [], {} and "" say "not set" where the default is null.
bool is_default(const PeftField& field, const Json& value) {
  if (value.is_null()) return true;
  if (field.only.empty()) return (value.is_array() || value.is_object() || value.is_string()) && value.empty();
  return to_line(value) == field.only;
}

std::string join(const std::vector<std::string>& lines) {
  std::string text;
  for (const std::string& line : lines) text += (text.empty() ? "" : "\n") + line;
  return text;
}

/// A JSON list of strings, or one string, which PEFT reads as a regular expression.
std::vector<std::string> module_names(const Json& value, bool may_be_regex) {
  if (value.is_null()) return {};
  if (value.is_string() && may_be_regex) {
    std::string text = value.get<std::string>(), lower = text;
    std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    if (lower == "all-linear") return {"all-linear"};
    return {"regex:" + text};
  }
  if (!value.is_array()) fail(ErrorKind::kData, "must be a list of module names", may_be_regex ? " or a string" : "", ", is ", to_line(value));
  std::vector<std::string> names;
  for (const Json& name : value) {
    if (!name.is_string()) fail(ErrorKind::kData, "must be a list of module names, has ", to_line(name));
    names.push_back(name.get<std::string>());
    // Words that mean something else in our own config: PEFT would take them for module names, which no model has.
    if (names.back() == "all-linear" || names.back().starts_with("regex:")) fail(ErrorKind::kData, "\"", names.back(), "\" is no module name");
  }
  return names;
}

/// The patterns in sorted order. PEFT takes the first that matches in the file's order, and itself writes them sorted.
template <class Value>
std::map<std::string, Value> pattern_map(const Json& value, std::string_view source) {
  std::map<std::string, Value> patterns;
  if (value.is_null()) return patterns;
  if (!value.is_object()) fail(ErrorKind::kData, "must be an object, is ", to_line(value));
  std::string last;
  for (const auto& [key, unused] : value.items()) {
    if (key < last) fail(ErrorKind::kData, "\"", key, "\" stands after \"", last, "\"; PEFT writes the patterns sorted, and where two match a module their order decides");
    patterns[key] = require<Value>(value, key, source);
    last = key;
  }
  return patterns;
}

/// A list of ids means the embedding's rows; an object may name rows of the head too, which must be the same.
void read_token_rows(const Json& value, lora::LoraConfig& config) {
  const auto ids_of = [](const Json& list) {
    if (!list.is_array()) fail(ErrorKind::kData, "must be a list of token ids, or an object of such lists, has ", to_line(list).substr(0, 80));
    std::vector<std::string> ids;
    for (const Json& id : list) {
      if (!id.is_number_integer() || id < 0) fail(ErrorKind::kData, "must be a list of token ids, has ", to_line(id).substr(0, 80));
      ids.push_back(to_line(id));
    }
    return ids;
  };
  if (value.is_null()) return;
  if (!value.is_object()) {
    config.trainable_tokens = ids_of(value);
    return;
  }
  for (const auto& [module, list] : value.items()) {
    const bool head = module == "lm_head";
    if (!head && module != "embed_tokens" && module != "model.embed_tokens") fail(ErrorKind::kData, "rows of \"", module, "\" are not implemented; only embed_tokens and lm_head are");
    if (head) config.trainable_tokens_head = true;
    else config.trainable_tokens = ids_of(list);
  }
  if (config.trainable_tokens.empty()) fail(ErrorKind::kData, to_line(value).substr(0, 80), ": rows of the head alone are not implemented");
  if (config.trainable_tokens_head && ids_of(value["lm_head"]) != config.trainable_tokens)
    fail(ErrorKind::kData, to_line(value).substr(0, 80), ": other rows of the head than of the embedding are not implemented");
}

std::string describe(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

Json number(double value) {
  if (value == std::floor(value) && std::abs(value) < 1e15) return static_cast<std::int64_t>(value);
  return value;
}

/// The reverse of module_names; sorted as PEFT's own sets come out in no order.
Json module_list(std::vector<std::string> names) {
  if (names.size() == 1 && names[0].starts_with("regex:")) return names[0].substr(6);
  std::sort(names.begin(), names.end());
  return names;
}

/// The head's key where it is tied to a trained embedding, else "".
std::string tied_head_key(models::Decoder& decoder) {
  if (!decoder.head_tied || !decoder.embedding_VD.requires_grad()) return "";
  return std::string(lora::kPeftPrefix) + decoder.linears().back().path + ".weight";
}

/// The reverse of read_token_rows.
Json token_rows_of(const models::Decoder& decoder) {
  if (decoder.head_tied || !decoder.head.token_rows_ND.defined()) return decoder.token_row_ids;
  return {{"embed_tokens", decoder.token_row_ids}, {"lm_head", decoder.token_row_ids}};
}

std::string card(const lora::LoraConfig& config, const std::string& init, const std::string& base_name, const lora::BaseQuantization& quantization) {
  std::ostringstream text;
  // A path of this machine says nothing to others: only its last part is named.
  const std::string name = base_name.find('/') == std::string::npos || !std::filesystem::path(base_name).is_absolute()
                               ? base_name
                               : std::filesystem::path(base_name).filename().string();
  text << "---\nlibrary_name: peft\npipeline_tag: text-generation\n";
  if (!name.empty()) text << "base_model: " << Json(name).dump() << "\n";
  text << "tags:\n- lora\n- alambic\n---\n\n# Adapter" << (name.empty() ? "" : " for " + name) << "\n\n"
       << (config.dora ? "DoRA" : config.rslora ? "rank-stabilised LoRA" : "LoRA") << " of rank " << config.rank << ", alpha " << config.alpha
       << (init == "kaiming" ? "" : ", started as " + init) << ", in PEFT's format. Its licence follows from the base model's and the training data's.\n\n";
  if (quantization.is_on())
    text << "It was trained on the base quantised as " << lora::name_of(quantization) << (quantization.format == "nf4" ? " (blocks of 64, as bitsandbytes does it)" : "")
         << "; on the dense base it fits less well. `alambic merge` takes this into account.\n\n";
  text
       << "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
       << "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), ADAPTER)\n```\n";
  return text.str();
}

}  // namespace

lora::LoraConfig read_adapter_config(const std::filesystem::path& folder) {
  const std::string source = (folder / kConfigFile).string();
  const Json json = read_json_file(folder / kConfigFile, 16ull << 20);
  if (!json.is_object()) fail(ErrorKind::kData, source, ": must hold a JSON object");
  lora::LoraConfig config;
  std::vector<std::string> problems;
  const auto read = [&](const char* key, const auto& reader) {
    const auto found = json.find(key);
    if (found == json.end()) return;
    try {
      reader(*found);
    } catch (const Error& error) {
      const std::string said = error.what();
      problems.push_back(said.starts_with(source) ? said : source + ": " + key + ": " + said);
    }
  };
  const auto flag = [&](const char* key, bool& value) { read(key, [&](const Json& found) { value = !found.is_null() && require<bool>(json, key, source); }); };
  const auto require_one_of = [&](const char* key, const std::vector<Json>& accepted) {
    read(key, [&](const Json& found) {
      if (std::find(accepted.begin(), accepted.end(), found) == accepted.end()) fail(ErrorKind::kData, to_line(found), " is not implemented");
    });
  };

  for (const auto& [key, value] : json.items()) {
    const auto* field = std::find_if(std::begin(kFields), std::end(kFields), [&](const PeftField& known) { return known.name == key; });
    // A null says nothing, so a field that a later PEFT adds and leaves unset does no harm.
    if (field == std::end(kFields)) {
      if (!value.is_null()) problems.push_back(source + ": " + key + ": unknown field (value " + to_line(value).substr(0, 80) + ")");
    } else if (field->use == Use::kDefaultOnly && !is_default(*field, value)) {
      problems.push_back(source + ": " + key + ": " + to_line(value).substr(0, 80) + " is not implemented; only " +
                         (field->only.empty() ? "null" : std::string(field->only)) + " is");
    }
  }
  if (!json.contains("peft_type")) problems.push_back(source + ": peft_type: missing; is this an adapter's config?");
  require_one_of("peft_type", {"LORA"});
  require_one_of("task_type", {"CAUSAL_LM", nullptr});
  read("init_lora_weights", [&](const Json& found) {
    if (found == false) config.init = "false";
    else if (found == "gaussian" || found == "pissa" || found == "olora") config.init = found.get<std::string>();
    else if (found.is_string() && found.get<std::string>().starts_with("pissa_niter_"))
      fail(ErrorKind::kData, to_line(found), ": this start changed the base by a random draw that the folder does not hold; save it with PEFT's path_initial_model_for_weight_conversion");
    // Other ways (loftq, corda, eva ...) also change the base weights, or need data to be made again.
    else if (found != true && found != "orthogonal" && !found.is_null()) fail(ErrorKind::kData, to_line(found), " is not implemented");
  });
  config.rank = 8, config.alpha = 8, config.targets.clear();  // PEFT's defaults for what the file leaves out
  read("r", [&](const Json&) { config.rank = require<std::int64_t>(json, "r", source); });
  read("lora_alpha", [&](const Json&) { config.alpha = require<double>(json, "lora_alpha", source); });
  read("lora_dropout", [&](const Json&) { config.dropout = require<double>(json, "lora_dropout", source); });
  read("target_modules", [&](const Json& found) { config.targets = module_names(found, true); });
  read("exclude_modules", [&](const Json& found) { config.exclude = module_names(found, true); });
  read("modules_to_save", [&](const Json& found) { config.modules_to_save = module_names(found, false); });
  read("rank_pattern", [&](const Json& found) { config.rank_pattern = pattern_map<std::int64_t>(found, source + ": rank_pattern"); });
  read("alpha_pattern", [&](const Json& found) { config.alpha_pattern = pattern_map<double>(found, source + ": alpha_pattern"); });
  read("trainable_token_indices", [&](const Json& found) { read_token_rows(found, config); });
  flag("use_rslora", config.rslora);
  flag("use_dora", config.dora);
  flag("ensure_weight_tying", config.ensure_weight_tying);
  if (config.targets.empty() && problems.empty())
    problems.push_back(source + ": target_modules: must name the adapted modules");
  if (!problems.empty()) fail(ErrorKind::kData, join(problems));
  return config;
}

lora::BaseQuantization adapter_quantization(const std::filesystem::path& folder) {
  const std::filesystem::path path = file_of_folder(folder, kWeightsFile);
  if (path.empty()) return {};  // load_adapter says what is wrong
  const SafetensorsFile file(path);
  const auto found = file.metadata().find(kBaseQuantizationKey);
  return found == file.metadata().end() ? lora::BaseQuantization{} : lora::quantization_of_name(found->second, path.string());
}

Linears linears_for(const std::filesystem::path& folder) {
  return lora::parse_init(read_adapter_config(folder).init).changes_base() ? Linears::kDense : Linears::kAsStored;
}

lora::LoraConfig load_adapter(models::Decoder& decoder, const std::filesystem::path& folder, const std::string& base_hash) {
  const lora::LoraConfig config = read_adapter_config(folder);
  const std::filesystem::path path = file_of_folder(folder, kWeightsFile);
  if (path.empty())
    fail(ErrorKind::kData, (folder / kWeightsFile).string(), ": missing",
         Remedy{std::filesystem::exists(folder / "adapter_model.bin") ? "adapter_model.bin is pickled Python, which is never opened; save it as safetensors with PEFT"
                                                                     : "name the folder that PEFT or alambic train wrote"});
  const SafetensorsFile file(path);
  if (const auto found = file.metadata().find(kBaseHashKey); found != file.metadata().end() && !base_hash.empty() && found->second != base_hash)
    fail(ErrorKind::kData, path.string(), ": was trained on another base: SHA-256 ", found->second, ", this base has ", base_hash,
         Remedy{"name the base model the adapter was trained on"});
  if (const lora::BaseQuantization quantization = adapter_quantization(folder); quantization.is_on()) {
    std::string format = "none";
    for (const models::NamedLinear& linear : decoder.linears())
      if (linear.linear->quantized && !linear.linear->quantized->stored_OI().defined()) format = linear.linear->quantized->format();
    if (format != quantization.format)
      fail(ErrorKind::kUsage, path.string(), ": was trained on a base quantised as ", lora::name_of(quantization), ", this one is ", format == "none" ? "not quantised" : "quantised as " + format,
           Remedy{"quantise the base the same way: quantize_base: " + quantization.format});
  }

  lora::make_trained_dense(decoder, config);
  lora::AdapterPlan plan;
  try {
    plan = lora::plan_adapters(decoder, config, lora::Unmatched::kWarned);
  } catch (const Error& error) {
    fail(ErrorKind::kData, (folder / kConfigFile).string(), " does not fit the base model: ", error.what(), Remedy{error.remedy()});
  }
  const auto expected = lora::expected_keys(decoder, plan, config.dora);
  std::vector<std::string> problems, names;
  std::map<std::string, const models::Linear*> base_of_copy;  // key of a copied base weight -> what it must equal
  for (const lora::PlannedAdapter& adapter : plan.adapters)
    if (!adapter.linear->quantized || adapter.linear->quantized->stored_OI().defined()) base_of_copy[std::string(lora::kPeftPrefix) + adapter.path + ".base_layer.weight"] = adapter.linear;
  for (const auto& [key, shape] : expected) names.push_back(key);

  for (const auto& [key, shape] : expected) {
    const auto found = file.entries().find(key);
    if (found == file.entries().end()) {
      problems.push_back(key + ": missing");
    } else if (found->second.shape != shape) {
      problems.push_back(key + ": shape " + describe(found->second.shape) + ", must be " + describe(shape));
    } else if (!at::isFloatingType(found->second.type)) {
      problems.push_back(key + ": type " + std::string(at::toString(found->second.type)) + ", must be a floating type");
    } else if (const at::Tensor tensor = file.tensor(key); first_non_finite(tensor) >= 0) {
      problems.push_back(key + ": element " + std::to_string(first_non_finite(tensor)) + " is not finite");
    }
  }
  for (const auto& [key, entry] : file.entries()) {
    if (std::binary_search(names.begin(), names.end(), key)) continue;
    if (const auto base = base_of_copy.find(key); base != base_of_copy.end()) {
      const models::Linear& linear = *base->second;
      const at::Tensor copy = entry.shape == std::vector<std::int64_t>{linear.outputs(), linear.inputs()} ? file.tensor(key) : at::Tensor();
      if (!copy.defined() || !at::equal(copy.to(linear.compute_type()), linear.dense_OI(linear.compute_type())))
        problems.push_back(key + ": a base weight that is not the base model's own");
      continue;
    }
    const std::string nearest = nearest_name(key, names);
    problems.push_back(key + ": unexpected" + (nearest.empty() ? "" : "; the nearest that is looked for is " + nearest));
  }
  if (problems.empty() && plan.keep_tie) {
    const std::string embedding = std::string(lora::kPeftPrefix) + plan.trained_whole.front().name;
    if (const std::string head = std::string(lora::kPeftPrefix) + decoder.linears().back().path + ".weight"; !at::equal(file.tensor(head), file.tensor(embedding)))
      problems.push_back(head + ": ensure_weight_tying ties it to " + embedding + ", but the two differ");
  }
  if (!problems.empty()) {
    constexpr std::size_t kMostShown = 50;
    const std::size_t num = problems.size();
    if (num > kMostShown) problems.resize(kMostShown);
    fail(ErrorKind::kData, path.string(), ": ", num, num == 1 ? " tensor does" : " tensors do", " not fit the base model and ", kConfigFile, ":\n", join(problems),
         num > kMostShown ? "\n..." : "");
  }

  lora::attach_empty(decoder, config, lora::Unmatched::kWarned);
  const at::NoGradGuard no_gradients;
  for (const models::NamedTensor& tensor : lora::trainable(decoder)) tensor.tensor->copy_(file.tensor(tensor.name));
  // A folder of PEFT that says pissa or olora means the base without the part that such a start takes out of it.
  if (const lora::Init init = lora::parse_init(config.init); init.changes_base())
    for (const lora::PlannedAdapter& planned : plan.adapters) {
      models::Adapter& adapter = planned.linear->adapter.value();
      const lora::Factors initial = init.kind == lora::InitKind::kOlora ? lora::olora_factors(planned.linear->weight_OI, planned.rank)
                                                                        : lora::pissa_factors(planned.linear->weight_OI, planned.rank, adapter.scale);
      const lora::Factors ordinary = lora::relative_to_base(adapter.a_RI, adapter.b_OR, initial);
      adapter.a_RI = ordinary.a_RI.detach().requires_grad_(true);
      adapter.b_OR = ordinary.b_OR.detach().requires_grad_(true);
    }
  return lora::relative_to_base(config);
}

void write_adapter(models::Decoder& decoder, const lora::LoraConfig& trained, const std::string& base_name, const std::filesystem::path& folder,
                   const std::string& base_hash, const lora::BaseQuantization& quantization) {
  const lora::LoraConfig config = lora::relative_to_base(trained);
  std::map<const at::Tensor*, at::Tensor> ordinary;  // by the trained tensor whose place they take
  for (const models::NamedLinear& linear : decoder.linears()) {
    if (!linear.linear->adapter || !linear.linear->adapter->initial_a_RI.defined()) continue;
    models::Adapter& adapter = *linear.linear->adapter;
    const lora::Factors factors = lora::relative_to_base(adapter.a_RI, adapter.b_OR, {adapter.initial_a_RI, adapter.initial_b_OR});
    ordinary[&adapter.a_RI] = factors.a_RI;
    ordinary[&adapter.b_OR] = factors.b_OR;
  }
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const models::NamedTensor& tensor : lora::trainable(decoder))
    tensors.emplace_back(tensor.name, ordinary.contains(tensor.tensor) ? ordinary[tensor.tensor] : tensor.tensor->detach());
  if (const std::string head = tied_head_key(decoder); !head.empty()) tensors.emplace_back(head, decoder.embedding_VD.detach());

  // "all-linear" is spelled out: a reader that takes the head for a Linear like the others would look for more.
  std::vector<std::string> targets = config.targets;
  if (targets == std::vector<std::string>{"all-linear"}) {
    targets.clear();
    for (const models::NamedLinear& linear : decoder.linears()) {
      const std::string leaf = linear.path.substr(linear.path.rfind('.') + 1);
      if (linear.layer >= 0 && std::find(targets.begin(), targets.end(), leaf) == targets.end()) targets.push_back(leaf);
    }
  }
  // No peft_version: it would say that PEFT wrote this. PEFT fills in its own.
  Json json = {{"alpha_pattern", Json::object()},
               {"base_model_name_or_path", base_name},
               {"bias", "none"},
               {"ensure_weight_tying", config.ensure_weight_tying},
               {"exclude_modules", nullptr},
               {"fan_in_fan_out", false},
               {"inference_mode", true},
               {"init_lora_weights", config.init == "kaiming" ? Json(true) : config.init == "false" ? Json(false) : Json(config.init)},
               {"lora_alpha", number(config.alpha)},
               {"lora_dropout", config.dropout},
               {"modules_to_save", nullptr},
               {"peft_type", "LORA"},
               {"r", config.rank},
               {"rank_pattern", Json::object()},
               {"target_modules", module_list(targets)},
               {"task_type", "CAUSAL_LM"},
               {"trainable_token_indices", token_rows_of(decoder)},
               {"use_dora", config.dora},
               {"use_rslora", config.rslora}};
  if (decoder.token_row_ids.empty()) json.erase("trainable_token_indices");
  if (!config.ensure_weight_tying) json.erase("ensure_weight_tying");  // readers older than the field would warn about it
  if (config.exclude.empty()) json.erase("exclude_modules");
  else json["exclude_modules"] = module_list(config.exclude);
  if (!config.modules_to_save.empty()) json["modules_to_save"] = config.modules_to_save;
  for (const auto& [key, rank] : config.rank_pattern) json["rank_pattern"][key] = rank;
  for (const auto& [key, alpha] : config.alpha_pattern) json["alpha_pattern"][key] = number(alpha);

  std::filesystem::create_directories(folder);
  std::map<std::string, std::string> metadata = {{"format", "pt"}};
  if (!base_hash.empty()) metadata[kBaseHashKey] = base_hash;
  if (quantization.is_on()) metadata[kBaseQuantizationKey] = lora::name_of(quantization);
  write_safetensors(folder / kWeightsFile, tensors, metadata);
  write_file(folder / "README.md", card(config, trained.init, base_name, quantization));
  write_file(folder / kConfigFile, json.dump(2) + "\n");
}

}  // namespace alambic::checkpoints
