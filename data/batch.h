// SPDX-License-Identifier: Apache-2.0
#pragma once
// What one forward pass reads. Documents of all rows lie one behind the other in one flat list of T tokens: attention
// never crosses a document, so rows need no axis of their own and no padding exists.
// Letters: T = tokens of the batch.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace alambic::data {

/// Where one document of a batch comes from, for messages and for figures by store.
struct Origin {
  std::uint32_t store = 0;      // index into StreamConfig::mixture; 0 in evaluation
  std::uint64_t document = 0;   // number in that store
  std::uint32_t first_token = 0;  // of the document; above 0 in later pieces of a split document
  std::uint16_t source = 0;       // index into that store's StoreInfo::sources
  bool operator==(const Origin&) const = default;
};

struct Batch {
  at::Tensor tokens_T;                        // i64 ids
  at::Tensor positions_T;                     // i64, restart at 0 in each document
  at::Tensor targets_T;                       // i64: the next token of the same document; meaningless where keep_T is false
  at::Tensor keep_T;                          // bool: false on prompts, on a document's last token, on masked tokens
  std::vector<std::int64_t> document_lengths; // their sum is T; each is at least 2
  std::vector<Origin> origins;                // one a document
  std::int64_t num_kept = 0;                  // number of true in keep_T; may be 0
  std::uint64_t first_sample = 0;             // documents the stream drew before this batch, for messages
};

}  // namespace alambic::data
