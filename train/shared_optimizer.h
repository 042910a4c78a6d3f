// SPDX-License-Identifier: Apache-2.0
#pragma once
// The gradients and moments of what trains, shared by ranks (ZeRO, arXiv:1910.02054, section 5): each rank adds up the gradients of its part of all
// weights, keeps the moments of that part and changes it; then all gather the weights. The others' gradients are free when their sum begins, in
// the backward pass of a step's last micro-batch (train/gradient_sums.h). Weights are whole on every rank, and so are sums of earlier micro-batches.
// Where groups share for themselves (hybrid sharding, as FSDP, arXiv:2304.11277, section 3.2.2), each group has all parts; of a part each of those that have it
// adds up a piece, and they exchange them.
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
  /// For kind: adamw and adamw8bit. group: so many ranks that follow each other share, each group for itself; a divisor of ranks.size(). `ranks`
  /// outlives this.
  SharedOptimizer(std::vector<Trained> trained, const OptimizerConfig& config, parallel::Communicator& ranks, int group);

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
  int member() const { return ranks_.rank() % group_; }
  const Slice& slice(std::size_t tensor) const { return slices_[static_cast<std::size_t>(member())][tensor]; }
  /// What a rank adds up of its part, which ranks at the same place of other groups have too.
  const std::vector<Slice>& summed_by(int rank) const { return summed_[static_cast<std::size_t>(rank % group_ * (ranks_.size() / group_) + rank / group_)]; }
  /// The summed gradient of a tensor's elements that are of this rank's part; and of some of them.
  at::Tensor& own_sum(std::size_t tensor) const;
  at::Tensor sum_of(std::size_t tensor, std::int64_t first, std::int64_t count) const;
  void exchange_sums();

  parallel::Communicator& ranks_;
  int group_;
  std::vector<std::vector<Slice>> summed_, slices_;  // in equal parts of all ranks; of the members of a group
  std::unique_ptr<Optimizer> own_;    // of this rank's part
  std::vector<std::size_t> of_own_;   // its tensors, as places among trained(), ascending
  std::vector<Moment> moments_;
  NamedState given_;                  // rank 0's, between restore() and share()
};

}  // namespace alambic::train
