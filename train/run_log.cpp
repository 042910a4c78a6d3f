// SPDX-License-Identifier: Apache-2.0
#include "train/run_log.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iomanip>
#include <sstream>

#include "core/error.h"
#include "core/log.h"

namespace alambic::train {
namespace {

constexpr double kSmoothing = 0.9;  // of speed: the share of the past

double smoothed(double past, double now) { return past == 0 ? now : kSmoothing * past + (1 - kSmoothing) * now; }

std::uint64_t size_or_zero(const std::filesystem::path& path) {
  std::error_code missing;
  const std::uintmax_t size = std::filesystem::file_size(path, missing);
  return missing ? 0 : size;
}

}  // namespace

std::string printed(const char* format, double value) {
  char text[400];  // the largest double has 309 digits
  return {text, static_cast<std::size_t>(std::snprintf(text, sizeof text, format, value))};
}

Memory process_memory() {
  Memory memory;
  struct rusage usage {};
  if (::getrusage(RUSAGE_SELF, &usage) == 0) memory.peak = static_cast<std::uint64_t>(usage.ru_maxrss) * 1024;
  std::uint64_t pages = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> pages >> resident;
  memory.now = resident * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  return memory;
}

std::string duration_text(double seconds) {
  const auto whole = static_cast<std::int64_t>(std::llround(std::max(0.0, seconds)));
  std::ostringstream text;
  text << std::setfill('0');
  if (whole >= 3600) text << whole / 3600 << "h" << std::setw(2) << whole / 60 % 60 << "m";
  else if (whole >= 60) text << whole / 60 << "m" << std::setw(2) << whole % 60 << "s";
  else text << whole << "s";
  return text.str();
}

LineFile::LineFile(std::filesystem::path path, std::uint64_t committed_bytes) : path_(std::move(path)) {
  descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
  if (descriptor_ < 0) fail(ErrorKind::kResource, path_.string(), ": cannot be opened: ", std::strerror(errno));
  const auto present = static_cast<std::uint64_t>(::lseek(descriptor_, 0, SEEK_END));
  if (present < committed_bytes) log_warning(path_.string(), ": ", present, " bytes, ", committed_bytes, " were committed; earlier lines are lost");
  num_bytes_ = std::min(present, committed_bytes);
  if (::ftruncate(descriptor_, static_cast<off_t>(num_bytes_)) != 0 || ::lseek(descriptor_, 0, SEEK_END) < 0)
    fail(ErrorKind::kResource, path_.string(), ": cannot be cut to ", num_bytes_, " bytes: ", std::strerror(errno));
}

LineFile::~LineFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void LineFile::line(const Json& value) {
  const std::string text = to_line(value) + "\n";
  for (std::size_t done = 0; done < text.size();) {
    const ssize_t put = ::write(descriptor_, text.data() + done, text.size() - done);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) fail(ErrorKind::kResource, path_.string(), ": cannot be written: ", std::strerror(errno), Remedy{"free space on the disk, then go on with --resume"});
    done += static_cast<std::size_t>(put);
  }
  num_bytes_ += text.size();
}

std::uint64_t LineFile::sync() {
  if (::fsync(descriptor_) != 0) fail(ErrorKind::kResource, path_.string(), ": fsync failed: ", std::strerror(errno));
  return num_bytes_;
}

RunLog::RunLog(const std::filesystem::path& run, std::uint64_t committed_bytes, std::int64_t first_step, std::int64_t total_steps)
    : metrics_(run / "metrics.jsonl", committed_bytes),
      speed_(run / "speed.jsonl", size_or_zero(run / "speed.jsonl")),  // a diary: nothing is taken back
      events_(run, first_step),
      total_steps_(total_steps) {}

void RunLog::metrics(std::int64_t step, const std::string& tag, const Json& figures) {
  Json line = {{"step", step}, {"kind", tag}};
  line.update(figures);
  metrics_.line(line);
  for (const auto& [key, value] : figures.items())
    if (value.is_number()) events_.scalar(step, tag + "/" + key, value.get<double>());
}

void RunLog::text(std::int64_t step, const std::string& tag, const std::string& text) { events_.text(step, tag, text); }

void RunLog::stepped(std::int64_t step, std::int64_t num_tokens, double seconds) {
  const double rate = static_cast<double>(num_tokens) / seconds;
  seconds_per_step_ = smoothed(seconds_per_step_, seconds);
  tokens_per_second_ = smoothed(tokens_per_second_, rate);
  const Memory memory = process_memory();
  speed_.line({{"step", step}, {"seconds", seconds}, {"tokens", num_tokens}, {"tokens_per_second", rate},
               {"memory_bytes", memory.now}, {"peak_memory_bytes", memory.peak}});
  events_.scalar(step, "speed/tokens_per_second", rate);
  events_.scalar(step, "speed/memory_gb", static_cast<double>(memory.now) / 1e9);
}

void RunLog::progress(std::int64_t step, double smoothed_loss, double learning_rate) {
  events_.flush();
  const Memory memory = process_memory();
  log_info("step ", step, "/", total_steps_, "  loss ", printed("%.4f", smoothed_loss), "  lr ", printed("%.3g", learning_rate), "  ",
           printed("%.0f", tokens_per_second_), " tokens/s  ETA ", duration_text(seconds_per_step_ * static_cast<double>(total_steps_ - step)),
           "  memory ", printed("%.2f", static_cast<double>(memory.now) / 1e9), " GB (peak ", printed("%.2f", static_cast<double>(memory.peak) / 1e9), ")");
}

std::uint64_t RunLog::sync() {
  events_.flush();
  speed_.sync();
  return metrics_.sync();
}

}  // namespace alambic::train
