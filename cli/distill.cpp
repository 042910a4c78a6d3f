// SPDX-License-Identifier: Apache-2.0
#include "distill/distill.h"

#include "cli/verbs.h"
#include "train/stop_signals.h"

namespace alambic::cli {
namespace {

int run_distill(const Arguments& arguments, const Terminal& terminal) {
  std::vector<std::string> overrides = arguments.texts("set");
  if (arguments.has("threads")) overrides.push_back("threads=" + arguments.text("threads"));
  const auto config = read_config<distill::DistillConfig>(arguments.positional(0), overrides);
  const train::StopSignals signals;
  return print_run_report(distill::distill(config, arguments.has("resume"), train::StopSignals::stop_requested), arguments, terminal);
}

}  // namespace

Verb distill_verb() {
  return {.name = "distill",
          .summary = "a run whose student learns from teachers besides the text",
          .description = "Trains as train does, by (1 - alpha) cross-entropy + alpha divergence from the teachers' distributions over each next token. A teacher that is the student's own "
                         "base takes no memory of its own. Files, checkpoints, signals and --resume are those of train; metrics.jsonl has both parts of the loss. docs/distillation.md has the formulas.",
          .positionals = {{.name = "CONFIG", .help = "a YAML file; its keys are below: those of train, and the section distill"}},
          .options = {{.name = "resume", .help = "go on from the newest valid checkpoint; where there is none, begin. A finished run is left alone", .letter = 'r'},
                      set_option(),
                      json_option(),
                      threads_option()},
          .examples = {{"alambic distill run.yaml", "a new run"},
                       {"alambic distill run.yaml --set distill.objective=reverse_kl --set output=runs/reverse", "the same with another distance"}},
          .run = run_distill,
          .config_help = config_help<distill::DistillConfig>};
}

}  // namespace alambic::cli
