// SPDX-License-Identifier: Apache-2.0
#pragma once
// AdamW (arXiv:1711.05101, algorithm 2) on f32 tensors, as torch.optim.AdamW computes it.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "models/decoder.h"
#include "train/train_config.h"

namespace alambic::train {

/// Scales the gradients down to the norm max_norm if theirs is larger, as torch.nn.utils.clip_grad_norm_ does; 0: never.
/// Returns the norm before clipping (f64 over all tensors); where it is not finite nothing is scaled.
double clip_to_norm(std::span<at::Tensor> gradients, double max_norm);

/// Whether weight decay pulls on a tensor of this name. As in transformers' Trainer: on all but biases and norms, so
/// adapters' A and B and embeddings decay.
bool decays(std::string_view name);

class AdamW {
 public:
  /// trainable: names and f32 leaf tensors that require gradients; the tensors are shared, not copied.
  AdamW(std::vector<models::NamedTensor> trainable, const OptimizerConfig& config);

  /// One for each tensor, in order; a tensor that took no part has zeros. They alias the tensors' own gradients.
  std::span<at::Tensor> gradients();
  void step(double learning_rate);   // and forgets the gradients
  void forget_gradients();

  /// Tensors and moments by name, for a checkpoint: "weights.<name>", "mean.<name>", "square.<name>". Views, not copies.
  std::vector<std::pair<std::string, at::Tensor>> state() const;
  std::int64_t num_steps() const { return num_steps_; }
  /// Copies weights and moments back. Error(kData) listing names or shapes that do not fit.
  void restore(const std::vector<std::pair<std::string, at::Tensor>>& state, std::int64_t num_steps);
  std::int64_t num_parameters() const;

 private:
  std::vector<std::string> names_;
  std::vector<at::Tensor> parameters_, gradients_, means_, squares_;
  OptimizerConfig config_;
  std::int64_t num_steps_ = 0;
};

}  // namespace alambic::train
