// SPDX-License-Identifier: Apache-2.0
#include "models/fused_blocks.h"

#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <sys/mman.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <unordered_map>

#include "core/error.h"
#include "core/random.h"
#include "models/allocation.h"
#include "models/bf16_tiles.h"
#include "models/leaf_gradient.h"
#include "models/packed_attention.h"
#include "models/product.h"
#include "models/ring_attention.h"
#include "models/rope.h"
#include "models/row_kernels.h"
#include "models/tiles.h"

namespace alambic::models {
namespace {

using at::BFloat16;
using torch::autograd::variable_list;

// Packed rows differ in length from step to step; rounded up, few shapes of products and few sizes of buffers exist, so that
// neither oneDNN's kernels nor malloc's holes pile up over a long run.
constexpr std::int64_t kTokenRound = 64;
constexpr std::int64_t kChunk = 32;  // rows that pass through the element-wise steps together while they are in the cache

// Calls f(first row, rows) for chunks of rows, on all threads.
template <class F>
void for_chunks(std::int64_t rows, const F& f) {
  at::parallel_for(0, (rows + kChunk - 1) / kChunk, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t chunk = begin; chunk < end; ++chunk) f(chunk * kChunk, std::min(kChunk, rows - chunk * kChunk));
  });
}

float* chunk_scratch(std::size_t slot, std::int64_t count) {
  static thread_local std::vector<std::vector<float>> buffers(3);
  std::vector<float>& buffer = buffers[slot];
  if (buffer.size() < static_cast<std::size_t>(count)) buffer = std::vector<float>(static_cast<std::size_t>(count));
  return buffer.data();
}

// scale times the transpose of an f32 sum [R, O].
at::Tensor scaled_transpose(const at::Tensor& sum_RO, double scale) {
  constexpr std::int64_t kFewest = 2048;  // outputs that are worth a thread
  const std::int64_t R = sum_RO.size(0), O = sum_RO.size(1);
  at::Tensor made_OR = at::empty({O, R}, at::kFloat);
  const float* const from = sum_RO.const_data_ptr<float>();
  float* const to = made_OR.mutable_data_ptr<float>();
  at::parallel_for(0, O, kFewest, [&](std::int64_t begin, std::int64_t end) {
    tiles::transpose(from + begin, O, to + begin * R, R, R, end - begin);
    tiles::scale(to + begin * R, (end - begin) * R, static_cast<float>(scale));
  });
  return made_OR;
}

at::Tensor floats(std::initializer_list<std::int64_t> sizes) { return at::empty(at::IntArrayRef(sizes.begin(), sizes.size()), at::kFloat); }

// One of the projections of a group. Its outputs are columns column .. column + count - 1; its adapter's u = z A^T, where it
// has one, the columns u_column .. u_column + rank - 1 of those behind all outputs.
struct Member {
  const Linear* linear;
  std::int64_t column = 0, count = 0, u_column = 0, rank = 0;
  at::Tensor scaled_b_OR, scaled_bt_RO;  // scale * B and its transpose, made once a pass: f32, or as pairs (int32) where bf16 has tiles
};

// Projections that read the same input.
struct Group {
  std::vector<Member> members;
  std::int64_t outputs = 0, inputs = 0, ranks = 0;
  at::Tensor weight_NI;  // [outputs + ranks, inputs]; undefined where a member is quantised: made anew for each use
  bool is_quantised = false;
  bool drops = false;    // some adapter draws dropout in this pass: u is then made apart, from inputs of its own
};

std::vector<std::vector<Slot>> groups_of(const Family& family) {
  std::vector<std::vector<Slot>> groups;
  groups.push_back(family.has(Slot::kQueryKeyValue) ? std::vector{Slot::kQueryKeyValue} : std::vector{Slot::kQuery, Slot::kKey, Slot::kValue});
  groups.push_back({Slot::kOutput});
  groups.push_back(family.has(Slot::kGateUp) ? std::vector{Slot::kGateUp} : std::vector{Slot::kGate, Slot::kUp});
  groups.push_back({Slot::kDown});
  return groups;
}
enum GroupIndex : std::size_t { kQkv, kOut, kGateUp, kDown, kNumGroups };

std::int64_t rank_of(const Linear& linear) { return linear.adapter ? linear.adapter->a_RI.size(0) : 0; }

Group make_group(const Block& block, const std::vector<Slot>& slots) {
  Group group;
  for (const Slot slot : slots) {
    const Linear& linear = block.linears.at(slot);
    Member member{.linear = &linear, .column = group.outputs, .count = linear.outputs(), .u_column = group.ranks, .rank = rank_of(linear), .scaled_b_OR = {}, .scaled_bt_RO = {}};
    group.outputs += member.count;
    group.ranks += member.rank;
    group.inputs = linear.inputs();
    group.is_quantised = group.is_quantised || linear.quantized != nullptr;
    group.members.push_back(std::move(member));
  }
  if (group.is_quantised) return group;
  const auto found = block.grouped.find(slots[0]);
  group.weight_NI = found != block.grouped.end() ? found->second : group.members[0].linear->weight_OI.detach();
  for (const Member& member : group.members)
    if (member.linear->weight_OI.const_data_ptr() != group.weight_NI.narrow(0, member.column, member.count).const_data_ptr()) fail(ErrorKind::kBug, "a weight was replaced after use_fused_blocks()");
  if (group.weight_NI.size(0) != group.outputs + group.ranks) fail(ErrorKind::kBug, "adapters changed after use_fused_blocks()");
  return group;
}

// What a layer keeps for its backward pass. Undefined: not kept, or the layer has no such part.
struct Kept {
  at::Tensor x_TD, h_TD;                    // f32: the block's input, and it plus the attention's output
  at::Tensor rstd_x_T, rstd_h_T;            // of the norms of x and h
  at::Tensor qkv_TN, out_TQ, lse_KR;        // projections (and u behind them), attention's output, its log sums
  at::Tensor gate_up_TN;
  std::array<at::Tensor, kNumGroups> u_TR;  // where u does not stand behind the outputs that are kept
  at::Tensor after_attention_TD, rstd_after_attention_T, after_mlp_TD, rstd_after_mlp_T;  // inputs of the norms behind them
};

