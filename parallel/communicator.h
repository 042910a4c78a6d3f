// SPDX-License-Identifier: Apache-2.0
#pragma once
// The ranks of one run, and the few things they say to each other.
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.h"
#include "core/json.h"

namespace at {
class Tensor;
}

namespace alambic::parallel {

/// A gather or an exchange under way. Where it is given up without wait(), because this rank fails, its tensors stay until the process ends.
class Gather {
 public:
  virtual ~Gather() = default;
  /// All parts have come; Error(kPeer) as a call of the Communicator. Called again it does nothing.
  virtual void wait() = 0;
};

/// Every call but those marked "alone" is collective: all ranks make it, in the same order, with the same shapes and types. `what` names
/// it for messages. Error(kPeer) when another rank died, failed, stayed away for longer than the timeout or made another call: it names
/// that rank, the step and the call.
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;  // 0 .. size() - 1
  virtual int size() const = 0;

  /// Adds elementwise over ranks, in the order of tree_sum: the same result, bit for bit, on every rank and in every run. Contiguous
  /// tensors, f32 or f64.
  void sum_in_place(std::span<at::Tensor> tensors, std::string_view what) {
    start_sum(tensors, what);
    finish_sums(what);
  }
  /// Begins such a sum and returns; tensors are left alone until finish_sums(). Sums begin in the same order on all ranks. The next that begins
  /// carries the former on, so that what is computed between them hides the transfers. Other calls may come between.
  virtual void start_sum(std::span<at::Tensor> tensors, std::string_view what) = 0;
  /// Begins a sum of which each rank gets a part: parts[r], whose sizes are the same on all ranks, adds up to what rank r gets, and `own`, of the
  /// sizes of parts[rank()], become this rank's sums, with the bits of sum_in_place. parts are free when it returns. Otherwise as start_sum().
  virtual void start_reduce_scatter(std::span<const std::vector<at::Tensor>> parts, std::span<at::Tensor> own, std::string_view what) = 0;
  /// Alone: all sums that were begun are done.
  virtual void finish_sums(std::string_view what) = 0;
  /// [size, ...]: every rank's tensor.
  virtual at::Tensor all_gather(const at::Tensor& own, std::string_view what) = 0;
  /// The same into `all`: [size, ...], and returns at once. The start is the collective call that keeps its place among the others; ranks
  /// wait when they like. Both tensors are contiguous, of one type, and left alone until then.
  std::unique_ptr<Gather> start_all_gather(const at::Tensor& all, const at::Tensor& own, std::string_view what) { return start_gather(all, own, size(), what); }
  /// The same among every `group` ranks that follow each other, into [group, ...]; a divisor of size().
  virtual std::unique_ptr<Gather> start_gather(const at::Tensor& all, const at::Tensor& own, int group, std::string_view what) = 0;
  /// `send` goes to rank `to`, and `receive` gets what rank `from` sends here in the same call: which ranks those are, and how large the
  /// tensors are (none at all, too), each pair agrees on by itself. Otherwise as start_all_gather.
  virtual std::unique_ptr<Gather> start_exchange(const at::Tensor& receive, int from, const at::Tensor& send, int to, std::string_view what) = 0;
  /// All ranks get what rank `root` has; contiguous tensors of any type.
  virtual void broadcast_in_place(std::span<at::Tensor> tensors, int root, std::string_view what) = 0;
  virtual void barrier(std::string_view what) = 0;

  /// Alone: the step that the next calls belong to.
  virtual void at_step(std::int64_t step) = 0;
  /// Alone: Error(kPeer) when another rank is known to be lost. Returns at once.
  virtual void check() = 0;
  /// Alone: seconds that this rank has spent in calls so far, moving, adding and waiting for others.
  virtual double seconds_in_calls() const = 0;
  /// Alone: this rank ends with an error of its own; the others are told. The object is good for nothing else afterwards.
  virtual void tell_failure(std::string_view message) noexcept = 0;
};

/// One process alone: rank 0 of 1; every call returns at once.
std::unique_ptr<Communicator> single();

/// Sum of parts[0 .. size) of at least one, elementwise: sum(i, s) = sum(i, 2 s) + sum(i + s, 2 s), where sum(i, s) is of the parts i, i + s,
/// i + 2 s, ... The parts i, i + n, ... of a power of two n are thus a subtree, and any n ranks that share them so come to the same bits.
at::Tensor tree_sum(std::span<const at::Tensor> parts);
/// The same walk over anything: leaf(i) makes part i, join(a, b) adds. Parts are made in the order of the walk, so that log2(size)
/// of them are held at once. `size` is above 0.
template <class Value, class Leaf, class Join>
Value tree_walk(std::int64_t first, std::int64_t stride, std::int64_t size, const Leaf& leaf, const Join& join) {
  if (first + stride >= size) return leaf(first);
  Value even = tree_walk<Value>(first, 2 * stride, size, leaf, join);
  return join(std::move(even), tree_walk<Value>(first + stride, 2 * stride, size, leaf, join));
}

std::vector<std::string> gather_text(Communicator& ranks, const std::string& own, std::string_view what);
std::string broadcast_text(Communicator& ranks, const std::string& text, int root, std::string_view what);
/// Whether any rank says so.
bool any(Communicator& ranks, bool own, std::string_view what);
/// {"what": value or object, ...} must be equal on all ranks: Error(kPeer) on every one of them that names the ranks and each difference.
void require_agreement(Communicator& ranks, const Json& facts, std::string_view what);

/// Says the error that ends this process, when another rank is lost while this one computes for so long that it does not see it, and ends
/// the process; set once by `main`. Returns the former. Without one, only calls of a Communicator see losses.
using LastWord = std::function<void(const Error&)>;
LastWord set_last_word(LastWord last_word);

}  // namespace alambic::parallel
