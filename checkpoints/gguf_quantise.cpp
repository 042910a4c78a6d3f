// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/gguf_quantise.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/error.h"
#include "core/vector_loops.h"

// The search for a block's scale adds up its values one after the other, and the order decides the last bit. So the lanes of a
// vector hold eight blocks (or eight groups of a _K block) that are searched side by side, each in its own order: as fast
// as the registers are wide, and the same bits on all of them. -ffp-contract=off for this file keeps each product and each
// sum a rounding of its own.
// Letters: x = value, w = weight of its error, q = stored integer, d = scale of a block, m = its minimum.
namespace alambic::checkpoints {
namespace {

using Byte = std::uint8_t;
constexpr int kLanes = 8;
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = std::int32_t __attribute__((vector_size(4 * kLanes)));

constexpr int kSuper = 256;          // values in a block of the _K types
constexpr float kTiny = 1e-15f;      // a group whose largest value is below this is zeros
constexpr std::int64_t kValuesPerTask = 1 << 15;

// IEEE half, rounded to nearest even; infinity from 65520 on.
[[gnu::always_inline]] inline std::uint16_t half_bits(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half = 0;
  if (magnitude >= 0x7f800000u) half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  else if (magnitude >= 0x477ff000u) half = 0x7c00u;
  else if (magnitude >= 0x38800000u) half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  else half = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;  // 0.5's last bit is 2^-24, the smallest half
  return static_cast<std::uint16_t>(sign | half);
}

[[gnu::always_inline]] inline float float_of_half(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(static_cast<float>(magnitude) * 0x1p-24f));
}

[[gnu::always_inline]] inline void put_half(Byte* at, std::uint16_t half) { std::memcpy(at, &half, 2); }

// The nearest integer, ties to even, by way of a float whose last bit is 1. Beyond 2^22 it is the low bits of that sum, which
// the clamps after it then see; they are part of the format's arithmetic too.
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23
[[gnu::always_inline]] inline std::int32_t nearest(float value) {
  return static_cast<std::int32_t>(std::bit_cast<std::uint32_t>(value + kRounder) & 0x007fffffu) - 0x00400000;
}
[[gnu::always_inline]] inline Ints nearest(Floats value) { return (std::bit_cast<Ints>(value + kRounder) & 0x007fffff) - 0x00400000; }

[[gnu::always_inline]] inline Ints clamped(Ints value, int low, int high) {
  value = value > high ? Ints{} + high : value;
  return value < low ? Ints{} + low : value;
}
[[gnu::always_inline]] inline Floats as_floats(Ints value) { return __builtin_convertvector(value, Floats); }
[[gnu::always_inline]] inline Floats absolute(Floats value) { return std::bit_cast<Floats>(std::bit_cast<Ints>(value) & 0x7fffffff); }

// Towards zero; what no int holds (and NaN) becomes the smallest int, as x86's conversion has it.
[[gnu::always_inline]] inline Ints truncated(Floats value) {
  constexpr float kEnd = 2147483648.0f;
  const Ints fits = (value >= -kEnd) & (value < kEnd);
  return fits ? __builtin_convertvector(fits ? value : Floats{}, Ints) : Ints{} + std::numeric_limits<std::int32_t>::min();
}
[[gnu::always_inline]] inline Ints as_int8(Ints value) { return (value << 24) >> 24; }

[[gnu::always_inline]] inline Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// ---- the searches, a group of kCount values in each lane ----

struct Affine {
  Floats scale, offset;  // x is about scale * q - offset
};

/// make_qkx2_quants and make_qkx3_quants of ggml: tries scales whose inverse is (first + step * i + most) / range, i = 0 .. last,
/// fits scale and minimum to the integers of each by weighted least squares, and keeps the smallest error. q: 0 .. most.
template <int kCount>
[[gnu::always_inline]] inline Affine fit_affine(const Floats* x, const Floats* w, Floats* q, int most, float first, float step, int last) {
  Floats low = x[0], high = x[0], sum_w = w[0], sum_x = w[0] * x[0];
  for (int i = 1; i < kCount; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    sum_w += w[i];
    sum_x += w[i] * x[i];
  }
  low = low > 0.0f ? Floats{} : low;
  const Ints flat = high <= low;

  Floats inverse = static_cast<float>(most) / (high - low), scale = 1.0f / inverse, minimum = low, best{};
  for (int i = 0; i < kCount; ++i) {
    q[i] = as_floats(clamped(nearest(inverse * (x[i] - low)), 0, most));
    const Floats difference = scale * q[i] + low - x[i];
    best += w[i] * (difference * difference);
  }
  Floats tried[kCount];
  for (int trial = 0; trial <= last; ++trial) {
    // The range begins at the minimum found so far, not at the lowest value: later trials depend on earlier ones.
    inverse = (first + step * static_cast<float>(trial) + static_cast<float>(most)) / (high - minimum);
    Floats sum_q{}, sum_qq{}, sum_xq{};
    for (int i = 0; i < kCount; ++i) {
      tried[i] = as_floats(clamped(nearest(inverse * (x[i] - minimum)), 0, most));
      const Floats wq = w[i] * tried[i];
      sum_q += wq;
      sum_qq += wq * tried[i];
      sum_xq += wq * x[i];
    }
    const Floats determinant = sum_w * sum_qq - sum_q * sum_q;
    Floats this_scale = (sum_w * sum_xq - sum_x * sum_q) / determinant;
    Floats this_minimum = (sum_qq * sum_x - sum_q * sum_xq) / determinant;
    const Ints positive = this_minimum > 0.0f;
    this_scale = positive ? sum_xq / sum_qq : this_scale;
    this_minimum = positive ? Floats{} : this_minimum;
    Floats error{};
    for (int i = 0; i < kCount; ++i) {
      const Floats difference = this_scale * tried[i] + this_minimum - x[i];
      error += w[i] * (difference * difference);
    }
    const Ints better = (determinant > 0.0f) & (error < best);
    for (int i = 0; i < kCount; ++i) q[i] = better ? tried[i] : q[i];
    best = better ? error : best;
    scale = better ? this_scale : scale;
    minimum = better ? this_minimum : minimum;
  }
  for (int i = 0; i < kCount; ++i) q[i] = flat ? Floats{} : q[i];
  return {flat ? Floats{} : scale, -(flat ? low : minimum)};
}

/// make_qx_quants of ggml: x is about scale * (q - most), q: 0 .. 2 most - 1; 19 scales are tried around -most / the value of
/// the largest magnitude. A group of zeros has scale 0 and q 0.
template <int kCount>
[[gnu::always_inline]] inline Floats fit_symmetric(const Floats* x, const Floats* w, Floats* q, int most) {
  Floats largest{}, value{};
  for (int i = 0; i < kCount; ++i) {
    const Floats magnitude = absolute(x[i]);
    const Ints larger = magnitude > largest;
    largest = larger ? magnitude : largest;
    value = larger ? x[i] : value;
  }
  const Ints zeros = largest < kTiny;
  Floats scale{}, best{}, best_inverse{};
  const auto attempt = [&](Floats inverse, bool first) __attribute__((always_inline)) {
    Floats sum_xq{}, sum_qq{};
    for (int i = 0; i < kCount; ++i) {
      const Floats integer = as_floats(clamped(nearest(inverse * x[i]), -most, most - 1));
      sum_xq += w[i] * x[i] * integer;
      sum_qq += w[i] * integer * integer;
    }
    const Ints better = first ? Ints{} - 1 : (sum_qq > 0.0f) & (sum_xq * sum_xq > best * sum_qq);
    const Floats this_scale = first ? (sum_qq != 0.0f ? sum_xq / sum_qq : Floats{}) : sum_xq / sum_qq;
    scale = better ? this_scale : scale;
    best = better ? this_scale * sum_xq : best;
    best_inverse = better ? inverse : best_inverse;
  };
  attempt(static_cast<float>(-most) / value, true);
  for (int trial = -9; trial <= 9; ++trial)
    if (trial != 0) attempt(-(static_cast<float>(most) + 0.1f * static_cast<float>(trial)) / value, false);
  for (int i = 0; i < kCount; ++i) {
    const Ints integer = clamped(nearest(best_inverse * x[i]), -most, most - 1) + most;
    q[i] = as_floats(zeros ? Ints{} : integer);
  }
  return zeros ? Floats{} : scale;
}

/// make_qp_quants of ggml: eight values of 0 and more as scale * q, q: 0 .. most.
[[gnu::always_inline]] inline float fit_positive(const std::array<float, kLanes>& x, const std::array<float, kLanes>& w, std::array<Byte, kLanes>& q, int most) {
  float high = 0;
  for (const float value : x) high = high > value ? high : value;
  q.fill(0);
  if (high < kTiny) return 0;
  float inverse = static_cast<float>(most) / high, best = 0;
  const float first_scale = 1 / inverse;
  for (std::size_t i = 0; i < kLanes; ++i) {
    const float difference = x[i] - first_scale * static_cast<float>(static_cast<Byte>(nearest(inverse * x[i])));
    best += w[i] * difference * difference;
  }
  for (int trial = -4; trial <= 4; ++trial) {
    if (trial == 0) continue;
    const float this_inverse = (0.1f * static_cast<float>(trial) + static_cast<float>(most)) / high, this_scale = 1 / this_inverse;
    float error = 0;
    for (std::size_t i = 0; i < kLanes; ++i) {
      const float difference = x[i] - this_scale * static_cast<float>(std::min(most, nearest(this_inverse * x[i])));
      error += w[i] * difference * difference;
    }
    if (error < best) best = error, inverse = this_inverse;
  }
  float sum_xq = 0, sum_qq = 0;
  for (std::size_t i = 0; i < kLanes; ++i) {
    const int integer = std::min(most, nearest(inverse * x[i]));
    q[i] = static_cast<Byte>(integer);
    sum_xq += w[i] * x[i] * static_cast<float>(integer);
    sum_qq += w[i] * static_cast<float>(integer) * static_cast<float>(integer);
  }
  // Coordinate descent: one integer is changed at a time, for as long as that helps and at most five rounds.
  for (int round = 0; round < 5; ++round) {
    bool changed = false;
    for (std::size_t i = 0; i < kLanes; ++i) {
      const float old = static_cast<float>(q[i]);
      float xq = sum_xq - w[i] * x[i] * old, qq = sum_qq - w[i] * old * old;
      if (!(xq > 0 && qq > 0)) continue;
      const int integer = std::min(most, nearest(x[i] * qq / xq));
      if (integer == q[i]) continue;
      const float changed_to = static_cast<float>(integer);
      xq += w[i] * x[i] * changed_to;
      qq += w[i] * changed_to * changed_to;
      if (xq * xq * sum_qq > sum_xq * sum_xq * qq) q[i] = static_cast<Byte>(integer), sum_xq = xq, sum_qq = qq, changed = true;
    }
    if (!changed) break;
  }
  return sum_qq > 0 ? sum_xq / sum_qq : 0;
}

// ---- blocks of 32 whose scale follows from the extremes ----

[[gnu::always_inline]] inline float largest_of(Floats lanes) {
  float largest = lanes[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = lanes[lane] > largest ? lanes[lane] : largest;
  return largest;
}

// The first of the 32 values with the largest magnitude. 0 where all are zeros.
[[gnu::always_inline]] inline float extreme_of(const float* x) {
  Floats magnitudes = absolute(load(x));
  for (int i = kLanes; i < 32; i += kLanes) {
    const Floats more = absolute(load(x + i));
    magnitudes = more > magnitudes ? more : magnitudes;
  }
  const float largest = largest_of(magnitudes);
  if (largest == 0) return 0;
  int at = 0;
  while (std::fabs(x[at]) != largest) ++at;
  return x[at];
}

// The first of the lowest and the first of the highest values: of -0 and 0 the earlier one counts.
[[gnu::always_inline]] inline void range_of(const float* x, float& low, float& high) {
  Floats lows = load(x), highs = lows;
  for (int i = kLanes; i < 32; i += kLanes) {
    const Floats more = load(x + i);
    lows = more < lows ? more : lows;
    highs = more > highs ? more : highs;
  }
  const float lowest = -largest_of(-lows), highest = largest_of(highs);
  int at = 0;
  while (x[at] != lowest) ++at;
  low = x[at];
  for (at = 0; x[at] != highest;) ++at;
  high = x[at];
}

// 32 integers of 5 bits (the lowest 8 of each int are given): nibbles, and before them, where high_at is given, the fifth bits.
[[gnu::always_inline]] inline void pack_32(const std::int32_t* q, Byte* nibbles, Byte* high_at) {
  if (high_at == nullptr) {
    for (int i = 0; i < 16; ++i) nibbles[i] = static_cast<Byte>(static_cast<Byte>(q[i]) | q[i + 16] << 4);
    return;
  }
  std::uint32_t high = 0;
  for (int i = 0; i < 16; ++i) {
    nibbles[i] = static_cast<Byte>((q[i] & 15) | (q[i + 16] & 15) << 4);
    high |= static_cast<std::uint32_t>(q[i] >> 4 & 1) << i | static_cast<std::uint32_t>(q[i + 16] >> 4 & 1) << (i + 16);
  }
  std::memcpy(high_at, &high, 4);
}

// Q4_0 and Q5_0: x = d * (q - kMost).
template <int kMost, int kBytes>
struct Symmetric {
  [[gnu::always_inline]] static void run(const float* x, std::int64_t num_blocks, Byte* block) {
    for (; num_blocks > 0; --num_blocks, x += 32, block += kBytes) {
      const float d = extreme_of(x) / static_cast<float>(-kMost), inverse = d != 0 ? 1 / d : 0;
      put_half(block, half_bits(d));
      std::int32_t q[32];
      for (int i = 0; i < 32; i += kLanes) {
        const Ints integers = as_int8(truncated(load(x + i) * inverse + (static_cast<float>(kMost) + 0.5f)));
        const Ints fitting = integers > 2 * kMost - 1 ? Ints{} + (2 * kMost - 1) : integers;
        std::memcpy(q + i, &fitting, sizeof fitting);
      }
      pack_32(q, block + kBytes - 16, kMost == 16 ? block + 2 : nullptr);
    }
  }
};

// Q4_1 and Q5_1: x = d * q + m.
template <int kMost, int kBytes>
struct WithMinimum {
  [[gnu::always_inline]] static void run(const float* x, std::int64_t num_blocks, Byte* block) {
    for (; num_blocks > 0; --num_blocks, x += 32, block += kBytes) {
      float low = 0, high = 0;
      range_of(x, low, high);
      const float d = (high - low) / static_cast<float>(kMost), inverse = d != 0 ? 1 / d : 0;
      put_half(block, half_bits(d));
      put_half(block + 2, half_bits(low));
      std::int32_t q[32];
      for (int i = 0; i < 32; i += kLanes) {
        Ints integers = truncated((load(x + i) - low) * inverse + 0.5f);
        // ggml clamps Q4_1's integers and trusts Q5_1's.
        integers = kMost == 15 ? as_int8(integers) : integers & 255;
        if (kMost == 15) integers = integers > kMost ? Ints{} + kMost : integers;
        std::memcpy(q + i, &integers, sizeof integers);
      }
      pack_32(q, block + kBytes - 16, kMost == 31 ? block + 4 : nullptr);
    }
  }
};

struct Q8 {
  [[gnu::always_inline]] static void run(const float* x, std::int64_t num_blocks, Byte* block) {
    for (; num_blocks > 0; --num_blocks, x += 32, block += 34) {
      const float d = std::fabs(extreme_of(x)) / 127.0f, inverse = d != 0 ? 1 / d : 0;
      put_half(block, half_bits(d));
      for (int i = 0; i < 32; i += kLanes) {
        const Floats scaled = load(x + i) * inverse;
        Ints integers = truncated(scaled);
        // Halves away from zero; the rest is exact, and of what was no number only the low byte, 0, is kept.
        const Floats rest = scaled - as_floats(integers);
        integers += (rest <= -0.5f) & (absolute(scaled) < 1024.0f);
        integers -= (rest >= 0.5f) & (absolute(scaled) < 1024.0f);
        for (int lane = 0; lane < kLanes; ++lane) block[2 + i + lane] = static_cast<Byte>(integers[lane]);
      }
    }
  }
};

// ---- blocks of 32 with importances: eight blocks of a row at a time ----

// sqrt(v^2 + sigma^2) times importance, for each value.
[[gnu::always_inline]] inline Floats importance_weight(Floats importance, Floats sigma2, Floats x) {
  Floats sum = sigma2 + x * x;
  for (int lane = 0; lane < kLanes; ++lane) sum[lane] = std::sqrt(sum[lane]);
  return importance * sum;
}

// Values i of up to eight groups of kCount that lie one behind the other; missing ones are zeros.
template <int kCount>
[[gnu::always_inline]] inline void gather(const float* from, int num_groups, Floats* to) {
  for (int i = 0; i < kCount; ++i) to[i] = Floats{};
  for (int lane = 0; lane < num_groups; ++lane)
    for (int i = 0; i < kCount; ++i) to[i][lane] = from[kCount * lane + i];
}

template <int kMost, bool kAffine, int kBytes>
struct Weighted32 {
  [[gnu::always_inline]] static void run(const float* x, std::int64_t num_blocks, const float* importance, Byte* block) {
    float sum = 0;
    for (std::int64_t i = 0; i < 32 * num_blocks; ++i) sum += x[i] * x[i];
    const Floats sigma2 = Floats{} + sum / static_cast<float>(32 * num_blocks);
    while (num_blocks > 0) {
      const int count = static_cast<int>(std::min<std::int64_t>(num_blocks, kLanes));
      Floats values[32], weights[32], q[32];
      gather<32>(x, count, values);
      gather<32>(importance, count, weights);
      for (int i = 0; i < 32; ++i) weights[i] = importance_weight(weights[i], sigma2, values[i]);
      Affine fitted{};
      if constexpr (kAffine) fitted = fit_affine<32>(values, weights, q, kMost, -0.9f, 0.05f, 36);
      else fitted.scale = fit_symmetric<32>(values, weights, q, kMost);
      for (int lane = 0; lane < count; ++lane, block += kBytes) {
        put_half(block, half_bits(fitted.scale[lane]));
        if constexpr (kAffine) put_half(block + 2, half_bits(-fitted.offset[lane]));
        std::int32_t integers[32];
        for (int i = 0; i < 32; ++i) integers[i] = static_cast<std::int32_t>(q[i][lane]);
        pack_32(integers, block + kBytes - 16, kMost >= 16 ? block + (kAffine ? 4 : 2) : nullptr);
      }
      x += 32 * count, importance += 32 * count, num_blocks -= count;
    }
  }
};

// ---- Q4_K and Q5_K: eight groups of 32, each with a 6-bit scale and minimum ----

template <int kMost>
struct AffineSuper {
  static constexpr int kBytes = kMost == 15 ? 144 : 176;

  [[gnu::always_inline]] static void run(const float* x, std::int64_t num_blocks, const float* importance, Byte* block) {
    for (; num_blocks > 0; --num_blocks, x += kSuper, block += kBytes) {
      one(x, importance, block);
      if (importance != nullptr) importance += kSuper;
    }
  }

  [[gnu::always_inline]] static void one(const float* x, const float* importance, Byte* block) {
    Floats values[32], weights[32], q[32];
    gather<32>(x, kLanes, values);
    Affine fitted{};
    std::array<float, kLanes> scales{}, offsets{}, sums{};
    std::array<Byte, kLanes> scale_integers{}, offset_integers{};
    float d = 0, m = 0;
    if (importance == nullptr) {
      Floats sum{};
      for (const Floats& value : values) sum += value * value;
      Floats mean = sum / 32.0f;
      for (int lane = 0; lane < kLanes; ++lane) mean[lane] = std::sqrt(mean[lane]);
      for (int i = 0; i < 32; ++i) weights[i] = mean + absolute(values[i]);
      fitted = kMost == 15 ? fit_affine<32>(values, weights, q, kMost, -1.0f, 0.1f, 20) : fit_affine<32>(values, weights, q, kMost, -0.5f, 0.1f, 15);
      std::memcpy(scales.data(), &fitted.scale, sizeof scales);
      std::memcpy(offsets.data(), &fitted.offset, sizeof offsets);
      float largest_scale = 0, largest_offset = 0;
      for (const float scale : scales) largest_scale = scale > largest_scale ? scale : largest_scale;
      for (const float offset : offsets) largest_offset = offset > largest_offset ? offset : largest_offset;
      const float scale_inverse = largest_scale > 0 ? 63.0f / largest_scale : 0, offset_inverse = largest_offset > 0 ? 63.0f / largest_offset : 0;
      for (std::size_t group = 0; group < kLanes; ++group) {
        scale_integers[group] = std::min<Byte>(63, static_cast<Byte>(nearest(scale_inverse * scales[group])));
        offset_integers[group] = std::min<Byte>(63, static_cast<Byte>(nearest(offset_inverse * offsets[group])));
      }
      d = largest_scale / 63.0f;
      m = largest_offset / 63.0f;
    } else {
      float sum = 0;
      for (int i = 0; i < kSuper; ++i) sum += x[i] * x[i];
      const Floats sigma2 = Floats{} + 2 * sum / static_cast<float>(kSuper);
      gather<32>(importance, kLanes, weights);
      Floats total{};
      for (int i = 0; i < 32; ++i) {
        weights[i] = importance_weight(weights[i], sigma2, values[i]);
        total += weights[i];
      }
      fitted = fit_affine<32>(values, weights, q, kMost, -0.9f, 0.05f, 36);
      std::memcpy(scales.data(), &fitted.scale, sizeof scales);
      std::memcpy(offsets.data(), &fitted.offset, sizeof offsets);
      std::memcpy(sums.data(), &total, sizeof sums);
      d = fit_positive(scales, sums, scale_integers, 63);
      m = fit_positive(offsets, sums, offset_integers, 63);
      if (kMost == 31)  // ggml clamps them here for Q5_K and not for Q4_K, where a larger one spills over
        for (std::size_t group = 0; group < kLanes; ++group) {
          scale_integers[group] = std::min<Byte>(63, scale_integers[group]);
          offset_integers[group] = std::min<Byte>(63, offset_integers[group]);
        }
    }
    const std::uint16_t half_d = half_bits(d), half_m = half_bits(m);
    put_half(block, half_d);
    put_half(block + 2, half_m);
    Byte* const packed = block + 4;
    for (std::size_t group = 0; group < 4; ++group) packed[group] = scale_integers[group], packed[group + 4] = offset_integers[group];
    for (std::size_t group = 4; group < kLanes; ++group) {
      packed[group + 4] = static_cast<Byte>((scale_integers[group] & 15) | (offset_integers[group] & 15) << 4);
      packed[group - 4] = static_cast<Byte>(packed[group - 4] | scale_integers[group] >> 4 << 6);
      packed[group] = static_cast<Byte>(packed[group] | offset_integers[group] >> 4 << 6);
    }

    // The integers once more, with scales and minima as they are stored.
    Floats group_d{}, group_m{};
    for (std::size_t group = 0; group < kLanes; ++group) {
      const Byte scale = group < 4 ? packed[group] & 63 : (packed[group + 4] & 15) | packed[group - 4] >> 6 << 4;
      const Byte offset = group < 4 ? packed[group + 4] & 63 : packed[group + 4] >> 4 | packed[group] >> 6 << 4;
      group_d[group] = float_of_half(half_d) * static_cast<float>(scale);
      group_m[group] = float_of_half(half_m) * static_cast<float>(offset);
    }
    Byte integers[kSuper];
    for (int i = 0; i < 32; ++i) {
      const Ints again = clamped(nearest((values[i] + group_m) / group_d), 0, kMost);
      const Ints kept = group_d == 0.0f ? __builtin_convertvector(q[i], Ints) : again;
      for (int lane = 0; lane < kLanes; ++lane) integers[32 * lane + i] = static_cast<Byte>(kept[lane]);
    }
    Byte* const low = block + kBytes - 128;
    for (int pair = 0; pair < 4; ++pair)
      for (int i = 0; i < 32; ++i)
        low[32 * pair + i] = static_cast<Byte>((integers[64 * pair + i] & 15) | (integers[64 * pair + 32 + i] & 15) << 4);
    if constexpr (kMost == 31)
      for (int i = 0; i < 32; ++i) {
        unsigned high = 0;
        for (int group = 0; group < kLanes; ++group) high |= static_cast<unsigned>(integers[32 * group + i] >> 4) << group;
        block[16 + i] = static_cast<Byte>(high);
      }
  }
};

// ---- Q6_K: sixteen groups of 16, each with a signed 8-bit scale ----

struct SymmetricSuper {
  [[gnu::always_inline]] static void run(const float* x, std::int64_t num_blocks, const float* importance, Byte* block) {
    for (; num_blocks > 0; --num_blocks, x += kSuper, block += 210) {
      one(x, importance, block);
      if (importance != nullptr) importance += kSuper;
    }
  }

  [[gnu::always_inline]] static void one(const float* x, const float* importance, Byte* block) {
    Floats values[2][16], q[2][16], fitted[2];
    for (int half = 0; half < 2; ++half) {
      Floats weights[16];
      gather<16>(x + 128 * half, kLanes, values[half]);
      if (importance != nullptr) gather<16>(importance + 128 * half, kLanes, weights);
      else
        for (int i = 0; i < 16; ++i) weights[i] = values[half][i] * values[half][i];
      fitted[half] = fit_symmetric<16>(values[half], weights, q[half], 32);
    }
    float largest = 0, scale = 0;
    std::memset(block, 0, 210);
    for (int group = 0; group < 16; ++group) {
      const float this_scale = fitted[group / kLanes][group % kLanes];
      if (std::fabs(this_scale) > largest) largest = std::fabs(this_scale), scale = this_scale;
      if (std::isnan(this_scale)) return put_half(block + 208, half_bits(this_scale));  // sums overflowed: quantise() refuses the block
    }
    if (largest < kTiny) return;
    const float inverse = -128.0f / scale;
    const std::uint16_t half_d = half_bits(1 / inverse);
    put_half(block + 208, half_d);
    Floats group_d[2];
    for (int group = 0; group < 16; ++group) {
      const auto integer = static_cast<std::int8_t>(std::min(127, nearest(inverse * fitted[group / kLanes][group % kLanes])));
      block[192 + group] = static_cast<Byte>(integer);
      group_d[group / kLanes][group % kLanes] = float_of_half(half_d) * static_cast<float>(integer);
    }
    Byte integers[kSuper];
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 16; ++i) {
        const Ints again = clamped(nearest(values[half][i] / group_d[half]), -32, 31) + 32;
        const Ints kept = group_d[half] == 0.0f ? __builtin_convertvector(q[half][i], Ints) : again;
        for (int lane = 0; lane < kLanes; ++lane) integers[128 * half + 16 * lane + i] = static_cast<Byte>(kept[lane]);
      }
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 32; ++i) {
        const Byte* const from = integers + 128 * half + i;
        block[64 * half + i] = static_cast<Byte>((from[0] & 15) | (from[64] & 15) << 4);
        block[64 * half + 32 + i] = static_cast<Byte>((from[32] & 15) | (from[96] & 15) << 4);
        block[128 + 32 * half + i] = static_cast<Byte>(from[0] >> 4 | from[32] >> 4 << 2 | from[64] >> 4 << 4 | from[96] >> 4 << 6);
      }
  }
};

