// SPDX-License-Identifier: Apache-2.0
#pragma once
// A frozen weight in the 16 bits of its file, which a run in f32 widens for each use: half the memory of an f32 copy, the same bits.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

#include "models/decoder.h"
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
  at::Tensor stored_OI() const override { return weight_OI_; }

 private:
  at::Tensor weight_OI_;
};

/// Makes weight_OI (bf16 or f16) the frozen weight of a layer that computes in f32.
void keep_as_stored(models::Linear& linear, const at::Tensor& weight_OI);

/// A tied head gets the embedding for its weight, dense or as stored as that is; any other stays.
void tie_head(models::Decoder& decoder);

}  // namespace alambic::lora
