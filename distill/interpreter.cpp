// SPDX-License-Identifier: Apache-2.0
#include "distill/interpreter.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>

#include <optional>

#include "core/config.h"
#include "core/error.h"
#include "core/log.h"
#include "train/step.h"

namespace alambic::distill {

void AcrossConfig::visit(FieldVisitor& fields) {
  fields.field("across_tokenizers", across_tokenizers,
               {.help = "for a teacher of other tokens: exact (ids mapped where the tokens are the same), uld (probabilities by rank) or gold (mapped tokens one by one, the others by rank); docs/across_tokenizers.md",
                .choices = {"none", "exact", "uld", "gold"}});
  fields.field("matched_share", matched_share, {.help = "gold: weight of the mapped tokens' part, 1 - it that of the others; -1: the share of the teacher's tokens that are mapped", .low = -1, .high = 1});
}

struct Interpreter::Languages {
  data::Tokenizer student_tokenizer, teacher_tokenizer;
  models::ModelConfig student_sizes, teacher_sizes;
  TokensOf student, teacher;
  std::optional<Spelling> of_student, of_teacher;
  std::optional<Translator> translator;

  Languages(const std::filesystem::path& student_folder, const models::ModelConfig& student_model, const std::filesystem::path& teacher_folder, const models::ModelConfig& teacher_model)
      : student_tokenizer(data::Tokenizer::from_file(student_folder)), teacher_tokenizer(data::Tokenizer::from_file(teacher_folder)), student_sizes(student_model), teacher_sizes(teacher_model),
        student{student_tokenizer, student_sizes, student_folder.string()}, teacher{teacher_tokenizer, teacher_sizes, teacher_folder.string()} {}
  Languages(const Languages&) = delete;
  Languages& operator=(const Languages&) = delete;

