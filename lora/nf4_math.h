// SPDX-License-Identifier: Apache-2.0
#pragma once
// The arithmetic of NF4 (arXiv:2305.14314, section 3 and appendix E), one value at a time, for the processor and for a GPU's
// kernel alike. Compile what includes it without contraction of a product and a sum into one rounding (-ffp-contract=off,
// nvcc -fmad=false): the values are promised bit for bit.
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ALAMBIC_HOST_DEVICE __host__ __device__
#else
#define ALAMBIC_HOST_DEVICE
#endif

namespace alambic::lora {

constexpr std::int64_t kNf4Block = 64;         // values that share an absolute maximum
constexpr std::int64_t kNf4NestedBlock = 256;  // maxima that share one of their own (double quantisation)

/// The value of code 0 .. 15: quantiles of a normal distribution, scaled to [-1, 1], with an exact 0. bitsandbytes' numbers.
ALAMBIC_HOST_DEVICE inline float nf4_value(unsigned code) {
  constexpr float kValues[16] = {-1.0f,
                                 -0.6961928009986877f,
                                 -0.5250730514526367f,
                                 -0.39491748809814453f,
                                 -0.28444138169288635f,
                                 -0.18477343022823334f,
                                 -0.09105003625154495f,
                                 0.0f,
                                 0.07958029955625534f,
                                 0.16093020141124725f,
                                 0.24611230194568634f,
                                 0.33791524171829224f,
                                 0.44070982933044434f,
                                 0.5626170039176941f,
                                 0.7229568362236023f,
                                 1.0f};
  return kValues[code & 15u];
}

/// The code of element `index`, two of which share a byte: the even one is the high half.
ALAMBIC_HOST_DEVICE inline unsigned nf4_code_at(const std::uint8_t* packed, std::int64_t index) {
  return (packed[index >> 1] >> (index % 2 == 0 ? 4 : 0)) & 15u;
}

/// The absolute maximum of a block under double quantisation: the product is rounded, then the sum.
ALAMBIC_HOST_DEVICE inline float nf4_nested_absmax(float map_value, float nested_absmax, float offset) { return map_value * nested_absmax + offset; }

/// An NF4 weight as plain pointers, all into the memory of one device.
struct Nf4View {
  const std::uint8_t* packed;
  const std::uint8_t* codes;  // of the scales; nullptr: `scales` are the scales themselves
  const float* scales;        // of the blocks, or of their codes
  const float* map;           // of the codes, 256 values
  float offset;
};

/// Element `index` of the flattened weight, in f32.
ALAMBIC_HOST_DEVICE inline float nf4_element(const Nf4View& weight, std::int64_t index) {
  const std::int64_t block = index / kNf4Block;
  const float scale = weight.codes == nullptr ? weight.scales[block]
                                              : nf4_nested_absmax(weight.map[weight.codes[block]], weight.scales[block / kNf4NestedBlock], weight.offset);
  return nf4_value(nf4_code_at(weight.packed, index)) * scale;
}

/// The bits of the nearest bf16, ties to even; a NaN stays one.
ALAMBIC_HOST_DEVICE inline std::uint16_t bf16_bits(float value) {
  std::uint32_t bits = 0;
  memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace alambic::lora
