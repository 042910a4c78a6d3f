// SPDX-License-Identifier: Apache-2.0
// In place of nccl.cpp in a build without CUDA.
#include "core/error.h"
#include "parallel/nccl.h"

namespace alambic::parallel {

NcclVersion nccl_version() { return {}; }

Gpus gpus() { return {.seen = {}, .memory = {}, .why_none = "this build has no CUDA"}; }

std::unique_ptr<Transport> nccl_transport(c10d::Store&, int, int) {
  fail(ErrorKind::kResource, "tensors on GPUs are to be sent to other ranks, but this build has no NCCL", Remedy{"build with -DALAMBIC_CUDA=ON (cmake --preset cuda)"});
}

}  // namespace alambic::parallel
