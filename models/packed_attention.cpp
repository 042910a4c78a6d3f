// SPDX-License-Identifier: Apache-2.0
#include "models/packed_attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/error.h"
#include "core/vectorised.h"
#include "models/bf16_tiles.h"
#include "models/product.h"
#include "models/row_kernels.h"
#include "models/tiles.h"

namespace alambic::models {
namespace {

using at::BFloat16;
using kernels::fast_exp;
using tiles::kHidden;
using tiles::kLanes;
using tiles::scale_columns;
using tiles::softmax_tile;
using tiles::transpose;

constexpr std::int64_t kQueries = 32;    // tokens of a query tile: R = 32 G rows, always a multiple of the vector width
constexpr std::int64_t kKeyRound = 32;   // keys of a tile are rounded up to this, so that few tile shapes exist
constexpr std::int64_t kSplitTokens = 1024;  // a document longer than this has its backward pass cut into kSplits shares
constexpr std::int64_t kSplits = 4;

std::int64_t keys_in_tile(std::int64_t rows) { return rows <= 128 ? 256 : rows <= 256 ? 128 : 64; }

struct Unit {  // a share of the work that one thread does alone
  std::int64_t first, end;  // tokens of the document
  std::int64_t head;
  std::int64_t q0 = 0;                  // forward: first token of the query tile
  std::int64_t split = 0, splits = 1;   // backward: takes the query tiles of its split
  double cost = 0;
};

// Runs units so that threads finish together: the costliest first, each to the thread with the least work. Where a unit runs
// does not change what it computes.
template <class Run>
void run_balanced(std::vector<Unit>& units, const Run& run) {
  std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.cost > b.cost; });
  const auto threads = static_cast<std::size_t>(std::max(1, at::get_num_threads()));
  std::vector<std::vector<const Unit*>> shares(threads);
  std::vector<double> load(threads, 0);
  for (const Unit& unit : units) {
    const auto least = static_cast<std::size_t>(std::min_element(load.begin(), load.end()) - load.begin());
    shares[least].push_back(&unit);
    load[least] += unit.cost;
  }
  at::parallel_for(0, static_cast<std::int64_t>(threads), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      for (const Unit* unit : shares[static_cast<std::size_t>(i)]) run(*unit);
  });
}

// Memory of one thread, kept between calls.
template <class E = float>
E* scratch(std::size_t slot, std::int64_t count) {
  static thread_local std::vector<std::vector<E>> buffers(12);
  std::vector<E>& buffer = buffers[slot];
  if (buffer.size() < static_cast<std::size_t>(count)) buffer = std::vector<E>(static_cast<std::size_t>(count));
  return buffer.data();
}

// E is what tiles are multiplied in: float, or BFloat16 where the heads are narrow. A right factor is then kept in pairs.
template <class E>
using Right = std::conditional_t<std::is_same_v<E, float>, float, Bf16Pair>;

// A tile of f32 [rows, columns] as a factor of the next product.
template <class E>
const E* as_left(const float* tile, std::int64_t rows, std::int64_t columns, std::size_t slot) {
  if constexpr (std::is_same_v<E, float>) {
    return tile;
  } else {
    E* const made = scratch<E>(slot, rows * columns);
    kernels::copy_rows(tile, columns, made, columns, rows, columns);
    return made;
  }
}
template <class E>
const Right<E>* as_right(const float* tile, std::int64_t rows, std::int64_t columns, std::size_t slot) {
  if constexpr (std::is_same_v<E, float>) {
    return tile;
  } else {
    Bf16Pair* const made = scratch<Bf16Pair>(slot, (rows + 1) / 2 * columns);
    pair_rows(tile, columns, made, columns, rows, columns);
    return made;
  }
}

inline float load(const float* p) { return *p; }
inline float load(const BFloat16* p) { return static_cast<float>(*p); }
inline void store(float* p, float value) { *p = value; }
inline void store(BFloat16* p, float value) { *p = static_cast<BFloat16>(value); }

// s [keys, R]: what a query must not see becomes kHidden. Column i is query q0 + i / G, row j is key k0 + j, of which those from `end` on
// are none.
ALAMBIC_VECTORISED void hide(float* s, std::int64_t keys, std::int64_t R, std::int64_t k0, std::int64_t end, std::int64_t q0, std::int64_t G, std::int64_t window) {
  for (std::int64_t j = 0; j < keys; ++j) {
    const std::int64_t key = k0 + j;
    const std::int64_t early = key >= end ? R : std::clamp<std::int64_t>((key - q0) * G, 0, R);  // queries before the key
    float* const row = s + j * R;
    for (std::int64_t i = 0; i < early; ++i) row[i] = kHidden;
    if (window > 0) {
      const std::int64_t late = std::clamp<std::int64_t>((key + window - q0) * G, 0, R);
      for (std::int64_t i = late; i < R; ++i) row[i] = kHidden;
    }
  }
}

// p, d [keys, R]: scores become probabilities, gradients of probabilities become those of scores.
ALAMBIC_VECTORISED void backward_tile(float* p, float* d, std::int64_t keys, std::int64_t R, const float* lse, const float* delta, float soft_cap) {
  const float per_cap = soft_cap > 0 ? 1.0f / soft_cap : 0.0f;
  for (std::int64_t c = 0; c < R; c += kLanes) {
    float norm[kLanes], mean[kLanes];
    for (std::int64_t i = 0; i < kLanes; ++i) norm[i] = lse[c + i], mean[i] = delta[c + i];
    for (std::int64_t j = 0; j < keys; ++j) {
      float *const pr = p + j * R + c, *const dr = d + j * R + c;
      if (soft_cap > 0) {
#pragma omp simd
        for (std::int64_t i = 0; i < kLanes; ++i) {
          const float share = pr[i] * per_cap, q = fast_exp(pr[i] - norm[i]);
          // What is hidden has q = 0; its share is not a tanh, so it must not reach the product.
          dr[i] = q > 0.0f ? q * (dr[i] - mean[i]) * (1.0f - share * share) : 0.0f;
          pr[i] = q;
        }
      } else {
#pragma omp simd
        for (std::int64_t i = 0; i < kLanes; ++i) {
          const float q = fast_exp(pr[i] - norm[i]);
          dr[i] = q * (dr[i] - mean[i]);
          pr[i] = q;
        }
      }
    }
  }
}

