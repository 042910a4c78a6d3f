// SPDX-License-Identifier: Apache-2.0
#pragma once
// A published folder: made under a temporary name beside its target, sealed with manifest.json (the SHA-256 of every other
// file, and facts on how it was made), then renamed into place (commit_folder of core/files.h).
#include <filesystem>
#include <string>
#include <vector>

#include "core/json.h"

namespace alambic::checkpoints {

/// An empty folder <parent>/.tmp-<name>-<process> for the making of `target`, whose parent is created where it is absent.
/// Removed with the object, unless commit_folder has renamed it. Leftovers of the same target by processes that are gone are
/// removed too. Error(kUsage) when the target exists already.
class TemporaryFolder {
 public:
  explicit TemporaryFolder(const std::filesystem::path& target);
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

/// Writes <folder>/manifest.json: {"alambic": version, ...facts, "files": {name: {"sha256": ..., "bytes": ...}}}. Every
/// regular file below `folder` is listed; `known` holds (name, SHA-256) of files hashed while they were written, which are
/// not read again.
void write_manifest(const std::filesystem::path& folder, const Json& facts, const std::vector<std::pair<std::string, std::string>>& known = {});

/// Reads the manifest and every file it lists. Error(kData) names the first file that is missing or differs.
Json check_manifest(const std::filesystem::path& folder);

/// The version of this program, "0.1.0".
std::string alambic_version();

}  // namespace alambic::checkpoints
