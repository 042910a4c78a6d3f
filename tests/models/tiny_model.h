// SPDX-License-Identifier: Apache-2.0
#pragma once
// A decoder made straight from a golden of tests/oracle/families_oracle.py, and what the tests ask of it.
#include <ATen/ops/zeros.h>

#include <string>
#include <vector>

#include "models/decoder.h"
#include "tests/golden.h"

namespace alambic::testing {

inline const std::vector<std::string>& family_goldens() {
  static const std::vector<std::string> kNames = {"gemma2", "gemma3_text", "llama", "llama_tied", "mistral", "phi3", "qwen2", "qwen3", "smollm3"};
  return kNames;
}

/// Linear weights and the embedding in `type`, norms and biases in f32; all leaves of their own.
inline models::Decoder decoder_of(const Golden& golden, at::ScalarType type = at::kFloat) {
  models::Decoder decoder = models::make_decoder(models::read_model_config(parse_json(golden.metadata().at("config"), "config.json"), "config.json"));
  for (const models::NamedTensor& named : decoder.tensors()) {
    const at::Tensor stored = golden[named.name];
    *named.tensor = stored.to(stored.dim() == 2 ? type : at::kFloat, false, true);
  }
  if (decoder.head_tied) decoder.head.weight_OI = decoder.embedding_VD;
  return decoder;
}

inline models::Input input_of(const Golden& golden) {
  models::Input input;
  input.tokens_T = golden["tokens"];
  std::vector<std::int64_t> positions;
  const at::Tensor documents = golden["documents"];
  for (std::int64_t i = 0; i < documents.numel(); ++i) {
    input.document_lengths.push_back(documents[i].item<std::int64_t>());
    for (std::int64_t position = 0; position < input.document_lengths.back(); ++position) positions.push_back(position);
  }
  input.positions_T = at::zeros({static_cast<std::int64_t>(positions.size())}, at::kLong);
  for (std::size_t i = 0; i < positions.size(); ++i) input.positions_T[static_cast<std::int64_t>(i)] = positions[i];
  return input;
}

inline std::vector<std::int64_t> ids_of(const at::Tensor& tensor) {
  const at::Tensor flat = tensor.to(at::kLong).contiguous();
  return {flat.data_ptr<std::int64_t>(), flat.data_ptr<std::int64_t>() + flat.numel()};
}

}  // namespace alambic::testing
