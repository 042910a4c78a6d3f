// SPDX-License-Identifier: Apache-2.0
#include "data/sealed_json.h"

#include <algorithm>

#include "core/error.h"
#include "core/files.h"

namespace alambic::data {
namespace {
constexpr const char* kHashKey = "index_sha256";
}

std::string sealed(const Json& index) {
  Json first = Json::object();
  first[kHashKey] = std::string(64, '0');
  first.update(index);
  std::string text = first.dump(1) + "\n";
  text.replace(text.find(std::string(64, '0')), 64, sha256_of(text));
  return text;
}

Json read_sealed(const fs::path& path, const SealedFormat& format, std::string* hash) {
  const std::string source = path.string();
  std::string text = read_file(path, 1ull << 30);
  if (hash) *hash = sha256_of(text);
  const Json index = parse_json(text, source);
  if (!index.is_object() || value_or<std::string>(index, "format", "", source) != format.name) fail(ErrorKind::kData, source, ": not ", format.what);
  const auto version = require<std::int64_t>(index, "version", source);
  if (version > format.version) fail(ErrorKind::kData, source, ": format version ", version, ", this program reads up to ", format.version, Remedy{"use a newer alambic"});
  const auto seal = require<std::string>(index, kHashKey, source);
  const std::size_t at = text.find(seal);
  if (seal.size() == 64 && at != std::string::npos) text.replace(at, 64, std::string(64, '0'));
  if (version != format.version || sha256_of(text) != seal) fail(ErrorKind::kData, source, ": damaged: its own SHA-256 does not fit", Remedy{format.remedy});
  return index;
}

std::string first_difference(const Json& was, const Json& now, const std::string& path) {
  if (was.is_object() && now.is_object()) {
    for (const auto& [key, value] : was.items()) {
      const auto other = now.find(key);
      const std::string inner = path.empty() ? key : path + "." + key;
      if (other == now.end()) return inner + ": was " + to_line(value) + ", now absent";
      if (value != *other) return first_difference(value, *other, inner);
    }
    for (const auto& [key, value] : now.items())
      if (!was.contains(key)) return (path.empty() ? key : path + "." + key) + ": was absent, now " + to_line(value);
  }
  if (was.is_array() && now.is_array() && was.size() == now.size()) {
    for (std::size_t i = 0; i < was.size(); ++i)
      if (was[i] != now[i]) return first_difference(was[i], now[i], path + "[" + std::to_string(i) + "]");
  }
  return path + ": was " + to_line(was).substr(0, 200) + ", now " + to_line(now).substr(0, 200);
}

void require_same_header(const Json& index, const Json& header, const fs::path& folder, const std::string& what) {
  Json was = Json::object();
  for (const auto& [key, value] : header.items()) was[key] = index.contains(key) ? index[key] : Json(nullptr);
  if (was != header)
    fail(ErrorKind::kUsage, folder.string(), ": holds ", what, " made with other settings or inputs: ", first_difference(was, header),
         Remedy{"choose another output folder, or remove this one"});
}

std::uint64_t require_count(const Json& object, std::string_view key, const std::string& source) {
  const auto value = require<std::int64_t>(object, key, source);
  if (value < 0) fail(ErrorKind::kData, source, ": \"", key, "\" must not be negative, got ", value);
  return static_cast<std::uint64_t>(value);
}

std::string padded(std::uint64_t number, std::size_t width) {
  const std::string digits = std::to_string(number);
  return std::string(width > digits.size() ? width - digits.size() : 0, '0') + digits;
}

bool has_form(std::string_view name, std::string_view form) {
  return name.size() == form.size() &&
         std::equal(name.begin(), name.end(), form.begin(), [](char letter, char wanted) { return wanted == '#' ? letter >= '0' && letter <= '9' : letter == wanted; });
}

}  // namespace alambic::data
