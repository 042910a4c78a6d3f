// SPDX-License-Identifier: Apache-2.0
#include "cli/figures.h"

#include <charconv>
#include <cmath>

namespace alambic::cli {

std::string figure(const Json& number, int digits) {
  if (!number.is_number()) return "-";
  char buffer[400];  // the largest double has 309 digits
  const auto [end, problem] = std::to_chars(buffer, buffer + sizeof buffer, number.get<double>(), std::chars_format::fixed, digits);
  return problem == std::errc{} ? std::string(buffer, end) : "-";
}

std::string short_figure(double number) {
  char buffer[32];
  const auto [end, problem] = std::to_chars(buffer, buffer + sizeof buffer, number, std::chars_format::general, 3);
  return {buffer, end};
}

std::string grouped(const Json& number) {
  std::string text = number.is_number_integer() ? number.dump() : figure(number, 0);
  const std::size_t first = text.starts_with("-") ? 1 : 0;
  for (std::size_t at = text.size(); at > first + 3;) text.insert(at -= 3, ",");
  return text;
}

std::string gigabytes(const Json& bytes) { return bytes.is_number() ? figure(bytes.get<double>() / 1e9, 2) + " GB" : "unknown"; }

std::string duration(double seconds) {
  if (!(seconds >= 60)) return figure(seconds, 1) + " s";
  const double whole = std::round(seconds);
  const auto pair = [&](double large, const char* large_name, double small, const char* small_name) {
    return grouped(std::floor(whole / large)) + " " + large_name + " " + grouped(std::floor(std::fmod(whole, large) / small)) + " " + small_name;
  };
  if (whole < 3600) return pair(60, "m", 1, "s");
  if (whole < 86400) return pair(3600, "h", 60, "m");
  return pair(86400, "d", 3600, "h");
}

}  // namespace alambic::cli
