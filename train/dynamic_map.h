// SPDX-License-Identifier: Apache-2.0
#pragma once
// The 8-bit number format of block-wise optimiser states (arXiv:2110.02861, section 2): 256 values in [-1, 1] or [0, 1], dense
// near the largest and reaching down seven powers of ten, times the largest magnitude of a block of 256 elements. Values and
// rounding are those of bitsandbytes 0.50.2 on processors: a number goes to the nearest of 65,536 equal steps from -1 to 1, and
// that to the nearest value. So the smallest square that is stored is 1.6e-5 of the block's largest, and a mean of 0 becomes
// 2e-5 of it. Rounding to the nearest value at once, as bitsandbytes' GPU kernels do, gives small squares the value 0 beside
// means that are not 0, and then steps of mean / epsilon (docs/log.md has figures).
#include <array>
#include <cstdint>

namespace alambic::train {

inline constexpr std::int64_t kQuantizationBlock = 256;

struct DynamicMap {
  explicit DynamicMap(bool with_negatives);
  std::array<float, 256> values;          // rising
  std::array<std::uint8_t, 65536> codes;  // of each step
};

const DynamicMap& signed_map();    // for means
const DynamicMap& unsigned_map();  // for squares

}  // namespace alambic::train
