// SPDX-License-Identifier: Apache-2.0
#pragma once
// A frozen weight that the ranks share: how a block's weights are cut, what a rank keeps of one, and the whole from all parts.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "lora/quantize.h"
#include "models/frozen_weight.h"
#include "models/sharded_blocks.h"

namespace alambic::lora {

/// A weight of a block, and how it is kept.
struct WeightToCut {
  std::int64_t outputs = 0, inputs = 0;
  BaseQuantization quantization = {};     // none: dense, in `type`
  at::ScalarType type = at::kFloat;
};

/// Values [first, first + count) of the flattened weight; `offset`: where in the rank's part of the block, in bytes.
struct Piece {
  std::int64_t first = 0, count = 0, offset = 0;
};

struct CutBlock {
  std::int64_t part_bytes = 0;             // of every rank's part: of the longest
  std::vector<std::vector<Piece>> pieces;  // by weight, then by rank; a count of 0: nothing
};

/// The weights, one behind the other, in equal parts. Cuts lie where the quantised parts have the bits of the quantised whole: between 64 x 256
/// values of nf4, rows of int8, 64 dense values; a part may be longer than another by that much of each weight.
CutBlock cut(const std::vector<WeightToCut>& weights, int ranks);

/// The tensors that hold `count` values of a weight, as views of the bytes where they lie:
/// dense {values}; nf4 {nested_absmax, absmax, packed} or {absmax, packed}; int8 {scales [rows], codes [rows, inputs]}.
std::vector<at::Tensor> tensors_of_piece(const WeightToCut& weight, std::int64_t count, const at::Tensor& bytes);
std::int64_t bytes_of_piece(const WeightToCut& weight, std::int64_t count);

class ShardedWeight final : public models::FrozenWeight {
 public:
  /// pieces: by rank. own_bytes: that this rank keeps. nested_map, offset: of nf4 with double quantisation (lora/nf4.h).
  ShardedWeight(std::shared_ptr<models::ShardedBlocks> blocks, std::int64_t layer, const WeightToCut& weight, std::vector<Piece> pieces, std::int64_t own_bytes,
                at::Tensor nested_map = {}, float offset = 0);
  std::int64_t outputs() const override { return weight_.outputs; }
  std::int64_t inputs() const override { return weight_.inputs; }
  std::string_view format() const override { return weight_.quantization.is_on() ? std::string_view(weight_.quantization.format) : "sharded"; }
  std::uint64_t num_bytes() const override { return static_cast<std::uint64_t>(own_bytes_); }
  at::Device device() const override { return blocks_->device(); }
  /// What all weights of a block share follows with models::ShardedBlocks::move_to().
  std::shared_ptr<const models::FrozenWeight> on(at::Device to) const override;
  /// Rows must lie one behind the other. Collective, where the block's parts are not here yet: models/sharded_blocks.h.
  void dense_into(const at::Tensor& out_OI) const override;

 private:
  std::shared_ptr<models::ShardedBlocks> blocks_;
  std::int64_t layer_;
  WeightToCut weight_;
  std::vector<Piece> pieces_;
  std::int64_t own_bytes_;
  at::Tensor nested_map_;
  float offset_;
};

}  // namespace alambic::lora
