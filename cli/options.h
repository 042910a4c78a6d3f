// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a verb accepts, as a table. Parsing, --help, the man page, shell completion and the nearest name for a misspelt
// option all walk it, so that none of them can know an option that the others do not.
#include <cstdint>
#include <filesystem>
#include <iosfwd>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace alambic::cli {

/// Where a verb reads and writes. Results go to `out` (one JSON object on one line with --json), all else to `err`.
struct Terminal {
  std::istream& in;
  std::ostream& out;
  std::ostream& err;
};

enum class Kind { kSwitch, kText, kFile, kFolder, kWhole, kNumber };

struct Option {
  std::string name;        // "max-new-tokens"
  Kind kind = Kind::kSwitch;
  std::string value = "";  // what --help calls the value: "N"; empty for a switch
  std::string help;
  std::string otherwise = "";  // the value when the option is not given; "" = none
  double low = -std::numeric_limits<double>::infinity(), high = std::numeric_limits<double>::infinity();  // of numbers, inclusive
  std::vector<std::string> choices = {};
  bool required = false;
  bool repeatable = false;
  char letter = 0;  // "-m"
};

struct Positional {
  std::string name;  // "CONFIG"
  std::string help;
  Kind kind = Kind::kFile;
  bool required = true;
  std::vector<std::string> choices = {};
};

/// The values of one call, checked against the table: kinds, ranges, choices, what is required.
class Arguments {
 public:
  bool has(const std::string& option) const;  // given on the command line
  const std::string& text(const std::string& option) const;             // the last one given, or the default
  const std::vector<std::string>& texts(const std::string& option) const;  // all that were given, in order
  std::filesystem::path path(const std::string& option) const { return text(option); }
  std::int64_t whole(const std::string& option) const;
  double number(const std::string& option) const;
  const std::vector<std::string>& positionals() const { return positionals_; }
  bool has_positional(std::size_t index) const { return index < positionals_.size(); }
  const std::string& positional(std::size_t index) const { return positionals_.at(index); }

  /// Error(kUsage) unless exactly one (or, where none is allowed, at most one) of these options was given.
  void exactly_one(const std::vector<std::string>& options) const;
  void at_most_one(const std::vector<std::string>& options) const;
  /// Error(kUsage) with `why` if the option was given.
  void refuse(const std::string& option, const std::string& why) const;

 private:
  friend Arguments parse(const struct Verb& verb, std::span<const std::string> words);
  std::string verb_;
  std::map<std::string, std::vector<std::string>> given_;
  std::map<std::string, std::string> defaults_;
  std::vector<std::string> positionals_;
};

struct Example {
  std::string command, meaning;
};

struct Verb {
  std::string name;
  std::string summary;      // one line, for the list of verbs
  std::string description;  // paragraphs, for --help and the man page
  std::vector<Positional> positionals;
  std::vector<Option> options;  // common ones (--help, --json, ...) are added by the list of verbs
  std::vector<Example> examples;
  int (*run)(const Arguments& arguments, const Terminal& terminal) = nullptr;
  std::string (*config_help)() = nullptr;  // of verbs that take a CONFIG: its keys
  bool takes_command = false;  // from the first positional on, all words are positional: they are another verb's
};

/// Words behind the verb. `--name value`, `--name=value`, `-n value`, `-nvalue`; switches in one word (-qh); behind `--`
/// everything is positional, as is `-` alone. Values may begin with a dash. Error(kUsage) with the nearest name.
Arguments parse(const Verb& verb, std::span<const std::string> words);

/// Complete help of a verb; every option and every key of its CONFIG.
std::string help_of(const Verb& verb);
/// Usage line: "alambic score --model FOLDER [OPTION]...".
std::string usage_of(const Verb& verb);
/// Left column of an option in help and man page: "-m, --model FOLDER".
std::string label_of(const Option& option);
/// What follows an option's help: "(default 0; from 0 to 2)"; "" when there is nothing to say.
std::string terms_of(const Option& option);
/// Text filled to lines of `width` columns, each behind `indent` spaces.
std::string filled(const std::string& text, std::size_t indent, std::size_t width = 100);

}  // namespace alambic::cli
