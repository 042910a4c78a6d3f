// SPDX-License-Identifier: Apache-2.0
#pragma once
// A loss whose gradients were made together with it.
#include <torch/csrc/autograd/custom_function.h>

#include <utility>

namespace alambic::train {

/// apply(value, inputs, gradients): `value`, a scalar, whose gradients by `inputs` are known already and belong to it alone: the
/// backward pass, of which there can be one, scales them in place, as one of a trained head is as large as the head.
/// (Function::apply sees tensors in an at::TensorList as differentiable inputs; those in a std::vector it passes through.)
struct KnownGradients : torch::autograd::Function<KnownGradients> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& value, at::TensorList /*inputs*/, torch::autograd::variable_list gradients) {
    context->save_for_backward(std::move(gradients));
    return value.clone();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context, torch::autograd::variable_list output_gradients) {
    const double factor = output_gradients.at(0).item<double>();
    torch::autograd::variable_list result(1);  // nothing flows into the value
    for (at::Tensor& gradient : context->get_saved_variables()) result.push_back(gradient.mul_(factor));
    result.emplace_back();  // nor into the gradients
    return result;
  }
};

}  // namespace alambic::train
