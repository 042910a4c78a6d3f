// SPDX-License-Identifier: Apache-2.0
#include "train/known_gradients.h"

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <string>
#include <utility>

#include "core/error.h"
#include "models/leaf_gradient.h"

namespace alambic::train {
namespace {

using torch::autograd::variable_list;

struct KnownGradients : torch::autograd::Node {
  explicit KnownGradients(variable_list own) : gradients(std::move(own)) {}
  std::string name() const override { return "KnownGradients"; }
  variable_list apply(variable_list&& d_outputs) override {
    if (gradients.empty()) fail(ErrorKind::kBug, "the backward pass of a loss with known gradients runs once");
    variable_list result = std::move(gradients);
    gradients.clear();
    if (!d_outputs[0].defined()) return variable_list(result.size());
    const at::NoGradGuard no_grad;
    const at::Tensor& factor = d_outputs[0];  // on another device to look at it would wait for that
    for (std::size_t i = 0; i < result.size(); ++i) {
      if (!result[i].defined()) continue;
      factor.is_cpu() ? result[i].mul_(factor.item<double>()) : result[i].mul_(factor);
      models::give_to_leaf(*this, i, result[i]);
    }
    return result;
  }
  void release_variables() override { gradients.clear(); }
  variable_list gradients;
};

}  // namespace

at::Tensor with_known_gradients(const at::Tensor& value, const variable_list& inputs, variable_list gradients) {
  const auto node = c10::make_intrusive<KnownGradients>(std::move(gradients));
  node->set_next_edges(torch::autograd::collect_next_edges(inputs));
  at::Tensor loss = value.detach();
  torch::autograd::set_history(loss, node);
  return loss;
}

}  // namespace alambic::train
