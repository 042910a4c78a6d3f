// SPDX-License-Identifier: Apache-2.0
#pragma once
// JSON files that carry their own SHA-256: the indices of token stores and teacher caches.
#include <cstdint>
#include <filesystem>
#include <string>

#include "core/json.h"

namespace alambic::data {

/// What a sealed file says that it is, and whom a person asks for another one.
struct SealedFormat {
  std::string name;        // value of "format": "alambic token store"
  std::int64_t version;    // the only one that is read
  std::string what;        // for messages: "the index of a token store"
  std::string remedy;      // for a damaged one: "copy the store again, or make it again with alambic prepare"
};

/// The text of `index` with a first key "index_sha256": the SHA-256 of this text with 64 zeros in its place. A flipped byte
/// anywhere is seen.
std::string sealed(const Json& index);

/// Reads it back. Error(kData): another format, a later version, or a seal that does not fit. `hash`, unless null, gets the
/// SHA-256 of the whole file.
Json read_sealed(const std::filesystem::path& path, const SealedFormat& format, std::string* hash = nullptr);

/// "sources[0].licence: was "MIT", now "Apache-2.0"": the first difference, for a person.
std::string first_difference(const Json& was, const Json& now, const std::string& path = "");

/// Error(kUsage) "<folder>: holds <what> made with other settings or inputs: ..." where a key of `header` has another value in `index`.
void require_same_header(const Json& index, const Json& header, const std::filesystem::path& folder, const std::string& what);

/// object[key] as a whole number of at least 0. Error(kData).
std::uint64_t require_count(const Json& object, std::string_view key, const std::string& source);

/// Digits with zeros in front up to `width`.
std::string padded(std::uint64_t number, std::size_t width);

/// Whether `name` has this form; # stands for one digit.
bool has_form(std::string_view name, std::string_view form);

}  // namespace alambic::data
