// SPDX-License-Identifier: Apache-2.0
#pragma once
// manifest.json of a published folder: the SHA-256 of every other file in it, and facts on how it was made.
#include <filesystem>
#include <string>
#include <vector>

#include "core/json.h"

namespace alambic::checkpoints {

/// Writes <folder>/manifest.json: {"alambic": version, ...facts, "files": {name: {"sha256": ..., "bytes": ...}}}. Every
/// regular file below `folder` is listed; `known` holds (name, SHA-256) of files hashed while they were written, which are
/// not read again.
void write_manifest(const std::filesystem::path& folder, const Json& facts, const std::vector<std::pair<std::string, std::string>>& known = {});

/// Reads the manifest and every file it lists. Error(kData) names the first file that is missing or differs.
Json check_manifest(const std::filesystem::path& folder);

/// The version of this program, "0.1.0".
std::string alambic_version();

}  // namespace alambic::checkpoints
