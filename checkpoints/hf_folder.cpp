// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/hf_folder.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <map>
#include <set>

#include "checkpoints/base_weights.h"
#include "checkpoints/load_shards.h"
#include "checkpoints/safetensors.h"
#include "core/error.h"
#include "core/files.h"
#include "core/json.h"
#include "core/log.h"
#include "lora/stored_weight.h"
#include "parallel/communicator.h"

namespace alambic::checkpoints {
namespace {

constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";
bool is_bare_file_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos && name.find('\0') == std::string::npos;
}

bool is_shard_name(const std::string& name) {  // model-00001-of-00002.safetensors
  return name.starts_with("model-") && name.ends_with(".safetensors") && name.find("-of-") != std::string::npos;
}

std::string joined(const std::vector<std::string>& problems) {
  std::string text;
  for (const std::string& problem : problems) text += (text.empty() ? "" : "; ") + problem;
  return text;
}

[[noreturn]] void fail_without_weights(const fs::path& folder) {
  if (!fs::is_directory(folder))
    fail(ErrorKind::kData, folder.string(), ": is not a model folder",
         folder.extension() == ".gguf" ? Remedy{"import it first: alambic import FILE.gguf FOLDER"} : Remedy{"give the folder that holds config.json and model.safetensors"});
  bool pickled = false, gguf = false;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string extension = entry.path().extension().string();
    pickled = pickled || extension == ".bin" || extension == ".pt" || extension == ".pth";
    gguf = gguf || extension == ".gguf";
  }
  const Remedy remedy{fs::exists(folder / "adapter_model.safetensors") ? "this is an adapter: give it with --adapter, and its base with --model"
                      : gguf                                           ? "import the GGUF file first: alambic import FILE.gguf FOLDER"
                      : pickled ? "pickled weights (.bin, .pt) can run code when opened and are never read: save the model as safetensors"
                                : "give the folder that holds config.json and the weights"};
  fail(ErrorKind::kData, folder.string(), ": holds neither ", kSingleFile, " nor ", kIndexFile, remedy);
}

}  // namespace

fs::path file_of_folder(const fs::path& folder, const std::string& name) {
  const fs::path path = folder / name;
  const fs::file_status status = fs::symlink_status(path);
  if (!fs::exists(status)) return {};
  if (fs::is_symlink(status)) {
    std::error_code broken;
    const fs::path target = fs::canonical(path, broken);
    if (broken) fail(ErrorKind::kData, path.string(), ": is a symbolic link that leads nowhere", Remedy{"fetch the file itself"});
    const fs::path home = fs::canonical(folder);
    const bool cached = home.parent_path().filename() == "snapshots" && target.parent_path() == home.parent_path().parent_path() / "blobs";
    if (!cached && target.parent_path() != home)
      fail(ErrorKind::kData, path.string(), ": is a symbolic link out of the folder, to ", target.string(), Remedy{"put the file itself into the folder"});
  }
  if (!fs::is_regular_file(path)) fail(ErrorKind::kData, path.string(), ": not a regular file");
  return path;
}

struct FolderTensors::State {
  fs::path folder;
  std::map<std::string, SafetensorsFile> files;             // by file name
  std::map<std::string, const SafetensorsFile*> owner;      // tensor -> file
  std::uint64_t num_bytes = 0;

  explicit State(const fs::path& from) : folder(from) {
    std::error_code ignored;
    if (!fs::is_directory(folder, ignored)) fail_without_weights(folder);
    const fs::path single = file_of_folder(folder, kSingleFile), index = file_of_folder(folder, kIndexFile);
    if (single.empty() && index.empty()) fail_without_weights(folder);
    if (!single.empty() && !index.empty())
      fail(ErrorKind::kData, folder.string(), ": holds both ", kSingleFile, " and ", kIndexFile, "; which of them counts is not said",
           Remedy{"remove the one that is out of date"});
    if (index.empty()) open(kSingleFile);
    else open_shards(index);
    for (const auto& [name, file] : files) num_bytes += fs::file_size(file.path());
  }

