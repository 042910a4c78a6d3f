// SPDX-License-Identifier: Apache-2.0
// Runs the NF4 kernel on the first GPU and compares it with the same arithmetic on the processor, bit for bit. Exit code 77
// without a GPU: ctest then reports it as skipped.
#include <cuda_runtime_api.h>

#include <array>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/random.h"
#include "lora/nf4_cuda.h"

namespace {

using namespace alambic;
using namespace alambic::lora;

void must(cudaError_t code, const char* what) {
  if (code != cudaSuccess) fail(ErrorKind::kResource, what, ": ", cudaGetErrorString(code));
}

template <class Value>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<Value>& from) : size_(from.size()) {
    must(cudaMalloc(reinterpret_cast<void**>(&data_), size_ * sizeof(Value)), "cudaMalloc");
    must(cudaMemcpy(data_, from.data(), size_ * sizeof(Value), cudaMemcpyHostToDevice), "copying to the GPU");
  }
  ~OnDevice() { cudaFree(data_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  Value* data() const { return data_; }
  std::vector<Value> back() const {
    std::vector<Value> to(size_);
    must(cudaMemcpy(to.data(), data_, size_ * sizeof(Value), cudaMemcpyDeviceToHost), "copying from the GPU");
    return to;
  }

 private:
  std::size_t size_;
  Value* data_ = nullptr;
};

float expected_as(float value, float) { return value; }
std::uint16_t expected_as(float value, std::uint16_t) { return bf16_bits(value); }

template <class Out>
void compare(std::int64_t outputs, std::int64_t inputs, std::int64_t row_stride, bool nested) {
  const std::int64_t count = outputs * inputs, blocks = (count + kNf4Block - 1) / kNf4Block, nested_blocks = (blocks + kNf4NestedBlock - 1) / kNf4NestedBlock;
  const auto draw = [](std::int64_t i) { return mix64(static_cast<std::uint64_t>(i)); };
  std::vector<std::uint8_t> packed, codes;
  std::vector<float> scales, map;
  for (std::int64_t i = 0; i < (count + 1) / 2; ++i) packed.push_back(static_cast<std::uint8_t>(draw(i)));
  for (std::int64_t i = 0; i < blocks; ++i) codes.push_back(static_cast<std::uint8_t>(draw(i) >> 8));
  for (std::int64_t i = 0; i < (nested ? nested_blocks : blocks); ++i) scales.push_back(static_cast<float>(draw(i) >> 40) / 8388608.0f);
  for (int i = 0; i < 256; ++i) map.push_back(static_cast<float>(i) / 128.0f - 1.0f);
  const Nf4View here{packed.data(), nested ? codes.data() : nullptr, scales.data(), map.data(), 0.75f};

  const OnDevice<std::uint8_t> device_packed(packed), device_codes(codes);
  const OnDevice<float> device_scales(scales), device_map(map);
  const Out untouched = static_cast<Out>(7);
  const OnDevice<Out> out(std::vector<Out>(static_cast<std::size_t>((outputs - 1) * row_stride + inputs + 5), untouched));
  dequantize_nf4_on_cuda(Nf4View{device_packed.data(), nested ? device_codes.data() : nullptr, device_scales.data(), device_map.data(), 0.75f},
                         {.outputs = outputs, .inputs = inputs, .row_stride = row_stride, .device = 0}, out.data());
  must(cudaDeviceSynchronize(), "the NF4 kernel");
  std::vector<Out> expected(out.back().size(), untouched);
  for (std::int64_t i = 0; i < count; ++i) expected[static_cast<std::size_t>(i / inputs * row_stride + i % inputs)] = expected_as(nf4_element(here, i), Out());
  const std::vector<Out> got = out.back();
  for (std::size_t i = 0; i < got.size(); ++i)
    if (std::memcmp(&got[i], &expected[i], sizeof(Out)) != 0)
      fail(ErrorKind::kBug, outputs, " x ", inputs, nested ? " nested" : "", sizeof(Out) == 2 ? " bf16" : " f32", ": element ", i, " differs from the processor's");
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("no GPU: skipped");
    return 77;
  }
  try {
    for (const auto& [outputs, inputs, row_stride] : {std::array<std::int64_t, 3>{64, 128, 128}, {33, 40, 40}, {7, 37, 37}, {1, 1, 1}, {130, 140, 150}, {4096, 11008, 11008}})
      for (const bool nested : {true, false}) {
        compare<float>(outputs, inputs, row_stride, nested);
        compare<std::uint16_t>(outputs, inputs, row_stride, nested);
      }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "nf4_cuda_check: %s\n", error.what());
    return 1;
  }
  std::puts("24 weights made dense on the GPU with the processor's bits");
  return 0;
}
