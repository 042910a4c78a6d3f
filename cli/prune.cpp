// SPDX-License-Identifier: Apache-2.0
#include "distill/prune.h"

#include <ostream>

#include "cli/figures.h"
#include "cli/model_options.h"
#include "cli/verbs.h"

namespace alambic::cli {
namespace {

int run_prune(const Arguments& arguments, const Terminal& terminal) {
  std::vector<std::string> overrides = arguments.texts("set");
  if (arguments.has("threads")) overrides.push_back("threads=" + arguments.text("threads"));
  const auto config = read_config<distill::PruneConfig>(arguments.positional(0), overrides);
  distill::check(config);
  check_model_folder(config.model);
  const distill::PruneReport report = distill::prune(config);
  if (arguments.has("json")) {
    print_json(terminal, report.json());
    return 0;
  }
  std::ostream& out = terminal.out;
  out << printable(report.output.string()) << ": " << (report.already_done ? "this student is there already, whole; nothing was written" : "written") << "\n";
  out << "  parameters: " << grouped(report.parameters_before) << " -> " << grouped(report.parameters) << " ("
      << figure(100.0 * static_cast<double>(report.parameters) / static_cast<double>(report.parameters_before), 1) << " %), " << gigabytes(report.bytes_before) << " -> " << gigabytes(report.bytes) << "\n";
  const Json before = report.shape_before.json(), after = report.shape.json();
  for (const auto& [key, size] : after.items())
    if (size != before[key]) out << "  " << key << ": " << to_line(before[key]) << " -> " << to_line(size) << "\n";
  if (report.shape.layers < report.shape_before.layers && !report.layers.empty()) {
    out << "  layers kept:";
    for (const std::int64_t layer : report.layers) out << " " << layer;
    out << "\n";
  }
  for (const Json& store : report.evaluation) {
    const auto bits = [&](const char* when) { return store[when].is_object() ? figure(store[when].value("bits_per_byte", Json()), 4) : "-"; };
    out << "  " << printable(store.value("name", "")) << ": bits per byte " << bits("before") << " -> " << bits("after") << "\n";
  }
  for (const std::string& warning : report.warnings) out << "  note: " << warning << "\n";
  return 0;
}

}  // namespace

Verb prune_verb() {
  return {.name = "prune",
          .summary = "model folder -> a smaller student: fewer channels, neurons, heads, layers, tokens",
          .description = "Scores the parts of a model on sample text and writes a model folder of the same family with those that matter most, of given sizes or of a share of the parameters; "
                         "with fewer tokens where vocabulary.stores say which are used; or with fresh weights. The student then wants training: it recovers by distillation from the model. "
                         "The folder appears when it is complete and was read again; a student that is there already is left as it is.",
          .positionals = {{.name = "CONFIG", .help = "a YAML file; its keys are below"}},
          .options = {set_option(), json_option(), threads_option()},
          .examples = {{"alambic prune configs/prune-smollm2.yaml", "six tenths of SmolLM2-135M"},
                       {"alambic prune configs/prune-smollm2.yaml --set shrink=[depth] --set output=runs/prune/depth", "the same share by dropping layers"}},
          .run = run_prune,
          .config_help = config_help<distill::PruneConfig>};
}

}  // namespace alambic::cli
