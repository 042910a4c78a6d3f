// SPDX-License-Identifier: Apache-2.0
#pragma once
// GGUF, read strictly: metadata, and tensors de-quantised bit for bit as the gguf package does.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoints/gguf_tokenizer.h"
#include "core/json.h"
#include "models/decoder.h"

namespace alambic::checkpoints {

struct GgufTensor {
  std::string name;
  std::string type;                 // "Q4_1", ...
  std::vector<std::int64_t> shape;  // slowest axis first, as in PyTorch
};

class GgufFile {
 public:
  /// Error(kData) when the file is missing or anything in its head is wrong (gguf_header.h). Tensors are not read yet.
  explicit GgufFile(const std::filesystem::path& path);
  const Json& metadata() const;  // key -> scalar, string or array
  const std::vector<GgufTensor>& tensors() const;
  bool contains(const std::string& name) const;
  /// f32 for quantised types (de-quantised by all threads; the mapping's pages are given back afterwards); for F32, F16
  /// and BF16 a view of the mapping, which stays valid after this object is gone. Error(kData): no such tensor.
  at::Tensor tensor(const std::string& name) const;

 private:
  struct State;
  std::shared_ptr<const State> state_;
};

/// GGUF -> Hugging Face folder: config.json, generation_config.json, model.safetensors, tokenizer.json,
/// tokenizer_config.json, chat_template.jinja, README.md with licence and origin, LICENSE where its text is known, and
/// manifest.json. The folder is renamed into place when all of it is there. weights: the type written (f32, bf16, f16).
/// Error(kUsage) when `folder` exists; Error(kData) listing tensors and keys that are missing or have no place.
void import_gguf(const std::filesystem::path& gguf, const std::filesystem::path& folder, at::ScalarType weights = at::kFloat);

/// The decoder in a GGUF file, de-quantised to f32: what a program that reads the file computes with.
models::Decoder load_gguf(const std::filesystem::path& gguf);

/// True when `folder` is what import_gguf makes of this very file and type: its manifest names the file's SHA-256, and
/// every file it lists is there with its hash.
bool is_complete_import(const std::filesystem::path& gguf, const std::filesystem::path& folder, at::ScalarType weights = at::kFloat);

}  // namespace alambic::checkpoints
