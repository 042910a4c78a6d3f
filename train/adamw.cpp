// SPDX-License-Identifier: Apache-2.0
#include "train/adamw.h"

#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <regex>

#include "core/error.h"

namespace alambic::train {

double clip_to_norm(std::span<at::Tensor> gradients, double max_norm) {
  double square = 0;
  for (const at::Tensor& gradient : gradients) {
    const double norm = at::linalg_vector_norm(gradient).item<double>();
    square += norm * norm;
  }
  const double norm = std::sqrt(square);
  // 1e-6 as in torch.nn.utils.clip_grad_norm_.
  if (max_norm > 0 && std::isfinite(norm) && norm > max_norm - 1e-6)
    for (at::Tensor& gradient : gradients) gradient.mul_(max_norm / (norm + 1e-6));
  return norm;
}

bool decays(std::string_view name) {
  static const std::regex exempt("bias|layernorm|rmsnorm|(^|\\.)norm($|\\.)|_norm($|\\.)");
  std::string lower(name);
  std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char letter) { return static_cast<char>(std::tolower(letter)); });
  return !std::regex_search(lower, exempt);
}

AdamW::AdamW(std::vector<models::NamedTensor> trainable, const OptimizerConfig& config) : config_(config) {
  if (trainable.empty()) fail(ErrorKind::kUsage, "nothing trains: no adapter is attached and no weight is trained");
  // Those that decay first, so that each kind is one contiguous list for the fused kernel.
  std::stable_partition(trainable.begin(), trainable.end(), [](const models::NamedTensor& named) { return decays(named.name); });
  for (const models::NamedTensor& named : trainable) {
    if (named.tensor->scalar_type() != at::kFloat || !named.tensor->requires_grad() || !named.tensor->is_leaf())
      fail(ErrorKind::kBug, named.name, ": a trained tensor must be an f32 leaf that requires gradients");
    names_.push_back(named.name);
    parameters_.push_back(*named.tensor);
    const at::Tensor value = named.tensor->detach();
    means_.push_back(at::zeros_like(value));
    squares_.push_back(at::zeros_like(value));
  }
}

std::span<at::Tensor> AdamW::gradients() {
  gradients_.clear();
  for (at::Tensor& parameter : parameters_) {
    if (!parameter.grad().defined()) parameter.mutable_grad() = at::zeros_like(parameter.detach());
    gradients_.push_back(parameter.grad());
  }
  return gradients_;
}

void AdamW::step(double learning_rate) {
  const at::NoGradGuard no_grad;
  gradients();
  const std::size_t total = parameters_.size();
  const auto first_exempt = static_cast<std::size_t>(
      std::find_if(names_.begin(), names_.end(), [](const std::string& name) { return !decays(name); }) - names_.begin());
  // The kernel reads the number of the step being made from one f32 tensor a parameter.
  ++num_steps_;
  const std::vector<at::Tensor> steps(total, at::scalar_tensor(static_cast<double>(num_steps_), at::kFloat));
  const auto update = [&](std::size_t begin, std::size_t end, double weight_decay) {
    if (begin == end) return;
    const auto part = [&](const std::vector<at::Tensor>& all) { return at::TensorList(all).slice(begin, end - begin); };
    at::_fused_adamw_(part(parameters_), part(gradients_), part(means_), part(squares_), {}, part(steps), learning_rate,
                      config_.beta1, config_.beta2, weight_decay, config_.epsilon, /*amsgrad=*/false, /*maximize=*/false);
  };
  update(0, first_exempt, config_.weight_decay);
  update(first_exempt, total, 0);
  forget_gradients();
}

void AdamW::forget_gradients() {
  gradients_.clear();
  for (at::Tensor& parameter : parameters_) parameter.mutable_grad().reset();
}

std::vector<std::pair<std::string, at::Tensor>> AdamW::state() const {
  std::vector<std::pair<std::string, at::Tensor>> state;
  for (std::size_t i = 0; i < names_.size(); ++i) {
    state.emplace_back("weights." + names_[i], parameters_[i].detach());
    state.emplace_back("mean." + names_[i], means_[i]);
    state.emplace_back("square." + names_[i], squares_[i]);
  }
  return state;
}

void AdamW::restore(const std::vector<std::pair<std::string, at::Tensor>>& state, std::int64_t num_steps) {
  std::map<std::string, at::Tensor> given(state.begin(), state.end());
  std::string problems;
  const at::NoGradGuard no_grad;
  for (auto& [name, own] : this->state()) {
    const auto found = given.find(name);
    if (found == given.end()) problems += " missing " + name + ";";
    else if (found->second.sizes() != own.sizes() || found->second.scalar_type() != at::kFloat) problems += " another shape or type of " + name + ";";
    else own.copy_(found->second);
    given.erase(name);
  }
  for (const auto& [name, unknown] : given) problems += " unknown " + name + ";";
  if (!problems.empty()) fail(ErrorKind::kData, "the checkpoint does not fit what trains:", problems);
  num_steps_ = num_steps;
}

std::int64_t AdamW::num_parameters() const {
  std::int64_t count = 0;
  for (const at::Tensor& parameter : parameters_) count += parameter.numel();
  return count;
}

}  // namespace alambic::train
