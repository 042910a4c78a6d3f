// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/load_shards.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "checkpoints/safetensors.h"
#include "core/error.h"
#include "lora/int8.h"
#include "lora/nf4.h"
#include "lora/sharded_weight.h"
#include "models/sharded_blocks.h"

namespace alambic::checkpoints {
namespace {

/// One weight of a block, and what this rank keeps of it.
struct Shared {
  std::string name;
  models::Linear* linear;
  lora::WeightToCut weight;
  std::shared_ptr<const models::FrozenWeight> stored = {};  // where the folder has quantised it: views of the file
  std::vector<lora::Piece> pieces = {};
  lora::Nf4Parts nf4 = {};                                  // of this rank's piece; its map and offset are the weight's
};

class BlockLoader {
 public:
  BlockLoader(const BaseWeights& weights, at::ScalarType compute_type, const lora::BaseQuantization& quantization, const Sharing& sharing, const std::filesystem::path& folder)
      : weights_(weights), compute_type_(compute_type), quantization_(quantization), sharing_(sharing), folder_(folder) {}

  /// This rank's part of the block, whose weights are told how they are cut.
  at::Tensor load(std::vector<Shared>& block) const {
    std::vector<lora::WeightToCut> to_cut;
    for (Shared& shared : block) {
      describe(shared);
      to_cut.push_back(shared.weight);
    }
    lora::CutBlock cut = lora::cut(to_cut, sharing_.group);
    const at::Tensor part = at::zeros({cut.part_bytes}, at::kByte);
    for (std::size_t i = 0; i < block.size(); ++i) {
      Shared& shared = block[i];
      shared.pieces = std::move(cut.pieces[i]);
      const lora::Piece& own = shared.pieces[sharing_.part()];
      const at::Tensor place = part.narrow(0, own.offset, lora::bytes_of_piece(shared.weight, own.count));
      if (shared.stored) keep_stored(shared, own, place);
      else if (shared.weight.quantization.format == "nf4") shared.nf4 = lora::quantize_nf4(values(shared, own), false);
      else if (shared.weight.quantization.format == "int8") keep_int8(lora::quantize_int8(values(shared, own).view({-1, shared.weight.inputs})), shared, own, place);
      else keep_dense(shared, own, place);
      weights_.tensors().release(shared.name);
    }
    keep_nf4(block, part);
    for (Shared& shared : block) shared.stored.reset();
    return part;
  }

 private:
  void describe(Shared& shared) const {
    const std::vector<std::int64_t>& shape = weights_.shape(shared.name);
    shared.weight = {.outputs = shape[0], .inputs = shape[1], .type = compute_type_};
    if (!weights_.is_quantized(shared.name)) {
      // Widened for each use, as lora/stored_weight.h does.
      if (const at::ScalarType stored = weights_.tensors().type(shared.name); compute_type_ == at::kFloat && at::isReducedFloatingType(stored)) shared.weight.type = stored;
      return;
    }
    shared.weight.quantization = quantization_;
    if (weights_.stored_format() == "none") return;
    shared.stored = weights_.frozen(shared.name);
    shared.weight.quantization = {.format = weights_.stored_format()};
    if (const auto* nf4 = dynamic_cast<const lora::Nf4Weight*>(shared.stored.get())) {
      shared.weight.quantization.double_quant = nf4->parts().nested_absmax.defined();
      shared.nf4.nested_map = nf4->parts().nested_map;
      shared.nf4.offset = nf4->parts().offset;
    }
  }

  /// As they are stored, in a type that is quantised.
  at::Tensor values(const Shared& shared, const lora::Piece& own) const {
    at::Tensor slice = weights_.tensors().slice(shared.name, own.first, own.count);
    require_finite(slice, shared, own);
    return slice.scalar_type() == at::kDouble ? slice.to(at::kFloat) : slice;
  }
  void require_finite(const at::Tensor& slice, const Shared& shared, const lora::Piece& own) const {
    if (const std::int64_t bad = first_non_finite(slice); bad >= 0)
      fail(ErrorKind::kData, folder_.string(), ": tensor \"", shared.name, "\" is not finite at element ", own.first + bad, " as ", toString(slice.scalar_type()),
           Remedy{"these weights are damaged: fetch them again"});
  }

  static void keep(const std::vector<at::Tensor>& values, const Shared& shared, const lora::Piece& own, const at::Tensor& place) {
    std::vector<at::Tensor> kept = lora::tensors_of_piece(shared.weight, own.count, place);
    for (std::size_t i = 0; i < kept.size(); ++i) kept[i].copy_(values[i]);
  }
  void keep_dense(const Shared& shared, const lora::Piece& own, const at::Tensor& place) const {
    keep({weights_.tensors().slice(shared.name, own.first, own.count)}, shared, own, place);
    require_finite(lora::tensors_of_piece(shared.weight, own.count, place)[0], shared, own);
  }
  static void keep_int8(const lora::Int8Parts& parts, const Shared& shared, const lora::Piece& own, const at::Tensor& place) { keep({parts.scale_O, parts.codes_OI}, shared, own, place); }
  static void keep_nf4(const lora::Nf4Parts& parts, const Shared& shared, const lora::Piece& own, const at::Tensor& place) {
    if (shared.weight.quantization.double_quant) keep({parts.nested_absmax, parts.absmax, parts.packed}, shared, own, place);
    else keep({parts.absmax, parts.packed}, shared, own, place);
  }