  void open(const std::string& name) {
    const SafetensorsFile& file = files.emplace(name, SafetensorsFile(folder / name)).first->second;
    for (const auto& [tensor, entry] : file.entries()) owner.emplace(tensor, &file);
  }

  void open_shards(const fs::path& index) {
    const Json json = read_json_file(index);
    const Json weight_map = require<Json>(json, "weight_map", index.string());
    if (!weight_map.is_object() || weight_map.empty()) fail(ErrorKind::kData, index.string(), ": \"weight_map\" must name the file of each tensor");
    std::map<std::string, std::set<std::string>> listed;  // file -> tensors
    for (const auto& [tensor, file] : weight_map.items()) {
      if (!file.is_string() || !is_bare_file_name(file.get<std::string>()) || !file.get<std::string>().ends_with(".safetensors"))
        fail(ErrorKind::kData, index.string(), ": tensor \"", tensor, "\" is said to be in ", to_line(file), ", which is no name of a safetensors file in this folder");
      listed[file.get<std::string>()].insert(tensor);
    }
    std::vector<std::string> problems;
    for (const auto& [file, tensors] : listed)
      if (file_of_folder(folder, file).empty()) problems.push_back(file + " is missing");
    for (const auto& entry : fs::directory_iterator(folder)) {
      const std::string name = entry.path().filename().string();
      if (is_shard_name(name) && !listed.contains(name)) problems.push_back(name + " is in the folder but not in the index");
    }
    if (!problems.empty()) fail(ErrorKind::kData, index.string(), ": ", joined(problems), Remedy{"fetch the whole folder again"});

    for (const auto& [name, tensors] : listed) {
      const SafetensorsFile& file = files.emplace(name, SafetensorsFile(folder / name)).first->second;
      for (const std::string& tensor : tensors)
        if (file.entries().contains(tensor)) owner.emplace(tensor, &file);
        else problems.push_back("tensor \"" + tensor + "\" is not in " + name);
      for (const auto& [tensor, entry] : file.entries())
        if (!tensors.contains(tensor)) problems.push_back("tensor \"" + tensor + "\" in " + name + " is not listed for it");
    }
    if (!problems.empty()) fail(ErrorKind::kData, index.string(), ": ", joined(problems), Remedy{"index and shards belong to different versions: fetch the whole folder again"});
  }

  const SafetensorsFile& file_of(const std::string& name) const {
    const auto found = owner.find(name);
    if (found != owner.end()) return *found->second;
    std::vector<std::string> known;
    for (const auto& [tensor, file] : owner) known.push_back(tensor);
    const std::string near = nearest_name(name, known);
    fail(ErrorKind::kData, folder.string(), ": holds no tensor \"", name, "\"", near.empty() ? "" : "; the nearest name is \"" + near + "\"");
  }
};

FolderTensors::FolderTensors(const fs::path& folder) : state_(std::make_unique<State>(folder)) {}
FolderTensors::~FolderTensors() = default;

std::vector<std::string> FolderTensors::names() const {
  std::vector<std::string> names;
  for (const auto& [name, file] : state_->owner) names.push_back(name);
  return names;
}
bool FolderTensors::contains(const std::string& name) const { return state_->owner.contains(name); }
at::ScalarType FolderTensors::type(const std::string& name) const { return state_->file_of(name).entries().at(name).type; }
std::vector<std::int64_t> FolderTensors::shape(const std::string& name) const { return state_->file_of(name).entries().at(name).shape; }
at::Tensor FolderTensors::tensor(const std::string& name) const { return state_->file_of(name).tensor(name); }
at::Tensor FolderTensors::slice(const std::string& name, std::int64_t first, std::int64_t count) const { return state_->file_of(name).slice(name, first, count); }
at::Tensor FolderTensors::tensor_as(const std::string& name, at::ScalarType type) const { return state_->file_of(name).tensor_as(name, type); }
void FolderTensors::release(const std::string& name) const { state_->file_of(name).release(name); }
std::uint64_t FolderTensors::num_bytes() const { return state_->num_bytes; }

