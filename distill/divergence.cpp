// SPDX-License-Identifier: Apache-2.0
#include "distill/divergence.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "core/config.h"
#include "core/error.h"
#include "core/vectorised.h"
#include "models/row_kernels.h"

namespace alambic::distill {
namespace {

using models::kernels::fast_exp;

constexpr std::pair<const char*, Objective> kObjectives[] = {
    {"forward_kl", Objective::kForwardKl},         {"reverse_kl", Objective::kReverseKl},           {"jensen_shannon", Objective::kJensenShannon}, {"skew_kl", Objective::kSkewKl},
    {"skew_reverse_kl", Objective::kSkewReverseKl}, {"total_variation", Objective::kTotalVariation}, {"adaptive_kl", Objective::kAdaptiveKl},
};
constexpr float kLeastLog = -1e30f;     // stands for minus infinity: nothing times it is NaN
constexpr std::int64_t kPart = 1024;    // sums of so many terms are f32, their sum f64

// ln x of a normal x > 0 (Cephes' logf).
inline float fast_log(float x) {
  std::int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const std::int32_t half = (bits & 0x007fffff) | 0x3f000000;  // the mantissa, in 0.5 .. 1
  float m;
  __builtin_memcpy(&m, &half, sizeof m);
  const bool below = m < 0.707106781186547524f;
  const float e = static_cast<float>((bits >> 23) - 126 - (below ? 1 : 0));
  const float f = below ? m + m - 1.0f : m - 1.0f, square = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return f + (p * f * square - 2.12194440e-4f * e - 0.5f * square) + 0.693359375f * e;
}

// e^x - 1 for x <= 0, exact to a few units in the last place down to x = 0 (fast_exp's polynomial without its 1).
inline float fast_expm1(float x) {
  const float bounded = x < -87.0f ? -87.0f : x;
  const float n = __builtin_rintf(bounded * 1.44269504f);
  float f = bounded - n * 0.693359375f;
  f += n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  const std::int32_t bits = (static_cast<std::int32_t>(n) + 127) << 23;
  float scale;
  __builtin_memcpy(&scale, &bits, sizeof scale);
  return (p * f * f + f) * scale + (scale - 1.0f);
}

// ln(1 + y) for -1 < y <= 0; what rounding 1 + y lost is put back.
inline float fast_log1p(float y) {
  const float u = 1.0f + y;
  return fast_log(u) + (y - (u - 1.0f)) / u;
}

// ln(share e^d + 1 - share) in two parts, of which the larger is d or 0 itself: nothing overflows, and d = 0 gives exactly 0.
// With d = ln p - ln q it is ln(m / q) of the mixture m = share p + (1 - share) q.
inline float log_mixture_rest(float d, float share) { return fast_log1p((d > 0 ? 1.0f - share : share) * fast_expm1(d > 0 ? -d : d)); }
inline float log_mixture(float d, float share) { return log_mixture_rest(d, share) + (d > 0 ? d : 0.0f); }

// What a divergence adds at one token, from p, q and d = ln p - ln q: its value, and q times its derivative by q (less a constant,
// which a softmax does not pass on, chosen so that the derivative is exactly 0 where p = q).
// The gradient by the student's logits is then a_i - q_i sum(a), over t.
struct Constants {
  float share;    // beta, skew, or adaptive KL's weight of the forward part
  float lowest;   // smallest divisor
};

struct ForwardKl {
  static void term(float p, float q, float d, const Constants&, float& value, float& a) {
    value = p * d;
    a = q - p;
  }
};
struct ReverseKl {
  static void term(float, float q, float d, const Constants&, float& value, float& a) {
    value = -q * d;
    a = -q * d;
  }
};
struct JensenShannon {
  static void term(float p, float q, float d, const Constants& c, float& value, float& a) {
    const float rest = log_mixture_rest(d, c.share), to_q = rest + (d > 0 ? d : 0.0f), to_p = rest - (d > 0 ? 0.0f : d);  // ln(m / q), ln(m / p)
    a = -(1.0f - c.share) * q * to_q;
    value = a - c.share * p * to_p;
  }
};
struct SkewKl {
  static void term(float p, float q, float d, const Constants& c, float& value, float& a) {
    const float m = c.share * p + (1.0f - c.share) * q;
    value = -p * log_mixture(-d, 1.0f - c.share);
    a = (1.0f - c.share) * (1.0f - c.share) * q * ((q - p) / (m > c.lowest ? m : c.lowest));
  }
};
struct SkewReverseKl {
  static void term(float p, float q, float d, const Constants& c, float& value, float& a) {
    const float m = (1.0f - c.share) * p + c.share * q;
    value = -q * log_mixture(d, 1.0f - c.share);
    a = value + c.share * (1.0f - c.share) * q * ((p - q) / (m > c.lowest ? m : c.lowest));
  }
};
struct TotalVariation {
  static void term(float p, float q, float, const Constants&, float& value, float& a) {
    value = 0.5f * __builtin_fabsf(p - q);
    a = 0.5f * q * (q > p ? 1.0f : (q < p ? -1.0f : q - p));  // q - p: 0, or NaN
  }
};
struct AdaptiveKl {
  static void term(float p, float q, float d, const Constants& c, float& value, float& a) {
    value = (c.share * p - (1.0f - c.share) * q) * d;
    a = c.share * (q - p) - (1.0f - c.share) * q * d;
  }
};

// ln softmax(x / t)_i = (x_i - highest) / t - log_sum: near the highest, where it matters, the difference is exact.
struct LogSoftmax {
  float highest, inverse_temperature, log_sum;
  float operator()(float x) const {
    const float y = (x - highest) * inverse_temperature - log_sum;
    return y < kLeastLog ? kLeastLog : y;
  }
};

ALAMBIC_VECTORISED LogSoftmax log_softmax_of(const float* x, std::int64_t V, float inverse_temperature) {
  float highest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : highest)
  for (std::int64_t i = 0; i < V; ++i) highest = x[i] > highest ? x[i] : highest;
  double sum = 0;
  for (std::int64_t begin = 0; begin < V; begin += kPart) {
    const std::int64_t end = std::min(V, begin + kPart);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (std::int64_t i = begin; i < end; ++i) part += fast_exp((x[i] - highest) * inverse_temperature);
    sum += part;
  }
  return {highest, inverse_temperature, static_cast<float>(std::log(sum))};
}

// a_V and q_V are filled; returns the sums of value and a.
template <class Term>
ALAMBIC_VECTORISED std::pair<double, double> terms_of(const float* teacher, const float* student, LogSoftmax log_p, LogSoftmax log_q, Constants constants, std::int64_t V, float* q_V,
                                                      float* a_V) {
  double value = 0, sum_a = 0;
  for (std::int64_t begin = 0; begin < V; begin += kPart) {
    const std::int64_t end = std::min(V, begin + kPart);
    float value_part = 0, a_part = 0;
#pragma omp simd reduction(+ : value_part, a_part)
    for (std::int64_t i = begin; i < end; ++i) {
      const float lp = log_p(teacher[i]), lq = log_q(student[i]), q = fast_exp(lq);
      float here, a;
      Term::term(fast_exp(lp), q, lp - lq, constants, here, a);
      value_part += here;
      a_part += a;
      q_V[i] = q;
      a_V[i] = a;
    }
    value += value_part;
    sum_a += a_part;
  }
  return {value, sum_a};
}

// gradient += factor (a - q sum_a)
ALAMBIC_VECTORISED void add_gradient(const float* q_V, const float* a_V, float sum_a, float factor, std::int64_t V, float* gradient) {
#pragma omp simd
  for (std::int64_t i = 0; i < V; ++i) gradient[i] += factor * (a_V[i] - q_V[i] * sum_a);
}

ALAMBIC_VECTORISED void probabilities_of(const float* x, LogSoftmax log_p, std::int64_t V, float* p_V) {
#pragma omp simd
  for (std::int64_t i = 0; i < V; ++i) p_V[i] = fast_exp(log_p(x[i]));
}

ALAMBIC_VECTORISED double absolute_difference(const float* p_V, const float* q_V, std::int64_t V) {
  double sum = 0;
  for (std::int64_t begin = 0; begin < V; begin += kPart) {
    const std::int64_t end = std::min(V, begin + kPart);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (std::int64_t i = begin; i < end; ++i) part += __builtin_fabsf(p_V[i] - q_V[i]);
    sum += part;
  }
  return sum;
}

// Adaptive KL's weight of the forward part: the share of sum |p - q| that lies in the head, the teacher's likeliest tokens whose
// mass together is at most head_share, and in any case the first. 1/2 where p = q.
float head_share_of_difference(const float* p_V, const float* q_V, std::int64_t V, double head_share) {
  const double all = absolute_difference(p_V, q_V, V);
  if (!(all > 0)) return all == 0 ? 0.5f : std::numeric_limits<float>::quiet_NaN();
  static thread_local std::vector<std::int32_t> likely;
  const float highest = *std::max_element(p_V, p_V + V);
  for (float least = highest / 16;; least = least < 1e-12f ? 0 : least / 16) {  // only what may be in the head is sorted
    likely.clear();
    double mass = 0;
    for (std::int64_t i = 0; i < V; ++i)
      if (p_V[i] >= least) likely.push_back(static_cast<std::int32_t>(i)), mass += p_V[i];
    if (mass > head_share || least == 0) break;
  }
  std::sort(likely.begin(), likely.end(), [&](std::int32_t a, std::int32_t b) { return p_V[a] != p_V[b] ? p_V[a] > p_V[b] : a < b; });
  double mass = 0, head = 0;
  for (std::size_t k = 0; k < likely.size(); ++k) {
    const std::int32_t i = likely[k];
    mass += p_V[i];
    if (k > 0 && mass > head_share) break;
    head += std::fabs(p_V[i] - q_V[i]);
  }
  return static_cast<float>(std::min(1.0, head / all));
}

ALAMBIC_VECTORISED double sum_of(const float* x, std::int64_t V) {
  double sum = 0;
  for (std::int64_t begin = 0; begin < V; begin += kPart) {
    const std::int64_t end = std::min(V, begin + kPart);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (std::int64_t i = begin; i < end; ++i) part += x[i];
    sum += part;
  }
  return sum;
}

ALAMBIC_VECTORISED void add_scaled(const float* x, float factor, std::int64_t V, float* to) {
#pragma omp simd
  for (std::int64_t i = 0; i < V; ++i) to[i] += factor * x[i];
}

void check_ids(const SparseRow& row, std::int64_t V) {
  for (std::int64_t n = 0; n < row.slots; ++n)
    if (row.ids[n] < -1 || row.ids[n] >= V)
      fail(ErrorKind::kData, "the teacher's signal names the token ", row.ids[n], ", outside of the ", V, " tokens that teacher and student share",
           Remedy{"make the signal with a teacher of this student's tokenizer"});
}

}  // namespace