std::int64_t rounded_keys(std::int64_t keys) { return (keys + kKeyRound - 1) / kKeyRound * kKeyRound; }

// Queries of a tile: 32 tokens from q0 on, of one document.
template <class E>
struct Queries {
  std::int64_t q0;
  const Right<E> *rows, *turned;  // [R, S] (backward) and [S, R] with a leading dimension of ld_turned
  std::int64_t ld_turned;
};

// Those of the token `row` of the heads and of the 31 behind it.
template <class E>
Queries<E> queries_of(const AttentionShape& shape, const AttentionHeads& heads, std::int64_t head, std::int64_t row, std::int64_t q0, bool backward) {
  const std::int64_t G = shape.group, S = shape.head_size, R = kQueries * G, padded = padded_tokens(shape.tokens);
  if constexpr (std::is_same_v<E, float>) {
    return {.q0 = q0, .rows = backward ? heads.q_KRS.const_data_ptr<float>() + (head * padded + row) * G * S : nullptr,
            .turned = heads.qt_KSR.const_data_ptr<float>() + (head * S * padded + row) * G, .ld_turned = padded * G};
  } else {
    const E* const q = heads.q_KRS.const_data_ptr<E>() + (head * padded + row) * G * S;
    Bf16Pair *const rows = backward ? scratch<Bf16Pair>(2, R / 2 * S) : nullptr, *const turned = scratch<Bf16Pair>(3, (S + 1) / 2 * R);
    if (backward) pair_rows(q, S, rows, S, R, S);
    pair_columns(q, S, turned, R, R, S);
    return {.q0 = q0, .rows = rows, .turned = turned, .ld_turned = R};
  }
}

// The keys begin .. end - 1 of a block through a tile's running softmax. acc [S, R] holds something already where `goes_on`.
template <class E>
void forward_tile(const AttentionShape& shape, const KeysOf<E>& block, std::int64_t head, std::int64_t begin, std::int64_t end, const Queries<E>& queries, float* acc, float* m,
                  float* l, bool goes_on) {
  const std::int64_t G = shape.group, S = shape.head_size, R = kQueries * G, most_keys = keys_in_tile(R), q0 = queries.q0;
  float *const s = scratch(0, most_keys * R), *const factor = scratch(11, R);
  for (std::int64_t k0 = begin; k0 < end; k0 += most_keys) {
    const std::int64_t keys = rounded_keys(std::min(most_keys, end - k0)), at_key = k0 - block.first;
    tile_product(keys, R, S, block.k + (head * block.rows + at_key) * S, S, queries.turned, queries.ld_turned, s, R, false);
    if (shape.soft_cap > 0) tiles::soft_cap(s, nullptr, keys * R, static_cast<float>(shape.soft_cap));
    if (k0 + keys > std::min(q0, end) || (shape.window > 0 && k0 + shape.window < q0 + kQueries)) hide(s, keys, R, k0, end, q0, G, shape.window);
    const bool shrinks = softmax_tile(s, keys, R, m, l, factor);
    if (shrinks && goes_on) scale_columns(acc, S, R, factor);
    tile_product(S, R, keys, block.vt + head * S * block.rows + at_key, block.rows, as_right<E>(s, keys, R, 0), R, acc, R, goes_on);
    goes_on = true;
  }
}

// acc [S, R] -> rows of out and of the log sums. row0: the buffers' row of the tile's first token; `count` tokens are real.
template <class T>
void finish_tile(const AttentionShape& shape, std::int64_t head, std::int64_t row0, std::int64_t count, float* acc, const float* m, const float* l, T* out, std::int64_t ld_out,
                 float* lse, std::int64_t padded) {
  const std::int64_t G = shape.group, S = shape.head_size, R = kQueries * G;
  float *const factor = scratch(11, R), *const turned = scratch(3, R * S);
  for (std::int64_t i = 0; i < R; ++i) factor[i] = 1.0f / l[i];
  scale_columns(acc, S, R, factor);
  transpose(acc, R, turned, S, S, R);
  for (std::int64_t t = 0; t < count; ++t)
    for (std::int64_t g = 0; g < G; ++g) {
      const std::int64_t i = t * G + g;
      kernels::copy_rows(turned + i * S, S, out + (row0 + t) * ld_out + (head * G + g) * S, S, 1, S);
      lse[(head * padded + row0 + t) * G + g] = m[i] + std::log(l[i]);
    }
}

