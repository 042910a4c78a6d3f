// SPDX-License-Identifier: Apache-2.0
// yaml-cpp 0.7.0 is used for its events only. Its own tree keeps duplicate keys, reads 010 as 8 and `yes` as true, and takes
// byte 0x04 for the end of the file; the tree below keeps what was written and where, and the field's type decides the rest.
#include "core/config.h"

#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <iterator>
#include <sstream>
#include <utility>

#include "core/error.h"
#include "core/files.h"

namespace alambic {
namespace {

constexpr std::uint64_t kLargestFile = 1 << 20;
constexpr std::size_t kDeepestNesting = 32;
constexpr std::size_t kMostProblemsShown = 50;

struct Where {
  std::string source;  // the file's path, or "--set a.b"
  int line = 0;        // from 1; 0: no line is known
  int column = 0;
  std::string text() const {
    return line == 0 ? source : source + ":" + std::to_string(line) + ":" + std::to_string(column);
  }
};

struct Problem {
  Where where;
  std::string text;
};

struct Node {
  enum class Kind { kNull, kPlain, kQuoted, kSequence, kMapping };
  Kind kind = Kind::kNull;
  Where where;
  std::string text = {};  // of a scalar
  std::vector<Node> items = {};
  struct Member;
  std::vector<Member> members = {};
  bool replaced_mapping = false;  // an override put this in the place of a mapping of the file

  Node* find(std::string_view key);
  const Node* find(std::string_view key) const { return const_cast<Node*>(this)->find(key); }
};

struct Node::Member {
  std::string key;
  Where where;
  Node value;
};

Node* Node::find(std::string_view key) {
  for (Member& member : members)
    if (member.key == key) return &member.value;
  return nullptr;
}

std::string shortened(std::string_view text) {
  constexpr std::size_t kLongest = 60;
  return text.size() <= kLongest ? std::string(text) : std::string(text.substr(0, kLongest - 3)) + "...";
}

std::string described(const Node& node) {
  switch (node.kind) {
    case Node::Kind::kNull: return "nothing";
    case Node::Kind::kPlain: return shortened(node.text);
    case Node::Kind::kQuoted: return "the quoted text \"" + shortened(node.text) + "\"";
    case Node::Kind::kSequence: return "a list";
    case Node::Kind::kMapping: return "a mapping of keys to values";
  }
  return "";
}

// --- From text to nodes ---------------------------------------------------------------------------------------------

// Builds the tree and notes what YAML allows and a config does not.
class TreeBuilder : public YAML::EventHandler {
 public:
  TreeBuilder(std::string source, bool has_lines, std::vector<Problem>& problems)
      : source_(std::move(source)), has_lines_(has_lines), problems_(problems) {}
  Node take() { return std::move(root_); }

  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    refuse_anchor(mark, anchor);
    add({.kind = Node::Kind::kNull, .where = where(mark)});
  }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    problem(mark, "aliases (*name) are not read in a config; write the value out");
    add({.kind = Node::Kind::kNull, .where = where(mark)});
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor, const std::string& value) override {
    refuse_anchor(mark, anchor);
    refuse_tag(mark, tag);
    add({.kind = tag == "?" ? Node::Kind::kPlain : Node::Kind::kQuoted, .where = where(mark), .text = value});
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor, YAML::EmitterStyle::value) override {
    open(mark, tag, anchor, Node::Kind::kSequence);
  }
  void OnSequenceEnd() override { close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor, YAML::EmitterStyle::value) override {
    open(mark, tag, anchor, Node::Kind::kMapping);
  }
  void OnMapEnd() override { close(); }

 private:
  struct Level {
    Node node;
    bool awaits_value = false;  // of a mapping: its key has been read
    Node key = {};
  };

