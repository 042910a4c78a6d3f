// SPDX-License-Identifier: Apache-2.0
#include "train/gradient_sums.h"

#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "core/error.h"
#include "models/leaf_gradient.h"

namespace alambic::train {
/// Told by autograd that a tensor's gradient has been added to.
struct GradientSums::Listener final : torch::autograd::PostAccumulateGradHook {
  Listener(GradientSums& own_sums, std::size_t own_index) : sums(own_sums), index(own_index) {}
  void operator()(const at::Tensor&) override { sums.is_there(index); }
  GradientSums& sums;
  std::size_t index;
};

std::vector<std::vector<std::size_t>> buckets_of(const std::vector<Trained>& trained, std::int64_t bucket_bytes) {
  std::vector<std::vector<std::size_t>> buckets;
  std::int64_t room = 0;
  for (const bool of_blocks : {true, false})
    for (std::size_t i = trained.size(); i-- > 0;) {
      if (is_in_block(trained[i].name) != of_blocks) continue;
      if (room <= 0) buckets.emplace_back(), room = bucket_bytes;
      buckets.back().push_back(i);
      room -= static_cast<std::int64_t>(trained[i].tensor.nbytes());
    }
  return buckets;
}

GradientSums::GradientSums(Optimizer& optimizer, parallel::Communicator& ranks, bool in_backward, std::int64_t bucket_bytes)
    : optimizer_(optimizer), ranks_(ranks), in_backward_(in_backward && ranks.size() > 1), there_(optimizer.trained().size(), false), given_(there_), buckets_(buckets_of(optimizer.trained(), bucket_bytes)) {}

GradientSums::~GradientSums() {
  if (listens_)
    for (const Trained& one : optimizer_.trained()) torch::autograd::impl::set_post_acc_grad_hooks(one.tensor, nullptr);
}

void GradientSums::expect_last(std::vector<Gradients> pending) {
  pending_ = std::move(pending);
  if (!in_backward_) return;
  listens_ = true;
  for (std::size_t i = 0; i < there_.size(); ++i)
    if (is_in_block(optimizer_.trained()[i].name)) torch::autograd::impl::set_post_acc_grad_hooks(optimizer_.trained()[i].tensor, std::make_unique<Listener>(*this, i));
}

void GradientSums::is_there(std::size_t i) {
  if (given_[i] && !models::is_giving_to_leaf()) return;  // autograd's own visit, which brings nothing
  given_[i] = models::is_giving_to_leaf();
  if (there_[i]) fail(ErrorKind::kBug, "two backward passes through ", optimizer_.trained()[i].name, " in one micro-batch, whose gradient is being added up over ranks");
  fold(i);
  const auto is_whole = [&](const std::vector<std::size_t>& bucket) { return std::all_of(bucket.begin(), bucket.end(), [&](std::size_t each) { return there_[each]; }); };
  while (begun_ < buckets_.size() && is_whole(buckets_[begun_])) begin_next();
}

void GradientSums::fold(std::size_t i) {
  there_[i] = true;
  if (pending_.empty()) return;
  at::Tensor& gradient = optimizer_.gradient(i);
  for (std::size_t level = pending_.size(); level-- > 0;) gradient = std::exchange(pending_[level][i], {}).add_(gradient);
}

void GradientSums::begin_next() {
  for (const std::size_t i : buckets_[begun_])
    if (!there_[i]) fold(i);
  optimizer_.start_sum(buckets_[begun_++], ranks_);
}

void GradientSums::finish() {
  const at::NoGradGuard no_grad;
  while (begun_ < buckets_.size()) begin_next();
  ranks_.finish_sums("gradients");
}

}  // namespace alambic::train
