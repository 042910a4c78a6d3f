// SPDX-License-Identifier: Apache-2.0
// Letters: B = documents that go on, T = tokens of a pass, H = query heads, K = key and value heads, G = query heads of one key head,
// S = head size, C = capacity of a cache, L = tokens of the longest document, D = hidden size, V = vocabulary.
#include "models/generate_many.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "core/error.h"
#include "models/attention.h"
#include "models/norm.h"
#include "models/rope.h"
#include "models/token_rows.h"

namespace alambic::models {
namespace {

constexpr std::int64_t kFirstRoom = 64;  // new tokens that a cache has room for before it grows

// A document that is being continued.
struct Document {
  std::size_t number = 0;         // among the prompts
  std::vector<std::int64_t> ids;  // prompt and what was drawn
  std::int64_t cached = 0;        // tokens whose keys and values are in the caches
};

// Keys and values of all documents: [B, K, C, S] a layer. Room that is not used yet is 0, as attention multiplies it by 0.
struct Caches {
  std::vector<at::Tensor> keys_BKCS, values_BKCS;

  void make_room(const Decoder& decoder, std::int64_t documents, std::int64_t tokens) {
    const std::int64_t capacity = keys_BKCS.empty() ? 0 : keys_BKCS[0].size(2);
    if (tokens <= capacity) return;
    const std::int64_t more = capacity == 0 ? tokens + kFirstRoom : std::max(tokens, 2 * capacity);
    const auto grown = [&](const at::Tensor& old) {
      const at::Tensor wider = at::zeros({documents, decoder.config.num_kv_heads, more, decoder.config.head_size}, decoder.compute_type());
      if (old.defined()) wider.narrow(2, 0, capacity).copy_(old);
      return wider;
    };
    for (auto* list : {&keys_BKCS, &values_BKCS}) {
      list->resize(decoder.blocks.size());
      for (at::Tensor& cache : *list) cache = grown(cache);
    }
  }

  void keep(const at::Tensor& rows) {
    for (auto* list : {&keys_BKCS, &values_BKCS})
      for (at::Tensor& cache : *list) cache = cache.index_select(0, rows);
  }
};

// One forward pass over the newest tokens of some documents: all of them for each, or exactly one for each.
class Pass {
 public:
  Pass(const Decoder& decoder, Caches& caches, std::vector<Document>& documents, const std::vector<std::int64_t>& rows)
      : decoder_(decoder), caches_(caches), rows_(rows), groups_(lengths_of(documents, rows)), rows_B_(at::tensor(rows, at::kLong)) {
    std::vector<std::int64_t> tokens, positions, last;
    for (const std::int64_t row : rows) {
      Document& document = documents[static_cast<std::size_t>(row)];
      const auto total = static_cast<std::int64_t>(document.ids.size());
      whole_ = whole_ || document.cached == 0;
      for (std::int64_t t = document.cached; t < total; ++t) tokens.push_back(document.ids[static_cast<std::size_t>(t)]), positions.push_back(t);
      last.push_back(static_cast<std::int64_t>(tokens.size()) - 1);
      lengths_.push_back(total - document.cached);
      longest_ = std::max(longest_, total);
      document.cached = total;
    }
    tokens_T_ = at::tensor(tokens, at::kLong), positions_T_ = at::tensor(positions, at::kLong), last_B_ = at::tensor(last, at::kLong);
  }

  // Final, normalised hidden states of each document's last token.
  at::Tensor hidden_BD() {
    const ModelConfig& config = decoder_.config;
    at::Tensor h_TD = embedded_TD(decoder_.embedding_VD, decoder_.token_rows_ND, decoder_.token_row_ids, tokens_T_, config.pad_id);
    if (config.family->scale_embedding) {  // rounded as Decoder::hidden_TD rounds it
      const double scale = std::sqrt(static_cast<double>(config.hidden_size));
      h_TD = h_TD * (decoder_.embedding_VD.scalar_type() == at::kBFloat16 ? static_cast<double>(at::BFloat16(static_cast<float>(scale))) : scale);
    }
    const at::ScalarType type = decoder_.compute_type();
    rope_ = rotary_table(config.rope, positions_T_, lengths_);
    if (config.family->local_rope_theta != 0) local_rope_ = rotary_table(config.local_rope, positions_T_, lengths_);
    for (std::size_t layer = 0; layer < decoder_.blocks.size(); ++layer) {
      const Block& block = decoder_.blocks[layer];
      const auto normed = [&](Slot slot, const at::Tensor& x_TD, at::ScalarType as) { return rms_norm(x_TD, block.norms.at(slot), config.family->norm_weight_offset, config.norm_epsilon, as); };
      at::Tensor y_TD = attention(block, layer, normed(Slot::kAttentionNorm, h_TD, type));
      if (block.norms.contains(Slot::kAfterAttentionNorm)) y_TD = normed(Slot::kAfterAttentionNorm, y_TD, at::kFloat);
      h_TD = h_TD + y_TD;
      y_TD = feed_forward(block, normed(Slot::kMlpNorm, h_TD, type));
      if (block.norms.contains(Slot::kAfterMlpNorm)) y_TD = normed(Slot::kAfterMlpNorm, y_TD, at::kFloat);
      h_TD = h_TD + y_TD;
    }
    return rms_norm(h_TD.index_select(0, last_B_), decoder_.final_norm_D, config.family->norm_weight_offset, config.norm_epsilon, type);
  }

