// SPDX-License-Identifier: Apache-2.0
#include "models/shared_row.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "core/error.h"

namespace alambic::models {

SharedRow::SharedRow(const Context& context, const std::vector<std::int64_t>& document_lengths) : context_(context), document_lengths_(document_lengths) {
  if (context.size < 1 || context.member < 0 || context.member >= context.size) fail(ErrorKind::kBug, "member ", context.member, " of ", context.size, " ranks that share a row");
  for (const std::int64_t length : document_lengths) tokens_ += length;
  const std::int64_t chunks = 2 * context.size;
  chunk_ = ((tokens_ + chunks - 1) / chunks + kChunkRound - 1) / kChunkRound * kChunkRound;
  // In short documents, none of which reaches over a chunk's end: nobody asks for keys of padding.
  for (std::int64_t end = tokens_; end < chunks * chunk_;) {
    const std::int64_t next = (end / kChunkRound + 1) * kChunkRound;
    document_lengths_.push_back(next - end);
    end = next;
  }
  std::int64_t end = 0;
  for (const std::int64_t length : document_lengths_) document_ends_.push_back(end += length);
}

at::Tensor SharedRow::own(const at::Tensor& whole_T) const {
  std::vector<std::int64_t> sizes = whole_T.sizes().vec();
  sizes.at(0) = 2 * chunk_;
  at::Tensor made = at::zeros(sizes, whole_T.options());
  for (int half = 0; half < 2; ++half) {
    const std::int64_t begin = first(context_.member, half), count = std::min(chunk_, whole_T.size(0) - begin);
    if (count > 0) made.narrow(0, half * chunk_, count).copy_(whole_T.narrow(0, begin, count));
  }
  return made;
}

at::Tensor SharedRow::positions_T() const {
  std::vector<at::Tensor> documents;
  for (const std::int64_t length : document_lengths_) documents.push_back(at::arange(length, at::kLong));
  return at::cat(documents);
}

std::array<bool, 2> SharedRow::seen(int queries, int keys, std::int64_t window) const {
  const auto number = [&](int member, int half) { return first(member, half) / chunk_; };
  std::array<bool, 2> result{};
  for (int half = 0; half < 2; ++half)
    for (int query_half = 0; query_half < 2; ++query_half)
      result[static_cast<std::size_t>(half)] = result[static_cast<std::size_t>(half)] || chunk_sees(number(queries, query_half), number(keys, half), window);
  return result;
}

bool SharedRow::chunk_sees(std::int64_t query_chunk, std::int64_t key_chunk, std::int64_t window) const {
  if (key_chunk >= query_chunk) return key_chunk == query_chunk;
  // The nearest pair decides: the last key, and the first query.
  const std::int64_t key = (key_chunk + 1) * chunk_ - 1, query = query_chunk * chunk_;
  const std::int64_t document_end = *std::upper_bound(document_ends_.begin(), document_ends_.end(), key);
  return query < document_end && (window == 0 || query - key < window);
}

}  // namespace alambic::models