// The tensors that train, and a place for the gradient of each.
class Trained {
 public:
  void add(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.requires_grad() || !index_.emplace(tensor.unsafeGetTensorImpl(), tensors_.size()).second) return;
    tensors_.push_back(tensor);
  }
  bool holds(const at::Tensor& tensor) const { return tensor.defined() && index_.contains(tensor.unsafeGetTensorImpl()); }
  const variable_list& tensors() const { return tensors_; }
  void give(const at::Tensor& tensor, const at::Tensor& gradient, variable_list& gradients) const {
    gradients[index_.at(tensor.unsafeGetTensorImpl())] = gradient.to(at::kFloat).contiguous();
  }

 private:
  variable_list tensors_;
  std::unordered_map<const c10::TensorImpl*, std::size_t> index_;
};

// One forward pass, and what its backward needs. T is the compute type: float or BFloat16.
class Tape {
 public:
  virtual ~Tape() = default;
  virtual at::Tensor forward(const at::Tensor& h_TD) = 0;
  /// The gradient of h_TD; undefined where it needs none. `after_block` is called when those of a block's own tensors are in `gradients`.
  virtual at::Tensor backward(at::Tensor d_hidden_TD, variable_list& gradients, const std::function<void()>& after_block) = 0;
  const Trained& trained() const { return trained_; }

 protected:
  Trained trained_;
};

template <class T>
class TypedTape final : public Tape {
 public:
  TypedTape(const Decoder& decoder, const Input& input, bool differentiable, bool input_needs_gradient)
      : decoder_(decoder), config_(decoder.config), real_tokens_(input.tokens_T.numel()), tokens_((real_tokens_ + kTokenRound - 1) / kTokenRound * kTokenRound),
        seed_(input.dropout_seed), lengths_(input.document_lengths), input_needs_gradient_(input_needs_gradient) {
    if (input.shared != nullptr) shared_ = *input.shared;
    // What is added is a document of zeros, whose gradients are zeros.
    at::Tensor positions_T = input.positions_T;
    if (const std::int64_t added = tokens_ - real_tokens_; added > 0) {
      lengths_.push_back(added);
      positions_T = at::cat({positions_T, at::arange(added, at::kLong)});
    }
    shape_ = {.tokens = tokens_, .kv_heads = config_.num_kv_heads, .group = config_.num_heads / config_.num_kv_heads, .head_size = config_.head_size, .document_lengths = lengths_};
    const auto table = [&](const Rope& rope) {
      if (!shared_) return rotary_table(rope, positions_T, lengths_);
      const RotaryTable whole = rotary_table(rope, shared_->positions_T(), lengths_);  // documents reach over chunks
      return RotaryTable{shared_->own(whole.cos_T1F), shared_->own(whole.sin_T1F)};
    };
    rope_ = table(config_.rope);
    if (config_.family->local_rope_theta != 0) local_rope_ = table(config_.local_rope);
    const std::vector<std::vector<Slot>> slots = groups_of(*config_.family);
    lowest_ = decoder_.blocks.size();
    for (std::size_t layer = 0; layer < decoder_.blocks.size(); ++layer) {
      const Block& block = decoder_.blocks[layer];
      std::array<Group, kNumGroups>& groups = groups_.emplace_back();
      const std::size_t before = trained_.tensors().size();
      for (std::size_t g = 0; g < kNumGroups; ++g) {
        groups[g] = make_group(block, slots[g]);
        if (!differentiable) continue;
        for (const Member& member : groups[g].members) {
          trained_.add(member.linear->weight_OI);
          trained_.add(member.linear->bias_O);
          if (member.rank > 0) trained_.add(member.linear->adapter->a_RI), trained_.add(member.linear->adapter->b_OR);
        }
      }
      if (differentiable)
        for (const auto& [slot, norm] : block.norms) trained_.add(norm);
      if (lowest_ == decoder_.blocks.size() && trained_.tensors().size() > before) lowest_ = layer;
    }
    // Small work of many adapters: a thread takes whole blocks of them.
    at::parallel_for(0, static_cast<std::int64_t>(groups_.size()), 1, [&](std::int64_t begin, std::int64_t end) {
      const at::NoGradGuard no_grad;
      for (std::int64_t layer = begin; layer < end; ++layer)
        for (Group& group : groups_[static_cast<std::size_t>(layer)]) prepare(group);
    });
    if (differentiable) trained_.add(decoder_.final_norm_D);
    if (input_needs_gradient_) lowest_ = 0;
    differentiable_ = differentiable;
  }

  at::Tensor forward(const at::Tensor& h_TD) override {
    kept_.resize(groups_.size());
    at::Tensor x_TD = h_TD.detach().contiguous();
    if (tokens_ != real_tokens_) {
      const KeptTensors kept(differentiable_ && lowest_ == 0);
      x_TD = at::zeros({tokens_, config_.hidden_size}, at::kFloat);
      x_TD.narrow(0, 0, real_tokens_).copy_(h_TD.detach());
    }
    for (std::size_t layer = 0; layer < groups_.size(); ++layer) {
      keeps_ = differentiable_ && layer >= lowest_;
      Kept kept;
      kept.x_TD = x_TD;
      attend(layer, kept);
      at::Tensor act_TF;
      gate_up(layer, kept, &act_TF);
      x_TD = down(layer, kept, act_TF);
      if (keeps_) kept_[layer] = what_to_keep(kept);
    }
    keeps_ = false;
    const at::Tensor weight_D = norm_weight(decoder_.final_norm_D);
    x_TD = x_TD.narrow(0, 0, real_tokens_);
    at::Tensor hidden_TD = at::empty({real_tokens_, config_.hidden_size}, kType), rstd_T = floats({real_tokens_});
    normalise(x_TD, weight_D, hidden_TD, rstd_T);
    if (differentiable_) last_TD_ = x_TD, rstd_last_T_ = rstd_T;
    return hidden_TD;
  }

  at::Tensor backward(at::Tensor d_hidden_TD, variable_list& gradients, const std::function<void()>& after_block) override {
    at::Tensor dh_TD = at::zeros({tokens_, config_.hidden_size}, at::kFloat);
    at::Tensor real_TD = dh_TD.narrow(0, 0, real_tokens_);
    norm_backward(last_TD_, decoder_.final_norm_D, rstd_last_T_, d_hidden_TD.contiguous(), real_TD, gradients);
    last_TD_.reset();
    d_hidden_TD.reset();
    for (std::size_t layer = groups_.size(); layer-- > lowest_;) {
      backward_of_block(layer, kept_[layer], dh_TD, gradients);
      kept_.pop_back();
      after_block();
    }
    return input_needs_gradient_ ? real_TD : at::Tensor();
  }

 private:
  static constexpr at::ScalarType kType = std::is_same_v<T, float> ? at::kFloat : at::kBFloat16;

