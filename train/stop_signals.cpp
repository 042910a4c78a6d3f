// SPDX-License-Identifier: Apache-2.0
#include "train/stop_signals.h"

#include <signal.h>
#include <unistd.h>

#include <array>
#include <atomic>

namespace alambic::train {
namespace {

// A handler can reach nothing but static storage.
std::atomic<int> num_interrupts = 0, num_requests = 0;
static_assert(std::atomic<int>::is_always_lock_free);
std::array<struct sigaction, 3> former;
constexpr std::array<int, 3> kSignals = {SIGTERM, SIGINT, SIGUSR1};

void note(int signal) {
  num_requests.fetch_add(1);
  if (signal == SIGINT && num_interrupts.fetch_add(1) > 0) ::_exit(130);
}

}  // namespace

StopSignals::StopSignals() {
  num_interrupts = num_requests = 0;
  struct sigaction action {};
  action.sa_handler = note;
  action.sa_flags = SA_RESTART;  // a save that is under way is not to fail with EINTR
  sigemptyset(&action.sa_mask);
  for (std::size_t i = 0; i < kSignals.size(); ++i) ::sigaction(kSignals[i], &action, &former[i]);
}

StopSignals::~StopSignals() {
  for (std::size_t i = 0; i < kSignals.size(); ++i) ::sigaction(kSignals[i], &former[i], nullptr);
}

bool StopSignals::stop_requested() { return num_requests.load() > 0; }

}  // namespace alambic::train
