// SPDX-License-Identifier: Apache-2.0
#include "models/token_rows.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>

#include <algorithm>

namespace alambic::models {

at::Tensor embedded_TD(const at::Tensor& table_VD, const at::Tensor& rows_ND, const std::vector<std::int64_t>& ids, const at::Tensor& tokens_T, std::int64_t pad_id) {
  const at::Tensor base_TD = at::embedding(table_VD, tokens_T, pad_id).to(at::kFloat);
  if (!rows_ND.defined()) return base_TD;
  const at::Tensor slot_V = at::full({table_VD.size(0)}, -1, at::kLong);
  slot_V.index_copy_(0, at::tensor(ids, at::kLong), at::arange(static_cast<std::int64_t>(ids.size()), at::kLong));
  const at::Tensor slot_T = slot_V.index_select(0, tokens_T);
  const auto pad = std::find(ids.begin(), ids.end(), pad_id);
  const std::int64_t pad_slot = pad == ids.end() ? -1 : pad - ids.begin();
  const at::Tensor trained_TD = at::embedding(rows_ND.to(table_VD.scalar_type()), slot_T.clamp_min(0), pad_slot).to(at::kFloat);
  return at::where((slot_T >= 0).unsqueeze(1), trained_TD, base_TD);
}

at::Tensor with_token_columns(const at::Tensor& y_TV, const at::Tensor& x_TD, const at::Tensor& rows_ND, const std::vector<std::int64_t>& ids, const at::Tensor& bias_V) {
  const at::ScalarType type = y_TV.scalar_type();
  const at::Tensor index_N = at::tensor(ids, at::kLong);
  at::Tensor columns_TN = at::linear(x_TD.to(type), rows_ND.to(type));
  if (bias_V.defined()) columns_TN = columns_TN + bias_V.index_select(0, index_N).to(type);
  return y_TV.index_copy(1, index_N, columns_TN);
}

at::Tensor with_token_rows(const at::Tensor& table_VD, const at::Tensor& rows_ND, const std::vector<std::int64_t>& ids) {
  const at::NoGradGuard no_gradients;
  return table_VD.to(at::kFloat).index_copy(0, at::tensor(ids, at::kLong), rows_ND);
}

}  // namespace alambic::models
