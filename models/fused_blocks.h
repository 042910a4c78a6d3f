// SPDX-License-Identifier: Apache-2.0
#pragma once
// The decoder's blocks as one autograd node with a backward of its own: projections of one input as one product, attention by
// tiles, element-wise work in place, a fixed list of what is kept for the backward pass, and nothing computed below the lowest
// tensor that trains. Decoder::hidden_TD() computes the same with ATen operators and autograd; it is this path's test, and what
// runs where this one does not.
// Letters: T = tokens, D = hidden size, N = outputs of a group, R = ranks of its adapters together, I = inputs.
#include <ATen/core/Tensor.h>

#include <string>

#include "models/decoder.h"

namespace alambic::models {

/// Makes `decoder` take the fused path from now on, and returns ""; or says why it cannot and leaves it as it was. Call it again
/// when adapters were attached or weights replaced.
///
/// Weights of one group (queries, keys and values; gate and up) become rows of one tensor, with R rows behind them where the
/// forward pass puts the adapters' A: each Linear's weight_OI is then a view of it (and still trains if it did). A projection
/// alone in its group is moved only where it has an adapter. One group at a time is in memory twice.
std::string use_fused_blocks(Decoder& decoder);

/// All blocks and the final norm: h_TD f32, the embedded tokens -> normalised hidden states in the compute type.
at::Tensor fused_hidden_TD(const Decoder& decoder, const Input& input, const at::Tensor& h_TD);

/// Bytes a token that the blocks keep between forward and backward, summed over all layers, as `decoder.keep` says.
double kept_bytes_per_token(const Decoder& decoder);

}  // namespace alambic::models
