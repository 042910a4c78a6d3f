// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/manifest.h"

#include <map>

#include "core/files.h"

namespace alambic::checkpoints {
namespace {
constexpr const char* kName = "manifest.json";
}

std::string alambic_version() { return ALAMBIC_VERSION; }

void write_manifest(const fs::path& folder, const Json& facts, const std::vector<std::pair<std::string, std::string>>& known) {
  const std::map<std::string, std::string> hashes(known.begin(), known.end());
  std::map<std::string, Json> files;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    if (!entry.is_regular_file()) continue;
    const std::string name = entry.path().lexically_relative(folder).generic_string();
    if (name == kName) continue;
    const auto found = hashes.find(name);
    files[name] = {{"sha256", found != hashes.end() ? found->second : sha256_of_file(entry.path())}, {"bytes", entry.file_size()}};
  }
  Json manifest{{"alambic", alambic_version()}};
  for (const auto& [key, value] : facts.items()) manifest[key] = value;
  manifest["files"] = files;
  write_file(folder / kName, manifest.dump(2) + "\n");
}

Json check_manifest(const fs::path& folder) {
  const fs::path path = folder / kName;
  const Json manifest = read_json_file(path);
  const Json files = require<Json>(manifest, "files", path.string());
  if (!files.is_object() || files.empty()) fail(ErrorKind::kData, path.string(), ": \"files\" must name files with their hashes");
  for (const auto& [name, value] : files.items()) {
    const fs::path relative(name);
    if (relative.is_absolute() || relative.lexically_normal() != relative || *relative.begin() == "..")
      fail(ErrorKind::kData, path.string(), ": \"", name, "\" is no name of a file in this folder");
    const std::string wanted = require<std::string>(value, "sha256", path.string() + ": " + name);
    if (!fs::is_regular_file(folder / relative)) fail(ErrorKind::kData, path.string(), ": ", name, " is missing");
    const std::string actual = sha256_of_file(folder / relative);
    if (actual != wanted) fail(ErrorKind::kData, path.string(), ": ", name, " has the SHA-256 ", actual, ", expected ", wanted);
  }
  return manifest;
}

}  // namespace alambic::checkpoints
