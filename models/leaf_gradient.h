// SPDX-License-Identifier: Apache-2.0
#pragma once
// Gradients given to trained tensors in the middle of a node's backward pass, instead of at its end.
#include <torch/csrc/autograd/function.h>

namespace alambic::models {

/// Called in the backward pass of a node. Adds `gradient`, that of the node's next edge number `edge`, to the .grad of the trained tensor there
/// and lets go of it: its memory is free for what comes next, and its sum over ranks can begin. Where that is impossible it returns
/// false and leaves `gradient` to be returned by the node as usual: the pass asks for gradients of chosen tensors (autograd::grad), or the
/// edge leads to no leaf.
/// Autograd visits the leaf once more at the pass's end, with nothing, and its hooks then run again.
bool give_to_leaf(const torch::autograd::Node& node, std::size_t edge, at::Tensor& gradient);

/// Whether this thread is in give_to_leaf(): for hooks that must tell its visit from autograd's.
bool is_giving_to_leaf();

/// The .grad of that leaf, for a node that adds to it itself; undefined where give_to_leaf() would return false, or nothing has been given yet.
at::Tensor gradient_of_leaf(const torch::autograd::Node& node, std::size_t edge);

}  // namespace alambic::models
