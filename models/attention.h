// SPDX-License-Identifier: Apache-2.0
#pragma once
// Causal attention inside documents, with grouped keys and values (arXiv:2305.13245) and optionally a sliding window.
// Letters: T = tokens, H = query heads, K = key and value heads, S = head size.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

namespace alambic::models {

/// How the tokens of one forward pass are cut for attention; made once and used by every layer. Neighbouring documents of
/// equal length go through one call. Masks are made when a layer first needs them, and only for documents longer than the
/// window: everywhere else causality says all.
class Documents {
 public:
  explicit Documents(const std::vector<std::int64_t>& lengths);

  /// q_THS, k_TKS, v_TKS of one type -> [T, H S]. Token i sees the tokens j <= i of its document with i - j < window
  /// (window 0: all of them). Scores are scale * q k^T, their softmax is f32.
  at::Tensor attend(const at::Tensor& q_THS, const at::Tensor& k_TKS, const at::Tensor& v_TKS, double scale, std::int64_t window);

 private:
  struct Group {
    std::int64_t first, count, length;
  };
  std::vector<Group> groups_;
  std::map<std::pair<std::int64_t, std::int64_t>, at::Tensor> masks_;  // (length, window) -> additive [length, length]
};

}  // namespace alambic::models