  Where where(const YAML::Mark& mark) const {
    return has_lines_ ? Where{source_, mark.line + 1, mark.column + 1} : Where{source_, 0, 0};
  }
  void problem(const YAML::Mark& mark, std::string text) { problems_.push_back({where(mark), std::move(text)}); }
  void refuse_anchor(const YAML::Mark& mark, YAML::anchor_t anchor) {
    if (anchor != 0) problem(mark, "anchors (&name) are not read in a config; write the value out");
  }
  void refuse_tag(const YAML::Mark& mark, const std::string& tag) {
    if (!tag.empty() && tag != "?" && tag != "!") problem(mark, "tags are not read in a config, got: " + shortened(tag));
  }
  void open(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor, Node::Kind kind) {
    refuse_anchor(mark, anchor);
    refuse_tag(mark, tag);
    if (levels_.size() >= kDeepestNesting)
      fail(ErrorKind::kUsage, where(mark).text(), ": nested deeper than ", kDeepestNesting, " levels");
    levels_.push_back({.node = {.kind = kind, .where = where(mark)}});
  }
  void close() {
    Node done = std::move(levels_.back().node);
    levels_.pop_back();
    add(std::move(done));
  }
  void add(Node node) {
    if (levels_.empty()) {
      root_ = std::move(node);
      return;
    }
    Level& level = levels_.back();
    if (level.node.kind == Node::Kind::kSequence) {
      level.node.items.push_back(std::move(node));
    } else if (!level.awaits_value) {
      level.awaits_value = true;
      level.key = std::move(node);
    } else {
      level.awaits_value = false;
      add_member(level, std::move(node));
    }
  }
  void add_member(Level& level, Node value) {
    const Node& key = level.key;
    if (key.kind != Node::Kind::kPlain && key.kind != Node::Kind::kQuoted) {
      problems_.push_back({key.where, "a key must be a name, got " + described(key)});
    } else if (key.kind == Node::Kind::kPlain && key.text == "<<") {
      problems_.push_back({key.where, "merge keys (<<) are not read in a config; write the values out"});
    } else {
      for (const Node::Member& earlier : level.node.members) {
        if (earlier.key != key.text) continue;
        problems_.push_back({key.where, "the key " + shortened(key.text) + " stands twice, first at " + earlier.where.text()});
        return;
      }
      if (value.kind == Node::Kind::kNull) value.where = key.where;  // yaml-cpp places an absent value on the next line
      level.node.members.push_back({key.text, key.where, std::move(value)});
    }
  }

  std::string source_;
  bool has_lines_;
  std::vector<Problem>& problems_;
  std::vector<Level> levels_;
  Node root_;
};

// Length of the UTF-8 sequence that starts at text[i], or 0 if none does (RFC 3629: no overlong forms, no surrogates).
std::size_t utf8_length(std::string_view text, std::size_t i) {
  const auto byte = [&](std::size_t k) { return k < text.size() ? static_cast<unsigned char>(text[k]) : 0u; };
  const auto follows = [&](std::size_t k) { return (byte(k) & 0xC0u) == 0x80u; };
  const unsigned first = byte(i), second = byte(i + 1);
  if (first < 0x80) return 1;
  if (first >= 0xC2 && first < 0xE0 && follows(i + 1)) return 2;
  if (first >= 0xE0 && first < 0xF0 && follows(i + 1) && follows(i + 2) && !(first == 0xE0 && second < 0xA0) && !(first == 0xED && second >= 0xA0))
    return 3;
  if (first >= 0xF0 && first < 0xF5 && follows(i + 1) && follows(i + 2) && follows(i + 3) && !(first == 0xF0 && second < 0x90) &&
      !(first == 0xF4 && second >= 0x90))
    return 4;
  return 0;
}

