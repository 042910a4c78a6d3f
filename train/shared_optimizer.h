// SPDX-License-Identifier: Apache-2.0
#pragma once
// The gradients and moments of what trains, shared by ranks (ZeRO, arXiv:1910.02054, section 5): each rank adds up the gradients of its part of all
// weights, keeps the moments of that part and changes it; then all gather the weights. The others' gradients are free when their sum begins, in
// the backward pass of a step's last micro-batch (train/gradient_sums.h). Weights are whole on every rank, and so are sums of earlier micro-batches.
#include "parallel/communicator.h"
#include "train/optimizer.h"

namespace alambic::train {

/// Elements [first, first + count) of a flattened tensor.
struct Slice {
  std::int64_t first = 0, count = 0;
};

/// By rank, then by tensor: equal parts of each bucket (numbers of tensors, each in one), one behind the other, so that all ranks have as much to
/// send and to add while it is summed; what a rank lacks of its share it gets of the next. Cuts lie at multiples of kPieceOfNorm elements, and what
/// is cut off is no smaller than that, so that sums, vector loops and blocks of 8-bit moments are those of the whole.
std::vector<std::vector<Slice>> slices_of(std::span<const std::int64_t> sizes, std::span<const std::vector<std::size_t>> buckets, int ranks);

class SharedOptimizer final : public Optimizer {
 public:
  /// For kind: adamw and adamw8bit. `ranks` outlives this.
  SharedOptimizer(std::vector<Trained> trained, const OptimizerConfig& config, parallel::Communicator& ranks);

  void update(double learning_rate, std::int64_t step) override;
  NamedState moments() const override { return own_->moments(); }  // of this rank's part
  NamedState state() const override;                               // weights alone
  std::int64_t state_bytes() const override;                       // of the moments of all ranks
  /// What becomes this rank's goes to its own part; the tensors' gradients are forgotten.
  void start_sum(std::span<const std::size_t> tensors, parallel::Communicator& ranks) override;
  std::span<at::Tensor> sums() override { return own_->gradients(); }
  double clip(double max_norm, parallel::Communicator& ranks) override;
  void forget_gradients() override;
  std::vector<checkpoints::TensorToWrite> shared_moments() const override;
  at::Tensor gather_moment(std::size_t i) override;
  void restore(const NamedState& state, std::int64_t num_steps) override;
  void share(std::int64_t num_steps, parallel::Communicator& ranks) override;

 private:
  /// A moment as a checkpoint has it, one number for `per` elements of a tensor.
  struct Moment {
    checkpoints::TensorToWrite whole;
    std::size_t tensor;
    std::int64_t per;
    Slice of(const Slice& elements) const { return {elements.first / per, (elements.count + per - 1) / per}; }
  };
  at::Tensor own_part(const Moment& moment) const;  // undefined: this rank has none of it
  const Slice& slice(std::size_t tensor) const { return slices_[static_cast<std::size_t>(ranks_.rank())][tensor]; }
  /// copy(own buffer, place in a tensor) for the elements [begin, begin + count) of a rank's part, piece by piece.
  template <class Copy>
  void walk(int rank, std::int64_t begin, const at::Tensor& buffer, std::span<const at::Tensor> tensors, const Copy& copy) const;

  parallel::Communicator& ranks_;
  std::vector<std::vector<Slice>> slices_;
  std::int64_t longest_ = 0;          // elements of the largest part
  std::unique_ptr<Optimizer> own_;    // of this rank's part
  std::vector<std::size_t> of_own_;   // its tensors, as places among trained(), ascending
  std::vector<Moment> moments_;
  NamedState given_;                  // rank 0's, between restore() and share()
};

}  // namespace alambic::train
