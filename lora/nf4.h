// SPDX-License-Identifier: Apache-2.0
#pragma once
// NF4 (QLoRA, arXiv:2305.14314): four bits a value, one scale for 64 values in the order of memory, whatever the rows; with
// double quantisation the scales are kept in 8 bits. Codes, scales and de-quantised values are those of bitsandbytes 0.50.2's
// quantize_4bit(blocksize=64, quant_type="nf4") on the processor, bit for bit.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "lora/nf4_math.h"
#include "models/frozen_weight.h"

namespace alambic::lora {

/// What bitsandbytes calls these. n values in b = ceil(n / 64) blocks.
struct Nf4Parts {
  at::Tensor packed;         // u8 [ceil(n / 2)]: the even element of a pair in the high half
  at::Tensor absmax;         // u8 [b], codes of nested_map; without double quantisation f32 [b], the scales themselves
  at::Tensor nested_absmax;  // f32 [ceil(b / 256)]; undefined: no double quantisation
  at::Tensor nested_map;     // f32 [256]
  float offset = 0;          // scale of block i = nested_map[absmax[i]] * nested_absmax[i / 256] + offset
};

/// weight: f32, bf16 or f16, contiguous, finite. The same bits at any number of threads: the mean of the scales, whose sum
/// bitsandbytes cuts differently for each number of threads, is taken as with one.
Nf4Parts quantize_nf4(const at::Tensor& weight, bool double_quant);
/// Its second half, of a whole weight or of a part that begins with one of its 256-blocks: scales f32 [b] -> 8 bits, by the offset of all
/// scales of the weight.
Nf4Parts with_nested_scales(Nf4Parts parts, float offset);
float nf4_offset(const at::Tensor& scales);

/// bitsandbytes' create_dynamic_map(): f32 [256], rising (arXiv:1511.04561).
const at::Tensor& dynamic_map();

class Nf4Weight final : public models::FrozenWeight {
 public:
  /// Error(kBug) where the parts do not fit outputs x inputs.
  Nf4Weight(std::int64_t outputs, std::int64_t inputs, Nf4Parts parts);
  std::int64_t outputs() const override { return outputs_; }
  std::int64_t inputs() const override { return inputs_; }
  std::string_view format() const override { return "nf4"; }
  std::uint64_t num_bytes() const override;
  at::Device device() const override { return parts_.packed.device(); }
  std::shared_ptr<const models::FrozenWeight> on(at::Device to) const override;
  void dense_into(const at::Tensor& out_OI) const override;
  const Nf4Parts& parts() const { return parts_; }
  Nf4View view() const;

 private:
  std::int64_t outputs_, inputs_;
  Nf4Parts parts_;
};

// The loops behind dense_into(), with the same bits.
enum class Nf4Loop { kPlain, kAvx2 };
/// Those that this processor has, the fastest last.
std::vector<Nf4Loop> nf4_loops();

/// Elements [begin, end) of the flattened weight to out[0 .. end - begin). `scales` holds one for each block from that of
/// `begin` on. Out: float, or std::uint16_t holding bf16.
template <class Out>
void dequantize_nf4(Nf4Loop loop, const std::uint8_t* packed, const float* scales, std::int64_t begin, std::int64_t end, Out* out);

}  // namespace alambic::lora
