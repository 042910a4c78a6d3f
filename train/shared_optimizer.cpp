// SPDX-License-Identifier: Apache-2.0
#include "train/shared_optimizer.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <map>
#include <utility>

#include "core/error.h"
#include "models/allocation.h"
#include "train/adamw8bit.h"
#include "train/dynamic_map.h"
#include "train/gradient_sums.h"

namespace alambic::train {
namespace {

constexpr std::int64_t kElementsAtOnce = 1 << 21;  // that go from rank to rank, of all parts together

at::Tensor flat(const at::Tensor& tensor) { return tensor.detach().view(-1); }

std::int64_t length_of(const std::vector<Slice>& part) {
  std::int64_t length = 0;
  for (const Slice& slice : part) length += slice.count;
  return length;
}
std::int64_t longest_of(const std::vector<std::vector<Slice>>& parts) {
  std::int64_t longest = 0;
  for (const std::vector<Slice>& part : parts) longest = std::max(longest, length_of(part));
  return longest;
}

/// act(buffer's place, place(tensor, first, count)) for the elements of a part from `begin` on, as many as the buffer has, piece by piece.
template <class Place, class Act>
void walk(const std::vector<Slice>& part, std::int64_t begin, const at::Tensor& buffer, const Place& place, const Act& act) {
  std::int64_t done = 0;
  for (std::size_t i = 0; i < part.size() && done < buffer.numel(); ++i) {
    const std::int64_t skipped = std::min(begin, part[i].count), taken = std::min(part[i].count - skipped, buffer.numel() - done);
    begin -= skipped;
    if (taken == 0) continue;
    act(buffer.narrow(0, done, taken), place(i, part[i].first + skipped, taken));
    done += taken;
  }
}
const auto pack = [](const at::Tensor& buffer, const at::Tensor& place) { buffer.copy_(place); };
const auto unpack = [](const at::Tensor& buffer, const at::Tensor& place) { place.copy_(buffer); };

}  // namespace

std::vector<std::vector<Slice>> slices_of(std::span<const std::int64_t> sizes, std::span<const std::vector<std::size_t>> buckets, int ranks) {
  const auto num_ranks = static_cast<std::size_t>(ranks);
  std::vector<std::vector<Slice>> slices(num_ranks, std::vector<Slice>(sizes.size()));
  std::int64_t all = 0;                                    // elements of the buckets so far
  std::vector<std::int64_t> given(num_ranks), begin(given);  // of those, what the ranks before each have; where its part of this bucket is to begin
  for (const std::vector<std::size_t>& bucket : buckets) {
    for (const std::size_t i : bucket) all += sizes[i];
    for (std::size_t rank = 1; rank < num_ranks; ++rank) begin[rank] = std::max(all * static_cast<std::int64_t>(rank) / ranks - given[rank], begin[rank - 1]);
    std::int64_t before = 0;  // elements of the bucket
    for (const std::size_t i : bucket) {
      const std::int64_t size = sizes[i], units = std::max<std::int64_t>(size / kPieceOfNorm, 1), length = std::max<std::int64_t>(units == 1 ? size : kPieceOfNorm, 1);
      std::int64_t end = size;
      for (std::size_t rank = num_ranks; rank-- > 0;) {
        // The nearest unit. The last one is the longest.
        const std::int64_t unit = std::clamp<std::int64_t>((begin[rank] - before + length / 2) / length, 0, units), first = rank == 0 ? 0 : unit == units ? size : unit * length;
        slices[rank][i] = {first, end - first};
        given[rank] += first, end = first;
      }
      before += size;
    }
  }
  return slices;
}

SharedOptimizer::SharedOptimizer(std::vector<Trained> given, const OptimizerConfig& config, parallel::Communicator& ranks, int group)
    : Optimizer(std::move(given)), ranks_(ranks), group_(group) {
  if (config.kind != "adamw" && config.kind != "adamw8bit")
    fail(ErrorKind::kUsage, "optimizer.kind: ", config.kind, " looks at whole matrices, of which ranks that share them (ranks.shard) have parts", Remedy{"use adamw or adamw8bit, or ranks.shard: false"});
  std::vector<std::int64_t> sizes;
  for (const Trained& one : trained()) sizes.push_back(one.tensor.numel());
  summed_ = slices_of(sizes, buckets_of(trained()), ranks_.size());
  const auto groups = static_cast<std::size_t>(ranks_.size() / group_);
  for (std::size_t part = 0; part < summed_.size(); part += groups) {
    std::vector<Slice>& slices = slices_.emplace_back(summed_[part]);
    for (std::size_t i = 0; i < slices.size(); ++i)
      for (std::size_t piece = part + 1; piece < part + groups; ++piece) {
        if (slices[i].count == 0) slices[i].first = summed_[piece][i].first;
        slices[i].count += summed_[piece][i].count;
      }
  }
  std::vector<Trained> own;
  for (std::size_t i = 0; i < trained().size(); ++i) {
    const Trained& one = trained()[i];
    const auto add = [&](const char* what, at::ScalarType type, std::int64_t per) {
      moments_.push_back({{std::string(what) + "." + one.name, type, per == 1 ? one.tensor.sizes().vec() : std::vector{(sizes[i] + per - 1) / per}}, i, per});
    };
    const bool narrow = config.kind == "adamw8bit" && sizes[i] >= kSmallest8bitTensor;
    for (const char* what : {"mean", "square"}) add(what, narrow ? at::kByte : at::kFloat, 1);
    if (narrow)
      for (const char* what : {"mean_scale", "square_scale"}) add(what, at::kFloat, kQuantizationBlock);
    if (slice(i).count == 0) continue;
    own.push_back({one.name, flat(one.tensor).narrow(0, slice(i).first, slice(i).count).set_requires_grad(true), one.rate, one.weight_decay});
    of_own_.push_back(i);
  }
  own_ = make_rule(std::move(own), config);
}

at::Tensor& SharedOptimizer::own_sum(std::size_t tensor) const {
  return own_->trained()[static_cast<std::size_t>(std::lower_bound(of_own_.begin(), of_own_.end(), tensor) - of_own_.begin())].tensor.mutable_grad();
}

at::Tensor SharedOptimizer::sum_of(std::size_t tensor, std::int64_t first, std::int64_t count) const {
  return own_sum(tensor).narrow(0, first - slice(tensor).first, count);
}

void SharedOptimizer::start_sum(std::span<const std::size_t> tensors, parallel::Communicator& ranks) {
  std::vector<std::vector<at::Tensor>> parts(static_cast<std::size_t>(ranks.size()));
  std::vector<at::Tensor> own;
  for (const std::size_t i : tensors) {
    const at::Tensor whole = flat(gradient(i));
    for (std::size_t rank = 0; rank < parts.size(); ++rank)
      if (const Slice& part = summed_by(static_cast<int>(rank))[i]; part.count > 0) parts[rank].push_back(whole.narrow(0, part.first, part.count));
    if (slice(i).count == 0) continue;
    const TensorsUntilTheOptimiser own_part;  // in the place of gradients that have left
    own_sum(i) = at::empty({slice(i).count}, whole.options());
    if (const Slice& summed = summed_by(ranks.rank())[i]; summed.count > 0) own.push_back(sum_of(i, summed.first, summed.count));
  }
  ranks.start_reduce_scatter(parts, own, "gradients");
  for (const std::size_t i : tensors) trained()[i].tensor.mutable_grad().reset();
}

void SharedOptimizer::forget_gradients() {
  Optimizer::forget_gradients();
  own_->forget_gradients();
}

// In turn s each gets what the rank s groups before it has added up of their part.
void SharedOptimizer::exchange_sums() {
  const auto place = [&](std::size_t i, std::int64_t first, std::int64_t count) { return sum_of(i, first, count); };
  const int groups = ranks_.size() / group_, own_group = ranks_.rank() / group_;
  const std::int64_t longest = longest_of(summed_);
  const at::TensorOptions options = trained().front().tensor.options().requires_grad(false);
  for (int turn = 1; turn < groups; ++turn) {
    const int to = (own_group + turn) % groups * group_ + member(), from = (own_group + groups - turn) % groups * group_ + member();
    const std::vector<Slice>&sent = summed_by(ranks_.rank()), &got = summed_by(from);
    const std::int64_t num_sent = length_of(sent), num_got = length_of(got);
    for (std::int64_t begin = 0; begin < longest; begin += kElementsAtOnce) {
      const auto room = [&](std::int64_t all) { return at::empty({std::clamp<std::int64_t>(all - begin, 0, kElementsAtOnce)}, options); };
      const at::Tensor send = room(num_sent), receive = room(num_got);
      walk(sent, begin, send, place, pack);
      ranks_.start_exchange(receive, from, send, to, "gradients of other groups")->wait();
      walk(got, begin, receive, place, unpack);
    }
  }
}

double SharedOptimizer::clip(double max_norm, parallel::Communicator& ranks) {
  exchange_sums();
  const std::span<at::Tensor> own = sums();
  // Squares of all pieces in the order of the whole; a piece is of one rank of the first group, and the zeros of the others change nothing.
  std::vector<std::int64_t> first = {0};
  for (const Trained& one : trained()) first.push_back(first.back() + (one.tensor.numel() + kPieceOfNorm - 1) / kPieceOfNorm);
  at::Tensor squares = at::zeros({first.back()}, at::kDouble);
  const std::vector<double> of_own = squares_of(own);
  auto next = of_own.begin();
  for (std::size_t k = 0; k < own.size() && ranks.rank() < group_; ++k) {
    const std::int64_t begin = first[of_own_[k]] + slice(of_own_[k]).first / kPieceOfNorm, count = (own[k].numel() + kPieceOfNorm - 1) / kPieceOfNorm;
    std::copy_n(next, count, squares.mutable_data_ptr<double>() + begin);
    next += count;
  }
  ranks.sum_in_place({&squares, 1}, "norm of the gradients");
  const double norm = norm_of({squares.const_data_ptr<double>(), static_cast<std::size_t>(squares.numel())});
  scale_to_norm(own, norm, max_norm);
  return norm;
}

void SharedOptimizer::update(double learning_rate, std::int64_t step) {
  own_->update(learning_rate, step);
  own_->forget_gradients();
  const auto place = [&](std::size_t i, std::int64_t first, std::int64_t count) { return flat(trained()[i].tensor).narrow(0, first, count); };
  const std::int64_t at_once = std::max<std::int64_t>(kElementsAtOnce / group_, 1), longest = longest_of(slices_);
  for (std::int64_t begin = 0; begin < longest; begin += at_once) {
    const at::TensorOptions options = trained().front().tensor.options().requires_grad(false);
    const at::Tensor own = at::zeros({std::min(at_once, longest - begin)}, options), all = at::empty({group_, own.numel()}, options);
    walk(slices_[static_cast<std::size_t>(member())], begin, own, place, pack);
    ranks_.start_gather(all, own, group_, "weights")->wait();
    for (int other = 0; other < group_; ++other)
      if (other != member()) walk(slices_[static_cast<std::size_t>(other)], begin, all[other], place, unpack);
  }
}

NamedState SharedOptimizer::state() const {
  NamedState state;
  for (const Trained& one : trained()) state.emplace_back("weights." + one.name, one.tensor.detach());
  return state;
}

std::int64_t SharedOptimizer::state_bytes() const {
  std::int64_t bytes = 0;
  for (const Moment& moment : moments_) {
    std::int64_t size = static_cast<std::int64_t>(c10::elementSize(moment.whole.type));
    for (const std::int64_t length : moment.whole.shape) size *= length;
    bytes += size;
  }
  return bytes;
}

std::vector<checkpoints::TensorToWrite> SharedOptimizer::shared_moments() const {
  std::vector<checkpoints::TensorToWrite> shared;
  for (const Moment& moment : moments_) shared.push_back(moment.whole);
  return shared;
}

at::Tensor SharedOptimizer::own_part(const Moment& moment) const {
  for (const auto& [name, tensor] : own_->moments())
    if (name == moment.whole.name) return tensor.view(-1);
  return {};
}

at::Tensor SharedOptimizer::gather_moment(std::size_t i) {
  const Moment& moment = moments_.at(i);
  const at::Tensor whole = at::empty(moment.whole.shape, moment.whole.type);
  for (int rank = 0; rank < group_; ++rank) {
    const Slice part = moment.of(slices_[static_cast<std::size_t>(rank)][moment.tensor]);
    if (part.count == 0) continue;
    at::Tensor place = whole.view(-1).narrow(0, part.first, part.count);
    if (rank == ranks_.rank()) place.copy_(own_part(moment));
    ranks_.broadcast_in_place({&place, 1}, rank, "moments");
  }
  return whole;
}

void SharedOptimizer::restore(const NamedState& state, std::int64_t num_steps) {
  std::map<std::string, at::Tensor> given(state.begin(), state.end());
  NamedState weights, moments;
  std::string problems;
  for (const auto& [name, weight] : this->state())
    if (const auto found = given.find(name); found != given.end()) weights.push_back(*found), given.erase(found);
  for (const Moment& moment : moments_) {
    const auto found = given.find(moment.whole.name);
    if (found == given.end()) {
      problems += " missing " + moment.whole.name + ";";
      continue;
    }
    if (found->second.sizes() != at::IntArrayRef(moment.whole.shape) || found->second.scalar_type() != moment.whole.type) problems += " another shape or type of " + moment.whole.name + ";";
    moments.push_back(*found);
    given.erase(found);
  }
  for (const auto& [name, unknown] : given) problems += " unknown " + name + ";";
  if (!problems.empty()) fail(ErrorKind::kData, "the checkpoint does not fit what trains:", problems);
  Optimizer::restore(weights, num_steps);
  given_ = std::move(moments);
}

void SharedOptimizer::share(std::int64_t num_steps, parallel::Communicator& ranks) {
  Optimizer::share(num_steps, ranks);
  const at::NoGradGuard no_grad;
  for (std::size_t i = 0; i < moments_.size(); ++i) {
    const Moment& moment = moments_[i];
    at::Tensor whole = ranks.rank() == 0 ? given_.at(i).second.contiguous() : at::empty(moment.whole.shape, moment.whole.type);
    ranks.broadcast_in_place({&whole, 1}, 0, "the checkpoint's moments");
    const Slice own = moment.of(slice(moment.tensor));
    if (own.count > 0) own_part(moment).copy_(whole.view(-1).narrow(0, own.first, own.count));
  }
  given_.clear();
}

}  // namespace alambic::train
