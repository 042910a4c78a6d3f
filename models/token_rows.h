// SPDX-License-Identifier: Apache-2.0
#pragma once
// Rows of the embedding, and of the head, that are trained while the rest of the table is frozen: rows_ND stands in for the rows
// `ids` of a table [V, D]. The table itself is never copied or written.
// Letters: T = tokens, D = hidden size, V = vocabulary, N = rows that are trained.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace alambic::models {

/// Rows of the table for the tokens, f32 [T, D], those of `ids` taken from rows_ND, which is rounded to `type`, that of the run, as the
/// rows of a table are that was loaded for it. The table may be narrower: as its file has it. Differentiable in both; a padding token (pad_id, -1: none) gives no gradient. rows_ND undefined: the table alone.
at::Tensor embedded_TD(const at::Tensor& table_VD, const at::Tensor& rows_ND, const std::vector<std::int64_t>& ids, const at::Tensor& tokens_T, std::int64_t pad_id,
                       at::ScalarType type);

/// y_TV = x W^T + b of a head with the columns `ids` made from rows_ND in W's place; in y's type.
at::Tensor with_token_columns(const at::Tensor& y_TV, const at::Tensor& x_TD, const at::Tensor& rows_ND, const std::vector<std::int64_t>& ids, const at::Tensor& bias_V);

/// f32 copy of the table with the rows in place.
at::Tensor with_token_rows(const at::Tensor& table_VD, const at::Tensor& rows_ND, const std::vector<std::int64_t>& ids);

}  // namespace alambic::models
