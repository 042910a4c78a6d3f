// SPDX-License-Identifier: Apache-2.0
#pragma once
// Adafactor (arXiv:1804.04235) as transformers.Adafactor computes it with relative_step=False and beta1=None, that is, with the
// schedule's learning rate and without a mean of gradients: a matrix of R x C remembers R + C numbers instead of 2 R C.
// eps (1e-30, 1e-3), clip_threshold 1 and decay_rate -0.8 are its defaults; scale_parameter is off, as in the Trainer.
#include "train/optimizer.h"

namespace alambic::train {

class Adafactor final : public Optimizer {
 public:
  Adafactor(std::vector<Trained> trained, const OptimizerConfig& config);
  void update(double learning_rate, std::int64_t step) override;
  NamedState moments() const override;  // "row.<name>" and "column.<name>" of matrices, "square.<name>" of vectors

  struct Moments {
    at::Tensor row_R, column_C, square;  // f32; of a matrix the first two, else the third
  };
  /// The update of a vector, and of any tensor elsewhere than in a processor's memory; everything given is where the tensor is. new_share: of the new squares in the moments.
  static void update_by_operators(const Trained& one, const Moments& moments, double rate, double new_share);

 private:
  void update_matrix(const Trained& one, const Moments& moments, double rate, double new_share) const;
  std::vector<Moments> moments_;
  bool scale_parameter_;
};

}  // namespace alambic::train
