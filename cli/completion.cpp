// SPDX-License-Identifier: Apache-2.0
#include <ostream>

#include "cli/verbs.h"
#include "core/error.h"

namespace alambic::cli {
namespace {

// The bash code that completes one value into COMPREPLY.
std::string bash_value(Kind kind, const std::vector<std::string>& choices) {
  if (!choices.empty()) {
    std::string words;
    for (const std::string& choice : choices) words.append(words.empty() ? "" : " ").append(choice);
    return "_alambic_words '" + words + "'";
  }
  if (kind == Kind::kFile) return "_alambic_files";
  if (kind == Kind::kFolder) return "_alambic_folders";
  return ":";  // numbers and texts: nothing to offer
}

std::string bash_script() {
  std::string names, cases;
  for (const Verb& verb : verbs()) {
    names.append(names.empty() ? "" : " ").append(verb.name);
    std::string words, values, positionals, takes_value;
    for (const Option& option : verb.options) {
      words.append(words.empty() ? "" : " ").append("--").append(option.name);
      if (option.kind == Kind::kSwitch) continue;
      std::string pattern = "--" + option.name;
      if (option.letter) pattern.append("|-").append(1, option.letter);
      values.append("        ").append(pattern).append(") ").append(bash_value(option.kind, option.choices)).append("; return ;;\n");
      takes_value.append(takes_value.empty() ? "" : "|").append(pattern);
    }
    for (std::size_t i = 0; i < verb.positionals.size(); ++i) {
      const Positional& positional = verb.positionals[i];
      const std::vector<std::string> choices = verb.name == "help" ? verb_names() : positional.choices;
      positionals.append("        ").append(std::to_string(i)).append(") ").append(bash_value(positional.kind, choices)).append(" ;;\n");
    }
    cases.append("    ").append(verb.name).append(")\n");
    if (!values.empty()) cases.append("      case $previous in\n").append(values).append("      esac\n");
    cases.append("      if [[ $current == -* ]]; then _alambic_words '").append(words).append("'; return; fi\n");
    if (!positionals.empty())
      cases.append("      _alambic_count '").append(takes_value).append("'\n      case $number in\n").append(positionals).append("      esac\n");
    cases.append("      ;;\n");
  }
  return R"(# bash completion for alambic: source <(alambic completion bash)
_alambic_words() { mapfile -t COMPREPLY < <(compgen -W "$1" -- "$current"); }
_alambic_files() { compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -f -- "$current"); }
_alambic_folders() { compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -d -- "$current"); }

# number = how many positional words stand between the verb and the cursor. $1: options that take a value, "--a|--b|-c".
_alambic_count() {
  local at word
  number=0
  for ((at = 2; at < COMP_CWORD; at++)); do
    word=${COMP_WORDS[at]}
    if [[ $word == -?* ]]; then
      if [[ ${COMP_WORDS[at + 1]} == = ]]; then ((at += 2))
      elif [[ "|$1|" == *"|$word|"* ]]; then ((at += 1)); fi
    else
      ((number += 1))
    fi
  done
}

_alambic() {
  local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]} number=0
  COMPREPLY=()
  # --name=value arrives as three words, because = separates words for bash.
  if [[ $current == = ]]; then current=; elif [[ $previous == = ]]; then previous=${COMP_WORDS[COMP_CWORD - 2]}; fi
  if ((COMP_CWORD == 1)); then
    _alambic_words ')" + names + R"( --help --version'
    return
  fi
  case ${COMP_WORDS[1]} in
)" + cases + R"(  esac
}
complete -F _alambic alambic
)";
}

int run_completion(const Arguments&, const Terminal& terminal) {
  terminal.out << bash_script();
  return 0;
}

}  // namespace

Verb completion_verb() {
  return {.name = "completion",
          .summary = "completion of verbs, options and paths for a shell",
          .description = "Prints a script that makes the shell complete alambic's verbs, options and values.",
          .positionals = {{.name = "SHELL", .help = "bash", .kind = Kind::kText, .choices = {"bash"}}},
          .options = {},
          .examples = {{"source <(alambic completion bash)", "for this shell; put the line into ~/.bashrc to keep it"}},
          .run = run_completion};
}

}  // namespace alambic::cli
