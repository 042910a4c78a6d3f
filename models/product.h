// SPDX-License-Identifier: Apache-2.0
#pragma once
// The matrix products everything else is built on. Letters: M, N, K = rows, columns and the summed axis; T = tokens.
//
// f32 products on a processor go through oneDNN, which libtorch carries: on AVX-512 machines it is about twice as fast as the
// MKL that at::mm calls for f32 there (AMD), and elsewhere no slower. Other types and devices take at::mm, which is oneDNN's
// bf16 and cuBLAS already.
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace alambic::models {

/// a_MK b_KN, both of one type; either may be a transposed view. Sums are f32. Not differentiable: callers write their own backward.
at::Tensor product(const at::Tensor& a_MK, const at::Tensor& b_KN);

/// The transpose of a_TM times b_TN, in f32: a gradient of an adapter, a sum over tokens of few columns times many. Both of one
/// type, rows contiguous or columns of wider rows. Nothing depends on the number of threads, unless it is bf16 on a processor without
/// tiles of it (models/bf16_tiles.h): then the result is also rounded to bf16 once.
at::Tensor product_over_rows(const at::Tensor& a_TM, const at::Tensor& b_TN);

/// c (+)= a b on row-major f32 arrays of one thread: the tile inside a kernel. lda, ldb and ldc are the distances of rows.
/// Each shape compiles a kernel once (oneDNN's brgemm), so callers keep to few shapes.
void tile_product(std::int64_t m, std::int64_t n, std::int64_t k, const float* a, std::int64_t lda, const float* b, std::int64_t ldb, float* c,
                  std::int64_t ldc, bool add);

}  // namespace alambic::models
