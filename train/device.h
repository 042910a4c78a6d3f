// SPDX-License-Identifier: Apache-2.0
#pragma once
// Where a run computes: config.device, this build and the machine's GPUs.
#include <c10/core/DeviceGuard.h>

#include "models/decoder.h"
#include "parallel/launch_environment.h"
#include "parallel/nccl.h"
#include "train/train_config.h"

namespace alambic::train {

/// Whether this is, or device: auto comes to, a GPU.
bool is_on_gpu(const TrainConfig& config, const parallel::Gpus& gpus = parallel::gpus());

/// The config with device: auto decided, as cpu or cuda. Error(kResource): cuda where there is no GPU, saying why. Error(kUsage): what else
/// is asked for computes on processors alone.
TrainConfig with_device(const TrainConfig& config, const parallel::Gpus& gpus = parallel::gpus());

/// For what computes on processors alone: with device: cpu. Error(kUsage) where cuda is asked for. what: "distill".
TrainConfig on_processor(const TrainConfig& config, std::string_view what);

/// Of a config whose device is decided: the GPU of this rank's number on its machine. Error(kResource), with both numbers, where it has
/// fewer GPUs than ranks.
at::Device device_of(const TrainConfig& config, const parallel::LaunchEnvironment& environment, const parallel::Gpus& gpus = parallel::gpus());

/// While it lives `device` is the thread's current one, and a GPU computes as docs/numerics.md says. deterministic: ATen's deterministic
/// algorithms. Nothing happens for a processor.
class OnDevice {
 public:
  OnDevice(at::Device device, bool deterministic);

 private:
  c10::OptionalDeviceGuard guard_;
};

/// Waits until `device` has done what it was told.
void wait_for(const at::Tensor& any_tensor_on_it);

}  // namespace alambic::train
