// SPDX-License-Identifier: Apache-2.0
#pragma once
// The weights of a model folder as a run trains on them: those of the blocks' linear layers may be quantised, by the folder
// itself (bitsandbytes) or by what the run asks for.
#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "checkpoints/hf_folder.h"
#include "lora/quantize.h"
#include "models/config.h"
#include "models/frozen_weight.h"

namespace alambic::checkpoints {

class BaseWeights {
 public:
  /// Reads config.json and the headers, and checks that config.json and the tensors fit each other: Error(kData) lists every
  /// missing, unclaimed or misshapen tensor with the nearest names. Error(kUsage): a quantisation other than the folder's.
  BaseWeights(const std::filesystem::path& folder, const lora::BaseQuantization& quantization);

  const FolderTensors& tensors() const { return tensors_; }
  const models::ModelConfig& config() const { return config_; }  // with the tie of head and embedding as the tensors have it
  /// "none", "nf4", "int8": as the folder keeps its weights.
  const std::string& stored_format() const { return stored_format_; }
  /// "none", "nf4", "nf4-single", "int8" (lora::name_of), or "nf4" and "int8" where the folder itself is quantised.
  std::string trained_format() const;

  bool is_quantized(const std::string& name) const;
  /// Where the tensor `name` is quantised: it, made anew at each call where the folder keeps it dense. nullptr else.
  std::shared_ptr<const models::FrozenWeight> frozen(const std::string& name) const;
  /// What the model computes with: f32 where it is quantised, else a view of what is stored.
  at::Tensor tensor(const std::string& name) const;
  const std::vector<std::int64_t>& shape(const std::string& name) const;
  bool contains(const std::string& name) const { return shapes_.contains(name); }
  /// Types of the tensors that are not quantised in the folder.
  std::set<at::ScalarType> dense_types() const;

 private:
  std::filesystem::path folder_;
  FolderTensors tensors_;
  models::ModelConfig config_;
  lora::BaseQuantization quantization_;
  std::string stored_format_;
  std::map<std::string, std::vector<std::int64_t>> shapes_;  // of all weights, as config.json gives them
  std::set<std::string> block_weights_;                      // of the blocks' linear layers
  std::set<std::string> stored_quantized_;                   // those that the folder keeps quantised
};

}  // namespace alambic::checkpoints
