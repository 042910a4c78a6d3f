// SPDX-License-Identifier: Apache-2.0
#include "models/head_product.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/error.h"
#include "core/vectorised.h"
#include "models/bf16_tiles.h"
#include "models/product.h"
#include "models/row_kernels.h"
#include "models/tiles.h"

namespace alambic::models {
namespace {

// A tile of 512 x 96 logits, its transpose, the hidden states and the sums of one thread stay in a megabyte of cache.
constexpr std::int64_t kRows = 96, kVocabulary = 512;
constexpr std::int64_t kVocabularyBf16 = 256;
constexpr std::int64_t kTogether = 4;  // blocks of rows that share a tile of f32 once it is widened

ALAMBIC_VECTORISED float dot(const float* a, const float* b, std::int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// d (+)= nothing: d = softmax part * factor - share of the target's row - smoothing's share of all rows.
ALAMBIC_VECTORISED void finish_row(float* d, const float* acc, float factor, const float* target_row, float target_share, const float* all_rows, float each, std::int64_t D) {
  if (all_rows == nullptr) {
#pragma omp simd
    for (std::int64_t i = 0; i < D; ++i) d[i] = acc[i] * factor - target_share * target_row[i];
  } else {
#pragma omp simd
    for (std::int64_t i = 0; i < D; ++i) d[i] = acc[i] * factor - target_share * target_row[i] - each * all_rows[i];
  }
}

ALAMBIC_VECTORISED void multiply(float* x, const float* factors, std::int64_t count) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) x[i] *= factors[i];
}

/// What is added up of a row, and what it becomes.
struct RowLoss {
  double smoothing, z_loss;
  const float* all_rows;  // the sum of the head's rows; nullptr without smoothing
  std::int64_t D, V;
  double soft_cap;

  /// The nats of a row whose running softmax has come to its highest logit m and sum l, and, unless d is nullptr, its gradient; acc: the head's rows by
  /// exp(logit - m), and by the slopes of capped logits, added up.
  double finish(const float* h, const float* target_row, double m, double l, const float* acc, float* d) const {
    const double target = dot(h, target_row, D), share = soft_cap > 0 ? std::tanh(target / soft_cap) : 0, slope = 1 - share * share;
    const double log_sum = m + std::log(l), plain = all_rows != nullptr ? dot(h, all_rows, D) : 0;
    if (d != nullptr)
      finish_row(d, acc, static_cast<float>((1 + 2 * z_loss * log_sum) / l), target_row, static_cast<float>((1 - smoothing) * slope), all_rows, static_cast<float>(smoothing / static_cast<double>(V)), D);
    return log_sum - (1 - smoothing) * (soft_cap > 0 ? soft_cap * share : target) - (smoothing > 0 ? smoothing * plain / static_cast<double>(V) : 0) + z_loss * log_sum * log_sum;
  }
};

/// The sum of all rows of the head in f32, which is smoothing's target but for a factor; undefined without smoothing.
at::Tensor sum_of_rows(const at::Tensor& weight_VD, double smoothing, double soft_cap) {
  if (smoothing > 0 && soft_cap > 0) fail(ErrorKind::kBug, "label smoothing of soft-capped logits goes by chunks");
  return smoothing > 0 ? weight_VD.to(at::kFloat).sum(0) : at::Tensor();
}
const float* data_or_null(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr; }

}  // namespace

