// SPDX-License-Identifier: Apache-2.0
#include "distill/unlike_tokens.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>

#include "core/error.h"
#include "train/cross_entropy.h"

namespace alambic::distill {
namespace {

constexpr double kLeastLog = -1e30;  // stands for minus infinity: nothing times it is NaN
constexpr std::int64_t kRowRound = 32;

// ln(sum exp(logits / t)) over V.
double log_sum(const float* logits, std::int64_t V, double t) {
  const double highest = static_cast<double>(*std::max_element(logits, logits + V));
  double sum = 0;
  for (std::int64_t i = 0; i < V; ++i) sum += std::exp((static_cast<double>(logits[i]) - highest) / t);
  return highest / t + std::log(sum);
}

double log_mass(const float logit, double t, double less) { return std::max(static_cast<double>(logit) / t - less, kLeastLog); }

// ln(share e^d + 1 - share); with d = ln p - ln q it is ln(m / q) of m = share p + (1 - share) q, and exactly 0 where p = q.
double log_mixture(double d, double share) { return d > 0 ? d + std::log1p((1 - share) * std::expm1(-d)) : std::log1p(share * std::expm1(d)); }

struct Term {
  double value = 0, slope = 0;  // slope: q times the derivative by q
};

// Of masses p and q that need not sum to 1: the Kullback-Leibler divergences with the terms that make them so (Csiszar's I-divergence),
// so that they are 0 at equality only. In the Jensen-Shannon divergence these terms cancel.
Term matched_term(Objective objective, double beta, double log_p, double log_q) {
  const double p = std::exp(log_p), q = std::exp(log_q), d = log_p - log_q;
  if (objective == Objective::kForwardKl) return {.value = (p == 0 ? 0 : p * d) - p + q, .slope = q - p};
  if (objective == Objective::kReverseKl) return {.value = (q == 0 ? 0 : -q * d) - q + p, .slope = q == 0 ? 0 : -q * d};
  const double over_q = log_mixture(d, beta);
  return {.value = (p == 0 ? 0 : beta * p * (d - over_q)) - (q == 0 ? 0 : (1 - beta) * q * over_q), .slope = q == 0 ? 0 : -(1 - beta) * q * over_q};
}

struct Buffers {
  std::vector<std::uint64_t> student, teacher, other;  // a mass and where it stands: bits << 32 | index
  std::vector<double> slope;
};

// Masses are not negative, so their bits are in their order; the largest first, equal ones by index. Three passes of 11 bits.
void sort_falling(std::vector<std::uint64_t>& values, std::vector<std::uint64_t>& other) {
  other.resize(values.size());
  for (const int shift : {32, 43, 54}) {
    std::array<std::uint32_t, 2049> begin{};
    const auto bucket = [&](std::uint64_t value) { return 2047u - static_cast<std::uint32_t>((value >> shift) & 2047u); };
    for (const std::uint64_t value : values) ++begin[bucket(value) + 1];
    for (std::size_t i = 1; i < begin.size(); ++i) begin[i] += begin[i - 1];
    for (const std::uint64_t value : values) other[begin[bucket(value)]++] = value;
    values.swap(other);
  }
}

std::uint64_t packed(double mass, std::int64_t index) {
  const auto narrow = static_cast<float>(mass);
  std::uint32_t bits = 0;
  std::memcpy(&bits, &narrow, sizeof bits);
  return std::uint64_t{bits} << 32 | static_cast<std::uint64_t>(index);
}

double mass_of(std::uint64_t value) {
  const auto bits = static_cast<std::uint32_t>(value >> 32);
  float mass = 0;
  std::memcpy(&mass, &bits, sizeof mass);
  return static_cast<double>(mass);
}

Objective objective_of(const DivergenceConfig& config) {
  const Objective objective = objective_named(config.objective);
  if (objective != Objective::kJensenShannon) return objective;
  return config.beta == 0 ? Objective::kForwardKl : config.beta == 1 ? Objective::kReverseKl : objective;
}

at::Tensor logits_of(const at::Tensor& hidden_KD, const models::Linear& head) {
  const at::NoGradGuard constant;
  const std::int64_t count = hidden_KD.size(0);
  at::Tensor rows_KD = hidden_KD.detach().to(head.compute_type());
  if (const std::int64_t added = (kRowRound - count % kRowRound) % kRowRound; added > 0) rows_KD = at::cat({rows_KD, at::zeros({added, rows_KD.size(1)}, rows_KD.options())});
  return head(rows_KD, 0).narrow(0, 0, count).to(at::kFloat).contiguous();
}

// ln softmax(logits / t)[target]
double log_probability(const float* logits, std::int64_t V, std::int64_t target, double t) { return log_mass(logits[target], t, log_sum(logits, V, t)); }

// gradient += factor (one-hot of target - softmax(logits / t)) / t
void add_log_probability_gradient(const float* logits, std::int64_t V, std::int64_t target, double t, double factor, float* gradient) {
  const double less = log_sum(logits, V, t);
  for (std::int64_t i = 0; i < V; ++i) gradient[i] -= static_cast<float>(factor / t * std::exp(log_mass(logits[i], t, less)));
  gradient[target] += static_cast<float>(factor / t);
}

}  // namespace

SpanValue unlike_row(const DivergenceConfig& config, const UnlikeConfig& unlike, const VocabularyMap& map, const SpanDistribution& teacher, const SpanDistribution& student, double weight, float* gradient) {
  static thread_local Buffers buffers;
  const double t = config.temperature;
  const std::int64_t V = map.student_size;
  const double less_student = log_sum(student.logits, V, t), less_teacher = log_sum(teacher.logits, map.teacher_size, t);
  const auto log_p = [&](std::int64_t id) { return std::max(log_mass(teacher.logits[id], t, less_teacher) + teacher.log_prefix, kLeastLog); };
  const auto log_q = [&](std::int64_t id) { return std::max(log_mass(student.logits[id], t, less_student) + student.log_prefix, kLeastLog); };
  buffers.slope.assign(static_cast<std::size_t>(V), 0);

  const double matched_share = !unlike.hybrid ? 0 : unlike.matched_share >= 0 ? unlike.matched_share : static_cast<double>(map.teacher_ids.size()) / static_cast<double>(map.teacher_size);
  double matched = 0, by_rank = 0;
  if (unlike.hybrid) {
    const Objective objective = objective_of(config);
    for (std::size_t i = 0; i < map.student_ids.size(); ++i) {
      const Term term = matched_term(objective, config.beta, log_p(map.teacher_ids[i]), log_q(map.student_ids[i]));
      matched += term.value;
      buffers.slope[static_cast<std::size_t>(map.student_ids[i])] = matched_share * term.slope;
    }
  }

  buffers.student.clear(), buffers.teacher.clear();
  if (!unlike.hybrid) {
    for (std::int64_t id = 0; id < V; ++id) buffers.student.push_back(packed(std::exp(log_q(id)), id));
    for (std::int64_t id = 0; id < map.teacher_size; ++id) buffers.teacher.push_back(packed(std::exp(log_p(id)), id));
  } else {
    for (std::int64_t id = 0; id < V; ++id)
      if (map.teacher_of[static_cast<std::size_t>(id)] < 0) buffers.student.push_back(packed(std::exp(log_q(id)), id));
    for (const std::int64_t id : map.teacher_alone) buffers.teacher.push_back(packed(std::exp(log_p(id)), id));
  }
  sort_falling(buffers.student, buffers.other), sort_falling(buffers.teacher, buffers.other);
  for (std::size_t rank = 0; rank < std::max(buffers.student.size(), buffers.teacher.size()); ++rank) {
    const double q = rank < buffers.student.size() ? mass_of(buffers.student[rank]) : 0, p = rank < buffers.teacher.size() ? mass_of(buffers.teacher[rank]) : 0;
    by_rank += std::abs(q - p);
    if (q != p && rank < buffers.student.size()) buffers.slope[buffers.student[rank] & 0xffffffffu] = (1 - matched_share) * (q > p ? q : -q);
  }

  const double scale = weight * t * t, sum = std::accumulate(buffers.slope.begin(), buffers.slope.end(), 0.0);
  if (gradient != nullptr)
    for (std::int64_t id = 0; id < V; ++id) {
      const double q = std::exp(log_mass(student.logits[id], t, less_student));
      gradient[id] += static_cast<float>(scale / t * (buffers.slope[static_cast<std::size_t>(id)] - q * sum));
    }
  return {.value = scale * (matched_share * matched + (1 - matched_share) * by_rank), .d_log_prefix = scale * sum};
}

std::vector<double> log_probabilities(const at::Tensor& hidden_KD, const models::Linear& head, std::span<const std::int64_t> tokens, std::int64_t real, double temperature) {
  std::vector<double> result(tokens.size());
  const std::int64_t rows = train::num_rows_in_chunk(head.outputs()), count = hidden_KD.size(0);
  for (std::int64_t begin = 0; begin < count; begin += rows) {
    const at::Tensor logits_KV = logits_of(hidden_KD.narrow(0, begin, std::min(rows, count - begin)), head);
    const float* const logits = logits_KV.const_data_ptr<float>();
    at::parallel_for(0, logits_KV.size(0), 1, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t k = first; k < last; ++k) {
        const auto at = static_cast<std::size_t>(begin + k);
        result[at] = log_probability(logits + k * logits_KV.size(1), real, tokens[at], temperature);
      }
    });
  }
  return result;
}

