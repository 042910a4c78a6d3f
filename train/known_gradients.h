// SPDX-License-Identifier: Apache-2.0
#pragma once
// A loss whose gradients were made together with it.
#include <torch/csrc/autograd/variable.h>

namespace alambic::train {

/// `value`, a scalar without history, as a function of `inputs` whose gradients by them are known already. They belong to it alone: the
/// backward pass, of which there can be one, scales them in place and gives those of trained tensors away at once, as one of a head is as
/// large as the head.
at::Tensor with_known_gradients(const at::Tensor& value, const torch::autograd::variable_list& inputs, torch::autograd::variable_list gradients);

}  // namespace alambic::train
