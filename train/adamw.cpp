// SPDX-License-Identifier: Apache-2.0
#include "train/adamw.h"

#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

namespace alambic::train {

AdamW::AdamW(std::vector<Trained> given, const OptimizerConfig& config) : Optimizer(std::move(given)), config_(config) {
  for (const Trained& one : trained()) {
    auto group = std::find_if(groups_.begin(), groups_.end(), [&](const Group& some) { return some.rate == one.rate && some.weight_decay == one.weight_decay; });
    if (group == groups_.end()) group = groups_.insert(group, {one.rate, one.weight_decay, {}, {}, {}});
    const at::Tensor value = one.tensor.detach();
    group->parameters.push_back(one.tensor);
    moments_.emplace_back("mean." + one.name, group->means.emplace_back(at::zeros_like(value)));
    moments_.emplace_back("square." + one.name, group->squares.emplace_back(at::zeros_like(value)));
  }
}

void AdamW::update(double learning_rate, std::int64_t step) {
  const at::Tensor number = at::scalar_tensor(static_cast<double>(step), trained().front().tensor.options().requires_grad(false));
  for (const Group& group : groups_) {
    std::vector<at::Tensor> gradients;
    for (const at::Tensor& parameter : group.parameters) gradients.push_back(parameter.grad());
    // The kernel reads the number of the step being made from one f32 tensor a parameter.
    const std::vector<at::Tensor> steps(gradients.size(), number);
    at::_fused_adamw_(group.parameters, gradients, group.means, group.squares, {}, steps, learning_rate * group.rate, config_.beta1, config_.beta2,
                      group.weight_decay, config_.epsilon, /*amsgrad=*/false, /*maximize=*/false);
  }
}

NamedState AdamW::moments() const { return moments_; }

}  // namespace alambic::train
