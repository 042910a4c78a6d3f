// SPDX-License-Identifier: Apache-2.0
#pragma once
// Tells the ranks of each other's end. A connection from every rank to rank 0, beside those that carry tensors: a process that dies, however
// it dies, closes it, so that all learn it at once, whatever they are doing. Each rank says which call it is in; so when one waits too
// long, rank 0 can say for whom.
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace alambic::parallel {

/// The call a rank is in: its number (the same on all ranks that agree), the step of the run, and what it is for.
struct Place {
  std::uint64_t number = 0;
  std::int64_t step = 0;
  std::string what = "start";
};

class Watch {
 public:
  /// Rank 0: listens on `host` (all addresses, where that is none of this machine's own) and waits for the others on a thread.
  static std::unique_ptr<Watch> hub(int size, const std::string& host);
  /// Any other rank: connects to rank 0 at host:port. Error(kPeer).
  static std::unique_ptr<Watch> member(int rank, const std::string& host, std::uint16_t port, const std::string& token, double timeout_seconds);
  /// Says goodbye, so that the end of this process alarms nobody; after fail() or a loss it is silent.
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  std::uint16_t port() const;         // of the hub
  const std::string& token() const;   // that members must say to the hub

  void enter(const Place& place);     // this rank begins this call
  /// Who is lost and how, once that is known: "rank 2 died in step 7, gradients".
  std::optional<std::string> loss() const;
  /// The same, waiting for it up to so many seconds.
  std::optional<std::string> loss_within(double seconds) const;
  /// This rank has waited for too long: asks rank 0 who is behind; the answer arrives as loss().
  void late(double waited_seconds);
  /// This rank ends with an error of its own. Waits a moment, so that the others get it.
  void fail(std::string_view message) noexcept;
  /// The main thread has seen the loss and is ending by itself; it gets some seconds more before set_last_word() ends the process.
  void acknowledge();

 private:
  struct State;
  explicit Watch(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace alambic::parallel
