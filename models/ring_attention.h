// SPDX-License-Identifier: Apache-2.0
#pragma once
// Attention over a row that several ranks share (arXiv:2310.01889): each has the queries, keys and values of its own tokens; keys and
// values of the others come one rank after the other, the next one's under way while the present one's are computed with, and a running
// softmax goes on over them. The backward pass does the same again, and sends what it found for another rank's keys and values back
// to it. In turn s member m sends to member m + s and hears of member m - s: only the chunks that some query of the receiver
// sees, nothing of other documents, of the future or from behind the window.
//
// Collective over all ranks, those of other rows included: each of their calls has the same number of turns.
#include <ATen/core/Tensor.h>

#include "models/packed_attention.h"
#include "models/shared_row.h"

namespace alambic::models {

/// AttentionHeads of the own tokens, of which shape.tokens are; shape.document_lengths are those of the row. Forward, the heads have
/// v_KTS besides. The result is attention_forward()'s for the own tokens.
AttentionHeads make_ring_heads(const AttentionShape& shape);
at::Tensor ring_attention_forward(const AttentionShape& shape, const SharedRow& row, const AttentionHeads& heads, at::Tensor& out_TQ);

/// Of the own queries, keys and values; what the others' queries gave has been added, in the order of the turns.
AttentionGradients ring_attention_backward(const AttentionShape& shape, const SharedRow& row, const AttentionHeads& heads, const at::Tensor& out_TQ, const at::Tensor& lse_KR,
                                           const at::Tensor& d_out_TQ);

}  // namespace alambic::models
