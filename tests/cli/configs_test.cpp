// SPDX-License-Identifier: Apache-2.0
// Every file in configs/ is read by the strict parser of the verb that it is for, and --help explains each key it uses.
#include <gtest/gtest.h>

#include <set>
#include <sstream>

#include "cli/run.h"
#include "core/error.h"
#include "core/files.h"
#include "data/prepare.h"
#include "distill/distill.h"
#include "distill/prune.h"
#include "distill/write_cache.h"
#include "train/train_config.h"

namespace alambic::cli {
namespace {

namespace fs = std::filesystem;

std::vector<fs::path> configs() {
  std::vector<fs::path> found;
  for (const fs::directory_entry& entry : fs::directory_iterator(fs::path(ALAMBIC_SOURCE_DIR) / "configs"))
    if (entry.path().extension() == ".yaml") found.push_back(entry.path());
  return found;
}

std::pair<int, std::string> call(const std::vector<std::string>& words) {
  std::istringstream in;
  std::ostringstream out, err;
  const int code = run(words, {in, out, err});
  return {code, code == 0 ? out.str() : err.str()};
}

bool is_for_prune(const fs::path& config) { return config.filename().string().starts_with("prune-"); }
bool is_for_cache(const fs::path& config) { return config.filename().string().starts_with("cache-"); }
bool is_for_train(const fs::path& config) { return !is_for_prune(config) && !is_for_cache(config) && read_file(config).find("\nmodel:") != std::string::npos; }

bool is_for_distill(const fs::path& config) { return has_top_key(config, {}, "distill"); }

// Every key of a resolved config as --help writes it: "data.mixture.N.store".
std::set<std::string> leaves(const Json& value, const std::string& path) {
  std::set<std::string> all;
  if (value.is_object() && !value.empty()) {
    for (const auto& [key, each] : value.items()) all.merge(leaves(each, path.empty() ? key : path + "." + key));
  } else if (value.is_array() && !value.empty() && value.front().is_object()) {
    for (const Json& each : value) all.merge(leaves(each, path + ".N"));
  } else {
    all.insert(path);
  }
  return all;
}

TEST(Configs, AreReadStrictlyAndExplainedByHelp) {
  const std::string train_help = call({"train", "--help"}).second, distill_help = call({"distill", "--help"}).second, prepare_help = call({"prepare", "--help"}).second;
  const std::string prune_help = call({"prune", "--help"}).second;
  std::size_t num_train = 0, num_prepare = 0, num_prune = 0, num_cache = 0;
  for (const fs::path& path : configs()) {
    SCOPED_TRACE(path.string());
    Json resolved;
    if (is_for_train(path)) {
      ++num_train;
      const auto read = [&]<class Config>(Config config) {
        check(config);
        resolved = resolved_config(config);
      };
      if (is_for_distill(path)) read(read_config<distill::DistillConfig>(path));
      else read(read_config<train::TrainConfig>(path));
    } else if (is_for_prune(path)) {
      ++num_prune;
      const auto config = read_config<distill::PruneConfig>(path);
      distill::check(config);
      resolved = resolved_config(config);
    } else if (is_for_cache(path)) {
      ++num_cache;
      resolved = resolved_config(read_config<distill::CacheConfig>(path));
    } else {
      ++num_prepare;
      resolved = resolved_config(read_config<data::PrepareConfig>(path));
    }
    const std::string& help = is_for_distill(path) || is_for_cache(path) ? distill_help : is_for_train(path) ? train_help : is_for_prune(path) ? prune_help : prepare_help;
    const std::set<std::string> keys = leaves(resolved, "");
    EXPECT_GT(keys.size(), 5u);
    for (const std::string& key : keys)  // a list that is empty has its own line only
      EXPECT_TRUE(help.find("\n  " + key + "  (") != std::string::npos || help.find("\n" + key + ": list") != std::string::npos) << key << " is not explained by --help";
  }
  EXPECT_GT(num_train, 0u);
  EXPECT_GT(num_prepare, 0u);
  EXPECT_GT(num_prune, 0u);
  EXPECT_GT(num_cache, 0u);
}

TEST(Configs, DryRunsFailForTheMissingInputsAlone) {
  for (const fs::path& path : configs()) {
    SCOPED_TRACE(path.string());
    // Nothing that a config names lies below this test's folder, so the first input that is missed is the error: all before
    // it (keys, ranges, contradictions between them) was found right.
    const bool train = is_for_train(path);
    const auto [code, said] = train ? call({"plan", path.string(), "--no-probe", "--set", "model=no-such-model"})
                              : is_for_cache(path) ? call({"distill", "--cache", path.string(), "--set", "model=no-such-model", "--set", "output=no-such-store"})
                              : is_for_prune(path)
                                  ? call({"prune", path.string(), "--set", "model=no-such-model", "--set", "output=no-such-student"})
                                  : call({"prepare", path.string(), "--set", "tokenizer=no-such-model", "--set", "output=no-such-store"});
    EXPECT_EQ(code, 3) << said;
    EXPECT_NE(said.find("no-such-model"), std::string::npos) << said;
    EXPECT_FALSE(fs::exists("no-such-store") || fs::exists("no-such-student"));
  }
}

}  // namespace
}  // namespace alambic::cli
