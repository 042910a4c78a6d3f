// SPDX-License-Identifier: Apache-2.0
#pragma once
// Sequence-level distillation (Kim and Rush 2016, arXiv:1606.07947): a corpus of what the teacher itself answers, made once, which any
// student is then trained on as on any other text. docs/on_policy.md.
#include <cstdint>
#include <filesystem>
#include <functional>
#include <vector>

#include "core/json.h"

namespace alambic {
class FieldVisitor;
}

namespace alambic::distill {

struct DistillConfig;

struct TeacherTextConfig {
  std::filesystem::path prompts = {};  // JSON lines or Parquet; empty: the stores of data.mixture
  std::filesystem::path output = {};   // JSON lines; <output>.provenance.json beside it
  std::int64_t samples = 1, keep = 1;  // answers drawn for a prompt; the likeliest of them that are kept
  double temperature = 1, top_p = 1;
  std::int64_t min_tokens = 1, max_new_tokens = 256;
  bool whole_answers = true;    // only answers that the teacher ended by a stop token
  double max_repetition = 0.5;  // most of the runs of four tokens that may have been there before
  std::int64_t max_prompts = 0, batch = 16;
  void visit(FieldVisitor& fields);
};

/// Share of the runs of four ids that occurred before in the ids; 0 where there is none.
double repetition(const std::vector<std::int64_t>& ids);

/// Makes the corpus with the config's only teacher; returns what <output>.provenance.json holds. The same config gives the same bytes;
/// another `batch` rounds the logits otherwise, which in bf16 soon draws another token. Error(kUsage): no or several teachers, no output, an output that exists;
/// Error(kData) for prompts that cannot be read; Error(kStopped) when asked to stop, which leaves nothing.
Json write_teacher_text(const DistillConfig& config, const std::function<bool()>& stop_requested);

}  // namespace alambic::distill
