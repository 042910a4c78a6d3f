// SPDX-License-Identifier: Apache-2.0
#include <ostream>

#include "cli/figures.h"
#include "cli/verbs.h"
#include "train/finetune.h"
#include "train/stop_signals.h"

namespace alambic::cli {

int print_run_report(const train::TrainReport& report, const Arguments& arguments, const Terminal& terminal) {
  if (report.rank != 0) return 0;  // rank 0 says it
  if (arguments.has("json")) {
    print_json(terminal, report.json);
    return 0;
  }
  terminal.out << printable(report.result.string()) << ": step " << report.chosen_step << " of " << report.steps
               << (report.was_finished ? "; the run was finished already, nothing was done" : "") << "\n";
  if (const auto evaluation = report.json.find("evaluation"); evaluation != report.json.end())
    for (const Json& store : *evaluation) {
      const auto of = [&](const char* when, const char* what) { return store.contains(when) && store[when].is_object() ? figure(store[when].value(what, Json()), 4) : "-"; };
      terminal.out << "  " << printable(store.value("name", "")) << ": bits per byte " << of("before", "bits_per_byte") << " -> " << of("after", "bits_per_byte")
                   << ", loss " << of("before", "loss") << " -> " << of("after", "loss") << "\n";
    }
  return 0;
}

namespace {

int run_train(const Arguments& arguments, const Terminal& terminal) {
  std::vector<std::string> overrides = arguments.texts("set");
  if (arguments.has("threads")) overrides.push_back("threads=" + arguments.text("threads"));
  const auto config = read_config<train::TrainConfig>(arguments.positional(0), overrides);
  const train::StopSignals signals;
  return print_run_report(train::finetune(config, arguments.has("resume"), train::StopSignals::stop_requested), arguments, terminal);
}

}  // namespace

Verb train_verb() {
  return {.name = "train",
          .summary = "a run: an adapter or all weights, learnt from token stores",
          .description = "Trains what CONFIG says into its output folder: checkpoints, metrics.jsonl, TensorBoard files, and at the end the chosen adapter or weights. "
                         "SIGTERM, SIGINT or SIGUSR1 saves and ends with exit code 75; --resume then goes on, and the result is the one of a run that was never stopped. "
                         "With --json the run's report is printed at the end.",
          .positionals = {{.name = "CONFIG", .help = "a YAML file; its keys are below"}},
          .options = {{.name = "resume", .help = "go on from the newest valid checkpoint; where there is none, begin. A finished run is left alone", .letter = 'r'},
                      set_option(),
                      json_option(),
                      threads_option()},
          .examples = {{"alambic train run.yaml", "a new run"},
                       {"alambic train run.yaml --resume", "go on after a stop"},
                       {"alambic train run.yaml --set schedule.learning_rate=1e-4 --set output=runs/slower", "the same with another learning rate"}},
          .run = run_train,
          .config_help = config_help<train::TrainConfig>};
}

}  // namespace alambic::cli
