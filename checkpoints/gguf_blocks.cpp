// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/gguf_blocks.h"

#include <bit>
#include <cstring>

// Each formula is written with the roundings of gguf/quants.py: one for each product, one for the sum. Letting the
// compiler fuse them into one would change last bits, hence -ffp-contract=off for this file in CMakeLists.txt.
// In the names below: d = scale of a block, m = its minimum, q = a stored integer.
namespace alambic::checkpoints {
namespace {

using Byte = std::uint8_t;
constexpr int kSuper = 256;  // values in a block of the _K types

// IEEE half to single; subnormals, infinities and NaN included.
float half_at(const Byte* bytes) {
  std::uint16_t half = 0;
  std::memcpy(&half, bytes, 2);
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
  // Subnormal: an integer number of 2^-24, which a float holds exactly.
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(static_cast<float>(magnitude) * 0x1p-24f));
}

std::uint32_t word_at(const Byte* bytes) {
  std::uint32_t word = 0;
  std::memcpy(&word, bytes, 4);
  return word;
}

void q4_0(const Byte* block, float* y) {
  const float d = half_at(block);
  const Byte* q = block + 2;
  for (int i = 0; i < 16; ++i) {
    y[i] = d * static_cast<float>((q[i] & 15) - 8);
    y[i + 16] = d * static_cast<float>((q[i] >> 4) - 8);
  }
}

void q4_1(const Byte* block, float* y) {
  const float d = half_at(block), m = half_at(block + 2);
  const Byte* q = block + 4;
  for (int i = 0; i < 16; ++i) {
    y[i] = d * static_cast<float>(q[i] & 15) + m;
    y[i + 16] = d * static_cast<float>(q[i] >> 4) + m;
  }
}

void q5_0(const Byte* block, float* y) {
  const float d = half_at(block);
  const std::uint32_t high = word_at(block + 2);
  const Byte* q = block + 6;
  for (int i = 0; i < 16; ++i) {
    y[i] = d * static_cast<float>(static_cast<int>((q[i] & 15u) | (high >> i & 1) << 4) - 16);
    y[i + 16] = d * static_cast<float>(static_cast<int>((q[i] >> 4u) | (high >> (i + 16) & 1) << 4) - 16);
  }
}

void q5_1(const Byte* block, float* y) {
  const float d = half_at(block), m = half_at(block + 2);
  const std::uint32_t high = word_at(block + 4);
  const Byte* q = block + 8;
  for (int i = 0; i < 16; ++i) {
    y[i] = d * static_cast<float>((q[i] & 15u) | (high >> i & 1) << 4) + m;
    y[i + 16] = d * static_cast<float>((q[i] >> 4u) | (high >> (i + 16) & 1) << 4) + m;
  }
}

void q8_0(const Byte* block, float* y) {
  const float d = half_at(block);
  for (int i = 0; i < 32; ++i) y[i] = static_cast<float>(static_cast<std::int8_t>(block[2 + i])) * d;
}

// scales 16 (low nibble: scale, high nibble: minimum, of 16 values), q 64 (2 bits each), d, m.
void q2_k(const Byte* block, float* y) {
  const Byte *scales = block, *q = block + 16;
  const float d = half_at(block + 80), m = half_at(block + 82);
  for (int group = 0; group < 16; ++group) {
    const float dl = d * static_cast<float>(scales[group] & 15), ml = m * static_cast<float>(scales[group] >> 4);
    const Byte* from = q + group / 8 * 32 + group % 2 * 16;
    const int shift = group / 2 % 4 * 2;
    for (int i = 0; i < 16; ++i) y[16 * group + i] = dl * static_cast<float>(from[i] >> shift & 3) - ml;
  }
}

// high bits 32, q 64 (2 bits each), scales 12 (16 of 6 bits), d.
void q3_k(const Byte* block, float* y) {
  const Byte *high = block, *q = block + 32, *scales = block + 96;
  const float d = half_at(block + 108);
  for (int group = 0; group < 16; ++group) {
    const int low = group < 8 ? scales[group] & 15 : scales[group - 8] >> 4;
    const int top = scales[8 + group % 4] >> (group / 4 * 2) & 3;
    const float dl = d * static_cast<float>((low | top << 4) - 32);
    const Byte *from = q + group / 8 * 32 + group % 2 * 16, *high_from = high + group % 2 * 16;
    const int shift = group / 2 % 4 * 2, bit = group / 2;
    for (int i = 0; i < 16; ++i) {
      const int missing = (high_from[i] >> bit & 1) ^ 1;  // the high bit is stored inverted: absent means minus 4
      y[16 * group + i] = dl * static_cast<float>((from[i] >> shift & 3) - missing * 4);
    }
  }
}

// Eight 6-bit scales and minima in 12 bytes, as Q4_K and Q5_K pack them.
struct ScaleAndMinimum {
  float scale, minimum;
};
ScaleAndMinimum six_bits(const Byte* packed, int group) {
  const int j = group % 4;
  const Byte a = packed[j], b = packed[4 + j], c = packed[8 + j];
  if (group < 4) return {static_cast<float>(a & 63), static_cast<float>(b & 63)};
  return {static_cast<float>((c & 15) | (a >> 2 & 48)), static_cast<float>(c >> 4 | (b >> 2 & 48))};
}

// d, m, scales 12, q 128 (4 bits each).
void q4_k(const Byte* block, float* y) {
  const float d = half_at(block), m = half_at(block + 2);
  const Byte *packed = block + 4, *q = block + 16;
  for (int group = 0; group < 8; ++group) {
    const ScaleAndMinimum s = six_bits(packed, group);
    const float dl = d * s.scale, ml = m * s.minimum;
    const Byte* from = q + group / 2 * 32;
    const int shift = group % 2 * 4;
    for (int i = 0; i < 32; ++i) y[32 * group + i] = dl * static_cast<float>(from[i] >> shift & 15) - ml;
  }
}

// d, m, scales 12, high bits 32, q 128 (4 bits each).
void q5_k(const Byte* block, float* y) {
  const float d = half_at(block), m = half_at(block + 2);
  const Byte *packed = block + 4, *high = block + 16, *q = block + 48;
  for (int group = 0; group < 8; ++group) {
    const ScaleAndMinimum s = six_bits(packed, group);
    const float dl = d * s.scale, ml = m * s.minimum;
    const Byte* from = q + group / 2 * 32;
    const int shift = group % 2 * 4;
    for (int i = 0; i < 32; ++i) y[32 * group + i] = dl * static_cast<float>((from[i] >> shift & 15) | (high[i] >> group & 1) << 4) - ml;
  }
}

// q low 128 (4 bits each), q high 64 (2 bits each), scales 16 (signed, of 16 values), d.
void q6_k(const Byte* block, float* y) {
  const Byte *low = block, *high = block + 128, *scales = block + 192;
  const float d = half_at(block + 208);
  for (int group = 0; group < 16; ++group) {
    const float dl = d * static_cast<float>(static_cast<std::int8_t>(scales[group]));
    const int half = group / 8, in_half = group % 8;  // 128 values a half, 8 groups of 16
    const Byte* low_from = low + 64 * half + in_half % 4 * 16;
    const Byte* high_from = high + 32 * half + in_half % 2 * 16;
    const int low_shift = in_half / 4 * 4, high_shift = in_half / 2 * 2;
    for (int i = 0; i < 16; ++i) {
      const int q = (low_from[i] >> low_shift & 15) | (high_from[i] >> high_shift & 3) << 4;
      y[16 * group + i] = dl * static_cast<float>(q - 32);
    }
  }
}

template <auto Block, int BlockSize, int BlockBytes>
void each_block(const std::byte* blocks, std::int64_t num_blocks, float* values) {
  const Byte* from = reinterpret_cast<const Byte*>(blocks);
  for (std::int64_t i = 0; i < num_blocks; ++i) Block(from + i * BlockBytes, values + i * BlockSize);
}

constexpr GgufType kTypes[] = {
    {0, "F32", 1, 4, nullptr},
    {1, "F16", 1, 2, nullptr},
    {30, "BF16", 1, 2, nullptr},
    {2, "Q4_0", 32, 18, each_block<q4_0, 32, 18>},
    {3, "Q4_1", 32, 20, each_block<q4_1, 32, 20>},
    {6, "Q5_0", 32, 22, each_block<q5_0, 32, 22>},
    {7, "Q5_1", 32, 24, each_block<q5_1, 32, 24>},
    {8, "Q8_0", 32, 34, each_block<q8_0, 32, 34>},
    {10, "Q2_K", kSuper, 84, each_block<q2_k, kSuper, 84>},
    {11, "Q3_K", kSuper, 110, each_block<q3_k, kSuper, 110>},
    {12, "Q4_K", kSuper, 144, each_block<q4_k, kSuper, 144>},
    {13, "Q5_K", kSuper, 176, each_block<q5_k, kSuper, 176>},
    {14, "Q6_K", kSuper, 210, each_block<q6_k, kSuper, 210>},
};

struct OtherType {
  std::uint32_t id;
  std::string_view name;
};
constexpr OtherType kOtherTypes[] = {
    {4, "Q4_2 (removed)"}, {5, "Q4_3 (removed)"}, {9, "Q8_1"},  {15, "Q8_K"},  {16, "IQ2_XXS"}, {17, "IQ2_XS"}, {18, "IQ3_XXS"}, {19, "IQ1_S"},
    {20, "IQ4_NL"},        {21, "IQ3_S"},         {22, "IQ2_S"}, {23, "IQ4_XS"}, {24, "I8"},      {25, "I16"},    {26, "I32"},     {27, "I64"},
    {28, "F64"},           {29, "IQ1_M"},         {34, "TQ1_0"}, {35, "TQ2_0"},  {39, "MXFP4"},   {40, "NVFP4"}};

}  // namespace

std::span<const GgufType> gguf_types() { return kTypes; }

const GgufType* find_gguf_type(std::uint32_t id) {
  for (const GgufType& type : kTypes)
    if (type.id == id) return &type;
  return nullptr;
}

std::string_view gguf_type_name(std::uint32_t id) {
  if (const GgufType* type = find_gguf_type(id)) return type->name;
  for (const OtherType& type : kOtherTypes)
    if (type.id == id) return type.name;
  return "?";
}

}  // namespace alambic::checkpoints
