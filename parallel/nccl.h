// SPDX-License-Identifier: Apache-2.0
#pragma once
// What this build and this machine have for ranks on GPUs: nccl.cpp in a build with CUDA, no_nccl.cpp in others.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "parallel/transport.h"

namespace c10d {
class Store;
}

namespace alambic::parallel {

struct NcclVersion {
  std::string running, built;  // "2.30.7"; "" in a build without CUDA
};
NcclVersion nccl_version();

struct Gpus {
  std::vector<std::string> seen;  // by CUDA: "NVIDIA H100 80GB HBM3, sm_90, 85.0 GB"
  std::vector<std::uint64_t> memory = {};  // of each, in bytes
  std::string why_none = {};      // where it sees none
};
Gpus gpus();

/// For tensors on GPUs, of which each rank uses its own. The ranks connect with the first transfer. Error(kResource) where there is no GPU, or
/// no NCCL in this build.
std::unique_ptr<Transport> nccl_transport(c10d::Store& store, int rank, int size);

}  // namespace alambic::parallel
