// SPDX-License-Identifier: Apache-2.0
#pragma once
// How far a student is from a teacher of other tokens, at the ends of spans that both cut in the same place.
// docs/across_tokenizers.md has the formulas.
// Letters: V = vocabulary (each model's own), K = kept rows of the student, S = spans.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "distill/divergence.h"
#include "distill/vocabulary.h"
#include "models/linear.h"

namespace alambic::distill {

/// How a teacher of other tokens is listened to.
struct UnlikeConfig {
  bool hybrid = false;        // GOLD: mapped tokens one by one, the others by rank; else ULD: all by rank
  double matched_share = -1;  // hybrid: weight of the mapped part; the other part has 1 - it. Below 0: the share of the teacher's tokens that are mapped
};

/// The distribution at the end of a span: softmax(logits / t) at its last token, times the probability of the tokens before it.
struct SpanDistribution {
  const float* logits = nullptr;
  double log_prefix = 0;  // ln of the product of the earlier tokens' probabilities, at the same temperature; 0: a single token
};

struct SpanValue {
  double value = 0;
  double d_log_prefix = 0;  // derivative by the student's log_prefix
};

/// weight t^2 times
///   ULD (arXiv:2402.12030, section 3.2): sum over ranks |P_(r) - Q_(r)|, the shorter list padded with zeros
///   hybrid: share D(P, Q over pairs) + (1 - share) sum over ranks |P_(r) - Q_(r)| of what is in no pair
/// where D is that of config.objective on masses that need not sum to 1: forward_kl, reverse_kl, jensen_shannon. Unless `gradient`
/// is null, its map.student_size numbers get the derivative by the logits of the span's last row added.
/// Finite for finite logits and minus infinity; 0, with a gradient of 0, where both sides are equal and all is in a pair or of the same rank.
SpanValue unlike_row(const DivergenceConfig& config, const UnlikeConfig& unlike, const VocabularyMap& map, const SpanDistribution& teacher, const SpanDistribution& student, double weight, float* gradient);

/// A span of a batch: rows first .. first + count - 1 of the kept rows predict its tokens.
struct StudentSpan {
  std::int64_t first = 0, count = 1;
  double weight = 1;
};

/// No span has more tokens of the student: what is longer tells nothing of single tokens.
inline constexpr std::int64_t kLongestSpan = 32;

/// What a teacher of other tokens says of a batch.
struct UnlikeSignal {
  std::shared_ptr<const VocabularyMap> map;
  UnlikeConfig config;
  const models::Linear* head = nullptr;  // the teacher's
  at::Tensor hidden_SD;                  // its hidden states where each span's last token is predicted
  std::vector<double> log_prefix_S;      // SpanDistribution::log_prefix of the teacher
  std::vector<StudentSpan> spans;        // S of them, by `first`, none in another
};

/// ln of the product of the probabilities of tokens that were there, for each of `rows` (hidden states that predict `tokens`): through
/// the head in chunks, no gradients. `real`: ids below it are tokens, the rest padding.
std::vector<double> log_probabilities(const at::Tensor& hidden_KD, const models::Linear& head, std::span<const std::int64_t> tokens, std::int64_t real, double temperature);

/// The loss of one signal over the chunks of the student's head, which come in order.
class UnlikeLoss {
 public:
  /// Spans that lie in two chunks need their derivative before their last row is there: their rows go through the head once more
  /// (at most one span a chunk; without the dropout of an adapter on the head). Error(kBug) where spans and rows do not agree.
  UnlikeLoss(const UnlikeSignal& signal, const DivergenceConfig& config, const at::Tensor& hidden_TD, const models::Linear& head, const at::Tensor& index_K, const at::Tensor& targets_K, double factor);

  /// The sum, times the factor, of the spans that end in rows first .. of the chunk; the gradient of all its rows is added to
  /// gradient_KV unless that is undefined. student_KV: f32.
  double add(const at::Tensor& student_KV, std::int64_t first, const at::Tensor& gradient_KV);

 private:
  const UnlikeSignal& signal_;
  const DivergenceConfig& config_;
  const std::int64_t* targets_;
  double factor_;
  std::size_t next_ = 0;           // the first span that does not end before the chunk
  std::vector<double> log_probability_K_;  // of the target of rows that are no span's last
  std::vector<double> d_log_prefix_S_;     // of spans in two chunks
};

}  // namespace alambic::distill
