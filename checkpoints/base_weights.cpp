// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/base_weights.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>

#include "checkpoints/bitsandbytes.h"
#include "checkpoints/safetensors.h"
#include "core/error.h"
#include "core/files.h"
#include "core/json.h"
#include "core/log.h"
#include "models/decoder.h"

namespace alambic::checkpoints {
namespace {

constexpr const char* kHeadName = "lm_head.weight";
constexpr const char* kEmbeddingName = "model.embed_tokens.weight";

// Rotary frequencies that old transformers versions saved; they follow from config.json and are computed anew.
bool is_harmless_leftover(std::string_view name) { return name.ends_with("rotary_emb.inv_freq"); }

std::string joined(const std::vector<std::string>& problems) {
  std::string text;
  for (const std::string& problem : problems) text += (text.empty() ? "" : "; ") + problem;
  return text;
}

/// True when the head is the embedding. config.json's word is taken, except where the stored values contradict it.
bool head_is_tied(const models::ModelConfig& config, const FolderTensors& tensors, const fs::path& folder) {
  if (!config.tied_head || !tensors.contains(kHeadName) || !tensors.contains(kEmbeddingName)) return config.tied_head;
  if (tensors.type(kHeadName) == tensors.type(kEmbeddingName) && tensors.shape(kHeadName) == tensors.shape(kEmbeddingName) &&
      at::equal(tensors.tensor(kHeadName), tensors.tensor(kEmbeddingName)))
    return true;
  log_warning(folder.string(), ": config.json ties the head to the embedding, but ", kHeadName, " is stored with other values; it is used as a head of its own");
  return false;
}

std::string shape_text(const std::vector<std::int64_t>& shape) { return to_line(Json(shape)); }

/// Fails with all of what is missing, unclaimed or misshapen; returns when every tensor expected is there, and no other but
/// the parts of those that are quantised, whose own shapes and types are checked when they are read.
void check_tensors(const std::vector<std::pair<std::string, std::vector<std::int64_t>>>& expected, bool tied, const FolderTensors& tensors,
                   const std::set<std::string>& quantized, const std::set<std::string>& parts, const fs::path& folder) {
  constexpr std::size_t kMostSuggestions = 20;  // finding near names is quadratic
  std::set<std::string> wanted;
  for (const auto& [name, shape] : expected) wanted.insert(name);
  std::vector<std::string> unclaimed;
  for (const std::string& name : tensors.names())
    if (!wanted.contains(name) && !is_harmless_leftover(name) && !(tied && name == kHeadName) && !parts.contains(name)) unclaimed.push_back(name);

  std::vector<std::string> problems;
  for (const auto& [name, shape] : expected) {
    if (!tensors.contains(name)) {
      const std::string near = problems.size() < kMostSuggestions ? nearest_name(name, unclaimed) : "";
      problems.push_back("missing \"" + name + "\" " + shape_text(shape) + (near.empty() ? "" : " (did you mean \"" + near + "\"?)"));
    } else if (quantized.contains(name)) {
      continue;
    } else if (tensors.shape(name) != shape) {
      problems.push_back("\"" + name + "\" has shape " + shape_text(tensors.shape(name)) + ", config.json asks for " + shape_text(shape));
    } else if (!at::isFloatingType(tensors.type(name))) {
      problems.push_back("\"" + name + "\" is stored as " + toString(tensors.type(name)) + ", which is no weight");
    }
  }
  const std::vector<std::string> known(wanted.begin(), wanted.end());
  for (const std::string& name : unclaimed) {
    const std::string near = problems.size() < kMostSuggestions ? nearest_name(name, known) : "";
    problems.push_back("unclaimed \"" + name + "\" " + shape_text(tensors.shape(name)) + (near.empty() ? "" : " (the nearest known name is \"" + near + "\")"));
  }
  if (!problems.empty())
    fail(ErrorKind::kData, folder.string(), ": config.json and the weights disagree in ", problems.size(), problems.size() == 1 ? " place: " : " places: ",
         joined(problems), Remedy{"config.json and weights must come from one version of one model"});
}

}  // namespace

BaseWeights::BaseWeights(const fs::path& folder, const lora::BaseQuantization& quantization)
    : folder_(folder), tensors_(folder), config_(models::read_model_config(folder)), quantization_(quantization) {
  stored_format_ = checkpoints::stored_format(config_.source, (folder / "config.json").string());
  if (stored_format_ != "none" && quantization.is_on() && quantization.format != stored_format_)
    fail(ErrorKind::kUsage, "quantize_base: ", quantization.format, ": ", folder.string(), " is quantised already, as ", stored_format_, Remedy{"leave quantize_base out, or take the dense model"});
  if (config_.tied_head && !head_is_tied(config_, tensors_, folder)) {
    config_.tied_head = false;
    config_.source["tie_word_embeddings"] = false;
  }
  models::Decoder structure = models::make_decoder(config_);
  std::set<std::string> parts;
  for (const models::NamedLinear& named : structure.linears()) {
    const std::string name = named.path + ".weight";
    if (named.layer >= 0) block_weights_.insert(name);
    const std::vector<std::string> found = quantized_parts(tensors_, name, stored_format_);
    if (!found.empty()) stored_quantized_.insert(name);
    parts.insert(found.begin(), found.end());
  }
  const auto expected = models::expected_shapes(config_);
  check_tensors(expected, config_.tied_head, tensors_, stored_quantized_, parts, folder);
  shapes_.insert(expected.begin(), expected.end());
  if (stored_format_ != "none" && stored_quantized_.empty())
    fail(ErrorKind::kData, folder.string(), ": config.json says that bitsandbytes quantised the weights, but none of them is", Remedy{"fetch the folder again, or remove quantization_config from a dense model's config.json"});
}

std::string BaseWeights::trained_format() const { return stored_format_ != "none" ? stored_format_ : lora::name_of(quantization_); }

bool BaseWeights::is_quantized(const std::string& name) const {
  return stored_quantized_.contains(name) || (stored_format_ == "none" && quantization_.is_on() && block_weights_.contains(name));
}

std::shared_ptr<const models::FrozenWeight> BaseWeights::frozen(const std::string& name) const {
  if (!is_quantized(name)) return nullptr;
  if (stored_quantized_.contains(name)) return load_quantized(tensors_, name, shape(name), stored_format_, folder_.string());
  at::Tensor dense_OI = tensors_.tensor(name);
  if (const std::int64_t bad = first_non_finite(dense_OI); bad >= 0)
    fail(ErrorKind::kData, folder_.string(), ": tensor \"", name, "\" is not finite at element ", bad, " as ", toString(dense_OI.scalar_type()),
         Remedy{"these weights are damaged: fetch them again"});
  if (dense_OI.scalar_type() == at::kDouble) dense_OI = dense_OI.to(at::kFloat);
  std::shared_ptr<const models::FrozenWeight> made = lora::quantize(dense_OI, quantization_);
  tensors_.release(name);
  return made;
}

at::Tensor BaseWeights::tensor(const std::string& name) const {
  const std::shared_ptr<const models::FrozenWeight> quantized = frozen(name);
  if (!quantized) return tensors_.tensor(name);
  const at::Tensor dense_OI = at::empty({quantized->outputs(), quantized->inputs()}, at::kFloat);
  quantized->dense_into(dense_OI);
  return dense_OI;
}

const std::vector<std::int64_t>& BaseWeights::shape(const std::string& name) const {
  const auto found = shapes_.find(name);
  if (found == shapes_.end()) fail(ErrorKind::kBug, folder_.string(), ": the model has no weight \"", name, "\"");
  return found->second;
}

std::set<at::ScalarType> BaseWeights::dense_types() const {
  std::set<at::ScalarType> types;
  for (const std::string& name : tensors_.names())
    if (at::isFloatingType(tensors_.type(name)) && shapes_.contains(name)) types.insert(tensors_.type(name));
  return types;
}

}  // namespace alambic::checkpoints
