// SPDX-License-Identifier: Apache-2.0
#pragma once
// Rows that several ranks compute together (docs/ranks.md): which tokens each of them has, and whose keys it needs.
//
// The T tokens of a micro-batch are cut into 2 N chunks of equal length, N being the ranks that share it; member m has the chunks m and
// 2 N - 1 - m. In a long document the first of them sees little and the second much, so that all members have the same work; and in
// short documents each chunk is the same work.
// Letters: T = tokens.
#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <vector>

namespace alambic::parallel {
class Communicator;
}

namespace alambic::models {

/// `size` consecutive ranks that share each row; this process is the member-th of them.
struct Context {
  parallel::Communicator* ranks = nullptr;
  int size = 1, member = 0;
};

class SharedRow {
 public:
  SharedRow(const Context& context, const std::vector<std::int64_t>& document_lengths);

  const Context& context() const { return context_; }
  /// Tokens of a chunk, a multiple of kChunkRound. What is missing to 2 N chunks is filled up with documents of padding, behind the last token.
  std::int64_t chunk() const { return chunk_; }
  /// Of all members' tokens, those of the padding included.
  const std::vector<std::int64_t>& document_lengths() const { return document_lengths_; }
  /// The first token of a member's lower (0) or upper (1) chunk.
  std::int64_t first(int member, int half) const { return chunk_ * (half == 0 ? member : 2 * context_.size - 1 - member); }
  /// The own tokens' part of a tensor [T, ...] of all, zeros (false) for padding.
  at::Tensor own(const at::Tensor& whole_T) const;
  /// Positions of all tokens, of the padding too: they begin at 0 in each document.
  at::Tensor positions_T() const;
  /// Which halves of `keys`' tokens some query of `queries` (another member, or itself) sees; window as AttentionShape's.
  std::array<bool, 2> seen(int queries, int keys, std::int64_t window) const;

 private:
  bool chunk_sees(std::int64_t query_chunk, std::int64_t key_chunk, std::int64_t window) const;
  Context context_;
  std::int64_t tokens_ = 0, chunk_ = 0;  // tokens_: without padding
  std::vector<std::int64_t> document_lengths_, document_ends_;
};

/// Chunks are multiples of this: a pair of them is what the fused blocks round tokens to, and places of dropout masks and tiles are whole.
inline constexpr std::int64_t kChunkRound = 32;

}  // namespace alambic::models
