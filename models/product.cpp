// SPDX-License-Identifier: Apache-2.0
#include "models/product.h"

#include <ATen/Context.h>
#include <ATen/Version.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <string_view>
#include <vector>

#include "models/bf16_tiles.h"
#include "models/tiles.h"

namespace alambic::models {
namespace {

// x W^T of dense tensors by oneDNN. libtorch registers it for its compiler and declares it in no header.
using LinearPointwise = at::Tensor(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, std::string_view activation,
                                   c10::List<std::optional<at::Scalar>> scalars, std::optional<std::string_view> algorithm);

std::optional<c10::TypedOperatorHandle<LinearPointwise>> find_linear_pointwise() {
  if (!at::globalContext().hasMKLDNN()) return std::nullopt;
  const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  if (!found) return std::nullopt;
  return found->typed<LinearPointwise>();
}

// Layouts that oneDNN takes as they are. It copies other left factors, which a narrow product does not pay back, and multiplies
// other right factors element by element.
bool is_rows(const at::Tensor& x) { return x.stride(1) == 1 && x.stride(0) == x.size(1); }
bool suits_onednn(const at::Tensor& a_MK, const at::Tensor& b_KN) {
  constexpr std::int64_t kNarrow = 64;
  return (is_rows(b_KN) || is_rows(b_KN.t())) && (a_MK.stride(1) == 1 || b_KN.size(1) >= kNarrow);
}

constexpr std::int64_t kFewRows = 4;  // a product of so few rows only waits for memory; MKL reads a matrix once, too

// What oneDNN's kernels need; asked once.
bool has_tile_kernels() {
  static const bool has = at::globalContext().hasMKLDNN() && at::globalContext().userEnabledMkldnn() &&
                          at::get_cpu_capability() != "DEFAULT";
  return has;
}

}  // namespace

at::Tensor product(const at::Tensor& a_MK, const at::Tensor& b_KN) {
  const at::NoGradGuard no_grad;
  static const auto linear_pointwise = find_linear_pointwise();
  if (!linear_pointwise || !a_MK.is_cpu() || a_MK.scalar_type() != at::kFloat || a_MK.size(0) < kFewRows || a_MK.size(1) == 0 || b_KN.size(1) == 0 || !suits_onednn(a_MK, b_KN))
    return at::mm(a_MK, b_KN);
  return linear_pointwise->call(a_MK, b_KN.t(), std::nullopt, "none", c10::List<std::optional<at::Scalar>>(), "");
}

namespace {

// Columns of b are shared out among threads, so that each sum over rows is one thread's. In f32 a block of them stays in the cache; in bf16, where
// the product takes less time than reading b, rows are read from their first column to the last, as memory gives them soonest.
void sum_over_rows(const float* a, std::int64_t lda, const float* b, std::int64_t ldb, float* sum, std::int64_t rows, std::int64_t M, std::int64_t N) {
  constexpr std::int64_t kRows = 256, kColumns = 384, kLanes = 16;
  const std::int64_t blocks = (N + kColumns - 1) / kColumns, width = (N / blocks + kLanes) / kLanes * kLanes;
  at::parallel_for(0, (N + width - 1) / width, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> turned(static_cast<std::size_t>(kRows * M));
    for (std::int64_t column = begin * width; column < std::min(end * width, N); column += width)
      for (std::int64_t row = 0; row < rows; row += kRows) {
        const std::int64_t count = std::min(kRows, rows - row);
        tiles::transpose(a + row * lda, lda, turned.data(), kRows, count, M);
        tile_product(M, std::min(width, N - column), count, turned.data(), kRows, b + row * ldb + column, ldb, sum + column, N, row > 0);
      }
  });
}
void sum_over_rows(const at::BFloat16* a, std::int64_t lda, const at::BFloat16* b, std::int64_t ldb, float* sum, std::int64_t rows, std::int64_t M, std::int64_t N) {
  constexpr std::int64_t kRows = 128, kColumns = 32;
  at::parallel_for(0, (N + kColumns - 1) / kColumns, 1, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t column = begin * kColumns, columns = std::min(end * kColumns, N) - column;
    std::vector<Bf16Pair> pairs(static_cast<std::size_t>(kRows / 2 * M));
    for (std::int64_t row = 0; row < rows; row += kRows) {
      const std::int64_t count = std::min(kRows, rows - row);
      pair_rows(a + row * lda, lda, pairs.data(), M, count, M);
      tile_product_over_rows(M, columns, count, pairs.data(), M, b + row * ldb + column, ldb, sum + column, N, row > 0);
    }
  });
}

}  // namespace

at::Tensor product_over_rows(const at::Tensor& a_TM, const at::Tensor& b_TN) {
  constexpr std::int64_t kFewColumns = 64;
  const at::NoGradGuard no_grad;
  const bool has_tiles = a_TM.scalar_type() == at::kFloat || (a_TM.scalar_type() == at::kBFloat16 && has_bf16_tiles());
  if (!a_TM.is_cpu() || !has_tiles || a_TM.size(1) > kFewColumns || a_TM.stride(1) != 1 || b_TN.stride(1) != 1 || a_TM.numel() == 0 || b_TN.numel() == 0)
    return product(a_TM.t(), b_TN).to(at::kFloat);
  at::Tensor sum_MN = at::empty({a_TM.size(1), b_TN.size(1)}, at::kFloat);
  const auto sum = [&](const auto* a, const auto* b) { sum_over_rows(a, a_TM.stride(0), b, b_TN.stride(0), sum_MN.mutable_data_ptr<float>(), a_TM.size(0), a_TM.size(1), b_TN.size(1)); };
  if (a_TM.scalar_type() == at::kFloat) sum(a_TM.const_data_ptr<float>(), b_TN.const_data_ptr<float>());
  else sum(a_TM.const_data_ptr<at::BFloat16>(), b_TN.const_data_ptr<at::BFloat16>());
  return sum_MN;
}

void tile_product(std::int64_t m, std::int64_t n, std::int64_t k, const float* a, std::int64_t lda, const float* b, std::int64_t ldb, float* c,
                  std::int64_t ldc, bool add) {
  if (has_tile_kernels()) {
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, /*is_vnni=*/false);
    return;
  }
  for (std::int64_t i = 0; i < m; ++i) {
    float* const row = c + i * ldc;
    if (!add) std::fill(row, row + n, 0.0f);
    for (std::int64_t l = 0; l < k; ++l) {
      const float factor = a[i * lda + l];
      for (std::int64_t j = 0; j < n; ++j) row[j] += factor * b[l * ldb + j];
    }
  }
}

}  // namespace alambic::models
