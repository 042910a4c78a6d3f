// SPDX-License-Identifier: Apache-2.0
#pragma once
// A weight that is never trained and is kept narrower than it is computed with.
// Letters: O = outputs, I = inputs.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string_view>

namespace alambic::models {

class FrozenWeight {
 public:
  virtual ~FrozenWeight() = default;
  virtual std::int64_t outputs() const = 0;
  virtual std::int64_t inputs() const = 0;
  virtual std::string_view format() const = 0;    // "nf4", "int8"
  virtual std::uint64_t num_bytes() const = 0;    // of what is kept
  /// Writes W into out_OI: [outputs, inputs], f32 or bf16, each row contiguous (rows may lie further apart). bf16 is the f32
  /// value rounded to the nearest, ties to even. Allocates nothing, works on all threads; the bits depend on neither them nor
  /// the processor. Error(kBug): another shape, type or layout.
  virtual void dense_into(const at::Tensor& out_OI) const = 0;
};

}  // namespace alambic::models
