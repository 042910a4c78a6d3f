// SPDX-License-Identifier: Apache-2.0
// Not yet run: no GPU was at hand. tests/gpu/nf4_cuda_check.cu compares it with a processor where there is one.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "core/error.h"
#include "lora/nf4_cuda.h"

namespace alambic::lora {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMostGroups = 1 << 16;  // more work than this is walked through in strides

__device__ void store(float value, float* to) { *to = value; }
__device__ void store(float value, std::uint16_t* to) { *to = bf16_bits(value); }

// Two elements a thread, those of one byte. Per element half a byte is read and two or four are written, so it is the writing
// that takes the time; neighbouring threads write neighbouring places.
template <class Out>
__global__ void dequantize(Nf4View weight, std::int64_t count, std::int64_t inputs, std::int64_t row_stride, Out* out) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t byte = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; 2 * byte < count; byte += step)
    for (std::int64_t i = 2 * byte; i < count && i < 2 * byte + 2; ++i) store(nf4_element(weight, i), out + i / inputs * row_stride + i % inputs);
}

template <class Out>
void launch(const Nf4View& weight, const DenseLayout& layout, Out* out) {
  const std::int64_t count = layout.outputs * layout.inputs;
  if (count == 0) return;
  const auto device = static_cast<c10::DeviceIndex>(layout.device);
  const c10::cuda::CUDAGuard guard(device);
  const std::int64_t groups = std::min(((count + 1) / 2 + kThreads - 1) / kThreads, kMostGroups);
  dequantize<<<static_cast<unsigned>(groups), kThreads, 0, c10::cuda::getCurrentCUDAStream(device).stream()>>>(weight, count, layout.inputs, layout.row_stride, out);
  if (const cudaError_t failed = cudaGetLastError(); failed != cudaSuccess)
    fail(ErrorKind::kResource, "GPU ", layout.device, ": the NF4 kernel could not be started: ", cudaGetErrorString(failed));
}

}  // namespace

void dequantize_nf4_on_cuda(const Nf4View& weight, const DenseLayout& layout, float* out) { launch(weight, layout, out); }
void dequantize_nf4_on_cuda(const Nf4View& weight, const DenseLayout& layout, std::uint16_t* out) { launch(weight, layout, out); }

}  // namespace alambic::lora
