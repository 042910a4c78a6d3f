// SPDX-License-Identifier: Apache-2.0
#pragma once
// GGUF, read strictly: metadata, and tensors de-quantised bit for bit as the gguf package does.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/json.h"

namespace alambic::checkpoints {

struct GgufTensor {
  std::string name;
  std::string type;                 // "Q4_1", ...
  std::vector<std::int64_t> shape;  // slowest axis first, as in PyTorch
};

class GgufFile {
 public:
  explicit GgufFile(const std::filesystem::path& path);
  const Json& metadata() const;  // key -> scalar, string or array
  const std::vector<GgufTensor>& tensors() const;
  at::Tensor tensor(const std::string& name) const;  // f32 for quantised types, the stored type for F32, F16, BF16

 private:
  struct State;
  std::shared_ptr<State> state_;
};

/// GGUF -> Hugging Face folder: config.json, weights (f32, or f16/bf16 where the file holds them), tokenizer.json,
/// tokenizer_config.json, chat_template.jinja, README.md with licence and origin. Committed as a whole.
void import_gguf(const std::filesystem::path& gguf, const std::filesystem::path& folder, at::ScalarType weights = at::kFloat);

/// tokenizer.json for the tokenizer described by GGUF metadata ("gpt2" BPE with its pre-tokenizer, "llama" SentencePiece).
Json tokenizer_json_from_gguf(const Json& metadata, std::string_view source);

}  // namespace alambic::checkpoints
