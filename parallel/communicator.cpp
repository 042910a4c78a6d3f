// SPDX-License-Identifier: Apache-2.0
#include "parallel/communicator.h"

#include <ATen/core/Tensor.h>

namespace alambic::parallel {
namespace {

class Single : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  void sum_in_place(std::span<at::Tensor>) override {}
  void barrier() override {}
};

}  // namespace

std::unique_ptr<Communicator> single() { return std::make_unique<Single>(); }

}  // namespace alambic::parallel
