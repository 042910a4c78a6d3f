// SPDX-License-Identifier: Apache-2.0
#include "data/prepare.h"

#include <ostream>

#include "cli/verbs.h"
#include "core/error.h"
#include "data/text_reader.h"

namespace alambic::cli {
namespace {

// Flags stand for keys of the config, so that both ways are checked by the same rules. JSON is flow YAML.
std::vector<std::string> overrides_of(const Arguments& arguments) {
  std::vector<std::string> overrides;
  const auto add = [&](const std::string& option, const std::string& key) {
    if (arguments.has(option)) overrides.push_back(key + "=" + to_line(Json(arguments.text(option))));
  };
  for (const char* option : {"model", "input", "output", "name", "format", "licence", "origin", "language"})
    for (const std::string& value : arguments.texts(option))
      if (data::invalid_utf8(value) != std::string::npos)
        fail(ErrorKind::kUsage, "prepare: --", option, " is not UTF-8 text: ", printable(value), Remedy{"rename it, or reach it through a folder with another name"});
  add("model", "tokenizer");
  add("output", "output");
  add("shard", "shard");
  if (arguments.has("threads")) overrides.push_back("threads=" + arguments.text("threads"));
  if (arguments.has("input")) {
    Json paths = Json::array();
    for (const std::string& path : arguments.texts("input")) paths.push_back(path);
    overrides.push_back("sources.0.paths=" + to_line(paths));
    if (!arguments.has("name")) overrides.push_back("sources.0.name=text");
  }
  for (const char* option : {"name", "format", "licence", "origin", "language"}) add(option, std::string("sources.0.") + option);
  const std::vector<std::string>& set = arguments.texts("set");
  overrides.insert(overrides.end(), set.begin(), set.end());
  return overrides;
}

int run_prepare(const Arguments& arguments, const Terminal& terminal) {
  const bool from_file = arguments.has_positional(0);
  for (const char* option : {"model", "input", "output", "name", "format", "licence", "origin", "language"})
    if (from_file) arguments.refuse(option, "and CONFIG exclude each other; use --set to change a key of CONFIG");
  if (!from_file)
    for (const char* option : {"model", "input", "output"})
      if (!arguments.has(option)) fail(ErrorKind::kUsage, "prepare: neither CONFIG nor --", option, " was given", Remedy{"alambic prepare CONFIG, or --model, --input and --output"});
  const auto config = read_config<data::PrepareConfig>(from_file ? arguments.positional(0) : "", overrides_of(arguments));
  const data::PrepareReport report = data::prepare(config);
  if (arguments.has("json")) print_json(terminal, data::to_json(report));
  else terminal.out << data::describe(report);
  return 0;
}

}  // namespace

Verb prepare_verb() {
  return {.name = "prepare",
          .summary = "text, JSON lines or Parquet -> token store",
          .description = "Tokenises text into a store that train reads. The format of the records is detected, named, and shown with one rendered sample in which trained text stands "
                         "between [[ and ]]. Killed, it goes on at the last committed shard when it is run again; a finished store is left alone.",
          .positionals = {{.name = "CONFIG", .help = "a YAML file; its keys are below. Simple cases need none: --model, --input and --output", .required = false}},
          .options = {{.name = "model", .kind = Kind::kFolder, .value = "FOLDER", .help = "model folder whose tokenizer and chat template are used", .letter = 'm'},
                      {.name = "input", .kind = Kind::kFile, .value = "PATH", .help = "file, folder or glob to read", .repeatable = true, .letter = 'i'},
                      {.name = "output", .kind = Kind::kFolder, .value = "FOLDER", .help = "token store to write", .letter = 'o'},
                      {.name = "format", .kind = Kind::kText, .value = "NAME", .help = "format of the records, where it should not be detected"},
                      {.name = "name", .kind = Kind::kText, .value = "TEXT", .help = "short name of the source; without it \"text\""},
                      {.name = "licence", .kind = Kind::kText, .value = "SPDX", .help = "licence of the text, as an SPDX expression"},
                      {.name = "origin", .kind = Kind::kText, .value = "TEXT", .help = "where the text is from: an address or a package"},
                      {.name = "language", .kind = Kind::kText, .value = "TAG", .help = "language of the text, as a BCP 47 tag"},
                      {.name = "shard", .kind = Kind::kText, .value = "I/N", .help = "write part I of N (from 0), for N processes at once"},
                      set_option(),
                      json_option(),
                      threads_option()},
          .examples = {{"alambic prepare corpus.yaml", "all that CONFIG names"},
                       {"alambic prepare -m base -i 'texts/*.md' -o stores/texts --licence CC-BY-4.0 --language id", "some files, without a CONFIG"},
                       {"alambic prepare corpus.yaml --shard 0/2 & alambic prepare corpus.yaml --shard 1/2", "two processes, one store"}},
          .run = run_prepare,
          .config_help = config_help<data::PrepareConfig>};
}

}  // namespace alambic::cli
