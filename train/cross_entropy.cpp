// SPDX-License-Identifier: Apache-2.0
#include "train/cross_entropy.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <functional>

#include "core/error.h"
#include "core/random.h"

namespace alambic::train {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A number whose gradients are known already: one for each of `inputs`. (Function::apply sees tensors in an at::TensorList as
// differentiable inputs; those in a std::vector it passes through.)
struct KnownGradients : torch::autograd::Function<KnownGradients> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& value, at::TensorList /*inputs*/, variable_list gradients) {
    context->save_for_backward(std::move(gradients));
    return value.clone();
  }
  static variable_list backward(AutogradContext* context, variable_list output_gradients) {
    const double factor = output_gradients.at(0).item<double>();
    variable_list result(1);  // nothing flows into the value
    for (const at::Tensor& gradient : context->get_saved_variables()) result.push_back(gradient * factor);
    result.emplace_back();    // nor into the gradients
    return result;
  }
};

struct Rows {
  at::Tensor index_K, targets_K;
};

Rows kept_rows(const at::Tensor& hidden_TD, const models::Linear& head, const at::Tensor& targets_T, const at::Tensor& keep_T) {
  const std::int64_t num_tokens = hidden_TD.size(0), vocabulary = head.weight_OI.size(0);
  if (hidden_TD.dim() != 2 || hidden_TD.size(1) != head.weight_OI.size(1) || targets_T.sizes() != at::IntArrayRef{num_tokens} ||
      keep_T.sizes() != at::IntArrayRef{num_tokens})
    fail(ErrorKind::kBug, "cross entropy: hidden ", hidden_TD.sizes(), ", head ", head.weight_OI.sizes(), ", targets ", targets_T.sizes(),
         ", keep ", keep_T.sizes(), " do not agree");
  const at::Tensor index_K = keep_T.nonzero().squeeze(1);
  const at::Tensor targets_K = targets_T.index_select(0, index_K);
  if (targets_K.numel() > 0 && (targets_K.min().item<std::int64_t>() < 0 || targets_K.max().item<std::int64_t>() >= vocabulary))
    fail(ErrorKind::kData, "a token to predict has id ", targets_K.max().item<std::int64_t>(), ", outside the model's ", vocabulary, " tokens",
         Remedy{"prepare the data with the tokenizer of this model"});
  return {index_K, targets_K};
}

at::Tensor logits_of(const models::Linear& head, const at::Tensor& hidden_KD, std::uint64_t seed) {
  return head(hidden_KD.to(head.weight_OI.scalar_type()), seed).to(at::kFloat);
}

at::Tensor nats_of(const at::Tensor& log_p_KV, const at::Tensor& targets_K) { return log_p_KV.gather(1, targets_K.unsqueeze(1)).squeeze(1).neg(); }

}  // namespace

std::int64_t num_rows_in_chunk(std::int64_t vocabulary_size) { return std::clamp<std::int64_t>((16 << 20) / vocabulary_size, 16, 512); }

