// SPDX-License-Identifier: Apache-2.0
#include <ATen/core/grad_mode.h>

#include <charconv>
#include <cmath>
#include <ostream>

#include "cli/model_options.h"
#include "cli/verbs.h"
#include "core/error.h"
#include "core/log.h"
#include "data/tokenizer.h"
#include "models/generate.h"

namespace alambic::cli {
namespace {

// "1,2,3" or "1 2 3", also over several lines.
std::vector<std::int64_t> parse_ids(std::string_view text) {
  std::vector<std::int64_t> ids;
  constexpr std::string_view kBetween = ", \t\r\n";
  for (std::size_t begin = text.find_first_not_of(kBetween); begin != text.npos;) {
    const std::size_t end = std::min(text.find_first_of(kBetween, begin), text.size());
    const std::string_view word = text.substr(begin, end - begin);
    std::int64_t id = 0;
    const auto [stop, problem] = std::from_chars(word.data(), word.data() + word.size(), id);
    if (problem != std::errc{} || stop != word.data() + word.size() || id < 0)
      fail(ErrorKind::kUsage, "score: --ids: number ", ids.size() + 1, " is no token id: ", printable(word.substr(0, 60)), Remedy{"write them as 1,2,3"});
    ids.push_back(id);
    begin = text.find_first_not_of(kBetween, end);
  }
  if (ids.empty()) fail(ErrorKind::kUsage, "score: --ids: no token ids were given", Remedy{"write them as 1,2,3"});
  return ids;
}

std::string full_precision(double value) {
  char buffer[32];
  const auto [end, problem] = std::to_chars(buffer, buffer + sizeof buffer, value);
  return {buffer, end};
}

int run_score(const Arguments& arguments, const Terminal& terminal) {
  arguments.exactly_one({"ids", "text"});
  if (arguments.has("ids")) arguments.refuse("no-special-tokens", "goes with --text; ids are taken as they are");
  apply_threads(arguments);
  const std::filesystem::path model = arguments.path("model");
  check_model_folder(model);

  std::vector<std::int64_t> ids;
  std::optional<data::Tokenizer> tokenizer;
  const auto given = [&](const std::string& option) { return arguments.text(option) == "-" ? read_all(terminal.in) : arguments.text(option); };
  if (arguments.has("ids")) {
    ids = parse_ids(given("ids"));
  } else {
    tokenizer = data::Tokenizer::from_file(model);
    for (const std::uint32_t id : tokenizer->encode(given("text"), !arguments.has("no-special-tokens"))) ids.push_back(id);
    if (ids.empty()) fail(ErrorKind::kUsage, "score: --text: the text has no tokens", Remedy{"give a text that is not empty"});
  }
  const models::ModelConfig config = models::read_model_config(model);
  for (std::size_t i = 0; i < ids.size(); ++i)
    if (ids[i] >= config.vocabulary_size)
      fail(ErrorKind::kUsage, "score: token id ", ids[i], " (number ", i + 1, ") is not below the model's vocabulary of ", config.vocabulary_size, " tokens");
  if (config.max_positions > 0 && static_cast<std::int64_t>(ids.size()) > config.max_positions)
    log_warning(ids.size(), " tokens are more than the ", config.max_positions, " positions the model was made for; what lies beyond is scored badly");

  const at::NoGradGuard no_gradients;
  const models::Decoder decoder = load_model(model, arguments.path("adapter"), arguments.text("compute"), arguments.text("device"), checkpoints::Linears::kAsStored);  // one pass: each weight is widened once, for it
  // One token alone has nothing before it, hence no probability to tell.
  const std::vector<double> logprobs = ids.size() < 2 ? std::vector<double>{} : models::score(decoder, ids);
  double sum = 0;
  for (std::size_t i = 0; i < logprobs.size(); ++i) {
    if (!std::isfinite(logprobs[i])) fail(ErrorKind::kNumerics, "score: ln p of token number ", i + 2, " is ", logprobs[i], Remedy{"try --compute f32; alambic inspect checks the weights"});
    sum += logprobs[i];
  }

  if (arguments.has("json")) {
    print_json(terminal, {{"ids", ids}, {"logprobs", logprobs}});
    return 0;
  }
  for (std::size_t i = 0; i < ids.size(); ++i) {
    terminal.out << ids[i] << "\t" << (i == 0 ? "-" : full_precision(logprobs[i - 1]));
    if (tokenizer) terminal.out << "\t" << to_line(Json(tokenizer->token_of(static_cast<std::uint32_t>(ids[i])).value_or("")));
    terminal.out << "\n";
  }
  if (!logprobs.empty())
    terminal.out << "total\t" << full_precision(sum) << "\tperplexity " << full_precision(std::exp(-sum / static_cast<double>(logprobs.size()))) << "\n";
  return 0;
}

}  // namespace

Verb score_verb() {
  Verb verb{.name = "score",
            .summary = "log-probabilities of given tokens or of a text",
            .description = "Prints ln p(token | all tokens before it) for each token but the first, which has nothing before it. With --json the object is "
                           "{\"ids\": [...], \"logprobs\": [...]}, where logprobs[i] belongs to ids[i + 1]. Without --json each line holds the id, ln p and, "
                           "with --text, the token; the last line holds the sum. With --ids no tokenizer is needed.",
            .positionals = {},
            .options = model_options("f32"),
            .examples = {{"alambic score --model runs/quickstart/merged --text 'Hello, world' --json", "score a text"},
                         {"alambic score -m base --adapter run --ids 1,2,3", "score token ids with an adapter"},
                         {"alambic score -m base --text - < page.txt", "score a file"}},
            .run = run_score};
  verb.options.front().required = true;
  verb.options.push_back({.name = "ids", .kind = Kind::kText, .value = "LIST", .help = "token ids such as 1,2,3; - reads them from stdin"});
  verb.options.push_back({.name = "text", .kind = Kind::kText, .value = "TEXT", .help = "a text, tokenised by the model's tokenizer; - reads it from stdin"});
  verb.options.push_back({.name = "no-special-tokens", .help = "with --text: without the tokens that the tokenizer puts around a text (BOS and the like)"});
  verb.options.push_back(json_option());
  verb.options.push_back(threads_option());
  return verb;
}

}  // namespace alambic::cli