// What the YAML scanner would pass over in silence: bytes that are not text, and tabs where indentation is counted.
void check_text(std::string_view text, const std::string& source, bool has_lines, std::vector<Problem>& problems) {
  int line = 1, column = 1;
  bool in_indentation = true;
  for (std::size_t i = 0; i < text.size();) {
    const auto here = [&] { return has_lines ? Where{source, line, column} : Where{source, 0, 0}; };
    const unsigned char byte = static_cast<unsigned char>(text[i]);
    const std::size_t length = utf8_length(text, i);
    if (length == 0) fail(ErrorKind::kData, here().text(), ": not UTF-8 text");
    if ((byte < 0x20 && byte != '\n' && byte != '\r' && byte != '\t') || byte == 0x7F)
      fail(ErrorKind::kData, here().text(), ": a control character (byte ", static_cast<int>(byte), ") in the text");
    if (byte == '\t' && in_indentation) {
      problems.push_back({here(), "a tab in the indentation; indent with spaces"});
      in_indentation = false;
    }
    if (byte != ' ') in_indentation = false;
    i += length;
    ++column;
    if (byte == '\n') ++line, column = 1, in_indentation = true;
  }
}

Node parse_yaml(std::string_view text, const std::string& source, bool has_lines, std::vector<Problem>& problems) {
  const std::size_t num_problems = problems.size();
  check_text(text, source, has_lines, problems);
  Node root;
  if (problems.size() > num_problems) return root;  // what the scanner makes of tabs would only confuse
  std::istringstream stream{std::string(text)};
  TreeBuilder builder(source, has_lines, problems);
  try {
    YAML::Parser parser(stream);
    if (parser.HandleNextDocument(builder)) {
      root = builder.take();
      std::vector<Problem> ignored;
      TreeBuilder second("", false, ignored);
      if (parser.HandleNextDocument(second)) {
        const Where whole{source, 0, 0};
        problems.push_back({whole, "more than one YAML document; only one is read"});
      }
    }
  } catch (const YAML::Exception& error) {
    Where where{source, 0, 0};
    if (has_lines && !error.mark.is_null()) where = {source, error.mark.line + 1, error.mark.column + 1};
    problems.push_back({where, "not valid YAML: " + error.msg});
    return {};
  }
  return root;
}

// --- Overrides ------------------------------------------------------------------------------------------------------

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
  while (!text.empty() && text.back() == ' ') text.remove_suffix(1);
  return text;
}

bool is_index(std::string_view part) { return !part.empty() && part.size() <= 9 && part.find_first_not_of("0123456789") == part.npos; }

// Puts the value of "a.b.0.c=value" into the tree, making the mappings on the way.
void apply_override(Node& root, const std::string& assignment, std::vector<Problem>& problems) {
  const std::size_t equals = assignment.find('=');
  const std::string path = assignment.substr(0, equals);
  const Where where{"--set " + shortened(path), 0, 0};
  const auto problem = [&](std::string text) { problems.push_back({where, std::move(text)}); };
  if (equals == std::string::npos || equals == 0) return problem("must look like key=value, for example schedule.shape=linear");

  const std::size_t num_problems = problems.size();
  const std::string_view written = std::string_view(assignment).substr(equals + 1);
  Node value = parse_yaml(written, where.source, false, problems);
  if (problems.size() > num_problems) return;
  // A comment or a key in an unquoted text would silently become something else than was typed.
  if (value.kind == Node::Kind::kPlain && value.text != trimmed(written))
    return problem("YAML reads this value as \"" + shortened(value.text) + "\" only; put it into quotes");
  value.where = where;

  Node* node = &root;
  std::string so_far;
  for (std::size_t begin = 0; begin <= path.size();) {
    const std::size_t end = std::min(path.find('.', begin), path.size());
    const std::string part = path.substr(begin, end - begin);
    begin = end + 1;
    if (part.empty()) return problem("an empty name in the key");
    so_far += (so_far.empty() ? "" : ".") + part;
    if (node->kind == Node::Kind::kNull) {
      node->kind = is_index(part) ? Node::Kind::kSequence : Node::Kind::kMapping;
      if (node->where.source.empty()) node->where = where;
    }
    if (node->kind == Node::Kind::kSequence) {
      if (!is_index(part)) return problem(so_far + ": a list is addressed by number, got " + shortened(part));
      const std::size_t index = std::stoul(part);
      if (index > node->items.size())
        return problem(so_far + ": the list has " + std::to_string(node->items.size()) + " entries; the next one is number " + std::to_string(node->items.size()));
      if (index == node->items.size()) node->items.push_back({.where = where});
      node = &node->items[index];
    } else if (node->kind == Node::Kind::kMapping) {
      Node* member = node->find(part);
      if (!member) {
        node->members.push_back({part, where, {.where = where}});
        member = &node->members.back().value;
      }
      node = member;
    } else {
      return problem(so_far + ": there is a single value before this name, not a group");
    }
  }
  value.replaced_mapping = node->kind == Node::Kind::kMapping;
  *node = std::move(value);
}

