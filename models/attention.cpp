// SPDX-License-Identifier: Apache-2.0
#include "models/attention.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/zeros.h>

#include <limits>

namespace alambic::models {
namespace {

// Additive [length, length]: 0 where query i sees key j, -infinity elsewhere.
at::Tensor causal_mask(std::int64_t length, std::int64_t window, const at::TensorOptions& like) {
  const at::Tensor place = at::arange(length, like.dtype(at::kLong)), distance = place.unsqueeze(1) - place.unsqueeze(0);
  const at::Tensor hidden = (distance < 0).logical_or(distance >= window);
  return at::zeros({length, length}, like).masked_fill_(hidden, -std::numeric_limits<double>::infinity());
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
      if (!made.defined()) made = causal_mask(group.length, window, q_THS.options());
      mask = made;
    }
    const at::Tensor y = at::scaled_dot_product_attention(cut(q_THS), cut(k_TKS), cut(v_TKS), mask, 0, !mask, scale, grouped);
    outputs.push_back(y.transpose(1, 2).reshape({group.count * group.length, -1}));
  }
  return outputs.size() == 1 ? outputs[0] : at::cat(outputs);
}

}  // namespace alambic::models