void tiled_cross_entropy(const at::Tensor& hidden_KD, const at::Tensor& weight_VD, const std::int64_t* targets, double smoothing, double z_loss, double* nats,
                         at::Tensor& d_hidden_KD, double soft_cap) {
  const std::int64_t K = hidden_KD.size(0), D = hidden_KD.size(1), V = weight_VD.size(0), blocks = (K + kRows - 1) / kRows;
  const bool is_wide = weight_VD.scalar_type() == at::kFloat;
  const std::int64_t most_together = is_wide ? 1 : kTogether;
  const float *const hidden = hidden_KD.const_data_ptr<float>(), *const weight = is_wide ? weight_VD.const_data_ptr<float>() : nullptr;
  float* const d_hidden = d_hidden_KD.defined() ? d_hidden_KD.mutable_data_ptr<float>() : nullptr;
  const at::Tensor all_rows_D = sum_of_rows(weight_VD, smoothing, soft_cap);
  const RowLoss loss{.smoothing = smoothing, .z_loss = z_loss, .all_rows = data_or_null(all_rows_D), .D = D, .V = V, .soft_cap = soft_cap};
  at::parallel_for(0, blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t together = std::min(most_together, end - begin);
    const auto per_block = static_cast<std::size_t>(D * kRows);
    std::vector<float> turned(static_cast<std::size_t>(together) * per_block), logits(static_cast<std::size_t>(kVocabulary * kRows)), by_row(d_hidden != nullptr ? logits.size() : 0),
        acc(d_hidden != nullptr ? turned.size() : 0), m(static_cast<std::size_t>(together * kRows)), l(m.size()), factor(kRows);
    std::vector<float> slopes(soft_cap > 0 ? by_row.size() : 0);
    const at::Tensor wide_VD = is_wide ? at::Tensor() : at::empty({kVocabulary, D}, at::kFloat);
    // Rows [v0, v0 + count) of the head in f32; where they must be widened, until the next call.
    const auto rows_of_head = [&](std::int64_t v0, std::int64_t count) {
      if (is_wide) return weight + v0 * D;
      wide_VD.narrow(0, 0, count).copy_(weight_VD.narrow(0, v0, count));
      return wide_VD.const_data_ptr<float>();
    };
    for (std::int64_t first_block = begin; first_block < end; first_block += together) {
      const std::int64_t num_blocks = std::min(together, end - first_block), first = first_block * kRows;
      std::fill(turned.begin(), turned.end(), 0.0f);  // rows behind the last: logits of 0, never read
      for (std::int64_t b = 0; b < num_blocks; ++b)
        tiles::transpose(hidden + (first + b * kRows) * D, D, turned.data() + b * kRows * D, kRows, std::min(kRows, K - first - b * kRows), D);
      std::fill(m.begin(), m.end(), tiles::kHidden);
      std::fill(l.begin(), l.end(), 0.0f);
      for (std::int64_t v0 = 0; v0 < V; v0 += kVocabulary) {
        const std::int64_t count = std::min(kVocabulary, V - v0);
        const float* const tile = rows_of_head(v0, count);
        for (std::int64_t b = 0; b < num_blocks; ++b) {
          const std::int64_t rows = std::min(kRows, K - first - b * kRows);
          float* const acc_of_block = acc.data() + b * kRows * D;
          tile_product(count, kRows, D, tile, D, turned.data() + b * kRows * D, kRows, logits.data(), kRows, false);
          if (soft_cap > 0) tiles::soft_cap(logits.data(), slopes.empty() ? nullptr : slopes.data(), count * kRows, static_cast<float>(soft_cap));
          const bool shrinks = tiles::softmax_tile(logits.data(), count, kRows, m.data() + b * kRows, l.data() + b * kRows, factor.data());
          if (d_hidden == nullptr) continue;
          if (soft_cap > 0) multiply(logits.data(), slopes.data(), count * kRows);
          if (shrinks && v0 > 0)
            for (std::int64_t i = 0; i < rows; ++i)
              if (factor[static_cast<std::size_t>(i)] != 1.0f) tiles::scale(acc_of_block + i * D, D, factor[static_cast<std::size_t>(i)]);
          tiles::transpose(logits.data(), kRows, by_row.data(), count, count, kRows);
          tile_product(kRows, D, count, by_row.data(), count, tile, D, acc_of_block, D, v0 > 0);
        }
      }
      for (std::int64_t i = 0; i < std::min(num_blocks * kRows, K - first); ++i) {
        const std::int64_t row = first + i;
        nats[row] = loss.finish(hidden + row * D, rows_of_head(targets[row], 1), m[static_cast<std::size_t>(i)], l[static_cast<std::size_t>(i)], acc.data() + i * D,
                                d_hidden == nullptr ? nullptr : d_hidden + row * D);
      }
    }
  });
}