// --- From nodes to fields -------------------------------------------------------------------------------------------

std::string number_text(double value) {
  char buffer[32];
  const auto [end, problem] = std::to_chars(buffer, buffer + sizeof buffer, value);
  return {buffer, end};
}

std::string range_text(const FieldInfo& info) {
  const bool low = std::isfinite(info.low), high = std::isfinite(info.high);
  if (low && high) return "from " + number_text(info.low) + " to " + number_text(info.high);
  if (low) return "at least " + number_text(info.low);
  if (high) return "at most " + number_text(info.high);
  return "";
}

std::string joined(const std::vector<std::string>& parts, std::string_view separator) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? std::string() : std::string(separator)) + part;
  return text;
}

// JSON's number grammar (RFC 8259, section 6), or its whole-number part alone.
bool looks_like_number(std::string_view text, bool whole) {
  std::size_t i = 0;
  const auto digits = [&] {
    const std::size_t begin = i;
    while (i < text.size() && text[i] >= '0' && text[i] <= '9') ++i;
    return i - begin;
  };
  if (i < text.size() && text[i] == '-') ++i;
  const std::size_t begin = i, count = digits();
  if (count == 0 || (count > 1 && text[begin] == '0')) return false;
  if (whole) return i == text.size();
  if (i < text.size() && text[i] == '.' && (++i, digits() == 0)) return false;
  if (i < text.size() && (text[i] == 'e' || text[i] == 'E')) {
    ++i;
    if (i < text.size() && (text[i] == '-' || text[i] == '+')) ++i;
    if (digits() == 0) return false;
  }
  return i == text.size();
}

/// "a.b" of a stack of names.
class KeyPath {
 public:
  void push(const std::string& part) { parts_.push_back(part); }
  void pop() { parts_.pop_back(); }
  std::string of(const std::string& key) const {
    const std::string before = joined(parts_, ".");
    return before.empty() ? key : key.empty() ? before : before + "." + key;
  }

 private:
  std::vector<std::string> parts_;
};

class Reader : public FieldVisitor {
 public:
  Reader(const Node& root, std::vector<Problem>& problems, std::string source)
      : problems_(problems), source_(std::move(source)) {
    scopes_.push_back({&root, true, {}});
  }

  void field(const std::string& key, bool& value, const FieldInfo& info) override { read(key, value, info); }
  void field(const std::string& key, std::int64_t& value, const FieldInfo& info) override { read(key, value, info); }
  void field(const std::string& key, std::uint64_t& value, const FieldInfo& info) override { read(key, value, info); }
  void field(const std::string& key, double& value, const FieldInfo& info) override { read(key, value, info); }
  void field(const std::string& key, std::string& value, const FieldInfo& info) override { read(key, value, info); }
  void field(const std::string& key, std::filesystem::path& value, const FieldInfo& info) override {
    std::string text;
    if (read(key, text, info)) value = text;
  }
  void field(const std::string& key, std::vector<std::string>& value, const FieldInfo& info) override {
    const Node* node = take(key, info);
    if (!node) return;
    if (node->kind != Node::Kind::kSequence) return problem(*node, key, "must be a list such as [a, b], got " + described(*node));
    value.clear();
    for (std::size_t i = 0; i < node->items.size(); ++i) {
      std::string item;
      if (convert(node->items[i], key + "." + std::to_string(i), item, info)) value.push_back(std::move(item));
    }
  }
  void field(const std::string& key, std::map<std::string, std::string>& value, const FieldInfo& info) override { read_map(key, value, info); }
  void field(const std::string& key, std::map<std::string, std::int64_t>& value, const FieldInfo& info) override { read_map(key, value, info); }
  void field(const std::string& key, std::map<std::string, double>& value, const FieldInfo& info) override { read_map(key, value, info); }

