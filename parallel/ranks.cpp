// SPDX-License-Identifier: Apache-2.0
// Communicator over a transport and a watch: timeouts, who is lost, and the order of sums.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <map>
#include <stdexcept>
#include <thread>

#include "core/error.h"
#include "parallel/connect.h"
#include "parallel/transport.h"
#include "parallel/watch.h"

namespace alambic::parallel {
namespace {

constexpr std::int64_t kBucketBytes = 8 << 20;  // of a sum: small enough that two of them cost little memory, large enough that latency does not count
constexpr int kSliceMilliseconds = 100;         // between two looks at the watch
constexpr double kSecondsForTheWatch = 6;       // to explain a connection that broke

std::atomic<bool> in_flight = false;

/// Tensors of one type as one row of elements, taken away from its front.
class Row {
 public:
  Row(std::span<const at::Tensor> tensors, std::string_view what) {
    for (const at::Tensor& tensor : tensors) {
      if (!tensor.is_contiguous() || (tensor.scalar_type() != at::kFloat && tensor.scalar_type() != at::kDouble))
        fail(ErrorKind::kBug, what, ": a tensor to sum must be contiguous f32 or f64");
      if (tensor.device() != tensors.front().device() || tensor.scalar_type() != tensors.front().scalar_type())
        fail(ErrorKind::kBug, what, ": tensors of different types or on different devices in one sum");
      if (tensor.numel() > 0) left_.push_back(tensor.detach().view(-1)), numel_ += tensor.numel();
    }
  }
  std::int64_t numel() const { return numel_; }
  at::TensorOptions options() const { return left_.front().options(); }
  /// Views of the next elements, no more than `most`.
  std::vector<at::Tensor> take(std::int64_t most) {
    std::vector<at::Tensor> pieces;
    for (std::int64_t room = std::min(most, numel_); room > 0;) {
      at::Tensor& front = left_.front();
      const std::int64_t taken = std::min(room, front.numel());
      pieces.push_back(front.narrow(0, 0, taken));
      room -= taken, numel_ -= taken;
      if (taken == front.numel()) left_.pop_front();
      else front = front.narrow(0, taken, front.numel() - taken);
    }
    return pieces;
  }

 private:
  std::deque<at::Tensor> left_;
  std::int64_t numel_ = 0;
};

class Ranks : public Communicator {
 public:
  Ranks(const LaunchEnvironment& environment, double timeout_seconds, std::unique_ptr<Meeting> meeting, std::unique_ptr<Transport> transport, std::unique_ptr<Watch> watch)
      : rank_(environment.rank), size_(environment.size), timeout_seconds_(timeout_seconds), meeting_(std::move(meeting)), transport_(std::move(transport)), watch_(std::move(watch)) {}

