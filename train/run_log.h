// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a run tells while it runs: metrics.jsonl, speed.jsonl, TensorBoard files, and progress lines on stderr.
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <string>

#include "core/json.h"
#include "train/tensorboard.h"

namespace alambic::train {

/// Memory of this process in bytes: now, and the most it ever was.
struct Memory {
  std::uint64_t now = 0, peak = 0;
};
Memory process_memory();

/// "1h02m", "3m20s", "8s".
std::string duration_text(double seconds);

/// A number by a printf format, for a person.
std::string printed(const char* format, double value);

/// Appends lines to a file that has `committed_bytes` valid bytes: what is behind them is cut off first. A file that is
/// shorter is reported, and goes on where it ends.
class LineFile {
 public:
  LineFile(std::filesystem::path path, std::uint64_t committed_bytes);
  ~LineFile();
  LineFile(const LineFile&) = delete;
  LineFile& operator=(const LineFile&) = delete;
  void line(const Json& value);
  std::uint64_t sync();  // fsync; returns the length

 private:
  std::filesystem::path path_;
  int descriptor_ = -1;
  std::uint64_t num_bytes_ = 0;
};

class RunLog {
 public:
  /// committed_bytes: of metrics.jsonl at the checkpoint that is resumed from; 0 for a new run.
  RunLog(const std::filesystem::path& run, std::uint64_t committed_bytes, std::int64_t first_step, std::int64_t total_steps);

  /// A line of metrics.jsonl: only what the run computes, so that the file has the same bytes however often the run was
  /// stopped. Its numbers become TensorBoard scalars "<tag>/<key>".
  void metrics(std::int64_t step, const std::string& tag, const Json& figures);
  void text(std::int64_t step, const std::string& tag, const std::string& text);

  /// After each step: time and tokens go to speed.jsonl.
  void stepped(std::int64_t step, std::int64_t num_tokens, double seconds);
  /// A progress line, for a person.
  void progress(std::int64_t step, double smoothed_loss, double learning_rate);
  std::uint64_t sync();  // all to disk; returns the length of metrics.jsonl

 private:
  LineFile metrics_, speed_;
  EventWriter events_;
  std::int64_t total_steps_;
  double seconds_per_step_ = 0, tokens_per_second_ = 0;  // smoothed
};

}  // namespace alambic::train
