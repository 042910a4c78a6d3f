// SPDX-License-Identifier: Apache-2.0
#pragma once
// AdamW with 8-bit moments (arXiv:2110.02861), as bitsandbytes.optim.AdamW8bit: blocks of 256 elements, each with its largest
// magnitude in f32: 2 bytes a trained parameter and 1/32 of a byte, where f32 moments take 8. Tensors of fewer than 4,096
// elements keep f32 moments.
#include <optional>

#include "train/adamw.h"

namespace alambic::train {

inline constexpr std::int64_t kSmallest8bitTensor = 4096;  // bitsandbytes' min_8bit_size

class AdamW8bit final : public Optimizer {
 public:
  AdamW8bit(std::vector<Trained> trained, const OptimizerConfig& config);
  void update(double learning_rate, std::int64_t step) override;
  /// u8 codes "mean.<name>" and "square.<name>" in the tensor's shape, f32 "mean_scale.<name>" and "square_scale.<name>", one a
  /// block; of small tensors what AdamW lists.
  NamedState moments() const override;

 private:
  struct Large {
    Trained trained;
    at::Tensor mean, square, mean_scale, square_scale;
  };
  std::vector<Large> large_;
  std::optional<AdamW> small_;
  OptimizerConfig config_;
};

}  // namespace alambic::train
