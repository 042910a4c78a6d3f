// SPDX-License-Identifier: Apache-2.0
#pragma once
// The recipe: a student that learns from text and from teachers' distributions over the next token. The run folder is that of
// train (train/finetune.h).
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "core/json.h"
#include "distill/divergence.h"
#include "distill/match.h"
#include "distill/on_policy.h"
#include "distill/teacher.h"
#include "distill/teacher_text.h"
#include "train/finetune.h"
#include "train/train_config.h"

namespace alambic::distill {

struct SignalConfig {
  std::vector<TeacherConfig> teachers;
  double alpha = 0.5;  // the loss is (1 - alpha) cross-entropy + alpha divergence
  DivergenceConfig divergence;
  MatchConfig match = {};
  OnPolicyConfig on_policy = {};
  void visit(FieldVisitor& fields);
};

struct DistillConfig {
  train::TrainConfig train;  // the student
  SignalConfig distill;
  TeacherTextConfig generate = {};  // of write_teacher_text() alone
  void visit(FieldVisitor& fields);
};

/// Contradictions between fields, train's included: Error(kUsage) listing all of them.
void check(const DistillConfig& config);

/// train::finetune with the loss of docs/distillation.md. Besides its errors: Error(kData) for a teacher of other tokens,
/// Error(kUsage) for one that would teach nothing.
train::TrainReport distill(const DistillConfig& config, bool resume, const std::function<bool()>& stop_requested);

/// train::plan of it; "memory" has "teachers" (bytes of their own; 0 where the student's base teaches), "teachers" one entry each.
Json plan(const DistillConfig& config, bool probe = true, int num_ranks = 1);

}  // namespace alambic::distill
