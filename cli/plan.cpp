// SPDX-License-Identifier: Apache-2.0
#include "train/plan.h"

#include <ostream>

#include "cli/figures.h"
#include "cli/verbs.h"
#include "core/error.h"
#include "distill/distill.h"
#include "distill/write_cache.h"

namespace alambic::cli {
namespace {

// Texts, counts, rates, times and sizes; the key says which.
std::string readable(const std::string& group, const std::string& key, const Json& value) {
  if (group == "memory" || group == "disk" || key.ends_with("memory") || key.ends_with("bytes") || key.starts_with("bytes")) return gigabytes(value);
  if (value.is_string()) return printable(value.get<std::string>());
  if (!value.is_number()) return to_line(value);
  if (key == "seconds") return duration(value.get<double>());
  return value.is_number_float() && value.get<double>() < 1000 ? figure(value, 1) : grouped(value);
}

int run_plan(const Arguments& arguments, const Terminal& terminal) {
  std::vector<std::string> overrides = arguments.texts("set");
  if (arguments.has("threads")) overrides.push_back("threads=" + arguments.text("threads"));
  const bool probe = !arguments.has("no-probe");
  const auto num_ranks = static_cast<int>(arguments.whole("ranks"));
  const auto has = [&](const char* key) { return has_top_key(arguments.positional(0), overrides, key); };
  if (num_ranks > 1 && has("stores")) fail(ErrorKind::kUsage, "--ranks: a teacher cache is written by single processes, each its shard", Remedy{"plan it without --ranks"});
  const Json plan = has("distill")  ? distill::plan(read_config<distill::DistillConfig>(arguments.positional(0), overrides), probe, num_ranks)
                    : has("stores") ? distill::plan_cache(read_config<distill::CacheConfig>(arguments.positional(0), overrides), probe)
                                    : train::plan(read_config<train::TrainConfig>(arguments.positional(0), overrides), probe, num_ranks);
  if (arguments.has("json")) {
    print_json(terminal, plan);
    return 0;
  }
  std::ostream& out = terminal.out;
  for (const auto& [key, value] : plan.items()) {
    if (key == "data") {
      out << "data\n";
      for (const Json& store : value) {
        out << "  " << printable(store.value("use", "")) << ": " << printable(store.value("store", "")) << ", " << grouped(store.value("trained_tokens", Json())) << " trained tokens in "
            << grouped(store.value("documents", Json())) << " documents\n";
        for (const Json& source : store.value("sources", Json::array()))
          out << "    " << printable(source.value("name", "")) << ": licence " << (source.value("licence", "").empty() ? "unknown" : printable(source.value("licence", ""))) << "\n";
      }
    } else if (key == "teachers") {
      out << "teachers\n";
      for (const Json& teacher : value) out << "  " << printable(teacher.value("folder", "")) << ": " << grouped(teacher.value("parameters", Json())) << " parameters, licence "
                                            << (teacher.value("licence", "").empty() ? "unknown" : printable(teacher.value("licence", ""))) << "\n";
    } else if (key == "licence") {
      out << "licence: " << value.value("verdict", "") << "\n";
      for (const Json& reason : value.value("reasons", Json::array())) out << "  " << printable(reason.get<std::string>()) << "\n";
    } else if (key == "warnings") {
      for (const Json& warning : value) out << "warning: " << printable(warning.get<std::string>()) << "\n";
    } else if (value.is_object()) {
      out << key << "\n";
      for (const auto& [name, each] : value.items()) out << "  " << name << ": " << readable(key, name, each) << "\n";
    } else {
      out << key << ": " << (value.is_null() ? "unknown" : readable("", key, value)) << "\n";
    }
  }
  return 0;
}

}  // namespace

Verb plan_verb() {
  return {.name = "plan",
          .summary = "everything train or distill would check, and what a run would cost",
          .description = "Checks config, model, stores and licences as train does (or distill, where CONFIG has its section, or distill --cache, where it has stores: alambic distill --help), and tells steps, memory, time and disk, without training. Nothing is written.",
          .positionals = {{.name = "CONFIG", .help = "a YAML file, as for train, distill or distill --cache"}},
          .options = {{.name = "ranks", .kind = Kind::kWhole, .value = "N", .help = "what a run of N ranks asks of one of them, and what they send", .otherwise = "1", .low = 1, .high = 1 << 20, .letter = 'n'},
                      {.name = "no-probe", .help = "do not measure one micro-batch; time then stays unknown"}, set_option(), json_option(), threads_option()},
          .examples = {{"alambic plan run.yaml", "before a long run"}, {"alambic plan run.yaml -n 8 --set ranks.shard=true", "one of eight ranks that share the base"}},
          .run = run_plan,
          .config_help = config_help<train::TrainConfig>};
}

}  // namespace alambic::cli
