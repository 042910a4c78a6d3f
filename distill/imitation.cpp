// SPDX-License-Identifier: Apache-2.0
#include "distill/imitation.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "core/error.h"
#include "models/row_kernels.h"

namespace alambic::distill {
namespace {

constexpr std::int64_t kRowRound = 32;  // few shapes of products, as in train/cross_entropy.cpp

// One teacher's rows of a chunk.
struct Chunk {
  at::Tensor logits_KV;            // live
  const TeacherRows* teacher = nullptr;
  std::int64_t first = 0;          // row of the chunk among the kept rows
  const float* weights = nullptr;  // of the chunk's rows; null: 1 each
};

at::Tensor logits_of(const TeacherRows& teacher, std::int64_t first, std::int64_t count) {
  const at::NoGradGuard constant;
  at::Tensor rows_KD = teacher.hidden_KD.narrow(0, first, count);
  if (const std::int64_t added = (kRowRound - count % kRowRound) % kRowRound; added > 0) rows_KD = at::cat({rows_KD, at::zeros({added, rows_KD.size(1)}, rows_KD.options())});
  return (*teacher.head)(rows_KD, 0).narrow(0, 0, count);
}

// Row k of f32 or bf16 logits as f32: itself, or a copy in `room`.
const float* row_of(const at::Tensor& logits_KV, std::int64_t k, float* room) {
  const std::int64_t V = logits_KV.size(1);
  if (logits_KV.scalar_type() == at::kFloat) return logits_KV.const_data_ptr<float>() + k * V;
  models::kernels::copy_rows(logits_KV.const_data_ptr<at::BFloat16>() + k * V, V, room, V, 1, V);
  return room;
}

// divergence_row over the pairs of ids that mean the same: masses of other ids go to these in proportion, on both sides.
double mapped_row(const DivergenceConfig& config, const VocabularyMap& map, const float* teacher, const float* student, double weight, float* gradient, float* scratch) {
  static thread_local std::vector<float> buffer;
  const std::size_t M = map.student_ids.size();
  if (buffer.size() < 3 * M) buffer.resize(3 * M);
  float *const teacher_M = buffer.data(), *const student_M = teacher_M + M, *const gradient_M = student_M + M;
  for (std::size_t i = 0; i < M; ++i) teacher_M[i] = teacher[map.teacher_ids[i]], student_M[i] = student[map.student_ids[i]], gradient_M[i] = 0;
  const double value = divergence_row(config, teacher_M, student_M, static_cast<std::int64_t>(M), weight, gradient != nullptr ? gradient_M : nullptr, scratch);
  for (std::size_t i = 0; gradient != nullptr && i < M; ++i) gradient[map.student_ids[i]] += gradient_M[i];
  return value;
}

// The work of one thread: rows one after the other, in buffers that the thread keeps.
class Rows {
 public:
  Rows(at::Tensor& logits_KV, const std::int64_t* targets, const Mix& mix, std::span<const Chunk> chunks, bool differentiable)
      : logits_KV_(logits_KV), targets_(targets), mix_(mix), chunks_(chunks), differentiable_(differentiable), vocabulary_(logits_KV.size(1)) {}