// ---- which of them a type takes ----

struct Quantiser {
  std::string_view type;
  void (*plain)(const float* x, std::int64_t num_blocks, Byte* blocks);
  void (*weighted)(const float* row, std::int64_t num_blocks, const float* importance, Byte* blocks);  // nullptr: importances change nothing
  std::array<int, 2> scales_at;  // where a block holds halves; -1: no second one
};

template <class Loop>
void plain(const float* x, std::int64_t num_blocks, Byte* blocks) {
  run_vectorised<Loop>(x, num_blocks, blocks);
}
template <class Loop>
void plain_super(const float* x, std::int64_t num_blocks, Byte* blocks) {
  run_vectorised<Loop>(x, num_blocks, static_cast<const float*>(nullptr), blocks);
}
template <class Loop>
void weighted(const float* row, std::int64_t num_blocks, const float* importance, Byte* blocks) {
  run_vectorised<Loop>(row, num_blocks, importance, blocks);
}

constexpr Quantiser kQuantisers[] = {
    {"Q4_0", plain<Symmetric<8, 18>>, weighted<Weighted32<8, false, 18>>, {0, -1}},
    {"Q4_1", plain<WithMinimum<15, 20>>, weighted<Weighted32<15, true, 20>>, {0, 2}},
    {"Q5_0", plain<Symmetric<16, 22>>, weighted<Weighted32<16, false, 22>>, {0, -1}},
    {"Q5_1", plain<WithMinimum<31, 24>>, weighted<Weighted32<31, true, 24>>, {0, 2}},
    {"Q8_0", plain<Q8>, nullptr, {0, -1}},
    {"Q4_K", plain_super<AffineSuper<15>>, weighted<AffineSuper<15>>, {0, 2}},
    {"Q5_K", plain_super<AffineSuper<31>>, weighted<AffineSuper<31>>, {0, 2}},
    {"Q6_K", plain_super<SymmetricSuper>, weighted<SymmetricSuper>, {208, -1}},
};

