// SPDX-License-Identifier: Apache-2.0
// help, completion and man: the same tables in three shapes.
#include <ostream>

#include "cli/verbs.h"
#include "core/error.h"

namespace alambic::cli {

const std::vector<std::pair<int, std::string>>& exit_code_meanings() {
  static const std::vector<std::pair<int, std::string>> meanings = {
      {0, "done"},
      {2, "the command line or the config must be changed"},
      {3, "an input is missing, damaged or of another kind"},
      {4, "a licence forbids what was asked for"},
      {5, "disk, memory or the machine does not suffice"},
      {6, "a loss or a gradient stopped being finite"},
      {7, "another rank failed"},
      {70, "a bug of alambic"},
      {75, "stopped on request (SIGTERM, SIGINT or SIGUSR1); all is saved, and --resume goes on"},
  };
  return meanings;
}

std::string overview() {
  std::string text =
      "Usage: alambic VERB [ARGUMENT]... [OPTION]...\n\n"
      "Fine-tunes open-weight language models on text of your own and writes open weights.\n\nVerbs:\n";
  for (const Verb& verb : verbs()) text.append("  ").append(verb.name).append(12 - verb.name.size(), ' ').append(verb.summary).append("\n");
  text +=
      "\nalambic VERB --help tells all about one; alambic --version names the libraries in use.\n"
      "Results go to stdout, notes and progress to stderr.\n\nExit codes:\n";
  for (const auto& [code, meaning] : exit_code_meanings())
    text.append(code < 10 ? "   " : "  ").append(std::to_string(code)).append("  ").append(meaning).append("\n");
  return text;
}

namespace {

int run_help(const Arguments& arguments, const Terminal& terminal) {
  terminal.out << (arguments.has_positional(0) ? help_of(find_verb(arguments.positional(0))) : overview());
  return 0;
}

}  // namespace

Verb help_verb() {
  return {.name = "help",
          .summary = "what a verb does and accepts",
          .description = "Prints the help of one verb, or the list of verbs.",
          .positionals = {{.name = "VERB", .help = "the verb to explain", .kind = Kind::kText, .required = false}},
          .options = {},
          .examples = {{"alambic help train", "everything about train, with the keys of its CONFIG"}},
          .run = run_help};
}

}  // namespace alambic::cli
