// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/run_state.h"

#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <set>

#include "checkpoints/safetensors.h"
#include "core/error.h"
#include "core/files.h"
#include "core/log.h"

namespace alambic::checkpoints {
namespace {

constexpr std::int64_t kFormat = 1;
constexpr std::string_view kPrefix = "checkpoint-", kTemporary = ".tmp-", kManifest = "manifest.json", kTensors = "state.safetensors",
                           kProgress = "progress.json", kIdentity = "identity.json";

std::string folder_name(std::int64_t step) { return std::string(kPrefix) + std::to_string(step); }

/// The step in a folder's name; nullopt for other names.
std::optional<std::int64_t> step_in_name(const fs::path& path) {
  const std::string name = path.filename().string();
  if (!name.starts_with(kPrefix)) return std::nullopt;
  std::int64_t step = 0;
  const char* const end = name.data() + name.size();
  const auto parsed = std::from_chars(name.data() + kPrefix.size(), end, step);
  if (parsed.ec != std::errc() || parsed.ptr != end || name != folder_name(step)) return std::nullopt;
  return step;
}

std::map<std::int64_t, fs::path> checkpoint_folders(const fs::path& run) {
  std::map<std::int64_t, fs::path> found;
  for (const fs::directory_entry& entry : fs::directory_iterator(run))
    if (const auto step = step_in_name(entry.path()); step && entry.is_directory()) found[*step] = entry.path();
  return found;
}

/// The manifest's bytes: canonical JSON whose last key is the hash of the text without it, so that no bit of it can change unseen.
std::string sealed(Json manifest) {
  manifest.erase("sha256");
  const std::string hash = sha256_of(to_line(manifest));
  manifest["sha256"] = hash;
  return to_line(manifest) + "\n";
}

Json read_manifest(const fs::path& checkpoint) {
  const fs::path path = checkpoint / kManifest;
  const std::string text = read_file(path, 64 << 20);
  const Json manifest = parse_json(text, path.string());
  if (!manifest.is_object() || sealed(manifest) != text) fail(ErrorKind::kData, path.string(), ": its own hash does not hold");
  const auto format = require<std::int64_t>(manifest, "format", path.string());
  if (format != kFormat) fail(ErrorKind::kData, path.string(), ": format ", format, "; this program reads format ", kFormat);
  return manifest;
}

void remove_quietly(const fs::path& path) {
  std::error_code ignored;
  fs::remove_all(path, ignored);
}

}  // namespace

fs::path save_checkpoint(const fs::path& run, const RunState& state, const std::function<void(const fs::path&)>& more) {
  const fs::path target = run / folder_name(state.step);
  if (fs::exists(fs::symlink_status(target))) fail(ErrorKind::kUsage, target.string(), ": exists already and is never overwritten");
  const fs::path temporary = run / (std::string(kTemporary) + std::to_string(state.step) + "-" + std::to_string(::getpid()));
  try {
    fs::remove_all(temporary);
    fs::create_directory(temporary);
    std::map<std::string, std::string> hashes;  // of files whose hash was taken while they were written
    std::vector<TensorToWrite> tensors = state.made;
    for (const auto& [name, tensor] : state.tensors) tensors.push_back({name, tensor.scalar_type(), tensor.sizes().vec()});
    hashes[std::string(kTensors)] = write_safetensors(temporary / kTensors, tensors, [&](std::size_t i) { return i < state.made.size() ? state.make(i) : state.tensors[i - state.made.size()].second; });
    hashes[std::string(kProgress)] = write_file(temporary / kProgress, to_line(state.progress) + "\n");
    hashes[std::string(kIdentity)] = write_file(temporary / kIdentity, to_line(state.identity) + "\n");
    if (more) more(temporary);

    std::map<std::string, Json> files;  // sorted: the manifest of the same state has the same bytes
    for (const fs::directory_entry& entry : fs::recursive_directory_iterator(temporary)) {
      if (entry.is_directory()) {
        fsync_folder(entry.path());
        continue;
      }
      const std::string name = entry.path().lexically_relative(temporary).generic_string();
      if (!hashes.contains(name)) {
        fsync_file(entry.path());
        hashes[name] = sha256_of_file(entry.path());
      }
      files[name] = Json{{"bytes", entry.file_size()}, {"sha256", hashes[name]}};
    }
    Json manifest = {{"format", kFormat}, {"step", state.step}, {"files", Json::object()}};
    for (const auto& [name, facts] : files) manifest["files"][name] = facts;
    write_file(temporary / kManifest, sealed(manifest));
    commit_folder(temporary, target);
  } catch (const fs::filesystem_error& error) {
    remove_quietly(temporary);
    fail(ErrorKind::kResource, temporary.string(), ": ", error.code().message(), Remedy{"free space on the disk; the earlier checkpoints are as they were"});
  } catch (...) {
    remove_quietly(temporary);
    throw;
  }
  if (const std::string damage = damage_of(target); !damage.empty())
    fail(ErrorKind::kResource, "read back after writing: ", damage, Remedy{"the disk does not keep what is written to it; use another one"});
  return target;
}

std::string damage_of(const fs::path& checkpoint) {
  try {
    const Json manifest = read_manifest(checkpoint);
    const std::string source = (checkpoint / kManifest).string();
    std::set<std::string> needed = {std::string(kTensors), std::string(kProgress), std::string(kIdentity)};
    const Json files = require<Json>(manifest, "files", source);
    for (const auto& [name, facts] : files.items()) {
      const fs::path file = checkpoint / name;
      if (fs::path(name).is_absolute() || name.find("..") != std::string::npos) return source + ": \"" + name + "\" leaves the checkpoint";
      if (fs::symlink_status(file).type() != fs::file_type::regular) return file.string() + ": missing";
      const auto bytes = require<std::int64_t>(facts, "bytes", source);
      if (static_cast<std::int64_t>(fs::file_size(file)) != bytes)
        return file.string() + ": " + std::to_string(fs::file_size(file)) + " bytes, " + std::to_string(bytes) + " were written";
      const std::string hash = sha256_of_file(file), wanted = require<std::string>(facts, "sha256", source);
      if (hash != wanted) return file.string() + ": SHA-256 is " + hash + ", " + wanted + " was written";
      needed.erase(name);
    }
    if (!needed.empty()) return source + ": does not list " + *needed.begin();
    const auto step = require<std::int64_t>(manifest, "step", source);
    if (step_in_name(checkpoint) != step) return source + ": is of step " + std::to_string(step);
  } catch (const Error& error) {
    return error.what();
  } catch (const fs::filesystem_error& error) {
    return error.path1().string() + ": " + error.code().message();
  }
  return "";
}

std::optional<fs::path> newest_checkpoint(const fs::path& run) {
  for (const fs::directory_entry& entry : fs::directory_iterator(run))
    if (entry.path().filename().string().starts_with(kTemporary)) remove_quietly(entry.path());
  const std::map<std::int64_t, fs::path> found = checkpoint_folders(run);
  for (auto item = found.rbegin(); item != found.rend(); ++item) {
    const std::string damage = damage_of(item->second);
    if (damage.empty()) return item->second;
    log_warning("passing over ", item->second.filename().string(), ": ", damage);
    fs::path aside = item->second;
    aside += ".damaged";
    remove_quietly(aside);
    fs::rename(item->second, aside);
  }
  return std::nullopt;
}

RunState load_checkpoint(const fs::path& checkpoint) {
  if (const std::string damage = damage_of(checkpoint); !damage.empty())
    fail(ErrorKind::kData, damage, Remedy{"resume from an earlier checkpoint: remove this folder and resume again"});
  RunState state;
  state.step = require<std::int64_t>(read_manifest(checkpoint), "step", (checkpoint / kManifest).string());
  state.progress = read_json_file(checkpoint / kProgress);
  state.identity = read_json_file(checkpoint / kIdentity);
  const SafetensorsFile& tensors = state.file.emplace(checkpoint / kTensors);
  for (const auto& [name, entry] : tensors.entries()) state.tensors.emplace_back(name, tensors.tensor(name));
  return state;
}

void apply_retention(const fs::path& run, std::int64_t keep, const std::vector<std::int64_t>& also_keep) {
  const std::map<std::int64_t, fs::path> found = checkpoint_folders(run);
  std::int64_t newer = 0;
  for (auto item = found.rbegin(); item != found.rend(); ++item) {
    if (newer++ < keep || std::find(also_keep.begin(), also_keep.end(), item->first) != also_keep.end()) continue;
    // Renamed first: a removal that is cut short must not leave something that looks like a checkpoint.
    const fs::path doomed = run / (std::string(kTemporary) + "removing-" + std::to_string(item->first));
    remove_quietly(doomed);
    std::error_code failed;
    fs::rename(item->second, doomed, failed);
    if (failed) log_warning(item->second.string(), ": cannot be removed: ", failed.message());
    else remove_quietly(doomed);
  }
}

namespace {

void collect_differences(const std::string& path, const Json& then, const Json& now, std::vector<std::string>& lines) {
  const auto both = [&](auto is) { return is(then) && is(now); };
  const auto under = [&](const std::string& key) { return path.empty() ? key : path + "." + key; };
  const auto line = [&](const std::string& where, const std::string& old_value, const std::string& new_value) {
    lines.push_back(where + ": " + old_value + " then, " + new_value + " now");
  };
  if (both([](const Json& value) { return value.is_object(); })) {
    for (const auto& [key, value] : then.items())
      if (now.contains(key)) collect_differences(under(key), value, now[key], lines);
      else line(under(key), to_line(value), "absent");
    for (const auto& [key, value] : now.items())
      if (!then.contains(key)) line(under(key), "absent", to_line(value));
  } else if (both([](const Json& value) { return value.is_array(); }) && then.size() == now.size()) {
    for (std::size_t i = 0; i < then.size(); ++i) collect_differences(path + "[" + std::to_string(i) + "]", then[i], now[i], lines);
  } else if (then != now) {
    line(path, to_line(then), to_line(now));
  }
}

}  // namespace

std::vector<std::string> differences(const Json& then, const Json& now) {
  std::vector<std::string> lines;
  collect_differences("", then, now, lines);
  return lines;
}

}  // namespace alambic::checkpoints
