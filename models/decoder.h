// SPDX-License-Identifier: Apache-2.0
#pragma once
// A decoder-only transformer as plain tensors. Which parts exist is the family's data; forward has no family names.
// Letters: T = tokens, D = hidden size, V = vocabulary.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "models/config.h"
#include "models/linear.h"
#include "models/shared_row.h"

namespace alambic::models {

struct KeyValueCache;  // models/key_value_cache.h
class ShardedBlocks;    // models/sharded_blocks.h

struct Block {
  std::map<Slot, Linear> linears;      // kQuery .. kDown, as the family has them
  std::map<Slot, at::Tensor> norms;    // kAttentionNorm ..., f32 [size]
  std::map<Slot, at::Tensor> grouped;  // first slot of a group -> its weights in one tensor (models/fused_blocks.h)
};

/// What the fused blocks keep between forward and backward; the rest is computed again. Less memory, more time, the same bits.
enum class Keep {
  kAll,     // "store"
  kNoMlp,   // "mlp": the gate and up projections are computed again
  kInputs,  // "block": only each block's input is kept
};

/// Where in a forward pass an Observer is shown a tensor. [T, D] unless said otherwise.
enum class Place {
  kBlockInput,      // the residual stream before a block, f32
  kAttentionInput,  // its normalised form, which the attention's projections read
  kHeads,           // what the query heads give, side by side, before the output projection: [T, heads x head size]
  kMlpInput,        // the normalised form that the feed-forward's projections read
  kNeurons,         // the gated intermediate before the down projection: [T, intermediate size]
  kBlockOutput,     // the residual stream behind the block, f32
};
using Observer = std::function<void(Place place, std::size_t layer, const at::Tensor& x)>;

/// What a forward pass reads besides the weights.
struct Input {
  at::Tensor tokens_T;     // i64; this and the next in a processor's memory, wherever the decoder is
  at::Tensor positions_T;  // i64
  std::vector<std::int64_t> document_lengths;  // attention stays inside a document; their sum is T
  std::uint64_t dropout_seed = 0;              // 0 = evaluating
  KeyValueCache* cache = nullptr;              // generation: keys and values of earlier tokens; the tokens' own are added
  std::vector<std::int64_t> cache_rows = {};   // which of the cache's documents these are
  double neftune_alpha = 0;                    // noise on embeddings (models/neftune.h); only with a dropout_seed
  /// Where set, the tokens and positions are this rank's own of a row that several share, and document_lengths are the whole row's
  /// (SharedRow::document_lengths). Only with the fused blocks, and collective.
  const SharedRow* shared = nullptr;
  const Observer* observer = nullptr;          // is shown each block's tensors as they are made; such a pass is never fused
};

/// A tensor of the decoder with its published name ("model.layers.0.self_attn.q_proj.weight").
struct NamedTensor {
  std::string name;
  at::Tensor* tensor;
};

/// A Linear with its published module path ("model.layers.0.self_attn.q_proj"), to which adapters are attached.
struct NamedLinear {
  std::string path;
  Slot slot;
  std::int64_t layer;  // -1: the head
  Linear* linear;
};

struct Decoder {
  ModelConfig config;
  at::Tensor embedding_VD;  // in the compute type, or in the 16 bits of its file: rows are widened as they are looked up
  std::vector<Block> blocks;
  at::Tensor final_norm_D;
  Linear head;             // where tied, head.weight_OI is the same tensor object as embedding_VD, or head.quantized holds it as it is stored
  bool head_tied = false;  // false after training made the two differ
  bool fused = false;      // set by use_fused_blocks(): passes without a key-value cache take the fused path
  Keep keep = Keep::kAll;
  Context context;         // whom rows are shared with, where a recipe shares them
  /// Rows of the embedding that are trained apart from the frozen rest (models/token_rows.h): f32 [N, D], and which they are.
  /// A tied head uses the same tensor (head.token_rows_ND); undefined and empty: there are none.
  at::Tensor token_rows_ND;
  std::vector<std::int64_t> token_row_ids;
  /// Where ranks share the blocks' frozen weights: a pass is then collective, and ends with its end_pass().
  std::shared_ptr<ShardedBlocks> shards = {};

  /// Final, normalised hidden states, in the compute type; differentiable where something is trained. The residual stream,
  /// norms, rotation and softmax are f32; nothing is computed backwards below the lowest tensor that trains.
  at::Tensor hidden_TD(const Input& input) const;
  /// Head on (a choice of) rows; f32. Losses call the head in chunks instead (train/cross_entropy.h).
  at::Tensor logits_TV(const at::Tensor& hidden_TD) const;

  std::vector<NamedTensor> tensors();    // base weights in a fixed order; a tied head and quantised weights are not listed
  std::vector<NamedLinear> linears();    // all Linears, the head last
  at::ScalarType compute_type() const;   // of the Linear weights
};

/// An all-undefined decoder of the config's structure, for a loader to fill. expected_shapes gives the name and the shape
/// of each of its tensors(), in the same order. Linear weights and the embedding go in in the compute type, norms in f32.
Decoder make_decoder(const ModelConfig& config);
std::vector<std::pair<std::string, std::vector<std::int64_t>>> expected_shapes(const ModelConfig& config);

/// A head that is kept as stored becomes dense, and the embedding with it where they are one: for a reader that needs its logits for every few rows, by
/// operators, which widen the whole head each time. The tiles of train/cross_entropy.h take it as it is.
void make_head_dense(Decoder& decoder);

/// bf16 where the processor multiplies it natively (AVX512-BF16 or AMX), f32 elsewhere.
at::ScalarType fastest_compute_type();

}  // namespace alambic::models
