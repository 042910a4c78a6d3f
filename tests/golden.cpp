// SPDX-License-Identifier: Apache-2.0
#include "tests/golden.h"

namespace alambic::testing {

std::filesystem::path golden_path(std::string_view name) { return std::filesystem::path(ALAMBIC_SOURCE_DIR) / "tests" / "golden" / name; }

std::string Golden::provenance() const {
  std::string story;
  for (const char* key : {"script", "versions", "seed"}) {
    const auto found = file_.metadata().find(key);
    story += std::string(key) + ": " + (found == file_.metadata().end() ? "unknown" : found->second) + "; ";
  }
  return story;
}

}  // namespace alambic::testing