at::Tensor cross_entropy_sum(const at::Tensor& hidden_TD, const models::Linear& head, const at::Tensor& targets_T,
                             const at::Tensor& keep_T, std::uint64_t dropout_seed) {
  const auto [index_K, targets_K] = kept_rows(hidden_TD, head, targets_T, keep_T);
  const std::int64_t num_kept = index_K.numel(), rows = num_rows_in_chunk(head.weight_OI.size(0));
  at::Tensor nats = at::scalar_tensor(0, at::kDouble);
  if (num_kept == 0) return nats;

  // Everything that may want a gradient; the hidden states come first.
  variable_list inputs = {hidden_TD};
  const auto add_trained = [&](const at::Tensor& tensor) {
    if (tensor.defined() && tensor.requires_grad()) inputs.push_back(tensor);
  };
  add_trained(head.weight_OI);
  add_trained(head.bias_O);
  if (head.adapter) add_trained(head.adapter->a_RI), add_trained(head.adapter->b_OR), add_trained(head.adapter->magnitude_O);
  const bool differentiable = at::GradMode::is_enabled() && (inputs.size() > 1 || hidden_TD.requires_grad());
  variable_list gradients(inputs.size());
  const at::Tensor hidden = hidden_TD.detach();
  if (differentiable) {
    gradients[0] = at::zeros_like(hidden);
    for (std::size_t i = 1; i < inputs.size(); ++i) gradients[i] = at::zeros_like(inputs[i]);
  }
  const bool plain = !head.adapter && !head.bias_O.defined();
  for (std::int64_t begin = 0; begin < num_kept; begin += rows) {
    const std::int64_t count = std::min(rows, num_kept - begin);
    const at::Tensor index = index_K.narrow(0, begin, count), targets = targets_K.narrow(0, begin, count);
    const at::Tensor h_KD = hidden.index_select(0, index);
    const std::uint64_t seed = dropout_seed == 0 ? 0 : derive_seed(dropout_seed, "head", {static_cast<std::uint64_t>(begin)}) | 1;
    if (plain) {  // closed form: d nats / d logits = softmax - one-hot
      const at::NoGradGuard no_grad;
      at::Tensor log_p_KV = at::log_softmax(logits_of(head, h_KD, seed), 1);
      nats += nats_of(log_p_KV, targets).sum(at::kDouble);
      if (!differentiable) continue;
      log_p_KV.exp_();
      log_p_KV.scatter_add_(1, targets.unsqueeze(1), at::ones({count, 1}, log_p_KV.options()).neg_());
      const at::Tensor weight_VD = head.weight_OI.detach(), d_logits_KV = log_p_KV.to(weight_VD.scalar_type());
      if (hidden_TD.requires_grad()) gradients[0].index_copy_(0, index, at::mm(d_logits_KV, weight_VD).to(hidden.scalar_type()));
      if (inputs.size() > 1) gradients[1].addmm_(d_logits_KV.t(), h_KD.to(weight_VD.scalar_type()));
    } else {  // an adapter or a bias on the head: the Linear's own backward, on this chunk alone
      const at::AutoGradMode grad(differentiable);
      const at::Tensor leaf_KD = h_KD.detach().requires_grad_(differentiable);
      const at::Tensor chunk_nats = nats_of(at::log_softmax(logits_of(head, leaf_KD, seed), 1), targets).sum(at::kDouble);
      nats += chunk_nats.detach();
      if (!differentiable) continue;
      variable_list wanted = inputs;
      wanted[0] = leaf_KD;
      const variable_list found = torch::autograd::grad({chunk_nats}, wanted);
      const at::NoGradGuard no_grad;
      gradients[0].index_copy_(0, index, found[0]);
      for (std::size_t i = 1; i < found.size(); ++i) gradients[i] += found[i];
    }
  }
  return differentiable ? KnownGradients::apply(nats, at::TensorList(inputs), gradients) : nats;
}

at::Tensor cross_entropy_of_kept(const at::Tensor& hidden_TD, const models::Linear& head, const at::Tensor& targets_T,
                                 const at::Tensor& keep_T) {
  const at::NoGradGuard no_grad;
  const auto [index_K, targets_K] = kept_rows(hidden_TD, head, targets_T, keep_T);
  const std::int64_t num_kept = index_K.numel(), rows = num_rows_in_chunk(head.weight_OI.size(0));
  at::Tensor nats_K = at::empty({num_kept}, at::kFloat);
  for (std::int64_t begin = 0; begin < num_kept; begin += rows) {
    const std::int64_t count = std::min(rows, num_kept - begin);
    const at::Tensor logits_KV = logits_of(head, hidden_TD.index_select(0, index_K.narrow(0, begin, count)), 0);
    nats_K.narrow(0, begin, count).copy_(nats_of(at::log_softmax(logits_KV, 1), targets_K.narrow(0, begin, count)));
  }
  return nats_K;
}

}  // namespace alambic::train
