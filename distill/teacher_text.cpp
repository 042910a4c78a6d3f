// SPDX-License-Identifier: Apache-2.0
#include "distill/teacher_text.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <optional>
#include <set>
#include <string>

#include "checkpoints/hf_folder.h"
#include "checkpoints/licence.h"
#include "checkpoints/peft_folder.h"
#include "core/config.h"
#include "core/error.h"
#include "core/files.h"
#include "core/log.h"
#include "core/random.h"
#include "data/chat_template.h"
#include "data/record_format.h"
#include "data/text_reader.h"
#include "data/token_store.h"
#include "data/tokenizer.h"
#include "distill/distill.h"
#include "models/generate.h"
#include "train/device.h"
#include "train/run_folder.h"

namespace alambic::distill {
namespace {

constexpr int kRun = 4;  // tokens that count as one repetition

struct TextPrompt {
  std::vector<std::int64_t> ids;
  Json given;            // what "prompt" of the corpus is: text, or a list of messages
  Json tools = nullptr;
  bool is_chat() const { return given.is_array(); }
};

struct Answer {
  std::string text;
  double log_probability = 0;  // mean of a token
};

// The answer as the text that goes on from the prompt: where decoding takes a word's space off the beginning, it is not the beginning here.
std::string answer_of(const data::Tokenizer& tokenizer, const TextPrompt& prompt, const std::vector<std::uint32_t>& ids) {
  const std::string alone = tokenizer.decode(ids, true);
  if (prompt.is_chat()) return alone;
  std::vector<std::uint32_t> all(prompt.ids.begin(), prompt.ids.end());
  const std::string before = tokenizer.decode(all, true);
  all.insert(all.end(), ids.begin(), ids.end());
  const std::string whole = tokenizer.decode(all, true);
  return whole.starts_with(before) ? whole.substr(before.size()) : alone;
}

std::vector<std::int64_t> wide(const std::vector<std::uint32_t>& ids) { return {ids.begin(), ids.end()}; }

// Prompts one after the other; nullopt: there are no more. What cannot be used is counted in `dropped`.
class Prompts {
 public:
  Prompts(const DistillConfig& config, const data::Tokenizer& tokenizer, Json& dropped) : config_(config), tokenizer_(tokenizer), dropped_(dropped) {
    if (config.generate.prompts.empty()) {
      for (const train::MixtureItem& item : config.train.data.mixture) {
        stores_.emplace_back(item.store);
        if (stores_.back().info().tokenizer_hash != tokenizer.hash())
          fail(ErrorKind::kData, item.store.string(), ": was made with another tokenizer than that of the teacher ", config.distill.teachers[0].model.string(),
               Remedy{"give the prompts as text: generate.prompts"});
      }
      return;
    }
    const std::optional<data::FileKind> kind = data::file_kind(config.generate.prompts);
    if (kind != data::FileKind::kJsonLines && kind != data::FileKind::kParquet)
      fail(ErrorKind::kUsage, "generate.prompts: ", config.generate.prompts.string(), ": must be JSON lines or Parquet by its ending", Remedy{"name a .jsonl or .parquet file"});
    records_ = std::make_unique<data::RecordReader>(config.generate.prompts, 0);
    chat_ = data::read_chat_template(config.distill.teachers[0].model);
  }

  std::optional<TextPrompt> next() { return records_ ? next_of_records() : next_of_stores(); }

  Json provenance() const {
    if (records_) return {{"file", config_.generate.prompts.string()}, {"sha256", sha256_of_file(config_.generate.prompts)}};
    Json all = Json::array();
    for (const data::TokenStore& store : stores_) {
      Json sources = Json::array();
      for (const data::SourceInfo& source : store.info().sources) sources.push_back({{"name", source.name}, {"origin", source.origin}, {"licence", source.licence}, {"language", source.language}});
      all.push_back({{"store", store.folder().string()}, {"hash", store.hash()}, {"sources", sources}});
    }
    return all;
  }

