// SPDX-License-Identifier: Apache-2.0
#pragma once
// A teacher of other tokens reads a student's batch. docs/across_tokenizers.md.
// Letters: T = tokens, K = kept rows of the student's batch.
#include <ATen/core/Tensor.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "data/batch.h"
#include "distill/alignment.h"
#include "distill/imitation.h"
#include "distill/unlike_tokens.h"
#include "models/decoder.h"

namespace alambic {
class FieldVisitor;
}

namespace alambic::distill {

struct AcrossConfig {
  std::string across_tokenizers = "none";  // none, exact, uld, gold
  double matched_share = -1;               // gold: UnlikeConfig::matched_share
  void visit(FieldVisitor& fields);
};

class Interpreter {
 public:
  /// Error(kData) where a folder has no tokenizer.json, where exact finds two vocabularies of other kinds, or where the student's
  /// tokens do not spell the text. What is left out is told in `warnings`.
  Interpreter(const AcrossConfig& config, const std::filesystem::path& student, const models::ModelConfig& student_sizes, const std::filesystem::path& teacher, const models::ModelConfig& teacher_sizes,
              std::vector<std::string>& warnings);

  /// What `teacher` says of the kept rows index_K, of which each has its weight. No gradients. observer: of a pass over the student's
  /// positions, so with `exact` alone; may be null.
  TeacherRows listen(const models::Decoder& teacher, const data::Batch& batch, const at::Tensor& index_K, const at::Tensor& weights_K, double temperature, const models::Observer* observer = nullptr) const;

  const VocabularyMap& map() const { return *map_; }

 private:
  struct Languages;  // both tokenizers and what is known of them
  AcrossConfig config_;
  std::shared_ptr<const Languages> languages_;
  std::shared_ptr<const VocabularyMap> map_;

  TeacherRows listen_exactly(const models::Decoder& teacher, const data::Batch& batch, const at::Tensor& index_K, const at::Tensor& weights_K, const models::Observer* observer) const;
  std::shared_ptr<const UnlikeSignal> listen_by_spans(const models::Decoder& teacher, const data::Batch& batch, const at::Tensor& index_K, const at::Tensor& weights_K, double temperature) const;
};

}  // namespace alambic::distill