  void row(std::int64_t k, Nats& nats) const {
    static thread_local std::vector<float> buffer;
    std::int64_t widest = vocabulary_;
    for (const Chunk& chunk : chunks_)
      if (chunk.logits_KV.defined()) widest = std::max(widest, chunk.logits_KV.size(1));
    if (buffer.size() < static_cast<std::size_t>(5 * widest)) buffer.resize(static_cast<std::size_t>(5 * widest));
    float *const room = buffer.data(), *const gradient = room + widest, *const of_teacher = gradient + widest, *const scratch = of_teacher + widest;
    const float* const student = row_of(logits_KV_, k, room);

    std::copy(student, student + vocabulary_, gradient);
    const bool trains_text = differentiable_ && mix_.cross_entropy != 0;
    models::kernels::cross_entropy_rows(gradient, targets_ + k, mix_.text.label_smoothing, mix_.text.z_loss, trains_text, &nats.cross_entropy, 1, vocabulary_);
    const auto share = static_cast<float>(trains_text ? mix_.cross_entropy : 0);
    for (std::int64_t i = 0; i < vocabulary_; ++i) gradient[i] = share == 0 ? 0 : gradient[i] * share;

    float* const into = differentiable_ ? gradient : nullptr;
    nats.divergence = 0;
    for (const Chunk& chunk : chunks_) {
      const double weight = chunk.weights == nullptr ? 1 : static_cast<double>(chunk.weights[k]), factor = weight * mix_.divergence;
      if (factor == 0) continue;
      double value = 0;
      if (chunk.teacher->map)
        value = mapped_row(mix_.imitation, *chunk.teacher->map, row_of(chunk.logits_KV, k, of_teacher), student, factor, into, scratch);
      else if (chunk.logits_KV.defined())
        value = divergence_row(mix_.imitation, row_of(chunk.logits_KV, k, of_teacher), student, mix_.shared_vocabulary, factor, into, scratch);
      else
        value = (chunk.teacher->sampled ? sampled_row : top_k_row)(mix_.imitation.temperature, sparse_row(*chunk.teacher->signal, chunk.first + k), student, mix_.shared_vocabulary, factor, into, scratch);
      nats.divergence += value / mix_.divergence;
    }
    if (!differentiable_) return;
    if (logits_KV_.scalar_type() == at::kFloat) std::copy(gradient, gradient + vocabulary_, logits_KV_.mutable_data_ptr<float>() + k * vocabulary_);
    else models::kernels::copy_rows(gradient, vocabulary_, logits_KV_.mutable_data_ptr<at::BFloat16>() + k * vocabulary_, vocabulary_, 1, vocabulary_);
  }

 private:
  static SparseRow sparse_row(const SparseSignal& signal, std::int64_t k) {
    const std::int64_t N = signal.ids_KN.size(1);
    return {.ids = signal.ids_KN.const_data_ptr<std::int32_t>() + k * N, .probabilities = signal.probabilities_KN.const_data_ptr<float>() + k * N, .slots = N,
            .tail = signal.tail_K.const_data_ptr<float>()[k]};
  }

