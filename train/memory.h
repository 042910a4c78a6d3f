// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a run will take of memory, and what the decoder keeps so that it fits.
#include <cstdint>

#include "models/decoder.h"
#include "train/train_config.h"

namespace alambic::train {

struct MemoryEstimate {  // bytes
  std::uint64_t weights = 0;      // frozen and trained, as they are computed with
  std::uint64_t trained = 0;      // gradients, and the adapters themselves
  std::uint64_t optimizer = 0;    // its state
  std::uint64_t activations = 0;  // kept for the backward pass, and one block's work
  std::uint64_t head = 0;         // a chunk of logits, and the gradients of hidden states
  std::uint64_t library = 0;      // libtorch and the program
  std::uint64_t total() const { return weights + trained + optimizer + activations + head + library; }
};
/// Of a decoder that is ready to train (use_fused_blocks() called) at micro-batches of so many tokens.
MemoryEstimate estimate_memory(models::Decoder& decoder, std::uint64_t optimizer_bytes, std::int64_t batch_tokens);

/// Of one of so many ranks, which share weights, or gradients and moments, as config.ranks says, from the estimate of a rank that shares nothing. The decoder is
/// loaded whole.
MemoryEstimate shared_by(const MemoryEstimate& whole, models::Decoder& decoder, const TrainConfig& config, int num_ranks);
/// Bytes of the blocks' linear layers, as they are kept.
std::uint64_t bytes_of_blocks(models::Decoder& decoder);

/// Of a decoder that only reads, in passes of so many tokens without gradients.
MemoryEstimate estimate_reading_memory(models::Decoder& decoder, std::int64_t batch_tokens);

/// "store", "mlp" or "block".
const char* name_of(models::Keep keep);

/// What the machine can still give, bytes; 0: unknown.
std::uint64_t available_memory();
/// The same for each of so many ranks of this machine: they share a processor's memory, and have a GPU each.
std::uint64_t available_to_rank(at::Device device, int local_ranks);

/// Takes the fused path where it can be taken, sets what is kept as config.memory says, and logs both. Returns why the fused path
/// is not taken, "" where it is. not_fused: a reason that is known already, "" where there is none.
/// available: bytes that this process, of num_ranks, may take, 0: unknown. `memory: auto` keeps as much as fits in them, and as little as it can where nothing fits.
std::string prepare_blocks(models::Decoder& decoder, const TrainConfig& config, const std::string& not_fused = "", int num_ranks = 1, std::uint64_t available = available_memory());

}  // namespace alambic::train
