// SPDX-License-Identifier: Apache-2.0
#pragma once
// Frozen weights of the blocks of which each rank keeps a part (as ZeRO-3, arXiv:1910.02054, and FSDP, arXiv:2304.11277). A block's parts
// are gathered when a pass comes to it, while those of the next block are under way already, into one of two buffers.
#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "parallel/communicator.h"

namespace alambic::models {

class ShardedBlocks {
 public:
  /// group: so many ranks that follow each other share the blocks, each group for itself; a divisor of ranks.size(). own: of each block this
  /// rank's part, bytes [n]; of one block the parts of all ranks are of one length. `ranks` outlives this.
  ShardedBlocks(parallel::Communicator& ranks, int group, std::vector<at::Tensor> own);

  /// Bytes [group, n]: the parts of a block; they hold until the next call. Collective where they are not here yet: all ranks go through the
  /// blocks in the same order, forwards and then backwards.
  at::Tensor block(std::int64_t layer);
  /// Ends this rank's pass over a micro-batch or an evaluated batch. Collective: goes through what this rank has left out of it (all of it,
  /// where it has nothing to compute), so that the others come by their parts. backward: the pass goes down to block 0 again.
  void end_pass(bool backward);
  /// Ends a pass, or several, that all ranks made alike: nothing is left out of it.
  void end_common_pass() { highest_ = lowest_ = -1; }

  /// Keeps parts and buffers in the memory of another device from now on; between passes.
  void move_to(at::Device device);
  at::Device device() const { return buffers_[0].bytes.device(); }

  std::uint64_t own_bytes() const;     // of this rank's parts
  std::uint64_t buffer_bytes() const;  // of the two buffers

 private:
  struct Buffer {
    std::int64_t layer = -1;  // -1: none
    at::Tensor bytes;         // as large as the largest block
    std::unique_ptr<parallel::Gather> gather;
  };
  Buffer& gathered(std::int64_t layer, std::int64_t kept);
  at::Tensor view(const Buffer& buffer) const;

  parallel::Communicator& ranks_;
  int group_;
  std::vector<at::Tensor> own_;
  std::array<Buffer, 2> buffers_;
  std::int64_t last_ = -1, direction_ = 1;    // the block asked for last, and where the pass goes
  std::int64_t highest_ = -1, lowest_ = -1;   // of this pass: forwards; backwards, -1 before it has turned
};

}  // namespace alambic::models
