// SPDX-License-Identifier: Apache-2.0
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <ostream>

#include "checkpoints/bitsandbytes.h"
#include "checkpoints/gguf.h"
#include "checkpoints/hf_folder.h"
#include "checkpoints/licence.h"
#include "checkpoints/manifest.h"
#include "checkpoints/peft_folder.h"
#include "checkpoints/run_state.h"
#include "checkpoints/safetensors.h"
#include "cli/verbs.h"
#include "core/error.h"
#include "core/files.h"
#include "data/chat_template.h"
#include "data/prepare.h"
#include "data/token_store.h"
#include "data/tokenizer.h"
#include "distill/distill.h"
#include "distill/prune.h"
#include "distill/teacher_cache.h"
#include "distill/write_cache.h"
#include "models/config.h"
#include "train/train_config.h"

namespace alambic::cli {
namespace {

constexpr std::size_t kFirstBytes = 8;

std::string first_bytes(const fs::path& file) {
  const MappedFile mapped(file);
  return std::string(mapped.text().substr(0, kFirstBytes));
}

// Number of tensors, parameters and bytes by type.
class Tally {
 public:
  void add(const std::string& type, std::uint64_t num_elements) {
    Json& entry = by_type_[type];
    if (entry.is_null()) entry = {{"tensors", 0}, {"elements", 0}};
    entry["tensors"] = entry["tensors"].get<std::uint64_t>() + 1;
    entry["elements"] = entry["elements"].get<std::uint64_t>() + num_elements;
  }
  const Json& json() const { return by_type_; }