UnlikeLoss::UnlikeLoss(const UnlikeSignal& signal, const DivergenceConfig& config, const at::Tensor& hidden_TD, const models::Linear& head, const at::Tensor& index_K, const at::Tensor& targets_K, double factor)
    : signal_(signal), config_(config), targets_(targets_K.const_data_ptr<std::int64_t>()), factor_(factor) {
  const std::size_t S = signal.spans.size();
  const std::int64_t num_kept = index_K.numel(), rows = train::num_rows_in_chunk(head.outputs());
  const auto wrong = [&](const char* what) { fail(ErrorKind::kBug, "across tokenizers: ", what, " of ", S, " spans do not fit ", num_kept, " kept rows"); };
  if (signal.log_prefix_S.size() != S || (S > 0 && signal.hidden_SD.size(0) != static_cast<std::int64_t>(S))) wrong("the teacher's rows");
  if (signal.map->student_size > head.outputs() || signal.map->teacher_size > signal.head->outputs()) wrong("the vocabularies");
  std::int64_t end = 0;
  for (const StudentSpan& span : signal.spans) {
    if (span.first < end || span.count < 1 || span.count > kLongestSpan || span.first + span.count > num_kept) wrong("the student's rows");
    end = span.first + span.count;
    for (std::int64_t k = span.first; k < end; ++k)
      if (targets_[k] < 0 || targets_[k] >= signal.map->student_size) wrong("the tokens");
  }
  log_probability_K_.resize(static_cast<std::size_t>(num_kept)), d_log_prefix_S_.resize(S);

  const at::NoGradGuard constant;
  std::vector<float> unused(static_cast<std::size_t>(signal.map->student_size));
  for (std::size_t s = 0; s < S; ++s) {
    const StudentSpan& span = signal.spans[s];
    if (span.first / rows == (span.first + span.count - 1) / rows) continue;
    const at::Tensor student_KV = logits_of(hidden_TD.index_select(0, index_K.narrow(0, span.first, span.count)), head);
    const at::Tensor teacher_KV = logits_of(signal.hidden_SD.narrow(0, static_cast<std::int64_t>(s), 1), *signal.head);
    const float* const logits = student_KV.const_data_ptr<float>();
    double log_prefix = 0;
    for (std::int64_t i = 0; i + 1 < span.count; ++i) log_prefix += log_probability(logits + i * student_KV.size(1), signal.map->student_size, targets_[span.first + i], config.temperature);
    d_log_prefix_S_[s] = unlike_row(config, signal.config, *signal.map, {teacher_KV.const_data_ptr<float>(), signal.log_prefix_S[s]}, {logits + (span.count - 1) * student_KV.size(1), log_prefix},
                                    factor * span.weight, nullptr).d_log_prefix;
  }
}