const Quantiser* find_quantiser(const GgufType& type) {
  for (const Quantiser& quantiser : kQuantisers)
    if (quantiser.type == type.name) return &quantiser;
  return nullptr;
}

constexpr std::int64_t kNowhere = std::numeric_limits<std::int64_t>::max();
void lower(std::atomic<std::int64_t>& first, std::int64_t candidate) {
  std::int64_t known = first;
  while (candidate < known && !first.compare_exchange_weak(known, candidate)) {
  }
}

std::int64_t first_not_finite(const float* values, std::int64_t count) {
  std::uint32_t any = 0;
  for (std::int64_t i = 0; i < count; ++i) any |= static_cast<std::uint32_t>((std::bit_cast<std::uint32_t>(values[i]) & 0x7f800000u) == 0x7f800000u);
  if (any == 0) return kNowhere;
  std::int64_t at = 0;
  while (std::isfinite(values[at])) ++at;
  return at;
}

bool is_infinite_half(const Byte* at) {
  std::uint16_t half = 0;
  std::memcpy(&half, at, 2);
  return (half & 0x7c00u) == 0x7c00u;
}

std::uint16_t bfloat_bits(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

}  // namespace

bool can_quantise(const GgufType& type) { return type.dequantise == nullptr || find_quantiser(type) != nullptr; }

