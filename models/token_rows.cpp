// SPDX-License-Identifier: Apache-2.0
#include "models/token_rows.h"

#include <ATen/ops/_unique.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <algorithm>
#include <string>

#include "models/leaf_gradient.h"

namespace alambic::models {
namespace {

using torch::autograd::variable_list;

/// Where the table has a gradient already, that of a head that shares it, rows are added to that: no second gradient of the table's size.
struct LookUpBackward : torch::autograd::Node {
  LookUpBackward(const at::Tensor& tokens, std::int64_t rows, std::int64_t pad) : tokens_T(tokens), num_rows(rows), pad_id(pad) {}
  std::string name() const override { return "LookUpBackward"; }
  variable_list apply(variable_list&& d_outputs) override {
    if (!d_outputs[0].defined()) return variable_list(1);
    const at::NoGradGuard no_grad;
    at::Tensor sum_VD = gradient_of_leaf(*this, 0);
    if (!sum_VD.defined()) return {at::embedding_dense_backward(d_outputs[0], tokens_T, num_rows, pad_id, /*scale_grad_by_freq=*/false)};
    // Each row's own sum first: the bits of a gradient made apart and added.
    const auto [ids_N, index_T] = at::_unique(tokens_T, /*sorted=*/true, /*return_inverse=*/true);
    const at::Tensor rows_ND = at::embedding_dense_backward(d_outputs[0], index_T, ids_N.numel(), /*padding_idx=*/-1, false);
    if (pad_id >= 0) rows_ND.masked_fill_((ids_N == pad_id).unsqueeze(1), 0);
    sum_VD.index_add_(0, ids_N, rows_ND);
    return variable_list(1);
  }
  at::Tensor tokens_T;
  std::int64_t num_rows, pad_id;
};

at::Tensor looked_up(const at::Tensor& table_VD, const at::Tensor& tokens_T, std::int64_t pad_id) {
  if (!at::GradMode::is_enabled() || !table_VD.requires_grad()) return at::embedding(table_VD, tokens_T, pad_id);
  at::Tensor h_TD = at::embedding(table_VD.detach(), tokens_T, pad_id);
  const auto node = c10::make_intrusive<LookUpBackward>(tokens_T, table_VD.size(0), pad_id);
  node->set_next_edges(torch::autograd::collect_next_edges(table_VD));
  torch::autograd::set_history(h_TD, node);
  return h_TD;
}

}  // namespace

at::Tensor embedded_TD(const at::Tensor& table_VD, const at::Tensor& rows_ND, const std::vector<std::int64_t>& ids, const at::Tensor& tokens_T, std::int64_t pad_id, at::ScalarType type) {
  const at::Tensor base_TD = looked_up(table_VD, tokens_T, pad_id).to(at::kFloat);
  if (!rows_ND.defined()) return base_TD;
  const at::TensorOptions whole = table_VD.options().dtype(at::kLong);
  const at::Tensor slot_V = at::full({table_VD.size(0)}, -1, whole);
  slot_V.index_copy_(0, at::tensor(ids, at::kLong).to(whole), at::arange(static_cast<std::int64_t>(ids.size()), whole));
  const at::Tensor slot_T = slot_V.index_select(0, tokens_T);
  const auto pad = std::find(ids.begin(), ids.end(), pad_id);
  const std::int64_t pad_slot = pad == ids.end() ? -1 : pad - ids.begin();
  const at::Tensor trained_TD = at::embedding(rows_ND.to(type), slot_T.clamp_min(0), pad_slot).to(at::kFloat);
  return at::where((slot_T >= 0).unsqueeze(1), trained_TD, base_TD);
}

at::Tensor with_token_columns(const at::Tensor& y_TV, const at::Tensor& x_TD, const at::Tensor& rows_ND, const std::vector<std::int64_t>& ids, const at::Tensor& bias_V) {
  const at::ScalarType type = y_TV.scalar_type();
  const at::Tensor index_N = at::tensor(ids, at::kLong).to(y_TV.device());
  at::Tensor columns_TN = at::linear(x_TD.to(type), rows_ND.to(type));
  if (bias_V.defined()) columns_TN = columns_TN + bias_V.index_select(0, index_N).to(type);
  return y_TV.index_copy(1, index_N, columns_TN);
}

at::Tensor with_token_rows(const at::Tensor& table_VD, const at::Tensor& rows_ND, const std::vector<std::int64_t>& ids) {
  const at::NoGradGuard no_gradients;
  return table_VD.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true).index_copy_(0, at::tensor(ids, at::kLong).to(table_VD.device()), rows_ND);
}

}  // namespace alambic::models
