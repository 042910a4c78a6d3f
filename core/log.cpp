// SPDX-License-Identifier: Apache-2.0
#include "core/log.h"

#include <cstdio>
#include <mutex>
#include <utility>

namespace alambic {
namespace {

std::mutex log_mutex;  // the prefetch thread may speak while the main thread does

LogSink& sink() {
  static LogSink current = [](LogLevel level, std::string_view line) {
    std::fprintf(stderr, "%s%.*s\n", level == LogLevel::kWarning ? "warning: " : "", static_cast<int>(line.size()), line.data());
  };
  return current;
}

}  // namespace

LogSink set_log_sink(LogSink next) {
  const std::scoped_lock lock(log_mutex);
  return std::exchange(sink(), std::move(next));
}

void log_line(LogLevel level, std::string_view line) {
  const std::scoped_lock lock(log_mutex);
  sink()(level, line);
}

}  // namespace alambic