// Gradients of a tile's outputs og [R, S] and ogt [S, R]; delta and norm [R]. Rows behind the tile's real tokens get probabilities of 0.
template <class E>
struct OutputGradients {
  const Right<E> *og, *ogt;
  float *delta, *norm;
};
template <class E, class T>
OutputGradients<E> output_gradients(const AttentionShape& shape, std::int64_t head, std::int64_t row0, std::int64_t count, const T* out, std::int64_t ld_out, const T* d_out,
                                 std::int64_t ld_d, const float* lse, std::int64_t padded) {
  const std::int64_t G = shape.group, S = shape.head_size, R = kQueries * G, valid = count * G;
  float *const delta = scratch(4, R), *const norm = scratch(8, R);
  E* const rows = scratch<E>(2, R * S);
  std::fill(rows + valid * S, rows + R * S, E(0.0f));
  for (std::int64_t t = row0; t < row0 + count; ++t)
    for (std::int64_t g = 0; g < G; ++g) {
      const std::int64_t i = (t - row0) * G + g, column = (head * G + g) * S;
      const T *const from = d_out + t * ld_d + column, *const o = out + t * ld_out + column;
      kernels::copy_rows(from, S, rows + i * S, S, 1, S);
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (std::int64_t x = 0; x < S; ++x) sum += load(from + x) * load(o + x);
      delta[i] = sum;
      norm[i] = lse[(head * padded + t) * G + g];
    }
  std::fill(norm + valid, norm + R, -kHidden);
  std::fill(delta + valid, delta + R, 0.0f);
  if constexpr (std::is_same_v<E, float>) {
    float* const turned = scratch(3, R * S);
    transpose(rows, S, turned, R, R, S);
    return {.og = rows, .ogt = turned, .delta = delta, .norm = norm};
  } else {
    Bf16Pair *const paired = scratch<Bf16Pair>(4, R / 2 * S), *const turned = scratch<Bf16Pair>(5, (S + 1) / 2 * R);
    pair_rows(rows, S, paired, S, R, S);
    pair_columns(rows, S, turned, R, R, S);
    return {.og = paired, .ogt = turned, .delta = delta, .norm = norm};
  }
}

// What the keys begin .. end - 1 of a block and a tile's queries give each other: added to dqt [S, R] (stored there unless `goes_on`) and to
// dk, dv [keys, S], whose first row is that of key `base`.
template <class E>
void backward_keys(const AttentionShape& shape, const KeysOf<E>& block, std::int64_t head, std::int64_t begin, std::int64_t end, const Queries<E>& queries,
                   const OutputGradients<E>& outputs, float* dqt, float* dk, float* dv, std::int64_t base, bool goes_on) {
  const std::int64_t G = shape.group, S = shape.head_size, R = kQueries * G, most_keys = keys_in_tile(R), q0 = queries.q0;
  float *const s = scratch(0, most_keys * R), *const d = scratch(1, most_keys * R);
  for (std::int64_t k0 = begin; k0 < end; k0 += most_keys) {
    const std::int64_t keys = rounded_keys(std::min(most_keys, end - k0)), at_key = k0 - block.first, at_row = (head * block.rows + at_key) * S;
    tile_product(keys, R, S, block.k + at_row, S, queries.turned, queries.ld_turned, s, R, false);
    tile_product(keys, R, S, block.v + at_row, S, outputs.ogt, R, d, R, false);
    if (shape.soft_cap > 0) tiles::soft_cap(s, nullptr, keys * R, static_cast<float>(shape.soft_cap));
    if (k0 + keys > std::min(q0, end) || (shape.window > 0 && k0 + shape.window < q0 + kQueries)) hide(s, keys, R, k0, end, q0, G, shape.window);
    backward_tile(s, d, keys, R, outputs.norm, outputs.delta, static_cast<float>(shape.soft_cap));
    tile_product(keys, S, R, as_left<E>(s, keys, R, 0), R, outputs.og, S, dv + (k0 - base) * S, S, true);
    tile_product(keys, S, R, as_left<E>(d, keys, R, 1), R, queries.rows, S, dk + (k0 - base) * S, S, true);
    tile_product(S, R, keys, block.kt + head * S * block.rows + at_key, block.rows, as_right<E>(d, keys, R, 1), R, dqt, R, goes_on);
    goes_on = true;
  }
}

template <class E>
KeysOf<E> block_of(const AttentionHeads& heads, std::int64_t tokens) {
  const auto data = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<E>() : nullptr; };
  return {.first = 0, .count = tokens, .rows = padded_tokens(tokens), .k = data(heads.k_KTS), .kt = data(heads.kt_KST), .v = data(heads.v_KTS), .vt = data(heads.vt_KST)};
}

template <class E, class T>
at::Tensor forward(const AttentionShape& shape, const AttentionHeads& heads, at::Tensor& out_TQ) {
  const std::int64_t K = shape.kv_heads, G = shape.group, S = shape.head_size, R = kQueries * G, padded = padded_tokens(shape.tokens), ld_out = out_TQ.stride(0);
  at::Tensor lse_KR = at::empty({K, padded * G}, at::kFloat);
  const KeysOf<E> block = block_of<E>(heads, shape.tokens);
  float* const lse = lse_KR.mutable_data_ptr<float>();
  T* const out = out_TQ.mutable_data_ptr<T>();

  std::vector<Unit> units;
  std::int64_t first = 0;
  for (const std::int64_t length : shape.document_lengths) {
    for (std::int64_t q0 = first; q0 < first + length; q0 += kQueries)
      for (std::int64_t head = 0; head < K; ++head) {
        const std::int64_t q1 = std::min(first + length, q0 + kQueries), k0 = shape.window > 0 ? std::max(first, q0 - shape.window + 1) : first;
        units.push_back({.first = first, .end = first + length, .head = head, .q0 = q0, .cost = static_cast<double>(q1 - k0) + 8});
      }
    first += length;
  }
  run_balanced(units, [&](const Unit& unit) {
    const std::int64_t q0 = unit.q0, q1 = std::min(unit.end, q0 + kQueries);
    float *const acc = scratch(1, S * R), *const m = scratch(2, 2 * R), *const l = m + R;
    std::fill(m, m + R, kHidden);
    std::fill(l, l + R, 0.0f);
    const Queries<E> queries = queries_of<E>(shape, heads, unit.head, q0, q0, /*backward=*/false);
    const std::int64_t begin = shape.window > 0 ? std::max(unit.first, q0 - shape.window + 1) : unit.first;
    forward_tile(shape, block, unit.head, begin, q1, queries, acc, m, l, false);
    finish_tile(shape, unit.head, q0, q1 - q0, acc, m, l, out, ld_out, lse, padded);
  });
  return lse_KR;
}

