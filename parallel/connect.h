// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>

#include "parallel/communicator.h"
#include "parallel/launch_environment.h"

namespace alambic::parallel {

struct Patience {
  double timeout_seconds = 600;          // a rank that stays away from a call for longer is lost
  double connect_timeout_seconds = 300;  // for all ranks to meet
};

/// The ranks that the launcher started: single() for a size of 1, else over Gloo, and over NCCL for tensors on GPUs. Error(kPeer), naming the
/// variables, when they do not come together in time.
std::unique_ptr<Communicator> connect(const LaunchEnvironment& environment, const Patience& patience);

/// Whether transfers were left under way because a rank was lost: their threads still run, so the process must end without running destructors.
bool left_in_flight();

}  // namespace alambic::parallel
