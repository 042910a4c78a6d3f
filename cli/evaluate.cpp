// SPDX-License-Identifier: Apache-2.0
#include "train/evaluate.h"

#include <ATen/core/grad_mode.h>

#include <ostream>

#include "cli/figures.h"
#include "cli/model_options.h"
#include "cli/verbs.h"
#include "core/error.h"
#include "data/tokenizer.h"
#include "train/train_config.h"

namespace alambic::cli {
namespace {

// What is measured, from flags or from a run's config.
struct Task {
  std::filesystem::path model, adapter = {};
  std::string compute;
  std::vector<std::pair<std::string, std::filesystem::path>> stores = {};  // name, folder
  std::int64_t row_length = 0, rows_per_batch = 0;
  std::uint64_t max_tokens = 0;
};

Task task_of_run(const Arguments& arguments) {
  for (const char* option : {"model", "adapter", "store"}) arguments.refuse(option, "and CONFIG exclude each other");
  const auto config = read_config<train::TrainConfig>(arguments.positional(0), arguments.texts("set"));
  Task task{.model = config.model,
            .compute = arguments.has("compute") ? arguments.text("compute") : config.compute_type,
            .row_length = config.data.row_length,
            .rows_per_batch = config.data.rows_per_batch,
            .max_tokens = static_cast<std::uint64_t>(config.evaluation.max_tokens)};
  const std::filesystem::path result = config.output / train::result_name(config);
  if (!std::filesystem::exists(config.output / "report.json") || !std::filesystem::exists(result))
    fail(ErrorKind::kData, printable(config.output.string()), ": the run has no result yet", Remedy{"train it first; the base alone is evaluated with --model and --store"});
  if (train::result_name(config) == "adapter") task.adapter = result;
  else task.model = result;
  for (const train::EvaluationItem& item : config.evaluation.stores) task.stores.emplace_back(item.name, item.store);
  if (task.stores.empty()) fail(ErrorKind::kUsage, printable(arguments.positional(0)), ": evaluation.stores is empty, so there is nothing to evaluate on");
  return task;
}

Task task_of_flags(const Arguments& arguments) {
  arguments.refuse("set", "needs a CONFIG");
  if (!arguments.has("model")) fail(ErrorKind::kUsage, "evaluate: neither CONFIG nor --model was given", Remedy{usage_of(find_verb("evaluate"))});
  if (!arguments.has("store")) fail(ErrorKind::kUsage, "evaluate: --store is missing: the token stores to evaluate on", Remedy{usage_of(find_verb("evaluate"))});
  Task task{.model = arguments.path("model"), .adapter = arguments.path("adapter"), .compute = arguments.text("compute"), .row_length = 1024, .rows_per_batch = 1};
  for (const std::string& store : arguments.texts("store")) task.stores.emplace_back(store, store);
  return task;
}

void print_line(std::ostream& out, const std::string& name, const Json& figures) {
  out << name << "\t" << to_line(figures.at("tokens")) << "\t" << figure(figures.at("loss"), 4) << "\t" << figure(figures.at("perplexity"), 3) << "\t"
      << figure(figures.at("bits_per_byte"), 4) << "\n";
}

int run_evaluate(const Arguments& arguments, const Terminal& terminal) {
  apply_threads(arguments);
  Task task = arguments.has_positional(0) ? task_of_run(arguments) : task_of_flags(arguments);
  if (arguments.has("row-length")) task.row_length = arguments.whole("row-length");
  if (arguments.has("max-tokens")) task.max_tokens = static_cast<std::uint64_t>(arguments.whole("max-tokens"));
  check_model_folder(task.model);

  // All stores are opened before the model: a wrong path should not cost a minute of loading.
  std::vector<data::TokenStore> stores;
  for (const auto& [name, folder] : task.stores) stores.emplace_back(folder);
  if (std::filesystem::exists(task.model / "tokenizer.json")) {
    const std::string hash = data::Tokenizer::from_file(task.model).hash();
    for (const data::TokenStore& store : stores)
      if (store.info().tokenizer_hash != hash)
        fail(ErrorKind::kData, printable(store.folder().string()), ": made by another tokenizer: its hash is ", store.info().tokenizer_hash, ", the model's is ", hash,
             Remedy{"prepare the text again with this model's tokenizer"});
  }
  const models::Decoder decoder = load_model(task.model, task.adapter, task.compute, arguments.text("device"), checkpoints::Linears::kAsStored);  // long passes: one layer or a part of the head dense at a time

  Json report = {{"model", printable(task.model.string())}, {"adapter", task.adapter.empty() ? Json(nullptr) : Json(printable(task.adapter.string()))}, {"stores", Json::array()}};
  const at::NoGradGuard no_gradients;
  if (!arguments.has("json")) terminal.out << "store\ttokens\tloss\tperplexity\tbits per byte\n";
  for (std::size_t i = 0; i < stores.size(); ++i) {
    Json figures = train::to_json(train::evaluate(decoder, stores[i], task.row_length, task.rows_per_batch, task.max_tokens));
    if (!arguments.has("json")) {
      print_line(terminal.out, printable(task.stores[i].first), figures);
      for (const char* group : {"by_language", "by_source"})
        if (figures.at(group).size() > 1)
          for (const auto& [key, part] : figures.at(group).items()) print_line(terminal.out, "  " + (key.empty() ? "unknown" : printable(key)), part);
      terminal.out.flush();
    }
    Json entry = {{"name", printable(task.stores[i].first)}, {"store", printable(task.stores[i].second.string())}};
    entry.update(figures);
    report["stores"].push_back(std::move(entry));
  }
  if (arguments.has("json")) print_json(terminal, report);
  return 0;
}

}  // namespace

Verb evaluate_verb() {
  Verb verb{.name = "evaluate",
            .summary = "loss, perplexity and bits per UTF-8 byte on held-out stores",
            .description = "Measures how well a model predicts token stores: loss in nats a token, perplexity, and bits per UTF-8 byte, which can be compared between tokenizers; "
                           "for each store and, inside it, for each language and source. With CONFIG the result of that finished run is measured on its evaluation.stores. "
                           "Weights stored in bf16 or f16 stay as the file has them, also where the computing is in f32: one layer at a time is widened.",
            .positionals = {{.name = "CONFIG", .help = "the YAML file of a finished run, instead of --model and --store", .required = false}},
            .options = model_options("auto"),
            .examples = {{"alambic evaluate -m runs/base --store stores/heldout --json", "a model as it is"}, {"alambic evaluate run.yaml", "what a run has learnt"}},
            .run = run_evaluate,
            .config_help = nullptr};
  const std::vector<Option> more = {
      {.name = "store", .kind = Kind::kFolder, .value = "FOLDER", .help = "a token store", .repeatable = true, .letter = 's'},
      {.name = "row-length", .kind = Kind::kWhole, .value = "N", .help = "most tokens of context; longer documents are cut into pieces. Without it the CONFIG's, or 1024", .low = 2, .high = 1 << 20},
      {.name = "max-tokens", .kind = Kind::kWhole, .value = "N", .help = "tokens read of each store, spread over it; 0: all. Without it the CONFIG's, or all", .low = 0, .high = 1e15},
      set_option(),
      json_option(),
      threads_option(),
  };
  verb.options.insert(verb.options.end(), more.begin(), more.end());
  return verb;
}

}  // namespace alambic::cli
