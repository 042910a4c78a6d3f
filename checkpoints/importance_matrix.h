// SPDX-License-Identifier: Apache-2.0
#pragma once
// How large the inputs of each matrix are, column by column: what a quantiser weighs its errors with. The file is the one that
// llama.cpp's llama-imatrix writes and llama-quantize reads (GGUF with general.type "imatrix").
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace alambic::checkpoints {

struct ImportanceMatrix {
  struct Entry {
    at::Tensor squares_I;  // f32: sum over tokens of the square of each input column
    float tokens = 0;      // how many were added up
    at::Tensor mean_I() const;
  };
  std::map<std::string, Entry> entries;  // by the matrix's name in GGUF, "blk.0.attn_q.weight"
  std::vector<std::string> datasets;     // what it was measured on
  std::uint32_t chunk_size = 0;          // tokens of context
};

/// Error(kUsage): the file exists.
void write_importance_matrix(const ImportanceMatrix& matrix, const std::filesystem::path& path);
/// Error(kData): not such a file, sums and counts that do not fit each other, values below 0 or not finite.
ImportanceMatrix read_importance_matrix(const std::filesystem::path& path);

}  // namespace alambic::checkpoints
