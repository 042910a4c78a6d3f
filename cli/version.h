// SPDX-License-Identifier: Apache-2.0
#pragma once
// Versions of alambic and of what it runs on.
#include <string>
#include <vector>

namespace alambic::cli {

struct Version {
  std::string name;
  std::string running;  // of the library as loaded now
  std::string built;    // of the headers compiled against; "" where only one of the two can be known
};

/// alambic first, then the libraries.
std::vector<Version> versions();
/// What `alambic --version` prints: "alambic 0.1.0", then a line for each library.
std::string version_text();

}  // namespace alambic::cli
