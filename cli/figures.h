// SPDX-License-Identifier: Apache-2.0
#pragma once
// Numbers as a person reads them. --json keeps full precision.
#include <string>

#include "core/json.h"

namespace alambic::cli {

/// With so many digits behind the point; "-" for what is no number.
std::string figure(const Json& number, int digits);
/// With three digits, whatever its size: "9.68e-05", "37.7".
std::string short_figure(double number);
/// Whole, in groups of three: "59,700"; "-" for what is no number.
std::string grouped(const Json& number);
/// "2.35 GB" (10^9 bytes); "unknown" for what is no number.
std::string gigabytes(const Json& bytes);
/// "48 m 53 s", "3 h 5 m", "2 d 4 h"; below a minute "7.3 s".
std::string duration(double seconds);

}  // namespace alambic::cli
