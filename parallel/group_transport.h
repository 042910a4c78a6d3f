// SPDX-License-Identifier: Apache-2.0
#pragma once
// The calls of a Transport on a process group of c10d's, whatever moves its bytes; how a transfer is waited for is the group's own.
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <memory>
#include <vector>

#include "parallel/transport.h"

namespace alambic::parallel {

class GroupTransport : public Transport {
 public:
  std::unique_ptr<Transfer> all_to_all(at::Tensor out, at::Tensor in) override;
  std::unique_ptr<Transfer> all_gather(at::Tensor out, at::Tensor in) override;
  std::unique_ptr<Transfer> exchange(at::Tensor out, int from, at::Tensor in, int to) override;
  std::unique_ptr<Transfer> broadcast(at::Tensor tensor, int root) override;

 protected:
  explicit GroupTransport(c10::intrusive_ptr<c10d::Backend> group) : group_(std::move(group)) {}
  /// What was begun on these tensors.
  virtual std::unique_ptr<Transfer> started(c10::intrusive_ptr<c10d::Work> work, std::vector<at::Tensor> tensors) = 0;

  const c10::intrusive_ptr<c10d::Backend> group_;
};

}  // namespace alambic::parallel
