// SPDX-License-Identifier: Apache-2.0
#include "cli/run.h"

#include <c10/util/Exception.h>
#include <poll.h>
#include <unistd.h>

#include <iostream>
#include <new>
#include <system_error>

#include "cli/verbs.h"
#include "cli/version.h"
#include "core/error.h"
#include "core/log.h"

namespace alambic::cli {
namespace {

// The log goes to this call's stderr while it lasts.
class LogToTerminal {
 public:
  LogToTerminal(std::ostream& err, bool quiet)
      : before_(set_log_sink([&err, quiet](LogLevel level, std::string_view line) {
          if (quiet && level == LogLevel::kInfo) return;
          err << (level == LogLevel::kWarning ? "alambic: warning: " : "") << line << std::endl;
        })) {}
  ~LogToTerminal() { set_log_sink(std::move(before_)); }
  LogToTerminal(const LogToTerminal&) = delete;
  LogToTerminal& operator=(const LogToTerminal&) = delete;

 private:
  LogSink before_;
};

int say(std::ostream& err, ErrorKind kind, const std::string& message, const std::string& remedy) {
  err << "alambic: " << message << "\n";
  if (!remedy.empty()) err << "  remedy: " << remedy << "\n";
  err.flush();
  return exit_code(kind);
}

const char* const kReport = "this is a bug of alambic; please report it with the command and this message";
const char* const kLessMemory = "use a smaller model, shorter rows or fewer rows at once; `alambic plan` shows what a run needs";

int dispatch(std::span<const std::string> arguments, const Terminal& terminal) {
  if (arguments.empty()) {
    terminal.err << overview();
    return exit_code(ErrorKind::kUsage);
  }
  const std::string& first = arguments[0];
  if (first == "--help" || first == "-h") {
    terminal.out << overview();
    return 0;
  }
  if (first == "--version") {
    terminal.out << version_text();
    return 0;
  }
  if (first.starts_with("-"))
    fail(ErrorKind::kUsage, "unknown option ", first, " before the verb", Remedy{"alambic VERB [OPTION]...; alambic --help lists the verbs"});
  const Verb& verb = find_verb(first);
  const Arguments parsed = parse(verb, arguments.subspan(1));
  if (parsed.has("help")) {
    terminal.out << help_of(verb);
    return 0;
  }
  const LogToTerminal log(terminal.err, parsed.has("quiet"));
  return verb.run(parsed, terminal);
}

// Whether stdout is a pipe or socket without a reader.
bool reader_is_gone() {
  pollfd out{.fd = STDOUT_FILENO, .events = 0, .revents = 0};
  return ::poll(&out, 1, 0) == 1 && (out.revents & (POLLERR | POLLHUP)) != 0;
}

}  // namespace

int report_current_exception(std::ostream& err) {
  try {
    throw;
  } catch (const Error& error) {
    return say(err, error.kind(), error.what(), error.kind() == ErrorKind::kBug && error.remedy().empty() ? kReport : error.remedy());
  } catch (const std::bad_alloc&) {
    return say(err, ErrorKind::kResource, "out of memory", kLessMemory);
  } catch (const std::filesystem::filesystem_error& error) {
    const bool full = error.code() == std::errc::no_space_on_device || error.code() == std::errc::read_only_file_system;
    return say(err, full ? ErrorKind::kResource : ErrorKind::kData, error.path1().string() + ": " + error.code().message(), "check the path and its permissions");
  } catch (const c10::Error& error) {
    const std::string message = error.what_without_backtrace();
    // A GPU's allocator has an exception type of its own, the processor's has none.
    if (dynamic_cast<const c10::OutOfMemoryError*>(&error) != nullptr || message.find("DefaultCPUAllocator") != message.npos || message.find("not enough memory") != message.npos)
      return say(err, ErrorKind::kResource, "out of memory: " + message.substr(0, message.find('\n')), kLessMemory);
    return say(err, ErrorKind::kBug, "libtorch: " + message.substr(0, message.find('\n')), kReport);
  } catch (const std::exception& error) {
    return say(err, ErrorKind::kBug, std::string("unexpected: ") + error.what(), kReport);
  } catch (...) {
    return say(err, ErrorKind::kBug, "an exception of an unknown kind", kReport);
  }
}

int run(std::span<const std::string> arguments, const Terminal& terminal) {
  try {
    const int code = dispatch(arguments, terminal);
    terminal.out.flush();
    if (!terminal.out && &terminal.out == &std::cout && reader_is_gone()) return kReaderIsGone;
    // A result that nobody got is no success: a full disk behind "> file".
    if (!terminal.out) fail(ErrorKind::kResource, "standard output cannot be written", Remedy{"check the disk that it goes to"});
    return code;
  } catch (...) {
    terminal.out.flush();
    return report_current_exception(terminal.err);
  }
}

}  // namespace alambic::cli
