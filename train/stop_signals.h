// SPDX-License-Identifier: Apache-2.0
#pragma once
// SIGTERM, SIGINT and SIGUSR1 (by which schedulers warn of the end of a job's time) as a wish to stop.

namespace alambic::train {

/// While one lives: the first SIGTERM, SIGINT or SIGUSR1 makes stop_requested() true; a second SIGINT ends the process at once
/// with exit code 130, leaving the last committed checkpoint. The destructor puts the old handlers back.
class StopSignals {
 public:
  StopSignals();
  ~StopSignals();
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;
  static bool stop_requested();
};

}  // namespace alambic::train
