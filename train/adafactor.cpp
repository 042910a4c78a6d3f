// SPDX-License-Identifier: Apache-2.0
#include "train/adafactor.h"

#include <ATen/Parallel.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/vector_loops.h"

namespace alambic::train {
namespace {

constexpr double kAddedToSquares = 1e-30, kSmallestScale = 1e-3, kClipThreshold = 1.0, kDecayRate = -0.8;

/// Squares of some rows: the sum of each row, and added to the sum of each column.
struct AddSquares {
  [[gnu::always_inline]] static void run(const float* gradient, std::int64_t rows, std::int64_t columns, double* row_sum, double* column_sum) {
    for (std::int64_t row = 0; row < rows; ++row) {
      const float* const __restrict g = gradient + row * columns;
      double lanes[8] = {};
      std::int64_t i = 0;
      for (; i + 8 <= columns; i += 8)
        for (int lane = 0; lane < 8; ++lane) {
          const double square = static_cast<double>(g[i + lane]) * static_cast<double>(g[i + lane]);
          lanes[lane] += square;
          column_sum[i + lane] += square;
        }
      for (; i < columns; ++i) {
        const double square = static_cast<double>(g[i]) * static_cast<double>(g[i]);
        lanes[0] += square;
        column_sum[i] += square;
      }
      row_sum[row] = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
    }
  }
};

/// The sum of squares of the update row_factor * column_factor * gradient, which is never stored.
struct SquaredLength {
  [[gnu::always_inline]] static void run(const float* gradient, std::int64_t rows, std::int64_t columns, const float* row_factor, const float* column_factor, double* sum) {
    double total = 0;
    for (std::int64_t row = 0; row < rows; ++row) {
      const float* const __restrict g = gradient + row * columns;
      double lanes[8] = {};
      std::int64_t i = 0;
      for (; i + 8 <= columns; i += 8)
        for (int lane = 0; lane < 8; ++lane) {
          const auto update = static_cast<double>(row_factor[row] * column_factor[i + lane] * g[i + lane]);
          lanes[lane] += update * update;
        }
      for (; i < columns; ++i) {
        const auto update = static_cast<double>(row_factor[row] * column_factor[i] * g[i]);
        lanes[0] += update * update;
      }
      total += ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
    }
    *sum = total;
  }
};

struct Apply {
  [[gnu::always_inline]] static void run(float* parameter, const float* gradient, std::int64_t rows, std::int64_t columns, const float* row_factor,
                                         const float* column_factor, float step_size, float kept) {
    for (std::int64_t row = 0; row < rows; ++row) {
      float* const __restrict p = parameter + row * columns;
      const float* const __restrict g = gradient + row * columns;
      for (std::int64_t i = 0; i < columns; ++i) p[i] = kept * p[i] - step_size * (row_factor[row] * column_factor[i] * g[i]);
    }
  }
};

double root_mean_square(double sum_of_squares, std::int64_t count) { return std::sqrt(sum_of_squares / static_cast<double>(count)); }

}  // namespace

Adafactor::Adafactor(std::vector<Trained> given, const OptimizerConfig& config) : Optimizer(std::move(given)), scale_parameter_(config.adafactor_scale_parameter) {
  for (const Trained& one : trained()) {
    const at::Tensor value = one.tensor.detach();
    if (value.dim() > 2) fail(ErrorKind::kBug, one.name, ": a trained tensor of ", value.dim(), " dimensions");
    Moments moments;
    if (value.dim() == 2) moments = {at::zeros({value.size(0)}, value.options()), at::zeros({value.size(1)}, value.options()), {}};
    else moments.square = at::zeros_like(value);
    moments_.push_back(std::move(moments));
  }
}

void Adafactor::update(double learning_rate, std::int64_t step) {
  const double new_share = std::pow(static_cast<double>(step), kDecayRate);
  for (std::size_t i = 0; i < moments_.size(); ++i) {
    const Trained& one = trained()[i];
    double rate = learning_rate * one.rate;
    if (scale_parameter_) {
      const double norm = at::linalg_vector_norm(one.tensor.detach()).item<double>();
      rate *= std::max(kSmallestScale, norm / std::sqrt(static_cast<double>(one.tensor.numel())));
    }
    if (!one.tensor.is_cpu() || moments_[i].square.defined()) update_by_operators(one, moments_[i], rate, new_share);
    else update_matrix(one, moments_[i], rate, new_share);
  }
}

void Adafactor::update_matrix(const Trained& one, const Moments& moments, double rate, double new_share) const {
  const std::int64_t rows = one.tensor.size(0), columns = one.tensor.size(1);
  const float* const gradient = one.tensor.grad().const_data_ptr<float>();
  float* const parameter = one.tensor.mutable_data_ptr<float>();
  float *const row_mean = moments.row_R.mutable_data_ptr<float>(), *const column_mean = moments.column_C.mutable_data_ptr<float>();

  // Pieces of whole rows, at most 64, so that partial column sums stay small; they depend on the shape, not on the threads.
  constexpr std::int64_t kPieceElements = 1 << 16, kMostPieces = 64;
  const std::int64_t piece_rows = std::max((kPieceElements + columns - 1) / columns, (rows + kMostPieces - 1) / kMostPieces);
  const std::int64_t num_pieces = (rows + piece_rows - 1) / piece_rows;
  const auto for_each_piece = [&](const auto& act) {
    at::parallel_for(0, num_pieces, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t piece = begin; piece < end; ++piece) act(piece, piece * piece_rows, std::min(piece_rows, rows - piece * piece_rows));
    });
  };

  std::vector<double> row_sums(static_cast<std::size_t>(rows)), column_sums(static_cast<std::size_t>(num_pieces * columns));
  for_each_piece([&](std::int64_t piece, std::int64_t first, std::int64_t count) {
    run_vectorised<AddSquares>(gradient + first * columns, count, columns, row_sums.data() + first, column_sums.data() + piece * columns);
  });
  const auto moved = [&](float old, double sum, std::int64_t count) {
    return static_cast<float>((1 - new_share) * static_cast<double>(old) + new_share * (sum / static_cast<double>(count) + kAddedToSquares));
  };
  double mean_of_rows = 0;
  for (std::int64_t row = 0; row < rows; ++row) {
    row_mean[row] = moved(row_mean[row], row_sums[static_cast<std::size_t>(row)], columns);
    mean_of_rows += static_cast<double>(row_mean[row]) / static_cast<double>(rows);
  }
  std::vector<float> row_factors(static_cast<std::size_t>(rows)), column_factors(static_cast<std::size_t>(columns));
  for (std::int64_t row = 0; row < rows; ++row)
    row_factors[static_cast<std::size_t>(row)] = static_cast<float>(1 / std::sqrt(static_cast<double>(row_mean[row]) / mean_of_rows));
  for (std::int64_t column = 0; column < columns; ++column) {
    double sum = 0;
    for (std::int64_t piece = 0; piece < num_pieces; ++piece) sum += column_sums[static_cast<std::size_t>(piece * columns + column)];
    column_mean[column] = moved(column_mean[column], sum, rows);
    column_factors[static_cast<std::size_t>(column)] = static_cast<float>(1 / std::sqrt(static_cast<double>(column_mean[column])));
  }

  std::vector<double> lengths(static_cast<std::size_t>(num_pieces));
  for_each_piece([&](std::int64_t piece, std::int64_t first, std::int64_t count) {
    run_vectorised<SquaredLength>(gradient + first * columns, count, columns, static_cast<const float*>(row_factors.data() + first),
                                  static_cast<const float*>(column_factors.data()), &lengths[static_cast<std::size_t>(piece)]);
  });
  double length = 0;
  for (const double part : lengths) length += part;
  const double clipped = std::max(1.0, root_mean_square(length, rows * columns) / kClipThreshold);
  const auto step_size = static_cast<float>(rate / clipped), kept = static_cast<float>(1 - one.weight_decay * rate);
  for_each_piece([&](std::int64_t, std::int64_t first, std::int64_t count) {
    run_vectorised<Apply>(parameter + first * columns, gradient + first * columns, count, columns, static_cast<const float*>(row_factors.data() + first),
                          static_cast<const float*>(column_factors.data()), step_size, kept);
  });
}

