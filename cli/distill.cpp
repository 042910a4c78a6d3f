// SPDX-License-Identifier: Apache-2.0
#include "distill/distill.h"

#include <ostream>

#include "cli/figures.h"
#include "cli/verbs.h"
#include "core/error.h"
#include "distill/write_cache.h"
#include "train/stop_signals.h"

namespace alambic::cli {
namespace {

int write_teacher_cache(const Arguments& arguments, const std::vector<std::string>& overrides, const Terminal& terminal) {
  const auto config = read_config<distill::CacheConfig>(arguments.positional(0), overrides);
  const train::StopSignals signals;
  const distill::CacheReport report = distill::write_cache(config, train::StopSignals::stop_requested);
  if (arguments.has("json")) {
    print_json(terminal, report.json);
    return 0;
  }
  const double rows = static_cast<double>(report.totals.rows);
  terminal.out << printable(config.output.string()) << ": shard " << config.shard << (report.was_complete ? " was there already, whole" : " is written") << "\n  " << grouped(report.totals.documents) << " documents, "
               << grouped(report.totals.rows) << " signals of " << figure(rows > 0 ? static_cast<double>(report.totals.bytes) / rows : 0, 1) << " bytes, " << gigabytes(report.file_bytes) << " on disk\n";
  if (report.seconds > 0) terminal.out << "  " << figure(static_cast<double>(report.tokens) / report.seconds, 1) << " tokens/s\n";
  if (!report.complete) terminal.out << "  other shards are still missing\n";
  return 0;
}

int run_distill(const Arguments& arguments, const Terminal& terminal) {
  std::vector<std::string> overrides = arguments.texts("set");
  if (arguments.has("threads")) overrides.push_back("threads=" + arguments.text("threads"));
  if (arguments.has("cache") && arguments.has("generate")) fail(ErrorKind::kUsage, "distill: --cache and --generate are two things to do", Remedy{"give one of them"});
  if (arguments.has("cache")) {
    if (arguments.has("resume")) fail(ErrorKind::kUsage, "--resume: --cache goes on by itself where it was stopped", Remedy{"leave --resume out"});
    return write_teacher_cache(arguments, overrides, terminal);
  }
  const auto config = read_config<distill::DistillConfig>(arguments.positional(0), overrides);
  const train::StopSignals signals;
  if (arguments.has("generate")) {
    if (arguments.has("resume")) fail(ErrorKind::kUsage, "distill: --resume does not go with --generate: a corpus that was not finished is begun anew");
    const Json made = distill::write_teacher_text(config, train::StopSignals::stop_requested);
    if (arguments.has("json")) print_json(terminal, made);
    else terminal.out << printable(config.generate.output.string()) << ": " << made["counts"]["kept"] << " answers of " << made["counts"]["samples"] << " to " << made["counts"]["prompts"] << " prompts\n";
    return 0;
  }
  return print_run_report(distill::distill(config, arguments.has("resume"), train::StopSignals::stop_requested), arguments, terminal);
}

std::string help_of_configs() {
  return config_help<distill::DistillConfig>() + "\nKeys of CONFIG with --cache:\n" + config_help<distill::CacheConfig>();
}

}  // namespace

Verb distill_verb() {
  return {.name = "distill",
          .summary = "a run whose student learns from teachers besides the text",
          .description = "Trains as train does, by (1 - alpha) cross-entropy + alpha divergence from the teachers' distributions over each next token. A teacher that is the student's own "
                         "base takes no memory of its own. Files, checkpoints, signals and --resume are those of train; metrics.jsonl has both parts of the loss. docs/distillation.md has the formulas. "
                         "With --cache a teacher reads token stores and its signal is written beside them (docs/teacher_cache.md); students then learn from that, without the teacher.",
          .positionals = {{.name = "CONFIG", .help = "a YAML file; its keys are below: those of train, and the section distill"}},
          .options = {{.name = "cache", .help = "write a teacher cache instead; CONFIG then has other keys. Goes on where an earlier process was stopped"},
                      {.name = "generate", .help = "train nothing: write a corpus of the only teacher's answers, as CONFIG's section generate says, for prepare"},
                      {.name = "resume", .help = "go on from the newest valid checkpoint; where there is none, begin. A finished run is left alone", .letter = 'r'},
                      set_option(),
                      json_option(),
                      threads_option()},
          .examples = {{"alambic distill run.yaml", "a new run"},
                       {"alambic distill run.yaml --set distill.objective=reverse_kl --set output=runs/reverse", "the same with another distance"},
                       {"alambic distill --cache teacher.yaml --set shard=0/4", "a quarter of a teacher's signal, to be written by four processes"},
                       {"alambic distill run.yaml --generate --set generate.output=answers.jsonl", "the teacher's answers to the prompts of data.mixture"}},
          .run = run_distill,
          .config_help = help_of_configs};
}

}  // namespace alambic::cli
