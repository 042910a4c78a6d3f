// SPDX-License-Identifier: Apache-2.0
#include "cli/verbs.h"

#include <ATen/Parallel.h>

#include <istream>
#include <ostream>

#include "core/error.h"

namespace alambic::cli {

const std::vector<Verb>& verbs() {
  static const std::vector<Verb> all = [] {
    std::vector<Verb> list = {import_verb(), extend_verb(), prepare_verb(), prune_verb(), plan_verb(), train_verb(), distill_verb(), launch_verb(), evaluate_verb(), merge_verb(), export_verb(), generate_verb(),
                              score_verb(), inspect_verb(), doctor_verb(), completion_verb(), man_verb(), help_verb()};
    for (Verb& verb : list) {
      verb.options.push_back({.name = "quiet", .help = "leave out notes and progress on stderr; warnings and errors stay", .letter = 'q'});
      verb.options.push_back({.name = "help", .help = "show this help and exit", .letter = 'h'});
    }
    return list;
  }();
  return all;
}

std::vector<std::string> verb_names() {
  std::vector<std::string> names;
  for (const Verb& verb : verbs()) names.push_back(verb.name);
  return names;
}

const Verb& find_verb(const std::string& name) {
  for (const Verb& verb : verbs())
    if (verb.name == name) return verb;
  const std::string nearest = nearest_name(name, verb_names());
  fail(ErrorKind::kUsage, "unknown verb ", printable(name), nearest.empty() ? "" : "; did you mean " + nearest + "?", Remedy{"alambic --help lists the verbs"});
}

Option json_option() { return {.name = "json", .help = "print the result as one JSON object on one line of stdout"}; }

Option set_option() {
  return {.name = "set",
          .kind = Kind::kText,
          .value = "KEY=VALUE",
          .help = "set a key of CONFIG, for example data.row_length=1024, data.mixture.0.weight=2 or lora.targets=[q_proj, v_proj]; later ones win",
          .repeatable = true};
}

Option threads_option() {
  return {.name = "threads", .kind = Kind::kWhole, .value = "N", .help = "threads to compute with; without it one for each processor core", .low = 1, .high = 4096};
}

void apply_threads(const Arguments& arguments) {
  if (arguments.has("threads")) at::set_num_threads(static_cast<int>(arguments.whole("threads")));
}

void print_json(const Terminal& terminal, const Json& object) { terminal.out << to_line(object) << std::endl; }

std::string printable(std::string_view text) {
  std::string result;
  for (const char letter : text) {
    const auto byte = static_cast<unsigned char>(letter);
    if (byte >= 0x20 && byte != 0x7F) {
      result += letter;
    } else {
      result.append("\\x").append(1, "0123456789abcdef"[byte >> 4]).append(1, "0123456789abcdef"[byte & 15]);
    }
  }
  return result;
}

std::string read_all(std::istream& in, std::size_t max_bytes) {
  std::string text;
  char buffer[1 << 16];
  while (in.read(buffer, sizeof buffer), in.gcount() > 0) {
    text.append(buffer, static_cast<std::size_t>(in.gcount()));
    if (text.size() > max_bytes) fail(ErrorKind::kData, "standard input holds more than the ", max_bytes, " bytes allowed");
  }
  if (in.bad()) fail(ErrorKind::kData, "standard input cannot be read");
  return text;
}

}  // namespace alambic::cli