  static std::int64_t blocks_of(std::int64_t count, std::int64_t block) { return (count + block - 1) / block; }

  static void keep_stored(const Shared& shared, const lora::Piece& own, const at::Tensor& place) {
    if (const auto* int8 = dynamic_cast<const lora::Int8Weight*>(shared.stored.get())) {
      const std::int64_t first = own.first / shared.weight.inputs, rows = own.count / shared.weight.inputs;
      keep_int8({.codes_OI = int8->parts().codes_OI.narrow(0, first, rows), .scale_O = int8->parts().scale_O.narrow(0, first, rows)}, shared, own, place);
      return;
    }
    lora::Nf4Parts parts = dynamic_cast<const lora::Nf4Weight&>(*shared.stored).parts();
    const std::int64_t block = own.first / lora::kNf4Block, blocks = blocks_of(own.count, lora::kNf4Block);
    parts.packed = parts.packed.narrow(0, own.first / 2, blocks_of(own.count, 2));
    parts.absmax = parts.absmax.narrow(0, block, blocks);
    if (parts.nested_absmax.defined()) parts.nested_absmax = parts.nested_absmax.narrow(0, block / lora::kNf4NestedBlock, blocks_of(blocks, lora::kNf4NestedBlock));
    keep_nf4(parts, shared, own, place);
  }

  /// The weights that are quantised here. What is taken from all scales of a weight before they are narrowed is their mean; to have its bits
  /// all ranks see them all, a sixty-fourth of the weight's values.
  void keep_nf4(std::vector<Shared>& block, const at::Tensor& part) const {
    std::vector<Shared*> quantised;
    for (Shared& shared : block)
      if (!shared.stored && shared.weight.quantization.format == "nf4") quantised.push_back(&shared);
    if (quantised.empty()) return;
    const std::size_t rank = sharing_.part();
    if (quantised.front()->weight.quantization.double_quant) {
      std::vector<at::Tensor> own;
      for (const Shared* shared : quantised) own.push_back(shared->nf4.absmax);
      std::vector<std::int64_t> scales(static_cast<std::size_t>(sharing_.group), 0);
      for (const Shared* shared : quantised)
        for (std::size_t r = 0; r < scales.size(); ++r) scales[r] += blocks_of(shared->pieces[r].count, lora::kNf4Block);
      const at::Tensor padded = at::zeros({*std::max_element(scales.begin(), scales.end())}, at::kFloat);
      padded.narrow(0, 0, scales[rank]).copy_(at::cat(own));
      const at::Tensor all = at::empty({sharing_.group, padded.numel()}, at::kFloat);
      sharing_.ranks.start_gather(all, padded, sharing_.group, "scales of nf4")->wait();
      std::fill(scales.begin(), scales.end(), 0);
      for (Shared* shared : quantised) {
        std::vector<at::Tensor> of_weight;
        for (std::size_t r = 0; r < scales.size(); ++r) {
          const std::int64_t count = blocks_of(shared->pieces[r].count, lora::kNf4Block);
          of_weight.push_back(all[static_cast<std::int64_t>(r)].narrow(0, scales[r], count));
          scales[r] += count;
        }
        shared->nf4 = lora::with_nested_scales(std::move(shared->nf4), lora::nf4_offset(at::cat(of_weight)));
      }
    }
    for (Shared* shared : quantised) {
      const lora::Piece& own = shared->pieces[rank];
      keep_nf4(shared->nf4, *shared, own, part.narrow(0, own.offset, lora::bytes_of_piece(shared->weight, own.count)));
      shared->nf4.packed = shared->nf4.absmax = shared->nf4.nested_absmax = at::Tensor();
    }
  }

  const BaseWeights& weights_;
  at::ScalarType compute_type_;
  lora::BaseQuantization quantization_;
  const Sharing& sharing_;
  std::filesystem::path folder_;
};

}  // namespace

void load_shards(models::Decoder& decoder, const BaseWeights& weights, at::ScalarType compute_type, const lora::BaseQuantization& quantization, const Sharing& sharing,
                 const std::filesystem::path& folder) {
  std::vector<std::vector<Shared>> blocks(decoder.blocks.size());
  for (const models::NamedLinear& named : decoder.linears())
    if (named.layer >= 0) blocks[static_cast<std::size_t>(named.layer)].push_back({.name = named.path + ".weight", .linear = named.linear, .weight = {}});
  const BlockLoader loader(weights, compute_type, quantization, sharing, folder);
  std::vector<at::Tensor> own;
  for (std::vector<Shared>& block : blocks) own.push_back(loader.load(block));
  decoder.shards = std::make_shared<models::ShardedBlocks>(sharing.ranks, sharing.group, std::move(own));
  for (std::size_t layer = 0; layer < blocks.size(); ++layer)
    for (Shared& shared : blocks[layer]) {
      const std::int64_t own_bytes = lora::bytes_of_piece(shared.weight, shared.pieces[sharing.part()].count);
      shared.linear->quantized = std::make_shared<lora::ShardedWeight>(decoder.shards, static_cast<std::int64_t>(layer), shared.weight, std::move(shared.pieces), own_bytes, shared.nf4.nested_map, shared.nf4.offset);
      shared.linear->quantized_compute = compute_type;
    }
}

}  // namespace alambic::checkpoints
