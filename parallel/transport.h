// SPDX-License-Identifier: Apache-2.0
#pragma once
// What moves tensors between ranks: Gloo for the processor's memory, NCCL for that of GPUs. Nothing here knows of timeouts or of who is
// lost; parallel/ranks.cpp adds that, and the order of sums.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "parallel/launch_environment.h"

namespace at {
class Tensor;
}

namespace alambic::parallel {

/// A transfer under way. It holds its tensors.
class Transfer {
 public:
  virtual ~Transfer() = default;
  /// Waits up to so many milliseconds; whether it has ended. Throws std::exception when it failed.
  virtual bool wait(int milliseconds) = 0;
};

class Transport {
 public:
  virtual ~Transport() = default;
  /// Contiguous tensors of equal type. in, out: [size, ...]; out[r] becomes what rank r has in its in[rank].
  virtual std::unique_ptr<Transfer> all_to_all(at::Tensor out, at::Tensor in) = 0;
  /// out: [size, ...]; out[r] becomes rank r's `in`.
  virtual std::unique_ptr<Transfer> all_gather(at::Tensor out, at::Tensor in) = 0;
  /// `in` goes to rank `to`, `out` gets what rank `from` sends here. Flat tensors, either of which may be empty.
  virtual std::unique_ptr<Transfer> exchange(at::Tensor out, int from, at::Tensor in, int to) = 0;
  virtual std::unique_ptr<Transfer> broadcast(at::Tensor tensor, int root) = 0;
};

/// The store in which ranks find each other: small texts by key.
class Meeting {
 public:
  virtual ~Meeting() = default;
  virtual void set(const std::string& key, const std::string& value) = 0;
  /// Waits for it; std::exception when it does not come within the meeting's timeout.
  virtual std::string get(const std::string& key) = 0;
  virtual bool has(const std::string& key) = 0;
  /// Between all ranks, or between every `group` ranks that follow each other: this rank's.
  virtual std::unique_ptr<Transport> gloo(int group) = 0;
  /// For tensors on GPUs; Error(kResource) where this build or this machine has none.
  virtual std::unique_ptr<Transport> nccl(int group) = 0;
};

/// Error(kPeer), naming host and port, when the store cannot be served or reached within the timeout.
std::unique_ptr<Meeting> meet(const LaunchEnvironment& environment, double timeout_seconds);

}  // namespace alambic::parallel
