// SPDX-License-Identifier: Apache-2.0
#include "train/step.h"

#include <ATen/ops/scalar_tensor.h>

#include <cmath>

#include "core/error.h"
#include "core/random.h"

namespace alambic::train {

StepReport step(std::span<const data::Batch> micro_batches, const LossSum& loss_sum, Optimizer& optimizer, double learning_rate,
                double max_grad_norm, std::uint64_t dropout_seed, parallel::Communicator& ranks,
                const std::function<bool()>& stop_requested) {
  // Counted before any forward pass, over all ranks: each token then weighs the same, however the batch was cut.
  at::Tensor count = at::scalar_tensor(0, at::kDouble), nats = at::scalar_tensor(0, at::kDouble);
  for (const data::Batch& batch : micro_batches) count += static_cast<double>(batch.num_kept);
  ranks.sum_in_place({&count, 1});
  const double num_tokens = count.item<double>();
  if (num_tokens == 0)
    fail(ErrorKind::kData, "every token of the step at sample ", micro_batches.empty() ? 0 : micro_batches.front().first_sample,
         " is masked; nothing to learn from", Remedy{"look at the loss mask with inspect, or use more batches_per_step"});

  StepReport report{.num_tokens = static_cast<std::int64_t>(num_tokens)};
  std::uint64_t index = static_cast<std::uint64_t>(ranks.rank());  // of the micro-batch among those of all ranks
  for (const data::Batch& batch : micro_batches) {
    if (batch.num_kept > 0) {
      const at::Tensor loss = loss_sum(batch, derive_seed(dropout_seed, "micro-batch", {index}) | 1);
      if (!std::isfinite(loss.item<double>())) report.bad_samples.push_back(batch.first_sample);
      else (loss / num_tokens).backward();
      nats += loss.detach();
    }
    index += static_cast<std::uint64_t>(ranks.size());
    if (stop_requested && stop_requested()) {
      optimizer.forget_gradients();
      report.stopped = true;
      return report;
    }
  }
  ranks.sum_in_place({&nats, 1});
  report.nats_per_token = nats.item<double>() / num_tokens;
  ranks.sum_in_place(optimizer.gradients());
  report.grad_norm = clip_to_norm(optimizer.gradients(), max_grad_norm);
  report.applied = std::isfinite(report.nats_per_token) && std::isfinite(report.grad_norm);
  if (report.applied) {
    optimizer.step(learning_rate);
  } else {  // never averaged away, never applied
    optimizer.forget_gradients();
    if (report.bad_samples.empty())
      for (const data::Batch& batch : micro_batches) report.bad_samples.push_back(batch.first_sample);
  }
  return report;
}

}  // namespace alambic::train