  void read_spellings() {
    of_student = Spelling::of(student_tokenizer, student.source);
    if (!of_student)
      fail(ErrorKind::kData, student.source, ": its tokens do not spell the text byte for byte: neither a byte-level nor a SentencePiece vocabulary", Remedy{"use a teacher of the student's tokenizer"});
    of_teacher = Spelling::of(teacher_tokenizer, teacher.source);  // none: its places in the text are enough
    translator.emplace(student, *of_student, teacher, of_teacher ? &*of_teacher : nullptr);
  }
};

Interpreter::Interpreter(const AcrossConfig& config, const std::filesystem::path& student, const models::ModelConfig& student_sizes, const std::filesystem::path& teacher, const models::ModelConfig& teacher_sizes,
                         std::vector<std::string>& warnings)
    : config_(config) {
  if (config.across_tokenizers == "none") fail(ErrorKind::kBug, "an interpreter for teacher and student of one tokenizer");
  const auto languages = std::make_shared<Languages>(student, student_sizes, teacher, teacher_sizes);
  const std::string name = teacher.string() + ": across_tokenizers: " + config.across_tokenizers + ": ";
  if (config.across_tokenizers == "exact") {
    map_ = std::make_shared<VocabularyMap>(map_exactly(languages->student, languages->teacher));
    const auto alone = map_->student_size - static_cast<std::int64_t>(map_->student_ids.size());
    if (alone > 0) warnings.push_back(name + std::to_string(alone) + " tokens of the student are unknown to it; behind one of them it teaches nothing more of a document");
    if (!map_->teacher_alone.empty()) warnings.push_back(name + std::to_string(map_->teacher_alone.size()) + " of its tokens are unknown to the student; their probability goes to the others in proportion");
  } else {
    languages->read_spellings();
    map_ = std::make_shared<VocabularyMap>(languages->of_teacher ? map_by_spelling(languages->student, *languages->of_student, languages->teacher, *languages->of_teacher) : map_by_name(languages->student, languages->teacher));
    log_info(name, map_->student_ids.size(), " tokens of the student's ", map_->student_size, " are one of the teacher's ", map_->teacher_size);
    if (config.across_tokenizers == "gold" && map_->student_ids.empty())
      fail(ErrorKind::kData, name, "no token of ", student.string(), " is one of the teacher's", Remedy{"use across_tokenizers: uld"});
  }
  languages_ = languages;
}

TeacherRows Interpreter::listen(const models::Decoder& teacher, const data::Batch& batch, const at::Tensor& index_K, const at::Tensor& weights_K, double temperature,
                                const models::Observer* observer) const {
  const at::NoGradGuard constant;
  const at::Tensor weights = weights_K.defined() ? weights_K : at::ones({index_K.numel()}, at::kFloat);
  if (config_.across_tokenizers == "exact") return listen_exactly(teacher, batch, index_K, weights, observer);
  return {.unlike = listen_by_spans(teacher, batch, index_K, weights, temperature)};
}

TeacherRows Interpreter::listen_exactly(const models::Decoder& teacher, const data::Batch& batch, const at::Tensor& index_K, const at::Tensor& weights_K, const models::Observer* observer) const {
  data::Batch read = batch;
  read.tokens_T = batch.tokens_T.clone();
  at::Tensor readable_T = at::ones({batch.tokens_T.numel()}, at::kFloat);
  std::int64_t* token = read.tokens_T.mutable_data_ptr<std::int64_t>();
  float* readable = readable_T.mutable_data_ptr<float>();
  for (const std::int64_t length : batch.document_lengths) {
    bool known = true;
    for (std::int64_t i = 0; i < length; ++i, ++token, ++readable) {
      const std::int64_t id = *token < map_->student_size ? map_->teacher_of[static_cast<std::size_t>(*token)] : -1;
      known = known && id >= 0;
      *token = known ? id : map_->teacher_ids.front();  // what stands here is read by rows of weight 0 alone
      *readable = known ? 1 : 0;
    }
  }
  models::Input input = train::input_of(read, 0);
  input.observer = observer;
  return {.head = &teacher.head, .hidden_KD = teacher.hidden_TD(input).index_select(0, index_K), .weights_K = (weights_K * readable_T.index_select(0, index_K)).contiguous(), .map = map_};
}

std::shared_ptr<const UnlikeSignal> Interpreter::listen_by_spans(const models::Decoder& teacher, const data::Batch& batch, const at::Tensor& index_K, const at::Tensor& weights_K, double temperature) const {
  auto signal = std::make_shared<UnlikeSignal>();
  signal->map = map_;
  signal->config = {.hybrid = config_.across_tokenizers == "gold", .matched_share = config_.matched_share};
  signal->head = &teacher.head;

  const at::Tensor tokens_T = batch.tokens_T.contiguous(), rows_K = index_K.contiguous();
  const std::int64_t* const tokens = tokens_T.const_data_ptr<std::int64_t>();
  std::vector<std::int64_t> kept_T(static_cast<std::size_t>(tokens_T.numel()), -1);  // place of a row among the kept ones
  for (std::int64_t k = 0; k < rows_K.numel(); ++k) kept_T[static_cast<std::size_t>(rows_K.const_data_ptr<std::int64_t>()[k])] = k;

  std::vector<std::int64_t> read, positions, last_rows, prefix_rows, prefix_tokens;
  std::vector<std::size_t> prefix_spans;
  data::Batch of_teacher;
  std::int64_t first = 0;
  for (std::size_t document = 0; document < batch.document_lengths.size(); first += batch.document_lengths[document++]) {
    const std::span<const std::int64_t> ids(tokens + first, static_cast<std::size_t>(batch.document_lengths[document]));
    const auto is_kept = [&](const Span& span) {
      for (std::int64_t i = span.student_first - 1; i < span.student_first + span.student_count - 1; ++i)
        if (kept_T[static_cast<std::size_t>(first + i)] < 0 || ids[static_cast<std::size_t>(i + 1)] >= map_->student_size) return false;
      return true;
    };
    const auto weight_at = [&](std::int64_t k) { return k < 0 ? 0.0 : static_cast<double>(weights_K.const_data_ptr<float>()[k]); };
    bool teaches = false;
    for (std::int64_t i = first; i < first + batch.document_lengths[document]; ++i) teaches = teaches || weight_at(kept_T[static_cast<std::size_t>(i)]) != 0;
    if (!teaches) continue;
    const Translation translation = languages_->translator->translate(ids, batch.origins.at(document).first_token == 0);
    const auto begin = static_cast<std::int64_t>(read.size());
    std::int64_t length = 0;  // tokens of the teacher that something is learnt from
    for (const Span& span : translation.spans) {
      const std::int64_t teacher_end = span.teacher_first + span.teacher_count;
      if (span.student_first < 1 || span.teacher_first < 1 || span.student_count > kLongestSpan || span.teacher_count > kLongestSpan || !is_kept(span)) continue;
      if (teacher.config.max_positions > 0 && teacher_end > teacher.config.max_positions) break;
      const std::int64_t k = kept_T[static_cast<std::size_t>(first + span.student_first - 1)];
      if (weight_at(k) == 0) continue;
      bool known = true;
      for (std::int64_t i = span.teacher_first; i < teacher_end; ++i) known = known && translation.ids[static_cast<std::size_t>(i)] < map_->teacher_size;
      if (!known) continue;
      for (std::int64_t i = span.teacher_first; i + 1 < teacher_end; ++i)
        prefix_rows.push_back(begin + i - 1), prefix_tokens.push_back(translation.ids[static_cast<std::size_t>(i)]), prefix_spans.push_back(signal->spans.size());
      last_rows.push_back(begin + teacher_end - 2);
      signal->spans.push_back({.first = k, .count = span.student_count, .weight = weight_at(k)});
      length = teacher_end;
    }
    if (length == 0) continue;
    for (std::int64_t i = 0; i < length; ++i) {
      const std::int64_t id = translation.ids[static_cast<std::size_t>(i)];
      if (id >= map_->teacher_size)
        fail(ErrorKind::kData, languages_->teacher.source, ": its tokenizer has a token ", id, ", its model only ", map_->teacher_size, Remedy{"take the tokenizer.json that belongs to the model"});
      read.push_back(id), positions.push_back(i);
    }
    of_teacher.document_lengths.push_back(length), of_teacher.origins.push_back(batch.origins[document]);
  }
  signal->log_prefix_S.resize(signal->spans.size());
  if (signal->spans.empty()) return signal;
  of_teacher.tokens_T = at::tensor(read, at::kLong), of_teacher.positions_T = at::tensor(positions, at::kLong);
  const at::Tensor hidden_TD = teacher.hidden_TD(train::input_of(of_teacher, 0));
  signal->hidden_SD = hidden_TD.index_select(0, at::tensor(last_rows, at::kLong));
  if (!prefix_rows.empty()) {
    const std::vector<double> known = log_probabilities(hidden_TD.index_select(0, at::tensor(prefix_rows, at::kLong)), teacher.head, prefix_tokens, map_->teacher_size, temperature);
    for (std::size_t i = 0; i < known.size(); ++i) signal->log_prefix_S[prefix_spans[i]] += known[i];
  }
  return signal;
}

}  // namespace alambic::distill