void Adafactor::update_by_operators(const Trained& one, const Moments& moments, double rate, double new_share) {
  const at::NoGradGuard no_grad;
  const at::Tensor& gradient = one.tensor.grad();
  at::Tensor update;
  if (moments.square.defined()) {
    moments.square.mul_(1 - new_share).add_(gradient * gradient + kAddedToSquares, new_share);
    update = moments.square.rsqrt().mul_(gradient);
  } else {
    const at::Tensor square_RC = gradient * gradient;
    const auto move = [&](const at::Tensor& mean, std::int64_t along) { mean.copy_((1 - new_share) * mean.to(at::kDouble) + new_share * (square_RC.mean({along}, false, at::kDouble) + kAddedToSquares)); };
    move(moments.row_R, 1), move(moments.column_C, 0);
    const at::Tensor row_R = moments.row_R.to(at::kDouble), row_factor_R = (row_R / row_R.mean()).rsqrt().to(at::kFloat), column_factor_C = moments.column_C.to(at::kDouble).rsqrt().to(at::kFloat);
    update = (row_factor_R.unsqueeze(1) * column_factor_C).mul_(gradient);
  }
  // Numbers that follow from the update stay on the device: to look at them would wait for it.
  const at::Tensor clipped = (at::linalg_vector_norm(update, 2, std::nullopt, false, at::kDouble) / (std::sqrt(static_cast<double>(update.numel())) * kClipThreshold)).clamp_min(1.0);
  one.tensor.detach().mul_(1 - one.weight_decay * rate).sub_(update.mul_((rate / clipped).to(at::kFloat)));
}

NamedState Adafactor::moments() const {
  NamedState all;
  for (std::size_t i = 0; i < moments_.size(); ++i) {
    const std::string& name = trained()[i].name;
    if (moments_[i].square.defined()) {
      all.emplace_back("square." + name, moments_[i].square);
    } else {
      all.emplace_back("row." + name, moments_[i].row_R);
      all.emplace_back("column." + name, moments_[i].column_C);
    }
  }
  return all;
}

}  // namespace alambic::train
