// SPDX-License-Identifier: Apache-2.0
// The one file that includes Gloo's headers. Gloo itself is inside libtorch_cpu.so; the headers are those of Debian's libgloo-dev,
// which are older than that. So only pointers to its types pass through here, and nothing that would make the compiler write out
// a class of theirs (tests/parallel/vtables_test.py looks).
#define USE_C10D_GLOO
#include <c10/util/Exception.h>
#include <c10/util/Logging.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <chrono>
#include <cstdlib>
#include <utility>

#include "core/error.h"
#include "parallel/group_transport.h"
#include "parallel/nccl.h"

namespace alambic::parallel {
namespace {

using Milliseconds = std::chrono::milliseconds;
// Transfers are given up by parallel/ranks.cpp, which knows of pauses of this very process; Gloo's own clock never runs out before it.
constexpr Milliseconds kNever = std::chrono::hours(24 * 365);

constexpr std::size_t kLargeBytes = 1 << 16;  // from here memory counts more than the number of messages

Milliseconds milliseconds(double seconds) { return Milliseconds(static_cast<std::int64_t>(seconds * 1000)); }

class GlooTransfer : public Transfer {
 public:
  GlooTransfer(c10::intrusive_ptr<c10d::Work> work, std::vector<at::Tensor> tensors) : work_(std::move(work)), tensors_(std::move(tensors)) {}
  bool wait(int timeout) override {
    try {
      work_->wait(Milliseconds(timeout));
      return true;
    } catch (const std::exception&) {
      if (!work_->isCompleted()) return false;  // only the wait has ended
      work_->wait(Milliseconds(timeout));       // it may have come to its end since the wait gave up: says how, at once
      return true;
    }
  }

 private:
  c10::intrusive_ptr<c10d::Work> work_;
  std::vector<at::Tensor> tensors_;
};

class Several : public Transfer {
 public:
  explicit Several(std::vector<std::unique_ptr<Transfer>> transfers) : transfers_(std::move(transfers)) {}
  bool wait(int timeout) override {
    for (; ended_ < transfers_.size(); ++ended_)
      if (!transfers_[ended_]->wait(timeout)) return false;
    return true;
  }

 private:
  std::vector<std::unique_ptr<Transfer>> transfers_;
  std::size_t ended_ = 0;
};

/// Not inlined: a caller that saw the class of the object would call its functions directly, and so write out those that the header defines.
[[gnu::noinline]] c10::intrusive_ptr<c10d::Backend> gloo_group(const c10::intrusive_ptr<c10d::Store>& store, const LaunchEnvironment& environment, double timeout_seconds) {
  auto options = c10d::ProcessGroupGloo::Options::create(milliseconds(timeout_seconds));
  const bool here = environment.host == "127.0.0.1" || environment.host == "localhost" || environment.host == "::1";
  const char* const interface = std::getenv("GLOO_SOCKET_IFNAME");
  if (interface != nullptr && *interface != '\0') options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForInterface(interface));
  else if (here) options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(environment.host));
  else options->devices.push_back(c10d::ProcessGroupGloo::createDefaultDevice());
  return c10::make_intrusive<c10d::ProcessGroupGloo>(store, environment.rank, environment.size, options);
}

class Gloo : public GroupTransport {
 public:
  explicit Gloo(c10::intrusive_ptr<c10d::Backend> group) : GroupTransport(std::move(group)) { group_->setTimeout(kNever); }
  std::unique_ptr<Transfer> all_gather(at::Tensor out, at::Tensor in) override {
    if (in.nbytes() < kLargeBytes) return GroupTransport::all_gather(out, in);
    // Gloo would gather into a tensor of its own first, which takes the memory of all parts once more.
    std::vector<std::unique_ptr<Transfer>> parts;
    const at::Tensor all = out.view({group_->getSize(), -1});
    all[group_->getRank()].copy_(in.view(-1));
    for (int rank = 0; rank < group_->getSize(); ++rank) parts.push_back(broadcast(all[rank], rank));
    return std::make_unique<Several>(std::move(parts));
  }

 private:
  std::unique_ptr<Transfer> started(c10::intrusive_ptr<c10d::Work> work, std::vector<at::Tensor> tensors) override {
    return std::make_unique<GlooTransfer>(std::move(work), std::move(tensors));
  }
};

class TcpMeeting : public Meeting {
 public:
  TcpMeeting(const LaunchEnvironment& environment, double timeout_seconds) : environment_(environment), timeout_seconds_(timeout_seconds) {
    c10d::TCPStoreOptions options;
    options.port = environment.port;
    options.isServer = environment.rank == 0 && !environment.agent_has_store;
    options.waitWorkers = false;
    options.timeout = milliseconds(timeout_seconds);
    if (options.isServer && environment.store_socket >= 0) options.masterListenFd = environment.store_socket;
    store_ = c10::make_intrusive<c10d::PrefixStore>("alambic/" + environment.attempt, c10::make_intrusive<c10d::TCPStore>(environment.host, options));
    store_->setTimeout(options.timeout);
  }
  void set(const std::string& key, const std::string& value) override { static_cast<c10d::Store&>(*store_).set(key, value); }
  std::string get(const std::string& key) override { return store_->get_to_str(key); }
  bool has(const std::string& key) override { return store_->check({key}); }
  std::unique_ptr<Transport> gloo(int group) override {
    LaunchEnvironment own = environment_;
    own.rank %= group, own.size = group;
    return std::make_unique<Gloo>(gloo_group(store_of(group), own, timeout_seconds_));
  }
  std::unique_ptr<Transport> nccl(int group) override { return nccl_transport(*store_of(group), environment_.rank % group, group); }

 private:
  /// Keys of one group are no other's.
  c10::intrusive_ptr<c10d::Store> store_of(int group) const {
    if (group == environment_.size) return store_;
    return c10::make_intrusive<c10d::PrefixStore>("group/" + std::to_string(group) + "/" + std::to_string(environment_.rank / group), store_);
  }

  LaunchEnvironment environment_;
  double timeout_seconds_;
  c10::intrusive_ptr<c10d::PrefixStore> store_;
};

}  // namespace

std::unique_ptr<Meeting> meet(const LaunchEnvironment& environment, double timeout_seconds) {
  // c10d tells each attempt to reach a rank, with stack traces; what comes of it is in our own errors.
  if (std::getenv("TORCH_CPP_LOG_LEVEL") == nullptr) FLAGS_caffe2_log_level = c10::GLOG_FATAL;
  try {
    return std::make_unique<TcpMeeting>(environment, timeout_seconds);
  } catch (const c10::Error& error) {
    const std::string message = error.what_without_backtrace();
    const bool serves = environment.rank == 0 && !environment.agent_has_store;
    fail(ErrorKind::kPeer, "rank ", environment.rank, serves ? " cannot serve the meeting of the ranks at " : " cannot reach the meeting of the ranks at ", environment.host, ":", environment.port, " (",
         environment.variables, "): ", message.substr(0, message.find('\n')),
         Remedy{serves ? "choose another MASTER_PORT, and a MASTER_ADDR of this machine" : "check MASTER_ADDR and MASTER_PORT, and that rank 0 was started"});
  }
}

}  // namespace alambic::parallel