// There and back, so that each split gets as many long tiles as short ones.
bool is_of_split(std::int64_t tile, std::int64_t split, std::int64_t splits) {
  const std::int64_t round = 2 * splits, turn = tile % round;
  return (turn < splits ? turn : round - 1 - turn) == split;
}

template <class E, class T>
AttentionGradients backward(const AttentionShape& shape, const AttentionHeads& heads, const at::Tensor& out_TQ, const at::Tensor& lse_KR, const at::Tensor& d_out_TQ) {
  const std::int64_t K = shape.kv_heads, G = shape.group, S = shape.head_size, R = kQueries * G, padded = padded_tokens(shape.tokens);
  const std::int64_t ld_out = out_TQ.stride(0), ld_d = d_out_TQ.stride(0), most_keys = keys_in_tile(R);
  const float* const lse = lse_KR.const_data_ptr<float>();
  const KeysOf<E> block = block_of<E>(heads, shape.tokens);
  const T *const out = out_TQ.const_data_ptr<T>(), *const d_out = d_out_TQ.const_data_ptr<T>();
  AttentionGradients result{.q_KRS = at::empty({K, padded * G, S}, at::kFloat), .k_KTS = at::empty({K, padded, S}, at::kFloat), .v_KTS = at::empty({K, padded, S}, at::kFloat)};
  float *const dq = result.q_KRS.mutable_data_ptr<float>(), *const dk = result.k_KTS.mutable_data_ptr<float>(), *const dv = result.v_KTS.mutable_data_ptr<float>();

  std::vector<Unit> units;
  std::int64_t first = 0;
  bool is_split = false;
  for (const std::int64_t length : shape.document_lengths) {
    const std::int64_t splits = length > kSplitTokens ? kSplits : 1;
    is_split = is_split || splits > 1;
    const double seen = static_cast<double>(shape.window > 0 ? std::min(length, shape.window) : length);
    for (std::int64_t head = 0; head < K; ++head)
      for (std::int64_t split = 0; split < splits; ++split)
        units.push_back({.first = first, .end = first + length, .head = head, .split = split, .splits = splits, .cost = static_cast<double>(length) * seen / static_cast<double>(splits)});
    first += length;
  }
  // The first split of a document writes to the result, the others to places of their own, which are added in order.
  const at::Tensor more = is_split ? at::empty({kSplits - 1, 2, K, padded, S}, at::kFloat) : at::Tensor();
  float* const others = is_split ? more.mutable_data_ptr<float>() : nullptr;
  const std::int64_t plane = K * padded * S;

  run_balanced(units, [&](const Unit& unit) {
    const std::int64_t length = unit.end - unit.first, room = length + most_keys;
    float* const dqt = scratch(5, R * S);
    // Keys of a tile may reach into the next document, whose gradients another thread may be adding to: so these are our own.
    float *const own_dk = scratch(6, room * S), *const own_dv = scratch(7, room * S);
    std::fill(own_dk, own_dk + room * S, 0.0f);
    std::fill(own_dv, own_dv + room * S, 0.0f);
    const std::int64_t tiles = (length + kQueries - 1) / kQueries;
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      if (!is_of_split(tile, unit.split, unit.splits)) continue;
      const std::int64_t q0 = unit.first + tile * kQueries, q1 = std::min(unit.end, q0 + kQueries);
      const OutputGradients<E> outputs = output_gradients<E>(shape, unit.head, q0, q1 - q0, out, ld_out, d_out, ld_d, lse, padded);
      const Queries<E> queries = queries_of<E>(shape, heads, unit.head, q0, q0, /*backward=*/true);
      const std::int64_t begin = shape.window > 0 ? std::max(unit.first, q0 - shape.window + 1) : unit.first;
      backward_keys(shape, block, unit.head, begin, q1, queries, outputs, dqt, own_dk, own_dv, unit.first, false);
      float* const by_query = scratch(2, R * S);
      transpose(dqt, R, by_query, S, S, R);
      std::memcpy(dq + (unit.head * padded + q0) * G * S, by_query, static_cast<std::size_t>((q1 - q0) * G * S) * sizeof(float));
    }
    float *const to_k = unit.split == 0 ? dk : others + (2 * (unit.split - 1)) * plane, *const to_v = unit.split == 0 ? dv : others + (2 * (unit.split - 1) + 1) * plane;
    const std::int64_t place = (unit.head * padded + unit.first) * S;
    std::memcpy(to_k + place, own_dk, static_cast<std::size_t>(length * S) * sizeof(float));
    std::memcpy(to_v + place, own_dv, static_cast<std::size_t>(length * S) * sizeof(float));
  });
  first = 0;
  for (const std::int64_t length : shape.document_lengths) {
    if (length > kSplitTokens)
      at::parallel_for(0, K, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t head = begin; head < end; ++head)
          for (std::int64_t split = 0; split + 1 < kSplits; ++split) {
            const std::int64_t place = (head * padded + first) * S;
            kernels::add_rows(dk + place, others + 2 * split * plane + place, S, dk + place, length, S);
            kernels::add_rows(dv + place, others + (2 * split + 1) * plane + place, S, dv + place, length, S);
          }
      });
    first += length;
  }
  return result;
}

// The share of a block's keys that some query of a tile may see: begin .. end - 1, empty where begin >= end.
std::pair<std::int64_t, std::int64_t> seen_keys(const AttentionShape& shape, const QueryTile& tile, const KeyBlock& block) {
  const std::int64_t from = shape.window > 0 ? std::max(tile.document, tile.first - shape.window + 1) : tile.document;
  return {std::max(from, block.first), std::min(tile.first + tile.count, block.first + block.count)};
}

