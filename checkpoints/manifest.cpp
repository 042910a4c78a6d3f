// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/manifest.h"

#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <map>

#include "core/files.h"

namespace alambic::checkpoints {
namespace {
constexpr const char* kName = "manifest.json";
}

TemporaryFolder::TemporaryFolder(const fs::path& target) {
  if (fs::exists(fs::symlink_status(target))) fail(ErrorKind::kUsage, target.string(), ": exists already and is never overwritten", Remedy{"choose another name, or remove it"});
  const fs::path parent = target.has_parent_path() ? target.parent_path() : fs::path(".");
  std::error_code problem;
  fs::create_directories(parent, problem);
  if (problem) fail(ErrorKind::kResource, parent.string(), ": cannot be created: ", problem.message(), Remedy{"choose an output folder that can be written"});
  const std::string prefix = ".tmp-" + target.filename().string() + "-";
  for (const auto& entry : fs::directory_iterator(parent)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(prefix)) continue;
    int process = 0;
    const auto parsed = std::from_chars(name.data() + prefix.size(), name.data() + name.size(), process);
    const bool gone = parsed.ec == std::errc() && parsed.ptr == name.data() + name.size() && process > 0 &&
                      (process == ::getpid() || (::kill(process, 0) != 0 && errno == ESRCH));
    if (gone) fs::remove_all(entry.path(), problem);
  }
  path_ = parent / (prefix + std::to_string(::getpid()));
  if (!fs::create_directory(path_, problem) || problem)
    fail(ErrorKind::kResource, path_.string(), ": cannot be created: ", problem.message(), Remedy{"choose an output folder that can be written"});
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
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
  const Remedy remedy{"the folder was changed or damaged since it was written: remove it and make it again"};
  const Json files = require<Json>(manifest, "files", path.string());
  if (!files.is_object() || files.empty()) fail(ErrorKind::kData, path.string(), ": \"files\" must name files with their hashes");
  for (const auto& [name, value] : files.items()) {
    const fs::path relative(name);
    if (relative.is_absolute() || relative.lexically_normal() != relative || *relative.begin() == "..")
      fail(ErrorKind::kData, path.string(), ": \"", name, "\" is no name of a file in this folder");
    const std::string wanted = require<std::string>(value, "sha256", path.string() + ": " + name);
    if (!fs::is_regular_file(folder / relative)) fail(ErrorKind::kData, path.string(), ": ", name, " is missing", remedy);
    const std::string actual = sha256_of_file(folder / relative);
    if (actual != wanted) fail(ErrorKind::kData, path.string(), ": ", name, " has the SHA-256 ", actual, ", expected ", wanted, remedy);
  }
  return manifest;
}

}  // namespace alambic::checkpoints
