// SPDX-License-Identifier: Apache-2.0
#pragma once
// Muon (https://kellerjordan.github.io/posts/muon/; arXiv:2502.16982) as torch.optim.Muon computes it: the momentum of a weight
// matrix, made nearly orthogonal by five Newton-Schulz steps, is its update. For the matrices inside the blocks of a model that
// is trained whole; embedding, head, norms and biases get AdamW. Nesterov momentum, coefficients and epsilon are torch's.
#include <optional>

#include "train/adamw.h"

namespace alambic::train {

/// The Newton-Schulz iteration of torch.optim.Muon on a matrix, computed in `type`: roughly U V^T of its singular value
/// decomposition. torch always takes bf16.
at::Tensor orthogonalised(const at::Tensor& matrix_OI, at::ScalarType type);

class Muon final : public Optimizer {
 public:
  /// type: of the Newton-Schulz products. By default bf16 where the processor multiplies it natively, else f32, which is
  /// closer to orthogonal; elsewhere bf16 would take several times as long. On a GPU bf16.
  Muon(std::vector<Trained> trained, const OptimizerConfig& config, std::optional<at::ScalarType> type = std::nullopt);
  void update(double learning_rate, std::int64_t step) override;
  NamedState moments() const override;  // "momentum.<name>" of matrices, of the rest what AdamW lists

 private:
  struct Matrix {
    Trained trained;
    at::Tensor momentum_OI;
    double rate_factor;  // config.muon_rate for this shape
  };
  std::vector<Matrix> matrices_;
  std::optional<AdamW> rest_;
  OptimizerConfig config_;
  at::ScalarType type_;
};

}  // namespace alambic::train
