// SPDX-License-Identifier: Apache-2.0
// c10d's ProcessGroupNCCL, which is inside libtorch_cuda.so.
#define USE_C10D_NCCL
#include "parallel/nccl.h"

#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>
#include <nccl.h>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

#include <chrono>
#include <cstdlib>
#include <sstream>
#include <thread>
#include <utility>

#include "core/error.h"
#include "parallel/group_transport.h"

namespace alambic::parallel {
namespace {

constexpr std::chrono::milliseconds kNever = std::chrono::hours(24 * 365);  // parallel/ranks.cpp gives transfers up
constexpr std::chrono::microseconds kGlance = std::chrono::microseconds(50);

class NcclTransfer : public Transfer {
 public:
  NcclTransfer(c10::intrusive_ptr<c10d::Work> work, std::vector<at::Tensor> tensors) : work_(std::move(work)), tensors_(std::move(tensors)) {}
  // Work::wait() only makes the current stream wait, without end; so the event is looked at until it is there.
  bool wait(int timeout) override {
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout);
    while (!work_->isCompleted()) {
      if (std::chrono::steady_clock::now() >= end) return false;
      std::this_thread::sleep_for(kGlance);
    }
    if (const std::exception_ptr problem = work_->exception()) std::rethrow_exception(problem);
    work_->wait();
    return true;
  }

 private:
  c10::intrusive_ptr<c10d::Work> work_;
  std::vector<at::Tensor> tensors_;
};

c10::intrusive_ptr<c10d::Backend> nccl_group(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size) {
  // c10d's own watchers end the process in their own way and time; who is lost, and the exit code, are said by parallel/watch.h. Errors still
  // arrive in isCompleted().
  for (const auto& [name, value] : {std::pair{"TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"}, {"TORCH_NCCL_ENABLE_MONITORING", "0"}, {"TORCH_NCCL_DUMP_ON_TIMEOUT", "0"}}) ::setenv(name, value, /*overwrite=*/1);
  const auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = kNever;
  return c10::make_intrusive<c10d::ProcessGroupNCCL>(store, rank, size, options);
}

class Nccl : public GroupTransport {
 public:
  explicit Nccl(c10::intrusive_ptr<c10d::Backend> group) : GroupTransport(std::move(group)) {}

 private:
  std::unique_ptr<Transfer> started(c10::intrusive_ptr<c10d::Work> work, std::vector<at::Tensor> tensors) override {
    return std::make_unique<NcclTransfer>(std::move(work), std::move(tensors));
  }
};

std::string dotted(int version) { return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." + std::to_string(version % 100); }

}  // namespace

NcclVersion nccl_version() {
  int version = 0;
  return {.running = ncclGetVersion(&version) == ncclSuccess ? dotted(version) : "unknown", .built = dotted(NCCL_VERSION_CODE)};
}

Gpus gpus() {
  Gpus found;
  int count = 0;
  if (const cudaError_t code = cudaGetDeviceCount(&count); code != cudaSuccess) found.why_none = cudaGetErrorString(code), count = 0;
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties{};
    std::ostringstream text;
    text.precision(1);
    if (const cudaError_t code = cudaGetDeviceProperties(&properties, device); code != cudaSuccess) text << "GPU " << device << ": " << cudaGetErrorString(code);
    else text << properties.name << ", sm_" << properties.major << properties.minor << ", " << std::fixed << static_cast<double>(properties.totalGlobalMem) / 1e9 << " GB";
    found.seen.push_back(text.str());
    found.memory.push_back(properties.totalGlobalMem);
  }
  if (count == 0 && found.why_none.empty()) found.why_none = "CUDA sees no device";
  return found;
}

std::unique_ptr<Transport> nccl_transport(c10d::Store& store, int rank, int size) {
  if (const Gpus found = gpus(); found.seen.empty())
    fail(ErrorKind::kResource, "tensors on GPUs are to be sent to other ranks, but there is no GPU: ", found.why_none, Remedy{"nvidia-smi lists what the driver sees"});
  return std::make_unique<Nccl>(nccl_group(c10::intrusive_ptr<c10d::Store>::reclaim_copy(&store), rank, size));
}

}  // namespace alambic::parallel
