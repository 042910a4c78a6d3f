// SPDX-License-Identifier: Apache-2.0
#include <ostream>

#include "checkpoints/extend_folder.h"
#include "cli/model_options.h"
#include "cli/verbs.h"
#include "core/error.h"
#include "core/files.h"

namespace alambic::cli {
namespace {

constexpr std::uint64_t kMostBytes = 64u << 20;

/// One token a line, or a JSON list of strings where the name ends in .json.
std::vector<std::string> tokens_of_file(const std::filesystem::path& path) {
  const std::string name = printable(path.string());
  std::vector<std::string> tokens;
  if (path.extension() == ".json") {
    const Json list = read_json_file(path, kMostBytes);
    if (!list.is_array()) fail(ErrorKind::kData, name, ": must hold a JSON list of strings");
    for (const Json& token : list) {
      if (!token.is_string()) fail(ErrorKind::kData, name, ": must hold a JSON list of strings, has ", to_line(token).substr(0, 60));
      tokens.push_back(token.get<std::string>());
    }
    return tokens;
  }
  const std::string text = read_file(path, kMostBytes);
  for (std::size_t begin = 0, line = 1; begin < text.size(); ++line) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    std::string token = text.substr(begin, end - begin);
    if (token.ends_with('\r')) token.pop_back();
    if (token.empty()) fail(ErrorKind::kData, name, ":", line, ": an empty line is no token", Remedy{"one token a line; a token with a line break in it needs a .json file: [\"...\"]"});
    tokens.push_back(std::move(token));
    begin = end + 1;
  }
  if (tokens.empty()) fail(ErrorKind::kData, name, ": holds no tokens");
  return tokens;
}

int run_extend(const Arguments& arguments, const Terminal& terminal) {
  apply_threads(arguments);
  checkpoints::ExtendConfig config;
  config.base = arguments.positional(0);
  config.output = arguments.positional(1);
  check_model_folder(config.base);
  if (arguments.has("tokens")) config.tokens = tokens_of_file(arguments.path("tokens"));
  if (arguments.has("token"))
    for (const std::string& token : arguments.texts("token")) config.tokens.push_back(token);
  config.special = arguments.has("special");
  config.init = arguments.text("init");
  config.pad_to_multiple = arguments.whole("pad-to-multiple");
  config.seed = static_cast<std::uint64_t>(arguments.whole("seed"));
  config.name = arguments.text("name");
  config.base_name = arguments.text("base-name");
  const checkpoints::ExtendReport report = checkpoints::extend_folder(config);
  if (arguments.has("json")) {
    print_json(terminal, report.json());
    return 0;
  }
  constexpr std::size_t kMostShown = 20;
  std::ostream& out = terminal.out;
  out << printable(report.output.string()) << ": " << (report.already_done ? "this extension is there already, whole; nothing was written" : "written") << "\n";
  out << "  " << report.tokens.size() << " new tokens; " << report.rows_before << " rows before, " << report.rows << " now; head " << (report.head_tied ? "tied" : "not tied") << "\n";
  for (std::size_t i = 0; i < report.tokens.size() && i < kMostShown; ++i) {
    const checkpoints::NewToken& token = report.tokens[i];
    out << "  " << token.id << "\t" << to_line(Json(token.text)) << "\t" << token.pieces.size() << " pieces before\n";
  }
  if (report.tokens.size() > kMostShown) out << "  ... and " << report.tokens.size() - kMostShown << " more\n";
  for (const std::string& warning : report.warnings) out << "  note: " << warning << "\n";
  return 0;
}

}  // namespace

Verb extend_verb() {
  return {.name = "extend",
          .summary = "model folder + new tokens -> model folder",
          .description = "Adds tokens to a model's tokenizer and a row for each to its embedding and head. A new row begins as the mean of the rows of the pieces that the old "
                         "tokenizer makes of the token's text; every other weight stays as it is, bit for bit. Text is prepared anew with the extended folder; "
                         "lora.trainable_tokens then trains the new rows alone. A token that is empty, given twice, known already, or that would not be found in a text is refused.",
          .positionals = {{.name = "MODEL", .help = "the model folder to extend", .kind = Kind::kFolder}, {.name = "OUTPUT", .help = "the model folder to make", .kind = Kind::kFolder}},
          .options = {{.name = "tokens", .kind = Kind::kFile, .value = "FILE", .help = "one token a line, or a JSON list of strings where the name ends in .json"},
                      {.name = "token", .kind = Kind::kText, .value = "TEXT", .help = "a token; may be given several times, behind those of --tokens", .repeatable = true},
                      {.name = "special", .help = "the tokens are special: found before any normalisation, and left out where decoded text is asked for without special tokens"},
                      {.name = "init", .kind = Kind::kText, .value = "HOW", .help = "what a new row begins as; mean-norm scales the mean to the mean norm of the pieces' rows", .otherwise = "mean", .choices = {"mean", "mean-norm", "random"}},
                      {.name = "pad-to-multiple", .kind = Kind::kWhole, .value = "N", .help = "round the number of rows up to a multiple of N", .otherwise = "1", .low = 1, .high = 1 << 20},
                      {.name = "seed", .kind = Kind::kWhole, .value = "N", .help = "of --init random", .otherwise = "0", .low = 0, .high = 9e15},
                      {.name = "name", .kind = Kind::kText, .value = "TEXT", .help = "the model's name in its card; without it the output folder's name"},
                      {.name = "base-name", .kind = Kind::kText, .value = "TEXT", .help = "the base's name in the card, for example org/model"},
                      json_option(),
                      threads_option()},
          .examples = {{"alambic extend base extended --tokens words.txt --pad-to-multiple 64", "words of a new language"},
                       {"alambic extend base extended --token '<|tool|>' --special", "a marker for a chat template"}},
          .run = run_extend};
}

}  // namespace alambic::cli
