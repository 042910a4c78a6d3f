// SPDX-License-Identifier: Apache-2.0
#include "lora/nf4.h"

#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "core/error.h"
#include "lora/frozen_layout.h"
#include "lora/nf4_cuda.h"

namespace alambic::lora {
namespace {

// torch.clamp(min=1e-38) of bitsandbytes: keeps 1 / absmax finite. Below the smallest normal number, on purpose.
constexpr float kSmallestScale = 1e-38f;

std::int64_t blocks_of(std::int64_t count, std::int64_t block) { return (count + block - 1) / block; }

// Midpoints between neighbouring codes' values; a value equal to one takes the lower code.
std::array<float, 15> midpoints() {
  std::array<float, 15> middle{};
  for (unsigned code = 0; code < 15; ++code) middle[code] = (nf4_value(code) + nf4_value(code + 1)) / 2;
  return middle;
}

// codes[i] = how many midpoints lie below the scaled value. 64 values by 15 comparisons, without a branch.
ALAMBIC_VECTOR_CLONES void count_midpoints(const float* scaled, const float* middle, std::int32_t* codes) {
  for (std::int64_t i = 0; i < kNf4Block; ++i) codes[i] = 0;
  for (int k = 0; k < 15; ++k)
    for (std::int64_t i = 0; i < kNf4Block; ++i) codes[i] += scaled[i] > middle[k] ? 1 : 0;
}

template <class Value>
void quantize_blocks(const Value* weight, std::int64_t count, std::uint8_t* packed, float* absmax) {
  const std::array<float, 15> middle = midpoints();
  at::parallel_for(0, blocks_of(count, kNf4Block), 256, [&](std::int64_t first, std::int64_t last) {
    alignas(64) std::array<float, kNf4Block> values{};
    alignas(64) std::array<std::int32_t, kNf4Block> codes{};
    for (std::int64_t block = first; block < last; ++block) {
      const std::int64_t begin = block * kNf4Block, size = std::min(kNf4Block, count - begin);
      float largest = 0;
      for (std::int64_t i = 0; i < size; ++i) {
        values[static_cast<std::size_t>(i)] = static_cast<float>(weight[begin + i]);
        largest = std::max(largest, std::abs(values[static_cast<std::size_t>(i)]));
      }
      const float divisor = std::max(largest, kSmallestScale);
      if (size == kNf4Block) {
        absmax[block] = largest;
        const float factor = 1.0f / divisor;
        for (float& value : values) value = std::clamp(value * factor, -1.0f, 1.0f);
      } else {  // bitsandbytes divides here, and keeps the clamped maximum
        absmax[block] = divisor;
        for (std::int64_t i = 0; i < size; ++i) values[static_cast<std::size_t>(i)] = std::clamp(values[static_cast<std::size_t>(i)] / divisor, -1.0f, 1.0f);
        std::fill(values.begin() + size, values.end(), 0.0f);  // an odd last half byte holds the code of 0
      }
      count_midpoints(values.data(), middle.data(), codes.data());
      for (std::int64_t i = 0; i < size; i += 2)
        packed[(begin + i) / 2] = static_cast<std::uint8_t>(codes[static_cast<std::size_t>(i)] << 4 | codes[static_cast<std::size_t>(i + 1)]);
    }
  });
}

// bitsandbytes looks the nearest value of the map up by the scaled value's place among 65,536 steps over [-1, 1].
constexpr int kSteps = 65536;
const std::vector<std::uint8_t>& code_of_step() {
  static const std::vector<std::uint8_t> kCodes = [] {
    const float* const map = dynamic_map().const_data_ptr<float>();
    std::vector<std::uint8_t> codes(kSteps);
    int code = 0;
    for (int step = 0; step < kSteps; ++step) {
      const float value = -1.0f + (2.0f * static_cast<float>(step)) / static_cast<float>(kSteps - 1);
      while (code < 255 && 0.5f * (map[code] + map[code + 1]) < value) ++code;
      codes[static_cast<std::size_t>(step)] = static_cast<std::uint8_t>(code);
    }
    return codes;
  }();
  return kCodes;
}

void quantize_scales(const at::Tensor& scales, std::uint8_t* codes, float* absmax) {
  const float* const from = scales.const_data_ptr<float>();
  const std::vector<std::uint8_t>& code_of = code_of_step();
  for (std::int64_t begin = 0; begin < scales.numel(); begin += kNf4NestedBlock) {
    const std::int64_t end = std::min(scales.numel(), begin + kNf4NestedBlock);
    float largest = 0;
    for (std::int64_t i = begin; i < end; ++i) largest = std::max(largest, std::abs(from[i]));
    absmax[begin / kNf4NestedBlock] = largest;
    if (largest == 0) {
      std::fill(codes + begin, codes + end, std::uint8_t{0});
      continue;
    }
    const float factor = 1.0f / largest;
    for (std::int64_t i = begin; i < end; ++i) {
      const float value = std::clamp(from[i] * factor, -1.0f, 1.0f);
      codes[i] = code_of[static_cast<std::size_t>((value + 1.0f) * 0.5f * static_cast<float>(kSteps - 1) + 0.5f)];
    }
  }
}

// One thread for what happens while this lives.
class OneThread {
 public:
  OneThread() : before_(at::get_num_threads()) {
    if (before_ != 1) at::set_num_threads(1);
  }
  ~OneThread() {
    if (before_ != 1) at::set_num_threads(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_;
};

}  // namespace

const at::Tensor& dynamic_map() {
  static const at::Tensor kMap = [] {
    constexpr int kExponents = 7;
    std::vector<at::Tensor> parts{at::tensor({0.0f, 1.0f})};
    for (int i = 0; i < kExponents; ++i) {
      const std::int64_t fractions = (std::int64_t{1} << i) + 1;
      const at::Tensor bounds = at::linspace(0.1, 1, fractions, at::kFloat);
      const at::Tensor means = (bounds.narrow(0, 0, fractions - 1) + bounds.narrow(0, 1, fractions - 1)) / 2.0;
      const at::Tensor values = means * std::pow(10.0, i - (kExponents - 1));
      parts.push_back(values);
      parts.push_back(-values);
    }
    return std::get<0>(at::cat(parts).sort());
  }();
  return kMap;
}

Nf4Parts quantize_nf4(const at::Tensor& weight, bool double_quant) {
  if (!weight.is_contiguous()) fail(ErrorKind::kBug, "a weight to be quantised is not contiguous");
  const std::int64_t count = weight.numel(), blocks = blocks_of(count, kNf4Block);
  Nf4Parts parts;
  parts.packed = at::empty({(count + 1) / 2}, at::kByte);
  const at::Tensor scales = at::empty({blocks}, at::kFloat);
  const auto run = [&]<class Value>(const Value* from) {
    quantize_blocks(from, count, parts.packed.mutable_data_ptr<std::uint8_t>(), scales.mutable_data_ptr<float>());
  };
  switch (weight.scalar_type()) {
    case at::kFloat: run(weight.const_data_ptr<float>()); break;
    case at::kBFloat16: run(weight.const_data_ptr<at::BFloat16>()); break;
    case at::kHalf: run(weight.const_data_ptr<at::Half>()); break;
    default: fail(ErrorKind::kBug, "a weight of type ", toString(weight.scalar_type()), " cannot be quantised");
  }
  parts.absmax = scales;
  return double_quant ? with_nested_scales(std::move(parts), nf4_offset(scales)) : parts;
}

float nf4_offset(const at::Tensor& scales) {
  const OneThread one;
  return scales.mean().item<float>();
}

Nf4Parts with_nested_scales(Nf4Parts parts, float offset) {
  const at::Tensor scales = parts.absmax;
  parts.offset = offset;
  parts.absmax = at::empty({scales.numel()}, at::kByte);
  parts.nested_absmax = at::empty({blocks_of(scales.numel(), kNf4NestedBlock)}, at::kFloat);
  parts.nested_map = dynamic_map();
  quantize_scales(scales - offset, parts.absmax.mutable_data_ptr<std::uint8_t>(), parts.nested_absmax.mutable_data_ptr<float>());
  return parts;
}

Nf4Weight::Nf4Weight(std::int64_t outputs, std::int64_t inputs, Nf4Parts parts) : outputs_(outputs), inputs_(inputs), parts_(std::move(parts)) {
  const std::int64_t count = outputs * inputs, blocks = blocks_of(count, kNf4Block);
  const auto is = [](const at::Tensor& tensor, at::ScalarType type, std::int64_t size) {
    return tensor.defined() && tensor.scalar_type() == type && tensor.numel() == size && tensor.is_contiguous();
  };
  const bool nested = parts_.nested_absmax.defined();
  const bool fits = is(parts_.packed, at::kByte, (count + 1) / 2) && is(parts_.absmax, nested ? at::kByte : at::kFloat, blocks) &&
                    (!nested || (is(parts_.nested_absmax, at::kFloat, blocks_of(blocks, kNf4NestedBlock)) && is(parts_.nested_map, at::kFloat, 256)));
  if (!fits) fail(ErrorKind::kBug, "the parts of an NF4 weight do not fit [", outputs, ", ", inputs, "]");
}

std::uint64_t Nf4Weight::num_bytes() const {
  std::uint64_t bytes = parts_.packed.nbytes() + parts_.absmax.nbytes();
  if (parts_.nested_absmax.defined()) bytes += parts_.nested_absmax.nbytes();  // the map is one for all weights
  return bytes;
}

std::shared_ptr<const models::FrozenWeight> Nf4Weight::on(at::Device to) const {
  Nf4Parts moved{.packed = parts_.packed.to(to), .absmax = parts_.absmax.to(to), .nested_absmax = {}, .nested_map = {}, .offset = parts_.offset};
  if (parts_.nested_absmax.defined()) moved.nested_absmax = parts_.nested_absmax.to(to), moved.nested_map = parts_.nested_map.to(to);
  return std::make_shared<Nf4Weight>(outputs_, inputs_, std::move(moved));
}

Nf4View Nf4Weight::view() const {
  const bool nested = parts_.nested_absmax.defined();
  return {.packed = parts_.packed.const_data_ptr<std::uint8_t>(),
          .codes = nested ? parts_.absmax.const_data_ptr<std::uint8_t>() : nullptr,
          .scales = (nested ? parts_.nested_absmax : parts_.absmax).const_data_ptr<float>(),
          .map = nested ? parts_.nested_map.const_data_ptr<float>() : nullptr,
          .offset = parts_.offset};
}

void Nf4Weight::dense_into(const at::Tensor& out_OI) const {
  check_dense(*this, out_OI);
  if (out_OI.device() != parts_.packed.device())
    fail(ErrorKind::kBug, "an NF4 weight on ", parts_.packed.device().str(), " cannot be made dense on ", out_OI.device().str());
  const Nf4View weight = view();
  if (out_OI.is_cuda()) {
    const DenseLayout layout{.outputs = outputs_, .inputs = inputs_, .row_stride = outputs_ > 1 ? out_OI.stride(0) : inputs_, .device = out_OI.get_device()};
    if (out_OI.scalar_type() == at::kFloat) dequantize_nf4_on_cuda(weight, layout, out_OI.mutable_data_ptr<float>());
    else dequantize_nf4_on_cuda(weight, layout, reinterpret_cast<std::uint16_t*>(out_OI.mutable_data_ptr<at::BFloat16>()));
    return;
  }
  if (!out_OI.is_cpu()) fail(ErrorKind::kBug, "there is no kernel for NF4 on ", out_OI.device().str());
  static const Nf4Loop fastest = nf4_loops().back();
  const Nf4Loop loop = fastest;
  const bool nested = weight.codes != nullptr;
  for_each_piece(out_OI, [&]<class Out>(std::int64_t begin, std::int64_t end, Out* out) {
    constexpr std::int64_t kBlocks = 128;  // whose scales are made at once
    std::array<float, kBlocks> made{};
    while (begin < end) {
      const std::int64_t first = begin / kNf4Block, stop = std::min(end, (first + kBlocks) * kNf4Block), last = (stop - 1) / kNf4Block;
      const float* here = nested ? made.data() : weight.scales + first;
      for (std::int64_t block = first; nested && block <= last; ++block)
        made[static_cast<std::size_t>(block - first)] = nf4_nested_absmax(weight.map[weight.codes[block]], weight.scales[block / kNf4NestedBlock], weight.offset);
      dequantize_nf4(loop, weight.packed, here, begin, stop, out);
      out += stop - begin;
      begin = stop;
    }
  });
}

}  // namespace alambic::lora
