// SPDX-License-Identifier: Apache-2.0
#pragma once
// A frozen weight in the 16 bits of its file, which a run in f32 widens for each use: half the memory of an f32 copy, the same bits.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

#include "models/frozen_weight.h"

namespace alambic::lora {

class StoredWeight final : public models::FrozenWeight {
 public:
  /// weight_OI: bf16 or f16, contiguous, finite; may be a view of a mapped file. Error(kBug): anything else.
  explicit StoredWeight(at::Tensor weight_OI);
  std::int64_t outputs() const override { return weight_OI_.size(0); }
  std::int64_t inputs() const override { return weight_OI_.size(1); }
  std::string_view format() const override { return weight_OI_.scalar_type() == at::kHalf ? "f16" : "bf16"; }
  std::uint64_t num_bytes() const override { return weight_OI_.nbytes(); }
  at::Device device() const override { return weight_OI_.device(); }
  std::shared_ptr<const models::FrozenWeight> on(at::Device to) const override { return std::make_shared<StoredWeight>(weight_OI_.to(to)); }
  void dense_into(const at::Tensor& out_OI) const override;

 private:
  at::Tensor weight_OI_;
};

/// Whether the dense weight is what the model was published with, without loss.
inline bool is_exact(const models::FrozenWeight& weight) { return dynamic_cast<const StoredWeight*>(&weight) != nullptr; }

}  // namespace alambic::lora
