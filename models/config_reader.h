// SPDX-License-Identifier: Apache-2.0
#pragma once
// Typed, range-checked access to a JSON object laid over its defaults. Problems are collected, not thrown, so that one
// message can name them all.
#include <cstdint>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "core/json.h"

namespace alambic::models {

class ConfigReader {
 public:
  ConfigReader(const Json& values, const Json& defaults, std::vector<std::string>& problems)
      : values_(values), defaults_(defaults), problems_(problems) {}

  bool knows(const std::string& key) const { return defaults_.contains(key); }
  /// The value, else the default, else null. An explicit null stays null, as in transformers.
  const Json& operator[](const std::string& key) const;
  bool is_null(const std::string& key) const { return (*this)[key].is_null(); }

  /// Each reports a problem and returns `low` (or false) when the value is null, of another type or out of range.
  std::int64_t integer(const std::string& key, std::int64_t low, std::int64_t high);
  double number(const std::string& key, double low, double high = std::numeric_limits<double>::max());
  bool boolean(const std::string& key);
  std::vector<double> numbers(const std::string& key, std::size_t count, double low);

  template <class... Parts>
  void problem(const Parts&... parts) {
    std::ostringstream line;
    (line << ... << parts);
    problems_.push_back(line.str());
  }

 private:
  const Json& values_;
  const Json& defaults_;
  std::vector<std::string>& problems_;
};

/// A JSON value for a message, cut to a readable length.
std::string shown(const Json& value);

}  // namespace alambic::models
