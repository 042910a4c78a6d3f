// SPDX-License-Identifier: Apache-2.0
#pragma once
// Cross-entropy in f32 of a frozen head by tiles of the vocabulary: a running softmax as in attention (arXiv:2205.14135), keys and
// values being the head's rows. Logits exist only as tiles in a processor's cache, and are made once for value and gradient.
// Letters: K = rows, D = hidden size, V = vocabulary.
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace alambic::models {

/// nats[i] gets the value of row i as kernels::cross_entropy_rows defines it; d_hidden_KD, unless undefined, its gradient.
/// hidden_KD, weight_VD, d_hidden_KD: f32, rows contiguous. weight_VD may be bf16 or f16, of which a tile at a time is widened: the same bits.
/// soft_cap: of logits, which become cap * tanh(logit / cap); 0: none. Not with smoothing, whose share of the gradient then is another for each row.
/// Nothing depends on the number of threads.
void tiled_cross_entropy(const at::Tensor& hidden_KD, const at::Tensor& weight_VD, const std::int64_t* targets, double smoothing, double z_loss, double* nats,
                         at::Tensor& d_hidden_KD, double soft_cap = 0);

/// The same of bf16 hidden states and a bf16 head, on a processor with tiles of it (models/bf16_tiles.h): logits, softmax and sums are f32, and
/// what the head's rows are weighed with is rounded. d_hidden_KD: f32.
void tiled_cross_entropy_bf16(const at::Tensor& hidden_KD, const at::Tensor& weight_VD, const std::int64_t* targets, double smoothing, double z_loss, double* nats,
                              at::Tensor& d_hidden_KD, double soft_cap = 0);

/// Bytes that one or the other takes besides its arguments, on so many threads.
std::uint64_t tiled_cross_entropy_bytes(const at::Tensor& weight_VD, at::ScalarType compute_type, std::int64_t num_threads);

}  // namespace alambic::models
