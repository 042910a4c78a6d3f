// SPDX-License-Identifier: Apache-2.0
#pragma once
// Causal attention over packed documents by tiles, forward and backward (the tiling of arXiv:2205.14135): no tokens x tokens
// matrix, no work above the diagonal, across documents or behind the window. The result does not depend on the number of threads.
//
// Letters: T = tokens, K = key and value heads, G = query heads that share one, S = head size, R = query rows of a tile.
// A head's queries and keys are kept as [T, S] and transposed as [S, T], since a tile product wants one of each.
//
// f32 throughout, or narrow: tiles are multiplied in bf16 with f32 sums, where the compute type is bf16 and the processor has such tiles
// (models/bf16_tiles.h). Scores, their softmax and all sums are f32 either way; narrow, queries and keys (normalised and rotated),
// probabilities and the gradients of scores are rounded where they enter a product.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

namespace alambic::models {

struct AttentionShape {
  std::int64_t tokens = 0, kv_heads = 0, group = 0, head_size = 0;
  std::vector<std::int64_t> document_lengths;  // their sum is `tokens`
  std::int64_t window = 0;                     // a token sees the last `window` tokens, itself included; 0: all of its document
  double soft_cap = 0;                         // scores become cap * tanh(score / cap); 0: none
};

/// Inputs by head, zero behind the last token up to padded_tokens. Queries carry the attention scale already; the G query
/// heads of one key head lie together, token by token: query row t * G + g. What a pass does not read is undefined. f32, or bf16 where
/// narrow.
struct AttentionHeads {
  at::Tensor q_KRS, qt_KSR;  // [K, padded T * G, S] (backward; narrow: always) and [K, S, padded T * G] (narrow: never)
  at::Tensor k_KTS, kt_KST;  // [K, padded T, S] and [K, S, padded T] (backward)
  at::Tensor v_KTS, vt_KST;  // [K, padded T, S] (backward) and [K, S, padded T] (forward)
};
std::int64_t padded_tokens(std::int64_t tokens);
/// Makes the tensors that a forward or a backward pass reads, of the right sizes and with zeros behind the last token. They are narrow for
/// a compute type of bf16 where that can be.
AttentionHeads make_heads(const AttentionShape& shape, bool backward, at::ScalarType compute_type);

/// out_TQ, [T, K G S] f32 or bf16, gets the attention; the result is the log of each query row's sum of exponentials, f32
/// [K, padded T * G], which the backward pass needs.
at::Tensor attention_forward(const AttentionShape& shape, const AttentionHeads& heads, at::Tensor& out_TQ);

/// Gradients by head: of the scaled queries [K, padded T * G, S], keys and values [K, padded T, S].
struct AttentionGradients {
  at::Tensor q_KRS, k_KTS, v_KTS;
};
/// out_TQ is what the forward pass gave, d_out_TQ its gradient; both of one type.
AttentionGradients attention_backward(const AttentionShape& shape, const AttentionHeads& heads, const at::Tensor& out_TQ, const at::Tensor& lse_KR,
                                      const at::Tensor& d_out_TQ);

// Attention over tokens whose keys come a block at a time, because other ranks have them (models/ring_attention.h). The tokens of the heads
// are then some runs of a longer list; AttentionShape::document_lengths cuts that list, and AttentionShape::tokens counts the heads' own.

/// `count` tokens of the list from `first` on, which the heads have from token `row` on.
struct QueryRun {
  std::int64_t row, first, count;
};
/// `count` keys and values of the list from `first` on. k, v: [K, rows, S], kt, vt: [K, S, rows], pointing at the first key of head 0; 32
/// keys more than there are may be read, of any finite value.
template <class E>
struct KeysOf {
  std::int64_t first = 0, count = 0, rows = 0;
  const E *k = nullptr, *kt = nullptr, *v = nullptr, *vt = nullptr;  // kt and v: backward; vt: forward
};
using KeyBlock = KeysOf<float>;
struct QueryTile {
  std::int64_t row, first, count, document;  // document: its first token
};

/// A softmax that goes on from block to block. Which blocks come together does not change the bits, their order does.
class RunningAttention {
 public:
  RunningAttention(const AttentionShape& shape, std::span<const QueryRun> runs, const AttentionHeads& heads);
  void add(std::span<const KeyBlock> blocks);
  /// As attention_forward(), once each query has seen its own key.
  at::Tensor finish(at::Tensor& out_TQ);

 private:
  AttentionShape shape_;
  std::vector<QueryTile> tiles_;
  at::Tensor qt_KSR_, sums_;   // by head and tile: weighted values [S, R], the highest score and the sum of exponentials [R]
  std::vector<char> started_;  // by head and tile
};

/// Its backward pass.
class RunningGradients {
 public:
  RunningGradients(const AttentionShape& shape, std::span<const QueryRun> runs, const AttentionHeads& heads, const at::Tensor& out_TQ, const at::Tensor& lse_KR,
                   const at::Tensor& d_out_TQ);
  /// Blocks of equal count. What these queries give their keys and values: [blocks, 2, K, count, S]; undefined for no blocks.
  at::Tensor add(std::span<const KeyBlock> blocks);
  /// AttentionGradients::q_KRS of the blocks so far.
  const at::Tensor& queries() const { return q_KRS_; }

 private:
  template <class T>
  at::Tensor add_typed(std::span<const KeyBlock> blocks);
  AttentionShape shape_;
  std::vector<QueryTile> tiles_;
  AttentionHeads heads_;
  at::Tensor out_TQ_, lse_KR_, d_out_TQ_, q_KRS_;
};

/// [heads, tokens, S] -> [heads, S, tokens].
void transpose_heads(const float* from, std::int64_t heads, std::int64_t tokens, std::int64_t head_size, float* to);

/// What lies between the projections and attention: bias-free per-head norm where weights are given, rotation, scale.
struct HeadTransform {
  const float* query_norm = nullptr;  // [S], with the family's offset already added; null: none
  const float* key_norm = nullptr;
  float epsilon = 0;
  const float *cos_TF = nullptr, *sin_TF = nullptr;  // null: no rotation
  std::int64_t pairs = 0;                            // F
  float scale = 1;                                   // of the queries
};
/// qkv_TN: [T, at least (K G + 2 K) S] f32 or bf16, rows of queries, keys, values.
void split_heads(const AttentionShape& shape, const at::Tensor& qkv_TN, const HeadTransform& transform, AttentionHeads& heads, bool backward);
/// The gradient of qkv_TN's first (K G + 2 K) S columns, written to d_qkv_TN. d_query_norm, d_key_norm: f32 [S], undefined or added to.
void merge_head_gradients(const AttentionShape& shape, const at::Tensor& qkv_TN, const HeadTransform& transform, const AttentionGradients& gradients,
                          at::Tensor& d_qkv_TN, const at::Tensor& d_query_norm_S, const at::Tensor& d_key_norm_S);

}  // namespace alambic::models
