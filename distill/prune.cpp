// SPDX-License-Identifier: Apache-2.0
#include "distill/prune.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randn.h>

#include <cstdio>
#include <numeric>
#include <set>

#include "checkpoints/base_weights.h"
#include "checkpoints/hf_folder.h"
#include "checkpoints/licence.h"
#include "checkpoints/manifest.h"
#include "checkpoints/model_card.h"
#include "checkpoints/safetensors.h"
#include "core/error.h"
#include "core/files.h"
#include "core/log.h"
#include "core/random.h"
#include "distill/parts.h"
#include "models/fused_blocks.h"
#include "train/evaluate.h"

namespace alambic::distill {
namespace {

constexpr const char* kMade = "student";

std::vector<data::TokenStore> opened(const std::vector<std::string>& folders) {
  std::vector<data::TokenStore> stores;
  for (const std::string& folder : folders) stores.emplace_back(folder);
  return stores;
}

void check_stores(const std::vector<data::TokenStore>& stores, const std::string& hash, std::int64_t rows) {
  for (const data::TokenStore& store : stores) {
    if (store.info().vocabulary_size > rows)
      fail(ErrorKind::kData, store.folder().string(), ": its vocabulary has ", store.info().vocabulary_size, " tokens, the model only ", rows, " rows", Remedy{"prepare the text again with this model's tokenizer"});
    if (!hash.empty() && store.info().tokenizer_hash != hash)
      fail(ErrorKind::kData, store.folder().string(), ": made by another tokenizer: its hash is ", store.info().tokenizer_hash, ", the model's is ", hash, Remedy{"prepare the text again with this model's tokenizer"});
  }
}

/// What the student is a function of. Folders stand by what they hold.
Json inputs_of(const PruneConfig& config, const checkpoints::FolderTensors& base, const std::vector<data::TokenStore>& calibration, const std::vector<data::TokenStore>& vocabulary,
               const std::vector<data::TokenStore>& held_out) {
  Json settings = resolved_config(config);
  for (const char* key : {"model", "output", "threads"}) settings.erase(key);
  const auto hashes = [](const std::vector<data::TokenStore>& stores) {
    Json list = Json::array();
    for (const data::TokenStore& store : stores) list.push_back(store.hash());
    return list;
  };
  settings["calibration"]["stores"] = hashes(calibration);
  settings["vocabulary"]["stores"] = hashes(vocabulary);
  for (std::size_t i = 0; i < held_out.size(); ++i) settings["evaluation"]["stores"][i]["store"] = held_out[i].hash();
  Json inputs = {{"alambic", checkpoints::alambic_version()}, {"base", base.hash()}, {"config", settings}};
  if (const fs::path file = config.model / "tokenizer.json"; fs::exists(file)) inputs["tokenizer"] = sha256_of_file(file);
  return inputs;
}

/// As transformers begins a model: matrices normal, norms that change nothing, no biases, no padding token.
at::Tensor fresh_tensor(const TensorPlace& place, const models::ModelConfig& student, double deviation, std::uint64_t seed) {
  if (place.is_bias) return at::full(place.shape, 0.0, at::kFloat);
  if (place.shape.size() == 1) return at::full(place.shape, 1 - student.family->norm_weight_offset, at::kFloat);
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(derive_seed(seed, "fresh weight " + place.name));
  at::Tensor values = at::randn(place.shape, generator, at::kFloat) * deviation;
  if (place.slot == models::Slot::kEmbedding && student.pad_id >= 0) values[student.pad_id].zero_();
  return values;
}

std::string joined(const std::vector<std::int64_t>& numbers) {
  std::string text;
  for (std::size_t i = 0; i < numbers.size(); ++i) {  // "0-9, 12"
    std::size_t last = i;
    while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
    text += (text.empty() ? "" : ", ") + std::to_string(numbers[i]) + (last > i ? "-" + std::to_string(numbers[last]) : "");
    i = last;
  }
  return text;
}

std::string figure(double value) {
  char text[64];
  std::snprintf(text, sizeof text, "%.4f", value);
  return text;
}

Json evaluated(const models::Decoder& decoder, const data::TokenStore& store, const HeldOutConfig& config) {
  return train::to_json(train::evaluate(decoder, store, config.row_length, /*rows_per_batch=*/1, static_cast<std::uint64_t>(config.max_tokens)).total);
}

/// fuse: passes that nobody observes take the fused path, for which weights are copied out of the mapping.
models::Decoder loaded(const fs::path& folder, const PruneConfig& config, bool fuse) {
  models::Decoder decoder = checkpoints::load_decoder(folder, config.compute_type == "bf16" ? at::kBFloat16 : at::kFloat);
  if (fuse) models::use_fused_blocks(decoder);
  return decoder;
}

checkpoints::CardInfo card_of(const PruneConfig& config, const PruneReport& report, const Importance& importance) {
  checkpoints::CardInfo card;
  const std::string base_name = config.base_name.empty() ? fs::absolute(config.model).lexically_normal().filename().string() : config.base_name;
  const bool fresh = config.weights == "fresh";
  card.title = config.name.empty() ? report.output.filename().string() : config.name;
  card.summary = fresh ? "A model of the family of " + base_name + " with fresh weights. It knows nothing before it is trained."
                       : "What is left of " + base_name + " when the parts that matter least were taken out. It was not trained since, and is meant to be: by distillation from " + base_name + ", for example.";
  card.licence = card.base_licence = checkpoints::licence_of_model(config.model);
  card.base_models = {base_name};
  card.base_relation = "finetune";
  card.origin = {{"parameters before", std::to_string(report.parameters_before)}, {"now", std::to_string(report.parameters)}};
  const Json before = report.shape_before.json();
  const Json after = report.shape.json();
  for (const auto& [key, size] : after.items())
    if (size != before[key]) card.origin.emplace_back(key, to_line(before[key]) + " before, " + to_line(size) + " now");
  if (!fresh && report.shape.layers < report.shape_before.layers)
    card.origin.emplace_back("layers kept", joined(report.layers) + (config.sizes.layers.empty() ? config.depth_by == "loss" ? "; chosen by the loss without each" : "; chosen by block influence" : "; as given"));
  if (importance.tokens > 0) card.origin.emplace_back("channels, neurons and heads chosen by", "the size of their activations over " + std::to_string(importance.tokens) + " tokens of sample text (" + config.calibration.aggregate + ")");
  if (report.shape.vocabulary != report.shape_before.vocabulary) card.origin.emplace_back("ids of tokens", "are others than those of " + base_name + "; vocabulary_map.json lists them");
  if (fresh) card.origin.emplace_back("weights", "normal, by seed " + std::to_string(config.seed));
  for (const Json& store : report.evaluation)
    if (store["before"].is_object())
      card.measures.push_back({.what = "bits per UTF-8 byte, " + store["name"].get<std::string>(), .before = figure(store["before"].value("bits_per_byte", 0.0)), .after = store["after"].is_object() ? figure(store["after"].value("bits_per_byte", 0.0)) : "not measured"});
  return card;
}

}  // namespace

void HeldOutConfig::visit(FieldVisitor& fields) {
  fields.list("stores", stores, {.help = "held-out token stores on which the model and the student are measured"});
  fields.field("row_length", row_length, {.help = "most tokens of context", .unit = "tokens", .low = 2, .high = 1 << 20});
  fields.field("max_tokens", max_tokens, {.help = "tokens read of each store, rounded up to whole documents; 0: all", .unit = "tokens", .low = 0, .high = 1e15});
}

void PruneConfig::visit(FieldVisitor& fields) {
  fields.field("model", model, {.help = "Hugging Face folder of the model that the student is made from", .required = true});
  fields.field("output", output, {.help = "model folder to make", .required = true});
  fields.field("weights", weights, {.help = "pruned: the model's own, cut down; fresh: normal with config.json's initializer_range (0.02 where it has none), for a student of other sizes in the same family", .choices = {"pruned", "fresh"}});
  fields.field("keep", keep, {.help = "share of the model's parameters that the student may have, its embedding included; 0: as sizes and vocabulary say", .low = 0, .high = 1});
  fields.field("shrink", shrink, {.help = "what keep makes smaller, all by one factor: hidden, mlp, heads, depth; sizes that are given stay"});
  fields.field("round_to", round_to, {.help = "hidden and intermediate size are multiples of it where keep chooses them", .low = 1, .high = 4096});
  fields.group("sizes", "sizes that are given", sizes);
  fields.field("depth_by", depth_by, {.help = "which layers go: those that turn the residual stream least (block influence), or one at a time the one without which the loss is least", .choices = {"influence", "loss"}});
  fields.group("calibration", "the text on which the model's parts are scored", calibration);
  fields.group("vocabulary", "a smaller vocabulary", vocabulary);
  fields.group("evaluation", "held-out text", evaluation);
  fields.field("compute_type", compute_type, {.help = "of calibration and evaluation", .choices = {"f32", "bf16"}});
  fields.field("seed", seed, {.help = "of fresh weights"});
  fields.field("threads", threads, {.help = "processor threads; 0: all. The same number gives the same bits", .low = 0, .high = 4096});
  fields.field("name", name, {.help = "the student's name in its card; empty: the output folder's"});
  fields.field("base_name", base_name, {.help = "the model's name in the card, for example org/model; empty: its folder's"});
}

void check(const PruneConfig& config) {
  std::string problems;
  const auto problem = [&](const std::string& line) { problems += (problems.empty() ? "" : "\n") + line; };
  static const std::vector<std::string> kAxes = {"hidden", "mlp", "heads", "depth"};
  for (const std::string& axis : config.shrink)
    if (std::find(kAxes.begin(), kAxes.end(), axis) == kAxes.end()) {
      const std::string nearest = nearest_name(axis, kAxes);
      problem("shrink: " + to_line(Json(axis)) + " must be hidden, mlp, heads or depth" + (nearest.empty() ? "" : "; did you mean " + nearest + "?"));
    }
  const SizesConfig& sizes = config.sizes;
  if (!sizes.layers.empty() && sizes.num_hidden_layers > 0) problem("sizes: layers and num_hidden_layers exclude each other");
  if (config.weights == "fresh" && !sizes.layers.empty()) problem("sizes.layers: fresh weights come from no layer; give num_hidden_layers");
  const bool some_size = sizes.hidden_size > 0 || sizes.intermediate_size > 0 || sizes.num_attention_heads > 0 || sizes.num_key_value_heads > 0 || sizes.num_hidden_layers > 0 || !sizes.layers.empty();
  if (config.keep == 0 && !some_size && config.vocabulary.stores.empty() && config.weights != "fresh") problem("neither keep nor a size nor vocabulary.stores is given, so nothing would be pruned");
  if (config.keep > 0 && config.shrink.empty() && config.vocabulary.stores.empty()) problem("keep: nothing may shrink");
  std::set<std::string> names;
  for (const train::EvaluationItem& item : config.evaluation.stores)
    if (!names.insert(item.name).second) problem("evaluation.stores: two are called \"" + item.name + "\"");
  if (!problems.empty()) fail(ErrorKind::kUsage, problems);
}

Json PruneReport::json() const {
  return {{"output", output.string()}, {"already_done", already_done}, {"parameters_before", parameters_before}, {"parameters", parameters}, {"bytes_before", bytes_before}, {"bytes", bytes},
          {"shape_before", shape_before.json()}, {"shape", shape.json()}, {"layers", layers}, {"evaluation", evaluation}, {"warnings", warnings}};
}

PruneReport prune(const PruneConfig& given) {
  PruneConfig config = given;
  check(config);
  if (config.threads > 0) at::set_num_threads(static_cast<int>(config.threads));
  config.output = fs::absolute(config.output).lexically_normal();
  if (!config.output.has_filename()) config.output = config.output.parent_path();
  const bool fresh = config.weights == "fresh";

  const checkpoints::BaseWeights base(config.model, {});
  if (base.stored_format() != "none") fail(ErrorKind::kData, config.model.string(), ": is quantised (", base.stored_format(), ")", Remedy{"name the dense model"});
  const models::ModelConfig& model = base.config();
  const std::string tokenizer_hash = fs::exists(config.model / "tokenizer.json") ? data::Tokenizer::from_file(config.model).hash() : "";
  const std::vector<data::TokenStore> calibration = opened(config.calibration.stores), vocabulary_stores = opened(config.vocabulary.stores);
  std::vector<data::TokenStore> held_out;
  for (const train::EvaluationItem& item : config.evaluation.stores) held_out.emplace_back(item.store);
  for (const auto* stores : {&calibration, &vocabulary_stores, &std::as_const(held_out)}) check_stores(*stores, tokenizer_hash, model.vocabulary_size);

  PruneReport report;
  report.output = config.output;
  report.shape_before = shape_of(model);
  report.parameters_before = model.num_parameters();
  report.bytes_before = base.tensors().num_bytes();
  const Json inputs = inputs_of(config, base.tensors(), calibration, vocabulary_stores, held_out);
  if (fs::exists(fs::symlink_status(config.output))) {
    const fs::path manifest_path = config.output / "manifest.json";
    const Json manifest = fs::exists(manifest_path) ? read_json_file(manifest_path) : Json();
    if (!manifest.is_object() || manifest.value("made", "") != kMade || manifest.value("inputs", Json()) != inputs)
      fail(ErrorKind::kUsage, config.output.string(), " exists and is another folder than the student would be", Remedy{"choose another output, or remove it"});
    checkpoints::check_manifest(config.output);
    const models::ModelConfig made = models::read_model_config(config.output);
    report.shape = shape_of(made);
    report.parameters = made.num_parameters();
    report.bytes = checkpoints::FolderTensors(config.output).num_bytes();
    for (const Json& layer : require<Json>(manifest, "layers", manifest_path.string())) report.layers.push_back(layer.get<std::int64_t>());
    report.evaluation = require<Json>(manifest, "evaluation", manifest_path.string());
    report.already_done = true;
    log_info(config.output.string(), ": this student is there already, whole; nothing was written");
    return report;
  }

  std::unique_ptr<SmallerVocabulary> vocabulary;
  if (!vocabulary_stores.empty()) {
    vocabulary = std::make_unique<SmallerVocabulary>(config.model, model.vocabulary_size, vocabulary_stores, config.vocabulary);
    log_info("vocabulary: ", vocabulary->old_ids().size(), " tokens stay of ", model.vocabulary_size, " rows");
  }
  report.shape = chosen_shape(model, config.sizes, config.keep, config.shrink, config.round_to, vocabulary ? vocabulary->rows() : model.vocabulary_size, fresh);
  const Shape& shape = report.shape;

  // Which layers, then which parts of them.
  const bool less_deep = shape.layers < model.num_layers && config.sizes.layers.empty() && !fresh;
  const bool less_wide = !fresh && (shape.hidden < model.hidden_size || shape.intermediate < model.intermediate_size || shape.heads < model.num_heads || shape.kv_heads < model.num_kv_heads);
  if ((less_deep || less_wide) && calibration.empty())
    fail(ErrorKind::kUsage, "calibration.stores: which parts matter is measured on text, and none is named", Remedy{"name token stores made by prepare with this model's tokenizer"});
  std::vector<std::int64_t> layers(static_cast<std::size_t>(fresh ? 0 : model.num_layers));
  std::iota(layers.begin(), layers.end(), 0);
  if (!config.sizes.layers.empty()) layers = layer_numbers(config.sizes.layers, model.num_layers);
  Importance importance;
  if (less_deep || less_wide || !held_out.empty()) {
    const at::NoGradGuard no_gradients;
    const models::Decoder decoder = loaded(config.model, config, !held_out.empty() || (less_deep && config.depth_by == "loss"));
    for (std::size_t i = 0; i < held_out.size(); ++i)
      report.evaluation.push_back({{"name", config.evaluation.stores[i].name}, {"before", evaluated(decoder, held_out[i], config.evaluation)}, {"after", nullptr}});
    if (less_deep && config.depth_by == "loss") layers = layers_by_loss(decoder, shape.layers, calibration, config.calibration);
    else if (less_deep) layers = layers_by_influence(measure_importance(decoder, calibration, config.calibration).block_influence_L, shape.layers);
    if (less_wide) importance = measure_importance(with_layers(decoder, layers), calibration, config.calibration);
  }
  report.layers = layers;
  models::ModelConfig renamed = model;
  if (vocabulary) renamed.source = vocabulary->with_new_ids(model.source);
  const Json student_json = student_config(renamed, shape, layers);
  const models::ModelConfig student = models::read_model_config(student_json, "config.json of the student");
  report.parameters = student.num_parameters();

  Parts parts;
  if (!fresh) parts = chosen_parts(model, shape, layers, importance);
  if (vocabulary) {
    at::Tensor ids = at::empty({static_cast<std::int64_t>(vocabulary->old_ids().size())}, at::kLong);
    std::copy(vocabulary->old_ids().begin(), vocabulary->old_ids().end(), ids.mutable_data_ptr<std::int64_t>());
    parts.tokens = ids;
  }
  const std::vector<TensorPlace> base_places = tensor_places(model), places = tensor_places(student);
  const auto twin_of = [&](const TensorPlace& place) -> const TensorPlace& {  // what the student's tensor is cut from, or gets its type from
    const std::int64_t layer = place.layer < 0 ? place.layer : fresh ? place.layer % model.num_layers : layers.at(static_cast<std::size_t>(place.layer));
    for (const TensorPlace& twin : base_places)
      if (twin.slot == place.slot && twin.is_bias == place.is_bias && twin.layer == layer) return twin;
    fail(ErrorKind::kBug, "the base has no tensor for ", place.name);
  };
  const double deviation = value_or<double>(model.source, "initializer_range", 0.02, "config.json");
  const auto made = [&](const TensorPlace& place) {
    const std::string& name = twin_of(place).name;
    if (fresh) return fresh_tensor(place, student, deviation, config.seed).to(base.tensors().type(name));
    return cut_tensor(base.tensors().tensor(name), place, parts, model);
  };
  std::vector<checkpoints::TensorToWrite> tensors;
  std::uint64_t num_bytes = 0;
  for (const TensorPlace& place : places) {
    const at::ScalarType type = base.tensors().type(twin_of(place).name);
    tensors.push_back({place.name, type, place.shape});
    num_bytes += static_cast<std::uint64_t>(c10::multiply_integers(place.shape)) * c10::elementSize(type);
  }
  constexpr std::uint64_t kOtherFiles = 64ull << 20;
  if (const std::uint64_t free = free_bytes(config.output); free < num_bytes + kOtherFiles)
    fail(ErrorKind::kResource, config.output.string(), ": ", free / 1'000'000, " MB are free, ", (num_bytes + kOtherFiles) / 1'000'000, " MB are needed", Remedy{"free space, or choose another output"});

  const checkpoints::TemporaryFolder temporary(config.output);
  checkpoints::copy_companions(config.model, temporary.path());
  write_file(temporary.path() / "config.json", student_json.dump(2) + "\n");
  if (vocabulary) vocabulary->write(temporary.path());
  const auto written = checkpoints::write_weights(temporary.path(), tensors, [&](std::size_t i) {
    at::Tensor tensor = made(places[i]).contiguous();
    if (tensor.sizes() != at::IntArrayRef(places[i].shape)) fail(ErrorKind::kBug, places[i].name, ": cut to ", to_line(Json(tensor.sizes().vec())), " instead of ", to_line(Json(places[i].shape)));
    return tensor;
  });

  // What lies on the disk now, read as any other model folder.
  const checkpoints::FolderTensors again(temporary.path());
  report.bytes = again.num_bytes();
  for (const TensorPlace& place : places)
    if (!at::equal(again.tensor(place.name), made(place)))
      fail(ErrorKind::kResource, temporary.path().string(), ": tensor \"", place.name, "\" does not read as it was written", Remedy{"the disk does not keep what is written to it; use another one"});
  if (shape_of(checkpoints::BaseWeights(temporary.path(), {}).config()) != shape) fail(ErrorKind::kBug, "the written config.json has other sizes");
  if (!held_out.empty()) {
    const models::Decoder decoder = loaded(temporary.path(), config, true);
    for (std::size_t i = 0; i < held_out.size(); ++i) {
      Json& after = report.evaluation[i]["after"];
      if (!vocabulary) {
        after = evaluated(decoder, held_out[i], config.evaluation);
        continue;
      }
      const checkpoints::TemporaryFolder scratch(config.output.parent_path() / (config.output.filename().string() + ".held-out"));
      const fs::path mapped = scratch.path() / "store";
      if (vocabulary->write_store(held_out[i], mapped)) after = evaluated(decoder, data::TokenStore(mapped), config.evaluation);
      else log_warning(held_out[i].folder().string(), ": holds tokens that the smaller vocabulary has no pieces for, so the student is not measured on it");
    }
  }

  const checkpoints::CardInfo card = card_of(config, report, importance);
  report.warnings = checkpoints::licence_warnings(card);
  for (const std::string& warning : report.warnings) log_warning(warning);
  write_file(temporary.path() / "README.md", checkpoints::model_card(card));
  checkpoints::write_manifest(temporary.path(), {{"made", kMade}, {"inputs", inputs}, {"shape_before", report.shape_before.json()}, {"shape", shape.json()}, {"layers", layers}, {"evaluation", report.evaluation}}, written);
  commit_folder(temporary.path(), config.output);
  return report;
}

}  // namespace alambic::distill
