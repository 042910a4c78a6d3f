// SPDX-License-Identifier: Apache-2.0
#include "models/attention.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <limits>

namespace alambic::models {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Additive [length, length]: 0 where query i sees key j, -infinity elsewhere.
at::Tensor causal_mask(std::int64_t length, std::int64_t window, const at::TensorOptions& like) {
  const at::Tensor place = at::arange(length, like.dtype(at::kLong)), distance = place.unsqueeze(1) - place.unsqueeze(0);
  const at::Tensor hidden = (distance < 0).logical_or(distance >= window);
  return at::zeros({length, length}, like).masked_fill_(hidden, -std::numeric_limits<double>::infinity());
}

constexpr std::int64_t kScores = 4 << 20;  // that soft-capped attention has in memory at once

// Causal attention with soft-capped scores, some queries of all documents and heads at a time, forwards and again backwards: scores are never kept.
struct SoftCappedDocuments : torch::autograd::Function<SoftCappedDocuments> {
  struct Cut {
    std::int64_t first, count, first_key, keys;
  };
  static std::vector<Cut> cuts(const at::Tensor& q_NHLS, std::int64_t window) {
    const std::int64_t length = q_NHLS.size(2), rows = std::clamp<std::int64_t>(kScores / (q_NHLS.size(0) * q_NHLS.size(1) * length), 1, length);
    std::vector<Cut> made;
    for (std::int64_t first = 0; first < length; first += rows) {
      const std::int64_t count = std::min(rows, length - first), first_key = window > 0 ? std::max<std::int64_t>(0, first - window + 1) : 0;
      made.push_back({first, count, first_key, first + count - first_key});
    }
    return made;
  }
  static at::Tensor attend(const Cut& cut, const at::Tensor& q_NHQS, const at::Tensor& k_NKLS, const at::Tensor& v_NKLS, double scale, std::int64_t window, double soft_cap) {
    const at::TensorOptions index = q_NHQS.options().dtype(at::kLong);
    const at::Tensor distance = at::arange(cut.first, cut.first + cut.count, index).unsqueeze(1) - at::arange(cut.first_key, cut.first_key + cut.keys, index).unsqueeze(0);
    at::Tensor hidden = distance < 0;
    if (window > 0) hidden = hidden.logical_or(distance >= window);
    const at::Tensor mask = at::zeros(hidden.sizes(), q_NHQS.options().dtype(at::kFloat)).masked_fill_(hidden, -std::numeric_limits<double>::infinity());
    const std::int64_t shared = q_NHQS.size(1) / k_NKLS.size(1);
    const auto repeated = [&](const at::Tensor& x) { return shared == 1 ? x : x.repeat_interleave(shared, 1); };
    return soft_capped_attention(q_NHQS, repeated(k_NKLS), repeated(v_NKLS), mask, scale, soft_cap);
  }
  static at::Tensor forward(AutogradContext* context, const at::Tensor& q_NHLS, const at::Tensor& k_NKLS, const at::Tensor& v_NKLS, double scale, std::int64_t window, double soft_cap) {
    context->save_for_backward({q_NHLS, k_NKLS, v_NKLS});
    context->saved_data["scale"] = scale;
    context->saved_data["window"] = window;
    context->saved_data["soft_cap"] = soft_cap;
    std::vector<at::Tensor> parts;
    for (const Cut& cut : cuts(q_NHLS, window))
      parts.push_back(attend(cut, q_NHLS.narrow(2, cut.first, cut.count), k_NKLS.narrow(2, cut.first_key, cut.keys), v_NKLS.narrow(2, cut.first_key, cut.keys), scale, window, soft_cap));
    return parts.size() == 1 ? parts[0] : at::cat(parts, 2);
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    const double scale = context->saved_data["scale"].toDouble(), soft_cap = context->saved_data["soft_cap"].toDouble();
    const std::int64_t window = context->saved_data["window"].toInt();
    variable_list sums;
    for (const at::Tensor& input : saved) sums.push_back(at::zeros(input.sizes(), input.options().dtype(at::kFloat)));
    for (const Cut& cut : cuts(saved[0], window)) {
      const at::AutoGradMode grad(true);
      const auto leaf = [&](const at::Tensor& x, std::int64_t first, std::int64_t count) { return x.detach().narrow(2, first, count).requires_grad_(true); };
      const variable_list leaves = {leaf(saved[0], cut.first, cut.count), leaf(saved[1], cut.first_key, cut.keys), leaf(saved[2], cut.first_key, cut.keys)};
      const variable_list found = torch::autograd::grad({attend(cut, leaves[0], leaves[1], leaves[2], scale, window, soft_cap)}, leaves, {gradients[0].narrow(2, cut.first, cut.count)});
      const at::NoGradGuard no_grad;
      sums[0].narrow(2, cut.first, cut.count).copy_(found[0]);
      for (std::size_t i : {1, 2}) sums[i].narrow(2, cut.first_key, cut.keys).add_(found[i]);
    }
    for (std::size_t i = 0; i < sums.size(); ++i) sums[i] = sums[i].to(saved[i].scalar_type());
    sums.resize(6);  // none for the numbers
    return sums;
  }
};

}  // namespace

at::Tensor soft_capped_attention(const at::Tensor& q_NHQS, const at::Tensor& k_NHLS, const at::Tensor& v_NHLS, const at::Tensor& mask, double scale, double soft_cap) {
  at::Tensor scores_NHQL = at::tanh(at::matmul(q_NHQS.to(at::kFloat) * (scale / soft_cap), k_NHLS.to(at::kFloat).transpose(2, 3))) * soft_cap;
  if (mask.defined()) scores_NHQL = scores_NHQL + mask;
  return at::matmul(at::softmax(scores_NHQL, 3).to(v_NHLS.scalar_type()), v_NHLS);
}

Documents::Documents(const std::vector<std::int64_t>& lengths) {
  std::int64_t first = 0;
  for (const std::int64_t length : lengths) {
    if (!groups_.empty() && groups_.back().length == length) ++groups_.back().count;
    else groups_.push_back({first, 1, length});
    first += length;
  }
}

at::Tensor Documents::attend(const at::Tensor& q_THS, const at::Tensor& k_TKS, const at::Tensor& v_TKS, double scale, std::int64_t window, double soft_cap) {
  const bool grouped = q_THS.size(1) != k_TKS.size(1);
  std::vector<at::Tensor> outputs;
  for (const Group& group : groups_) {
    // [documents, heads, length, head size], a view: the kernel takes any strides.
    const auto cut = [&](const at::Tensor& x) {
      return x.narrow(0, group.first, group.count * group.length).unflatten(0, {group.count, group.length}).transpose(1, 2);
    };
    if (soft_cap > 0) {
      const at::Tensor y = SoftCappedDocuments::apply(cut(q_THS), cut(k_TKS), cut(v_TKS), scale, window, soft_cap);
      outputs.push_back(y.transpose(1, 2).reshape({group.count * group.length, -1}));
      continue;
    }
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
