// SPDX-License-Identifier: Apache-2.0
#include "models/generate.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <ostream>

#include "cli/model_options.h"
#include "cli/text_stream.h"
#include "cli/verbs.h"
#include "core/error.h"
#include "core/log.h"
#include "data/chat_template.h"
#include "data/tokenizer.h"

namespace alambic::cli {
namespace {

// The prompt as token ids: the text as it stands, or a user's message in the model's chat template.
std::vector<std::int64_t> prompt_ids(const Arguments& arguments, const Terminal& terminal, const data::Tokenizer& tokenizer) {
  const auto given = [&](const std::string& option) { return arguments.text(option) == "-" ? read_all(terminal.in) : arguments.text(option); };
  std::vector<std::uint32_t> ids;
  if (arguments.has("prompt")) {
    ids = tokenizer.encode(given("prompt"), true);
  } else {
    const std::filesystem::path model = arguments.path("model");
    const std::optional<data::ChatTemplate> chat = data::read_chat_template(model);
    if (!chat)
      fail(ErrorKind::kData, printable(model.string()), ": the model has no chat template", Remedy{"use --prompt, or put a chat_template.jinja into the folder"});
    Json messages = Json::array();
    if (arguments.has("system")) messages.push_back({{"role", "system"}, {"content", arguments.text("system")}});
    messages.push_back({{"role", "user"}, {"content", given("chat")}});
    ids = tokenizer.encode(chat->render(messages, nullptr, true).text, false);  // the template wrote the special tokens
  }
  if (ids.empty()) fail(ErrorKind::kUsage, "generate: the prompt has no tokens", Remedy{"give a prompt that is not empty"});
  return {ids.begin(), ids.end()};
}

int run_generate(const Arguments& arguments, const Terminal& terminal) {
  arguments.exactly_one({"prompt", "chat"});
  if (arguments.has("prompt")) arguments.refuse("system", "goes with --chat");
  for (const std::string& stop : arguments.texts("stop"))
    if (stop.empty()) fail(ErrorKind::kUsage, "generate: --stop must not be empty");
  apply_threads(arguments);
  const std::filesystem::path model = arguments.path("model");
  check_model_folder(model);

  const data::Tokenizer tokenizer = data::Tokenizer::from_file(model);
  const std::vector<std::int64_t> prompt = prompt_ids(arguments, terminal, tokenizer);
  const models::ModelConfig config = models::read_model_config(model);
  for (const std::int64_t id : prompt)
    if (id >= config.vocabulary_size)
      fail(ErrorKind::kData, printable(model.string()), ": the tokenizer gives id ", id, ", but the model's vocabulary has ", config.vocabulary_size, " tokens",
           Remedy{"tokenizer.json belongs to another model"});
  models::Sampling sampling{.temperature = arguments.number("temperature"),
                            .top_k = arguments.whole("top-k"),
                            .top_p = arguments.number("top-p"),
                            .min_p = arguments.number("min-p"),
                            .repetition_penalty = arguments.number("repetition-penalty"),
                            .max_new_tokens = arguments.whole("max-new-tokens"),
                            .seed = static_cast<std::uint64_t>(arguments.whole("seed"))};
  if (sampling.temperature == 0)
    for (const char* option : {"top-k", "top-p", "min-p"})
      if (arguments.has(option)) log_warning("--", option, " has no effect without --temperature: the likeliest token is taken");
  bool fills_context = false;
  if (config.max_positions > 0) {
    const std::int64_t room = config.max_positions - static_cast<std::int64_t>(prompt.size());
    if (room <= 0)
      fail(ErrorKind::kUsage, "generate: the prompt has ", prompt.size(), " tokens, the model at most ", config.max_positions, " positions", Remedy{"shorten the prompt"});
    fills_context = room < sampling.max_new_tokens;
    sampling.max_new_tokens = std::min(sampling.max_new_tokens, room);
  }

  const at::NoGradGuard no_gradients;
  const models::Decoder decoder = load_model(arguments);
  const bool json = arguments.has("json");
  TextStream stream([&](std::span<const std::uint32_t> ids) { return tokenizer.decode(ids, true); }, arguments.texts("stop"), [&](std::string_view piece) {
    if (!json) terminal.out << piece << std::flush;
  });
  // A reader that closed the pipe has seen enough.
  const auto on_token = [&](std::int64_t id) { return stream.push(static_cast<std::uint32_t>(id)) && terminal.out.good(); };
  const auto begin = std::chrono::steady_clock::now();
  const std::vector<std::int64_t> ids = models::generate(decoder, prompt, sampling, config.eos_ids, on_token);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  stream.finish();

  const bool ended = !ids.empty() && std::find(config.eos_ids.begin(), config.eos_ids.end(), ids.back()) != config.eos_ids.end();
  const char* reason = stream.stopped() ? "stop_string" : ended ? "stop_token" : fills_context ? "context" : "length";
  if (json) {
    print_json(terminal, {{"text", stream.text()},
                          {"finish_reason", reason},
                          {"prompt_ids", prompt},
                          {"ids", ids},
                          {"seconds", seconds},
                          {"tokens_per_second", static_cast<double>(ids.size()) / seconds}});
  } else {
    terminal.out << std::endl;
    log_info(prompt.size(), " tokens of prompt, ", ids.size(), " generated (", reason, ") in ", seconds, " s: ", static_cast<double>(ids.size()) / seconds, " tokens/s");
  }
  return 0;
}

}  // namespace

Verb generate_verb() {
  Verb verb{.name = "generate",
            .summary = "text from a model, with or without an adapter",
            .description = "Continues a prompt, or answers a message in the model's chat template. The text is written to stdout as it comes; the same command gives "
                           "the same text on the same machine. With --json the object holds text, finish_reason (stop_token, stop_string, length or context), "
                           "prompt_ids, ids, seconds and tokens_per_second.",
            .positionals = {},
            .options = model_options("auto"),
            .examples = {{"alambic generate -m base --prompt 'Once upon a time' --max-new-tokens 64", "the likeliest continuation"},
                         {"alambic generate -m base --adapter run --chat 'What is a still?' --temperature 0.7 --top-p 0.9 --seed 3", "an answer, sampled"}},
            .run = run_generate};
  verb.options.front().required = true;
  const std::vector<Option> more = {
      {.name = "prompt", .kind = Kind::kText, .value = "TEXT", .help = "text to continue; - reads it from stdin", .letter = 'p'},
      {.name = "chat", .kind = Kind::kText, .value = "TEXT", .help = "a user's message to answer; - reads it from stdin"},
      {.name = "system", .kind = Kind::kText, .value = "TEXT", .help = "with --chat: the system message before it"},
      {.name = "max-new-tokens", .kind = Kind::kWhole, .value = "N", .help = "most tokens to generate", .otherwise = "256", .low = 1, .high = 1e9, .letter = 'n'},
      {.name = "temperature", .kind = Kind::kNumber, .value = "T", .help = "0 takes the likeliest token; higher is more varied", .otherwise = "0", .low = 0, .high = 100, .letter = 't'},
      {.name = "top-k", .kind = Kind::kWhole, .value = "N", .help = "sample among the N likeliest tokens; 0: among all", .otherwise = "0", .low = 0, .high = 1e9},
      {.name = "top-p", .kind = Kind::kNumber, .value = "P", .help = "sample among the likeliest tokens that together reach this probability", .otherwise = "1", .low = 0, .high = 1},
      {.name = "min-p", .kind = Kind::kNumber, .value = "P", .help = "leave out tokens below this share of the likeliest one's probability", .otherwise = "0", .low = 0, .high = 1},
      {.name = "repetition-penalty", .kind = Kind::kNumber, .value = "X", .help = "above 1: tokens that occurred become less likely", .otherwise = "1", .low = 0.01, .high = 100},
      {.name = "stop", .kind = Kind::kText, .value = "TEXT", .help = "end before this text", .repeatable = true},
      {.name = "seed", .kind = Kind::kWhole, .value = "N", .help = "seed of the sampling", .otherwise = "0", .low = 0},
      json_option(),
      threads_option(),
  };
  verb.options.insert(verb.options.end(), more.begin(), more.end());
  return verb;
}

}  // namespace alambic::cli