  at::Tensor empty(std::int64_t columns) const { return at::empty({tokens_, columns}, kType); }
  static const T* read(const at::Tensor& tensor) { return tensor.const_data_ptr<T>(); }
  static T* write(at::Tensor& tensor) { return tensor.mutable_data_ptr<T>(); }

  // w + offset: what the normalised values are multiplied by.
  at::Tensor norm_weight(const at::Tensor& weight_D) const {
    const double offset = config_.family->norm_weight_offset;
    return offset == 0 ? weight_D.detach() : weight_D.detach() + offset;
  }
  at::Tensor norm_weight(const Block& block, Slot slot) const {
    const auto found = block.norms.find(slot);
    return found == block.norms.end() ? at::Tensor() : norm_weight(found->second);
  }

  // A as trailing rows of W, so that x W^T and x A^T are one product, and so are their gradients.
  static void put_a(const Group& group, const Member& member, const at::Tensor& weight_NI) {
    weight_NI.narrow(0, group.outputs + member.u_column, member.rank).copy_(member.linear->adapter->a_RI.detach());
  }

  static Bf16Pair* pairs(const at::Tensor& tensor) { return reinterpret_cast<Bf16Pair*>(tensor.mutable_data_ptr<std::int32_t>()); }

  // [outputs + ranks, inputs]. Where a member is quantised this is the tape's one buffer, which the next call overwrites.
  at::Tensor weight(const Group& group) const {
    if (!group.is_quantised) return group.weight_NI;
    const std::int64_t rows = group.outputs + group.ranks;
    if (!dense_.defined() || dense_.numel() < rows * group.inputs) dense_ = at::Tensor(), dense_ = at::empty({rows * group.inputs}, kType);
    const at::Tensor weight_NI = dense_.narrow(0, 0, rows * group.inputs).view({rows, group.inputs});
    for (const Member& member : group.members) {
      const at::Tensor place_OI = weight_NI.narrow(0, member.column, member.count);
      if (member.linear->quantized) member.linear->quantized->dense_into(place_OI);
      else place_OI.copy_(member.linear->weight_OI.detach());
      if (member.rank > 0) put_a(group, member, weight_NI);
    }
    return weight_NI;
  }

  void prepare(Group& group) const {
    for (Member& member : group.members) {
      if (member.rank == 0) continue;
      const Adapter& adapter = *member.linear->adapter;
      group.drops = group.drops || (seed_ != 0 && adapter.dropout > 0);
      if (!group.is_quantised) put_a(group, member, group.weight_NI);
      member.scaled_b_OR = adapter.b_OR.detach() * adapter.scale;
      if (!std::is_same_v<T, BFloat16> || !has_bf16_tiles()) {
        member.scaled_bt_RO = member.scaled_b_OR.t().contiguous();
        continue;
      }
      const at::Tensor b_OR = member.scaled_b_OR.to(at::kBFloat16);
      member.scaled_b_OR = at::empty({(member.count + 1) / 2, member.rank}, at::kInt);
      member.scaled_bt_RO = at::empty({(member.rank + 1) / 2, member.count}, at::kInt);
      pair_rows(b_OR.const_data_ptr<BFloat16>(), member.rank, pairs(member.scaled_b_OR), member.rank, member.count, member.rank);
      pair_columns(b_OR.const_data_ptr<BFloat16>(), member.rank, pairs(member.scaled_bt_RO), member.count, member.count, member.rank);
    }
  }

  at::Tensor dropped(const Member& member, const at::Tensor& x_TI) const {
    const Adapter& adapter = *member.linear->adapter;
    if (seed_ == 0 || adapter.dropout == 0) return x_TI;
    const std::uint64_t seed = derive_seed(seed_, "adapter", {adapter.id});
    if (!shared_) return with_dropout(x_TI, adapter.dropout, seed);
    std::vector<at::Tensor> halves;  // the masks of their places in the row; 64 random bits serve four elements, which no chunk's end divides
    for (int half = 0; half < 2; ++half) {
      const std::int64_t place = shared_->first(shared_->context().member, half) * x_TI.size(1);
      halves.push_back(with_dropout(x_TI.narrow(0, half * shared_->chunk(), shared_->chunk()), adapter.dropout, seed + static_cast<std::uint64_t>(place / 4)));
    }
    return at::cat(halves);
  }

  // [T, outputs + ranks] with u behind the outputs; with dropout [T, outputs], and u apart.
  at::Tensor project(const Group& group, const at::Tensor& x_TI, at::Tensor& u_TR) const {
    const at::Tensor weight_NI = weight(group);
    if (!group.drops) return product(x_TI, weight_NI.t());
    u_TR = empty(group.ranks);
    for (const Member& member : group.members)
      if (member.rank > 0) u_TR.narrow(1, member.u_column, member.rank).copy_(product(dropped(member, x_TI), member.linear->adapter->a_RI.detach().to(kType).t()));
    return product(x_TI, weight_NI.narrow(0, 0, group.outputs).t());
  }

  // y += scale u B^T + bias, for some rows. u: of these rows, ldu apart.
  void add_adapters(const Group& group, T* y, std::int64_t ldy, const T* u, std::int64_t ldu, std::int64_t rows) const {
    for (const Member& member : group.members) {
      if (member.rank > 0) {
        if constexpr (std::is_same_v<T, float>) {
          tile_product(rows, member.count, member.rank, u + member.u_column, ldu, member.scaled_bt_RO.template const_data_ptr<float>(), member.count, y + member.column, ldy, true);
        } else if (has_bf16_tiles()) {
          constexpr std::int64_t kFew = 6;  // rows at a time, which are then read and written from end to end
          for (std::int64_t t = 0; t < rows; t += kFew)
            tile_product(std::min(kFew, rows - t), member.count, member.rank, u + t * ldu + member.u_column, ldu, pairs(member.scaled_bt_RO), member.count, y + t * ldy + member.column, ldy, true);
        } else {
          const float* const bt = member.scaled_bt_RO.template const_data_ptr<float>();
          float *const wide_u = chunk_scratch(0, rows * member.rank), *const delta = chunk_scratch(1, rows * member.count);
          kernels::copy_rows(u + member.u_column, ldu, wide_u, member.rank, rows, member.rank);
          tile_product(rows, member.count, member.rank, wide_u, member.rank, bt, member.count, delta, member.count, false);
          kernels::add_delta_rows(y + member.column, ldy, delta, rows, member.count);
        }
      }
      if (member.linear->bias_O.defined()) {
        const at::Tensor bias_O = member.linear->bias_O.detach().to(at::kFloat);
        kernels::add_bias_rows(y + member.column, ldy, bias_O.const_data_ptr<float>(), rows, member.count);
      }
    }
  }
  // Adds adapters and bias to the rows begin .. begin + rows - 1 of what project() gave.
  void finish_projection(const Group& group, at::Tensor& y_TN, const at::Tensor& u_TR, std::int64_t begin, std::int64_t rows) const {
    const std::int64_t ld = y_TN.stride(0);
    T* const y = write(y_TN) + begin * ld;
    if (group.drops) add_adapters(group, y, ld, read(u_TR) + begin * group.ranks, group.ranks, rows);
    else add_adapters(group, y, ld, y + group.outputs, ld, rows);
  }

