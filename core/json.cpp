// SPDX-License-Identifier: Apache-2.0
#include "core/json.h"

#include <set>
#include <utility>
#include <vector>

#include "core/files.h"

namespace alambic {
namespace {

constexpr std::size_t kDeepestNesting = 200;

// Builds the document and refuses what nlohmann's own DOM parser lets pass: a key given twice, and bottomless nesting.
class StrictHandler : public nlohmann::json_sax<Json> {
 public:
  StrictHandler(std::string_view source, std::size_t most_bytes) : source_(source), most_bytes_(most_bytes) {}
  Json take() { return std::move(root_); }

  bool null() override { return add(Json(nullptr)); }
  bool boolean(bool value) override { return add(Json(value)); }
  bool number_integer(number_integer_t value) override { return add(Json(value)); }
  bool number_unsigned(number_unsigned_t value) override { return add(Json(value)); }
  bool number_float(number_float_t value, const string_t&) override { return add(Json(value)); }
  bool string(string_t& value) override {
    hold(sizeof(string_t) + value.size());
    return add(Json(std::move(value)));
  }
  bool binary(binary_t&) override { return false; }
  bool start_object(std::size_t) override { return open(Json::object()); }
  bool start_array(std::size_t) override { return open(Json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(string_t& name) override {
    if (!levels_.back().keys.insert(name).second) fail(ErrorKind::kData, source_, ": the key \"", name, "\" is given twice in one object");
    hold(2 * sizeof(Json::object_t::value_type) + name.size());
    levels_.back().keys_bytes += kKeyBytes + name.size();
    hold(kKeyBytes + name.size());
    levels_.back().key = std::move(name);
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& problem) override {
    const std::string what = problem.what();  // "[json.exception.parse_error.101] parse error at line 1, column 2: ..."
    const std::size_t from = what.find("] ");
    fail(ErrorKind::kData, source_, ": not valid JSON at byte ", position, ": ", from == std::string::npos ? what : what.substr(from + 2));
  }

 private:
  struct Level {
    Json value;
    std::string key;             // of the member being read, if value is an object
    std::set<std::string> keys;  // all seen so far
    std::size_t keys_bytes = 0;
  };

  static constexpr std::size_t kKeyBytes = sizeof(std::string) + 4 * sizeof(void*);  // a node of the set

  // An estimate from above: vectors that grow hold up to twice their elements.
  void hold(std::size_t num_bytes) {
    held_bytes_ += num_bytes;
    if (held_bytes_ > most_bytes_) fail(ErrorKind::kData, source_, ": JSON of so many small values that it would take more than ", most_bytes_ >> 20, " MiB of memory");
  }
  bool add(Json value) {
    hold(2 * sizeof(Json));
    if (levels_.empty()) root_ = std::move(value);
    else if (levels_.back().value.is_array()) levels_.back().value.push_back(std::move(value));
    // push_back on ordered_json's underlying vector: the key is known to be new, so no linear search for it.
    else levels_.back().value.get_ref<Json::object_t&>().Container::emplace_back(std::move(levels_.back().key), std::move(value));
    return true;
  }
  bool open(Json value) {
    if (levels_.size() >= kDeepestNesting) fail(ErrorKind::kData, source_, ": JSON nested deeper than ", kDeepestNesting, " levels");
    hold(sizeof(Json::object_t) + 2 * sizeof(void*));
    levels_.push_back({.value = std::move(value), .key = {}, .keys = {}});
    return true;
  }
  bool close() {
    Json done = std::move(levels_.back().value);
    held_bytes_ -= levels_.back().keys_bytes;
    levels_.pop_back();
    return add(std::move(done));
  }

  using Container = Json::object_t::Container;
  std::string source_;
  std::size_t most_bytes_, held_bytes_ = 0;
  Json root_;
  std::vector<Level> levels_;
};

std::string shortened(const Json& value) {
  std::string text = to_line(value);
  if (text.size() <= 80) return text;
  std::size_t end = 77;
  while ((static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;  // not within a character
  return text.substr(0, end) + "...";
}

template <class T>
constexpr const char* kTypeName = "a value";
template <>
constexpr const char* kTypeName<bool> = "true or false";
template <>
constexpr const char* kTypeName<std::int64_t> = "a whole number";
template <>
constexpr const char* kTypeName<double> = "a number";
template <>
constexpr const char* kTypeName<std::string> = "a string";

template <class T>
bool holds(const Json& value) {
  if constexpr (std::is_same_v<T, bool>) return value.is_boolean();
  if constexpr (std::is_same_v<T, std::int64_t>)
    return value.is_number_integer() && !(value.is_number_unsigned() && value.get<std::uint64_t>() > INT64_MAX);
  if constexpr (std::is_same_v<T, double>) return value.is_number();
  if constexpr (std::is_same_v<T, std::string>) return value.is_string();
  return true;
}

}  // namespace

Json parse_json(std::string_view text, std::string_view source, std::size_t most_held) {
  StrictHandler handler(source, most_held + 2 * text.size());
  Json::sax_parse(text, &handler);  // false only where the handler has thrown already
  return handler.take();
}

Json read_json_file(const std::filesystem::path& path, std::uint64_t max_bytes, std::size_t most_held) {
  return parse_json(read_file(path, max_bytes), path.string(), most_held);
}

std::string to_line(const Json& value) { return value.dump(-1, ' ', false, Json::error_handler_t::replace); }

template <class T>
T require(const Json& object, std::string_view key, std::string_view source) {
  if (!object.is_object()) fail(ErrorKind::kData, source, ": expected a JSON object with the key \"", key, "\"");
  const auto found = object.find(std::string(key));
  if (found == object.end()) fail(ErrorKind::kData, source, ": the key \"", key, "\" is missing");
  if (!holds<T>(*found)) fail(ErrorKind::kData, source, ": \"", key, "\" must be ", kTypeName<T>, ", got ", shortened(*found));
  return found->template get<T>();
}

template bool require<bool>(const Json&, std::string_view, std::string_view);
template std::int64_t require<std::int64_t>(const Json&, std::string_view, std::string_view);
template double require<double>(const Json&, std::string_view, std::string_view);
template std::string require<std::string>(const Json&, std::string_view, std::string_view);
template Json require<Json>(const Json&, std::string_view, std::string_view);

}  // namespace alambic
