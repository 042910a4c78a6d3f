// SPDX-License-Identifier: Apache-2.0
#pragma once
// The only step there is, and the only place with backward().
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "core/json.h"
#include "data/batch.h"
#include "models/sharded_blocks.h"
#include "parallel/communicator.h"
#include "train/optimizer.h"

namespace alambic::train {

/// What a decoder reads of a batch.
inline models::Input input_of(const data::Batch& batch, std::uint64_t dropout_seed, double neftune_alpha = 0) {
  return {.tokens_T = batch.tokens_T, .positions_T = batch.positions_T, .document_lengths = batch.document_lengths, .dropout_seed = dropout_seed,
          .neftune_alpha = neftune_alpha};
}

/// Sum of the loss over a batch's kept tokens, in nats: a differentiable f64 scalar. dropout_seed is never 0.
using LossSum = std::function<at::Tensor(const data::Batch& batch, std::uint64_t dropout_seed)>;

struct StepReport {
  double nats_per_token = 0, grad_norm = 0;  // as they were, finite or not
  std::int64_t num_tokens = 0;               // kept tokens of all micro-batches and ranks: the one divisor
  bool applied = false;                      // false: stopped, or not finite; the weights are as before
  bool stopped = false;                      // stop_requested() said so between micro-batches, on one rank at least
  Json figures = Json::object();             // of all micro-batches and ranks, by num_tokens
  std::vector<std::uint64_t> bad_samples = {};  // first samples of micro-batches whose loss is not finite, or of all when only the norm is not
};

/// What a loss tells besides its sum, since it was last asked, in sums over kept tokens divided by `divisor`; whole numbers are counts and
/// are not divided. The same names each time; null where a figure is not finite.
using Figures = std::function<Json(std::int64_t divisor)>;

/// How a step's gradients are added.
enum class Order {
  kAsTheyCome,  // one micro-batch after the other on each rank, then over ranks: for one rank the bits of plain accumulation
  kTree,        // parallel::tree_sum over the micro-batches of all ranks: the same bits for 1, 2, 4, ... ranks
};

/// Error(kUsage) when this number of ranks cannot share the tree of kTree: it is no power of two.
void require_tree(int num_ranks);

/// One optimiser step over this rank's micro-batches: numbers rank, rank + size, ... of those of all ranks, equally many on each. With `context`
/// above 1 that many consecutive ranks get the same micro-batches, and the loss is each one's part: the groups then count as ranks.
/// Collective; the report is the same on all ranks, and so is whether the step is applied. Error(kData) when every token is masked;
/// for kTree the error of require_tree(). shards: of the decoder that loss_sum passes through once, where ranks share it.
StepReport step(std::span<const data::Batch> micro_batches, const LossSum& loss_sum, Optimizer& optimizer, double learning_rate,
                double max_grad_norm, std::uint64_t dropout_seed, parallel::Communicator& ranks,
                const std::function<bool()>& stop_requested = {}, Order order = Order::kAsTheyCome, const Figures& figures = {}, int context = 1, models::ShardedBlocks* shards = nullptr);

}  // namespace alambic::train
