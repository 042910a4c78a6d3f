// SPDX-License-Identifier: Apache-2.0
// In place of nf4_cuda.cu in a build without CUDA.
#include "core/error.h"
#include "lora/nf4_cuda.h"

namespace alambic::lora {
namespace {

[[noreturn]] void refuse() {
  fail(ErrorKind::kResource, "an NF4 weight is to be made dense on a GPU, but this build has no CUDA", Remedy{"build with -DALAMBIC_CUDA=ON (cmake --preset cuda)"});
}

}  // namespace

void dequantize_nf4_on_cuda(const Nf4View&, const DenseLayout&, float*) { refuse(); }
void dequantize_nf4_on_cuda(const Nf4View&, const DenseLayout&, std::uint16_t*) { refuse(); }

}  // namespace alambic::lora
