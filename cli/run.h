// SPDX-License-Identifier: Apache-2.0
#pragma once
// One call of the program, from its words to its exit code; `main` and the tests call it.
#include <span>
#include <string>

#include "cli/options.h"

namespace alambic::cli {

/// arguments: the words behind the program's name. Never throws: every error is said on terminal.err, as
/// "alambic: <cause>" and "  remedy: <what to do>", and becomes an exit code (core/error.h). Log lines go to terminal.err.
int run(std::span<const std::string> arguments, const Terminal& terminal);

/// What run() returns when nobody reads stdout any more (`| head`): nothing is said, and main ends by SIGPIPE as head's other
/// neighbours do. A shell shows 141 for it.
constexpr int kReaderIsGone = 128 + 13;

/// Says the exception that is being handled and returns its exit code. Call it inside a catch block only.
int report_current_exception(std::ostream& err);

}  // namespace alambic::cli
