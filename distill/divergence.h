// SPDX-License-Identifier: Apache-2.0
#pragma once
// How far a student's next-token distribution is from its teacher's, and which way is nearer: one row of logits at a time.
// docs/distillation.md has the formulas side by side.
// Letters: V = vocabulary, N = slots of a sparse signal; p = softmax(teacher / t), q = softmax(student / t), t = temperature.
#include <cstdint>
#include <string>
#include <vector>

namespace alambic {
class FieldVisitor;
}

namespace alambic::distill {

enum class Objective {
  kForwardKl,      // sum p log(p / q): Hinton, Vinyals, Dean 2015, arXiv:1503.02531
  kReverseKl,      // sum q log(q / p): MiniLLM, arXiv:2306.08543
  kJensenShannon,  // beta KL(p | m) + (1 - beta) KL(q | m), m = beta p + (1 - beta) q: GKD, arXiv:2306.13649, eq. 1
  kSkewKl,         // KL(p | skew p + (1 - skew) q): DistiLLM, arXiv:2402.03898, section 3.1
  kSkewReverseKl,  // KL(q | (1 - skew) p + skew q): the same
  kTotalVariation, // 1/2 sum |p - q|: f-DISTILL, arXiv:2307.15190
  kAdaptiveKl,     // h KL(p | q) + (1 - h) KL(q | p), h from where p and q differ: AKL, arXiv:2404.02657, section 4
};
/// "forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation", "adaptive_kl".
const std::vector<std::string>& objective_names();
Objective objective_named(const std::string& name);

struct DivergenceConfig {
  std::string objective = "forward_kl";
  double temperature = 1;   // of both softmaxes; what is computed with it is multiplied by t^2 (arXiv:1503.02531, section 2)
  double beta = 0.5;        // jensen_shannon; 0: forward_kl, 1: reverse_kl, as TRL has it
  double skew = 0.1;        // skew_kl, skew_reverse_kl
  double head_share = 0.5;  // adaptive_kl: teacher's mass that counts as the head of its distribution (the paper's mu)
  void visit(FieldVisitor& fields);
};

/// weight t^2 D(p, q) in nats. Unless `gradient` is null, its V numbers get the derivative by the student's logits added.
/// Softmaxes and terms are f32, sums f64. Finite for every finite logit and for minus infinity; 0, with a gradient of 0, where
/// the two rows are equal; NaN where one is. scratch: 2 V numbers, overwritten.
double divergence_row(const DivergenceConfig& config, const float* teacher, const float* student, std::int64_t V, double weight, float* gradient, float* scratch);

/// What is known of a teacher's row: the mass of N tokens (id -1: unused; no id twice), and that of all others together.
struct SparseRow {
  const std::int32_t* ids = nullptr;
  const float* probabilities = nullptr;
  std::int64_t slots = 0;
  float tail = 0;
};

/// Forward KL over N + 1 buckets, the tokens given and the rest:
///   sum_N p log(p / q) + tail log(tail / (1 - sum_N q)),   with weight, t^2 and gradient as in divergence_row
/// The bucket for the rest is what keeps a student from being taught that the other tokens do not exist (arXiv:2503.16870, section 3
/// on the bias of a bare top-k). Error(kData) for an id outside of the vocabulary. scratch: V numbers.
double top_k_row(double temperature, const SparseRow& teacher, const float* student, std::int64_t V, double weight, float* gradient, float* scratch);

/// Random sampling KD (arXiv:2503.16870): probabilities are counts / draws of tokens drawn from the teacher; the tail is not read.
///   - sum_N p log q,   with weight, t^2 and gradient as in divergence_row
/// Over the draws its mean is the cross-entropy to the teacher, and the mean of its gradient is that of the full forward KL.
double sampled_row(double temperature, const SparseRow& teacher, const float* student, std::int64_t V, double weight, float* gradient, float* scratch);

}  // namespace alambic::distill