  /// Reports the keys that no field asked for, the nearest name beside each.
  void finish() {
    close_scope();
    for (const Unknown& unknown : unknown_) {
      std::string nearest = nearest_name(unknown.key, unknown.siblings);
      if (!nearest.empty()) {
        nearest = unknown.group + nearest;
      } else {  // the right name in the wrong group
        for (const std::string& known : known_paths_)
          if (known.size() > unknown.key.size() && known.ends_with("." + unknown.key)) nearest = known;
      }
      problems_.push_back({unknown.where, "unknown key " + shortened(unknown.group + unknown.key) +
                                              (nearest.empty() ? "; known here: " + joined(unknown.siblings, ", ") : "; did you mean " + nearest + "?")});
    }
  }

 protected:
  void begin_group(const std::string& key, const std::string&) override {
    const Node* node = take(key, {});
    const bool readable = !node || node->kind == Node::Kind::kMapping;
    if (!readable) problem(*node, key, "is a group of keys, got " + described(*node));
    if (node && node->replaced_mapping) problem(*node, key, "this would drop the group's other values; set its keys one by one");
    open_scope(key, node, readable);
  }
  void end_group() override { close_scope(), path_.pop(); }

  std::optional<std::size_t> begin_list(const std::string& key, std::size_t, const FieldInfo& info) override {
    const Node* node = take(key, info);
    if (node && node->kind != Node::Kind::kSequence) {
      problem(*node, key, "must be a list, got " + described(*node));
      node = nullptr;
    }
    path_.push(key);
    lists_.push_back(node);
    if (!node) return std::nullopt;
    return node->items.size();
  }
  void begin_item(std::size_t index) override {
    const Node* node = lists_.back() ? &lists_.back()->items[index] : nullptr;
    const std::string number = std::to_string(index);
    const bool readable = !node || node->kind == Node::Kind::kMapping;
    if (!readable) problem(*node, number, "must be a mapping of keys to values, got " + described(*node));
    open_scope(number, node, readable);
  }
  void end_item() override { close_scope(), path_.pop(); }
  void end_list() override { lists_.pop_back(), path_.pop(); }

 private:
  struct Scope {
    const Node* node;  // a mapping, or null where the file says nothing
    bool readable;     // false: something else stands there; that is said once, not again for each missing key
    std::vector<std::string> keys;
  };
  struct Unknown {
    Where where;
    std::string key, group;  // group: "schedule." or ""
    std::vector<std::string> siblings;
  };

  void open_scope(const std::string& name, const Node* node, bool readable) {
    path_.push(name);
    scopes_.push_back({readable ? node : nullptr, readable && scopes_.back().readable, {}});
  }
  void close_scope() {
    const Scope scope = std::move(scopes_.back());
    scopes_.pop_back();
    if (!scope.node) return;
    const std::string group = path_.of("");
    for (const Node::Member& member : scope.node->members)
      if (std::find(scope.keys.begin(), scope.keys.end(), member.key) == scope.keys.end())
        unknown_.push_back({member.where, member.key, group.empty() ? "" : group + ".", scope.keys});
  }
  void problem(const Node& node, const std::string& key, const std::string& text) {
    problems_.push_back({node.where, path_.of(key) + " " + text});
  }

  /// The node of a key, or null where the default stands.
  const Node* take(const std::string& key, const FieldInfo& info) {
    Scope& scope = scopes_.back();
    scope.keys.push_back(key);
    known_paths_.push_back(path_.of(key));
    const Node* node = scope.node ? scope.node->find(key) : nullptr;
    if (!node && info.required && scope.readable)
      problems_.push_back({scope.node && scopes_.size() > 1 ? scope.node->where : Where{source_, 0, 0},
                           path_.of(key) + " is missing" + (info.help.empty() ? "" : ": " + info.help)});
    if (node && node->kind == Node::Kind::kNull) {
      problem(*node, key, "has no value; remove the key to keep the default, or quote the word to mean the text");
      return nullptr;
    }
    return node;
  }

