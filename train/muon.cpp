// SPDX-License-Identifier: Apache-2.0
#include "train/muon.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace alambic::train {
namespace {

constexpr double kA = 3.4445, kB = -4.7750, kC = 2.0315, kEpsilon = 1e-7;
constexpr int kNewtonSchulzSteps = 5;

double rate_factor(const std::string& rule, std::int64_t outputs, std::int64_t inputs) {
  const auto o = static_cast<double>(outputs), i = static_cast<double>(inputs);
  if (rule == "match_rms_adamw") return 0.2 * std::sqrt(std::max(o, i));
  if (rule == "original") return std::sqrt(std::max(1.0, o / i));
  if (rule == "spectral_unclamped") return std::sqrt(o / i);
  fail(ErrorKind::kUsage, "optimizer.muon_rate: \"", rule, "\" is unknown", Remedy{"use match_rms_adamw, original or spectral_unclamped"});
}

}  // namespace

at::Tensor orthogonalised(const at::Tensor& matrix_OI, at::ScalarType type) {
  const bool tall = matrix_OI.size(0) > matrix_OI.size(1);
  at::Tensor x = matrix_OI.to(type, /*non_blocking=*/false, /*copy=*/true);
  if (tall) x = x.t();
  x.div_(at::linalg_vector_norm(x).clamp_min(kEpsilon));  // the spectral norm is then at most 1
  for (int step = 0; step < kNewtonSchulzSteps; ++step) {
    const at::Tensor gram = at::mm(x, x.t());
    x = at::addmm(x, at::addmm(gram, gram, gram, kB, kC), x, kA);
  }
  return tall ? x.t() : x;
}

Muon::Muon(std::vector<Trained> given, const OptimizerConfig& config, std::optional<at::ScalarType> type)
    : Optimizer(std::move(given)), config_(config),
      type_(type.value_or(trained().empty() || trained().front().tensor.is_cpu() ? models::fastest_compute_type() : at::kBFloat16)) {
  std::vector<Trained> rest;
  for (const Trained& one : trained()) {
    if (one.name.find("lora_") != std::string::npos)
      fail(ErrorKind::kUsage, "optimizer.kind: muon with the adapter ", one.name, ": orthogonal factors do not make an orthogonal update of the weight",
           Remedy{"use adamw, or train all weights (method: full)"});
    if (one.tensor.dim() != 2 || is_embedding_or_head(one.name)) rest.push_back(one);
    else matrices_.push_back({one, at::zeros_like(one.tensor.detach()), rate_factor(config.muon_rate, one.tensor.size(0), one.tensor.size(1))});
  }
  if (!rest.empty()) rest_.emplace(std::move(rest), config);
}

void Muon::update(double learning_rate, std::int64_t step) {
  for (const Matrix& matrix : matrices_) {
    const at::Tensor& gradient = matrix.trained.tensor.grad();
    const double rate = learning_rate * matrix.trained.rate;
    matrix.momentum_OI.lerp_(gradient, 1 - config_.muon_momentum);
    const at::Tensor update = orthogonalised(gradient.lerp(matrix.momentum_OI, config_.muon_momentum), type_);
    at::Tensor weight = matrix.trained.tensor.detach();
    weight.mul_(1 - rate * matrix.trained.weight_decay).add_(update, -rate * matrix.rate_factor);
  }
  if (rest_) rest_->update(learning_rate, step);
}

NamedState Muon::moments() const {
  NamedState moments = rest_ ? rest_->moments() : NamedState();
  for (const Matrix& matrix : matrices_) moments.emplace_back("momentum." + matrix.trained.name, matrix.momentum_OI);
  return moments;
}

}  // namespace alambic::train
