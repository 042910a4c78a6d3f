// SPDX-License-Identifier: Apache-2.0
#pragma once
// The ranks of one run, and the few things they say to each other.
#include <memory>
#include <span>

namespace at {
class Tensor;
}

namespace alambic::parallel {

/// Every call is collective: all ranks make it, in the same order, with the same shapes and types.
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;  // 0 .. size() - 1
  virtual int size() const = 0;
  virtual void sum_in_place(std::span<at::Tensor> tensors) = 0;  // same result, bit for bit, on every rank
  virtual void barrier() = 0;
};

/// One process alone: rank 0 of 1; every call returns at once.
std::unique_ptr<Communicator> single();

}  // namespace alambic::parallel