 private:
  static std::vector<std::int64_t> lengths_of(const std::vector<Document>& documents, const std::vector<std::int64_t>& rows) {
    std::vector<std::int64_t> lengths;
    for (const std::int64_t row : rows) lengths.push_back(static_cast<std::int64_t>(documents[static_cast<std::size_t>(row)].ids.size()) - documents[static_cast<std::size_t>(row)].cached);
    return lengths;
  }

  at::Tensor attention(const Block& block, std::size_t layer, const at::Tensor& x_TD) {
    const ModelConfig& config = decoder_.config;
    const LayerConfig& kind = config.layers[layer];
    const std::int64_t queries = config.num_heads * config.head_size, keys = config.num_kv_heads * config.head_size;
    const auto by_head = [&](const at::Tensor& x) { return x.unflatten(1, {-1, config.head_size}); };
    at::Tensor q_THS, k_TKS, v_TKS;
    if (block.linears.contains(Slot::kQueryKeyValue)) {
      const at::Tensor all = block.linears.at(Slot::kQueryKeyValue)(x_TD, 0);
      q_THS = by_head(all.narrow(1, 0, queries)), k_TKS = by_head(all.narrow(1, queries, keys)), v_TKS = by_head(all.narrow(1, queries + keys, keys));
    } else {
      q_THS = by_head(block.linears.at(Slot::kQuery)(x_TD, 0)), k_TKS = by_head(block.linears.at(Slot::kKey)(x_TD, 0)), v_TKS = by_head(block.linears.at(Slot::kValue)(x_TD, 0));
    }
    for (const auto& [slot, heads] : {std::pair{Slot::kQueryNorm, &q_THS}, std::pair{Slot::kKeyNorm, &k_TKS}})
      if (const auto norm = block.norms.find(slot); norm != block.norms.end())
        *heads = rms_norm(*heads, norm->second, config.family->norm_weight_offset, config.norm_epsilon, decoder_.compute_type());
    if (kind.use_rope) {
      const RotaryTable& table = kind.local_rope ? local_rope_ : rope_;
      q_THS = rotate(q_THS, table), k_TKS = rotate(k_TKS, table);
    }
    at::Tensor &k_BKCS = caches_.keys_BKCS[layer], &v_BKCS = caches_.values_BKCS[layer];
    at::Tensor y_TQ;
    if (whole_) {
      std::int64_t first = 0;
      for (std::size_t i = 0; i < rows_.size(); ++i) {
        const auto store = [&](at::Tensor& cache_BKCS, const at::Tensor& x_TKS) {
          cache_BKCS.select(0, rows_[i]).narrow(1, 0, lengths_[i]).copy_(x_TKS.narrow(0, first, lengths_[i]).transpose(0, 1));
        };
        store(k_BKCS, k_TKS), store(v_BKCS, v_TKS);
        first += lengths_[i];
      }
      y_TQ = groups_.attend(q_THS, k_TKS, v_TKS, config.attention_scale, kind.window);
    } else {
      y_TQ = attend_to_caches(q_THS, k_TKS, v_TKS, k_BKCS, v_BKCS, kind.window);
    }
    return block.linears.at(Slot::kOutput)(y_TQ, 0);
  }

  // One token of each document, put into its cache, sees all that is in there. As in attend_to_cache(), the query heads of one key
  // head stand where other tokens would.
  at::Tensor attend_to_caches(const at::Tensor& q_BHS, const at::Tensor& k_BKS, const at::Tensor& v_BKS, at::Tensor& k_BKCS, at::Tensor& v_BKCS, std::int64_t window) {
    const std::int64_t B = q_BHS.size(0), K = k_BKS.size(1), S = q_BHS.size(2);
    const bool all = B == k_BKCS.size(0);  // else some documents are in another pass
    const at::Tensor at_B = positions_T_.view({B, 1, 1, 1}).expand({B, K, 1, S});
    const auto with = [&](at::Tensor& cache_BKCS, const at::Tensor& x_BKS) {
      if (all) return cache_BKCS.scatter_(2, at_B, x_BKS.unsqueeze(2)).narrow(2, 0, longest_);
      const at::Tensor chosen_BKCS = cache_BKCS.index_select(0, rows_B_).scatter_(2, at_B, x_BKS.unsqueeze(2));
      cache_BKCS.index_copy_(0, rows_B_, chosen_BKCS);
      return chosen_BKCS.narrow(2, 0, longest_);
    };
    at::Tensor& mask_B11L = masks_[window];
    if (!mask_B11L.defined()) {
      const at::Tensor distance = positions_T_.unsqueeze(1) - at::arange(longest_).unsqueeze(0);
      at::Tensor hidden = distance < 0;
      if (window > 0) hidden = hidden.logical_or(distance >= window);
      mask_B11L = at::zeros({B, longest_}, q_BHS.scalar_type()).masked_fill_(hidden, -std::numeric_limits<double>::infinity()).view({B, 1, 1, longest_});
    }
    const at::Tensor k_BKLS = with(k_BKCS, k_BKS), v_BKLS = with(v_BKCS, v_BKS);
    return at::scaled_dot_product_attention(q_BHS.reshape({B, K, -1, S}), k_BKLS, v_BKLS, mask_B11L, 0, false, decoder_.config.attention_scale).reshape({B, -1});
  }