  ~Ranks() override {
    if (!is_lost_) return;
    for (Bucket& bucket : sums_)
      if (bucket.transfer) abandon(std::move(bucket.transfer));
    // A transport's destructor would wait for transfers that never end, and the watch goes on seeing to it that the process ends.
    static_cast<void>(transport_.release());
    static_cast<void>(gpu_transport_.release());
    for (auto& [group, transport] : group_transports_) static_cast<void>(transport.release());
    static_cast<void>(watch_.release());
    static_cast<void>(meeting_.release());
    in_flight = true;
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  double seconds_in_calls() const override { return seconds_in_calls_; }
  void at_step(std::int64_t step) override { place_.step = step; }

  void check() override {
    if (const auto loss = watch_->loss()) lost(*loss);
  }

  void tell_failure(std::string_view message) noexcept override {
    is_lost_ = true;
    watch_->fail(message);
  }

  void barrier(std::string_view what) override {
    const Timed timed(*this);
    enter(what);
    const at::Tensor own = at::zeros({1}, at::kByte);
    finish(transport_->all_gather(at::empty({size_, 1}, at::kByte), own));
  }

  at::Tensor all_gather(const at::Tensor& own, std::string_view what) override {
    const Timed timed(*this);
    enter(what);
    std::vector<std::int64_t> shape = own.sizes().vec();
    shape.insert(shape.begin(), size_);
    at::Tensor all = at::empty(shape, own.options());
    if (own.numel() > 0) finish(transport_for(own).all_gather(all.view({size_, -1}), own.contiguous().view(-1)));
    return all;
  }

  std::unique_ptr<Gather> start_gather(const at::Tensor& all, const at::Tensor& own, int group, std::string_view what) override {
    const Timed timed(*this);
    enter(what);
    if (group < 1 || size_ % group != 0 || !all.is_contiguous() || !own.is_contiguous() || all.scalar_type() != own.scalar_type() || all.numel() != group * own.numel())
      fail(ErrorKind::kBug, what, ": parts of ", own.sizes(), " cannot be gathered by ", group, " ranks into ", all.sizes());
    return std::make_unique<Started>(*this, own.numel() == 0 ? nullptr : transport_for(own, group).all_gather(all.view({group, -1}), own.view(-1)), what);
  }

  std::unique_ptr<Gather> start_exchange(const at::Tensor& receive, int from, const at::Tensor& send, int to, std::string_view what) override {
    enter(what);
    if (!receive.is_contiguous() || !send.is_contiguous() || receive.scalar_type() != send.scalar_type() || from < 0 || from >= size_ || to < 0 || to >= size_)
      fail(ErrorKind::kBug, what, ": an exchange with ranks ", from, " and ", to, " of ", size_, ", or of tensors that do not fit");
    return std::make_unique<Started>(*this, transport_for(send).exchange(receive.view(-1), from, send.view(-1), to), what);
  }

  void broadcast_in_place(std::span<at::Tensor> tensors, int root, std::string_view what) override {
    const Timed timed(*this);
    enter(what);
    std::deque<std::unique_ptr<Transfer>> transfers;
    for (at::Tensor& tensor : tensors) {
      if (!tensor.is_contiguous()) fail(ErrorKind::kBug, what, ": a tensor to broadcast must be contiguous");
      if (tensor.numel() == 0) continue;
      transfers.push_back(transport_for(tensor).broadcast(tensor.detach().view(-1), root));
      if (transfers.size() == 16) finish(std::move(transfers.front())), transfers.pop_front();
    }
    for (std::unique_ptr<Transfer>& transfer : transfers) finish(std::move(transfer));
  }

  void start_sum(std::span<at::Tensor> tensors, std::string_view what) override {
    const Timed timed(*this);
    enter(what);
    for (Row row(tensors, what); row.numel() > 0;) {
      carry_on_sums(1);  // one gathers its sums while the next is sent
      Bucket bucket{.pieces = row.take(kBucketBytes / static_cast<std::int64_t>(row.options().dtype().itemsize()))};
      std::int64_t numel = 0;
      for (const at::Tensor& piece : bucket.pieces) numel += piece.numel();
      bucket.own = at::empty({size_, (numel + size_ - 1) / size_}, bucket.pieces.front().options());
      pack(bucket.pieces, bucket.own.view(-1));
      send(std::move(bucket));
    }
  }

  void start_reduce_scatter(std::span<const std::vector<at::Tensor>> parts, std::span<at::Tensor> own, std::string_view what) override {
    const Timed timed(*this);
    enter(what);
    std::vector<Row> rows;
    std::int64_t longest = 0;
    at::TensorOptions options;
    for (const std::vector<at::Tensor>& part : parts) {
      rows.emplace_back(part, what);
      if (rows.back().numel() > 0) options = rows.back().options();
      longest = std::max(longest, rows.back().numel());
    }
    Row sums(own, what);
    if (parts.size() != static_cast<std::size_t>(size_) || sums.numel() != rows[static_cast<std::size_t>(rank_)].numel())
      fail(ErrorKind::kBug, what, ": ", parts.size(), " parts cannot be scattered among ", size_, " ranks, or this rank's part does not fit");
    while (longest > 0) {
      carry_on_sums(1);  // one is added up while the next is sent
      const std::int64_t share = std::min(longest, std::max<std::int64_t>(kBucketBytes / static_cast<std::int64_t>(options.dtype().itemsize()) / size_, 1));
      Bucket bucket{.pieces = sums.take(share), .own = at::empty({size_, share}, options), .is_scattered = true};
      for (int rank = 0; rank < size_; ++rank) pack(rows[static_cast<std::size_t>(rank)].take(share), bucket.own[rank]);
      send(std::move(bucket));
      longest -= share;
    }
  }

  void finish_sums(std::string_view what) override {
    const Timed timed(*this);
    place_.what = what;
    carry_on_sums(0);
  }

 private:
  struct Bucket {
    std::vector<at::Tensor> pieces;  // where its sums go
    at::Tensor own = {}, gathered = {};  // [size, share]
    std::unique_ptr<Transfer> transfer = {};
    bool is_scattered = false;  // each rank gets its share and no more: there is one transfer
    bool is_added = false;      // the transfer under way is the second
  };

  /// Adds to seconds_in_calls().
  class Timed {
   public:
    explicit Timed(Ranks& ranks) : ranks_(ranks) {}
    ~Timed() { ranks_.seconds_in_calls_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - began_).count(); }

   private:
    Ranks& ranks_;
    std::chrono::steady_clock::time_point began_ = std::chrono::steady_clock::now();
  };

