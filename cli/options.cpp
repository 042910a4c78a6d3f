// SPDX-License-Identifier: Apache-2.0
#include "cli/options.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <sstream>

#include "core/error.h"

namespace alambic::cli {
namespace {

std::string number_text(double value) {
  char buffer[32];
  const auto [end, problem] = value == std::floor(value) && std::abs(value) < 1e15
                                  ? std::to_chars(buffer, buffer + sizeof buffer, static_cast<std::int64_t>(value))
                                  : std::to_chars(buffer, buffer + sizeof buffer, value);
  return {buffer, end};
}

std::string range_of(const Option& option) {
  const bool low = std::isfinite(option.low), high = std::isfinite(option.high);
  if (low && high) return "from " + number_text(option.low) + " to " + number_text(option.high);
  if (low) return "at least " + number_text(option.low);
  if (high) return "at most " + number_text(option.high);
  return "";
}

std::string joined(const std::vector<std::string>& parts, const std::string& separator) {
  std::string text;
  for (const std::string& part : parts) text.append(text.empty() ? "" : separator).append(part);
  return text;
}

Remedy see_help(const std::string& verb) { return {"alambic " + verb + " --help lists what it accepts"}; }

template <class Number>
bool reads_as(const std::string& text, Number& value) {
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
  return problem == std::errc{} && end == text.data() + text.size() && !text.empty();
}

void check_value(const std::string& verb, const Option& option, const std::string& text) {
  const auto refuse = [&](const auto&... parts) { fail(ErrorKind::kUsage, verb, ": --", option.name, " ", parts..., see_help(verb)); };
  if (!option.choices.empty() && std::find(option.choices.begin(), option.choices.end(), text) == option.choices.end()) {
    const std::string nearest = nearest_name(text, option.choices);
    refuse("must be one of ", joined(option.choices, ", "), ", got ", text, nearest.empty() ? "" : "; did you mean " + nearest + "?");
  }
  if ((option.kind == Kind::kFile || option.kind == Kind::kFolder) && text.empty()) refuse("must not be empty");
  std::string range = range_of(option);
  if (!range.empty()) range.insert(0, 1, ' ');
  if (option.kind == Kind::kWhole) {
    std::int64_t value = 0;
    if (!reads_as(text, value)) refuse("must be a whole number", range, ", got ", text);
    if (static_cast<long double>(value) < static_cast<long double>(option.low) || static_cast<long double>(value) > static_cast<long double>(option.high))
      refuse("must be", range, ", got ", text);
  }
  if (option.kind == Kind::kNumber) {
    double value = 0;
    if (!reads_as(text, value) || !std::isfinite(value)) refuse("must be a number", range, ", got ", text);
    if (!(value >= option.low && value <= option.high)) refuse("must be", range, ", got ", text);
  }
}

}  // namespace

bool Arguments::has(const std::string& option) const { return given_.contains(option); }

const std::string& Arguments::text(const std::string& option) const {
  if (const auto found = given_.find(option); found != given_.end()) return found->second.back();
  const auto found = defaults_.find(option);
  if (found == defaults_.end()) fail(ErrorKind::kBug, verb_, " asks for --", option, ", which its table does not hold");
  return found->second;
}

const std::vector<std::string>& Arguments::texts(const std::string& option) const {
  static const std::vector<std::string> none;
  const auto found = given_.find(option);
  return found == given_.end() ? none : found->second;
}

std::int64_t Arguments::whole(const std::string& option) const {
  std::int64_t value = 0;
  if (!reads_as(text(option), value)) fail(ErrorKind::kBug, verb_, ": the default of --", option, " is not a whole number");
  return value;
}

double Arguments::number(const std::string& option) const {
  double value = 0;
  if (!reads_as(text(option), value)) fail(ErrorKind::kBug, verb_, ": the default of --", option, " is not a number");
  return value;
}

void Arguments::at_most_one(const std::vector<std::string>& options) const {
  std::vector<std::string> found;
  for (const std::string& option : options)
    if (has(option)) found.push_back("--" + option);
  if (found.size() > 1) fail(ErrorKind::kUsage, verb_, ": ", joined(found, " and "), " exclude each other", Remedy{"give one of them"});
}

void Arguments::exactly_one(const std::vector<std::string>& options) const {
  at_most_one(options);
  for (const std::string& option : options)
    if (has(option)) return;
  fail(ErrorKind::kUsage, verb_, ": one of --", joined(options, ", --"), " is needed", see_help(verb_));
}

void Arguments::refuse(const std::string& option, const std::string& why) const {
  if (has(option)) fail(ErrorKind::kUsage, verb_, ": --", option, " ", why, see_help(verb_));
}

Arguments parse(const Verb& verb, std::span<const std::string> words) {
  Arguments result;
  result.verb_ = verb.name;
  for (const Option& option : verb.options) result.defaults_[option.name] = option.otherwise;
  const auto by_name = [&](const std::string& name) -> const Option* {
    for (const Option& option : verb.options)
      if (option.name == name) return &option;
    return nullptr;
  };
  const auto by_letter = [&](char letter) -> const Option* {
    for (const Option& option : verb.options)
      if (option.letter == letter) return &option;
    return nullptr;
  };
  const auto add = [&](const Option& option, const std::string& value) {
    if (option.kind != Kind::kSwitch) check_value(verb.name, option, value);
    std::vector<std::string>& values = result.given_[option.name];
    if (!values.empty() && !option.repeatable && option.kind != Kind::kSwitch)
      fail(ErrorKind::kUsage, verb.name, ": --", option.name, " is given twice, as ", values.back(), " and as ", value, Remedy{"give it once"});
    values.push_back(value);
  };
  const auto needs_value = [&](const std::string& written, const Option& option) {
    fail(ErrorKind::kUsage, verb.name, ": ", written, " needs a value, ", option.value, see_help(verb.name));
  };

  bool only_positionals = false;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (only_positionals || word.size() < 2 || word[0] != '-') {
      result.positionals_.push_back(word);
    } else if (word == "--") {
      only_positionals = true;
    } else if (word[1] == '-') {
      const std::size_t equals = word.find('=');
      const std::string name = word.substr(2, equals == word.npos ? word.npos : equals - 2);
      const Option* option = by_name(name);
      if (!option) {
        std::vector<std::string> known;
        for (const Option& each : verb.options) known.push_back(each.name);
        const std::string nearest = nearest_name(name, known);
        fail(ErrorKind::kUsage, verb.name, ": unknown option --", name, nearest.empty() ? "" : "; did you mean --" + nearest + "?", see_help(verb.name));
      }
      if (option->kind == Kind::kSwitch) {
        if (equals != word.npos) fail(ErrorKind::kUsage, verb.name, ": --", name, " takes no value, got ", word.substr(equals + 1), see_help(verb.name));
        add(*option, "");
      } else if (equals != word.npos) {
        add(*option, word.substr(equals + 1));
      } else {
        if (i + 1 == words.size()) needs_value("--" + name, *option);
        add(*option, words[++i]);
      }
    } else {
      for (std::size_t at = 1; at < word.size(); ++at) {
        const Option* option = by_letter(word[at]);
        if (!option)
          fail(ErrorKind::kUsage, verb.name, ": unknown option -", word[at], word.size() > 2 ? " in " + word : "",
               Remedy{"alambic " + verb.name + " --help lists what it accepts; a value that begins with a dash goes behind --"});
        if (option->kind == Kind::kSwitch) {
          add(*option, "");
          continue;
        }
        if (at + 1 < word.size()) add(*option, word.substr(at + 1));
        else if (i + 1 < words.size()) add(*option, words[++i]);
        else needs_value(std::string("-") + word[at], *option);
        break;
      }
    }
  }
  if (result.has("help")) return result;  // asked for along with anything, complete or not

