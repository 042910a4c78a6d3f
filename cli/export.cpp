// SPDX-License-Identifier: Apache-2.0
#include <optional>
#include <ostream>

#include "checkpoints/gguf.h"
#include "checkpoints/gguf_export.h"
#include "checkpoints/gguf_mix.h"
#include "checkpoints/hf_folder.h"
#include "cli/figures.h"
#include "cli/model_options.h"
#include "cli/verbs.h"
#include "core/error.h"
#include "core/log.h"
#include "data/tokenizer.h"
#include "train/compare.h"
#include "train/importance.h"

namespace alambic::cli {
namespace {

std::vector<std::string> mix_names() {
  std::vector<std::string> names;
  for (const checkpoints::GgufMix& mix : checkpoints::gguf_mixes()) names.emplace_back(mix.name);
  return names;
}

/// A store that was made with this model's tokenizer. Opened before any work is done.
data::TokenStore open_store(const std::filesystem::path& path, const std::filesystem::path& model) {
  data::TokenStore store(path);
  if (!std::filesystem::exists(model / "tokenizer.json")) return store;
  if (const std::string hash = data::Tokenizer::from_file(model).hash(); store.info().tokenizer_hash != hash)
    fail(ErrorKind::kData, printable(path.string()), ": made by another tokenizer: its hash is ", store.info().tokenizer_hash, ", the model's is ", hash,
         Remedy{"prepare the text again with this model's tokenizer"});
  return store;
}

std::optional<checkpoints::ImportanceMatrix> importance_of(const Arguments& arguments, const std::filesystem::path& folder) {
  const auto row_length = arguments.whole("row-length");
  const auto max_tokens = static_cast<std::uint64_t>(arguments.whole("max-tokens"));
  if (arguments.has("importance")) {
    arguments.refuse("calibration", "and --importance exclude each other");
    return checkpoints::read_importance_matrix(arguments.path("importance"));
  }
  if (!arguments.has("calibration")) {
    arguments.refuse("write-importance", "needs --calibration");
    return std::nullopt;
  }
  const std::filesystem::path given = arguments.path("calibration");
  std::optional<data::TokenStore> store;
  if (std::filesystem::is_directory(given)) store = open_store(given, folder);
  models::Decoder decoder = checkpoints::load_decoder(folder, at::kFloat);
  checkpoints::ImportanceMatrix matrix =
      store ? train::measure_importance(decoder, *store, row_length, max_tokens) : train::measure_importance(decoder, folder, given, row_length, max_tokens);
  if (arguments.has("write-importance")) checkpoints::write_importance_matrix(matrix, arguments.path("write-importance"));
  return matrix;
}

int run_export(const Arguments& arguments, const Terminal& terminal) {
  apply_threads(arguments);
  const std::filesystem::path folder = arguments.positional(0);
  checkpoints::GgufExportConfig config{.folder = folder, .output = arguments.positional(1), .type = arguments.text("type"), .name = arguments.text("name"), .base_name = arguments.text("base-name")};
  const std::filesystem::path adapter = std::filesystem::exists(folder / "adapter" / "adapter_config.json") ? folder / "adapter" : folder;
  const bool is_adapter = std::filesystem::exists(adapter / "adapter_config.json");
  if (is_adapter && !arguments.has("type")) config.type = "f32";
  if (!is_adapter && config.type.empty()) config.type = "q8_0";
  if (std::filesystem::exists(std::filesystem::symlink_status(config.output)))
    fail(ErrorKind::kUsage, printable(config.output.string()), ": exists already and is never overwritten", Remedy{"choose another name, or remove it"});
  checkpoints::export_card_path(config.output);  // before any work is done

  checkpoints::GgufExportReport report;
  Json measured = nullptr, importance_json = nullptr;
  if (is_adapter) {
    for (const char* option : {"calibration", "importance", "write-importance", "evaluate"}) arguments.refuse(option, "does not go with an adapter, which is not quantised");
    std::filesystem::path base = arguments.path("base");
    if (base.empty()) base = value_or<std::string>(read_json_file(adapter / "adapter_config.json"), "base_model_name_or_path", "", (adapter / "adapter_config.json").string());
    if (base.empty() || !std::filesystem::is_directory(base))
      fail(ErrorKind::kUsage, "export: which base ", printable(folder.string()), " was trained on cannot be told from it", Remedy{"name the base's folder with --base"});
    report = checkpoints::export_gguf_adapter(base, adapter, config);
  } else {
    arguments.refuse("base", "goes with an adapter");
    check_model_folder(folder);
    std::optional<data::TokenStore> held_out;
    if (arguments.has("evaluate")) held_out = open_store(arguments.path("evaluate"), folder);
    const std::optional<checkpoints::ImportanceMatrix> importance = importance_of(arguments, folder);
    if (importance) {
      config.importance = &*importance;
      importance_json = {{"entries", importance->entries.size()}, {"tokens", importance->entries.begin()->second.tokens}, {"datasets", importance->datasets}};
    }
    report = checkpoints::export_gguf(config);
    if (held_out) {
      models::Decoder original = checkpoints::load_decoder(folder, at::kFloat), quantised = checkpoints::load_gguf(config.output);
      const train::Comparison comparison = train::compare(original, quantised, *held_out, arguments.whole("row-length"), static_cast<std::uint64_t>(arguments.whole("max-tokens")));
      measured = comparison.json();
      measured["store"] = printable(arguments.text("evaluate"));
      const std::string on = ", " + held_out->folder().filename().string() + " (" + grouped(measured["tokens"]) + " tokens)";
      report.card.measures = {{"bits per UTF-8 byte" + on, figure(measured["bits_per_byte_before"], 4), figure(measured["bits_per_byte_after"], 4)},
                              {"loss in nats a token" + on, figure(measured["loss_before"], 4), figure(measured["loss_after"], 4)},
                              {"KL(original || this), nats a token" + on, "0", short_figure(comparison.kl_per_token())},
                              {"likeliest token is the same" + on, "100 %", figure(100 * comparison.same_share(), 1) + " %"}};
    }
  }
  const std::filesystem::path card = checkpoints::write_export_card(report, is_adapter ? adapter : folder);
  for (const std::string& warning : report.warnings) log_warning(warning);
  if (arguments.has("json")) {
    Json json = report.json();
    json["card"] = printable(card.string());
    json["importance"] = importance_json;
    json["evaluation"] = measured;
    print_json(terminal, json);
    return 0;
  }
  std::ostream& out = terminal.out;
  out << printable(report.output.string()) << ": " << report.type << ", " << grouped(report.num_parameters) << " parameters in " << grouped(report.num_bytes) << " bytes ("
      << figure(report.bits_per_weight(), 2) << " bits a weight), " << duration(report.seconds) << "\n";
  std::string types;
  for (const auto& [type, count] : report.tensors_of_type) types += (types.empty() ? "" : ", ") + std::to_string(count) + " x " + type;
  out << "  tensors: " << types << (report.num_weighted > 0 ? "; " + std::to_string(report.num_weighted) + " weighed by importance" : "") << "\n";
  if (!measured.is_null())
    out << "  held out: " << figure(measured["bits_per_byte_before"], 4) << " -> " << figure(measured["bits_per_byte_after"], 4) << " bits per byte, KL " << figure(measured["kl"], 5)
        << " nats a token, the likeliest token is the same in " << figure(100 * measured["same_first"].get<double>(), 1) << " % of " << grouped(measured["tokens"]) << "\n";
  out << "  card: " << printable(card.string()) << "\n";
  return 0;
}

}  // namespace

Verb export_verb() {
  return {.name = "export",
          .summary = "model folder or adapter -> GGUF for llama.cpp",
          .description = "Writes a GGUF file that llama.cpp runs: weights in one of its mixes of types, the tokenizer, the chat template, licence and origin, and a card beside it. "
                         "With --calibration the rounding of each column is weighed by how large its inputs are on that text; with --evaluate what was written is read again and compared "
                         "with the original on held-out text. A PEFT adapter, or a finished run that holds one, becomes a GGUF LoRA.",
          .positionals = {{.name = "FOLDER", .help = "a model folder, a PEFT adapter folder or a finished run with an adapter", .kind = Kind::kFolder},
                          {.name = "GGUF", .help = "the file to make"}},
          .options = {{.name = "type", .kind = Kind::kText, .value = "TYPE", .help = "the mix of types; without it q8_0, and f32 for an adapter", .choices = mix_names(), .letter = 't'},
                      {.name = "calibration", .kind = Kind::kFile, .value = "PATH", .help = "a token store or a text file to measure an importance matrix on"},
                      {.name = "importance", .kind = Kind::kFile, .value = "FILE", .help = "an importance matrix measured before, here or by llama-imatrix (GGUF)"},
                      {.name = "write-importance", .kind = Kind::kFile, .value = "FILE", .help = "keep the measured importance matrix, as llama-quantize reads it"},
                      {.name = "evaluate", .kind = Kind::kFolder, .value = "STORE", .help = "a held-out token store: bits per byte of both and the KL between them go into the card"},
                      {.name = "row-length", .kind = Kind::kWhole, .value = "N", .help = "tokens of context while measuring", .otherwise = "512", .low = 2, .high = 1 << 20},
                      {.name = "max-tokens", .kind = Kind::kWhole, .value = "N", .help = "tokens read of each store, spread over it; 0: all", .otherwise = "0", .low = 0, .high = 1e15},
                      {.name = "base", .kind = Kind::kFolder, .value = "FOLDER", .help = "the base that an adapter was trained on; without it the one that the adapter names", .letter = 'b'},
                      {.name = "name", .kind = Kind::kText, .value = "TEXT", .help = "the model's name in file and card; without it the folder's name"},
                      {.name = "base-name", .kind = Kind::kText, .value = "TEXT", .help = "what others call the model in FOLDER, for example org/model"},
                      json_option(),
                      threads_option()},
          .examples = {{"alambic export runs/quickstart/merged model.gguf --type q4_k_m", "what llama.cpp runs"},
                       {"alambic export merged model.gguf -t q4_k_m --calibration stores/train --evaluate stores/heldout", "weighed by importance, and measured"},
                       {"alambic export runs/quickstart/run adapter.gguf --base runs/base", "the adapter alone, as a GGUF LoRA"}},
          .run = run_export};
}

}  // namespace alambic::cli
