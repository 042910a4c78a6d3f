// SPDX-License-Identifier: Apache-2.0
#pragma once
// Keys and values of what documents have said so far, for generation. Only for use without gradients.
// Letters: B = documents, K = key and value heads, C = capacity, S = head size, N = documents of a pass, T = tokens of a pass, H = query heads.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <vector>

#include "models/attention.h"

namespace alambic::models {

struct Decoder;

/// Keys are stored rotated, in the compute type. Room that is not used yet is 0, as attention multiplies it by 0.
struct KeyValueCache {
  std::vector<at::Tensor> keys_BKCS, values_BKCS;  // one pair a layer
  std::vector<std::int64_t> lengths_B;             // tokens kept of each document

  KeyValueCache(const Decoder& decoder, std::int64_t num_documents, std::int64_t capacity);
  std::int64_t capacity() const { return keys_BKCS[0].size(2); }
  /// Grows, at least to twice the capacity, where a document of `tokens` would not fit.
  void make_room(std::int64_t tokens);
  /// Drops all documents but these.
  void keep_only(const std::vector<std::int64_t>& rows);
};

/// One forward pass over the newest tokens of some documents of a cache: all tokens of documents of which it has none yet, or
/// exactly one token of each. Error(kBug): anything else, or no room.
class CachedPass {
 public:
  /// rows_N: which of the cache's documents, rising; new_lengths_N: how many tokens of each.
  CachedPass(KeyValueCache& cache, const std::vector<std::int64_t>& rows_N, const std::vector<std::int64_t>& new_lengths_N);
  /// Keeps the layer's keys and values and lets the queries see all that their document has: [T, H S], as Documents::attend.
  at::Tensor attend(std::size_t layer, const at::Tensor& q_THS, const at::Tensor& k_TKS, const at::Tensor& v_TKS, Documents& documents, double scale, std::int64_t window, double soft_cap = 0);
  /// After the last layer.
  void finish();

 private:
  KeyValueCache& cache_;
  std::vector<std::int64_t> rows_, new_lengths_;
  at::Tensor rows_N_, places_N_;  // i64; where the new token of each document goes
  std::int64_t longest_ = 0;      // tokens of the longest document, the new ones included
  bool first_ = false, alike_ = false;
  std::map<std::int64_t, at::Tensor> masks_;  // window -> additive [N, 1, 1, longest]

  at::Tensor attend_to_one_more(at::Tensor& keys_BKCS, at::Tensor& values_BKCS, const at::Tensor& q_NHS, const at::Tensor& k_NKS, const at::Tensor& v_NKS, double scale, std::int64_t window,
                                double soft_cap);
};

}  // namespace alambic::models