  if (result.positionals_.size() > verb.positionals.size())
    fail(ErrorKind::kUsage, verb.name, ": one argument too many: ", result.positionals_[verb.positionals.size()], Remedy{usage_of(verb)});
  for (std::size_t i = 0; i < verb.positionals.size(); ++i) {
    const Positional& positional = verb.positionals[i];
    if (i >= result.positionals_.size()) {
      if (positional.required) fail(ErrorKind::kUsage, verb.name, ": ", positional.name, " is missing: ", positional.help, Remedy{usage_of(verb)});
      continue;
    }
    const std::string& word = result.positionals_[i];
    if (!positional.choices.empty() && std::find(positional.choices.begin(), positional.choices.end(), word) == positional.choices.end()) {
      const std::string nearest = nearest_name(word, positional.choices);
      fail(ErrorKind::kUsage, verb.name, ": ", positional.name, " must be one of ", joined(positional.choices, ", "), ", got ", word,
           nearest.empty() ? "" : "; did you mean " + nearest + "?");
    }
    if (word.empty()) fail(ErrorKind::kUsage, verb.name, ": ", positional.name, " must not be empty");
  }
  for (const Option& option : verb.options)
    if (option.required && !result.has(option.name))
      fail(ErrorKind::kUsage, verb.name, ": --", option.name, " is missing: ", option.help, Remedy{usage_of(verb)});
  return result;
}