  at::Tensor& logits_KV_;
  const std::int64_t* targets_;
  const Mix& mix_;
  std::span<const Chunk> chunks_;
  bool differentiable_;
  std::int64_t vocabulary_;
};

void check(const TeacherRows& teacher, std::int64_t num_kept, std::int64_t shared, std::int64_t vocabulary) {
  const auto wrong = [&](const char* what) { fail(ErrorKind::kBug, "imitation: ", what, " of a teacher does not fit ", num_kept, " kept rows and ", shared, " shared tokens"); };
  if (teacher.weights_K.defined() && (teacher.weights_K.sizes() != at::IntArrayRef{num_kept} || teacher.weights_K.scalar_type() != at::kFloat || !teacher.weights_K.is_contiguous())) wrong("weights");
  if ((teacher.head != nullptr) + (teacher.signal != nullptr) + (teacher.unlike != nullptr) != 1) wrong("head or signal");
  if (teacher.head != nullptr && (teacher.hidden_KD.size(0) != num_kept || (!teacher.map && teacher.head->outputs() < shared))) wrong("hidden states or head");
  if (teacher.map && (teacher.head == nullptr || teacher.map->student_ids.empty() || teacher.map->student_size > vocabulary || teacher.map->teacher_size > teacher.head->outputs())) wrong("map of tokens");
  if (teacher.signal == nullptr) return;
  const SparseSignal& signal = *teacher.signal;
  if (signal.ids_KN.scalar_type() != at::kInt || signal.ids_KN.dim() != 2 || signal.ids_KN.size(0) != num_kept || signal.probabilities_KN.sizes() != signal.ids_KN.sizes() ||
      signal.probabilities_KN.scalar_type() != at::kFloat || signal.tail_K.sizes() != at::IntArrayRef{num_kept} || signal.tail_K.scalar_type() != at::kFloat || !signal.ids_KN.is_contiguous() ||
      !signal.probabilities_KN.is_contiguous() || !signal.tail_K.is_contiguous())
    wrong("signal");
}

}  // namespace

at::Tensor imitation_sum(const at::Tensor& hidden_TD, const models::Linear& head, const at::Tensor& targets_T, const at::Tensor& keep_T, std::uint64_t dropout_seed, const Mix& mix,
                         std::span<const TeacherRows> teachers, Nats& nats) {
  if (mix.divergence == 0 || teachers.empty()) {
    const at::Tensor loss = train::cross_entropy_sum(hidden_TD, head, targets_T, keep_T, dropout_seed, mix.text);
    nats.cross_entropy += loss.item<double>();
    return mix.cross_entropy == 1 ? loss : loss * mix.cross_entropy;
  }
  const at::Tensor index_K = keep_T.nonzero().squeeze(1), targets_K = targets_T.index_select(0, index_K).contiguous();
  const std::int64_t num_kept = index_K.numel(), vocabulary = head.outputs();
  if (mix.shared_vocabulary < 1 || mix.shared_vocabulary > vocabulary) fail(ErrorKind::kBug, "imitation: ", mix.shared_vocabulary, " shared tokens of ", vocabulary);
  if (num_kept > 0 && (targets_K.min().item<std::int64_t>() < 0 || targets_K.max().item<std::int64_t>() >= vocabulary))
    fail(ErrorKind::kData, "a token to predict has id ", targets_K.max().item<std::int64_t>(), ", outside the model's ", vocabulary, " tokens", Remedy{"prepare the data with the tokenizer of this model"});
  for (const TeacherRows& teacher : teachers) check(teacher, num_kept, mix.shared_vocabulary, vocabulary);
  std::vector<UnlikeLoss> unlike;
  for (const TeacherRows& teacher : teachers)
    if (teacher.unlike && !teacher.unlike->spans.empty()) unlike.emplace_back(*teacher.unlike, mix.imitation, hidden_TD, head, index_K, targets_K, mix.divergence);

  return train::head_loss_sum(hidden_TD, head, index_K, dropout_seed, [&](at::Tensor& logits_KV, std::int64_t first, bool differentiable) {
    const std::int64_t count = logits_KV.size(0);
    at::Tensor by_spans_KV;  // gradient of the losses that look at several rows, which are made before any row becomes its gradient
    double by_spans = 0;
    if (!unlike.empty()) {
      const at::Tensor student_KV = logits_KV.to(at::kFloat).contiguous();
      if (differentiable) by_spans_KV = at::zeros(student_KV.sizes(), student_KV.options());
      for (UnlikeLoss& loss : unlike) by_spans += loss.add(student_KV, first, by_spans_KV);
    }
    std::vector<Chunk> chunks;
    for (const TeacherRows& teacher : teachers) {
      if (teacher.unlike) continue;
      const float* const weights = teacher.weights_K.defined() ? teacher.weights_K.const_data_ptr<float>() + first : nullptr;
      if (weights != nullptr && std::all_of(weights, weights + count, [](float weight) { return weight == 0; })) continue;
      chunks.push_back({.logits_KV = teacher.head != nullptr ? logits_of(teacher, first, count) : at::Tensor(), .teacher = &teacher, .first = first, .weights = weights});
    }
    const Rows rows(logits_KV, targets_K.const_data_ptr<std::int64_t>() + first, mix, chunks, differentiable);
    std::vector<Nats> each(static_cast<std::size_t>(count));
    at::parallel_for(0, count, 4, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t k = begin; k < end; ++k) rows.row(k, each[static_cast<std::size_t>(k)]);
    });
    if (by_spans_KV.defined()) logits_KV.add_(by_spans_KV);
    Nats sum{.divergence = by_spans / mix.divergence};
    for (const Nats& row : each) sum.cross_entropy += row.cross_entropy, sum.divergence += row.divergence;
    nats.cross_entropy += sum.cross_entropy, nats.divergence += sum.divergence;
    // 0 times what is not finite is not finite: a part of no weight must not spoil the other.
    return (mix.cross_entropy == 0 ? 0 : mix.cross_entropy * sum.cross_entropy) + mix.divergence * sum.divergence;
  });
}

}  // namespace alambic::distill
