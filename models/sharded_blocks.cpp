// SPDX-License-Identifier: Apache-2.0
#include "models/sharded_blocks.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "core/error.h"

namespace alambic::models {

ShardedBlocks::ShardedBlocks(parallel::Communicator& ranks, int group, std::vector<at::Tensor> own) : ranks_(ranks), group_(group), own_(std::move(own)) {
  std::int64_t longest = 0;
  for (const at::Tensor& part : own_) longest = std::max(longest, part.numel());
  for (Buffer& buffer : buffers_) buffer.bytes = at::empty({group_ * longest}, at::kByte);
}

at::Tensor ShardedBlocks::view(const Buffer& buffer) const {
  const std::int64_t size = own_[static_cast<std::size_t>(buffer.layer)].numel();
  return buffer.bytes.narrow(0, 0, group_ * size).view({group_, size});
}

// The buffer that holds or gets a block; never that of the block `kept`.
ShardedBlocks::Buffer& ShardedBlocks::gathered(std::int64_t layer, std::int64_t kept) {
  for (Buffer& buffer : buffers_)
    if (buffer.layer == layer) return buffer;
  Buffer& buffer = buffers_[0].layer == kept ? buffers_[1] : buffers_[0];
  if (buffer.gather) buffer.gather->wait();  // it still writes
  buffer.layer = layer;
  buffer.gather = ranks_.start_gather(view(buffer), own_[static_cast<std::size_t>(layer)], group_, "weights of block " + std::to_string(layer));
  return buffer;
}

at::Tensor ShardedBlocks::block(std::int64_t layer) {
  const auto num_blocks = static_cast<std::int64_t>(own_.size());
  if (layer < 0 || layer >= num_blocks) fail(ErrorKind::kBug, "block ", layer, " of ", num_blocks, " is asked for");
  if (lowest_ < 0 && layer >= highest_) highest_ = layer;
  else lowest_ = layer;
  if (layer != last_) direction_ = layer > last_ ? 1 : -1;
  Buffer& buffer = gathered(layer, last_);
  last_ = layer;
  if (buffer.gather) buffer.gather->wait(), buffer.gather.reset();
  const std::int64_t next = layer == 0 ? 1 : layer + direction_;  // behind block 0 a new pass begins
  if (next >= 0 && next < num_blocks) gathered(next, layer);
  return view(buffer);
}

void ShardedBlocks::end_pass(bool backward) {
  const auto num_blocks = static_cast<std::int64_t>(own_.size());
  for (std::int64_t layer = highest_ + 1; layer < num_blocks; ++layer) block(layer);
  for (std::int64_t layer = (lowest_ < 0 ? num_blocks : lowest_) - 1; backward && layer >= 0; --layer) block(layer);
  for (Buffer& buffer : buffers_)
    if (buffer.gather) buffer.gather->wait(), buffer.gather.reset();
  end_common_pass();
}

void ShardedBlocks::move_to(at::Device device) {
  for (at::Tensor& part : own_) part = part.to(device);
  for (Buffer& buffer : buffers_) buffer = {.layer = -1, .bytes = at::empty(buffer.bytes.sizes(), buffer.bytes.options().device(device)), .gather = nullptr};
}

std::uint64_t ShardedBlocks::own_bytes() const {
  std::uint64_t bytes = 0;
  for (const at::Tensor& part : own_) bytes += part.nbytes();
  return bytes;
}

std::uint64_t ShardedBlocks::buffer_bytes() const { return buffers_[0].bytes.nbytes() + buffers_[1].bytes.nbytes(); }

}  // namespace alambic::models