 private:
  Json by_type_ = Json::object();
};

std::uint64_t elements_of(const std::vector<std::int64_t>& shape) {
  std::uint64_t count = 1;
  for (const std::int64_t size : shape) count *= static_cast<std::uint64_t>(size);
  return count;
}

std::string type_name(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return "f32";
    case at::kBFloat16: return "bf16";
    case at::kHalf: return "f16";
    default: return c10::toString(type);
  }
}

Json inspect_model(const fs::path& folder) {
  const models::ModelConfig config = models::read_model_config(folder);
  const checkpoints::FolderTensors tensors(folder);
  Tally tally;
  for (const std::string& name : tensors.names()) tally.add(type_name(tensors.type(name)), elements_of(tensors.shape(name)));
  const checkpoints::Licence licence = checkpoints::licence_of_model(folder);
  Json report = {{"kind", "model"},
                 {"family", std::string(config.family->model_type)},
                 {"parameters", config.num_parameters()},
                 {"layers", config.num_layers},
                 {"hidden_size", config.hidden_size},
                 {"intermediate_size", config.intermediate_size},
                 {"heads", config.num_heads},
                 {"key_value_heads", config.num_kv_heads},
                 {"head_size", config.head_size},
                 {"vocabulary", config.vocabulary_size},
                 {"positions", config.max_positions},
                 {"head_tied", config.tied_head},
                 {"quantized", checkpoints::stored_format(config.source, (folder / "config.json").string())},
                 {"weights", tally.json()},
                 {"bytes", tensors.num_bytes()},
                 {"licence", licence.spdx.empty() ? Json(nullptr) : Json(licence.spdx)},
                 {"tokenizer", nullptr},
                 {"chat_template", data::read_chat_template(folder).has_value()},
                 {"manifest", nullptr}};
  if (fs::exists(folder / "tokenizer.json")) {
    const data::Tokenizer tokenizer = data::Tokenizer::from_file(folder);
    report["tokenizer"] = {{"vocabulary", tokenizer.vocabulary_size()}, {"hash", tokenizer.hash()}};
  }
  if (fs::exists(folder / "manifest.json")) {
    checkpoints::check_manifest(folder);
    report["manifest"] = "every file is as it was written";
  }
  return report;
}

Json inspect_adapter(const fs::path& folder) {
  lora::LoraConfig config = checkpoints::read_adapter_config(folder);
  const fs::path weights = folder / "adapter_model.safetensors";
  const checkpoints::SafetensorsFile file(weights);
  Tally tally;
  for (const auto& [name, entry] : file.entries()) tally.add(type_name(entry.type), elements_of(entry.shape));
  const fs::path source = folder / "adapter_config.json";
  const auto base_hash = file.metadata().find(checkpoints::kBaseHashKey);
  return {{"kind", "adapter"},
          {"base", value_or<std::string>(read_json_file(source), "base_model_name_or_path", "", source.string())},
          {"base_sha256", base_hash == file.metadata().end() ? Json(nullptr) : Json(base_hash->second)},
          {"base_quantization", lora::name_of(checkpoints::adapter_quantization(folder))},
          {"lora", resolved_config(config)},
          {"weights", tally.json()},
          {"bytes", fs::file_size(weights)}};
}

Json inspect_store(const fs::path& folder) {
  const data::TokenStore store(folder);
  Json sources = Json::array();
  for (const data::SourceInfo& source : store.info().sources)
    sources.push_back({{"name", source.name}, {"origin", source.origin}, {"licence", source.licence.empty() ? Json(nullptr) : Json(source.licence)}, {"language", source.language}});
  const data::StoreTotals& totals = store.totals();
  return {{"kind", "token_store"},
          {"hash", store.hash()},
          {"documents", totals.documents},
          {"tokens", totals.tokens},
          {"trained_tokens", totals.trained_tokens},
          {"trained_bytes", totals.bytes},
          {"words", totals.words},
          {"vocabulary", store.info().vocabulary_size},
          {"tokenizer_hash", store.info().tokenizer_hash},
          {"sources", sources},
          {"recipe", store.recipe()}};
}

Json inspect_cache(const fs::path& folder) {
  const distill::TeacherCache cache(folder);
  const distill::CacheTotals& totals = cache.totals();
  Json report = {{"kind", "teacher_cache"}, {"hash", cache.hash()}, {"shards", cache.num_shards()}, {"documents", totals.documents}, {"rows", totals.rows}, {"bytes", cache.file_bytes()},
                 {"bytes_per_row", totals.rows > 0 ? Json(static_cast<double>(cache.file_bytes()) / static_cast<double>(totals.rows)) : Json(nullptr)}};
  const Json header = distill::to_json(cache.header());
  for (const auto& [key, value] : header.items()) report[key == "kind" ? "signal" : key] = value;
  return report;
}

Json inspect_gguf(const fs::path& path) {
  const checkpoints::GgufFile file(path);
  Tally tally;
  for (const checkpoints::GgufTensor& tensor : file.tensors()) tally.add(tensor.type, elements_of(tensor.shape));
  Json metadata = Json::object();
  for (const auto& [key, value] : file.metadata().items())
    metadata[key] = value.is_array() && value.size() > 8 ? Json("a list of " + std::to_string(value.size())) : value;
  return {{"kind", "gguf"}, {"bytes", fs::file_size(path)}, {"tensors", file.tensors().size()}, {"weights", tally.json()}, {"metadata", metadata}};
}

Json inspect_safetensors(const fs::path& path) {
  const checkpoints::SafetensorsFile file(path);
  Tally tally;
  Json tensors = Json::array();
  for (const auto& [name, entry] : file.entries()) {
    tally.add(type_name(entry.type), elements_of(entry.shape));
    tensors.push_back({{"name", name}, {"type", type_name(entry.type)}, {"shape", entry.shape}});
  }
  return {{"kind", "safetensors"}, {"bytes", fs::file_size(path)}, {"weights", tally.json()}, {"metadata", file.metadata()}, {"tensors", tensors}};
}

Json inspect_checkpoint(const fs::path& folder) {
  const checkpoints::RunState state = checkpoints::load_checkpoint(folder);
  Tally tally;
  for (const auto& [name, tensor] : state.tensors) tally.add(type_name(tensor.scalar_type()), static_cast<std::uint64_t>(tensor.numel()));
  return {{"kind", "checkpoint"}, {"step", state.step}, {"weights", tally.json()}, {"progress", state.progress}, {"identity", state.identity}};
}

bool is_run(const fs::path& folder) { return fs::exists(folder / "metrics.jsonl") && fs::exists(folder / "config.json"); }

Json inspect_run(const fs::path& folder) {
  Json sound = Json::array(), damaged = Json::array();
  std::vector<fs::path> found;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder))
    if (entry.is_directory() && entry.path().filename().string().starts_with("checkpoint-") && entry.path().extension() != ".damaged") found.push_back(entry.path());
  std::sort(found.begin(), found.end(), [](const fs::path& a, const fs::path& b) {
    return std::pair(a.string().size(), a.string()) < std::pair(b.string().size(), b.string());
  });
  for (const fs::path& checkpoint : found) {
    const std::string damage = checkpoints::damage_of(checkpoint);
    if (damage.empty()) sound.push_back(checkpoint.filename().string());
    else damaged.push_back({{"checkpoint", checkpoint.filename().string()}, {"damage", printable(damage)}});
  }
  Json report = {{"kind", "run"}, {"finished", fs::exists(folder / "report.json")}, {"checkpoints", sound}, {"damaged", damaged}, {"config", read_json_file(folder / "config.json")}};
  if (report["finished"] == true) report["report"] = read_json_file(folder / "report.json");
  return report;
}

