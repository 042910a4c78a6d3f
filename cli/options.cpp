// SPDX-License-Identifier: Apache-2.0
#include "cli/options.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cxxopts.hpp>
#include <set>
#include <sstream>
#include <string_view>

#include "cli/verbs.h"
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

const Option* find_option(const Verb& verb, std::string_view name) {
  for (const Option& option : verb.options)
    if (option.name == name) return &option;
  return nullptr;
}

Remedy see_help(const std::string& verb) { return {"alambic " + verb + " --help lists what it accepts"}; }

Remedy see_help(const Verb& verb) {
  Remedy remedy = see_help(verb.name);
  if (find_option(verb, "set")) remedy.text += "; --set KEY=VALUE sets a key of CONFIG";
  return remedy;
}

template <class Number>
bool reads_as(const std::string& text, Number& value) {
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
  return problem == std::errc{} && end == text.data() + text.size() && !text.empty();
}

void check_value(const Verb& verb, const Option& option, const std::string& text) {
  const auto refuse = [&](const auto&... parts) { fail(ErrorKind::kUsage, verb.name, ": --", option.name, " ", parts..., see_help(verb)); };
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

// The words as cxxopts sees them. It recognises a word by std::regex, which recurses once a letter (a prompt of some tens of
// kilobytes would exhaust the stack) and stops at a line break. So it gets each word without its tail, the value in
// --name=value and -nvalue: there stands kMark and the word's number instead, and whole() puts the tail back.
class CommandWords {
 public:
  CommandWords(const Verb& verb, std::span<const std::string> words) {
    for (const std::string& word : words) {
      const std::size_t begin = std::min(tail_of(verb, word), word.find(kMark));
      seen_.push_back(begin == word.npos ? word : word.substr(0, begin) + kMark + std::to_string(tails_.size()));
      tails_.push_back(begin == word.npos ? "" : word.substr(begin));
    }
  }
  std::vector<const char*> argv() const {
    std::vector<const char*> pointers = {"alambic"};
    for (const std::string& word : seen_) pointers.push_back(word.c_str());
    return pointers;
  }
  std::string whole(const std::string& seen) const {
    const std::size_t mark = seen.find(kMark);
    std::size_t number = 0;  // absent where cxxopts took the mark for a letter, see refuse_unknown()
    return mark == seen.npos || !reads_as(seen.substr(mark + 1), number) ? seen : seen.substr(0, mark) + tails_.at(number);
  }

  static constexpr char kMark = '\x01';
  static constexpr std::size_t kLongestName = 64;  // of any option; what is longer is unknown and need not be searched

 private:
  static std::size_t tail_of(const Verb& verb, const std::string& word) {
    if (!word.starts_with("-")) return word.npos;
    std::size_t begin = 1;
    if (word.starts_with("--")) {
      begin = word.find('=');
      if (begin != word.npos) ++begin;
    } else {
      const auto is_switch = [&](char letter) {
        return std::any_of(verb.options.begin(), verb.options.end(), [&](const Option& option) { return option.letter == letter && option.kind == Kind::kSwitch; });
      };
      while (begin < word.size() && is_switch(word[begin])) ++begin;
      if (++begin >= word.size()) begin = word.npos;
    }
    return word.size() > kLongestName ? std::min(begin, kLongestName) : begin;
  }

  std::vector<std::string> seen_, tails_;
};

bool is_group_of_letters(const std::string& word) { return word.size() >= 3 && word[0] == '-' && word[1] != '-'; }

// "model" of -model or -model=x where --model exists; "" of any other word.
std::string name_behind_one_dash(const Verb& verb, const std::string& word) {
  if (!is_group_of_letters(word)) return "";
  const std::string name = word.substr(1, word.find('=') - 1);
  return find_option(verb, name) ? name : "";
}

[[noreturn]] void refuse_unknown(const Verb& verb, std::span<const std::string> words, const std::string& option) {
  std::vector<std::string> known;
  for (const Option& each : verb.options) known.push_back(each.name);
  std::string nearest, within;
  if (option.starts_with("--")) {
    nearest = nearest_name(option.substr(2), known);
  } else {
    for (const std::string& word : words) {
      if (!is_group_of_letters(word)) continue;
      if (option[1] == CommandWords::kMark && word.size() > CommandWords::kLongestName)  // its tail was hidden, though all of it are switches
        fail(ErrorKind::kUsage, verb.name, ": ", word.size() - 1, " options in one word: ", printable(word.substr(0, 20)), "...", see_help(verb));
      if (word.find(option[1]) == word.npos) continue;
      within = " in " + printable(word);
      nearest = name_behind_one_dash(verb, word);
      break;
    }
  }
  Remedy remedy = see_help(verb);
  if (!option.starts_with("--")) remedy.text += "; a value that begins with a dash goes behind --";
  fail(ErrorKind::kUsage, verb.name, ": unknown option ", printable(option), within, nearest.empty() ? "" : "; did you mean --" + nearest + "?", remedy);
}

cxxopts::ParseResult parsed_words(const Verb& verb, std::span<const std::string> words, const CommandWords& hidden) {
  cxxopts::Options options("alambic " + verb.name);
  for (const Option& option : verb.options) {
    auto value = cxxopts::value<std::string>();
    if (option.kind == Kind::kSwitch) value->implicit_value("");  // takes no next word
    options.add_options()(option.letter ? std::string(1, option.letter) + "," + option.name : option.name, option.help, value);
  }
  // The exceptions tell what was found in their message alone, between these quotes.
  const auto quoted = [&](const cxxopts::exceptions::exception& error) {
    const std::string text = error.what();
    const std::size_t begin = text.find(cxxopts::LQUOTE) + cxxopts::LQUOTE.size();
    return hidden.whole(text.substr(begin, text.rfind(cxxopts::RQUOTE) - begin));
  };
  const auto written = [](const std::string& name) { return (name.size() == 1 ? "-" : "--") + name; };
  const std::vector<const char*> argv = hidden.argv();
  try {
    return options.parse(static_cast<int>(argv.size()), argv.data());
  } catch (const cxxopts::exceptions::no_such_option& error) {
    refuse_unknown(verb, words, written(quoted(error)));
  } catch (const cxxopts::exceptions::invalid_option_syntax& error) {
    const std::string word = quoted(error);
    refuse_unknown(verb, words, word.substr(0, word.find('=')));
  } catch (const cxxopts::exceptions::missing_argument& error) {
    const std::string name = quoted(error);
    for (const Option& option : verb.options)
      if (option.name == name || name == std::string(1, option.letter)) fail(ErrorKind::kUsage, verb.name, ": ", written(name), " needs a value, ", option.value, see_help(verb));
    throw;
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

namespace {

/// Index of the first word that is neither an option nor an option's value.
std::size_t first_positional(const Verb& verb, std::span<const std::string> words) {
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (word == "--") return i + 1;
    if (!word.starts_with("-") || word == "-") return i;
    const auto takes_next = [&](const Option& option) {
      return option.kind != Kind::kSwitch && (word == "--" + option.name || (option.letter && word == std::string("-") + option.letter));
    };
    if (std::any_of(verb.options.begin(), verb.options.end(), takes_next)) ++i;
  }
  return words.size();
}

}  // namespace

Arguments parse(const Verb& verb, std::span<const std::string> words) {
  Arguments result;
  std::span<const std::string> command;
  if (verb.takes_command) {
    const std::size_t begin = std::min(first_positional(verb, words), words.size());
    command = words.subspan(begin), words = words.first(begin);
  }
  result.verb_ = verb.name;
  for (const Option& option : verb.options) result.defaults_[option.name] = option.otherwise;

  const CommandWords hidden(verb, words);
  const cxxopts::ParseResult parsed = parsed_words(verb, words, hidden);
  std::set<std::string> values;
  for (const cxxopts::KeyValue& each : parsed.arguments()) {  // in order, unsplit
    const Option& option = *find_option(verb, each.key());
    const std::string value = hidden.whole(each.value());
    if (option.kind == Kind::kSwitch) {
      if (!each.value().empty()) fail(ErrorKind::kUsage, verb.name, ": --", option.name, " takes no value, got ", value, see_help(verb));
    } else {
      values.insert(value);
    }
  }
  for (const std::string& word : parsed.unmatched()) result.positionals_.push_back(hidden.whole(word));
  values.insert(result.positionals_.begin(), result.positionals_.end());
  for (const std::string& word : words)
    if (const std::string name = name_behind_one_dash(verb, word); !name.empty() && !values.contains(word))
      fail(ErrorKind::kUsage, verb.name, ": unknown option ", printable(word), "; did you mean --", name, ", with two dashes?", see_help(verb));
  for (const cxxopts::KeyValue& each : parsed.arguments()) {
    const Option& option = *find_option(verb, each.key());
    const std::string value = hidden.whole(each.value());
    if (option.kind != Kind::kSwitch) check_value(verb, option, value);
    std::vector<std::string>& given = result.given_[option.name];
    if (!given.empty() && !option.repeatable && option.kind != Kind::kSwitch)
      fail(ErrorKind::kUsage, verb.name, ": --", option.name, " is given twice, as ", given.back(), " and as ", value, Remedy{"give it once"});
    given.push_back(value);
  }
  if (result.has("help")) return result;  // asked for along with anything, complete or not

  result.positionals_.insert(result.positionals_.end(), command.begin(), command.end());
  if (!verb.takes_command && result.positionals_.size() > verb.positionals.size()) {
    const std::string& surplus = result.positionals_[verb.positionals.size()];
    const bool sets_a_key = find_option(verb, "set") && surplus.find('=') != surplus.npos;
    fail(ErrorKind::kUsage, verb.name, ": one argument too many: ", printable(surplus), Remedy{sets_a_key ? "--set " + printable(surplus) + " sets a key of CONFIG" : usage_of(verb)});
  }
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