 private:
  std::optional<TextPrompt> next_of_records() {
    const std::optional<data::Record> record = records_->next();
    if (!record) return std::nullopt;
    const std::string where = config_.generate.prompts.string() + ":" + std::to_string(record->line);
    Json json = parse_json(record->text, where);
    if (!json.is_object()) fail(ErrorKind::kData, where, ": must be a JSON object, got ", json.type_name());
    TextPrompt prompt;
    if (json.contains("prompt") && !json.contains("completion") && !json.contains("chosen") && json["prompt"].is_array()) json["messages"] = json["prompt"], json.erase("prompt");
    if (json.contains("prompt") && json["prompt"].is_string()) {
      prompt.given = json["prompt"];
    } else {
      const data::Example example = data::read_example(json, data::detect_format({json}, {}, where), {}, where);
      if (!example.is_chat()) fail(ErrorKind::kData, where, ": plain text has no prompt", Remedy{"name the prompt \"prompt\", or give a conversation"});
      prompt.given = example.messages, prompt.tools = example.tools;
      if (example.first_trained_message > 0) prompt.given.erase(prompt.given.begin() + static_cast<std::ptrdiff_t>(example.first_trained_message), prompt.given.end());
      else if (prompt.given.back()["role"] == "assistant") prompt.given.erase(prompt.given.size() - 1);
      if (prompt.given.back()["role"] == "assistant") fail(ErrorKind::kData, where, ": the prompt ends with an answer");
      if (!chat_) fail(ErrorKind::kData, config_.distill.teachers[0].model.string(), ": the teacher has no chat template, and ", where, " is a conversation", Remedy{"give texts as \"prompt\""});
    }
    prompt.ids = wide(prompt.is_chat() ? tokenizer_.encode(chat_->render(prompt.given, prompt.tools, true).text, false) : tokenizer_.encode(prompt.given.get<std::string>(), true));
    if (prompt.ids.empty()) fail(ErrorKind::kData, where, ": the prompt has no tokens");
    return prompt;
  }

  std::optional<TextPrompt> next_of_stores() {
    for (; store_ < stores_.size(); ++store_, document_ = 0)
      while (document_ < stores_[store_].num_documents()) {
        const data::Document document = stores_[store_].read(document_++);
        const auto first = static_cast<std::size_t>(std::find(document.mask.begin(), document.mask.end(), 1) - document.mask.begin());
        if (first == document.mask.size()) continue;
        const std::size_t length = first > 1 ? first : std::min<std::size_t>(static_cast<std::size_t>(config_.distill.on_policy.prompt_tokens), document.ids.size() - 1);
        const std::vector<std::uint32_t> ids(document.ids.begin(), document.ids.begin() + static_cast<std::ptrdiff_t>(length));
        // The corpus is text: what it is tokenised to must be these ids again, of which the first may be the tokenizer's own.
        for (const std::size_t skipped : {0u, 1u}) {
          if (skipped == ids.size()) break;
          const std::string text = tokenizer_.decode(std::span(ids).subspan(skipped), false);
          if (tokenizer_.encode(text, true) == ids) return TextPrompt{.ids = wide(ids), .given = text};
        }
        dropped_["prompt_is_no_text"] = dropped_["prompt_is_no_text"].get<std::int64_t>() + 1;
      }
    return std::nullopt;
  }