  // v = scale dy B for some rows, ldv apart: the gradient of u.
  void adapter_gradients(const Group& group, const T* dy, std::int64_t ldy, T* v, std::int64_t ldv, std::int64_t rows) const {
    for (const Member& member : group.members) {
      if (member.rank == 0) continue;
      if constexpr (std::is_same_v<T, float>) {
        tile_product(rows, member.rank, member.count, dy + member.column, ldy, member.scaled_b_OR.template const_data_ptr<float>(), member.rank, v + member.u_column, ldv, false);
      } else if (has_bf16_tiles()) {
        tile_product(rows, member.rank, member.count, dy + member.column, ldy, pairs(member.scaled_b_OR), member.rank, v + member.u_column, ldv, false);
      } else {
        const float* const b = member.scaled_b_OR.template const_data_ptr<float>();
        float *const wide = chunk_scratch(0, rows * member.count), *const narrow = chunk_scratch(1, rows * member.rank);
        kernels::copy_rows(dy + member.column, ldy, wide, member.count, rows, member.count);
        tile_product(rows, member.rank, member.count, wide, member.count, b, member.rank, narrow, member.rank, false);
        kernels::copy_rows(narrow, member.rank, v + member.u_column, ldv, rows, member.rank);
      }
    }
  }

  void normalise(const at::Tensor& x_TD, const at::Tensor& weight_D, at::Tensor& y_TD, at::Tensor& rstd_T) const {
    const std::int64_t D = x_TD.size(1);
    const float *const x = x_TD.const_data_ptr<float>(), *const w = weight_D.const_data_ptr<float>();
    T* const y = write(y_TD);
    float* const rstd = rstd_T.mutable_data_ptr<float>();
    for_chunks(x_TD.size(0), [&](std::int64_t t, std::int64_t rows) { kernels::norm_rows(x + t * D, D, w, static_cast<float>(config_.norm_epsilon), y + t * D, rstd + t, rows, D); });
  }
  at::Tensor normalised_again(const at::Tensor& x_TD, const at::Tensor& weight_D, const at::Tensor& rstd_T) const {
    const std::int64_t D = x_TD.size(1);
    at::Tensor y_TD = empty(D);
    const float *const x = x_TD.const_data_ptr<float>(), *const w = weight_D.const_data_ptr<float>(), *const rstd = rstd_T.const_data_ptr<float>();
    T* const y = write(y_TD);
    for_chunks(tokens_, [&](std::int64_t t, std::int64_t rows) { kernels::norm_again_rows(x + t * D, D, w, rstd + t, y + t * D, rows, D); });
    return y_TD;
  }
  // dh += the gradient of x; and the norm's own weight's where it trains. Sums a chunk, then over chunks, whatever the threads.
  void norm_backward(const at::Tensor& x_TD, const at::Tensor& norm_D, const at::Tensor& rstd_T, const at::Tensor& dy_TD, at::Tensor& dh_TD, variable_list& gradients) const {
    const std::int64_t D = x_TD.size(1);
    const at::Tensor weight_D = norm_weight(norm_D);
    const at::Tensor parts = trained_.holds(norm_D) ? at::zeros({(x_TD.size(0) + kChunk - 1) / kChunk, D}, at::kFloat) : at::Tensor();
    const float *const x = x_TD.const_data_ptr<float>(), *const w = weight_D.const_data_ptr<float>(), *const rstd = rstd_T.const_data_ptr<float>();
    const T* const dy = read(dy_TD);
    float *const dh = dh_TD.mutable_data_ptr<float>(), *const part = parts.defined() ? parts.mutable_data_ptr<float>() : nullptr;
    for_chunks(x_TD.size(0), [&](std::int64_t t, std::int64_t rows) {
      kernels::norm_backward_rows(x + t * D, D, w, rstd + t, dy + t * D, dh + t * D, D, true, part == nullptr ? nullptr : part + t / kChunk * D, rows, D);
    });
    if (parts.defined()) trained_.give(norm_D, parts.sum(0), gradients);
  }

  HeadTransform head_transform(std::size_t layer, const at::Tensor& query_norm_S, const at::Tensor& key_norm_S) const {
    const LayerConfig& kind = config_.layers[layer];
    HeadTransform transform{.epsilon = static_cast<float>(config_.norm_epsilon), .scale = static_cast<float>(config_.attention_scale)};
    if (query_norm_S.defined()) transform.query_norm = query_norm_S.const_data_ptr<float>();
    if (key_norm_S.defined()) transform.key_norm = key_norm_S.const_data_ptr<float>();
    if (kind.use_rope) {
      const RotaryTable& table = kind.local_rope ? local_rope_ : rope_;
      transform.cos_TF = table.cos_T1F.const_data_ptr<float>();
      transform.sin_TF = table.sin_T1F.const_data_ptr<float>();
      transform.pairs = table.cos_T1F.size(2);
    }
    return transform;
  }
  AttentionShape attention_shape(std::size_t layer) const {
    AttentionShape shape = shape_;
    shape.window = config_.layers[layer].window;
    shape.soft_cap = config_.attention_soft_cap;
    return shape;
  }