// x [S], in place: rotated forwards, or with `back` as a gradient flows: the transposed rotation.
inline void rotate_row(float* x, const float* cosine, const float* sine, std::int64_t pairs, bool back) {
  const float sign = back ? -1.0f : 1.0f;
#pragma omp simd
  for (std::int64_t i = 0; i < pairs; ++i) {
    const float a = x[i], b = x[i + pairs], c = cosine[i], s = sign * sine[i];
    x[i] = a * c - b * s;
    x[i + pairs] = b * c + a * s;
  }
}

template <class T>
ALAMBIC_VECTORISED void transform_rows(const T* from, std::int64_t ld, const float* norm, float epsilon, const float* cosine, const float* sine, std::int64_t pairs,
                                       float scale, float* to, std::int64_t ld_to, std::int64_t rows, std::int64_t S) {
  for (std::int64_t t = 0; t < rows; ++t) {
    const T* const x = from + t * ld;
    float* const y = to + t * ld_to;
    float factor = scale;
    if (norm != nullptr) {
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (std::int64_t i = 0; i < S; ++i) sum += load(x + i) * load(x + i);
      factor /= std::sqrt(sum / static_cast<float>(S) + epsilon);
#pragma omp simd
      for (std::int64_t i = 0; i < S; ++i) y[i] = load(x + i) * factor * norm[i];
    } else {
#pragma omp simd
      for (std::int64_t i = 0; i < S; ++i) y[i] = load(x + i) * factor;
    }
    if (pairs > 0) rotate_row(y, cosine + t * pairs, sine + t * pairs, pairs, false);
  }
}

// d [rows, S] f32, changed on the way: gradients behind the transform become those before it, in `to`.
template <class T>
ALAMBIC_VECTORISED void transform_backward_rows(const T* from, std::int64_t ld, const float* norm, float epsilon, const float* cosine, const float* sine, std::int64_t pairs,
                                                float scale, float* d, std::int64_t ld_d, T* to, std::int64_t ld_to, float* d_norm, std::int64_t rows, std::int64_t S) {
  for (std::int64_t t = 0; t < rows; ++t) {
    float* const g = d + t * ld_d;
    if (pairs > 0) rotate_row(g, cosine + t * pairs, sine + t * pairs, pairs, true);
    T* const result = to + t * ld_to;
    if (norm == nullptr) {
#pragma omp simd
      for (std::int64_t i = 0; i < S; ++i) store(result + i, g[i] * scale);
      continue;
    }
    const T* const x = from + t * ld;
    float sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
    for (std::int64_t i = 0; i < S; ++i) {
      sum += load(x + i) * load(x + i);
      dot += g[i] * norm[i] * load(x + i);
    }
    const float rstd = 1.0f / std::sqrt(sum / static_cast<float>(S) + epsilon), along = dot * rstd * rstd / static_cast<float>(S);
    if (d_norm != nullptr) {
#pragma omp simd
      for (std::int64_t i = 0; i < S; ++i) d_norm[i] += g[i] * scale * load(x + i) * rstd;
    }
#pragma omp simd
    for (std::int64_t i = 0; i < S; ++i) store(result + i, scale * rstd * (g[i] * norm[i] - load(x + i) * along));
  }
}

template <class E, class T>
void split(const AttentionShape& shape, const at::Tensor& qkv_TN, const HeadTransform& transform, AttentionHeads& heads, bool backward) {
  const std::int64_t K = shape.kv_heads, G = shape.group, S = shape.head_size, padded = padded_tokens(shape.tokens), ld = qkv_TN.stride(0);
  const T* const qkv = qkv_TN.const_data_ptr<T>();
  const auto data = [](at::Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr<E>() : nullptr; };
  E *const q = data(heads.q_KRS), *const qt = data(heads.qt_KSR), *const k = data(heads.k_KTS), *const kt = data(heads.kt_KST), *const v = data(heads.v_KTS),
    *const vt = data(heads.vt_KST);
  const std::int64_t blocks = (shape.tokens + kQueries - 1) / kQueries;
  at::parallel_for(0, blocks * K, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t head = unit % K, t0 = unit / K * kQueries, rows = std::min(kQueries, shape.tokens - t0);
      const float *const cosine = transform.cos_TF + t0 * transform.pairs, *const sine = transform.sin_TF + t0 * transform.pairs;
      const std::int64_t pairs = transform.cos_TF == nullptr ? 0 : transform.pairs;
      // What is rounded is made in f32 first.
      const auto transformed = [&](const T* from, const float* norm, float scale, E* to, std::int64_t ld_to) {
        if constexpr (std::is_same_v<E, float>) {
          transform_rows(from, ld, norm, transform.epsilon, cosine, sine, pairs, scale, to, ld_to, rows, S);
        } else {
          float* const wide = scratch(9, kQueries * S);
          transform_rows(from, ld, norm, transform.epsilon, cosine, sine, pairs, scale, wide, S, rows, S);
          kernels::copy_rows(wide, S, to, ld_to, rows, S);
        }
      };
      // Queries: row t * G + g.
      E* const queries = q != nullptr ? q + (head * padded + t0) * G * S : scratch<E>(9, kQueries * G * S);
      for (std::int64_t g = 0; g < G; ++g) transformed(qkv + t0 * ld + (head * G + g) * S, transform.query_norm, transform.scale, queries + g * S, G * S);
      if (qt != nullptr) transpose(queries, S, qt + (head * S * padded + t0) * G, padded * G, rows * G, S);
      E* const keys = k + (head * padded + t0) * S;
      transformed(qkv + t0 * ld + (K * G + head) * S, transform.key_norm, 1.0f, keys, S);
      if (backward) transpose(keys, S, kt + head * S * padded + t0, padded, rows, S);
      E* const values = v != nullptr ? v + (head * padded + t0) * S : scratch<E>(10, kQueries * S);
      kernels::copy_rows(qkv + t0 * ld + (K * G + K + head) * S, ld, values, S, rows, S);
      if (!backward) transpose(values, S, vt + head * S * padded + t0, padded, rows, S);
    }
  });
}