  template <class T>
  bool read(const std::string& key, T& value, const FieldInfo& info) {
    const Node* node = take(key, info);
    return node && convert(*node, key, value, info);
  }
  template <class T>
  void read_map(const std::string& key, std::map<std::string, T>& value, const FieldInfo& info) {
    const Node* node = take(key, info);
    if (!node) return;
    if (node->kind != Node::Kind::kMapping) return problem(*node, key, "must be a mapping such as {name: value}, got " + described(*node));
    value.clear();
    for (const Node::Member& member : node->members) convert(member.value, key + "." + member.key, value[member.key], info);
  }

  bool convert(const Node& node, const std::string& key, bool& value, const FieldInfo&) {
    if (node.kind != Node::Kind::kPlain || (node.text != "true" && node.text != "false")) {
      problem(node, key, "must be true or false, got " + described(node));
      return false;
    }
    value = node.text == "true";
    return true;
  }
  template <class Number>
    requires(std::is_arithmetic_v<Number> && !std::is_same_v<Number, bool>)
  bool convert(const Node& node, const std::string& key, Number& value, const FieldInfo& info) {
    constexpr bool kWhole = std::is_integral_v<Number>;
    if (node.kind != Node::Kind::kPlain || !looks_like_number(node.text, kWhole)) {
      const std::string range = range_text(info);
      problem(node, key, std::string("must be ") + (kWhole ? "a whole number in plain digits" : "a finite number") + (range.empty() ? "" : " " + range) +
                             ", got " + described(node));
      return false;
    }
    Number read{};
    const auto [end, code] = std::from_chars(node.text.data(), node.text.data() + node.text.size(), read);
    if (code != std::errc{} || end != node.text.data() + node.text.size()) {
      if (kWhole && std::is_unsigned_v<Number> && node.text.front() == '-') problem(node, key, "must not be negative, got " + described(node));
      else problem(node, key, "is outside what " + std::string(kWhole ? "64 bits" : "a double") + " can hold, got " + described(node));
      return false;
    }
    // long double holds every 64-bit integer exactly on x86-64, and rounds no double elsewhere.
    if (static_cast<long double>(read) < static_cast<long double>(info.low) || static_cast<long double>(read) > static_cast<long double>(info.high)) {
      problem(node, key, "must be " + range_text(info) + (info.unit.empty() ? "" : " " + info.unit) + ", got " + described(node));
      return false;
    }
    value = read;
    return true;
  }
  bool convert(const Node& node, const std::string& key, std::string& value, const FieldInfo& info) {
    if (node.kind != Node::Kind::kPlain && node.kind != Node::Kind::kQuoted) {
      problem(node, key, "must be a text, got " + described(node));
      return false;
    }
    if (!info.choices.empty() && std::find(info.choices.begin(), info.choices.end(), node.text) == info.choices.end()) {
      const std::string nearest = nearest_name(node.text, info.choices);
      problem(node, key, "must be one of " + joined(info.choices, ", ") + "; got " + described(node) + (nearest.empty() ? "" : ", did you mean " + nearest + "?"));
      return false;
    }
    if (node.text.find('\0') != std::string::npos) {
      problem(node, key, "contains a NUL character");
      return false;
    }
    value = node.text;
    return true;
  }

  std::vector<Problem>& problems_;
  std::string source_;
  std::vector<Scope> scopes_;
  std::vector<const Node*> lists_;
  KeyPath path_;
  std::vector<Unknown> unknown_;
  std::vector<std::string> known_paths_;
};