const std::vector<std::string>& objective_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> list;
    for (const auto& [name, objective] : kObjectives) list.emplace_back(name);
    return list;
  }();
  return names;
}

Objective objective_named(const std::string& name) {
  for (const auto& [known, objective] : kObjectives)
    if (name == known) return objective;
  fail(ErrorKind::kUsage, "objective: there is no ", name, nearest_name(name, objective_names()).empty() ? "" : "; did you mean " + nearest_name(name, objective_names()) + "?");
}

void DivergenceConfig::visit(FieldVisitor& fields) {
  fields.field("objective", objective, {.help = "the distance from teacher to student (docs/distillation.md)", .choices = objective_names()});
  fields.field("temperature", temperature, {.help = "both softmaxes are of logits over this; the distance is multiplied by its square", .low = 0.01, .high = 100});
  fields.field("beta", beta, {.help = "jensen_shannon: the teacher's share of the mixture; 0: forward_kl, 1: reverse_kl", .low = 0, .high = 1});
  fields.field("skew", skew, {.help = "skew_kl: the teacher's share of the mixture, skew_reverse_kl: the student's", .low = 0, .high = 0.999});
  fields.field("head_share", head_share, {.help = "adaptive_kl: mass of the teacher's likeliest tokens that counts as the head", .low = 0, .high = 1});
}

