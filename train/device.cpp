// SPDX-License-Identifier: Apache-2.0
#include "train/device.h"

#include <ATen/Context.h>

#include <cstdlib>

#include "core/error.h"

namespace alambic::train {

bool is_on_gpu(const TrainConfig& config, const parallel::Gpus& gpus) { return config.device == "cuda" || (config.device == "auto" && !gpus.seen.empty()); }

TrainConfig with_device(const TrainConfig& given, const parallel::Gpus& gpus) {
  TrainConfig config = given;
  config.device = is_on_gpu(given, gpus) ? "cuda" : "cpu";
  if (config.device == "cpu") return config;
  if (gpus.seen.empty())
    fail(ErrorKind::kResource, "device: cuda: there is no GPU: ", gpus.why_none, Remedy{"set device: auto or cpu; alambic doctor says which GPUs there are, and cmake --preset cuda builds with CUDA"});
  if (config.optimizer.kind == "adamw8bit")
    fail(ErrorKind::kUsage, "optimizer.kind: adamw8bit computes on processors alone, but device: ", given.device, given.device == "auto" ? " has found a GPU" : " is asked for",
         Remedy{"use adamw, adafactor or muon, or set device: cpu"});
  return config;
}

TrainConfig on_processor(const TrainConfig& given, std::string_view what) {
  if (given.device == "cuda") fail(ErrorKind::kUsage, "device: cuda: ", what, " computes on processors alone", Remedy{"set device: auto or cpu"});
  TrainConfig config = given;
  config.device = "cpu";
  return config;
}

at::Device device_of(const TrainConfig& config, const parallel::LaunchEnvironment& environment, const parallel::Gpus& gpus) {
  if (config.device == "auto") fail(ErrorKind::kBug, "device: auto is not decided yet");
  if (config.device == "cpu") return at::kCPU;
  const auto there_are = static_cast<int>(gpus.seen.size()), needed = std::max(environment.local_size, environment.local_rank + 1);
  if (needed > there_are)
    fail(ErrorKind::kResource, "device: cuda: ", needed, " ranks on this machine, but ", there_are, there_are == 1 ? " GPU" : " GPUs", "; each rank uses one of its own",
         Remedy{"start as many ranks on a machine as it has GPUs, let each rank see all of them (CUDA_VISIBLE_DEVICES), or set device: cpu"});
  return at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(environment.local_rank));
}

OnDevice::OnDevice(at::Device device, bool deterministic) {
  if (!device.is_cuda()) return;
  guard_.reset_device(device);
  at::Context& context = at::globalContext();
  context.setAllowBF16ReductionCuBLAS(/*allow_reduced_precision=*/false);  // sums inside a bf16 product stay f32
  context.setSDPUseCuDNN(false);                                           // it compiles a kernel for each length of a document
  if (!deterministic) return;
  ::setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);  // without it cuBLAS promises no bits, and ATen refuses products
  context.setDeterministicAlgorithms(true, /*warn_only=*/false);
  context.setDeterministicFillUninitializedMemory(false);
}

void wait_for(const at::Tensor& any_tensor_on_it) {
  if (!any_tensor_on_it.is_cpu() && any_tensor_on_it.numel() > 0) static_cast<void>(any_tensor_on_it.detach().flatten()[0].cpu());
}

}  // namespace alambic::train
