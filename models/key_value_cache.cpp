// SPDX-License-Identifier: Apache-2.0
#include "models/key_value_cache.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

#include "core/error.h"
#include "models/decoder.h"

namespace alambic::models {

KeyValueCache::KeyValueCache(const Decoder& decoder, std::int64_t num_documents, std::int64_t capacity) : lengths_B(static_cast<std::size_t>(num_documents), 0) {
  for (std::size_t layer = 0; layer < decoder.blocks.size(); ++layer)
    for (auto* list : {&keys_BKCS, &values_BKCS}) list->push_back(at::zeros({num_documents, decoder.config.num_kv_heads, capacity, decoder.config.head_size}, at::TensorOptions(decoder.compute_type()).device(decoder.embedding_VD.device())));
}

void KeyValueCache::make_room(std::int64_t tokens) {
  const std::int64_t old_capacity = capacity();
  if (tokens <= old_capacity) return;
  for (auto* list : {&keys_BKCS, &values_BKCS})
    for (at::Tensor& cache : *list) {
      const at::Tensor wider = at::zeros({cache.size(0), cache.size(1), std::max(tokens, 2 * old_capacity), cache.size(3)}, cache.options());
      wider.narrow(2, 0, old_capacity).copy_(cache);
      cache = wider;
    }
}

void KeyValueCache::keep_only(const std::vector<std::int64_t>& rows) {
  const at::Tensor index = at::tensor(rows, at::kLong).to(keys_BKCS[0].device());
  for (auto* list : {&keys_BKCS, &values_BKCS})
    for (at::Tensor& cache : *list) cache = cache.index_select(0, index);
  std::vector<std::int64_t> lengths;
  for (const std::int64_t row : rows) lengths.push_back(lengths_B[static_cast<std::size_t>(row)]);
  lengths_B = std::move(lengths);
}

CachedPass::CachedPass(KeyValueCache& cache, const std::vector<std::int64_t>& rows_N, const std::vector<std::int64_t>& new_lengths_N)
    : cache_(cache), rows_(rows_N), new_lengths_(new_lengths_N), rows_N_(at::tensor(rows_N, at::kLong).to(cache.keys_BKCS[0].device())) {
  if (rows_.size() != new_lengths_.size()) fail(ErrorKind::kBug, rows_.size(), " documents of a key-value cache with ", new_lengths_.size(), " documents of a pass");
  std::vector<std::int64_t> places;
  bool more = false;
  alike_ = true;
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    if (rows_[i] < 0 || rows_[i] >= static_cast<std::int64_t>(cache.lengths_B.size())) fail(ErrorKind::kBug, "document ", rows_[i], " of a key-value cache of ", cache.lengths_B.size());
    if (i > 0 && rows_[i] <= rows_[i - 1]) fail(ErrorKind::kBug, "document ", rows_[i], " of a key-value cache behind ", rows_[i - 1], "; they must rise");
    const std::int64_t kept = cache.lengths_B[static_cast<std::size_t>(rows_[i])];
    (kept == 0 ? first_ : more) = true;
    if (kept > 0 && new_lengths_[i] != 1) fail(ErrorKind::kBug, new_lengths_[i], " new tokens behind ", kept, " of a key-value cache; 1 at a time");
    alike_ = alike_ && (places.empty() || places.back() == kept);
    places.push_back(kept);
    longest_ = std::max(longest_, kept + new_lengths_[i]);
  }
  if (first_ && more) fail(ErrorKind::kBug, "a pass over documents of which some are new to the key-value cache");
  if (longest_ > cache.capacity()) fail(ErrorKind::kBug, "the key-value cache holds ", cache.capacity(), " tokens, ", longest_, " are needed");
  places_N_ = at::tensor(places, at::kLong).to(rows_N_.device());
}

at::Tensor CachedPass::attend(std::size_t layer, const at::Tensor& q_THS, const at::Tensor& k_TKS, const at::Tensor& v_TKS, Documents& documents, double scale, std::int64_t window,
                              double soft_cap) {
  at::Tensor &keys_BKCS = cache_.keys_BKCS[layer], &values_BKCS = cache_.values_BKCS[layer];
  if (!first_) return attend_to_one_more(keys_BKCS, values_BKCS, q_THS, k_TKS, v_TKS, scale, window, soft_cap);
  std::int64_t first = 0;
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    const auto keep = [&](at::Tensor& cache_BKCS, const at::Tensor& x_TKS) {
      cache_BKCS.select(0, rows_[i]).narrow(1, 0, new_lengths_[i]).copy_(x_TKS.narrow(0, first, new_lengths_[i]).transpose(0, 1));
    };
    keep(keys_BKCS, k_TKS), keep(values_BKCS, v_TKS);
    first += new_lengths_[i];
  }
  return documents.attend(q_THS, k_TKS, v_TKS, scale, window, soft_cap);
}

// The query heads of one key head stand where other tokens would: no repeated keys. Documents of one length need no mask.
at::Tensor CachedPass::attend_to_one_more(at::Tensor& keys_BKCS, at::Tensor& values_BKCS, const at::Tensor& q_NHS, const at::Tensor& k_NKS, const at::Tensor& v_NKS, double scale,
                                          std::int64_t window, double soft_cap) {
  const std::int64_t N = q_NHS.size(0), K = k_NKS.size(1), S = q_NHS.size(2);
  const std::int64_t begin = alike_ && window > 0 ? std::max<std::int64_t>(0, longest_ - window) : 0;
  const at::Tensor place = places_N_.view({N, 1, 1, 1}).expand({N, K, 1, S});
  const auto with = [&](at::Tensor& cache_BKCS, const at::Tensor& x_NKS) {
    if (N == cache_BKCS.size(0)) return cache_BKCS.scatter_(2, place, x_NKS.unsqueeze(2)).narrow(2, begin, longest_ - begin);  // all of them, in order
    const at::Tensor chosen_NKCS = cache_BKCS.index_select(0, rows_N_).scatter_(2, place, x_NKS.unsqueeze(2));
    cache_BKCS.index_copy_(0, rows_N_, chosen_NKCS);
    return chosen_NKCS.narrow(2, begin, longest_ - begin);
  };
  std::optional<at::Tensor> mask;
  if (!alike_) {
    at::Tensor& made = masks_[window];
    if (!made.defined()) {
      const at::Tensor distance = places_N_.unsqueeze(1) - at::arange(longest_, places_N_.options()).unsqueeze(0);
      at::Tensor hidden = distance < 0;
      if (window > 0) hidden = hidden.logical_or(distance >= window);
      made = at::zeros({N, longest_}, q_NHS.options()).masked_fill_(hidden, -std::numeric_limits<double>::infinity()).view({N, 1, 1, longest_});
    }
    mask = made;
  }
  const at::Tensor k_NKLS = with(keys_BKCS, k_NKS), v_NKLS = with(values_BKCS, v_NKS);
  if (soft_cap > 0) return soft_capped_attention(q_NHS.reshape({N, K, -1, S}), k_NKLS, v_NKLS, mask.value_or(at::Tensor()), scale, soft_cap).reshape({N, -1});
  return at::scaled_dot_product_attention(q_NHS.reshape({N, K, -1, S}), k_NKLS, v_NKLS, mask, 0, false, scale).reshape({N, -1});
}

void CachedPass::finish() {
  for (std::size_t i = 0; i < rows_.size(); ++i) cache_.lengths_B[static_cast<std::size_t>(rows_[i])] += new_lengths_[i];
}

}  // namespace alambic::models