  // h = x + y, or x + norm(y) where the block has a norm there; y's adapters and bias are added on the way.
  at::Tensor add_to_residual(const Group& group, const at::Tensor& x_TD, at::Tensor& y_TN, at::Tensor& u_TR, const at::Tensor& norm_D, at::Tensor& normed_TD, at::Tensor& rstd_T, bool is_kept) const {
    const KeptTensors kept(is_kept);
    const std::int64_t D = config_.hidden_size, ld = y_TN.stride(0);
    at::Tensor h_TD = floats({tokens_, D});
    if (norm_D.defined()) normed_TD = empty(D), rstd_T = floats({tokens_});
    const bool takes_u = !group.drops && group.ranks > 0;
    if (takes_u) u_TR = empty(group.ranks);
    const float* const x = x_TD.const_data_ptr<float>();
    const T* const y = read(y_TN);
    float* const h = h_TD.mutable_data_ptr<float>();
    for_chunks(tokens_, [&](std::int64_t t, std::int64_t rows) {
      finish_projection(group, y_TN, u_TR, t, rows);
      if (takes_u) kernels::copy_rows(y + t * ld + group.outputs, ld, u_TR.mutable_data_ptr<T>() + t * group.ranks, group.ranks, rows, group.ranks);
      if (!norm_D.defined()) {
        kernels::add_rows(x + t * D, y + t * ld, ld, h + t * D, rows, D);
      } else {
        float* const wide = chunk_scratch(2, rows * D);
        kernels::copy_rows(y + t * ld, ld, normed_TD.mutable_data_ptr<T>() + t * D, D, rows, D);
        kernels::norm_rows(y + t * ld, ld, norm_D.const_data_ptr<float>(), static_cast<float>(config_.norm_epsilon), wide, rstd_T.mutable_data_ptr<float>() + t, rows, D);
        kernels::add_rows(x + t * D, wide, D, h + t * D, rows, D);
      }
    });
    return h_TD;
  }

  // From the block's input to the residual behind attention.
  void attend(std::size_t layer, Kept& kept) const {
    const Block& block = decoder_.blocks[layer];
    const std::array<Group, kNumGroups>& groups = groups_[layer];
    const bool is_kept = keeps_ && decoder_.keep != Keep::kInputs;
    at::Tensor n_TD = empty(config_.hidden_size);
    {
      const KeptTensors own(is_kept);
      kept.rstd_x_T = floats({tokens_});
      normalise(kept.x_TD, norm_weight(block, Slot::kAttentionNorm), n_TD, kept.rstd_x_T);
      kept.qkv_TN = project(groups[kQkv], n_TD, kept.u_TR[kQkv]);
    }
    n_TD.reset();
    for_chunks(tokens_, [&](std::int64_t t, std::int64_t rows) { finish_projection(groups[kQkv], kept.qkv_TN, kept.u_TR[kQkv], t, rows); });

    const AttentionShape shape = attention_shape(layer);
    const at::Tensor query_norm_S = norm_weight(block, Slot::kQueryNorm), key_norm_S = norm_weight(block, Slot::kKeyNorm);
    AttentionHeads heads = shared_ ? make_ring_heads(shape) : make_heads(shape, /*backward=*/false, kType);
    split_heads(shape, kept.qkv_TN, head_transform(layer, query_norm_S, key_norm_S), heads, /*backward=*/false);
    {
      const KeptTensors own(is_kept);
      kept.out_TQ = empty(config_.num_heads * config_.head_size);
      kept.lse_KR = shared_ ? ring_attention_forward(shape, *shared_, heads, kept.out_TQ) : attention_forward(shape, heads, kept.out_TQ);
    }
    heads = {};
    at::Tensor y_TN = project(groups[kOut], kept.out_TQ, kept.u_TR[kOut]);
    kept.h_TD = add_to_residual(groups[kOut], kept.x_TD, y_TN, kept.u_TR[kOut], norm_weight(block, Slot::kAfterAttentionNorm), kept.after_attention_TD, kept.rstd_after_attention_T, is_kept);
  }

  // Gate and up projections of the normalised h; their product too, unless act_TF is null.
  void gate_up(std::size_t layer, Kept& kept, at::Tensor* act_TF) const {
    const Group& group = groups_[layer][kGateUp];
    const std::int64_t F = config_.intermediate_size;
    {
      at::Tensor n_TD = empty(config_.hidden_size);
      const KeptTensors own(keeps_ && decoder_.keep == Keep::kAll);
      kept.rstd_h_T = floats({tokens_});
      normalise(kept.h_TD, norm_weight(decoder_.blocks[layer], Slot::kMlpNorm), n_TD, kept.rstd_h_T);
      kept.gate_up_TN = project(group, n_TD, kept.u_TR[kGateUp]);
    }
    if (act_TF != nullptr) *act_TF = empty(F);
    const std::int64_t ld = kept.gate_up_TN.stride(0);
    for_chunks(tokens_, [&](std::int64_t t, std::int64_t rows) {
      finish_projection(group, kept.gate_up_TN, kept.u_TR[kGateUp], t, rows);
      if (act_TF != nullptr) kernels::gate_rows(read(kept.gate_up_TN) + t * ld, ld, config_.gelu_tanh, write(*act_TF) + t * F, F, rows, F);
    });
  }

  at::Tensor down(std::size_t layer, Kept& kept, const at::Tensor& act_TF) const {
    const Group& group = groups_[layer][kDown];
    at::Tensor y_TN = project(group, act_TF, kept.u_TR[kDown]);
    return add_to_residual(group, kept.h_TD, y_TN, kept.u_TR[kDown], norm_weight(decoder_.blocks[layer], Slot::kAfterMlpNorm), kept.after_mlp_TD, kept.rstd_after_mlp_T, keeps_);
  }

  Kept what_to_keep(const Kept& all) const {
    if (decoder_.keep == Keep::kInputs) {
      Kept kept;
      kept.x_TD = all.x_TD;
      // What stands behind the product that is not made again.
      kept.u_TR[kDown] = all.u_TR[kDown];
      kept.after_mlp_TD = all.after_mlp_TD;
      kept.rstd_after_mlp_T = all.rstd_after_mlp_T;
      return kept;
    }
    Kept kept = all;
    if (decoder_.keep == Keep::kNoMlp) kept.gate_up_TN.reset(), kept.u_TR[kGateUp].reset(), kept.rstd_h_T.reset();
    return kept;
  }

