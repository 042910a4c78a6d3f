// SPDX-License-Identifier: Apache-2.0
#pragma once
// What one forward pass reads. Documents of all rows lie one behind the other in one flat list of T tokens: attention
// never crosses a document, so rows need no axis of their own and no padding exists.
// Letters: T = tokens of the batch.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace alambic::data {

struct Batch {
  at::Tensor tokens_T;                        // i64 ids
  at::Tensor positions_T;                     // i64, restart at 0 in each document
  at::Tensor targets_T;                       // i64: the next token of the same document; meaningless where keep_T is false
  at::Tensor keep_T;                          // bool: false on prompts, on a document's last token, on masked tokens
  std::vector<std::int64_t> document_lengths; // their sum is T
  std::int64_t num_kept = 0;                  // number of true in keep_T
  std::uint64_t first_sample = 0;             // global index of the first document in the stream, for messages
};

}  // namespace alambic::data
