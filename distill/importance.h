// SPDX-License-Identifier: Apache-2.0
#pragma once
// How much each part of a decoder matters on a sample of text: channels, neurons and heads by the size of their activations
// (Minitron, arXiv:2407.14679, section 2.2), blocks by how little they turn the residual stream (ShortGPT, arXiv:2403.03853).
// Letters: T = tokens of a sequence, L = layers, D = hidden size, F = intermediate size, H = query heads.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "core/config.h"
#include "data/token_store.h"
#include "models/decoder.h"

namespace alambic::distill {

struct CalibrationConfig {
  std::vector<std::string> stores;
  std::int64_t row_length = 1024;    // a longer document becomes several sequences
  std::int64_t max_tokens = 65'536;  // of each store; 0: all
  /// How magnitudes become one number: over a sequence and then over all sequences. mean-l2: mean, then root of the sum of
  /// squares (what Minitron found best); mean: over all tokens; rms: root of the mean square over all tokens.
  std::string aggregate = "mean-l2";
  void visit(FieldVisitor& fields);
};

/// One document, or a piece of one: what attention sees at once.
struct Sequence {
  at::Tensor tokens_T, targets_T, keep_T;  // as in data::Batch
};

/// The sample: each store's documents as data::EvaluationBatches chooses them, one sequence at a time.
void for_each_sequence(const std::vector<data::TokenStore>& stores, const CalibrationConfig& config, const std::function<void(const Sequence&)>& act);

/// All f64. Of a decoder without some of its layers, L are those that are left.
struct Importance {
  at::Tensor neurons_LF = {};    // magnitude of the gated intermediate
  at::Tensor heads_LH = {};      // Euclidean norm of a head's output
  at::Tensor channels_D = {};    // magnitude in the outputs of the norms before attention and feed-forward and of the last one, summed
  at::Tensor block_influence_L = {};  // 1 - mean cosine between a block's input and output
  std::int64_t sequences = 0, tokens = 0;
};

/// Sums of a pass over a sample, in f64. A sequence is one forward pass, whatever stands beside it in the sample, so that
/// the result does not depend on how a sample is cut into batches.
class ImportanceSums {
 public:
  /// aggregate: as in CalibrationConfig. The decoder must outlive this object.
  ImportanceSums(const models::Decoder& decoder, std::string aggregate);
  void add(const at::Tensor& tokens_T);
  Importance result() const;  // Error(kBug) before the first sequence; Error(kNumerics) where an activation was not finite

 private:
  void add_magnitudes(at::Tensor& sum_N, const at::Tensor& magnitudes_TN) const;

  const models::Decoder& decoder_;
  std::string aggregate_;
  std::vector<at::Tensor> neurons_, heads_, attention_channels_, mlp_channels_;  // a layer each
  at::Tensor last_channels_;
  std::vector<double> cosines_;  // a layer each, summed over tokens
  std::int64_t sequences_ = 0, tokens_ = 0;
};

Importance measure_importance(const models::Decoder& decoder, const std::vector<data::TokenStore>& stores, const CalibrationConfig& config);

/// The decoder with these layers alone, in this order; it shares its tensors with the one it is made from.
models::Decoder with_layers(const models::Decoder& decoder, const std::vector<std::int64_t>& layers);

/// Which `count` layers to keep, ascending. By block influence: those of the largest, of equals the later ones are dropped.
std::vector<std::int64_t> layers_by_influence(const at::Tensor& block_influence_L, std::int64_t count);
/// By loss: drops one layer at a time, the one without which the sample's loss is least.
std::vector<std::int64_t> layers_by_loss(const models::Decoder& decoder, std::int64_t count, const std::vector<data::TokenStore>& stores, const CalibrationConfig& config);

/// Indices of the `count` largest scores, ascending; of equal scores the earlier index is taken.
std::vector<std::int64_t> largest(const at::Tensor& scores_N, std::int64_t count);

}  // namespace alambic::distill