  at::Tensor feed_forward(const Block& block, const at::Tensor& x_TD) const {
    const ModelConfig& config = decoder_.config;
    at::Tensor gate_TF, up_TF;
    if (block.linears.contains(Slot::kGateUp)) {
      const at::Tensor both = block.linears.at(Slot::kGateUp)(x_TD, 0);
      gate_TF = both.narrow(1, 0, config.intermediate_size), up_TF = both.narrow(1, config.intermediate_size, config.intermediate_size);
    } else {
      gate_TF = block.linears.at(Slot::kGate)(x_TD, 0), up_TF = block.linears.at(Slot::kUp)(x_TD, 0);
    }
    return block.linears.at(Slot::kDown)((config.gelu_tanh ? at::gelu(gate_TF, "tanh") : at::silu(gate_TF)) * up_TF, 0);
  }

  const Decoder& decoder_;
  Caches& caches_;
  const std::vector<std::int64_t>& rows_;  // of the documents, in the caches
  Documents groups_;
  at::Tensor rows_B_, tokens_T_, positions_T_, last_B_;
  std::vector<std::int64_t> lengths_;
  std::int64_t longest_ = 0;
  bool whole_ = false;
  RotaryTable rope_, local_rope_;
  std::map<std::int64_t, at::Tensor> masks_;  // window -> additive
};

}  // namespace

std::vector<Continuation> generate_many(const Decoder& decoder, const std::vector<Prompt>& prompts, const Sampling& sampling, const std::vector<std::int64_t>& stop_ids, bool log_probabilities) {
  const at::NoGradGuard constant;
  check(sampling);
  std::vector<Continuation> drawn(prompts.size());
  std::vector<Document> going;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    if (prompts[i].ids.empty()) fail(ErrorKind::kUsage, "prompt ", i, " is empty", Remedy{"give at least one token"});
    check_ids(decoder, prompts[i].ids);
    going.push_back({.number = i, .ids = prompts[i].ids});
  }
  const auto limit = [&](std::size_t number) { return prompts[number].max_new_tokens > 0 ? prompts[number].max_new_tokens : sampling.max_new_tokens; };
  const std::int64_t long_from = decoder.config.rope.long_from;
  Caches caches;
  for (std::uint64_t step = 0; !going.empty(); ++step) {
    // Documents whose keys are made (again) as a whole, and those of which one token is new.
    std::vector<std::int64_t> whole, single;
    std::int64_t longest = 0;
    for (std::size_t row = 0; row < going.size(); ++row) {
      Document& document = going[row];
      const auto length = static_cast<std::int64_t>(document.ids.size());
      if (long_from > 0 && document.cached <= long_from && length > long_from) document.cached = 0;  // LongRoPE rotates all keys anew
      (document.cached == 0 ? whole : single).push_back(static_cast<std::int64_t>(row));
      longest = std::max(longest, length);
    }
    caches.make_room(decoder, static_cast<std::int64_t>(going.size()), longest);

    std::vector<std::int64_t> still;
    for (const std::vector<std::int64_t>& rows : {whole, single}) {
      if (rows.empty()) continue;
      const at::Tensor logits_BV = decoder.logits_TV(Pass(decoder, caches, going, rows).hidden_BD());
      at::Tensor total_B;
      if (log_probabilities) total_B = at::logsumexp(logits_BV, {1});
      for (std::size_t i = 0; i < rows.size(); ++i) {
        Document& document = going[static_cast<std::size_t>(rows[i])];
        Continuation& continuation = drawn[document.number];
        const at::Tensor logits_V = logits_BV[static_cast<std::int64_t>(i)];
        const std::int64_t id = next_id(logits_V, document.ids, sampling, prompts[document.number].seed, step);
        continuation.ids.push_back(id), document.ids.push_back(id);
        if (log_probabilities) continuation.sum_log_probability += logits_V[id].item<double>() - total_B[static_cast<std::int64_t>(i)].item<double>();
        continuation.stopped = std::find(stop_ids.begin(), stop_ids.end(), id) != stop_ids.end();
        if (!continuation.stopped && static_cast<std::int64_t>(continuation.ids.size()) < limit(document.number)) still.push_back(rows[i]);
      }
    }
    if (still.size() == going.size() || still.empty()) {
      if (still.empty()) break;
      continue;
    }
    std::sort(still.begin(), still.end());
    caches.keep(at::tensor(still, at::kLong));
    std::vector<Document> left;
    for (const std::int64_t row : still) left.push_back(std::move(going[static_cast<std::size_t>(row)]));
    going = std::move(left);
  }
  return drawn;
}

}  // namespace alambic::models
