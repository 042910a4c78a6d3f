// SPDX-License-Identifier: Apache-2.0
#pragma once
// What GGUF calls the architectures and tensors of our families, and how its values lie. One table, read by import and export.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "models/config.h"

namespace alambic::checkpoints {

struct GgufArchitecture {
  std::string_view gguf;        // general.architecture
  std::string_view model_type;  // the family; of several the first is what import makes
  /// Rows of q and k lie as llama.cpp's rotation of neighbours wants them; published weights rotate halves.
  bool rotated_in_pairs = false;
  /// Biases and RoPE scalings that llama.cpp reads for it, besides biases of q, k and v, and "linear" and "yarn".
  bool output_and_mlp_bias = false, llama3_scaling = false;
};
std::span<const GgufArchitecture> gguf_architectures();

/// The size of Gemma that alone scales attention by hidden size / heads in place of the head size, as llama.cpp knows it.
std::int64_t gemma_layers_of_27b(std::string_view model_type);

/// One tensor: its two names, its shape, and how the values differ.
struct GgufMove {
  std::string gguf, published;
  std::vector<std::int64_t> shape;
  models::Slot slot{};
  std::int64_t pairs_of_heads = 0;  // not 0: the rows of so many heads lie in pairs in GGUF
  double offset = 0;                // GGUF stores the published value plus this
};

/// Of all weights of the model, in the order of models::expected_shapes.
std::vector<GgufMove> gguf_moves(const models::ModelConfig& config, const GgufArchitecture& architecture);

/// Values as GGUF stores them, and back. Also of an adapter's B, whose rows are those of the weight.
at::Tensor to_gguf(const at::Tensor& published, const GgufMove& move);
at::Tensor from_gguf(const at::Tensor& stored, const GgufMove& move);

/// Tensors that describe the rotation.
inline constexpr const char* kGgufRopeFreqs = "rope_freqs.weight";
inline constexpr const char* kGgufRopeLong = "rope_factors_long.weight";
inline constexpr const char* kGgufRopeShort = "rope_factors_short.weight";

}  // namespace alambic::checkpoints
