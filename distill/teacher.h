// SPDX-License-Identifier: Apache-2.0
#pragma once
// Teachers: frozen decoders in the same process whose hidden states of a batch are made beside the student's, or what a cache
// holds of one that has read the text before.
// Letters: K = kept rows of a batch, D = hidden size.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "data/batch.h"
#include "distill/divergence.h"
#include "distill/imitation.h"
#include "distill/interpreter.h"
#include "distill/teacher_cache.h"
#include "models/decoder.h"
#include "train/inputs.h"
#include "train/train_config.h"

namespace alambic::distill {

struct TeacherConfig {
  std::filesystem::path model = {};    // a Hugging Face folder; the student's own: its base teaches, without a second copy
  std::filesystem::path adapter = {};  // a PEFT folder on it; "": none
  std::filesystem::path cache = {};    // a teacher cache to read instead of the model, which then may be left out; "": none
  double weight = 1;              // relative to the other teachers of the same text
  std::vector<std::string> sources = {}, languages = {};  // of the stores learnt from; both empty: it teaches all text
  std::string quantize = "auto";  // auto, none, nf4, int8
  AcrossConfig across = {};       // for a teacher of other tokens
  void visit(FieldVisitor& fields);
};

/// Ids that mean the same token in both models: 0 .. n - 1, where n is the smaller of the vocabularies and of what the tokenizer
/// knows; what is behind is padding. Error(kData) where an id means two tokens, naming the first, or where the tokens cannot be told.
/// A warning where only the texts' preparation differs, or where a folder has no tokenizer.json.
std::int64_t shared_vocabulary(const std::filesystem::path& student, const models::ModelConfig& student_sizes, const std::filesystem::path& teacher,
                               const models::ModelConfig& teacher_sizes, std::vector<std::string>& warnings);

/// What of a decoder just loaded is replaced when something trains: all but the blocks' linear layers. Handles, no copies.
models::Decoder outside_of_linears(const models::Decoder& loaded);
/// The base that a student's adapters stand on, as a decoder that shares all memory with the student: `outside` as
/// outside_of_linears() gave it. Its passes and the student's must not overlap. nullopt where the student changes the base itself.
std::optional<models::Decoder> base_of(const models::Decoder& student, const models::Decoder& outside);

class Teacher {
 public:
  /// Opens the folder and checks it against the student's model and data; notes itself in `inputs`. Error(kUsage) for sources or
  /// languages that no store has; Error(kData) for other tokens.
  Teacher(const TeacherConfig& config, const DivergenceConfig& divergence, const train::TrainConfig& student, train::Inputs& inputs);

  /// Loads it, or takes the student's base, which then must stay where it is: `outside` as above.
  void load(const models::Decoder& student, const models::Decoder& outside);

  /// What it says of the rows index_K, the kept ones, of which each counts weights_K (f32). No gradients. Reads this teacher's
  /// memory; valid until the next call. observer: of its pass (not of a cache, nor of one of other tokens but `exact`); may be null.
  TeacherRows rows(const data::Batch& batch, const at::Tensor& index_K, const at::Tensor& weights_K, const models::Observer* observer = nullptr);
  /// Its weight for each document of a batch; 0: it does not teach that text.
  double weight_of(const data::Origin& origin) const { return serves_.at(origin.store).at(origin.source) ? config_.weight : 0; }

  std::int64_t shared_vocabulary() const { return shared_vocabulary_; }
  std::uint64_t num_bytes() const { return num_bytes_; }  // of its own, after load()
  bool shares_the_base() const { return shares_; }
  const std::string& sha256() const { return sha256_; }
  const models::ModelConfig& sizes() const { return sizes_; }         // of a model
  const models::Decoder& decoder() const { return decoder_; }         // of a model, from the first rows() on

 private:
  TeacherConfig config_;
  train::TrainConfig student_;
  const models::Decoder* student_decoder_ = nullptr;  // whose base it is
  models::ModelConfig sizes_;
  models::Decoder decoder_, outside_;
  std::optional<TeacherCache> cache_;
  SparseSignal signal_;                    // of the cache, for the batch last asked for
  std::vector<std::vector<bool>> serves_;  // by store and source
  std::int64_t shared_vocabulary_ = 0;
  std::uint64_t num_bytes_ = 0;
  std::string sha256_;
  std::optional<Interpreter> interpreter_;  // of a teacher of other tokens
  double temperature_ = 1;
  bool same_base_ = false, shares_ = false, is_ready_ = false;

  void open_cache(const DivergenceConfig& divergence, train::Inputs& inputs);
  void open_model(train::Inputs& inputs);
  void make_ready();
};

}  // namespace alambic::distill
