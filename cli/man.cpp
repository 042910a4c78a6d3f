// SPDX-License-Identifier: Apache-2.0
// The manual page alambic(1), as roff source (man(7) macros).
#include <ostream>

#include "checkpoints/manifest.h"
#include "cli/verbs.h"

namespace alambic::cli {
namespace {

// Text that roff shows as it is: backslashes and dashes are escaped, and no line starts with a request character.
std::string roff(const std::string& text) {
  std::string result;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char letter = text[i];
    if ((letter == '.' || letter == '\'') && (i == 0 || text[i - 1] == '\n')) result += "\\&";
    if (letter == '\\') result += "\\e";
    else if (letter == '-') result += "\\-";
    else if (letter == '\'') result += "\\(aq";
    else if (letter == '`') result += "\\(ga";
    else if (letter == '^') result += "\\(ha";
    else if (letter == '~') result += "\\(ti";
    else result += letter;
  }
  return result;
}

// A macro's argument in quotes.
std::string argument(const std::string& text) {
  std::string result = "\"";
  for (const char letter : roff(text)) result += letter == '"' ? "\"\"" : std::string(1, letter);
  return result + "\"";
}


std::string tagged(const std::string& label, const std::string& text) { return ".TP\n.B " + argument(label) + "\n" + roff(text) + "\n"; }

std::string page() {
  std::string text = ".TH ALAMBIC 1 \"\" " + argument("alambic " + checkpoints::alambic_version()) + " \"User Commands\"\n";
  text += ".SH NAME\nalambic \\- fine\\-tune open\\-weight language models\n";
  text += ".SH SYNOPSIS\n.B alambic\n.I VERB\n[\\fIARGUMENT\\fR]... [\\fIOPTION\\fR]...\n";
  text += ".SH DESCRIPTION\n";
  text += roff("alambic takes text and an open model and gives back open weights: it imports a model, turns text into token stores, "
               "trains (an adapter or all weights), measures, and merges the result into a folder that other programs load. "
               "Results go to stdout, notes and progress to stderr. It never uses the network.") + "\n";
  text += ".SH VERBS\n";
  for (const Verb& verb : verbs()) {
    text += ".SS " + argument(usage_of(verb)) + "\n" + roff(verb.description) + "\n";
    for (const Positional& positional : verb.positionals) text += tagged(positional.name, positional.help);
    for (const Option& option : verb.options) {
      const std::string terms = terms_of(option);
      text += tagged(label_of(option), option.help + (terms.empty() ? "" : " " + terms));
    }
    if (verb.config_help) text += ".PP\n" + roff("The keys of CONFIG are listed by alambic " + verb.name + " --help.") + "\n";
    for (const Example& example : verb.examples) text += ".PP\n" + roff(example.meaning) + ":\n.PP\n.nf\n" + roff("    " + example.command) + "\n.fi\n";
  }
  text += ".SH OPTIONS\n" + tagged("--version", "print the versions of alambic and of the libraries in use") + tagged("--help, -h", "list the verbs");
  text += ".SH EXIT STATUS\n";
  for (const auto& [code, meaning] : exit_code_meanings()) text += tagged(std::to_string(code), meaning);
  text += ".SH ENVIRONMENT\n" + tagged("OMP_NUM_THREADS", "threads to compute with, where --threads does not say it");
  return text;
}

int run_man(const Arguments&, const Terminal& terminal) {
  terminal.out << page();
  return 0;
}

}  // namespace

Verb man_verb() {
  return {.name = "man",
          .summary = "the manual page, as roff source",
          .description = "Prints the manual page alambic(1) with all verbs and options, in roff.",
          .positionals = {},
          .options = {},
          .examples = {{"alambic man | man -l -", "read it"}, {"alambic man > ~/.local/share/man/man1/alambic.1", "install it for one user"}},
          .run = run_man};
}

}  // namespace alambic::cli
