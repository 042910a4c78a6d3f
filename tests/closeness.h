// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

namespace alambic::testing {

struct Tolerance {
  double relative = 0;
  double absolute = 0;
};

/// Passes when |actual - expected| <= absolute + relative * |expected| everywhere; otherwise names the worst element.
inline ::testing::AssertionResult is_close(const at::Tensor& actual, const at::Tensor& expected, Tolerance tolerance) {
  if (!actual.defined() || !expected.defined()) return ::testing::AssertionFailure() << "an undefined tensor";
  if (actual.sizes() != expected.sizes())
    return ::testing::AssertionFailure() << "shape " << actual.sizes() << ", expected " << expected.sizes();
  if (actual.numel() == 0) return ::testing::AssertionFailure() << "nothing to compare: shape " << actual.sizes();
  const at::Tensor a = actual.detach().to(at::kDouble).flatten();
  const at::Tensor e = expected.detach().to(at::kDouble).flatten();
  const at::Tensor excess = (a - e).abs() - (tolerance.absolute + tolerance.relative * e.abs());
  const std::int64_t worst = excess.argmax().item<std::int64_t>();
  // Written so that NaN fails: a comparison with NaN is false.
  if (excess[worst].item<double>() <= 0) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "worst element " << worst << " of " << a.numel() << ": " << a[worst].item<double>()
                                       << ", expected " << e[worst].item<double>();
}

/// The same, with the tolerance relative to the largest |expected| of the whole tensor: for gradients, where small
/// elements are differences of large ones.
inline ::testing::AssertionResult is_close_to_scale(const at::Tensor& actual, const at::Tensor& expected, double relative) {
  const double scale = expected.defined() && expected.numel() > 0 ? expected.abs().max().item<double>() : 0;
  return is_close(actual, expected, {.absolute = relative * scale});
}

}  // namespace alambic::testing
