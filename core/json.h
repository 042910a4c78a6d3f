// SPDX-License-Identifier: Apache-2.0
#pragma once
// JSON read strictly: duplicate keys, bad UTF-8, trailing text, deep nesting and oversized files are errors that name
// the file. Objects keep the order of their keys, so that a config passed through is written as it was read.
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "core/error.h"

namespace alambic {

using Json = nlohmann::ordered_json;

/// What a document may take in memory besides twice its text: what is written in three bytes ("[],") is held in fifty.
inline constexpr std::size_t kUsualJson = 64 << 20;
/// Of a vocabulary: a quarter of a million tokens and half a million merges (Gemma 3) take about 150 MB.
inline constexpr std::size_t kVocabularyJson = 512 << 20;

/// Throws Error(kData) "<source>: ..." with the byte offset. source names the file (and line) in messages.
Json parse_json(std::string_view text, std::string_view source, std::size_t most_held = kUsualJson);

/// Reads and parses a whole file; Error(kData) if it is missing, larger than max_bytes, or not JSON.
Json read_json_file(const std::filesystem::path& path, std::uint64_t max_bytes = 64ull << 20, std::size_t most_held = kUsualJson);

/// One line, keys in their order, non-ASCII kept; invalid UTF-8 cannot occur in parsed values and is replaced otherwise.
std::string to_line(const Json& value);

/// json[key] as T, or Error(kData) naming source, key, the type wanted and the value found. Integers are range-checked,
/// numbers with a fraction are not integers, and booleans are not numbers.
template <class T>
T require(const Json& object, std::string_view key, std::string_view source);

/// The same, with a default where the key is absent or null.
template <class T>
T value_or(const Json& object, std::string_view key, T otherwise, std::string_view source) {
  const auto found = object.find(std::string(key));
  if (found == object.end() || found->is_null()) return otherwise;
  return require<T>(object, key, source);
}

extern template bool require<bool>(const Json&, std::string_view, std::string_view);
extern template std::int64_t require<std::int64_t>(const Json&, std::string_view, std::string_view);
extern template double require<double>(const Json&, std::string_view, std::string_view);
extern template std::string require<std::string>(const Json&, std::string_view, std::string_view);
extern template Json require<Json>(const Json&, std::string_view, std::string_view);

}  // namespace alambic
