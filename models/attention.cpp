// SPDX-License-Identifier: Apache-2.0
#include "models/attention.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

namespace alambic::models {
namespace {

// Additive [queries, keys]: 0 where query i (whose key is keys - queries + i) sees key j, -infinity elsewhere.
at::Tensor causal_mask(std::int64_t queries, std::int64_t keys, std::int64_t window, at::ScalarType type) {
  const at::Tensor distance = (at::arange(queries).unsqueeze(1) + (keys - queries)) - at::arange(keys).unsqueeze(0);
  at::Tensor hidden = distance < 0;
  if (window > 0) hidden = hidden.logical_or(distance >= window);
  return at::zeros({queries, keys}, type).masked_fill_(hidden, -std::numeric_limits<double>::infinity());
}

}  // namespace

Documents::Documents(const std::vector<std::int64_t>& lengths) {
  std::int64_t first = 0;
  for (const std::int64_t length : lengths) {
    if (!groups_.empty() && groups_.back().length == length) ++groups_.back().count;
    else groups_.push_back({first, 1, length});
    first += length;
  }
}

at::Tensor Documents::attend(const at::Tensor& q_THS, const at::Tensor& k_TKS, const at::Tensor& v_TKS, double scale, std::int64_t window) {
  const bool grouped = q_THS.size(1) != k_TKS.size(1);
  std::vector<at::Tensor> outputs;
  for (const Group& group : groups_) {
    // [documents, heads, length, head size], a view: the kernel takes any strides.
    const auto cut = [&](const at::Tensor& x) {
      return x.narrow(0, group.first, group.count * group.length).unflatten(0, {group.count, group.length}).transpose(1, 2);
    };
    std::optional<at::Tensor> mask;
    if (window > 0 && group.length > window) {
      at::Tensor& made = masks_[{group.length, window}];
      if (!made.defined()) made = causal_mask(group.length, group.length, window, q_THS.scalar_type());
      mask = made;
    }
    const at::Tensor y = at::scaled_dot_product_attention(cut(q_THS), cut(k_TKS), cut(v_TKS), mask, 0, !mask, scale, grouped);
    outputs.push_back(y.transpose(1, 2).reshape({group.count * group.length, -1}));
  }
  return outputs.size() == 1 ? outputs[0] : at::cat(outputs);
}

at::Tensor attend_to_cache(const at::Tensor& q_THS, const at::Tensor& k_KLS, const at::Tensor& v_KLS, double scale, std::int64_t window) {
  const std::int64_t tokens = q_THS.size(0), kv_heads = k_KLS.size(0), size = q_THS.size(2);
  if (tokens == 1) {
    // The query heads of one key head stand where other tokens would: no mask, no repeated keys.
    const std::int64_t seen = window > 0 ? std::min(window, k_KLS.size(1)) : k_KLS.size(1);
    const auto last = [&](const at::Tensor& x_KLS) { return x_KLS.narrow(1, x_KLS.size(1) - seen, seen).unsqueeze(0); };
    const at::Tensor q_1KGS = q_THS.reshape({1, kv_heads, -1, size});
    return at::scaled_dot_product_attention(q_1KGS, last(k_KLS), last(v_KLS), {}, 0, false, scale).reshape({1, -1});
  }
  const at::Tensor mask = causal_mask(tokens, k_KLS.size(1), window, q_THS.scalar_type());
  const at::Tensor y = at::scaled_dot_product_attention(q_THS.transpose(0, 1).unsqueeze(0), k_KLS.unsqueeze(0), v_KLS.unsqueeze(0), mask, 0,
                                                        false, scale, q_THS.size(1) != kv_heads);
  return y.squeeze(0).transpose(0, 1).reshape({tokens, -1});
}

}  // namespace alambic::models