  class Started : public Gather {
   public:
    Started(Ranks& ranks, std::unique_ptr<Transfer> transfer, std::string_view what) : ranks_(ranks), transfer_(std::move(transfer)), what_(what) {}
    ~Started() override {
      if (transfer_) abandon(std::move(transfer_));
    }
    void wait() override {
      if (!transfer_) return;
      const Timed timed(ranks_);
      ranks_.place_.what = what_;  // for messages; the watch knows the call by its start
      ranks_.finish(std::move(transfer_));
    }

   private:
    Ranks& ranks_;
    std::unique_ptr<Transfer> transfer_;
    std::string what_;
  };

  /// The pieces one behind the other, then zeros.
  static void pack(const std::vector<at::Tensor>& pieces, const at::Tensor& row) {
    std::int64_t done = 0;
    for (const at::Tensor& piece : pieces) row.narrow(0, done, piece.numel()).copy_(piece), done += piece.numel();
    row.narrow(0, done, row.numel() - done).zero_();
  }

  void send(Bucket bucket) {
    bucket.gathered = at::empty_like(bucket.own);
    bucket.transfer = transport_for(bucket.own).all_to_all(bucket.gathered, bucket.own);
    sums_.push_back(std::move(bucket));
  }

  // A bucket goes through one transfer, in which each rank gets its share of every other's bucket and adds them up, and, where all are to have all
  // sums, a second that gathers them. Here those enter their second, and all buckets but `left` end their last. That does not hang on
  // what has come already, so that all ranks begin their transfers in one order.
  void carry_on_sums(std::size_t left) {
    const auto sum_of = [&](Bucket& bucket) {
      finish(std::move(bucket.transfer));
      const at::Tensor sum = tree_sum(bucket.gathered.unbind(0)).contiguous();
      bucket.gathered.reset();
      return sum;
    };
    for (Bucket& bucket : sums_) {
      if (bucket.is_scattered || bucket.is_added) continue;
      bucket.transfer = transport_for(bucket.own).all_gather(bucket.own, sum_of(bucket));
      bucket.is_added = true;
    }
    for (; sums_.size() > left; sums_.pop_front()) {
      Bucket& bucket = sums_.front();
      at::Tensor row;
      if (bucket.is_scattered) row = sum_of(bucket);
      else finish(std::move(bucket.transfer)), row = bucket.own.view(-1);
      std::int64_t done = 0;
      for (const at::Tensor& piece : bucket.pieces) piece.copy_(row.narrow(0, done, piece.numel())), done += piece.numel();
    }
  }

  /// Made at the first tensor on a GPU, which comes in the same call on all ranks.
  Transport& transport_for(const at::Tensor& tensor) {
    if (!tensor.is_cuda()) return *transport_;
    if (!gpu_transport_) gpu_transport_ = meeting_->nccl(size_);
    return *gpu_transport_;
  }
  Transport& transport_for(const at::Tensor& tensor, int group) {
    if (group == size_) return transport_for(tensor);
    std::unique_ptr<Transport>& transport = group_transports_[{group, tensor.is_cuda()}];
    if (!transport) {
      try {
        transport = tensor.is_cuda() ? meeting_->nccl(group) : meeting_->gloo(group);
      } catch (const Error&) {
        throw;
      } catch (const std::exception& error) {
        const std::string message = error.what();
        lost(watch_->loss_within(kSecondsForTheWatch).value_or("the ranks of a group of " + std::to_string(group) + " cannot connect to each other: " + message.substr(0, message.find('\n'))));
      }
    }
    return *transport;
  }

  void enter(std::string_view what) {
    place_.number += 1;
    place_.what = what;
    check();
    watch_->enter(place_);
  }

  void finish(std::unique_ptr<Transfer> transfer) {
    double waited = 0;
    try {
      for (auto last = std::chrono::steady_clock::now(); !transfer->wait(kSliceMilliseconds);) {
        const auto now = std::chrono::steady_clock::now();
        // A pause of this process (a stopped machine) is nobody's absence.
        waited += std::min(std::chrono::duration<double>(now - last).count(), 1.0);
        last = now;
        if (const auto loss = watch_->loss()) {
          abandon(std::move(transfer));
          lost(*loss);
        }
        if (waited > timeout_seconds_) watch_->late(waited);
      }
    } catch (const Error&) {
      throw;
    } catch (const std::exception& error) {
      std::string message = error.what();
      if (const std::size_t end = message.find("] "); message.starts_with("[/") && end != message.npos) message.erase(0, end + 2);  // file and line of Gloo's own
      const std::string whom = size_ == 2 ? "rank " + std::to_string(1 - rank_) : "another rank";
      lost(watch_->loss_within(kSecondsForTheWatch).value_or("the connection to " + whom + " broke: " + message.substr(0, std::min(message.find('\n'), message.find(". ")))));
    }
  }

