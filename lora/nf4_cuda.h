// SPDX-License-Identifier: Apache-2.0
#pragma once
// De-quantising NF4 on a GPU, for which ATen has nothing. The arithmetic is lora/nf4_math.h, element by element, the same as on
// a processor. nf4_cuda.cu with ALAMBIC_CUDA, nf4_no_cuda.cpp without.
#include <cstdint>

#include "lora/nf4_math.h"

namespace alambic::lora {

/// Where the dense weight goes: rows of `inputs` values, `row_stride` values apart, in the memory of GPU number `device`.
struct DenseLayout {
  std::int64_t outputs, inputs, row_stride;
  int device;
};

/// Puts the kernel into the device's current stream and returns at once. All pointers of `weight` are of that device, too. out:
/// f32, or the bits of bf16. Error(kResource): this build has no CUDA, or the launch failed.
void dequantize_nf4_on_cuda(const Nf4View& weight, const DenseLayout& layout, float* out);
void dequantize_nf4_on_cuda(const Nf4View& weight, const DenseLayout& layout, std::uint16_t* out);

}  // namespace alambic::lora