// A YAML file: the config of the verb whose reading has the fewest complaints, which are thrown where there are some.
Json inspect_config(const fs::path& path) {
  std::string best_verb, best_problems;
  std::optional<Json> found;
  const auto attempt = [&]<class Config>(const char* verb, Config*) {
    if (found) return;
    try {
      found = Json{{"kind", "config"}, {"of", verb}, {"config", resolved_config(read_config<Config>(path))}};
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::kUsage) throw;
      const auto lines = [](const std::string& text) { return std::count(text.begin(), text.end(), '\n'); };
      const std::string problems = error.what();
      if (best_verb.empty() || lines(problems) < lines(best_problems)) best_verb = verb, best_problems = problems;
    }
  };
  attempt("train", static_cast<train::TrainConfig*>(nullptr));
  attempt("prepare", static_cast<data::PrepareConfig*>(nullptr));
  attempt("distill", static_cast<distill::DistillConfig*>(nullptr));
  attempt("distill --cache", static_cast<distill::CacheConfig*>(nullptr));
  attempt("prune", static_cast<distill::PruneConfig*>(nullptr));
  if (!found) throw Error(ErrorKind::kUsage, best_problems, "it was read as the config of " + best_verb);
  return *found;
}

Json inspect(const fs::path& path) {
  const std::string name = printable(path.string());
  if (!fs::exists(path)) fail(ErrorKind::kData, name, ": there is no such file or folder", Remedy{"check the path"});
  if (fs::is_directory(path)) {
    if (fs::exists(path / "adapter_config.json")) return inspect_adapter(path);
    if (is_run(path)) return inspect_run(path);
    if (fs::exists(path / "index.json")) return inspect_store(path);
    if (distill::is_teacher_cache(path)) return inspect_cache(path);
    if (fs::exists(path / "state.safetensors")) return inspect_checkpoint(path);
    if (fs::exists(path / "config.json")) return inspect_model(path);
    fail(ErrorKind::kData, name, ": none of the folders alambic knows: no config.json, adapter_config.json, index.json or state.safetensors in it",
         Remedy{"a model, an adapter, a token store, a teacher cache, a run or a checkpoint can be inspected"});
  }
  if (!fs::is_regular_file(path)) fail(ErrorKind::kData, name, ": neither a regular file nor a folder");
  const std::string first = first_bytes(path);
  if (first.starts_with("GGUF")) return inspect_gguf(path);
  if (path.extension() == ".safetensors") return inspect_safetensors(path);
  if (path.extension() == ".yaml" || path.extension() == ".yml") return inspect_config(path);
  if (path.extension() == ".json" && fs::exists(path.parent_path() / "index.json")) return inspect_store(path.parent_path());
  fail(ErrorKind::kData, name, ": a file of a kind alambic does not know", Remedy{"a GGUF file, a .safetensors file or a .yaml config can be inspected"});
}

// JSON as indented lines for a person: "key: value", lists of plain values on one line, long lists shortened.
void print_tree(std::ostream& out, const Json& value, const std::string& indent) {
  constexpr std::size_t kMostItems = 20;
  const auto plain = [](const Json& item) { return item.is_string() ? printable(item.get<std::string>()) : to_line(item); };
  if (value.is_object()) {
    for (const auto& [key, item] : value.items()) {
      out << indent << printable(key) << ":";
      const bool nested = item.is_object() || (item.is_array() && std::any_of(item.begin(), item.end(), [](const Json& each) { return each.is_structured(); }));
      if (!nested) {
        out << " " << (item.is_null() ? "-" : plain(item)) << "\n";
      } else {
        out << "\n";
        print_tree(out, item, indent + "  ");
      }
    }
  } else {
    for (std::size_t i = 0; i < std::min(value.size(), kMostItems); ++i) out << indent << plain(value[i]) << "\n";
    if (value.size() > kMostItems) out << indent << "... and " << value.size() - kMostItems << " more\n";
  }
}

int run_inspect(const Arguments& arguments, const Terminal& terminal) {
  const fs::path path = arguments.positional(0);
  Json report = {{"path", printable(path.string())}};
  report.update(inspect(path));
  if (arguments.has("json")) print_json(terminal, report);
  else print_tree(terminal.out, report, "");
  return 0;
}

}  // namespace

Verb inspect_verb() {
  return {.name = "inspect",
          .summary = "what a model, adapter, token store, teacher cache, GGUF file, run or config holds",
          .description = "Recognises a model folder, an adapter, a token store, a teacher cache, a run or one of its checkpoints, a GGUF or safetensors file, or a config in YAML, checks it as "
                         "the other verbs would, and shows what it holds.",
          .positionals = {{.name = "PATH", .help = "the file or folder"}},
          .options = {json_option()},
          .examples = {{"alambic inspect runs/quickstart/base", "sizes, types, licence and tokenizer of a model"}, {"alambic inspect run.yaml --json", "a config with all its defaults"}},
          .run = run_inspect};
}

}  // namespace alambic::cli
