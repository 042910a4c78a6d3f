// SPDX-License-Identifier: Apache-2.0
#include "lora/sharded_weight.h"

#include <algorithm>
#include <utility>

#include "core/error.h"
#include "lora/frozen_layout.h"
#include "lora/int8.h"
#include "lora/nf4.h"

namespace alambic::lora {
namespace {

constexpr std::int64_t kAligned = 64;  // bytes at which pieces begin, and a multiple of which a part is

std::int64_t rounded(std::int64_t bytes, std::int64_t unit) { return (bytes + unit - 1) / unit * unit; }

/// Values that stay together.
std::int64_t unit_of(const WeightToCut& weight) {
  if (weight.quantization.format == "nf4") return kNf4Block * kNf4NestedBlock;
  return weight.quantization.format == "int8" ? weight.inputs : 64;
}

/// What holds `count` values: types and sizes, the widest first.
std::vector<std::pair<at::ScalarType, std::int64_t>> layout(const WeightToCut& weight, std::int64_t count) {
  const auto in = [](std::int64_t values, std::int64_t unit) { return (values + unit - 1) / unit; };
  const std::int64_t scales = in(count, kNf4Block), packed = in(count, 2);
  if (weight.quantization.format == "nf4" && weight.quantization.double_quant) return {{at::kFloat, in(scales, kNf4NestedBlock)}, {at::kByte, scales}, {at::kByte, packed}};
  if (weight.quantization.format == "nf4") return {{at::kFloat, scales}, {at::kByte, packed}};
  if (weight.quantization.format == "int8") return {{at::kFloat, count / weight.inputs}, {at::kChar, count}};
  return {{weight.type, count}};
}

}  // namespace

std::int64_t bytes_of_piece(const WeightToCut& weight, std::int64_t count) {
  std::int64_t bytes = 0;
  for (const auto& [type, size] : layout(weight, count)) bytes += size * static_cast<std::int64_t>(c10::elementSize(type));
  return bytes;
}

std::vector<at::Tensor> tensors_of_piece(const WeightToCut& weight, std::int64_t count, const at::Tensor& bytes) {
  std::vector<at::Tensor> tensors;
  std::int64_t begin = 0;
  for (const auto& [type, size] : layout(weight, count)) {
    const std::int64_t length = size * static_cast<std::int64_t>(c10::elementSize(type));
    const at::Tensor tensor = bytes.narrow(0, begin, length).view(type);
    tensors.push_back(type == at::kChar ? tensor.view({-1, weight.inputs}) : tensor);
    begin += length;
  }
  return tensors;
}

CutBlock cut(const std::vector<WeightToCut>& weights, int ranks) {
  std::vector<std::int64_t> begins = {0};  // bytes before each weight, and all
  for (const WeightToCut& weight : weights) begins.push_back(begins.back() + bytes_of_piece(weight, weight.outputs * weight.inputs));
  CutBlock cut;
  std::vector<std::int64_t> filled(static_cast<std::size_t>(ranks), 0);
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const WeightToCut& weight = weights[i];
    const std::int64_t count = weight.outputs * weight.inputs, unit = std::max<std::int64_t>(unit_of(weight), 1), unit_bytes = std::max<std::int64_t>(bytes_of_piece(weight, unit), 1);
    // Where the part of a rank begins: the nearest unit to that rank's share of all bytes.
    const auto begin_of = [&](std::size_t rank) {
      if (rank == filled.size()) return count;
      const std::int64_t share = begins.back() / ranks * static_cast<std::int64_t>(rank) - begins[i];
      return std::clamp<std::int64_t>((share + unit_bytes / 2) / unit_bytes * unit, 0, count);
    };
    std::vector<Piece>& pieces = cut.pieces.emplace_back();
    for (std::size_t rank = 0; rank < filled.size(); ++rank) {
      const std::int64_t first = rank == 0 ? 0 : begin_of(rank);
      Piece& piece = pieces.emplace_back(Piece{.first = first, .count = begin_of(rank + 1) - first, .offset = filled[rank]});
      filled[rank] = rounded(filled[rank] + bytes_of_piece(weight, piece.count), kAligned);
    }
  }
  cut.part_bytes = *std::max_element(filled.begin(), filled.end());
  return cut;
}

ShardedWeight::ShardedWeight(std::shared_ptr<models::ShardedBlocks> blocks, std::int64_t layer, const WeightToCut& weight, std::vector<Piece> pieces, std::int64_t own_bytes,
                             at::Tensor nested_map, float offset)
    : blocks_(std::move(blocks)), layer_(layer), weight_(weight), pieces_(std::move(pieces)), own_bytes_(own_bytes), nested_map_(std::move(nested_map)), offset_(offset) {}

std::shared_ptr<const models::FrozenWeight> ShardedWeight::on(at::Device to) const {
  auto moved = std::make_shared<ShardedWeight>(*this);
  if (nested_map_.defined()) moved->nested_map_ = nested_map_.to(to);
  return moved;
}

void ShardedWeight::dense_into(const at::Tensor& out_OI) const {
  check_dense(*this, out_OI);
  if (!out_OI.is_contiguous()) fail(ErrorKind::kBug, "a weight that ranks share is made dense into rows that lie apart");
  const at::Tensor parts = blocks_->block(layer_), flat = out_OI.view(-1);
  for (std::size_t rank = 0; rank < pieces_.size(); ++rank) {
    const Piece& piece = pieces_[rank];
    if (piece.count == 0) continue;
    const at::Tensor place = flat.narrow(0, piece.first, piece.count), bytes = parts[static_cast<std::int64_t>(rank)].narrow(0, piece.offset, bytes_of_piece(weight_, piece.count));
    const std::vector<at::Tensor> kept = tensors_of_piece(weight_, piece.count, bytes);
    if (weight_.quantization.format == "int8") {
      Int8Weight({.codes_OI = kept[1], .scale_O = kept[0]}).dense_into(place.view({-1, weight_.inputs}));
    } else if (weight_.quantization.format == "nf4") {
      const bool nested = weight_.quantization.double_quant;
      const Nf4Parts nf4{.packed = kept.back(), .absmax = kept[nested ? 1 : 0], .nested_absmax = nested ? kept[0] : at::Tensor(), .nested_map = nested_map_, .offset = offset_};
      Nf4Weight(1, piece.count, nf4).dense_into(place.view({1, piece.count}));
    } else {
      at::Tensor(place).copy_(kept[0]);
    }
  }
}

}  // namespace alambic::lora
