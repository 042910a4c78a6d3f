// SPDX-License-Identifier: Apache-2.0
#include "models/ring_attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <memory>
#include <optional>

#include "core/error.h"
#include "models/allocation.h"
#include "parallel/communicator.h"

namespace alambic::models {
namespace {

constexpr std::int64_t kSpareKeys = 32;  // KeyBlock: that may be read behind the last

using Halves = std::array<bool, 2>;
std::int64_t count(const Halves& halves) { return static_cast<std::int64_t>(halves[0]) + static_cast<std::int64_t>(halves[1]); }

/// Who speaks to whom in the turns 1 .. turns() of a row.
class Ring {
 public:
  Ring(const AttentionShape& shape, const SharedRow& row) : shape_(shape), row_(row), context_(row.context()) {
    if (shape.tokens != 2 * row.chunk()) fail(ErrorKind::kBug, "attention over a shared row: ", shape.tokens, " tokens of chunks of ", row.chunk());
  }
  int turns() const { return context_.size - 1; }
  int hears(int turn) const { return (context_.member - turn + context_.size) % context_.size; }  // whose keys come
  int tells(int turn) const { return (context_.member + turn) % context_.size; }                  // who gets the own ones
  Halves seen(int queries, int keys) const { return row_.seen(queries, keys, shape_.window); }
  int member() const { return context_.member; }
  std::int64_t size_of(const Halves& halves) const { return count(halves) * 2 * shape_.kv_heads * row_.chunk() * shape_.head_size; }
  /// receive: flat, as large as what `from` sends.
  std::unique_ptr<parallel::Gather> exchange(const at::Tensor& receive, int from, const at::Tensor& send, int to, const char* what) const {
    const int first = context_.ranks->rank() - context_.member;
    return context_.ranks->start_exchange(receive, first + from, send, first + to, what);
  }
  std::vector<QueryRun> own_queries() const {
    return {{.row = 0, .first = row_.first(member(), 0), .count = row_.chunk()}, {.row = row_.chunk(), .first = row_.first(member(), 1), .count = row_.chunk()}};
  }

 private:
  const AttentionShape& shape_;
  const SharedRow& row_;
  const Context& context_;
};

/// Keys and values of another member, [halves, 2, K, C, S], from the start of their way here.
class Incoming {
 public:
  Incoming(const AttentionShape& shape, const SharedRow& row, const Ring& ring, const AttentionHeads& heads, int turn)
      : shape_(shape), row_(row), from_(ring.hears(turn)), halves_(ring.seen(ring.member(), from_)) {
    const std::int64_t K = shape.kv_heads, S = shape.head_size, C = row.chunk(), to = ring.tells(turn);
    const Halves told = ring.seen(static_cast<int>(to), ring.member());
    const at::Tensor send = at::empty({count(told), 2, K, C, S}, at::kFloat);
    for (std::int64_t half = 0, place = 0; half < 2; ++half) {
      if (!told[static_cast<std::size_t>(half)]) continue;
      send[place][0].copy_(heads.k_KTS.narrow(1, half * C, C));
      send[place++][1].copy_(heads.v_KTS.narrow(1, half * C, C));
    }
    const std::int64_t size = ring.size_of(halves_);
    received_ = at::empty({size + kSpareKeys * S}, at::kFloat);
    received_.narrow(0, size, kSpareKeys * S).zero_();
    transfer_ = ring.exchange(received_.narrow(0, 0, size), from_, send, static_cast<int>(to), "keys and values");
  }
  /// Waits until they have come. What the pass reads turned (values forward, keys backward) is turned here.
  std::vector<KeyBlock> blocks(bool backward) {
    transfer_->wait();
    const std::int64_t K = shape_.kv_heads, S = shape_.head_size, C = row_.chunk(), part = K * C * S;
    const float* const data = received_.const_data_ptr<float>();
    turned_ = at::empty({count(halves_) * part + kSpareKeys}, at::kFloat);
    turned_.narrow(0, count(halves_) * part, kSpareKeys).zero_();
    float* turned = turned_.mutable_data_ptr<float>();
    std::vector<KeyBlock> blocks;
    for (int half = 0; half < 2; ++half) {
      if (!halves_[static_cast<std::size_t>(half)]) continue;
      const float* const k = data + static_cast<std::int64_t>(blocks.size()) * 2 * part;
      transpose_heads(backward ? k : k + part, K, C, S, turned);
      blocks.push_back({.first = row_.first(from_, half), .count = C, .rows = C, .k = k, .kt = backward ? turned : nullptr, .v = k + part, .vt = backward ? nullptr : turned});
      turned += part;
    }
    return blocks;
  }

