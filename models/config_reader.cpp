// SPDX-License-Identifier: Apache-2.0
#include "models/config_reader.h"

namespace alambic::models {

std::string shown(const Json& value) {
  std::string text = to_line(value);
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  return text;
}

const Json& ConfigReader::operator[](const std::string& key) const {
  static const Json kNull;
  for (const Json* object : {&values_, &defaults_}) {
    const auto found = object->find(key);
    if (found != object->end()) return *found;
  }
  return kNull;
}

std::int64_t ConfigReader::integer(const std::string& key, std::int64_t low, std::int64_t high) {
  const Json& value = (*this)[key];
  const bool whole = value.is_number_integer() && !(value.is_number_unsigned() && value.get<std::uint64_t>() > INT64_MAX);
  if (whole && value.get<std::int64_t>() >= low && value.get<std::int64_t>() <= high) return value.get<std::int64_t>();
  problem(key, " must be a whole number from ", low, " to ", high, ", got ", shown(value));
  return low;
}

double ConfigReader::number(const std::string& key, double low, double high) {
  const Json& value = (*this)[key];
  if (value.is_number() && value.get<double>() >= low && value.get<double>() <= high) return value.get<double>();
  if (high == std::numeric_limits<double>::max()) problem(key, " must be a number of at least ", low, ", got ", shown(value));
  else problem(key, " must be a number from ", low, " to ", high, ", got ", shown(value));
  return low;
}

bool ConfigReader::boolean(const std::string& key) {
  const Json& value = (*this)[key];
  if (value.is_boolean()) return value.get<bool>();
  problem(key, " must be true or false, got ", shown(value));
  return false;
}

std::vector<double> ConfigReader::numbers(const std::string& key, std::size_t count, double low) {
  const Json& value = (*this)[key];
  std::vector<double> list;
  if (value.is_array() && value.size() == count)
    for (const Json& element : value)
      if (element.is_number() && element.get<double>() >= low && element.get<double>() <= std::numeric_limits<float>::max())
        list.push_back(element.get<double>());
  if (list.size() == count) return list;
  problem(key, " must be a list of ", count, " numbers of at least ", low, ", got ", shown(value));
  return std::vector<double>(count, low);
}

}  // namespace alambic::models
