// SPDX-License-Identifier: Apache-2.0
#include "lora/int8.h"

#include <ATen/ops/empty.h>

#include <cmath>

#include "lora/frozen_layout.h"
#include "lora/nf4_math.h"

namespace alambic::lora {
namespace {

constexpr float kOneOver127 = 7.874015718698502e-3f;  // bitsandbytes' factor; the float below 1 / 127

template <class Value>
void quantize_rows(const Value* weight, std::int64_t outputs, std::int64_t inputs, std::int8_t* codes, float* scale) {
  at::parallel_for(0, outputs, 16, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
      const Value* const from = weight + row * inputs;
      std::int8_t* const to = codes + row * inputs;
      float largest = 0;
      for (std::int64_t i = 0; i < inputs; ++i) largest = std::max(largest, std::abs(static_cast<float>(from[i])));
      scale[row] = largest;
      if (largest == 0) {
        std::fill(to, to + inputs, std::int8_t{0});
        continue;
      }
      // Two roundings, as torch divides a number by a tensor. A factor beyond f32 (rows below 4e-37) would make infinities;
      // such rows are cut to the range.
      const float factor = (1.0f / largest) * 127.0f;
      for (std::int64_t i = 0; i < inputs; ++i) {
        const float value = std::nearbyint(static_cast<float>(from[i]) * factor);
        to[i] = static_cast<std::int8_t>(std::isnan(value) ? 0.0f : std::clamp(value, -127.0f, 127.0f));
      }
    }
  });
}

ALAMBIC_VECTOR_CLONES void dequantize(const std::int8_t* codes, float scale, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(codes[i]) * scale * kOneOver127;
}

ALAMBIC_VECTOR_CLONES void dequantize(const std::int8_t* codes, float scale, std::int64_t count, std::uint16_t* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = bf16_bits(static_cast<float>(codes[i]) * scale * kOneOver127);
}

}  // namespace

Int8Parts quantize_int8(const at::Tensor& weight_OI) {
  if (!weight_OI.is_contiguous() || weight_OI.dim() != 2) fail(ErrorKind::kBug, "a weight to be quantised is no contiguous matrix");
  const std::int64_t outputs = weight_OI.size(0), inputs = weight_OI.size(1);
  Int8Parts parts{.codes_OI = at::empty({outputs, inputs}, at::kChar), .scale_O = at::empty({outputs}, at::kFloat)};
  const auto run = [&]<class Value>(const Value* from) {
    quantize_rows(from, outputs, inputs, parts.codes_OI.mutable_data_ptr<std::int8_t>(), parts.scale_O.mutable_data_ptr<float>());
  };
  switch (weight_OI.scalar_type()) {
    case at::kFloat: run(weight_OI.const_data_ptr<float>()); break;
    case at::kBFloat16: run(weight_OI.const_data_ptr<at::BFloat16>()); break;
    case at::kHalf: run(weight_OI.const_data_ptr<at::Half>()); break;
    default: fail(ErrorKind::kBug, "a weight of type ", toString(weight_OI.scalar_type()), " cannot be quantised");
  }
  return parts;
}

Int8Weight::Int8Weight(Int8Parts parts) : parts_(std::move(parts)) {
  const at::Tensor &codes = parts_.codes_OI, &scale = parts_.scale_O;
  if (codes.scalar_type() != at::kChar || codes.dim() != 2 || !codes.is_contiguous() || scale.scalar_type() != at::kFloat || scale.numel() != codes.size(0) || !scale.is_contiguous())
    fail(ErrorKind::kBug, "the parts of an int8 weight do not fit each other");
}

void dequantize_int8_by_operators(const Int8Parts& parts, const at::Tensor& out_OI) {
  const at::NoGradGuard constant;
  // Two products, each rounded to f32, as in the loops.
  out_OI.copy_(parts.codes_OI.to(at::kFloat).mul_(parts.scale_O.unsqueeze(1)).mul_(kOneOver127));
}

void Int8Weight::dense_into(const at::Tensor& out_OI) const {
  check_dense(*this, out_OI);
  if (out_OI.device() != device()) fail(ErrorKind::kBug, "an int8 weight on ", device().str(), " cannot be made dense on ", out_OI.device().str());
  if (!out_OI.is_cpu()) return dequantize_int8_by_operators(parts_, out_OI);
  const std::int8_t* const codes = parts_.codes_OI.const_data_ptr<std::int8_t>();
  const float* const scale = parts_.scale_O.const_data_ptr<float>();
  const std::int64_t columns = inputs();
  for_each_piece(out_OI, [&]<class Out>(std::int64_t begin, std::int64_t end, Out* out) {
    while (begin < end) {
      const std::int64_t row = begin / columns, stop = std::min(end, (row + 1) * columns);
      dequantize(codes + begin, scale[row], stop - begin, out);
      out += stop - begin;
      begin = stop;
    }
  });
}

}  // namespace alambic::lora
