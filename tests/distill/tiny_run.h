// SPDX-License-Identifier: Apache-2.0
#pragma once
// Distillation runs on the tiny models and stores of tests/train/tiny_run.h, and what they tell of their steps.
#include <fstream>
#include <string>
#include <vector>

#include "distill/distill.h"
#include "tests/train/tiny_run.h"

namespace alambic::testing {

/// Another model than the student's, of the same tokens.
inline fs::path other_model() { return golden_path("peft/llama_untied"); }

inline distill::DistillConfig tiny_config(const fs::path& folder, const std::string& run, const fs::path& teacher) {
  distill::DistillConfig config{.train = tiny_config(folder, run), .distill = {}};
  config.distill.teachers = {{.model = teacher}};
  return config;
}

/// The training steps of a run's metrics.jsonl.
inline std::vector<Json> steps_of(const fs::path& run) {
  std::vector<Json> steps;
  std::ifstream lines(run / "metrics.jsonl");
  for (std::string line; std::getline(lines, line);)
    if (const Json json = parse_json(line, "metrics"); json["kind"] == "train") steps.push_back(json);
  return steps;
}

inline double number(const Json& json, const char* key) { return json[key].get<double>(); }

}  // namespace alambic::testing
