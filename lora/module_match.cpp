// SPDX-License-Identifier: Apache-2.0
#include "lora/module_match.h"

#include <cctype>

#include "core/error.h"

namespace alambic::lora {
namespace {

constexpr std::size_t kMaxExpressionLength = 2000;

/// What of `expression` Python and ECMAScript would read differently; empty when nothing.
std::string unportable_part(std::string_view expression) {
  bool in_class = false, quantified = false, lazy = false;
  std::size_t class_start = 0;
  for (std::size_t i = 0; i < expression.size(); ++i) {
    const char c = expression[i];
    const char next = i + 1 < expression.size() ? expression[i + 1] : '\0';
    if (c == '\\') {
      if (next == '\0') return "a backslash at the end";
      if (std::isalnum(static_cast<unsigned char>(next)) && std::string_view("dDwWsSbBntrfv").find(next) == std::string_view::npos)
        return std::string("\\") + next;
      ++i;
      quantified = lazy = false;
      continue;
    }
    if (in_class) {
      if (c == '[') return "[ inside a character class";
      if (c == ']') {
        if (i == class_start) return "an empty character class";
        in_class = false;
      }
      continue;
    }
    if (c == '[') {
      in_class = true;
      if (next == '^') ++i;
      class_start = i + 1;
      quantified = lazy = false;
      continue;
    }
    if (c == '(' && next == '?') {
      const char kind = i + 2 < expression.size() ? expression[i + 2] : '\0';
      if (kind != ':' && kind != '=' && kind != '!') return std::string("(?") + (kind ? std::string(1, kind) : "");
      i += 2;
      quantified = lazy = false;
      continue;
    }
    if (c == '*' || c == '+' || c == '?' || c == '{') {
      if (quantified && (c != '?' || lazy)) return std::string("a quantifier followed by ") + c;
      if (quantified) {
        lazy = true;  // x*? takes as little as it can: the same in both
        continue;
      }
      if (c == '{') {
        std::size_t end = i + 1;
        while (end < expression.size() && std::isdigit(static_cast<unsigned char>(expression[end]))) ++end;
        if (end == i + 1) return "{ that is no repeat count";
        if (end < expression.size() && expression[end] == ',') ++end;
        while (end < expression.size() && std::isdigit(static_cast<unsigned char>(expression[end]))) ++end;
        if (end >= expression.size() || expression[end] != '}') return "{ that is no repeat count";
        i = end;
      }
      quantified = true;
      continue;
    }
    quantified = lazy = false;
  }
  return in_class ? "[ without ]" : "";
}

}  // namespace

Pattern::Pattern(const std::string& expression, std::string_view where) {
  if (expression.size() > kMaxExpressionLength)
    fail(ErrorKind::kUsage, where, ": a regular expression of ", expression.size(), " characters; at most ", kMaxExpressionLength, " are read");
  if (const std::string part = unportable_part(expression); !part.empty())
    fail(ErrorKind::kUsage, where, ": \"", expression, "\" uses ", part, ", which is not supported in regular expressions here",
         Remedy{"write it with groups (...), (?:...), classes [...], look-ahead, * + ? {m,n} and \\d \\w \\s, or list the module names"});
  try {
    // __polynomial is libstdc++'s breadth-first matcher: no exponential time, no recursion as deep as the input.
    regex_.assign(expression, std::regex::ECMAScript | std::regex::optimize | std::regex_constants::__polynomial);
  } catch (const std::regex_error& error) {
    fail(ErrorKind::kUsage, where, ": \"", expression, "\" is not a regular expression: ", error.what());
  }
}

bool Pattern::matches_whole(const std::string& path) const { return std::regex_match(path, regex_); }

bool names_module(std::string_view entry, std::string_view path) {
  if (entry == path) return true;
  return path.size() > entry.size() && path.ends_with(entry) && path[path.size() - entry.size() - 1] == '.';
}

bool names_component(std::string_view entry, std::string_view path) {
  for (std::size_t at = path.find(entry); at != std::string_view::npos; at = path.find(entry, at + 1)) {
    const std::size_t end = at + entry.size();
    if ((at == 0 || path[at - 1] == '.') && (end == path.size() || path[end] == '.')) return true;
  }
  return false;
}

PatternKeys::PatternKeys(std::vector<std::string> keys, std::string_view where) {
  patterns_.reserve(keys.size());
  for (const std::string& key : keys) {
    const Pattern checked_alone(key, where);  // so that a message shows what the person wrote
    patterns_.emplace_back("(?:.*\\.)?(?:" + key + ")", where);
  }
}

std::size_t PatternKeys::find(const std::string& path) const {
  std::size_t key = 0;
  while (key < patterns_.size() && !patterns_[key].matches_whole(path)) ++key;
  return key;
}

}  // namespace alambic::lora