std::int64_t gguf_bytes(const GgufType& type, std::int64_t num_values) { return num_values / type.block_size * type.block_bytes; }

void quantise(const GgufType& type, const at::Tensor& values_RI, const at::Tensor& importance_I, const std::string& what, std::byte* out) {
  const std::int64_t row = values_RI.size(-1), num_rows = row == 0 ? 0 : values_RI.numel() / row;
  if (row % type.block_size != 0)
    fail(ErrorKind::kData, what, ": rows of ", row, " values are not a multiple of the ", type.block_size, " in a block of ", type.name);
  const Quantiser* const quantiser = find_quantiser(type);
  if (quantiser == nullptr && type.dequantise != nullptr) fail(ErrorKind::kBug, "no quantiser for ", type.name);
  const bool weighs = importance_I.defined() && quantiser != nullptr && quantiser->weighted != nullptr;
  if (importance_I.defined() && importance_I.numel() != row)
    fail(ErrorKind::kData, what, ": the importance matrix has ", importance_I.numel(), " columns for it, the tensor has ", row);
  const at::Tensor importance = weighs ? importance_I.to(at::kFloat).contiguous() : at::Tensor();
  const float* const importances = weighs ? importance.const_data_ptr<float>() : nullptr;
  if (weighs)
    if (const std::int64_t bad = first_not_finite(importances, row); bad != kNowhere) fail(ErrorKind::kData, what, ": the importance of column ", bad, " is not finite");

  const at::Tensor given = values_RI.contiguous();
  const std::int64_t row_bytes = gguf_bytes(type, row);
  std::atomic<std::int64_t> bad = kNowhere, too_large = kNowhere;
  const std::int64_t rows_per_task = std::max<std::int64_t>(1, kValuesPerTask / std::max<std::int64_t>(1, row));
  const at::Tensor rows_RI = given.reshape({num_rows, row});
  at::parallel_for(0, num_rows, rows_per_task, [&](std::int64_t begin, std::int64_t end) {
    for (; begin < end; begin += rows_per_task) {
      const std::int64_t count = std::min(rows_per_task, end - begin);
      const at::Tensor part = rows_RI.narrow(0, begin, count).to(at::kFloat);
      const float* const x = part.const_data_ptr<float>();
      if (const std::int64_t at = first_not_finite(x, count * row); at != kNowhere) {
        lower(bad, begin * row + at);
        return;
      }
      Byte* const to = reinterpret_cast<Byte*>(out) + begin * row_bytes;
      if (type.name == "F32") {
        std::memcpy(to, x, static_cast<std::size_t>(count * row_bytes));
      } else if (quantiser == nullptr) {
        for (std::int64_t i = 0; i < count * row; ++i) {
          const std::uint16_t bits = type.name == "F16" ? half_bits(x[i]) : bfloat_bits(x[i]);
          if ((bits & 0x7fffu) == (type.name == "F16" ? 0x7c00u : 0x7f80u)) lower(too_large, begin * row + i);
          std::memcpy(to + 2 * i, &bits, 2);
        }
      } else {
        const std::int64_t row_blocks = row / type.block_size;
        if (weighs)
          for (std::int64_t r = 0; r < count; ++r) quantiser->weighted(x + r * row, row_blocks, importances, to + r * row_bytes);
        else quantiser->plain(x, count * row_blocks, to);
        for (std::int64_t block = 0; block < count * row_blocks; ++block)
          for (const int offset : quantiser->scales_at)
            if (offset >= 0 && is_infinite_half(to + block * type.block_bytes + offset)) lower(too_large, begin * row + block * type.block_size);
      }
    }
  });
  if (bad != kNowhere)
    fail(ErrorKind::kData, what, ": the value in row ", bad / row, ", column ", bad % row, " is not finite", Remedy{"these weights are damaged: fetch or train them again"});
  if (too_large != kNowhere)
    fail(ErrorKind::kData, what, ": values from row ", too_large / row, ", column ", too_large % row, " on are too large for ", type.name, ", whose scales end at 65504",
         Remedy{"write this model as f32 or bf16"});
}

}  // namespace alambic::checkpoints
