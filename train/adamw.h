// SPDX-License-Identifier: Apache-2.0
#pragma once
// AdamW (arXiv:1711.05101, algorithm 2) with f32 moments, as torch.optim.AdamW computes it.
#include "train/optimizer.h"

namespace alambic::train {

class AdamW final : public Optimizer {
 public:
  AdamW(std::vector<Trained> trained, const OptimizerConfig& config);
  void update(double learning_rate, std::int64_t step) override;
  NamedState moments() const override;  // "mean.<name>", "square.<name>"

 private:
  /// Tensors that are treated alike: one call of the fused kernel.
  struct Group {
    double rate, weight_decay;
    std::vector<at::Tensor> parameters, means, squares;
  };
  std::vector<Group> groups_;
  NamedState moments_;
  OptimizerConfig config_;
};

}  // namespace alambic::train