[[noreturn]] void throw_problems(std::vector<Problem> problems) {
  std::stable_sort(problems.begin(), problems.end(), [](const Problem& a, const Problem& b) {
    return a.where.source == b.where.source && std::pair(a.where.line, a.where.column) < std::pair(b.where.line, b.where.column);
  });
  std::ostringstream text;
  for (std::size_t i = 0; i < std::min(problems.size(), kMostProblemsShown); ++i)
    text << (i == 0 ? "" : "\n") << problems[i].where.text() << ": " << problems[i].text;
  if (problems.size() > kMostProblemsShown) text << "\n... and " << problems.size() - kMostProblemsShown << " more problems";
  throw Error(ErrorKind::kUsage, text.str());
}

// --- The resolved config --------------------------------------------------------------------------------------------

class Resolver : public FieldVisitor {
 public:
  Json take() { return std::move(stack_.front()); }
  void field(const std::string& key, bool& value, const FieldInfo&) override { put(key, value); }
  void field(const std::string& key, std::int64_t& value, const FieldInfo&) override { put(key, value); }
  void field(const std::string& key, std::uint64_t& value, const FieldInfo&) override { put(key, value); }
  void field(const std::string& key, double& value, const FieldInfo&) override { put(key, finite(key, value)); }
  void field(const std::string& key, std::string& value, const FieldInfo&) override { put(key, value); }
  void field(const std::string& key, std::filesystem::path& value, const FieldInfo&) override { put(key, value.string()); }
  void field(const std::string& key, std::vector<std::string>& value, const FieldInfo&) override {
    Json list = Json::array();
    for (const std::string& item : value) list.push_back(item);
    put(key, std::move(list));
  }
  void field(const std::string& key, std::map<std::string, std::string>& value, const FieldInfo&) override { put_map(key, value); }
  void field(const std::string& key, std::map<std::string, std::int64_t>& value, const FieldInfo&) override { put_map(key, value); }
  void field(const std::string& key, std::map<std::string, double>& value, const FieldInfo&) override {
    for (const auto& [name, number] : value) finite(key + "." + name, number);
    put_map(key, value);
  }

 protected:
  void begin_group(const std::string& key, const std::string&) override { open(key, Json::object()); }
  void end_group() override { close(); }
  std::optional<std::size_t> begin_list(const std::string& key, std::size_t, const FieldInfo&) override {
    open(key, Json::array());
    return std::nullopt;
  }
  void begin_item(std::size_t) override { open("", Json::object()); }
  void end_item() override { close(); }
  void end_list() override { close(); }

 private:
  double finite(const std::string& key, double value) {
    if (!std::isfinite(value)) fail(ErrorKind::kBug, "the config value ", key, " is not finite and cannot be written");
    return value;
  }
  void put(const std::string& key, Json value) {
    if (stack_.back().is_array()) stack_.back().push_back(std::move(value));
    else stack_.back()[key] = std::move(value);
  }
  template <class T>
  void put_map(const std::string& key, const std::map<std::string, T>& value) {
    Json object = Json::object();
    for (const auto& [name, item] : value) object[name] = item;
    put(key, std::move(object));
  }
  void open(const std::string& key, Json value) { keys_.push_back(key), stack_.push_back(std::move(value)); }
  void close() {
    Json done = std::move(stack_.back());
    stack_.pop_back();
    const std::string key = std::move(keys_.back());
    keys_.pop_back();
    put(key, std::move(done));
  }

  std::vector<Json> stack_{Json::object()};
  std::vector<std::string> keys_;
};

// --- Help -----------------------------------------------------------------------------------------------------------

