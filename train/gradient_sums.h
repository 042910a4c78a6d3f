// SPDX-License-Identifier: Apache-2.0
#pragma once
// The sum of a step's gradients over ranks, begun while the backward pass of the last micro-batch still makes others.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "parallel/communicator.h"
#include "train/optimizer.h"

namespace alambic::train {

using Gradients = std::vector<at::Tensor>;  // one for each trained tensor

inline constexpr std::int64_t kGradientBucketBytes = 8 << 20;  // as large as those in which a sum travels: latency does not count, and the first leaves early

/// Numbers of the tensors whose gradients begin their sum at once: the blocks' from the last tensor to the first, which is about how a backward
/// pass makes them, then the others'.
std::vector<std::vector<std::size_t>> buckets_of(const std::vector<Trained>& trained, std::int64_t bucket_bytes = kGradientBucketBytes);

/// A bucket of gradients begins (Optimizer::start_sum) when all of it and of those before it is there, so every rank begins the same sums in the
/// same order.
class GradientSums {
 public:
  /// in_backward: begins sums in the backward pass; else all is left to finish().
  GradientSums(Optimizer& optimizer, parallel::Communicator& ranks, bool in_backward, std::int64_t bucket_bytes = kGradientBucketBytes);
  ~GradientSums();
  GradientSums(const GradientSums&) = delete;
  GradientSums& operator=(const GradientSums&) = delete;

  /// From now on what a backward pass gives to a tensor of a block is the last that it gets. `pending`: sums of earlier micro-batches, the
  /// outermost first; each is added behind, the innermost first: a gradient g becomes pending[0] + (pending[1] + ... g), and the memory of the others
  /// is free.
  void expect_last(std::vector<Gradients> pending);
  /// Collective: begins what has not begun, whether a backward pass has made it or not, and waits for all. optimizer.sums() are then there.
  void finish();

 private:
  struct Listener;
  void is_there(std::size_t i);
  void fold(std::size_t i);
  void begin_next();

  Optimizer& optimizer_;
  parallel::Communicator& ranks_;
  std::vector<Gradients> pending_;
  bool in_backward_, listens_ = false;
  std::vector<bool> there_, given_;  // given: in the middle of a backward pass, by models::give_to_leaf()
  std::vector<std::vector<std::size_t>> buckets_;  // numbers of trained tensors
  std::size_t begun_ = 0;  // buckets
};

}  // namespace alambic::train
