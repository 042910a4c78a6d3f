// SPDX-License-Identifier: Apache-2.0
#pragma once
// Licences by name: Hugging Face ids against SPDX, and whether open, unrestricted weights may come of them.
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace alambic::checkpoints {

struct Licence {
  std::string spdx;     // "Apache-2.0", "LicenseRef-gemma"; "" = unknown
  std::string hub_id;   // "apache-2.0"; "other" where the Hub has none
  bool permissive = false;
  std::string duty;     // what else must be kept in mind, one sentence; may be empty
};

Licence find_licence(std::string_view id);  // SPDX expression or Hub id, any case; unknown ids give spdx ""

/// Of a model folder: README.md's front matter, then the LICENSE text's first lines.
Licence licence_of_model(const std::filesystem::path& folder);

}  // namespace alambic::checkpoints
