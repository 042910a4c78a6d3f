// SPDX-License-Identifier: Apache-2.0
#pragma once
// A weight that is never trained and is kept narrower than it is computed with.
// Letters: O = outputs, I = inputs.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string_view>

#include "core/error.h"

namespace alambic::models {

class FrozenWeight {
 public:
  virtual ~FrozenWeight() = default;
  virtual std::int64_t outputs() const = 0;
  virtual std::int64_t inputs() const = 0;
  virtual std::string_view format() const = 0;    // "nf4", "int8"
  virtual std::uint64_t num_bytes() const = 0;    // of what is kept
  virtual at::Device device() const { return at::kCPU; }
  /// The same weight in the memory of another device.
  virtual std::shared_ptr<const FrozenWeight> on(at::Device to) const { fail(ErrorKind::kBug, "a weight kept as ", format(), " cannot be moved to ", to.str()); }
  /// Writes W into out_OI, which is where the weight is: [outputs, inputs], f32 or bf16, each row contiguous (rows may lie further apart). bf16 is the f32
  /// value rounded to the nearest, ties to even. On a processor it allocates nothing and works on all threads; the bits depend on
  /// neither them nor the processor. Error(kBug): another shape, type or layout.
  virtual void dense_into(const at::Tensor& out_OI) const = 0;
  /// W in the 16 bits it was published with, where it is kept so and widening it is all that dense_into() does; undefined elsewhere. Its rows can
  /// then be used some at a time.
  virtual at::Tensor stored_OI() const { return {}; }
};

}  // namespace alambic::models
