// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/merge_folder.h"

#include <ATen/ops/equal.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <future>
#include <map>
#include <set>

#include "checkpoints/base_weights.h"
#include "checkpoints/hf_folder.h"
#include "checkpoints/licence.h"
#include "checkpoints/manifest.h"
#include "checkpoints/merge_probe.h"
#include "checkpoints/model_card.h"
#include "checkpoints/peft_folder.h"
#include "checkpoints/safetensors.h"
#include "core/config.h"
#include "core/error.h"
#include "core/files.h"
#include "core/log.h"
#include "lora/merge.h"
#include "lora/stored_weight.h"
#include "models/token_rows.h"

namespace alambic::checkpoints {
namespace {

constexpr double kNothing = 1e-8;  // KL in nats a token that rounding of f32 sums alone can cause
constexpr const char* kProbeText = "The quick brown fox jumps over the lazy dog. 12 x 34 = 408; \xc3\xa9t\xc3\xa9, na\xc3\xafve, \xe4\xbd\xa0\xe5\xa5\xbd.";

struct WeightType {
  const char* name;
  at::ScalarType type;
};
constexpr WeightType kTypes[] = {{"f32", at::kFloat}, {"bf16", at::kBFloat16}, {"f16", at::kHalf}};

/// The type asked for, or the one type all tensors of the base are stored in that are not quantised; f32 where it mixes types,
/// which loses nothing.
const WeightType& weight_type(const MergeConfig& config, const BaseWeights& base) {
  if (config.weights != "auto") {
    for (const WeightType& type : kTypes)
      if (config.weights == type.name) return type;
    fail(ErrorKind::kUsage, "weights: \"", config.weights, "\" must be auto, f32, bf16 or f16");
  }
  const std::set<at::ScalarType> stored = base.dense_types();
  for (const WeightType& type : kTypes)
    if (stored == std::set<at::ScalarType>{type.type}) return type;
  return kTypes[0];
}

/// What becomes of the base: updates by the weight they belong to, tensors that take another's place, and the tie.
struct Changes {
  std::string relation;
  std::map<std::string, models::Adapter> adapters;  // by the name of the weight
  std::map<std::string, at::Tensor> replaced;
  struct Rows {
    at::Tensor rows_ND;
    std::vector<std::int64_t> ids;
  };
  std::map<std::string, Rows> rows;  // that take the place of some of a table's
  std::vector<std::string> names;  // of all tensors written, sorted: the order in which a safetensors file has them
  std::string embedding, head;     // names of the two
  bool head_tied = false;
  std::int64_t num_adapter_tensors = 0;
};

/// The names of what will be written, from a decoder that was trained. An adapter on a tied head parts it from the embedding.
void note_tensors(models::Decoder& decoder, Changes& changes) {
  changes.head = decoder.linears().back().path + ".weight";
  changes.head_tied = decoder.head_tied && !decoder.head.adapter;
  if (!changes.head_tied) changes.names.push_back(changes.head);
  for (const models::NamedTensor& tensor : decoder.tensors()) {
    if (tensor.tensor != &decoder.head.weight_OI) changes.names.push_back(tensor.name);
    if (tensor.tensor == &decoder.embedding_VD) changes.embedding = tensor.name;
  }
  for (const models::NamedLinear& linear : decoder.linears())
    if (linear.linear->quantized && linear.layer >= 0) changes.names.push_back(linear.path + ".weight");
  std::sort(changes.names.begin(), changes.names.end());
}

/// Loads a PEFT adapter into the decoder and takes its parts out.
Changes load_adapter_changes(models::Decoder& decoder, const MergeConfig& config, const std::string& hash) {
  Changes changes;
  changes.relation = "merge";
  load_adapter(decoder, config.adapter, hash);
  note_tensors(decoder, changes);
  for (const models::NamedLinear& linear : decoder.linears())
    if (linear.linear->adapter) changes.adapters.emplace(linear.path + ".weight", *linear.linear->adapter);
  for (const models::NamedTensor& tensor : decoder.tensors())
    if (tensor.tensor->requires_grad()) changes.replaced.emplace(tensor.name, tensor.tensor->detach());
  if (decoder.token_rows_ND.defined())
    changes.rows.emplace(changes.embedding, Changes::Rows{decoder.token_rows_ND.detach(), decoder.token_row_ids});
  if (decoder.head.token_rows_ND.defined() && !decoder.head_tied)
    changes.rows.emplace(changes.head, Changes::Rows{decoder.head.token_rows_ND.detach(), decoder.head.token_row_ids});
  changes.num_adapter_tensors = static_cast<std::int64_t>(SafetensorsFile(file_of_folder(config.adapter, "adapter_model.safetensors")).entries().size());
  return changes;
}

/// Puts the weights of a full fine-tune into the decoder. All of them must be there, and no others.
Changes load_finetuned_changes(models::Decoder& decoder, const MergeConfig& config, const BaseWeights& base) {
  Changes changes;
  changes.relation = "finetune";
  const FolderTensors tuned(config.adapter);
  std::vector<std::string> problems;
  for (const models::NamedLinear& linear : decoder.linears())  // those as stored get a place for the trained weight
    if (linear.linear->quantized) {
      const bool is_tied = linear.layer < 0 && decoder.head_tied;
      linear.linear->weight_OI = is_tied ? decoder.embedding_VD : base.tensor(linear.path + ".weight"), linear.linear->quantized = nullptr;
    }
  note_tensors(decoder, changes);
  if (decoder.head_tied && tuned.contains(changes.head) && tuned.contains(changes.embedding) &&
      !at::equal(tuned.tensor_as(changes.head, at::kFloat), tuned.tensor_as(changes.embedding, at::kFloat))) {
    decoder.head_tied = false;  // training parted the two
    changes.names.clear();
    note_tensors(decoder, changes);
  }
  const std::set<std::string> wanted(changes.names.begin(), changes.names.end());
  for (const std::string& name : tuned.names())
    if (!wanted.contains(name) && name != changes.head) problems.push_back(name + ": the base has no such tensor");
  for (const models::NamedTensor& tensor : decoder.tensors()) {
    const std::vector<std::int64_t> shape = tensor.tensor->defined() ? tensor.tensor->sizes().vec() : std::vector<std::int64_t>{};
    if (!tuned.contains(tensor.name)) problems.push_back(tensor.name + ": missing");
    else if (tuned.shape(tensor.name) != shape) problems.push_back(tensor.name + ": shape " + to_line(Json(tuned.shape(tensor.name))) + ", the base has " + to_line(Json(shape)));
    else if (first_non_finite(tuned.tensor(tensor.name)) >= 0) problems.push_back(tensor.name + ": not finite");
  }
  if (!problems.empty()) {
    std::string lines;
    for (const std::string& problem : problems) lines += "\n" + problem;
    fail(ErrorKind::kData, config.adapter.string(), ": ", problems.size(), " tensors do not fit the base ", config.base.string(), ":", lines);
  }
  const auto stays = [&](const std::string& name) { return at::isReducedFloatingType(tuned.type(name)); };
  for (const models::NamedTensor& tensor : decoder.tensors()) {
    changes.replaced.emplace(tensor.name, tuned.tensor(tensor.name));
    *tensor.tensor = tensor.tensor == &decoder.embedding_VD && stays(tensor.name) ? tuned.tensor(tensor.name) : at::Tensor();
  }
  for (const models::NamedLinear& linear : decoder.linears())
    if ((linear.layer >= 0 || !decoder.head_tied) && stays(linear.path + ".weight")) lora::keep_as_stored(*linear.linear, tuned.tensor(linear.path + ".weight"));
  for (const models::NamedTensor& tensor : decoder.tensors())
    if (!tensor.tensor->defined()) *tensor.tensor = tuned.tensor_as(tensor.name, at::kFloat);
  lora::tie_head(decoder);
  if (!decoder.head_tied && !tuned.contains(changes.head)) fail(ErrorKind::kBug, "a head that is not tied has no tensor");
  changes.num_adapter_tensors = static_cast<std::int64_t>(tuned.names().size());
  return changes;
}

/// One tensor of the merged model; f32 where something was added to it or the base is quantised, else as it is stored.
at::Tensor merged_tensor(const std::string& name, const Changes& changes, const BaseWeights& base) {
  if (const auto found = changes.replaced.find(name); found != changes.replaced.end()) return found->second;
  // A head that parted from its embedding without being trained itself is what the embedding was.
  const at::Tensor stored = base.tensor(name == changes.head && !base.contains(name) ? changes.embedding : name);
  if (const auto found = changes.rows.find(name); found != changes.rows.end()) return models::with_token_rows(stored, found->second.rows_ND, found->second.ids);
  const auto adapter = changes.adapters.find(name);
  return adapter == changes.adapters.end() ? stored : lora::merged_weight(stored, adapter->second);
}

/// SHA-256 over the (hash, name) lines of a folder's files; of the base without the weights, which base_hash covers.
std::string hash_of_files(const fs::path& folder, bool with_weights) {
  std::map<std::string, std::string> hashes;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    const std::string name = entry.path().lexically_relative(folder).generic_string();
    if (!entry.is_regular_file() || name.starts_with('.') || (!with_weights && entry.path().extension() == ".safetensors")) continue;
    hashes[name] = sha256_of_file(entry.path());
  }
  std::string text;
  for (const auto& [name, hash] : hashes) text += hash + "  " + name + "\n";
  return sha256_of(text);
}

fs::path run_of(const MergeConfig& config) {
  if (!config.run.empty()) {
    if (!fs::exists(config.run / "report.json")) fail(ErrorKind::kUsage, "run: ", config.run.string(), " has no report.json", Remedy{"name the folder of a finished run"});
    return config.run;
  }
  const fs::path parent = fs::absolute(config.adapter).lexically_normal().parent_path();
  for (const fs::path& folder : {parent, parent.parent_path()})
    if (fs::exists(folder / "report.json")) return folder;
  return {};
}

std::string figure(double value, const char* format = "%.4g") {
  char text[64];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

/// Whether `adapter` holds the very weights that the run's report speaks of, and not those of another step or run.
bool is_result_of(const fs::path& run_folder, const Json& run, const fs::path& adapter, const std::string& source) {
  const fs::path result = run_folder / value_or<std::string>(run, "result", "adapter", source);
  return fs::is_directory(result) && (fs::equivalent(result, adapter) || hash_of_files(result, true) == hash_of_files(adapter, true));
}

/// How the card calls the base: as asked for, by the id that the Hub's cache keeps it under, or as its folder.
std::string name_of_base(const MergeConfig& config) {
  if (!config.base_name.empty()) return config.base_name;
  const fs::path folder = fs::absolute(config.base).lexically_normal();
  for (const fs::path& part : folder) {  // models--org--name/snapshots/<commit>
    std::string id = part.string();
    if (!id.starts_with("models--")) continue;
    id.erase(0, 8);
    if (const std::size_t between = id.find("--"); between != id.npos) return id.replace(between, 2, "/");
  }
  return (folder.has_filename() ? folder : folder.parent_path()).filename().string();
}

/// What the run's report says of data and figures, and the proof, as a card.
CardInfo card_of(const MergeConfig& config, const Json& run, const std::string& source, const MergeReport& report) {
  CardInfo card;
  const std::string base_name = name_of_base(config);
  card.title = config.name.empty() ? report.output.filename().string() : config.name;
  card.summary = report.relation == "merge" ? "The weights of " + base_name + " with an adapter merged into them." : base_name + (run.is_object() && value_or<std::int64_t>(run, "restarts", 0, source) > 0
                                                                                                ? ", trained by low-rank adapters that were merged into it and begun anew."
                                                                                                : ", fine-tuned as a whole.");
  card.licence = card.base_licence = licence_of_model(config.base);
  card.base_models = {base_name};
  card.base_relation = "finetune";  // "merge" would say that several models were put together
  if (run.is_object()) {
    const Json all_data = value_or<Json>(run, "data", Json::array(), source);
    for (const Json& store : all_data) {
      if (value_or<std::string>(store, "use", "", source) != "train") continue;
      const Json sources = value_or<Json>(store, "sources", Json::array(), source);
      for (const Json& text : sources) {
        CardData data{.name = value_or<std::string>(text, "name", "", source), .licence = value_or<std::string>(text, "licence", "", source),
                      .origin = value_or<std::string>(text, "origin", "", source), .language = value_or<std::string>(text, "language", "", source),
                      .amount = ""};
        if (sources.size() == 1)
          data.amount = std::to_string(value_or<std::int64_t>(store, "documents", 0, source)) + " documents, " + std::to_string(value_or<std::int64_t>(store, "tokens", 0, source)) + " tokens";
        const auto same = [&](const CardData& other) { return other.name == data.name && other.origin == data.origin && other.licence == data.licence; };
        if (std::none_of(card.data.begin(), card.data.end(), same)) card.data.push_back(data);
        if (!data.language.empty() && std::find(card.languages.begin(), card.languages.end(), data.language) == card.languages.end()) card.languages.push_back(data.language);
      }
    }
    for (const Json& teacher : value_or<Json>(run, "teachers", Json::array(), source)) {  // distilled weights derive from these too
      const std::string name = fs::path(value_or<std::string>(teacher, "folder", "", source)).filename().string();
      const Licence licence = find_licence(value_or<std::string>(teacher, "licence", "", source));
      card.teachers.emplace_back(name, licence);
      card.licence = combined({card.licence, licence});
    }
    for (const Json& store : value_or<Json>(run, "evaluation", Json::array(), source)) {
      const Json before = value_or<Json>(store, "before", nullptr, source), after = value_or<Json>(store, "after", nullptr, source);
      if (!before.is_object() || !after.is_object()) continue;
      const std::string name = value_or<std::string>(store, "name", "", source);
      for (const auto& [key, what] : {std::pair{"bits_per_byte", "bits per UTF-8 byte, "}, std::pair{"loss", "loss in nats a token, "}}) {
        const double nan = std::nan("");
        const double then = value_or<double>(before, key, nan, source), now = value_or<double>(after, key, nan, source);
        if (std::isfinite(then) && std::isfinite(now)) card.measures.push_back({what + name, figure(then, "%.4f"), figure(now, "%.4f")});
      }
    }
    for (const auto& [key, what] : {std::pair{"steps", "steps"}, std::pair{"tokens", "tokens"}, std::pair{"kept_tokens", "tokens learnt from"}})
      if (const std::int64_t number = value_or<std::int64_t>(run, key, 0, source); number > 0) card.training.emplace_back(what, std::to_string(number));
  } else {
    card.warnings.push_back("No report of a training run was at hand: what this was trained on, under which licences, and how it measures is not known here.");
  }
  card.proof = {{"probe tokens", std::to_string(report.probe_tokens)},
                {"largest difference of a logit from base + " + std::string(report.relation == "merge" ? "adapter" : "training"),
                 figure(report.largest_difference) + " (largest logit " + figure(report.largest_logit) + ")"},
                {"KL(trained || this), nats a token", figure(report.kl)},
                {"KL(trained || base), nats a token", figure(report.kl_of_base)},
                {"tensors read from training, each used once", std::to_string(report.num_adapter_tensors)},
                {"merged onto", report.base_format == "none" ? "the base's own weights, in f32" : "the base's weights quantised (" + report.base_format + ") and made dense again in f32, as they were trained on"},
                {"weights stored as", report.weights},
                {"head and embedding", report.head_tied ? "one tensor" : "two tensors"}};
  return card;
}

void check_proof(const MergeConfig& config, const MergeReport& report, const WeightType& type) {
  const MergeLimits limits = default_limits(type.type);
  const double max_kl = config.max_kl >= 0 ? config.max_kl : limits.max_kl;
  const double max_difference = (config.max_difference >= 0 ? config.max_difference : limits.max_difference) * report.largest_logit;
  const Remedy remedy{type.type == at::kFloat ? "nothing was published; please report this with the base and the adapter" : "nothing was published; write the weights as f32 (weights: f32)"};
  // Written so that NaN fails.
  if (!(report.largest_difference <= max_difference) || !(report.kl <= max_kl))
    fail(ErrorKind::kNumerics, "the written weights are not base + ", report.relation == "merge" ? "adapter" : "training", ": on ", report.probe_tokens,
         " probe tokens a logit differs by ", report.largest_difference, " (at most ", max_difference, ") and the KL is ", report.kl, " nats a token (at most ", max_kl, ")", remedy);
  if (report.kl_of_base > kNothing && !(report.kl < report.kl_of_base))
    fail(ErrorKind::kNumerics, "rounding to ", type.name, " loses what was trained: the KL from base + adapter to the written weights is ", report.kl,
         " nats a token, to the base alone ", report.kl_of_base, remedy);
}

}  // namespace

void MergeConfig::visit(FieldVisitor& fields) {
  fields.field("base", base, {.help = "folder of the base model", .required = true});
  fields.field("adapter", adapter, {.help = "PEFT folder, or the weights folder of a full fine-tune", .required = true});
  fields.field("output", output, {.help = "folder to write; it must not exist", .required = true});
  fields.field("name", name, {.help = "of the model in its card; empty: the output folder's"});
  fields.field("base_name", base_name, {.help = "of the base in the card, such as org/model; empty: the base folder's"});
  fields.field("weights", weights, {.help = "type of the weights; auto: as the base stores them", .choices = {"auto", "f32", "bf16", "f16"}});
  fields.field("max_shard_megabytes", max_shard_megabytes, {.help = "largest size of a weight file", .unit = "10^6 bytes", .low = 1});
  fields.field("probe_text", probe_text, {.help = "text on which base + adapter and the written weights are compared, besides fixed ids"});
  fields.field("max_kl", max_kl, {.help = "largest KL from base + adapter to the written weights; -1: by type", .unit = "nats a token", .low = -1});
  fields.field("max_difference", max_difference, {.help = "largest difference of a logit, as a share of the largest logit; -1: by type", .low = -1});
  fields.field("run", run, {.help = "run folder whose report is cited in the card; empty: the run the adapter lies in"});
}

MergeLimits default_limits(at::ScalarType weights) {
  // SmolLM2-135M with a rank-16 adapter on all layers measured KL 3e-11 and 3e-6 of the largest logit (f32), 2e-4 and 1.5e-2
  // (bf16), 8e-6 and 2e-3 (f16); larger models and adapters need room above that.
  if (weights == at::kBFloat16) return {.max_kl = 2e-2, .max_difference = 0.1};
  if (weights == at::kHalf) return {.max_kl = 1e-3, .max_difference = 0.02};
  return {.max_kl = 1e-6, .max_difference = 1e-4};
}

namespace {

/// What an earlier merge wrote into its manifest.
MergeReport report_of(const Json& json, const fs::path& output, const std::string& source) {
  MergeReport report;
  report.output = output;
  report.already_done = true;
  report.relation = require<std::string>(json, "relation", source);
  report.weights = require<std::string>(json, "weights", source);
  report.base_format = value_or<std::string>(json, "base_format", "none", source);
  report.num_tensors = require<std::int64_t>(json, "tensors", source);
  report.num_changed = require<std::int64_t>(json, "changed_tensors", source);
  report.num_adapter_tensors = require<std::int64_t>(json, "adapter_tensors", source);
  report.num_bytes = static_cast<std::uint64_t>(require<std::int64_t>(json, "bytes", source));
  report.head_tied = require<bool>(json, "head_tied", source);
  const Json probe = require<Json>(json, "probe", source);
  report.probe_tokens = require<std::int64_t>(probe, "tokens", source);
  report.largest_difference = require<double>(probe, "largest_difference", source);
  report.largest_logit = require<double>(probe, "largest_logit", source);
  report.kl = require<double>(probe, "kl", source);
  report.kl_of_base = require<double>(probe, "kl_of_base", source);
  for (const Json& warning : require<Json>(json, "warnings", source)) report.warnings.push_back(warning.get<std::string>());
  return report;
}

}  // namespace

Json MergeReport::json() const {
  return {{"output", output.string()}, {"already_done", already_done}, {"relation", relation}, {"weights", weights}, {"base_format", base_format},
          {"tensors", num_tensors}, {"changed_tensors", num_changed}, {"adapter_tensors", num_adapter_tensors},
          {"bytes", num_bytes}, {"seconds", seconds}, {"megabytes_per_second", megabytes_per_second()}, {"head_tied", head_tied},
          {"probe", {{"tokens", probe_tokens}, {"largest_difference", largest_difference}, {"largest_logit", largest_logit}, {"kl", kl}, {"kl_of_base", kl_of_base}}},
          {"warnings", warnings}};
}

MergeReport merge_folder(const MergeConfig& given) {
  MergeConfig config = given;
  for (const auto& [what, path] : {std::pair{"base", config.base}, std::pair{"adapter", config.adapter}, std::pair{"output", config.output}})
    if (path.empty()) fail(ErrorKind::kUsage, "merge: no ", what, " folder was named");
  config.output = fs::absolute(config.output).lexically_normal();
  if (!config.output.has_filename()) config.output = config.output.parent_path();
  if (!fs::is_directory(config.adapter)) fail(ErrorKind::kData, config.adapter.string(), ": no such folder");
  const bool is_adapter = fs::exists(config.adapter / "adapter_config.json");

  // An adapter learnt what is missing from the base as it saw it: de-quantised values, where it was quantised.
  const lora::BaseQuantization quantization = is_adapter ? adapter_quantization(config.adapter) : lora::BaseQuantization{};
  const BaseWeights base(config.base, quantization);
  if (!is_adapter && base.stored_format() != "none")
    fail(ErrorKind::kData, config.base.string(), ": is quantised (", base.stored_format(), "), so ", config.adapter.string(), " cannot be a full fine-tune of it", Remedy{"name the dense base"});
  const WeightType& type = weight_type(config, base);
  const std::string hash = base.tensors().hash();
  const fs::path run_folder = run_of(config);
  const std::string run_source = (run_folder / "report.json").string();
  Json run = run_folder.empty() ? Json() : read_json_file(run_folder / "report.json");
  if (run.is_object()) {
    const Json run_base = value_or<Json>(run, "base", Json::object(), run_source);
    if (const std::string wanted = value_or<std::string>(run_base, "sha256", "", run_source); !wanted.empty() && wanted != hash)
      fail(ErrorKind::kData, run_source, ": the run trained another base: SHA-256 ", wanted, ", ", config.base.string(), " has ", hash, Remedy{"name the base that was trained"});
  }
  const bool other_step = run.is_object() && !is_result_of(run_folder, run, config.adapter, run_source);
  if (other_step)
    for (const char* measured : {"evaluation", "steps", "tokens", "kept_tokens"}) run.erase(measured);

  MergeReport report;
  report.output = config.output;
  report.weights = type.name;
  report.base_format = base.trained_format();
  const Json inputs = {{"alambic", alambic_version()}, {"base", hash}, {"base_files", hash_of_files(config.base, false)}, {"adapter", hash_of_files(config.adapter, true)},
                       {"report", run.is_object() ? sha256_of_file(run_folder / "report.json") : ""}, {"weights", type.name},
                       {"max_shard_megabytes", config.max_shard_megabytes}, {"name", config.name}, {"base_name", config.base_name}};
  if (fs::exists(fs::symlink_status(config.output))) {
    const fs::path manifest_path = config.output / "manifest.json";
    const Json manifest = fs::exists(manifest_path) ? read_json_file(manifest_path) : Json();
    if (!manifest.is_object() || manifest.value("inputs", Json()) != inputs)
      fail(ErrorKind::kUsage, config.output.string(), manifest.is_object() ? " exists and is another merge" : " exists and is no merged model", Remedy{"choose another output, or remove it"});
    check_manifest(config.output);
    report = report_of(require<Json>(manifest, "merge", manifest_path.string()), config.output, manifest_path.string());
    log_info(config.output.string(), ": this merge is done and whole");
    return report;
  }

  // What must come out: logits of base + adapter, in f32.
  models::Decoder decoder = load_decoder(config.base, at::kFloat, quantization, is_adapter ? linears_for(config.adapter) : Linears::kAsStored);
  const bool base_tied = models::read_model_config(config.base).tied_head;
  const Probe probe = make_probe(config.base, decoder.config.vocabulary_size, config.probe_text.empty() ? kProbeText : config.probe_text);
  const at::Tensor base_TV = probe_logits(decoder, probe);
  Changes changes = is_adapter ? load_adapter_changes(decoder, config, hash) : load_finetuned_changes(decoder, config, base);
  const at::Tensor trained_TV = probe_logits(decoder, probe);
  report.relation = changes.relation;
  report.num_adapter_tensors = changes.num_adapter_tensors;
  report.num_changed = static_cast<std::int64_t>(changes.adapters.size() + changes.replaced.size() + changes.rows.size());
  report.kl_of_base = logit_distance(trained_TV, base_TV).kl;
  decoder = models::Decoder();  // its memory is needed for the shards

  // The tie follows from the data: two tensors that came out alike are stored as one where the base did so.
  const auto final_tensor = [&](const std::string& name) { return merged_tensor(name, changes, base).to(type.type); };
  if (base_tied && !changes.head_tied && at::equal(final_tensor(changes.head), final_tensor(changes.embedding))) {
    changes.head_tied = true;
    std::erase(changes.names, changes.head);
  }
  report.head_tied = changes.head_tied;

  std::vector<std::pair<std::string, std::vector<std::int64_t>>> tensors;
  for (const std::string& name : changes.names) {
    tensors.emplace_back(name, base.shape(base.contains(name) ? name : changes.embedding));
    std::uint64_t count = 1;
    for (const std::int64_t size : tensors.back().second) count *= static_cast<std::uint64_t>(size);
    report.num_bytes += count * c10::elementSize(type.type);
  }
  report.num_tensors = static_cast<std::int64_t>(tensors.size());
  constexpr std::uint64_t kOtherFiles = 64ull << 20;
  if (const std::uint64_t free = free_bytes(config.output); free < report.num_bytes + kOtherFiles)
    fail(ErrorKind::kResource, config.output.string(), ": ", free / 1'000'000, " MB are free, ", (report.num_bytes + kOtherFiles) / 1'000'000, " MB are needed",
         Remedy{"free space, choose another output, or write a narrower type"});

  const TemporaryFolder temporary(config.output);
  copy_companions(config.base, temporary.path());
  describe_weights(temporary.path(), type.type, changes.head_tied);

  const auto start = std::chrono::steady_clock::now();
  std::set<std::string> used;
  std::size_t next_index = 0;
  std::future<at::Tensor> next;  // the tensor after the one being written, made meanwhile
  const auto begin_next = [&](std::size_t index) {
    next_index = index;
    next = std::async(std::launch::async, [&, name = tensors[index].first] { return final_tensor(name); });
  };
  const std::vector<std::pair<std::string, std::string>> written = write_weights(
      temporary.path(), tensors, type.type,
      [&](std::size_t i) {
        if (!next.valid() || next_index != i) begin_next(i);
        at::Tensor tensor = next.get();
        if (i + 1 < tensors.size()) begin_next(i + 1);
        used.insert(tensors[i].first);
        return tensor;
      },
      static_cast<std::uint64_t>(config.max_shard_megabytes) * 1'000'000);
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  for (const auto& [name, adapter] : changes.adapters)
    if (!used.contains(name)) fail(ErrorKind::kBug, "the adapter of ", name, " was not merged");
  for (const auto& [name, tensor] : changes.replaced)
    if (!used.contains(name) && name != changes.head) fail(ErrorKind::kBug, "the trained tensor ", name, " was not written");
  for (const auto& [name, rows] : changes.rows)
    if (!used.contains(name) && name != changes.head) fail(ErrorKind::kBug, "the trained rows of ", name, " were not written");

  // The proof: what lies on the disk now, read as any other model folder.
  const models::Decoder reloaded = load_decoder(temporary.path(), at::kFloat, {}, Linears::kAsStored);
  if (reloaded.head_tied != report.head_tied) fail(ErrorKind::kBug, "the written config.json does not say what the head is");
  const LogitDistance distance = logit_distance(trained_TV, probe_logits(reloaded, probe));
  report.probe_tokens = probe.num_tokens();
  report.largest_difference = distance.largest_difference;
  report.largest_logit = distance.largest_logit;
  report.kl = distance.kl;
  check_proof(config, report, type);

  CardInfo card = card_of(config, run, run_source, report);
  if (other_step) card.warnings.push_back("These are not the weights that the run chose, so nothing measured on those is shown here.");
  if (report.kl_of_base <= kNothing) card.warnings.push_back("Training changed nothing that the probe can measure.");
  report.warnings = licence_warnings(card);
  report.warnings.insert(report.warnings.end(), card.warnings.begin(), card.warnings.end());
  for (const std::string& warning : report.warnings) log_warning(warning);
  if (config.base_name.empty()) log_info("the card calls the base ", name_of_base(config), "; --base-name gives it the name that others know");
  write_file(temporary.path() / "README.md", model_card(card));
  Json proof = report.json();
  for (const char* key : {"output", "already_done", "seconds", "megabytes_per_second"}) proof.erase(key);
  write_manifest(temporary.path(), {{"inputs", inputs}, {"merge", proof}}, written);
  commit_folder(temporary.path(), config.output);
  return report;
}

}  // namespace alambic::checkpoints