double divergence_row(const DivergenceConfig& config, const float* teacher, const float* student, std::int64_t V, double weight, float* gradient, float* scratch) {
  float *const q_V = scratch, *const a_V = scratch + V;
  const auto inverse_temperature = static_cast<float>(1 / config.temperature);
  const LogSoftmax log_p = log_softmax_of(teacher, V, inverse_temperature), log_q = log_softmax_of(student, V, inverse_temperature);
  Objective objective = objective_named(config.objective);
  // At their ends the mixtures are one of the two.
  if (objective == Objective::kJensenShannon && config.beta == 0) objective = Objective::kForwardKl;
  if (objective == Objective::kJensenShannon && config.beta == 1) objective = Objective::kReverseKl;
  if (objective == Objective::kSkewKl && config.skew == 0) objective = Objective::kForwardKl;
  if (objective == Objective::kSkewReverseKl && config.skew == 0) objective = Objective::kReverseKl;
  Constants constants{.share = 0, .lowest = std::numeric_limits<float>::min()};
  const auto terms = [&]<class Term>(Term, double share) {
    constants.share = static_cast<float>(share);
    return terms_of<Term>(teacher, student, log_p, log_q, constants, V, q_V, a_V);
  };
  std::pair<double, double> sums;
  switch (objective) {
    case Objective::kForwardKl:
      sums = terms(ForwardKl{}, 0);
      sums.second = 0;  // sum q - sum p, but for the roundings
      break;
    case Objective::kReverseKl: sums = terms(ReverseKl{}, 0); break;
    case Objective::kJensenShannon: sums = terms(JensenShannon{}, config.beta); break;
    case Objective::kSkewKl: sums = terms(SkewKl{}, config.skew); break;
    case Objective::kSkewReverseKl: sums = terms(SkewReverseKl{}, config.skew); break;
    case Objective::kTotalVariation: sums = terms(TotalVariation{}, 0); break;
    case Objective::kAdaptiveKl:
      probabilities_of(teacher, log_p, V, a_V);
      probabilities_of(student, log_q, V, q_V);
      sums = terms(AdaptiveKl{}, head_share_of_difference(a_V, q_V, V, config.head_share));
      break;
  }
  // t^2 of the value; of the gradient one t is left, as d(z / t) / dz = 1 / t.
  if (gradient != nullptr) add_gradient(q_V, a_V, static_cast<float>(sums.second), static_cast<float>(weight * config.temperature), V, gradient);
  return weight * config.temperature * config.temperature * sums.first;
}