std::string FolderTensors::hash() const {
  std::map<std::string, std::string> hashes{{"config.json", sha256_of_file(state_->folder / "config.json")}};
  for (const auto& [name, file] : state_->files) hashes.emplace(name, sha256_of_file(file.path()));
  std::string text;
  for (const auto& [name, hash] : hashes) text += hash + "  " + name + "\n";
  return sha256_of(text);
}

std::string base_hash(const fs::path& folder) { return FolderTensors(folder).hash(); }

std::size_t Sharing::part() const { return static_cast<std::size_t>(ranks.rank() % group); }

models::Decoder load_decoder(const fs::path& folder, at::ScalarType compute_type, const lora::BaseQuantization& quantization, Linears kept, const std::optional<Sharing>& sharing) {
  const BaseWeights weights(folder, quantization);
  models::Decoder decoder = models::make_decoder(weights.config());
  if (sharing && sharing->group > 1) load_shards(decoder, weights, compute_type, quantization, *sharing, folder);
  std::set<const at::Tensor*> norms{&decoder.final_norm_D};
  std::map<const at::Tensor*, models::Linear*> linears;
  for (const models::Block& block : decoder.blocks)
    for (const auto& [slot, norm] : block.norms) norms.insert(&norm);
  for (const models::NamedLinear& named : decoder.linears()) linears.emplace(&named.linear->weight_OI, named.linear);
  for (const models::NamedTensor& named : decoder.tensors()) {
    const auto linear = linears.find(named.tensor);
    if (std::shared_ptr<const models::FrozenWeight> frozen = weights.frozen(named.name); frozen && linear != linears.end() && linear->second != &decoder.head) {
      linear->second->quantized = std::move(frozen);
      linear->second->quantized_compute = compute_type;
      continue;
    }
    at::ScalarType type = norms.contains(named.tensor) ? at::kFloat : compute_type;
    const bool is_quantized = weights.is_quantized(named.name), is_matrix = linear != linears.end() || named.tensor == &decoder.embedding_VD,
               stays = !is_quantized && is_matrix && kept == Linears::kAsStored && type == at::kFloat && at::isReducedFloatingType(weights.tensors().type(named.name));
    if (stays) type = weights.tensors().type(named.name);
    const at::Tensor loaded = is_quantized ? weights.tensor(named.name).to(type) : weights.tensors().tensor_as(named.name, type);
    // After the conversion, which can itself overflow; the values are still in the processor's cache then.
    if (const std::int64_t bad = first_non_finite(loaded); bad >= 0)
      fail(ErrorKind::kData, folder.string(), ": tensor \"", named.name, "\" is not finite at element ", bad, " as ", toString(loaded.scalar_type()),
           Remedy{"these weights are damaged: fetch them again"});
    if (stays && linear != linears.end()) lora::keep_as_stored(*linear->second, loaded);
    else *named.tensor = loaded;
  }
  lora::tie_head(decoder);
  return decoder;
}

std::vector<std::pair<std::string, std::string>> write_weights(
    const fs::path& folder, const std::vector<std::pair<std::string, std::vector<std::int64_t>>>& names_and_shapes, at::ScalarType type,
    const std::function<at::Tensor(std::size_t)>& make, std::uint64_t max_shard_bytes) {
  std::vector<TensorToWrite> tensors;
  for (const auto& [name, shape] : names_and_shapes) tensors.push_back({name, type, shape});
  return write_weights(folder, tensors, [&](std::size_t i) { return make(i).to(type); }, max_shard_bytes);
}