  /// The transfer still writes into its tensors, which must stay.
  static void abandon(std::unique_ptr<Transfer> transfer) { static_cast<void>(transfer.release()); }

  [[noreturn]] void lost(const std::string& loss) {
    is_lost_ = true;
    watch_->acknowledge();
    fail(ErrorKind::kPeer, loss, "; this is rank ", rank_, ", in step ", place_.step, ", ", place_.what, Remedy{"start all ranks again with --resume: they go on from the last checkpoint"});
  }

  int rank_, size_;
  double timeout_seconds_;
  Place place_;
  bool is_lost_ = false;
  double seconds_in_calls_ = 0;
  std::deque<Bucket> sums_;  // under way, in the order of their beginnings
  std::unique_ptr<Meeting> meeting_;
  std::unique_ptr<Transport> transport_, gpu_transport_;
  std::map<std::pair<int, bool>, std::unique_ptr<Transport>> group_transports_;  // by size, and whether for GPUs
  std::unique_ptr<Watch> watch_;
};

}  // namespace

bool left_in_flight() { return in_flight; }

std::unique_ptr<Communicator> connect(const LaunchEnvironment& environment, const Patience& patience) {
  if (environment.size == 1) return single();
  std::unique_ptr<Meeting> meeting = meet(environment, patience.connect_timeout_seconds);
  int missing = 0;
  try {
    const auto key = [](int rank) { return "here/" + std::to_string(rank); };
    std::unique_ptr<Watch> watch;
    if (environment.rank == 0) {
      watch = Watch::hub(environment.size, environment.host);
      meeting->set("watch", std::to_string(watch->port()) + " " + watch->token());
    } else {
      const std::string said = meeting->get("watch");
      watch = Watch::member(environment.rank, environment.host, static_cast<std::uint16_t>(std::stoi(said)), said.substr(said.find(' ') + 1), patience.connect_timeout_seconds);
    }
    // Rank 0 waits for all and says so; meanwhile the watch tells of a rank that has come and died.
    meeting->set(key(environment.rank), "");
    const auto began = std::chrono::steady_clock::now();
    auto pause = std::chrono::milliseconds(1);
    const auto wait_for = [&](const std::string& awaited) {
      while (!meeting->has(awaited)) {
        if (const auto loss = watch->loss()) {
          watch->acknowledge();
          fail(ErrorKind::kPeer, *loss, "; this is rank ", environment.rank, ", at the meeting of the ranks", Remedy{"start all ranks again"});
        }
        if (std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count() > patience.connect_timeout_seconds) return false;
        std::this_thread::sleep_for(pause);
        pause = std::min(2 * pause, std::chrono::milliseconds(200));
      }
      return true;
    };
    if (environment.rank == 0) {
      while (missing < environment.size && wait_for(key(missing))) ++missing;
      if (missing == environment.size) meeting->set("all", "");
    } else if (wait_for("all")) {
      missing = environment.size;
    } else {
      while (missing < environment.size && meeting->has(key(missing))) ++missing;
    }
    if (missing < environment.size) throw std::runtime_error("not all have come");
    std::unique_ptr<Transport> transport = meeting->gloo(environment.size);
    auto ranks = std::make_unique<Ranks>(environment, patience.timeout_seconds, std::move(meeting), std::move(transport), std::move(watch));
    ranks->barrier("meeting");
    return ranks;
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    const std::string message = error.what();
    const std::string who = missing < environment.size ? "rank " + std::to_string(missing) + " of " + std::to_string(environment.size) + " has not come within " + std::to_string(static_cast<int>(patience.connect_timeout_seconds)) + " s"
                                                       : "the ranks cannot connect to each other: " + message.substr(0, message.find('\n'));
    fail(ErrorKind::kPeer, who, " (", environment.launcher, ": ", environment.variables, ")",
         Remedy{"start all of them at about the same time; check MASTER_ADDR, MASTER_PORT and WORLD_SIZE, and that machines reach each other (GLOO_SOCKET_IFNAME chooses a network interface)"});
  }
}

}  // namespace alambic::parallel