double top_k_row(double temperature, const SparseRow& teacher, const float* student, std::int64_t V, double weight, float* gradient, float* scratch) {
  check_ids(teacher, V);
  const LogSoftmax log_q = log_softmax_of(student, V, static_cast<float>(1 / temperature));
  const auto factor = static_cast<float>(weight * temperature);
  double value = 0, mass = 0;
  probabilities_of(student, log_q, V, scratch);
  float* const rest_V = scratch;  // q of the tokens outside of the slots
  for (std::int64_t n = 0; n < teacher.slots; ++n) {
    const std::int32_t id = teacher.ids[n];
    if (id < 0) continue;
    const float p = teacher.probabilities[n];
    if (!(p == 0)) value += p * (std::log(static_cast<double>(p)) - static_cast<double>(log_q(student[id])));
    mass += p;
    if (gradient != nullptr) gradient[id] -= factor * p;
  }
  // sum over all of mass q: those of the slots here, the rest below.
  const double total = mass + teacher.tail;
  for (std::int64_t n = 0; n < teacher.slots; ++n) {
    if (teacher.ids[n] < 0) continue;
    if (gradient != nullptr) gradient[teacher.ids[n]] += factor * static_cast<float>(total) * rest_V[teacher.ids[n]];
    rest_V[teacher.ids[n]] = 0;
  }
  const double rest = sum_of(rest_V, V);
  if (!(teacher.tail > 0)) {
    if (gradient != nullptr) add_scaled(rest_V, factor * static_cast<float>(total), V, gradient);
    return weight * temperature * temperature * value;
  }
  double log_rest = std::log(rest);
  if (rest < 1e-30) {  // all but nothing in f32: the rest's own softmax, whose highest is not the row's
    std::copy(student, student + V, rest_V);
    for (std::int64_t n = 0; n < teacher.slots; ++n)
      if (teacher.ids[n] >= 0) rest_V[teacher.ids[n]] = -std::numeric_limits<float>::infinity();
    const float highest = *std::max_element(rest_V, rest_V + V);
    // Where every token has its slot there is no rest that could be learnt.
    if (highest == -std::numeric_limits<float>::infinity()) return weight * temperature * temperature * value;
    const LogSoftmax log_r = log_softmax_of(rest_V, V, static_cast<float>(1 / temperature));
    log_rest = static_cast<double>(log_q(highest)) + static_cast<double>(log_r.log_sum);
    probabilities_of(rest_V, log_r, V, rest_V);
    if (gradient != nullptr) add_scaled(rest_V, factor * static_cast<float>(total * std::exp(log_rest) - teacher.tail), V, gradient);
  } else if (gradient != nullptr) {
    add_scaled(rest_V, factor * static_cast<float>(total - teacher.tail / rest), V, gradient);
  }
  value += teacher.tail * (std::log(static_cast<double>(teacher.tail)) - log_rest);
  return weight * temperature * temperature * value;
}

double sampled_row(double temperature, const SparseRow& teacher, const float* student, std::int64_t V, double weight, float* gradient, float* scratch) {
  check_ids(teacher, V);
  const LogSoftmax log_q = log_softmax_of(student, V, static_cast<float>(1 / temperature));
  const auto factor = static_cast<float>(weight * temperature);
  double value = 0, mass = 0;
  for (std::int64_t n = 0; n < teacher.slots; ++n) {
    const std::int32_t id = teacher.ids[n];
    if (id < 0) continue;
    const float p = teacher.probabilities[n];
    value -= static_cast<double>(p) * static_cast<double>(log_q(student[id]));
    mass += p;
    if (gradient != nullptr) gradient[id] -= factor * p;
  }
  if (gradient != nullptr) {
    probabilities_of(student, log_q, V, scratch);
    add_scaled(scratch, factor * static_cast<float>(mass), V, gradient);
  }
  return weight * temperature * temperature * value;
}

}  // namespace alambic::distill
