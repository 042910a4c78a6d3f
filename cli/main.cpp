// SPDX-License-Identifier: Apache-2.0
#include <csignal>
#include <cstdlib>
#include <iostream>

#include "cli/run.h"
#include "core/error.h"
#include "models/allocation.h"
#include "parallel/connect.h"

int main(int count, char** words) {
  alambic::use_tensor_heaps();
  // A reader that goes away must not end a training run in the middle of a step: writing fails instead, and is seen at the end.
  std::signal(SIGPIPE, SIG_IGN);
  // No setlocale(): numbers have a decimal point whatever the user's locale says.
  const std::vector<std::string> arguments(words + (count > 0 ? 1 : 0), words + count);
  alambic::parallel::set_last_word([](const alambic::Error& error) {
    std::cerr << "alambic: " << error.what() << "\n  remedy: " << error.remedy() << std::endl;
    std::_Exit(alambic::exit_code(error.kind()));
  });
  const int code = alambic::cli::run(arguments, {std::cin, std::cout, std::cerr});
  if (code == alambic::cli::kReaderIsGone) {
    std::signal(SIGPIPE, SIG_DFL);
    std::raise(SIGPIPE);
  }
  if (alambic::parallel::left_in_flight()) std::_Exit(code);
  return code;
}