  // Gradients of B, bias and W from dy, u and the group's input; of A from v. `x` makes the input when it is needed.
  template <class MakeInput>
  void give_gradients(const Group& group, const at::Tensor& dy_TN, const at::Tensor& u_TR, const at::Tensor& v_TR, const MakeInput& make_input, variable_list& gradients) const {
    bool wants_a = false, wants_weight = false;
    for (const Member& member : group.members) {
      wants_weight = wants_weight || trained_.holds(member.linear->weight_OI);
      wants_a = wants_a || (member.rank > 0 && trained_.holds(member.linear->adapter->a_RI));
      const at::Tensor d_TO = dy_TN.narrow(1, member.column, member.count);
      if (member.rank > 0 && trained_.holds(member.linear->adapter->b_OR))
        trained_.give(member.linear->adapter->b_OR, scaled_transpose(product_over_rows(u_TR.narrow(1, member.u_column, member.rank), d_TO), member.linear->adapter->scale), gradients);
      if (trained_.holds(member.linear->bias_O)) trained_.give(member.linear->bias_O, d_TO.sum(0, false, at::kFloat), gradients);
    }
    if (!wants_a && !wants_weight) return;
    const at::Tensor x_TI = make_input();
    if (wants_a && !group.drops) {
      const at::Tensor d_RI = product_over_rows(v_TR, x_TI);
      for (const Member& member : group.members)
        if (member.rank > 0 && trained_.holds(member.linear->adapter->a_RI)) trained_.give(member.linear->adapter->a_RI, d_RI.narrow(0, member.u_column, member.rank), gradients);
    } else if (wants_a) {
      for (const Member& member : group.members)
        if (member.rank > 0 && trained_.holds(member.linear->adapter->a_RI))
          trained_.give(member.linear->adapter->a_RI, product_over_rows(v_TR.narrow(1, member.u_column, member.rank), dropped(member, x_TI)), gradients);
    }
    if (!wants_weight) return;
    // A product for each member: gradients of few sizes fit into each other's places. dy is turned first, which oneDNN would do where gradients stay.
    for (const Member& member : group.members) {
      if (!trained_.holds(member.linear->weight_OI)) continue;
      const at::Tensor dy_OT = dy_TN.narrow(1, member.column, member.count).t().contiguous();
      const TensorsUntilTheOptimiser gradient;
      trained_.give(member.linear->weight_OI, product(dy_OT, x_TI), gradients);
    }
  }

  // The gradient of the group's input. dy_TN: [T, outputs + ranks] with v behind, or [T, outputs] and v apart with dropout.
  at::Tensor input_gradient(const Group& group, const at::Tensor& dy_TN, const at::Tensor& v_TR) const {
    const at::Tensor weight_NI = weight(group);
    if (!group.drops) return product(dy_TN, weight_NI);
    at::Tensor dx_TI = product(dy_TN, weight_NI.narrow(0, 0, group.outputs));
    for (const Member& member : group.members)
      if (member.rank > 0) dx_TI.add_(dropped(member, product(v_TR.narrow(1, member.u_column, member.rank), member.linear->adapter->a_RI.detach().to(kType))));
    return dx_TI;
  }

  // Of a group's outputs and, behind them or with dropout apart, of its u.
  struct OutputGradient {
    at::Tensor dy_TN, v_TR;
  };
  OutputGradient gradient_room(const Group& group) const {
    at::Tensor dy_TN = empty(group.outputs + (group.drops ? 0 : group.ranks));
    return {dy_TN, view_of_v(group, dy_TN)};
  }
  at::Tensor view_of_v(const Group& group, const at::Tensor& dy_TN) const {
    if (group.ranks == 0) return {};
    return group.drops ? empty(group.ranks) : dy_TN.narrow(1, group.outputs, group.ranks);
  }
  void make_v(const Group& group, const at::Tensor& dy_TN, at::Tensor& v_TR, std::int64_t t, std::int64_t rows) const {
    if (group.ranks == 0) return;
    adapter_gradients(group, read(dy_TN) + t * dy_TN.stride(0), dy_TN.stride(0), write(v_TR) + t * v_TR.stride(0), v_TR.stride(0), rows);
  }

  // dy of a projection whose output is added to the residual, directly or behind a norm.
  OutputGradient from_residual(const Group& group, const at::Tensor& dh_TD, const Block& block, Slot norm_slot, const at::Tensor& normed_TD, const at::Tensor& rstd_T,
                               variable_list& gradients) const {
    OutputGradient made = gradient_room(group);
    const std::int64_t D = config_.hidden_size, ld = made.dy_TN.stride(0);
    const float* const dh = dh_TD.const_data_ptr<float>();
    T* const dy = write(made.dy_TN);
    const at::Tensor weight_D = norm_weight(block, norm_slot);
    const bool trains = weight_D.defined() && trained_.holds(block.norms.at(norm_slot));
    const at::Tensor parts = trains ? at::zeros({(tokens_ + kChunk - 1) / kChunk, D}, at::kFloat) : at::Tensor();
    float* const part = trains ? parts.mutable_data_ptr<float>() : nullptr;
    for_chunks(tokens_, [&](std::int64_t t, std::int64_t rows) {
      if (weight_D.defined()) {
        kernels::norm_backward_rows(read(normed_TD) + t * D, D, weight_D.const_data_ptr<float>(), rstd_T.const_data_ptr<float>() + t, dh + t * D, dy + t * ld, ld, false,
                                    part == nullptr ? nullptr : part + t / kChunk * D, rows, D);
      } else {
        kernels::copy_rows(dh + t * D, D, dy + t * ld, ld, rows, D);
      }
      make_v(group, made.dy_TN, made.v_TR, t, rows);
    });
    if (trains) trained_.give(block.norms.at(norm_slot), parts.sum(0), gradients);
    return made;
  }

  bool trains(std::size_t layer, GroupIndex group, std::initializer_list<Slot> norms) const {
    const Block& block = decoder_.blocks[layer];
    const auto& members = groups_[layer][group].members;
    return std::any_of(norms.begin(), norms.end(), [&](Slot slot) {
             const auto found = block.norms.find(slot);
             return found != block.norms.end() && trained_.holds(found->second);
           }) ||
           std::any_of(members.begin(), members.end(), [&](const Member& member) {
             const Linear& linear = *member.linear;
             return trained_.holds(linear.weight_OI) || trained_.holds(linear.bias_O) || (member.rank > 0 && (trained_.holds(linear.adapter->a_RI) || trained_.holds(linear.adapter->b_OR)));
           });
  }

