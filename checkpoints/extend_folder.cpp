// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/extend_folder.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>

#include <map>
#include <set>

#include "checkpoints/hf_folder.h"
#include "checkpoints/licence.h"
#include "checkpoints/manifest.h"
#include "checkpoints/model_card.h"
#include "checkpoints/safetensors.h"
#include "core/error.h"
#include "core/files.h"
#include "core/log.h"
#include "core/random.h"
#include "data/tokenizer.h"
#include "models/decoder.h"

namespace alambic::checkpoints {
namespace {

constexpr const char* kMade = "vocabulary extended";
constexpr std::size_t kMostTokens = 1 << 20;
constexpr std::size_t kMostShown = 20;

std::string shown(const std::string& text) { return to_line(Json(text.size() > 60 ? text.substr(0, 60) + "..." : text)); }

std::string list_of(const std::vector<std::int64_t>& ids) {
  std::string text;
  for (const std::int64_t id : ids) text += (text.empty() ? "" : " ") + std::to_string(id);
  return text;
}

[[noreturn]] void fail_with(std::vector<std::string> problems) {
  const std::size_t num = problems.size();
  if (num > kMostShown) problems.resize(kMostShown), problems.push_back("... and " + std::to_string(num - kMostShown) + " more");
  std::string text;
  for (const std::string& problem : problems) text += (text.empty() ? "" : "\n") + problem;
  fail(ErrorKind::kUsage, text, Remedy{"leave these tokens out, or write them otherwise"});
}

std::vector<std::int64_t> ids_of(const data::Tokenizer& tokenizer, const std::string& text) {
  const std::vector<std::uint32_t> ids = tokenizer.encode(text, /*add_special_tokens=*/false);
  return {ids.begin(), ids.end()};
}

/// The tokens with what the old tokenizer makes of them, or all that speaks against them.
std::vector<NewToken> checked_tokens(const ExtendConfig& config, const data::Tokenizer& tokenizer) {
  if (config.tokens.empty()) fail(ErrorKind::kUsage, "extend: no token was given", Remedy{"name tokens with --token, or a file of them with --tokens"});
  if (config.tokens.size() > kMostTokens) fail(ErrorKind::kUsage, "extend: ", config.tokens.size(), " tokens; the most is ", kMostTokens);
  std::vector<std::string> problems;
  std::vector<NewToken> tokens;
  std::map<std::string, std::size_t> seen;
  for (std::size_t i = 0; i < config.tokens.size(); ++i) {
    const std::string& text = config.tokens[i];
    const std::string which = "token number " + std::to_string(i + 1) + " " + shown(text);
    if (text.empty()) {
      problems.push_back("token number " + std::to_string(i + 1) + ": empty");
      continue;
    }
    if (const auto [found, is_new] = seen.emplace(text, i); !is_new) {
      problems.push_back(which + ": given already as number " + std::to_string(found->second + 1));
      continue;
    }
    if (const auto id = tokenizer.id_of(text)) {
      problems.push_back(which + ": the tokenizer has it already, with the id " + std::to_string(*id));
      continue;
    }
    std::vector<std::int64_t> pieces;
    try {
      pieces = ids_of(tokenizer, text);
    } catch (const Error& error) {  // it is no UTF-8, say
      problems.push_back(which + ": " + error.what());
      continue;
    }
    if (pieces.empty()) problems.push_back(which + ": the tokenizer makes nothing of it, so nothing is left to find in a text");
    else if (pieces.size() == 1 && tokenizer.unknown_id() != static_cast<std::uint32_t>(pieces[0]))
      problems.push_back(which + ": is one token already, " + shown(tokenizer.token_of(static_cast<std::uint32_t>(pieces[0])).value_or("")) + " with the id " +
                         std::to_string(pieces[0]));
    else tokens.push_back({.text = text, .id = 0, .pieces = pieces});
  }
  if (!problems.empty()) fail_with(problems);
  return tokens;
}

/// Gives the tokens their ids, and makes sure that each is found: a text that is the token alone must give its id alone.
void find_tokens(const data::Tokenizer& extended, std::vector<NewToken>& tokens) {
  std::vector<std::string> problems;
  for (NewToken& token : tokens) {
    const auto id = extended.id_of(token.text);
    if (!id) fail(ErrorKind::kBug, "the extended tokenizer has no token ", shown(token.text));
    token.id = *id;
    const std::vector<std::int64_t> found = ids_of(extended, token.text);
    if (found == std::vector<std::int64_t>{token.id}) continue;
    const std::string other = found.size() == 1 ? extended.token_of(static_cast<std::uint32_t>(found[0])).value_or("") : "";
    problems.push_back("token " + shown(token.text) + ": " +
                       (found.size() == 1 ? "normalises to another, " + shown(other) + ", which is found in its place"
                                          : "would not be found: another token lies in its text, and it becomes the ids " + list_of(found)));
  }
  if (!problems.empty()) fail_with(problems);
}

/// The first `used` rows of the table belong to tokens of the old tokenizer.
at::Tensor extended_table(const at::Tensor& old_VD, const std::vector<NewToken>& tokens, std::int64_t rows, std::int64_t used, const ExtendConfig& config) {
  const at::NoGradGuard no_gradients;
  const std::int64_t before = old_VD.size(0), width = old_VD.size(1);
  at::Tensor table_VD = at::empty({rows, width}, old_VD.options());
  table_VD.narrow(0, 0, before).copy_(old_VD);
  at::Tensor mean_D, deviation_D;
  if (rows > before || config.init == "random") {
    const at::Tensor real_VD = old_VD.narrow(0, 0, used).to(at::kFloat);
    mean_D = real_VD.mean(0);
    deviation_D = real_VD.std(0, /*unbiased=*/false);
  }
  if (rows > before) table_VD.narrow(0, before, rows - before).copy_(mean_D.unsqueeze(0).expand({rows - before, width}));
  for (const NewToken& token : tokens) {
    at::Tensor row_D;
    if (config.init == "random") {
      at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(derive_seed(config.seed, "new token", {static_cast<std::uint64_t>(token.id)}));
      row_D = mean_D + deviation_D * at::randn({width}, generator, at::kFloat);
    } else {
      const at::Tensor pieces_PD = old_VD.index_select(0, at::tensor(token.pieces, at::kLong)).to(at::kFloat);
      row_D = pieces_PD.mean(0);
      if (config.init == "mean-norm") {
        const double norm = at::linalg_vector_norm(row_D).item<double>();
        if (norm > 0) row_D = row_D * (at::linalg_vector_norm(pieces_PD, 2, at::IntArrayRef{1}).mean().item<double>() / norm);
      }
    }
    table_VD[token.id].copy_(row_D);
  }
  return table_VD;
}

/// What other readers of the folder know of added tokens besides tokenizer.json, where the base has it.
void note_tokens(const fs::path& folder, const std::vector<NewToken>& tokens, bool special) {
  if (const fs::path path = folder / "tokenizer_config.json"; fs::exists(path)) {
    Json json = read_json_file(path);
    if (json.is_object() && json.contains("added_tokens_decoder") && json["added_tokens_decoder"].is_object()) {
      for (const NewToken& token : tokens)
        json["added_tokens_decoder"][std::to_string(token.id)] = {{"content", token.text}, {"lstrip", false}, {"normalized", !special}, {"rstrip", false}, {"single_word", false}, {"special", special}};
      write_file(path, json.dump(2) + "\n");
    }
  }
  if (const fs::path path = folder / "added_tokens.json"; fs::exists(path)) {
    Json json = read_json_file(path);
    for (const NewToken& token : tokens) json[token.text] = token.id;
    write_file(path, json.dump(2) + "\n");
  }
}

Json described(const std::vector<NewToken>& tokens) {
  Json list = Json::array();
  for (const NewToken& token : tokens) list.push_back({{"text", token.text}, {"id", token.id}, {"pieces", token.pieces}});
  return list;
}

CardInfo card_of(const ExtendConfig& config, const ExtendReport& report) {
  CardInfo card;
  const std::string base_name = config.base_name.empty() ? fs::absolute(config.base).lexically_normal().filename().string() : config.base_name;
  const std::size_t num = report.tokens.size();
  card.title = config.name.empty() ? report.output.filename().string() : config.name;
  card.summary = "The weights of " + base_name + " with " + std::to_string(num) + (num == 1 ? " token" : " tokens") +
                 " added to its vocabulary. Nothing was trained: the new rows wait for a training run; what the model makes of other text is unchanged.";
  card.licence = card.base_licence = licence_of_model(config.base);
  card.base_models = {base_name};
  card.base_relation = "finetune";
  const std::string origin = config.init == "random" ? "normal, with each column's mean and deviation over the old rows"
                             : config.init == "mean" ? "the mean of the rows of the pieces that the old tokenizer makes of the text"
                                                     : "the mean of the rows of the pieces that the old tokenizer makes of the text, scaled to their mean norm";
  card.origin = {{"rows of embedding and head before", std::to_string(report.rows_before)}, {"now", std::to_string(report.rows)}, {"first new rows", origin},
                 {"new tokens are special", config.special ? "yes" : "no"}};
  for (std::size_t i = 0; i < num && i < kMostShown; ++i) card.origin.emplace_back("token " + std::to_string(report.tokens[i].id), report.tokens[i].text);
  if (num > kMostShown) card.origin.emplace_back("further tokens", std::to_string(num - kMostShown) + ", listed in manifest.json");
  return card;
}

}  // namespace

Json ExtendReport::json() const {
  return {{"output", output.string()}, {"already_done", already_done}, {"tokens", described(tokens)}, {"rows_before", rows_before}, {"rows", rows}, {"head_tied", head_tied}, {"warnings", warnings}};
}

ExtendReport extend_folder(const ExtendConfig& given) {
  ExtendConfig config = given;
  if (config.init != "mean" && config.init != "mean-norm" && config.init != "random") fail(ErrorKind::kUsage, "init: \"", config.init, "\" must be mean, mean-norm or random");
  if (config.pad_to_multiple < 1 || config.pad_to_multiple > 1 << 20) fail(ErrorKind::kUsage, "pad_to_multiple: ", config.pad_to_multiple, " must be from 1 to ", 1 << 20);
  config.output = fs::absolute(config.output).lexically_normal();
  if (!config.output.has_filename()) config.output = config.output.parent_path();

  const FolderTensors base(config.base);
  const models::ModelConfig model = models::read_model_config(config.base);
  const data::Tokenizer tokenizer = data::Tokenizer::from_file(config.base);
  const std::int64_t used = tokenizer.vocabulary_size();
  if (used > model.vocabulary_size)
    fail(ErrorKind::kData, config.base.string(), ": tokenizer.json has ", used, " tokens, the model only ", model.vocabulary_size, " rows", Remedy{"tokenizer and weights belong to different versions: fetch the folder again"});

  ExtendReport report;
  report.output = config.output;
  report.rows_before = model.vocabulary_size;
  report.tokens = checked_tokens(config, tokenizer);
  const std::string extended_json = tokenizer.extended_json(config.tokens, config.special);
  const data::Tokenizer extended = data::Tokenizer::from_json(extended_json, (config.output / "tokenizer.json").string());
  find_tokens(extended, report.tokens);
  const std::int64_t needed = std::max<std::int64_t>(model.vocabulary_size, extended.vocabulary_size());
  report.rows = (needed + config.pad_to_multiple - 1) / config.pad_to_multiple * config.pad_to_multiple;

  const Json inputs = {{"alambic", alambic_version()}, {"base", base.hash()}, {"tokenizer", sha256_of_file(config.base / "tokenizer.json")}, {"tokens", sha256_of(to_line(Json(config.tokens)))},
                       {"special", config.special}, {"init", config.init}, {"pad_to_multiple", config.pad_to_multiple}, {"seed", config.seed}, {"name", config.name}, {"base_name", config.base_name}};
  std::string head_name;
  {
    models::Decoder names = models::make_decoder(model);
    head_name = names.linears().back().path + ".weight";
  }
  const std::string embedding_name = models::expected_shapes(model).front().first;
  report.head_tied = model.tied_head;
  const auto grows = [&](const std::string& name) { return name == embedding_name || name == head_name; };
  if (fs::exists(fs::symlink_status(config.output))) {
    const fs::path manifest_path = config.output / "manifest.json";
    const Json manifest = fs::exists(manifest_path) ? read_json_file(manifest_path) : Json();
    if (!manifest.is_object() || manifest.value("made", "") != kMade || manifest.value("inputs", Json()) != inputs)
      fail(ErrorKind::kUsage, config.output.string(), " exists and is another folder than this extension would make", Remedy{"choose another output, or remove it"});
    check_manifest(config.output);
    report.already_done = true;
    log_info(config.output.string(), ": this extension is done and whole");
    return report;
  }

  std::vector<TensorToWrite> tensors;
  std::uint64_t num_bytes = 0;
  for (const std::string& name : base.names()) {
    std::vector<std::int64_t> shape = base.shape(name);
    if (grows(name)) {
      if (shape != std::vector<std::int64_t>{model.vocabulary_size, model.hidden_size} || !at::isFloatingType(base.type(name)))
        fail(ErrorKind::kData, config.base.string(), ": tensor \"", name, "\" is ", toString(base.type(name)), " ", to_line(Json(shape)), ", must be of a floating type and [", model.vocabulary_size, ", ",
             model.hidden_size, "]");
      shape[0] = report.rows;
    }
    std::uint64_t count = 1;
    for (const std::int64_t size : shape) count *= static_cast<std::uint64_t>(size);
    num_bytes += count * c10::elementSize(base.type(name));
    tensors.push_back({name, base.type(name), shape});
  }
  if (!base.contains(embedding_name)) fail(ErrorKind::kData, config.base.string(), ": holds no tensor \"", embedding_name, "\"");
  constexpr std::uint64_t kOtherFiles = 64ull << 20;
  if (const std::uint64_t free = free_bytes(config.output); free < num_bytes + kOtherFiles)
    fail(ErrorKind::kResource, config.output.string(), ": ", free / 1'000'000, " MB are free, ", (num_bytes + kOtherFiles) / 1'000'000, " MB are needed", Remedy{"free space, or choose another output"});

  const TemporaryFolder temporary(config.output);
  copy_companions(config.base, temporary.path());
  write_file(temporary.path() / "tokenizer.json", extended_json);
  note_tokens(temporary.path(), report.tokens, config.special);
  Json model_json = read_json_file(temporary.path() / "config.json");
  model_json["vocab_size"] = report.rows;
  write_file(temporary.path() / "config.json", model_json.dump(2) + "\n");
  const auto written_tensor = [&](const std::string& name) { return grows(name) ? extended_table(base.tensor(name), report.tokens, report.rows, used, config) : base.tensor(name); };
  const auto written = write_weights(temporary.path(), tensors, [&](std::size_t i) { return written_tensor(tensors[i].name); });

  // What lies on the disk now, read as any other model folder.
  if (models::read_model_config(temporary.path()).vocabulary_size != report.rows) fail(ErrorKind::kBug, "the written config.json does not say how many tokens there are");
  if (data::Tokenizer::from_file(temporary.path()).hash() != extended.hash()) fail(ErrorKind::kBug, "the written tokenizer.json is another");
  const FolderTensors again(temporary.path());
  for (const TensorToWrite& tensor : tensors)
    if (!at::equal(again.tensor(tensor.name), written_tensor(tensor.name)))
      fail(ErrorKind::kResource, temporary.path().string(), ": tensor \"", tensor.name, "\" does not read as it was written", Remedy{"the disk does not keep what is written to it; use another one"});

  const CardInfo card = card_of(config, report);
  report.warnings = licence_warnings(card);
  for (const std::string& warning : report.warnings) log_warning(warning);
  write_file(temporary.path() / "README.md", model_card(card));
  write_manifest(temporary.path(), {{"made", kMade}, {"inputs", inputs}, {"tokens", described(report.tokens)}}, written);
  commit_folder(temporary.path(), config.output);
  return report;
}

}  // namespace alambic::checkpoints
