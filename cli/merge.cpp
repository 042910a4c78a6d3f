// SPDX-License-Identifier: Apache-2.0
#include <ostream>

#include "checkpoints/merge_folder.h"
#include "cli/figures.h"
#include "cli/model_options.h"
#include "cli/verbs.h"
#include "core/error.h"

namespace alambic::cli {
namespace {

// The folder that merge_folder takes as its adapter: a PEFT folder, or what a finished run holds.
std::filesystem::path tuned_folder(const std::filesystem::path& given) {
  if (std::filesystem::exists(given / "metrics.jsonl") && !std::filesystem::exists(given / "report.json"))
    fail(ErrorKind::kData, printable(given.string()), ": the run is not finished", Remedy{"alambic train CONFIG --resume goes on with it"});
  if (std::filesystem::exists(given / "weights") && !std::filesystem::exists(given / "adapter")) return given / "weights";
  if (std::filesystem::exists(given / "model.safetensors") || std::filesystem::exists(given / "model.safetensors.index.json")) return given;
  return adapter_folder(given);
}

// --base, else the base that the run or the adapter names, where that is a folder here.
std::filesystem::path base_folder(const Arguments& arguments, const std::filesystem::path& given, const std::filesystem::path& tuned) {
  if (arguments.has("base")) return arguments.path("base");
  for (const std::filesystem::path& run : {given, given.parent_path()}) {
    const std::filesystem::path file = run / "config.json";
    if (!std::filesystem::exists(run / "report.json") || !std::filesystem::exists(file)) continue;
    const std::filesystem::path base = value_or<std::string>(read_json_file(file), "model", "", file.string());
    if (std::filesystem::is_directory(base)) return base;
  }
  const std::filesystem::path file = tuned / "adapter_config.json";
  if (std::filesystem::exists(file)) {
    const std::filesystem::path base = value_or<std::string>(read_json_file(file), "base_model_name_or_path", "", file.string());
    if (!base.empty() && std::filesystem::is_directory(base)) return base;
  }
  fail(ErrorKind::kUsage, "merge: which base ", printable(given.string()), " was trained on cannot be told from it", Remedy{"name the base's folder with --base"});
}

int run_merge(const Arguments& arguments, const Terminal& terminal) {
  apply_threads(arguments);
  const std::filesystem::path given = arguments.positional(0), tuned = tuned_folder(given);
  checkpoints::MergeConfig config;
  config.base = base_folder(arguments, given, tuned);
  config.adapter = tuned;
  config.output = arguments.positional(1);
  config.name = arguments.text("name");
  config.base_name = arguments.text("base-name");
  config.weights = arguments.text("weights");
  config.max_shard_megabytes = arguments.whole("max-shard-megabytes");
  if (arguments.has("max-kl")) config.max_kl = arguments.number("max-kl");
  if (arguments.has("max-difference")) config.max_difference = arguments.number("max-difference");
  check_model_folder(config.base);
  const checkpoints::MergeReport report = checkpoints::merge_folder(config);
  if (arguments.has("json")) {
    print_json(terminal, report.json());
    return 0;
  }
  std::ostream& out = terminal.out;
  out << printable(report.output.string()) << ": " << (report.already_done ? "this merge is there already, whole; nothing was written" : "written") << "\n";
  out << "  weights: " << report.weights << ", " << report.num_tensors << " tensors, " << report.num_changed << " changed by " << report.num_adapter_tensors
      << " adapter tensors; head " << (report.head_tied ? "tied" : "not tied") << "\n";
  if (report.base_format != "none") out << "  base: quantised (" << report.base_format << ") while it was trained on; merged onto those values, in f32\n";
  out << "  proof: largest logit difference " << short_figure(report.largest_difference) << " of " << short_figure(report.largest_logit) << ", KL "
      << short_figure(report.kl) << " nats a token over " << report.probe_tokens << " tokens (the base itself: " << short_figure(report.kl_of_base) << ")\n";
  for (const std::string& warning : report.warnings) out << "  note: " << warning << "\n";
  return 0;
}

}  // namespace

Verb merge_verb() {
  return {.name = "merge",
          .summary = "adapter + base -> Hugging Face model folder, proven equal",
          .description = "Folds an adapter (or the weights of a full fine-tune) into its base and writes a model folder that transformers loads, with tokenizer, licence texts, "
                         "a card and a SHA-256 manifest. The written folder is loaded again and compared with base + adapter; it is published only when they agree. "
                         "In memory are the adapter, two tensors at a time, and what one layer computes: not the model. "
                         "Licences that are not permissive, or unknown, are named.",
          .positionals = {{.name = "TUNED", .help = "a finished run, or a PEFT adapter folder", .kind = Kind::kFolder},
                          {.name = "OUTPUT", .help = "the model folder to make", .kind = Kind::kFolder}},
          .options = {{.name = "base", .kind = Kind::kFolder, .value = "FOLDER", .help = "the base model's folder; without it the one that the run or the adapter names", .letter = 'b'},
                      {.name = "name", .kind = Kind::kText, .value = "TEXT", .help = "the model's name in its card; without it the output folder's name"},
                      {.name = "base-name", .kind = Kind::kText, .value = "TEXT", .help = "the base's name in the card, for example org/model"},
                      {.name = "weights", .kind = Kind::kText, .value = "TYPE", .help = "type of the weights written; auto: as the base has them", .otherwise = "auto", .choices = {"auto", "f32", "bf16", "f16"}},
                      {.name = "max-shard-megabytes", .kind = Kind::kWhole, .value = "N", .help = "largest file of weights, in 10^6 bytes", .otherwise = "5000", .low = 1, .high = 1e9},
                      {.name = "max-kl", .kind = Kind::kNumber, .value = "NATS", .help = "largest KL divergence a token, of base + adapter against what was written, to publish; without it by type", .low = 0, .high = 100},
                      {.name = "max-difference", .kind = Kind::kNumber, .value = "SHARE", .help = "largest logit difference to publish, as a share of the largest logit; without it by type", .low = 0, .high = 1},
                      json_option(),
                      threads_option()},
          .examples = {{"alambic merge runs/quickstart/run runs/quickstart/merged", "what a run has learnt, as a model folder"},
                       {"alambic merge adapter merged --base base --weights bf16", "a PEFT adapter made elsewhere"}},
          .run = run_merge};
}

}  // namespace alambic::cli