  const DistillConfig& config_;
  const data::Tokenizer& tokenizer_;
  Json& dropped_;
  std::vector<data::TokenStore> stores_;
  std::size_t store_ = 0;
  std::uint64_t document_ = 0;
  std::unique_ptr<data::RecordReader> records_;
  std::optional<data::ChatTemplate> chat_;
};

void check_text(const DistillConfig& config) {
  const TeacherTextConfig& text = config.generate;
  if (config.distill.teachers.size() != 1) fail(ErrorKind::kUsage, "distill.teachers: one teacher writes the corpus, ", config.distill.teachers.size(), " are named");
  if (text.output.empty()) fail(ErrorKind::kUsage, "generate.output is missing", Remedy{"name the file of JSON lines to write"});
  if (std::filesystem::exists(text.output)) fail(ErrorKind::kUsage, "generate.output: ", text.output.string(), " exists", Remedy{"remove it, or name another"});
  if (text.keep > text.samples) fail(ErrorKind::kUsage, "generate.keep is ", text.keep, ", more than generate.samples, ", text.samples);
  if (text.temperature == 0 && text.samples > 1) fail(ErrorKind::kUsage, "generate.temperature is 0, so the ", text.samples, " samples would be the same", Remedy{"set generate.samples to 1"});
  if (text.min_tokens > text.max_new_tokens) fail(ErrorKind::kUsage, "generate.min_tokens is ", text.min_tokens, ", more than generate.max_new_tokens, ", text.max_new_tokens);
  if (text.prompts.empty() && config.train.data.mixture.empty()) fail(ErrorKind::kUsage, "generate.prompts is empty, and data.mixture has no store to take prompts from");
}

}  // namespace

void TeacherTextConfig::visit(FieldVisitor& fields) {
  fields.field("prompts", prompts, {.help = "JSON lines or Parquet: \"prompt\", or any format of conversations, of which the last answer is made anew; empty: the prompts of data.mixture"});
  fields.field("output", output, {.help = "JSON lines of prompt and completion, which prepare reads; terms and counts go to <output>.provenance.json"});
  fields.field("samples", samples, {.help = "answers drawn for each prompt", .low = 1, .high = 1024});
  fields.field("keep", keep, {.help = "of these, the likeliest by the teacher's mean log-probability of a token", .low = 1, .high = 1024});
  fields.field("temperature", temperature, {.help = "of the draws; 0: the likeliest tokens", .low = 0, .high = 100});
  fields.field("top_p", top_p, {.help = "draw among the likeliest tokens that together reach this probability; 1: among all", .low = 0, .high = 1});
  fields.field("min_tokens", min_tokens, {.help = "shorter answers are left out; the stop token counts", .unit = "tokens", .low = 1, .high = 1 << 20});
  fields.field("max_new_tokens", max_new_tokens, {.help = "longest answer", .unit = "tokens", .low = 1, .high = 1 << 20});
  fields.field("whole_answers", whole_answers, {.help = "leave out answers that did not end with a stop token"});
  fields.field("max_repetition", max_repetition, {.help = "leave out answers of whose runs of four tokens a larger share occurred before in it", .low = 0, .high = 1});
  fields.field("max_prompts", max_prompts, {.help = "0: all", .low = 0, .high = 1e12});
  fields.field("batch", batch, {.help = "answers that are written at once", .low = 1, .high = 4096});
}

double repetition(const std::vector<std::int64_t>& ids) {
  if (ids.size() < kRun) return 0;
  std::set<std::array<std::int64_t, kRun>> seen;
  const std::size_t runs = ids.size() - kRun + 1;
  for (std::size_t i = 0; i < runs; ++i) {
    std::array<std::int64_t, kRun> run{};
    std::copy_n(ids.begin() + static_cast<std::ptrdiff_t>(i), kRun, run.begin());
    seen.insert(run);
  }
  return 1 - static_cast<double>(seen.size()) / static_cast<double>(runs);
}

Json write_teacher_text(const DistillConfig& given, const std::function<bool()>& stop_requested) {
  const at::NoGradGuard constant;
  check_text(given);
  DistillConfig config = given;
  config.train = train::on_processor(given.train, "distill --generate");
  train::use_threads(config.train);
  const TeacherTextConfig& text = config.generate;
  const TeacherConfig& teacher = config.distill.teachers[0];
  if (teacher.model.empty()) fail(ErrorKind::kUsage, "distill --generate: ", teacher.cache.string(), " is a cache, which writes no text", Remedy{"give the teacher's model"});
  const data::Tokenizer tokenizer = data::Tokenizer::from_file(teacher.model);
  Json dropped = {{"prompt_is_no_text", 0}, {"prompt_too_long", 0}, {"not_ended", 0}, {"too_short", 0}, {"empty", 0}, {"repetitive", 0}, {"duplicate", 0}, {"less_likely", 0}};
  const auto drop = [&](const char* why) { dropped[why] = dropped[why].get<std::int64_t>() + 1; };
  Prompts prompts(config, tokenizer, dropped);
  const std::string sha256 = checkpoints::base_hash(teacher.model);
  models::Decoder decoder = checkpoints::load_decoder(teacher.model, train::compute_type_of(config.train),
                                                      teacher.quantize == "auto" ? lora::BaseQuantization{} : lora::BaseQuantization{.format = teacher.quantize, .double_quant = config.train.nf4_double_quant});
  if (!teacher.adapter.empty()) checkpoints::load_adapter(decoder, teacher.adapter, sha256);

  AtomicFile file(text.output);
  std::set<std::string> written;  // hashes of prompt and answer
  std::int64_t num_prompts = 0, num_samples = 0, num_kept = 0, num_tokens = 0;
  const models::Sampling sampling{.temperature = text.temperature, .top_p = text.top_p};
  bool more = true;
  while (more) {
    // As many prompts as fill a batch, at least one; all samples of a prompt are made together.
    std::vector<TextPrompt> asked;
    std::vector<models::Prompt> batch;
    while (asked.empty() || static_cast<std::int64_t>(asked.size() + 1) * text.samples <= text.batch) {
      std::optional<TextPrompt> prompt = text.max_prompts > 0 && num_prompts == text.max_prompts ? std::nullopt : prompts.next();
      if (!prompt) {
        more = false;
        break;
      }
      const auto number = static_cast<std::uint64_t>(num_prompts++);
      std::int64_t most = text.max_new_tokens;
      if (decoder.config.max_positions > 0) most = std::min(most, decoder.config.max_positions - static_cast<std::int64_t>(prompt->ids.size()));
      if (most < text.min_tokens) {
        drop("prompt_too_long");
        continue;
      }
      for (std::int64_t sample = 0; sample < text.samples; ++sample)
        batch.push_back({.ids = prompt->ids, .seed = derive_seed(config.train.seed, "teacher text", {number, static_cast<std::uint64_t>(sample)}), .max_new_tokens = most});
      asked.push_back(std::move(*prompt));
    }
    std::vector<models::Continuation> drawn;  // in parts of a batch, where the samples of one prompt are more
    for (std::size_t first = 0; first < batch.size(); first += static_cast<std::size_t>(text.batch)) {
      if (stop_requested()) fail(ErrorKind::kStopped, "stopped behind ", num_prompts, " prompts; nothing is written");
      const std::size_t count = std::min(static_cast<std::size_t>(text.batch), batch.size() - first);
      const std::vector<models::Prompt> part(batch.begin() + static_cast<std::ptrdiff_t>(first), batch.begin() + static_cast<std::ptrdiff_t>(first + count));
      for (models::Continuation& one : models::generate_many(decoder, part, sampling, decoder.config.eos_ids, true)) drawn.push_back(std::move(one));
    }
    for (std::size_t i = 0; i < asked.size(); ++i) {
      std::vector<Answer> answers;
      for (std::int64_t sample = 0; sample < text.samples; ++sample, ++num_samples) {
        const models::Continuation& one = drawn[i * static_cast<std::size_t>(text.samples) + static_cast<std::size_t>(sample)];
        const auto length = static_cast<std::int64_t>(one.ids.size());
        num_tokens += length;
        if (!std::isfinite(one.sum_log_probability)) fail(ErrorKind::kNumerics, teacher.model.string(), ": the log-probability of an answer is ", one.sum_log_probability);
        if (text.whole_answers && !one.stopped) { drop("not_ended"); continue; }
        if (length < text.min_tokens) { drop("too_short"); continue; }
        if (repetition(one.ids) > text.max_repetition) { drop("repetitive"); continue; }
        const std::vector<std::uint32_t> ids(one.ids.begin(), one.ids.end() - (one.stopped ? 1 : 0));
        const std::string answer = answer_of(tokenizer, asked[i], ids);
        if (answer.find_first_not_of(" \t\r\n") == std::string::npos) { drop("empty"); continue; }
        if (!written.insert(sha256_of(to_line(asked[i].given) + "\n" + answer)).second) { drop("duplicate"); continue; }
        answers.push_back({.text = answer, .log_probability = one.sum_log_probability / static_cast<double>(length)});
      }
      std::stable_sort(answers.begin(), answers.end(), [](const Answer& a, const Answer& b) { return a.log_probability > b.log_probability; });
      for (std::size_t rank = 0; rank < answers.size(); ++rank) {
        if (rank >= static_cast<std::size_t>(text.keep)) { drop("less_likely"); continue; }
        const Json answer = asked[i].is_chat() ? Json::array({{{"role", "assistant"}, {"content", answers[rank].text}}}) : Json(answers[rank].text);
        Json line = {{"prompt", asked[i].given}, {"completion", answer}};
        if (!asked[i].tools.is_null()) line["tools"] = asked[i].tools;
        file.write(to_line(line) + "\n");
        ++num_kept;
      }
    }
    log_info("teacher text: ", num_prompts, " prompts, ", num_samples, " samples of ", num_tokens, " tokens, ", num_kept, " kept");
  }
  Json provenance = {{"version", 1},
                     {"teacher", {{"folder", teacher.model.string()}, {"sha256", sha256}, {"licence", checkpoints::licence_of_model(teacher.model).spdx}, {"quantize", teacher.quantize}}},
                     {"prompts", prompts.provenance()},
                     {"settings", resolved_config(text)},
                     {"seed", config.train.seed},
                     {"compute_type", toString(train::compute_type_of(config.train))},
                     {"counts", {{"prompts", num_prompts}, {"samples", num_samples}, {"tokens", num_tokens}, {"kept", num_kept}, {"dropped", dropped}}}};
  if (!teacher.adapter.empty()) provenance["teacher"]["adapter"] = teacher.adapter.string(), provenance["teacher"]["adapter_sha256"] = sha256_of_file(teacher.adapter / "adapter_model.safetensors");
  if (num_kept == 0) fail(ErrorKind::kData, "no answer of ", num_samples, " was kept: ", to_line(dropped), Remedy{"raise generate.max_new_tokens, or loosen the filters"});
  provenance["sha256"] = file.commit();
  write_file(text.output.string() + ".provenance.json", provenance.dump(2) + "\n");
  return provenance;
}

}  // namespace alambic::distill