std::string filled(const std::string& text, std::size_t indent, std::size_t width) {
  std::istringstream paragraphs(text);
  std::string result, paragraph;
  while (std::getline(paragraphs, paragraph)) {
    std::istringstream words(paragraph);
    std::string line, word;
    while (words >> word) {
      if (!line.empty() && indent + line.size() + 1 + word.size() > width) {
        result.append(indent, ' ').append(line).append("\n");
        line.clear();
      }
      line.append(line.empty() ? "" : " ").append(word);
    }
    if (!line.empty()) result.append(indent, ' ').append(line);
    result += "\n";
  }
  return result;
}

std::string label_of(const Option& option) {
  std::string label;
  if (option.letter) label.append("-").append(1, option.letter).append(", ");
  label.append("--").append(option.name);
  if (!option.value.empty()) label.append(" ").append(option.value);
  return label;
}

std::string terms_of(const Option& option) {
  std::vector<std::string> terms;
  if (option.required) terms.push_back("required");
  if (!option.choices.empty()) terms.push_back(joined(option.choices, " | "));
  if (const std::string range = range_of(option); !range.empty()) terms.push_back(range);
  if (!option.otherwise.empty()) terms.push_back("default " + option.otherwise);
  if (option.repeatable) terms.push_back("may be repeated");
  std::string text;
  if (!terms.empty()) text.append("(").append(joined(terms, "; ")).append(")");
  return text;
}

std::string usage_of(const Verb& verb) {
  std::string usage = "alambic " + verb.name;
  for (const Positional& positional : verb.positionals)
    usage.append(positional.required ? " " : " [").append(positional.name).append(positional.required ? "" : "]");
  for (const Option& option : verb.options)
    if (option.required) usage.append(" --").append(option.name).append(" ").append(option.value);
  return usage + " [OPTION]...";
}

std::string help_of(const Verb& verb) {
  std::string text = "Usage: " + usage_of(verb) + "\n\n" + filled(verb.description, 0);
  if (!verb.positionals.empty()) {
    text += "\nArguments:\n";
    for (const Positional& positional : verb.positionals) text += "  " + positional.name + "\n" + filled(positional.help, 10);
  }
  text += "\nOptions:\n";
  for (const Option& option : verb.options) {
    const std::string terms = terms_of(option);
    text.append(option.letter ? "  " : "      ").append(label_of(option)).append("\n").append(filled(option.help + (terms.empty() ? "" : " " + terms), 10));
  }
  if (!verb.examples.empty()) {
    text += "\nExamples:\n";
    for (const Example& example : verb.examples) text += "  " + example.command + "\n" + filled(example.meaning, 10);
  }
  if (verb.config_help) text += "\nKeys of CONFIG, each of which --set KEY=VALUE sets as well:\n" + verb.config_help();
  return text;
}

}  // namespace alambic::cli