 private:
  const AttentionShape& shape_;
  const SharedRow& row_;
  int from_;
  Halves halves_;
  at::Tensor received_, turned_;
  std::unique_ptr<parallel::Gather> transfer_;
};

std::vector<KeyBlock> own_blocks(const AttentionShape& shape, const SharedRow& row, const AttentionHeads& heads) {
  const std::int64_t S = shape.head_size, C = row.chunk();
  const auto at_key = [](const at::Tensor& tensor, std::int64_t offset) { return tensor.defined() ? tensor.const_data_ptr<float>() + offset : nullptr; };
  std::vector<KeyBlock> blocks;
  for (int half = 0; half < 2; ++half)
    blocks.push_back({.first = row.first(row.context().member, half), .count = C, .rows = padded_tokens(shape.tokens), .k = at_key(heads.k_KTS, half * C * S),
                      .kt = at_key(heads.kt_KST, half * C), .v = at_key(heads.v_KTS, half * C * S), .vt = at_key(heads.vt_KST, half * C)});
  return blocks;
}

}  // namespace

AttentionHeads make_ring_heads(const AttentionShape& shape) {
  AttentionHeads heads = make_heads(shape, /*backward=*/false, at::kFloat);
  heads.v_KTS = at::zeros({shape.kv_heads, padded_tokens(shape.tokens), shape.head_size}, at::kFloat);
  return heads;
}

at::Tensor ring_attention_forward(const AttentionShape& shape, const SharedRow& row, const AttentionHeads& heads, at::Tensor& out_TQ) {
  std::optional<KeptTensors> passing(std::in_place, false);
  const Ring ring(shape, row);
  const auto start = [&](int turn) { return turn <= ring.turns() ? std::make_unique<Incoming>(shape, row, ring, heads, turn) : nullptr; };
  RunningAttention attention(shape, ring.own_queries(), heads);
  std::unique_ptr<Incoming> next = start(1);
  attention.add(own_blocks(shape, row, heads));
  for (int turn = 1; turn <= ring.turns(); ++turn) {
    const std::unique_ptr<Incoming> present = std::move(next);
    const std::vector<KeyBlock> blocks = present->blocks(/*backward=*/false);
    next = start(turn + 1);
    attention.add(blocks);
  }
  passing.reset();
  return attention.finish(out_TQ);
}

AttentionGradients ring_attention_backward(const AttentionShape& shape, const SharedRow& row, const AttentionHeads& heads, const at::Tensor& out_TQ, const at::Tensor& lse_KR,
                                           const at::Tensor& d_out_TQ) {
  const std::int64_t K = shape.kv_heads, S = shape.head_size, C = row.chunk();
  const Ring ring(shape, row);
  const auto start = [&](int turn) { return turn <= ring.turns() ? std::make_unique<Incoming>(shape, row, ring, heads, turn) : nullptr; };
  RunningGradients gradients(shape, ring.own_queries(), heads, out_TQ, lse_KR, d_out_TQ);
  std::unique_ptr<Incoming> next = start(1);
  AttentionGradients result{.q_KRS = {}, .k_KTS = at::empty({K, padded_tokens(shape.tokens), S}, at::kFloat), .v_KTS = at::empty({K, padded_tokens(shape.tokens), S}, at::kFloat)};
  {
    const at::Tensor own = gradients.add(own_blocks(shape, row, heads));
    for (std::int64_t half = 0; half < 2; ++half) result.k_KTS.narrow(1, half * C, C).copy_(own[half][0]), result.v_KTS.narrow(1, half * C, C).copy_(own[half][1]);
  }
  // What another member found for the own keys and values, on its way here.
  struct Found {
    Halves halves{};
    at::Tensor received, sent;
    std::unique_ptr<parallel::Gather> transfer;
  } found;
  const auto add_found = [&] {
    if (!found.transfer) return;
    found.transfer->wait();
    const at::Tensor parts = found.received.view({count(found.halves), 2, K, C, S});
    for (std::int64_t half = 0, place = 0; half < 2; ++half) {
      if (!found.halves[static_cast<std::size_t>(half)]) continue;
      result.k_KTS.narrow(1, half * C, C).add_(parts[place][0]);
      result.v_KTS.narrow(1, half * C, C).add_(parts[place++][1]);
    }
    found = {};
  };
  for (int turn = 1; turn <= ring.turns(); ++turn) {
    const std::unique_ptr<Incoming> present = std::move(next);
    const std::vector<KeyBlock> blocks = present->blocks(/*backward=*/true);
    next = start(turn + 1);
    const at::Tensor theirs = gradients.add(blocks);
    add_found();
    found.halves = ring.seen(ring.tells(turn), ring.member());
    found.received = at::empty({ring.size_of(found.halves)}, at::kFloat);
    found.sent = theirs.defined() ? theirs : at::empty({0}, at::kFloat);
    found.transfer = ring.exchange(found.received, ring.tells(turn), found.sent, ring.hears(turn), "gradients of keys and values");
  }
  add_found();
  result.q_KRS = gradients.queries();
  return result;
}

}  // namespace alambic::models
