// SPDX-License-Identifier: Apache-2.0
#pragma once
// A student made of a model folder: the parts of it that matter most on a sample of text, or the same family with fresh weights;
// saved as a model folder. docs/pruning.md tells how the parts are chosen.
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "core/config.h"
#include "core/json.h"
#include "distill/importance.h"
#include "distill/smaller_vocabulary.h"
#include "distill/student_shape.h"
#include "train/train_config.h"

namespace alambic::distill {

struct HeldOutConfig {
  std::vector<train::EvaluationItem> stores;
  std::int64_t row_length = 1024, max_tokens = 50'000;
  void visit(FieldVisitor& fields);
};

struct PruneConfig {
  std::filesystem::path model, output;
  std::string weights = "pruned";  // pruned, fresh
  double keep = 0;                 // share of the parameters; 0: what sizes and vocabulary say
  std::vector<std::string> shrink = {"hidden", "mlp"};  // axes that keep may make smaller: hidden, mlp, heads, depth
  std::int64_t round_to = 32;
  SizesConfig sizes;
  std::string depth_by = "influence";  // influence, loss
  CalibrationConfig calibration;
  VocabularyConfig vocabulary;
  HeldOutConfig evaluation;
  std::string compute_type = "f32";  // f32, bf16
  std::uint64_t seed = 0;            // of fresh weights
  std::int64_t threads = 0;
  std::string name, base_name;
  void visit(FieldVisitor& fields);
};

/// Error(kUsage) lists every contradiction.
void check(const PruneConfig& config);

struct PruneReport {
  std::filesystem::path output;
  bool already_done = false;
  std::int64_t parameters_before = 0, parameters = 0;
  std::uint64_t bytes_before = 0, bytes = 0;  // of the weight files
  Shape shape_before, shape;
  std::vector<std::int64_t> layers;  // of the base that were kept; empty where weights are fresh
  Json evaluation = Json::array();   // [{"name", "before": {...}, "after": {...} | null}]
  std::vector<std::string> warnings;
  Json json() const;
};

/// Writes the student. The base is read a tensor at a time, but for the calibration and the evaluation, which load it once.
/// Every written tensor is read again and compared before the folder appears; after an error nothing is left behind.
/// Error(kUsage): contradictory sizes, or an output that is there and is not this very student. Error(kData): a damaged model or
/// store, a quantised model. Error(kResource): disk.
PruneReport prune(const PruneConfig& config);

}  // namespace alambic::distill
