// SPDX-License-Identifier: Apache-2.0
#pragma once
// A student whose inside is made like its teacher's: the residual stream behind blocks, through a learnt projection, and what tokens
// are to each other inside the attention. docs/distillation.md has the formulas.
// Letters: T = tokens, K = kept rows of a batch, D = hidden size (each model's own), H = heads, S = size of a head.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "data/batch.h"
#include "models/decoder.h"

namespace alambic {
class FieldVisitor;
}

namespace alambic::distill {

/// Block numbers from 0, as in the published names of weights.
struct LayerPair {
  std::int64_t teacher = 0, student = 0;
  bool operator==(const LayerPair&) const = default;
  void visit(FieldVisitor& fields);
};

struct MatchConfig {
  double hidden = 0, attention = 0;    // weights in the loss; 0: not matched
  std::string layers = "uniform";      // uniform, last, pairs
  std::vector<LayerPair> pairs = {};   // with layers: pairs
  std::string loss = "mse";            // of hidden states: mse, cosine
  std::string projection = "shared";   // shared, layer, none
  std::vector<std::string> relations = {"qq", "kk", "vv"};  // of attention; qk is the attention's own distribution
  std::int64_t relation_heads = 0;     // into which qq, kk and vv are split anew; 0: the models' own heads

  bool is_on() const { return hidden > 0 || attention > 0; }
  void visit(FieldVisitor& fields);
};

/// Contradictions that need no model: Error(kUsage).
void check(const MatchConfig& config);

/// The pairs that a config means for models of so many blocks. Error(kUsage) for one that is not there, naming `teacher`.
///   uniform: block s of the student and block ceil((s + 1) teacher_layers / student_layers) - 1 of the teacher, the last with the last
std::vector<LayerPair> layer_pairs(const MatchConfig& config, std::int64_t teacher_layers, std::int64_t student_layers, const std::string& teacher);

/// sum over rows k of weight_k d(W s_k, t_k), an f64 scalar; W undefined: s_k itself.
///   mse: mean over D of (a - b)^2        cosine: 1 - cos(a, b), as half the square of the distance of unit vectors
/// f32, or f64 where the states are; sums are f64. 0 with a gradient of exactly 0 where both are equal.
at::Tensor hidden_distance_sum(const std::string& loss, const at::Tensor& student_KD, const at::Tensor& projection_DD, const at::Tensor& teacher_KD, const at::Tensor& weights_K);

/// Token i is to token j what softmax over j of scale left_i right_j says, head by head.
struct Relation {
  at::Tensor left_THS, right_THS;
  double scale = 1;
};

/// sum over rows k of weight_k, mean over heads, of KL(teacher's row index_k | student's), an f64 scalar: MiniLM, arXiv:2002.10957,
/// causal. Row i sees the tokens j <= i of its document with i - j < window (0: all of them). Scores exist for a block
/// of rows of one document and head at a time, and what is kept of them is the gradient. index_K: ascending. The result does not
/// depend on the number of threads.
at::Tensor relation_divergence_sum(const Relation& student, const Relation& teacher, const std::vector<std::int64_t>& document_lengths, std::int64_t window, const at::Tensor& index_K,
                                   const at::Tensor& weights_K);

/// What of a pass is matched, by block. Of the attention: queries and keys as they are multiplied, and queries, keys and values
/// before the rotation, which a cut through heads would tear apart.
struct LayerStates {
  at::Tensor hidden_KD;  // f32
  at::Tensor q_THS, k_THS;
  at::Tensor content_q_TX, content_k_TX, content_v_TX;  // heads side by side
};
using States = std::map<std::size_t, LayerStates>;

/// Fills the blocks that `into` has. The decoder, the batch and `into` must outlive the pass, and the decoder may be made before it begins.
models::Observer filling(States& into, const MatchConfig& config, const models::Decoder& decoder, const data::Batch& batch, std::uint64_t dropout_seed, const at::Tensor& index_K);

/// Sums over kept rows, weighted by teachers but not by MatchConfig's weights.
struct MatchSums {
  double hidden = 0, attention = 0;
};

/// The match of one teacher and the student, with the projections that learn beside the student.
class Match {
 public:
  /// Error(kUsage) where the models cannot be matched so.
  Match(const MatchConfig& config, const models::ModelConfig& student, const models::ModelConfig& teacher, const std::string& teacher_name);

  /// Identity where the widths agree, else orthogonal rows or columns, drawn from the seed. `number` of the teacher is in their names.
  void make_projections(std::uint64_t seed, std::size_t number);
  std::vector<models::NamedTensor> projections();  // they train; valid until the next make_projections()

  void want_of_teacher(States& states) const;  // adds the blocks
  void want_of_student(States& states) const;

  /// hidden * distances + attention * divergences, means over the pairs of blocks, summed over the rows index_K of which each counts
  /// weights_K; differentiable by the student's states and the projections.
  at::Tensor loss(const States& student, const States& teacher, const data::Batch& batch, const at::Tensor& index_K, const at::Tensor& weights_K, MatchSums& sums) const;

  /// Projections with their gradients, and what of micro-batches of so many tokens is held for the match.
  std::uint64_t num_bytes(std::int64_t tokens) const;

 private:
  MatchConfig config_;
  models::ModelConfig student_, teacher_;
  std::vector<LayerPair> pairs_;
  std::size_t number_ = 0;
  std::vector<at::Tensor> projections_;  // none, one, or one for each pair

  Relation relation_of(const std::string& kind, const LayerStates& states, const models::ModelConfig& model) const;
};

}  // namespace alambic::distill
