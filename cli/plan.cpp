// SPDX-License-Identifier: Apache-2.0
#include "train/plan.h"

#include <iomanip>
#include <ostream>
#include <sstream>

#include "cli/verbs.h"

namespace alambic::cli {
namespace {

std::string gigabytes(const Json& bytes) {
  if (!bytes.is_number()) return "unknown";
  std::ostringstream text;
  text << std::fixed << std::setprecision(2) << bytes.get<double>() / 1e9 << " GB";
  return text.str();
}

// Numbers and texts of one group, a line each; sizes as gigabytes where `sizes` says so.
void print_group(std::ostream& out, const std::string& name, const Json& group, bool sizes) {
  out << name << "\n";
  for (const auto& [key, value] : group.items())
    out << "  " << key << ": " << (sizes ? gigabytes(value) : value.is_string() ? printable(value.get<std::string>()) : to_line(value)) << "\n";
}

int run_plan(const Arguments& arguments, const Terminal& terminal) {
  std::vector<std::string> overrides = arguments.texts("set");
  if (arguments.has("threads")) overrides.push_back("threads=" + arguments.text("threads"));
  const auto config = read_config<train::TrainConfig>(arguments.positional(0), overrides);
  const Json plan = train::plan(config, !arguments.has("no-probe"));
  if (arguments.has("json")) {
    print_json(terminal, plan);
    return 0;
  }
  std::ostream& out = terminal.out;
  for (const auto& [key, value] : plan.items()) {
    if (key == "data") {
      out << "data\n";
      for (const Json& store : value) {
        out << "  " << printable(store.value("use", "")) << ": " << printable(store.value("store", "")) << ", " << to_line(store.value("trained_tokens", Json())) << " trained tokens in "
            << to_line(store.value("documents", Json())) << " documents\n";
        for (const Json& source : store.value("sources", Json::array()))
          out << "    " << printable(source.value("name", "")) << ": licence " << (source.value("licence", "").empty() ? "unknown" : printable(source.value("licence", ""))) << "\n";
      }
    } else if (key == "licence") {
      out << "licence: " << value.value("verdict", "") << "\n";
      for (const Json& reason : value.value("reasons", Json::array())) out << "  " << printable(reason.get<std::string>()) << "\n";
    } else if (key == "warnings") {
      for (const Json& warning : value) out << "warning: " << printable(warning.get<std::string>()) << "\n";
    } else if (value.is_object()) {
      print_group(out, key, value, key == "memory" || key == "disk");
    } else {
      out << key << ": " << to_line(value) << "\n";
    }
  }
  return 0;
}

}  // namespace

Verb plan_verb() {
  return {.name = "plan",
          .summary = "everything train would check, and what a run would cost",
          .description = "Checks config, model, stores and licences as train does, and tells steps, memory, time and disk, without training. Nothing is written.",
          .positionals = {{.name = "CONFIG", .help = "a YAML file, as for train"}},
          .options = {{.name = "no-probe", .help = "do not measure one micro-batch; time then stays unknown"}, set_option(), json_option(), threads_option()},
          .examples = {{"alambic plan run.yaml", "before a long run"}},
          .run = run_plan,
          .config_help = config_help<train::TrainConfig>};
}

}  // namespace alambic::cli
