// SPDX-License-Identifier: Apache-2.0
#pragma once
// Progress and notes for a person, on stderr; results go to stdout and never through here.
#include <functional>
#include <sstream>
#include <string>
#include <string_view>

namespace alambic {

enum class LogLevel { kInfo, kWarning };
using LogSink = std::function<void(LogLevel, std::string_view)>;

/// Set once by `main` (or by a test); until then notes go to stderr as they are. Replaces the sink and returns the old one.
LogSink set_log_sink(LogSink sink);
void log_line(LogLevel level, std::string_view line);

template <class... Parts>
void log_info(const Parts&... parts) {
  std::ostringstream line;
  (line << ... << parts);
  log_line(LogLevel::kInfo, line.str());
}

template <class... Parts>
void log_warning(const Parts&... parts) {
  std::ostringstream line;
  (line << ... << parts);
  log_line(LogLevel::kWarning, line.str());
}

}  // namespace alambic