template <class T>
void merge_gradients(const AttentionShape& shape, const at::Tensor& qkv_TN, const HeadTransform& transform, const AttentionGradients& gradients, at::Tensor& d_qkv_TN,
                     const at::Tensor& d_query_norm_S, const at::Tensor& d_key_norm_S) {
  const std::int64_t K = shape.kv_heads, G = shape.group, S = shape.head_size, padded = padded_tokens(shape.tokens), ld = qkv_TN.stride(0), ld_d = d_qkv_TN.stride(0);
  const T* const qkv = qkv_TN.const_data_ptr<T>();
  T* const d_qkv = d_qkv_TN.mutable_data_ptr<T>();
  float *const dq = gradients.q_KRS.mutable_data_ptr<float>(), *const dk = gradients.k_KTS.mutable_data_ptr<float>(), *const dv = gradients.v_KTS.mutable_data_ptr<float>();
  const std::int64_t blocks = (shape.tokens + kQueries - 1) / kQueries;
  // Gradients of the norms' weights: a sum a block and head, added in order afterwards.
  const bool trains_norms = d_query_norm_S.defined() || d_key_norm_S.defined();
  const at::Tensor parts = trains_norms ? at::zeros({2, blocks * K, S}, at::kFloat) : at::Tensor();
  float* const part = trains_norms ? parts.mutable_data_ptr<float>() : nullptr;
  at::parallel_for(0, blocks * K, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t head = unit % K, t0 = unit / K * kQueries, rows = std::min(kQueries, shape.tokens - t0);
      const float *const cosine = transform.cos_TF + t0 * transform.pairs, *const sine = transform.sin_TF + t0 * transform.pairs;
      const std::int64_t pairs = transform.cos_TF == nullptr ? 0 : transform.pairs;
      float *const d_query_norm = d_query_norm_S.defined() ? part + unit * S : nullptr, *const d_key_norm = d_key_norm_S.defined() ? part + (blocks * K + unit) * S : nullptr;
      for (std::int64_t g = 0; g < G; ++g) {
        const std::int64_t column = (head * G + g) * S;
        transform_backward_rows(qkv + t0 * ld + column, ld, transform.query_norm, transform.epsilon, cosine, sine, pairs, transform.scale,
                                dq + ((head * padded + t0) * G + g) * S, G * S, d_qkv + t0 * ld_d + column, ld_d, d_query_norm, rows, S);
      }
      const std::int64_t column = (K * G + head) * S;
      transform_backward_rows(qkv + t0 * ld + column, ld, transform.key_norm, transform.epsilon, cosine, sine, pairs, 1.0f, dk + (head * padded + t0) * S, S,
                              d_qkv + t0 * ld_d + column, ld_d, d_key_norm, rows, S);
      kernels::copy_rows(dv + (head * padded + t0) * S, S, d_qkv + t0 * ld_d + (K * G + K + head) * S, ld_d, rows, S);
    }
  });
  if (d_query_norm_S.defined()) d_query_norm_S.add_(parts[0].sum(0));
  if (d_key_norm_S.defined()) d_key_norm_S.add_(parts[1].sum(0));
}

}  // namespace

namespace {

std::vector<QueryTile> query_tiles(const AttentionShape& shape, std::span<const QueryRun> runs) {
  std::vector<QueryTile> tiles;
  for (const QueryRun& run : runs) {
    std::int64_t document = 0;
    for (const std::int64_t length : shape.document_lengths) {
      const std::int64_t end = std::min(document + length, run.first + run.count);
      for (std::int64_t first = std::max(document, run.first); first < end; first += kQueries)
        tiles.push_back({.row = run.row + first - run.first, .first = first, .count = std::min(kQueries, end - first), .document = document});
      document += length;
    }
  }
  return tiles;
}

}  // namespace

RunningAttention::RunningAttention(const AttentionShape& shape, std::span<const QueryRun> runs, const AttentionHeads& heads)
    : shape_(shape), tiles_(query_tiles(shape, runs)), qt_KSR_(heads.qt_KSR), started_(static_cast<std::size_t>(shape.kv_heads) * tiles_.size(), 0) {
  const std::int64_t R = kQueries * shape.group;
  sums_ = at::empty({shape.kv_heads, static_cast<std::int64_t>(tiles_.size()), (shape.head_size + 2) * R}, at::kFloat);
}

