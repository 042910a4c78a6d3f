// SPDX-License-Identifier: Apache-2.0
#include "parallel/group_transport.h"

#include <cstddef>
#include <cstdint>

namespace alambic::parallel {

std::unique_ptr<Transfer> GroupTransport::all_to_all(at::Tensor out, at::Tensor in) {
  at::Tensor flat_out = out.view(-1), flat_in = in.view(-1);
  std::vector<std::int64_t> even;
  return started(group_->all_to_all_single(flat_out, flat_in, even, even), {out, in});
}

std::unique_ptr<Transfer> GroupTransport::all_gather(at::Tensor out, at::Tensor in) {
  at::Tensor flat_out = out.view(-1), flat_in = in.view(-1);
  return started(group_->all_gather_single(flat_out, flat_in), {out, in});
}

std::unique_ptr<Transfer> GroupTransport::exchange(at::Tensor out, int from, at::Tensor in, int to) {
  std::vector<std::int64_t> received(static_cast<std::size_t>(group_->getSize()), 0), sent = received;
  received.at(static_cast<std::size_t>(from)) = out.numel();
  sent.at(static_cast<std::size_t>(to)) = in.numel();
  return started(group_->all_to_all_single(out, in, received, sent), {out, in});
}

std::unique_ptr<Transfer> GroupTransport::broadcast(at::Tensor tensor, int root) {
  std::vector<at::Tensor> tensors = {tensor};
  return started(group_->broadcast(tensors, {.rootRank = root}), tensors);
}

}  // namespace alambic::parallel