class HelpWriter : public FieldVisitor {
 public:
  std::string take() { return std::move(text_); }
  void field(const std::string& key, bool& value, const FieldInfo& info) override { line(key, "true or false", value ? "true" : "false", info); }
  void field(const std::string& key, std::int64_t& value, const FieldInfo& info) override { line(key, "whole number", std::to_string(value), info); }
  void field(const std::string& key, std::uint64_t& value, const FieldInfo& info) override { line(key, "whole number", std::to_string(value), info); }
  void field(const std::string& key, double& value, const FieldInfo& info) override { line(key, "number", number_text(value), info); }
  void field(const std::string& key, std::string& value, const FieldInfo& info) override {
    line(key, info.choices.empty() ? "text" : joined(info.choices, " | "), value, info);
  }
  void field(const std::string& key, std::filesystem::path& value, const FieldInfo& info) override { line(key, "path", value.string(), info); }
  void field(const std::string& key, std::vector<std::string>& value, const FieldInfo& info) override {
    line(key, info.choices.empty() ? "list of texts" : "list of " + joined(info.choices, " | "), "[" + joined(value, ", ") + "]", info);
  }
  void field(const std::string& key, std::map<std::string, std::string>& value, const FieldInfo& info) override { map_line(key, "texts", value, info); }
  void field(const std::string& key, std::map<std::string, std::int64_t>& value, const FieldInfo& info) override { map_line(key, "whole numbers", value, info); }
  void field(const std::string& key, std::map<std::string, double>& value, const FieldInfo& info) override { map_line(key, "numbers", value, info); }

 protected:
  void begin_group(const std::string& key, const std::string& help) override {
    text_ += "\n" + path_.of(key) + ": " + help + "\n";
    path_.push(key);
  }
  void end_group() override { path_.pop(); }
  std::optional<std::size_t> begin_list(const std::string& key, std::size_t, const FieldInfo& info) override {
    text_ += "\n" + path_.of(key) + ": list; " + info.help + (info.required ? " (required)" : "") + "\n";
    path_.push(key);
    return std::size_t{0};
  }
  void begin_item(std::size_t) override { path_.push("N"); }
  void end_item() override { path_.pop(); }
  void end_list() override { path_.pop(); }
  bool wants_example() const override { return true; }

 private:
  void line(const std::string& key, std::string type, const std::string& value, const FieldInfo& info) {
    const std::string range = range_text(info);
    if (!range.empty()) type += " " + range;
    if (!info.unit.empty()) type += ", " + info.unit;
    text_ += "  " + path_.of(key) + "  (" + type + "; " + (info.required ? "required" : "default " + (value.empty() ? "empty" : value)) + ")\n      " + info.help + "\n";
  }
  template <class T>
  void map_line(const std::string& key, const std::string& what, const std::map<std::string, T>& value, const FieldInfo& info) {
    line(key, "mapping of names to " + what, value.empty() ? "{}" : to_line(Json(value)), info);
  }

  std::string text_;
  KeyPath path_;
};

}  // namespace

void detail::read_config_into(const std::filesystem::path& file, const std::vector<std::string>& overrides, const Visit& visit) {
  std::vector<Problem> problems;
  const std::string source = file.empty() ? "config" : file.string();
  Node root;
  if (!file.empty()) {
    root = parse_yaml(read_file(file, kLargestFile), source, true, problems);
    if (!problems.empty() && root.kind == Node::Kind::kNull) throw_problems(std::move(problems));  // nothing to look at further
  }
  if (root.kind == Node::Kind::kNull) root = {.kind = Node::Kind::kMapping, .where = {source, 0, 0}};
  if (root.kind != Node::Kind::kMapping)
    throw_problems({{root.where, "a config is a mapping of keys to values, got " + described(root)}});
  for (const std::string& assignment : overrides) apply_override(root, assignment, problems);

  Reader reader(root, problems, source);
  visit(reader);
  reader.finish();
  if (!problems.empty()) throw_problems(std::move(problems));
}

bool has_top_key(const std::filesystem::path& file, const std::vector<std::string>& overrides, const std::string& key) {
  for (const std::string& assignment : overrides)
    if (assignment.starts_with(key + ".") || assignment.starts_with(key + "=")) return true;
  std::vector<Problem> problems;
  return !file.empty() && parse_yaml(read_file(file, kLargestFile), file.string(), true, problems).find(key) != nullptr;
}

Json detail::resolved_config_of(const Visit& visit) {
  Resolver resolver;
  visit(resolver);
  return resolver.take();
}

std::string detail::config_help_of(const Visit& visit) {
  HelpWriter writer;
  visit(writer);
  return writer.take();
}

}  // namespace alambic
