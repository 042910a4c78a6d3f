// SPDX-License-Identifier: Apache-2.0
#include "models/leaf_gradient.h"

#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/graph_task.h>

namespace alambic::models {
namespace {

thread_local bool is_giving = false;

torch::autograd::AccumulateGrad* leaf_of(const torch::autograd::Node& node, std::size_t edge) {
  const auto* const wanted = torch::autograd::get_current_graph_task_exec_info();
  if (wanted == nullptr || !wanted->empty()) return nullptr;  // empty: everything is wanted, and goes to .grad
  return dynamic_cast<torch::autograd::AccumulateGrad*>(node.next_edge(edge).function.get());
}

}  // namespace

bool give_to_leaf(const torch::autograd::Node& node, std::size_t edge, at::Tensor& gradient) {
  torch::autograd::AccumulateGrad* const leaf = leaf_of(node, edge);
  if (leaf == nullptr) return false;
  torch::autograd::variable_list only(1);
  only[0] = std::move(gradient);
  gradient.reset();
  struct Giving {
    Giving() { is_giving = true; }
    ~Giving() { is_giving = false; }
  } const giving;
  (*leaf)(std::move(only));
  return true;
}

bool is_giving_to_leaf() { return is_giving; }

at::Tensor gradient_of_leaf(const torch::autograd::Node& node, std::size_t edge) {
  const torch::autograd::AccumulateGrad* const leaf = leaf_of(node, edge);
  return leaf == nullptr ? at::Tensor() : leaf->variable.grad();
}

}  // namespace alambic::models
