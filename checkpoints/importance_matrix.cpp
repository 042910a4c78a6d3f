// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/importance_matrix.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones_like.h>

#include <cmath>
#include <cstring>

#include "checkpoints/gguf.h"
#include "checkpoints/gguf_write.h"
#include "core/error.h"

namespace alambic::checkpoints {
namespace {

const std::string kSums = ".in_sum2", kCounts = ".counts";

}  // namespace

at::Tensor ImportanceMatrix::Entry::mean_I() const {
  // As llama-quantize has it: a matrix that saw no token weighs all its columns alike.
  return tokens > 0 ? squares_I / tokens : at::ones_like(squares_I);
}

void write_importance_matrix(const ImportanceMatrix& matrix, const std::filesystem::path& path) {
  float most = 0;
  std::vector<GgufTensorToWrite> tensors;
  std::vector<at::Tensor> values;
  for (const auto& [name, entry] : matrix.entries) {
    most = std::max(most, entry.tokens);
    tensors.push_back({name + kSums, find_gguf_type(0), {1, entry.squares_I.numel()}});
    values.push_back(entry.squares_I.to(at::kFloat).contiguous());
    tensors.push_back({name + kCounts, find_gguf_type(0), {1, 1}});
    values.push_back(at::full({1}, entry.tokens, at::kFloat));
  }
  const std::uint32_t chunk = std::max<std::uint32_t>(matrix.chunk_size, 1);
  const GgufKeys keys = {{"general.type", std::string("imatrix")},
                         {"imatrix.datasets", matrix.datasets},
                         {"imatrix.chunk_count", static_cast<std::uint32_t>(std::ceil(most / static_cast<float>(chunk)))},
                         {"imatrix.chunk_size", chunk}};
  write_gguf(path, keys, tensors, [&](std::size_t i, std::byte* out) { std::memcpy(out, values[i].const_data_ptr<float>(), static_cast<std::size_t>(values[i].numel()) * 4); });
}

ImportanceMatrix read_importance_matrix(const std::filesystem::path& path) {
  const GgufFile file(path);
  const std::string source = path.string();
  if (value_or<std::string>(file.metadata(), "general.type", "", source) != "imatrix")
    fail(ErrorKind::kData, source, ": is a GGUF file, but no importance matrix (general.type is not \"imatrix\")");
  ImportanceMatrix matrix;
  for (const Json& name : value_or<Json>(file.metadata(), "imatrix.datasets", Json::array(), source))
    if (name.is_string()) matrix.datasets.push_back(name.get<std::string>());
  matrix.chunk_size = static_cast<std::uint32_t>(value_or<std::int64_t>(file.metadata(), "imatrix.chunk_size", 0, source));
  for (const GgufTensor& tensor : file.tensors()) {
    if (!tensor.name.ends_with(kSums)) {
      if (!tensor.name.ends_with(kCounts) || !file.contains(tensor.name.substr(0, tensor.name.size() - kCounts.size()) + kSums))
        fail(ErrorKind::kData, source, ": tensor \"", tensor.name, "\" is no part of an importance matrix");
      continue;
    }
    const std::string name = tensor.name.substr(0, tensor.name.size() - kSums.size());
    if (tensor.type != "F32" || !file.contains(name + kCounts)) fail(ErrorKind::kData, source, ": \"", tensor.name, "\" is not F32 or has no \"", name + kCounts, "\"");
    const at::Tensor counts = file.tensor(name + kCounts).to(at::kFloat).contiguous();
    if (counts.numel() != 1) fail(ErrorKind::kData, source, ": \"", name, "\" is measured for ", counts.numel(), " experts; mixtures of experts are not implemented");
    ImportanceMatrix::Entry entry{.squares_I = file.tensor(tensor.name).flatten().clone(), .tokens = *counts.const_data_ptr<float>()};
    const float* const values = entry.squares_I.const_data_ptr<float>();
    for (std::int64_t i = 0; i < entry.squares_I.numel(); ++i)
      if (!(values[i] >= 0) || !std::isfinite(values[i])) fail(ErrorKind::kData, source, ": \"", tensor.name, "\": column ", i, " is ", values[i], ", and no sum of squares");
    if (!(entry.tokens >= 0) || !std::isfinite(entry.tokens)) fail(ErrorKind::kData, source, ": \"", name + kCounts, "\" is ", entry.tokens);
    matrix.entries.emplace(name, std::move(entry));
  }
  if (matrix.entries.empty()) fail(ErrorKind::kData, source, ": holds no entry");
  return matrix;
}

}  // namespace alambic::checkpoints