void tiled_cross_entropy_bf16(const at::Tensor& hidden_KD, const at::Tensor& weight_VD, const std::int64_t* targets, double smoothing, double z_loss, double* nats,
                              at::Tensor& d_hidden_KD, double soft_cap) {
  constexpr std::int64_t kTile = kVocabularyBf16;
  const std::int64_t K = hidden_KD.size(0), D = hidden_KD.size(1), V = weight_VD.size(0), blocks = (K + kRows - 1) / kRows, pairs = (D + 1) / 2;
  const at::BFloat16 *const hidden = hidden_KD.const_data_ptr<at::BFloat16>(), *const weight = weight_VD.const_data_ptr<at::BFloat16>();
  float* const d_hidden = d_hidden_KD.defined() ? d_hidden_KD.mutable_data_ptr<float>() : nullptr;
  const at::Tensor all_rows_D = sum_of_rows(weight_VD, smoothing, soft_cap);
  const RowLoss loss{.smoothing = smoothing, .z_loss = z_loss, .all_rows = data_or_null(all_rows_D), .D = D, .V = V, .soft_cap = soft_cap};
  at::parallel_for(0, blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<Bf16Pair> turned(static_cast<std::size_t>(pairs * kRows)), weights(d_hidden != nullptr ? static_cast<std::size_t>(kTile / 2 * kRows) : 0);
    std::vector<float> logits(static_cast<std::size_t>(kTile * kRows)), acc(d_hidden != nullptr ? static_cast<std::size_t>(kRows * D) : 0), m(kRows), l(kRows), factor(kRows), h(static_cast<std::size_t>(D)),
        target_row(h.size()), slopes(soft_cap > 0 && d_hidden != nullptr ? logits.size() : 0);
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t first = block * kRows, rows = std::min(kRows, K - first);
      std::fill(turned.begin(), turned.end(), 0);  // rows behind the last: logits of 0, never read
      pair_columns(hidden + first * D, D, turned.data(), kRows, rows, D);
      std::fill(m.begin(), m.end(), tiles::kHidden);
      std::fill(l.begin(), l.end(), 0.0f);
      for (std::int64_t v0 = 0; v0 < V; v0 += kTile) {
        const std::int64_t count = std::min(kTile, V - v0);
        const at::BFloat16* const tile = weight + v0 * D;
        tile_product(count, kRows, D, tile, D, turned.data(), kRows, logits.data(), kRows, false);
        if (soft_cap > 0) tiles::soft_cap(logits.data(), slopes.empty() ? nullptr : slopes.data(), count * kRows, static_cast<float>(soft_cap));
        const bool shrinks = tiles::softmax_tile(logits.data(), count, kRows, m.data(), l.data(), factor.data());
        if (d_hidden == nullptr) continue;
        if (soft_cap > 0) multiply(logits.data(), slopes.data(), count * kRows);
        if (shrinks && v0 > 0)
          for (std::int64_t i = 0; i < rows; ++i)
            if (factor[static_cast<std::size_t>(i)] != 1.0f) tiles::scale(acc.data() + i * D, D, factor[static_cast<std::size_t>(i)]);
        pair_rows(logits.data(), kRows, weights.data(), kRows, count, kRows);
        tile_product_over_rows(kRows, D, count, weights.data(), kRows, tile, D, acc.data(), D, v0 > 0);
      }
      for (std::int64_t i = 0; i < rows; ++i) {
        const std::int64_t row = first + i;
        kernels::copy_rows(hidden + row * D, D, h.data(), D, 1, D);
        kernels::copy_rows(weight + targets[row] * D, D, target_row.data(), D, 1, D);
        nats[row] = loss.finish(h.data(), target_row.data(), m[static_cast<std::size_t>(i)], l[static_cast<std::size_t>(i)], acc.data() + i * D, d_hidden == nullptr ? nullptr : d_hidden + row * D);
      }
    }
  });
}

std::uint64_t tiled_cross_entropy_bytes(const at::Tensor& weight_VD, at::ScalarType compute_type, std::int64_t num_threads) {
  if (compute_type == at::kBFloat16) return static_cast<std::uint64_t>(num_threads * (weight_VD.size(1) * kRows * 3 / 2 + kVocabularyBf16 * kRows * 3 / 2)) * sizeof(float);
  if (weight_VD.scalar_type() == at::kFloat) return static_cast<std::uint64_t>(num_threads) << 20;
  return static_cast<std::uint64_t>(num_threads * weight_VD.size(1) * (kVocabulary + kTogether * 2 * kRows)) * sizeof(float);
}

}  // namespace alambic::models