double UnlikeLoss::add(const at::Tensor& student_KV, std::int64_t first, const at::Tensor& gradient_KV) {
  const std::vector<StudentSpan>& spans = signal_.spans;
  const std::int64_t count = student_KV.size(0), V = signal_.map->student_size;
  const float* const logits = student_KV.const_data_ptr<float>();
  float* const gradient = gradient_KV.defined() ? gradient_KV.mutable_data_ptr<float>() : nullptr;
  const auto row = [&](std::int64_t k) { return logits + (k - first) * student_KV.size(1); };
  const auto gradient_row = [&](std::int64_t k) { return gradient == nullptr ? nullptr : gradient + (k - first) * student_KV.size(1); };
  const auto last_of = [&](std::size_t s) { return spans[s].first + spans[s].count - 1; };

  while (next_ < spans.size() && last_of(next_) < first) ++next_;
  std::size_t end = next_;  // spans next_ .. end - 1 end in this chunk
  while (end < spans.size() && last_of(end) < first + count) ++end;
  std::vector<double> values(end - next_);
  const auto teacher_rows = static_cast<std::size_t>(train::num_rows_in_chunk(signal_.head->outputs()));
  for (std::size_t begin = next_; begin < end; begin += teacher_rows) {
    const std::size_t size = std::min(teacher_rows, end - begin);
    const at::Tensor teacher_SV = logits_of(signal_.hidden_SD.narrow(0, static_cast<std::int64_t>(begin), static_cast<std::int64_t>(size)), *signal_.head);
    const float* const teacher = teacher_SV.const_data_ptr<float>();
    at::parallel_for(0, static_cast<std::int64_t>(size), 1, [&](std::int64_t from, std::int64_t to) {
      for (std::int64_t i = from; i < to; ++i) {
        const std::size_t s = begin + static_cast<std::size_t>(i);
        const StudentSpan& span = spans[s];
        double log_prefix = 0;
        for (std::int64_t k = span.first; k < last_of(s); ++k) {
          double& known = log_probability_K_[static_cast<std::size_t>(k)];
          if (k >= first) known = log_probability(row(k), V, targets_[k], config_.temperature);
          log_prefix += known;
        }
        const SpanValue value = unlike_row(config_, signal_.config, *signal_.map, {teacher + i * teacher_SV.size(1), signal_.log_prefix_S[s]}, {row(last_of(s)), log_prefix}, factor_ * span.weight, gradient_row(last_of(s)));
        values[s - next_] = value.value;
        for (std::int64_t k = std::max(span.first, first); gradient != nullptr && k < last_of(s); ++k)
          add_log_probability_gradient(row(k), V, targets_[k], config_.temperature, value.d_log_prefix, gradient_row(k));
      }
    });
  }
  next_ = end;
  if (end < spans.size())  // the begin of a span that ends in the next chunk
    for (std::int64_t k = spans[end].first; k < first + count; ++k) {
      log_probability_K_[static_cast<std::size_t>(k)] = log_probability(row(k), V, targets_[k], config_.temperature);
      if (gradient != nullptr) add_log_probability_gradient(row(k), V, targets_[k], config_.temperature, d_log_prefix_S_[end], gradient_row(k));
    }
  return std::accumulate(values.begin(), values.end(), 0.0);
}

}  // namespace alambic::distill
