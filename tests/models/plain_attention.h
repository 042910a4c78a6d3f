// SPDX-License-Identifier: Apache-2.0
#pragma once
// Attention as its formula says it, in f64, and numbers to try it on.
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/sin.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/tanh.h>

#include <cmath>
#include <vector>

#include "models/packed_attention.h"

namespace alambic::testing {

inline at::Tensor uneven(std::vector<std::int64_t> sizes, double seed, double size = 1) {
  std::int64_t count = 1;
  for (const std::int64_t each : sizes) count *= each;
  return (at::sin(at::arange(count, at::kDouble) * 1.7 + seed) * size).reshape(sizes);
}

// The formula, in f64: qkv [T, (K G + 2 K) S] -> [T, K G S].
inline at::Tensor plain_attention(const models::AttentionShape& shape, const at::Tensor& qkv_TN, double scale) {
  const std::int64_t K = shape.kv_heads, G = shape.group, S = shape.head_size;
  std::vector<at::Tensor> documents;
  std::int64_t first = 0;
  for (const std::int64_t length : shape.document_lengths) {
    const at::Tensor qkv = qkv_TN.narrow(0, first, length);
    std::vector<at::Tensor> heads;
    for (std::int64_t h = 0; h < K * G; ++h) {
      const at::Tensor q = qkv.narrow(1, h * S, S), k = qkv.narrow(1, (K * G + h / G) * S, S), v = qkv.narrow(1, (K * G + K + h / G) * S, S);
      at::Tensor scores = at::matmul(q, k.t()) * scale;
      if (shape.soft_cap > 0) scores = at::tanh(scores / shape.soft_cap) * shape.soft_cap;
      const at::Tensor distance = at::arange(length).unsqueeze(1) - at::arange(length).unsqueeze(0);
      at::Tensor hidden = distance < 0;
      if (shape.window > 0) hidden = hidden.logical_or(distance >= shape.window);
      heads.push_back(at::matmul(at::softmax(scores.masked_fill(hidden, -INFINITY), 1), v));
    }
    documents.push_back(at::cat(heads, 1));
    first += length;
  }
  return at::cat(documents);
}

}  // namespace alambic::testing