  // dh_TD: the gradient of the block's output, made into that of its input.
  void backward_of_block(std::size_t layer, Kept& kept, at::Tensor& dh_TD, variable_list& gradients) const {
    const Block& block = decoder_.blocks[layer];
    const std::array<Group, kNumGroups>& groups = groups_[layer];
    // Behind which group the pass ends, as nothing below it trains.
    const bool is_lowest = layer == lowest_ && !input_needs_gradient_;
    const bool stops_at_attention = is_lowest && !trains(layer, kQkv, {Slot::kAttentionNorm, Slot::kQueryNorm, Slot::kKeyNorm});
    const bool stops_at_mlp = stops_at_attention && !trains(layer, kOut, {Slot::kAfterAttentionNorm});
    const bool stops_at_gate_up = stops_at_mlp && !trained_.holds(block.norms.at(Slot::kMlpNorm)), stops_at_down = stops_at_gate_up && !trains(layer, kGateUp, {});
    if (decoder_.keep == Keep::kInputs) attend(layer, kept);
    if (decoder_.keep != Keep::kAll) gate_up(layer, kept, nullptr);

    {  // feed-forward
      OutputGradient of_down = from_residual(groups[kDown], dh_TD, block, Slot::kAfterMlpNorm, kept.after_mlp_TD, kept.rstd_after_mlp_T, gradients);
      at::Tensor act_TF = stops_at_down ? empty(config_.intermediate_size) : input_gradient(groups[kDown], of_down.dy_TN, of_down.v_TR);
      const Group& group = groups[kGateUp];
      const std::int64_t F = config_.intermediate_size, ld = kept.gate_up_TN.stride(0);
      // u is needed for B's gradient, and v takes its place behind the outputs.
      const bool takes_u = !group.drops && group.ranks > 0;
      if (takes_u) kept.u_TR[kGateUp] = empty(group.ranks);
      at::Tensor v_gate_up_TR = view_of_v(group, kept.gate_up_TN);
      for_chunks(tokens_, [&](std::int64_t t, std::int64_t rows) {
        if (stops_at_down) return kernels::gate_rows(read(kept.gate_up_TN) + t * ld, ld, config_.gelu_tanh, write(act_TF) + t * F, F, rows, F);
        if (takes_u) kernels::copy_rows(read(v_gate_up_TR) + t * ld, ld, write(kept.u_TR[kGateUp]) + t * group.ranks, group.ranks, rows, group.ranks);
        kernels::gate_backward_rows(write(kept.gate_up_TN) + t * ld, ld, config_.gelu_tanh, write(act_TF) + t * F, F, rows, F);
        make_v(group, kept.gate_up_TN, v_gate_up_TR, t, rows);
      });
      give_gradients(groups[kDown], of_down.dy_TN, kept.u_TR[kDown], of_down.v_TR, [&] { return act_TF; }, gradients);
      of_down = {};
      act_TF.reset();
      if (stops_at_down) return;
      give_gradients(group, kept.gate_up_TN, kept.u_TR[kGateUp], v_gate_up_TR,
                     [&] { return normalised_again(kept.h_TD, norm_weight(block, Slot::kMlpNorm), kept.rstd_h_T); }, gradients);
      if (stops_at_gate_up) return;
      const at::Tensor dn_TD = input_gradient(group, kept.gate_up_TN, v_gate_up_TR);
      kept.gate_up_TN.reset();
      norm_backward(kept.h_TD, block.norms.at(Slot::kMlpNorm), kept.rstd_h_T, dn_TD, dh_TD, gradients);
    }

    if (stops_at_mlp) return;
    at::Tensor d_out_TQ;
    {
      const auto [dy_TN, v_TR] = from_residual(groups[kOut], dh_TD, block, Slot::kAfterAttentionNorm, kept.after_attention_TD, kept.rstd_after_attention_T, gradients);
      give_gradients(groups[kOut], dy_TN, kept.u_TR[kOut], v_TR, [&] { return kept.out_TQ; }, gradients);
      if (stops_at_attention) return;
      d_out_TQ = input_gradient(groups[kOut], dy_TN, v_TR);
    }
    const AttentionShape shape = attention_shape(layer);
    const at::Tensor query_norm_S = norm_weight(block, Slot::kQueryNorm), key_norm_S = norm_weight(block, Slot::kKeyNorm);
    const HeadTransform transform = head_transform(layer, query_norm_S, key_norm_S);
    const Group& group = groups[kQkv];
    OutputGradient own;
    {
      AttentionHeads heads = make_heads(shape, /*backward=*/true, shared_ ? at::kFloat : kType);
      split_heads(shape, kept.qkv_TN, transform, heads, /*backward=*/true);
      const AttentionGradients by_head = shared_ ? ring_attention_backward(shape, *shared_, heads, kept.out_TQ, kept.lse_KR, d_out_TQ)
                                                 : attention_backward(shape, heads, kept.out_TQ, kept.lse_KR, d_out_TQ);
      heads = {};
      d_out_TQ.reset();
      own = gradient_room(group);
      const auto norm_gradient = [&](Slot slot) {
        const auto found = block.norms.find(slot);
        return found != block.norms.end() && trained_.holds(found->second) ? at::zeros({config_.head_size}, at::kFloat) : at::Tensor();
      };
      const at::Tensor d_query_norm_S = norm_gradient(Slot::kQueryNorm), d_key_norm_S = norm_gradient(Slot::kKeyNorm);
      merge_head_gradients(shape, kept.qkv_TN, transform, by_head, own.dy_TN, d_query_norm_S, d_key_norm_S);
      if (d_query_norm_S.defined()) trained_.give(block.norms.at(Slot::kQueryNorm), d_query_norm_S, gradients);
      if (d_key_norm_S.defined()) trained_.give(block.norms.at(Slot::kKeyNorm), d_key_norm_S, gradients);
    }
    for_chunks(tokens_, [&](std::int64_t t, std::int64_t rows) { make_v(group, own.dy_TN, own.v_TR, t, rows); });
    if (!group.drops && group.ranks > 0) kept.u_TR[kQkv] = kept.qkv_TN.narrow(1, group.outputs, group.ranks);
    give_gradients(group, own.dy_TN, kept.u_TR[kQkv], own.v_TR, [&] { return normalised_again(kept.x_TD, norm_weight(block, Slot::kAttentionNorm), kept.rstd_x_T); }, gradients);
    if (is_lowest && !trained_.holds(block.norms.at(Slot::kAttentionNorm))) return;
    norm_backward(kept.x_TD, block.norms.at(Slot::kAttentionNorm), kept.rstd_x_T, input_gradient(group, own.dy_TN, own.v_TR), dh_TD, gradients);
  }

  const Decoder& decoder_;
  const ModelConfig& config_;
  std::int64_t real_tokens_, tokens_;
  std::uint64_t seed_;
  std::vector<std::int64_t> lengths_;
  std::optional<SharedRow> shared_;
  bool input_needs_gradient_, differentiable_ = false;
  bool keeps_ = false;  // what is made now waits for the backward pass
  AttentionShape shape_;
  RotaryTable rope_, local_rope_;
  std::vector<std::array<Group, kNumGroups>> groups_;  // by layer
  std::size_t lowest_ = 0;                             // layers below this have nothing that trains
  std::vector<Kept> kept_;
  at::Tensor last_TD_, rstd_last_T_;
  mutable at::Tensor dense_;  // see weight()
};

