// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <string_view>

#include "checkpoints/safetensors.h"

namespace alambic::testing {

/// tests/golden/<name>
std::filesystem::path golden_path(std::string_view name);

// Tensors that a reference implementation wrote, with the story of how (script, versions, seed).
class Golden {
 public:
  explicit Golden(std::string_view file) : file_(golden_path(file)) {}
  at::Tensor operator[](const std::string& name) const { return file_.tensor(name); }
  const std::map<std::string, std::string>& metadata() const { return file_.metadata(); }
  const checkpoints::SafetensorsFile& file() const { return file_; }
  std::string provenance() const;

 private:
  checkpoints::SafetensorsFile file_;
};

}  // namespace alambic::testing
