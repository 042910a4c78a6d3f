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

/// softmax(soft_cap * tanh(scale q k^T / soft_cap) + mask) v by operators, as at::scaled_dot_product_attention knows no cap. q_NHQS, k_NHLS and v_NHLS of one type,
/// mask (which may be undefined) additive; scores and softmax are f32, and the weights are rounded to the type for their product with v.
at::Tensor soft_capped_attention(const at::Tensor& q_NHQS, const at::Tensor& k_NHLS, const at::Tensor& v_NHLS, const at::Tensor& mask, double scale, double soft_cap);

/// How the tokens of one forward pass are cut for attention; made once and used by every layer. Neighbouring documents of
/// equal length go through one call. Masks are made when a layer first needs them, and only for documents longer than the
/// window: everywhere else causality says all.
class Documents {
 public:
  explicit Documents(const std::vector<std::int64_t>& lengths);

  /// q_THS, k_TKS, v_TKS of one type -> [T, H S]. Token i sees the tokens j <= i of its document with i - j < window
  /// (window 0: all of them). Scores are s = scale * q k^T, or soft_cap * tanh(s / soft_cap) where that is not 0; their softmax is f32.
  at::Tensor attend(const at::Tensor& q_THS, const at::Tensor& k_TKS, const at::Tensor& v_TKS, double scale, std::int64_t window, double soft_cap = 0);

 private:
  struct Group {
    std::int64_t first, count, length;
  };
  std::vector<Group> groups_;
  std::map<std::pair<std::int64_t, std::int64_t>, at::Tensor> masks_;  // (length, window) -> additive [length, length]
};

}  // namespace alambic::models
