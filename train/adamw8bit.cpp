// SPDX-License-Identifier: Apache-2.0
#include "train/adamw8bit.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "core/vector_loops.h"
#include "train/dynamic_map.h"

namespace alambic::train {
namespace {

struct Factors {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, epsilon, root_of_correction2, step_size, kept;  // kept: 1 - rate * decay
};

struct Arrays {
  float* parameter;
  const float* gradient;
  std::uint8_t *mean, *square;
  float *mean_scale, *square_scale;
  std::int64_t count;
};

/// The largest magnitude of some values, compared as bits: unlike a maximum of floats this is a vector loop.
[[gnu::always_inline]] inline float largest_magnitude(const float* values, std::int64_t count) {
  std::int32_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int32_t bits = std::bit_cast<std::int32_t>(values[i]) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return std::bit_cast<float>(largest);
}

/// Values become codes; returns their scale. Destroys the values.
[[gnu::always_inline]] inline float quantize(float* __restrict values, std::int64_t count, const DynamicMap& map, std::uint8_t* __restrict codes) {
  const float scale = largest_magnitude(values, count), inverse = 1 / scale;
  for (std::int64_t i = 0; i < count; ++i) {
    float share = values[i] * inverse;
    share = share > -1 ? share : -1;  // of a block of zeros it is NaN, which becomes -1 here and code 0 below, times a scale of 0
    share = share < 1 ? share : 1;
    values[i] = (share + 1) * 0.5f * 65535.0f;
  }
  // A loop of its own: the product above and the sum below are two roundings.
  std::int32_t steps[kQuantizationBlock];
  for (std::int64_t i = 0; i < count; ++i) steps[i] = static_cast<std::int32_t>(values[i] + 0.5f);
  for (std::int64_t i = 0; i < count; ++i) codes[i] = map.codes[static_cast<std::size_t>(steps[i])];
  return scale;
}

/// One block, start to end, while it is in the first cache: the moments exist as f32 only here. Every product and sum is rounded
/// where bitsandbytes' tensor operations round it on a processor, so codes and scales come out bit for bit.
[[gnu::always_inline]] inline void update_block(const Arrays& arrays, const Factors& factors, const DynamicMap& of_means, const DynamicMap& of_squares,
                                                std::int64_t block, std::int64_t count) {
  const std::int64_t first = block * kQuantizationBlock;
  float* const __restrict parameter = arrays.parameter + first;
  const float* const __restrict gradient = arrays.gradient + first;
  std::uint8_t* const __restrict mean_code = arrays.mean + first;
  std::uint8_t* const __restrict square_code = arrays.square + first;
  const float old_mean_scale = arrays.mean_scale[block], old_square_scale = arrays.square_scale[block];
  float mean[kQuantizationBlock], square[kQuantizationBlock];
  for (std::int64_t i = 0; i < count; ++i) {
    mean[i] = __builtin_fmaf(factors.one_minus_beta1, gradient[i], of_means.values[mean_code[i]] * old_mean_scale * factors.beta1);
    square[i] = __builtin_fmaf(factors.one_minus_beta2 * gradient[i], gradient[i], of_squares.values[square_code[i]] * old_square_scale * factors.beta2);
  }
  // A loop of its own, as the product and the sum below must not become one rounding.
  if (factors.kept != 1)
    for (std::int64_t i = 0; i < count; ++i) parameter[i] *= factors.kept;
  for (std::int64_t i = 0; i < count; ++i)
    parameter[i] += factors.step_size * mean[i] / (__builtin_sqrtf(square[i]) / factors.root_of_correction2 + factors.epsilon);

  arrays.mean_scale[block] = quantize(mean, count, of_means, mean_code);
  arrays.square_scale[block] = quantize(square, count, of_squares, square_code);
}

struct UpdateBlocks {
  [[gnu::always_inline]] static void run(const Arrays* arrays, const Factors* factors, const DynamicMap* of_means, const DynamicMap* of_squares,
                                         std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t left = arrays->count - block * kQuantizationBlock;
      // Two calls: the full block's loops have a known length.
      if (left >= kQuantizationBlock) update_block(*arrays, *factors, *of_means, *of_squares, block, kQuantizationBlock);
      else update_block(*arrays, *factors, *of_means, *of_squares, block, left);
    }
  }
};

}  // namespace

AdamW8bit::AdamW8bit(std::vector<Trained> given, const OptimizerConfig& config) : Optimizer(std::move(given)), config_(config) {
  std::vector<Trained> small;
  for (const Trained& one : trained()) {
    if (one.tensor.numel() < kSmallest8bitTensor) {
      small.push_back(one);
      continue;
    }
    const std::int64_t num_blocks = (one.tensor.numel() + kQuantizationBlock - 1) / kQuantizationBlock;
    large_.push_back({one, at::zeros(one.tensor.sizes(), at::kByte), at::zeros(one.tensor.sizes(), at::kByte), at::zeros({num_blocks}, at::kFloat),
                      at::zeros({num_blocks}, at::kFloat)});
  }
  if (!small.empty()) small_.emplace(std::move(small), config);
}

void AdamW8bit::update(double learning_rate, std::int64_t step) {
  const auto number = static_cast<double>(step);
  for (const Large& large : large_) {
    const double rate = learning_rate * large.trained.rate;
    const Factors factors{.beta1 = static_cast<float>(config_.beta1),
                          .one_minus_beta1 = static_cast<float>(1 - config_.beta1),
                          .beta2 = static_cast<float>(config_.beta2),
                          .one_minus_beta2 = static_cast<float>(1 - config_.beta2),
                          .epsilon = static_cast<float>(config_.epsilon),
                          .root_of_correction2 = static_cast<float>(std::sqrt(1 - std::pow(config_.beta2, number))),
                          .step_size = static_cast<float>(-rate / (1 - std::pow(config_.beta1, number))),
                          .kept = static_cast<float>(1 - rate * large.trained.weight_decay)};
    const Arrays arrays{.parameter = large.trained.tensor.mutable_data_ptr<float>(),
                        .gradient = large.trained.tensor.grad().const_data_ptr<float>(),
                        .mean = large.mean.mutable_data_ptr<std::uint8_t>(),
                        .square = large.square.mutable_data_ptr<std::uint8_t>(),
                        .mean_scale = large.mean_scale.mutable_data_ptr<float>(),
                        .square_scale = large.square_scale.mutable_data_ptr<float>(),
                        .count = large.trained.tensor.numel()};
    at::parallel_for(0, large.mean_scale.numel(), /*grain_size=*/16, [&](std::int64_t begin, std::int64_t end) {
      run_vectorised<UpdateBlocks>(&arrays, &factors, &signed_map(), &unsigned_map(), begin, end);
    });
  }
  if (small_) small_->update(learning_rate, step);
}

NamedState AdamW8bit::moments() const {
  NamedState moments = small_ ? small_->moments() : NamedState();
  for (const Large& large : large_) {
    moments.emplace_back("mean." + large.trained.name, large.mean);
    moments.emplace_back("mean_scale." + large.trained.name, large.mean_scale);
    moments.emplace_back("square." + large.trained.name, large.square);
    moments.emplace_back("square_scale." + large.trained.name, large.square_scale);
  }
  return moments;
}

}  // namespace alambic::train