void RunningAttention::add(std::span<const KeyBlock> blocks) {
  const std::int64_t K = shape_.kv_heads, G = shape_.group, S = shape_.head_size, R = kQueries * G, padded = padded_tokens(shape_.tokens);
  const float* const qt = qt_KSR_.const_data_ptr<float>();
  float* const sums = sums_.mutable_data_ptr<float>();
  const auto tiles = static_cast<std::int64_t>(tiles_.size());
  std::vector<Unit> units;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    std::int64_t keys = 0;
    for (const KeyBlock& block : blocks) {
      const auto [begin, end] = seen_keys(shape_, tiles_[static_cast<std::size_t>(tile)], block);
      keys += std::max<std::int64_t>(0, end - begin);
    }
    for (std::int64_t head = 0; keys > 0 && head < K; ++head) units.push_back({.first = tile, .end = tile + 1, .head = head, .cost = static_cast<double>(keys) + 8});
  }
  run_balanced(units, [&](const Unit& unit) {
    const QueryTile& tile = tiles_[static_cast<std::size_t>(unit.first)];
    float *const acc = sums + (unit.head * tiles + unit.first) * (S + 2) * R, *const m = acc + S * R, *const l = m + R;
    char& started = started_[static_cast<std::size_t>(unit.head * tiles + unit.first)];
    if (!started) std::fill(m, m + R, kHidden), std::fill(l, l + R, 0.0f);
    const Queries<float> queries{.q0 = tile.first, .rows = nullptr, .turned = qt + (unit.head * S * padded + tile.row) * G, .ld_turned = padded * G};
    for (const KeyBlock& block : blocks) {
      const auto [begin, end] = seen_keys(shape_, tile, block);
      if (begin >= end) continue;
      forward_tile(shape_, block, unit.head, begin, end, queries, acc, m, l, started != 0);
      started = 1;
    }
  });
}

at::Tensor RunningAttention::finish(at::Tensor& out_TQ) {
  const std::int64_t K = shape_.kv_heads, G = shape_.group, S = shape_.head_size, R = kQueries * G, padded = padded_tokens(shape_.tokens), ld_out = out_TQ.stride(0);
  if (std::find(started_.begin(), started_.end(), 0) != started_.end()) fail(ErrorKind::kBug, "attention: queries that have seen no key, not even their own");
  at::Tensor lse_KR = at::empty({K, padded * G}, at::kFloat);
  float *const lse = lse_KR.mutable_data_ptr<float>(), *const sums = sums_.mutable_data_ptr<float>();
  const auto tiles = static_cast<std::int64_t>(tiles_.size());
  const auto finish = [&](auto* out) {
    at::parallel_for(0, K * tiles, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const QueryTile& tile = tiles_[static_cast<std::size_t>(i % tiles)];
        float* const acc = sums + i * (S + 2) * R;
        finish_tile(shape_, i / tiles, tile.row, tile.count, acc, acc + S * R, acc + (S + 1) * R, out, ld_out, lse, padded);
      }
    });
  };
  if (out_TQ.scalar_type() == at::kFloat) finish(out_TQ.mutable_data_ptr<float>());
  else finish(out_TQ.mutable_data_ptr<BFloat16>());
  return lse_KR;
}

RunningGradients::RunningGradients(const AttentionShape& shape, std::span<const QueryRun> runs, const AttentionHeads& heads, const at::Tensor& out_TQ, const at::Tensor& lse_KR,
                                   const at::Tensor& d_out_TQ)
    : shape_(shape), tiles_(query_tiles(shape, runs)), heads_(heads), out_TQ_(out_TQ), lse_KR_(lse_KR), d_out_TQ_(d_out_TQ) {
  if (out_TQ.scalar_type() != d_out_TQ.scalar_type()) fail(ErrorKind::kBug, "attention: values and gradients of two types");
  q_KRS_ = at::zeros({shape.kv_heads, padded_tokens(shape.tokens) * shape.group, shape.head_size}, at::kFloat);
}

at::Tensor RunningGradients::add(std::span<const KeyBlock> blocks) {
  return out_TQ_.scalar_type() == at::kFloat ? add_typed<float>(blocks) : add_typed<BFloat16>(blocks);
}

template <class T>
at::Tensor RunningGradients::add_typed(std::span<const KeyBlock> blocks) {
  const std::int64_t K = shape_.kv_heads, G = shape_.group, S = shape_.head_size, R = kQueries * G, padded = padded_tokens(shape_.tokens), most_keys = keys_in_tile(R);
  const auto num_blocks = static_cast<std::int64_t>(blocks.size()), tiles = static_cast<std::int64_t>(tiles_.size());
  if (num_blocks == 0) return {};
  const std::int64_t count = blocks.front().count, room = count + most_keys, splits = shape_.tokens > kSplitTokens ? kSplits : 1;
  const float* const lse = lse_KR_.const_data_ptr<float>();
  const T *const out = out_TQ_.const_data_ptr<T>(), *const d_out = d_out_TQ_.const_data_ptr<T>();
  const std::int64_t ld_out = out_TQ_.stride(0), ld_d = d_out_TQ_.stride(0);
  float* const dq = q_KRS_.mutable_data_ptr<float>();
  // Each split has gradients of its own, which are added in order.
  const at::Tensor parts = at::empty({splits, num_blocks, 2, K, count, S}, at::kFloat);
  float* const part = parts.mutable_data_ptr<float>();
  std::vector<Unit> units;
  for (std::int64_t head = 0; head < K; ++head)
    for (std::int64_t split = 0; split < splits; ++split) units.push_back({.first = 0, .end = tiles, .head = head, .split = split, .splits = splits, .cost = 1});
  run_balanced(units, [&](const Unit& unit) {
    // Keys of a tile may reach behind their block: so there is room.
    const std::int64_t own = num_blocks * room * S;
    float *const own_dk = scratch(6, own), *const own_dv = scratch(7, own), *const dqt = scratch(5, R * S);
    std::fill(own_dk, own_dk + own, 0.0f);
    std::fill(own_dv, own_dv + own, 0.0f);
    for (std::int64_t number = 0; number < tiles; ++number) {
      if (!is_of_split(number, unit.split, unit.splits)) continue;
      const QueryTile& tile = tiles_[static_cast<std::size_t>(number)];
      const auto sees = [&](const KeyBlock& block) {
        const auto [begin, end] = seen_keys(shape_, tile, block);
        return begin < end;
      };
      if (std::none_of(blocks.begin(), blocks.end(), sees)) continue;
      const OutputGradients<float> outputs = output_gradients<float>(shape_, unit.head, tile.row, tile.count, out, ld_out, d_out, ld_d, lse, padded);
      const std::int64_t row = (unit.head * padded + tile.row) * G;
      const Queries<float> queries = queries_of<float>(shape_, heads_, unit.head, tile.row, tile.first, /*backward=*/true);
      bool goes_on = false;
      for (std::int64_t i = 0; i < num_blocks; ++i) {
        const KeyBlock& block = blocks[static_cast<std::size_t>(i)];
        const auto [begin, end] = seen_keys(shape_, tile, block);
        if (begin >= end) continue;
        backward_keys(shape_, block, unit.head, begin, end, queries, outputs, dqt, own_dk + i * room * S, own_dv + i * room * S, block.first, goes_on);
        goes_on = true;
      }
      float* const by_query = scratch(2, R * S);
      transpose(dqt, R, by_query, S, S, R);
      kernels::add_rows(dq + row * S, by_query, S, dq + row * S, tile.count * G, S);
    }
    for (std::int64_t i = 0; i < num_blocks; ++i) {
      float* const to = part + (unit.split * num_blocks + i) * 2 * K * count * S + unit.head * count * S;
      std::memcpy(to, own_dk + i * room * S, static_cast<std::size_t>(count * S) * sizeof(float));
      std::memcpy(to + K * count * S, own_dv + i * room * S, static_cast<std::size_t>(count * S) * sizeof(float));
    }
  });
  at::Tensor sum = parts[0];
  for (std::int64_t split = 1; split < splits; ++split) sum.add_(parts[split]);
  return sum;
}