std::vector<std::pair<std::string, std::string>> write_weights(const fs::path& folder, const std::vector<TensorToWrite>& all,
                                                               const std::function<at::Tensor(std::size_t)>& make, std::uint64_t max_shard_bytes) {
  std::vector<std::vector<std::size_t>> shards(1);
  std::uint64_t shard_bytes = 0, total_bytes = 0, total_parameters = 0;
  for (std::size_t i = 0; i < all.size(); ++i) {
    std::uint64_t count = 1;
    for (const std::int64_t size : all[i].shape) count *= static_cast<std::uint64_t>(size);
    const std::uint64_t num_bytes = count * c10::elementSize(all[i].type);
    if (shard_bytes > 0 && shard_bytes + num_bytes > max_shard_bytes) shards.emplace_back(), shard_bytes = 0;
    shards.back().push_back(i);
    shard_bytes += num_bytes;
    total_bytes += num_bytes;
    total_parameters += count;
  }

  std::vector<std::pair<std::string, std::string>> written;
  std::map<std::string, std::string> weight_map;
  for (std::size_t s = 0; s < shards.size(); ++s) {
    std::string name = kSingleFile;
    if (shards.size() > 1) {
      std::array<char, 64> text{};
      std::snprintf(text.data(), text.size(), "model-%05zu-of-%05zu.safetensors", s + 1, shards.size());
      name = text.data();
    }
    std::vector<TensorToWrite> tensors;
    for (const std::size_t i : shards[s]) {
      tensors.push_back(all[i]);
      weight_map.emplace(all[i].name, name);
    }
    written.emplace_back(name, write_safetensors(folder / name, tensors, [&](std::size_t k) { return make(shards[s][k]); }));
  }
  if (shards.size() > 1) {
    Json index{{"metadata", {{"total_parameters", total_parameters}, {"total_size", total_bytes}}}, {"weight_map", weight_map}};
    written.emplace_back(kIndexFile, write_file(folder / kIndexFile, index.dump(2) + "\n"));
  }
  return written;
}

std::string config_name_of(at::ScalarType weights) {
  switch (weights) {
    case at::kFloat: return "float32";
    case at::kBFloat16: return "bfloat16";
    case at::kHalf: return "float16";
    default: fail(ErrorKind::kBug, "weights of type ", toString(weights), " are not written");
  }
}

void describe_weights(const fs::path& folder, at::ScalarType weights, bool head_tied) {
  const bool was_tied = models::read_model_config(folder).tied_head;  // a family's default where the key is absent
  Json config = read_json_file(folder / "config.json");
  const Json before = config;
  const char* const key = config.contains("dtype") ? "dtype" : "torch_dtype";  // the newer name where the base uses it; both are read
  config[key] = config_name_of(weights);
  config.erase("quantization_config");  // of a quantised base: what is written is dense
  if (was_tied != head_tied) config["tie_word_embeddings"] = head_tied;
  if (config != before) write_file(folder / "config.json", config.dump(2) + "\n");
}

std::vector<std::string> copy_companions(const fs::path& from, const fs::path& to) {
  static const std::set<std::string> kNames = {
      "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
      "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"};
  static constexpr std::string_view kTexts[] = {"LICENSE", "LICENCE", "COPYING", "NOTICE", "USE_POLICY", "vocab."};
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(from)) {
    const std::string name = entry.path().filename().string();
    const bool text = std::any_of(std::begin(kTexts), std::end(kTexts), [&](std::string_view start) { return name.starts_with(start); });
    if ((text || kNames.contains(name)) && !entry.is_directory()) names.push_back(name);
  }
  if (fs::is_directory(from / "additional_chat_templates"))
    for (const auto& entry : fs::directory_iterator(from / "additional_chat_templates"))
      if (entry.path().extension() == ".jinja") names.push_back("additional_chat_templates/" + entry.path().filename().string());
  std::sort(names.begin(), names.end());
  for (const std::string& name : names) {
    const fs::path file = fs::path(name).filename(), folder = from / fs::path(name).parent_path();
    fs::create_directories((to / name).parent_path());
    write_file(to / name, read_file(file_of_folder(folder, file.string())));
  }
  return names;
}

}  // namespace alambic::checkpoints