struct BlocksBackward : torch::autograd::Node {
  explicit BlocksBackward(std::unique_ptr<Tape> own) : tape(std::move(own)) {}
  std::string name() const override { return "BlocksBackward"; }
  variable_list apply(variable_list&& d_outputs) override {
    // What was kept is overwritten on the way back.
    if (!tape) fail(ErrorKind::kBug, "the backward pass of the fused blocks runs once");
    const std::unique_ptr<Tape> own = std::move(tape);
    variable_list gradients(1 + own->trained().tensors().size());
    if (!d_outputs[0].defined()) return gradients;
    const at::NoGradGuard no_grad;
    variable_list of_trained(own->trained().tensors().size());
    const auto give = [&] {
      for (std::size_t i = 0; i < of_trained.size(); ++i)
        if (of_trained[i].defined()) give_to_leaf(*this, 1 + i, of_trained[i]);
    };
    gradients[0] = own->backward(std::move(d_outputs[0]), of_trained, give);
    std::move(of_trained.begin(), of_trained.end(), gradients.begin() + 1);
    return gradients;
  }
  void release_variables() override { tape.reset(); }
  std::unique_ptr<Tape> tape;
};

std::string why_not(Decoder& decoder) {
  const at::ScalarType type = decoder.compute_type();
  if (!decoder.embedding_VD.is_cpu()) return "the weights are not in the processor's memory";
  if (type != at::kFloat && type != at::kBFloat16) return std::string("the compute type is ") + toString(type);
  if (decoder.config.num_heads % decoder.config.num_kv_heads != 0) return "query heads are no multiple of key heads";
  for (const NamedLinear& linear : decoder.linears()) {
    if (linear.layer < 0) continue;
    if (linear.linear->adapter && linear.linear->adapter->magnitude_O.defined()) return linear.path + " has a DoRA adapter";
    if (linear.linear->compute_type() != type) return linear.path + " has weights of another type";
  }
  return "";
}

// Lets go of file pages that were read to be copied; harmless for any other memory, whose content stays.
void no_longer_needed(const at::Tensor& tensor) {
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr());
  const std::uintptr_t first = (begin + page - 1) / page * page, last = (begin + tensor.nbytes()) / page * page;
#ifdef MADV_PAGEOUT
  if (last > first) ::madvise(reinterpret_cast<void*>(first), last - first, MADV_PAGEOUT);
#endif
}

}  // namespace

std::string use_fused_blocks(Decoder& decoder) {
  if (const std::string reason = why_not(decoder); !reason.empty()) return reason;
  const at::NoGradGuard no_grad;
  for (Block& block : decoder.blocks)
    for (const std::vector<Slot>& slots : groups_of(*decoder.config.family)) {
      std::int64_t rows = 0, inputs = 0;
      bool is_moved = slots.size() > 1, is_quantised = false;
      for (const Slot slot : slots) {
        const Linear& linear = block.linears.at(slot);
        rows += linear.outputs() + rank_of(linear);
        inputs = linear.inputs();
        is_moved = is_moved || rank_of(linear) > 0;
        is_quantised = is_quantised || linear.quantized != nullptr;
      }
      if (!is_moved || is_quantised) {
        block.grouped.erase(slots[0]);
        continue;
      }
      // A zero stands behind the weights until the first pass puts A there.
      at::Tensor all_NI = at::empty({rows, inputs}, decoder.compute_type());
      std::int64_t row = 0;
      for (const Slot slot : slots) {
        at::Tensor& weight_OI = block.linears.at(slot).weight_OI;
        const at::Tensor place_OI = all_NI.narrow(0, row, weight_OI.size(0));
        place_OI.copy_(weight_OI);
        row += weight_OI.size(0);
        const bool trains = weight_OI.requires_grad();
        no_longer_needed(weight_OI);
        weight_OI = place_OI.detach();  // a leaf of its own that shares the memory
        weight_OI.set_requires_grad(trains);
      }
      all_NI.narrow(0, row, rows - row).zero_();
      block.grouped[slots[0]] = all_NI;
    }
  decoder.fused = true;
  return "";
}

at::Tensor fused_hidden_TD(const Decoder& decoder, const Input& input, const at::Tensor& h_TD) {
  const bool needs_input = at::GradMode::is_enabled() && h_TD.requires_grad();
  std::unique_ptr<Tape> tape;
  if (decoder.compute_type() == at::kFloat) tape = std::make_unique<TypedTape<float>>(decoder, input, at::GradMode::is_enabled(), needs_input);
  else tape = std::make_unique<TypedTape<BFloat16>>(decoder, input, at::GradMode::is_enabled(), needs_input);
  const bool differentiable = needs_input || !tape->trained().tensors().empty();
  at::Tensor hidden_TD = [&] {
    const at::NoGradGuard no_grad;
    return tape->forward(h_TD);
  }();
  if (!differentiable) return hidden_TD;
  variable_list inputs{h_TD};
  inputs.insert(inputs.end(), tape->trained().tensors().begin(), tape->trained().tensors().end());
  const auto node = c10::make_intrusive<BlocksBackward>(std::move(tape));
  node->set_next_edges(torch::autograd::collect_next_edges(inputs));
  torch::autograd::set_history(hidden_TD, node);
  return hidden_TD;
}

double kept_bytes_per_token(const Decoder& decoder) {
  const ModelConfig& config = decoder.config;
  const double element = static_cast<double>(c10::elementSize(decoder.compute_type()));
  const auto D = static_cast<double>(config.hidden_size), F = static_cast<double>(config.intermediate_size), heads = static_cast<double>(config.num_heads);
  const double queries = heads * static_cast<double>(config.head_size), keys = static_cast<double>(config.num_kv_heads * config.head_size);
  const bool norm_after_mlp = config.family->has(Slot::kAfterMlpNorm), norm_after_attention = config.family->has(Slot::kAfterAttentionNorm);
  double bytes = 0;
  for (const Block& block : decoder.blocks) {
    double ranks[kNumGroups] = {};
    const std::vector<std::vector<Slot>> groups = groups_of(*config.family);
    for (std::size_t g = 0; g < kNumGroups; ++g)
      for (const Slot slot : groups[g]) ranks[g] += static_cast<double>(rank_of(block.linears.at(slot)));
    bytes += 4 * D + element * (ranks[kDown] + (norm_after_mlp ? D : 0)) + (norm_after_mlp ? 4 : 0);
    if (decoder.keep == Keep::kInputs) continue;
    bytes += 4 * (D + 1 + heads) + element * (2 * queries + 2 * keys + ranks[kQkv] + ranks[kOut] + (norm_after_attention ? D : 0));
    if (decoder.keep == Keep::kAll) bytes += 4 + element * (2 * F + ranks[kGateUp]);
  }
  return bytes;
}

}  // namespace alambic::models