void transpose_heads(const float* from, std::int64_t heads, std::int64_t tokens, std::int64_t S, float* to) {
  at::parallel_for(0, heads, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t head = begin; head < end; ++head) transpose(from + head * tokens * S, S, to + head * tokens * S, tokens, tokens, S);
  });
}

std::int64_t padded_tokens(std::int64_t tokens) { return (tokens + kKeyRound - 1) / kKeyRound * kKeyRound + kQueries; }

AttentionHeads make_heads(const AttentionShape& shape, bool backward, at::ScalarType compute_type) {
  const std::int64_t K = shape.kv_heads, G = shape.group, S = shape.head_size, T = shape.tokens, padded = padded_tokens(T);
  const bool narrow = compute_type == at::kBFloat16 && has_bf16_tiles();
  const at::ScalarType type = narrow ? at::kBFloat16 : at::kFloat;
  const auto by_token = [&](std::int64_t rows) {
    at::Tensor made = at::empty({K, padded * rows, S}, type);
    made.narrow(1, T * rows, (padded - T) * rows).zero_();
    return made;
  };
  const auto turned = [&](std::int64_t rows) {
    at::Tensor made = at::empty({K, S, padded * rows}, type);
    made.narrow(2, T * rows, (padded - T) * rows).zero_();
    return made;
  };
  AttentionHeads heads{.q_KRS = {}, .qt_KSR = {}, .k_KTS = by_token(1), .kt_KST = {}, .v_KTS = {}, .vt_KST = {}};
  if (narrow || backward) heads.q_KRS = by_token(G);
  if (!narrow) heads.qt_KSR = turned(G);
  if (backward) heads.kt_KST = turned(1), heads.v_KTS = by_token(1);
  else heads.vt_KST = turned(1);
  return heads;
}

namespace {

bool is_narrow(const AttentionHeads& heads) { return heads.k_KTS.scalar_type() == at::kBFloat16; }

}  // namespace

at::Tensor attention_forward(const AttentionShape& shape, const AttentionHeads& heads, at::Tensor& out_TQ) {
  if (is_narrow(heads)) return forward<BFloat16, BFloat16>(shape, heads, out_TQ);
  return out_TQ.scalar_type() == at::kFloat ? forward<float, float>(shape, heads, out_TQ) : forward<float, BFloat16>(shape, heads, out_TQ);
}

AttentionGradients attention_backward(const AttentionShape& shape, const AttentionHeads& heads, const at::Tensor& out_TQ, const at::Tensor& lse_KR, const at::Tensor& d_out_TQ) {
  if (out_TQ.scalar_type() != d_out_TQ.scalar_type()) fail(ErrorKind::kBug, "attention: values and gradients of two types");
  if (is_narrow(heads)) return backward<BFloat16, BFloat16>(shape, heads, out_TQ, lse_KR, d_out_TQ);
  return out_TQ.scalar_type() == at::kFloat ? backward<float, float>(shape, heads, out_TQ, lse_KR, d_out_TQ) : backward<float, BFloat16>(shape, heads, out_TQ, lse_KR, d_out_TQ);
}

void split_heads(const AttentionShape& shape, const at::Tensor& qkv_TN, const HeadTransform& transform, AttentionHeads& heads, bool backward) {
  if (is_narrow(heads)) split<BFloat16, BFloat16>(shape, qkv_TN, transform, heads, backward);
  else if (qkv_TN.scalar_type() == at::kFloat) split<float, float>(shape, qkv_TN, transform, heads, backward);
  else split<float, BFloat16>(shape, qkv_TN, transform, heads, backward);
}

void merge_head_gradients(const AttentionShape& shape, const at::Tensor& qkv_TN, const HeadTransform& transform, const AttentionGradients& gradients, at::Tensor& d_qkv_TN,
                          const at::Tensor& d_query_norm_S, const at::Tensor& d_key_norm_S) {
  if (qkv_TN.scalar_type() == at::kFloat) merge_gradients<float>(shape, qkv_TN, transform, gradients, d_qkv_TN, d_query_norm_S, d_key_norm_S);
  else merge_gradients<BFloat16>(shape, qkv_TN, transform, gradients, d_qkv_TN, d_query_norm_S, d_key_norm_S);
}

}  // namespace alambic::models
