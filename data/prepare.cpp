// SPDX-License-Identifier: Apache-2.0
#include "data/prepare.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <deque>
#include <exception>
#include <future>
#include <iomanip>
#include <mutex>
#include <set>
#include <sstream>
#include <thread>

#include "core/error.h"
#include "core/files.h"
#include "core/log.h"
#include "data/loss_mask.h"
#include "data/record_format.h"
#include "data/text_reader.h"

namespace alambic::data {

void SourceConfig::visit(FieldVisitor& fields) {
  fields.field("name", name, {.help = "short name, unique in the store", .required = true});
  fields.field("paths", paths, {.help = "files, folders or patterns: .txt .md .jsonl (also .gz, .zst) .parquet", .required = true});
  fields.field("format", format, {.help = "how records are read; auto tells from the columns", .choices = {"auto", "text", "markdown", "messages", "sharegpt", "alpaca", "completion", "preference"}});
  fields.field("licence", licence, {.help = "SPDX expression of the text's licence; empty: unknown"});
  fields.field("origin", origin, {.help = "where the text comes from: URL or package"});
  fields.field("language", language, {.help = "BCP 47 code; empty: unknown"});
  fields.field("columns", columns, {.help = "wanted column: found column, where a data set names them otherwise"});
  fields.field("preference", preference, {.help = "chosen: train on the chosen answers of preference data", .choices = {"refuse", "chosen"}});
}

void PrepareConfig::visit(FieldVisitor& fields) {
  fields.field("tokenizer", tokenizer, {.help = "model folder (or tokenizer.json) whose tokenizer and chat template are used", .required = true});
  fields.field("output", output, {.help = "folder of the token store", .required = true});
  fields.list("sources", sources, {.help = "the texts", .required = true});
  fields.field("chat_template", chat_template, {.help = "Jinja file used instead of the model's chat template"});
  fields.field("train_on", train_on, {.help = "roles whose messages are trained: content and end marker, not the header"});
  fields.field("begin_token", begin_token, {.help = "of plain text: auto (as the tokenizer does), always, never", .choices = {"auto", "always", "never"}});
  fields.field("end_token", end_token, {.help = "end plain text and completions with the model's end-of-text token"});
  fields.field("document_bytes", document_bytes, {.help = "cut plain text at blank lines into documents of about this size; 0: never", .unit = "bytes", .low = 0, .high = 64 << 20});
  fields.field("holdout_every", holdout_every, {.help = "put every n-th document of a source into the hold-out store; 0: none", .low = 0, .high = 1e9});
  fields.field("holdout_output", holdout_output, {.help = "folder of the hold-out store; empty: OUTPUT-holdout"});
  fields.field("tokens_per_shard", tokens_per_shard, {.help = "size of a shard, the unit of resuming", .unit = "tokens", .low = 1, .high = 1 << 30});
  fields.field("threads", threads, {.help = "of tokenisation; 0: one a processor", .low = 0, .high = 1024});
  fields.field("max_bad", max_bad, {.help = "bad records to set aside before giving up", .low = 0, .high = 1e12});
  fields.field("allow_all_trained", allow_all_trained, {.help = "accept conversations or completions in which every token is trained"});
  fields.field("allow_none_trained", allow_none_trained, {.help = "accept documents and sources in which no token is trained"});
  fields.field("shard", shard, {.help = "i/n: this process prepares part i of n, counted from 0"});
}

double PrepareReport::tokens_per_word() const { return totals.words ? static_cast<double>(totals.tokens) / static_cast<double>(totals.words) : 0; }
double PrepareReport::bytes_per_token() const { return totals.trained_tokens ? static_cast<double>(totals.bytes) / static_cast<double>(totals.trained_tokens) : 0; }

namespace {

constexpr std::size_t kAuditRecords = 200, kAuditBytes = 1 << 20, kDetectRecords = 16;
constexpr std::size_t kJobRecords = 64, kJobBytes = 256 << 10;
constexpr std::size_t kSampleBytes = 3000;

struct Part {
  std::uint32_t index = 0, count = 1;
};

Part parse_part(const std::string& text) {
  Part part;
  const char* end = text.data() + text.size();
  const auto [slash, first_problem] = std::from_chars(text.data(), end, part.index);
  if (first_problem == std::errc() && slash != end && *slash == '/') {
    const auto [rest, problem] = std::from_chars(slash + 1, end, part.count);
    if (problem == std::errc() && rest == end && part.index < part.count) return part;
  }
  fail(ErrorKind::kUsage, "shard: must be i/n with 0 <= i < n, got \"", text, "\"");
}

// One source, its files found and its format known.
struct Source {
  const SourceConfig* config = nullptr;
  std::vector<fs::path> files;
  bool plain = false;  // plain text: every record is a document
  RecordFormat format = RecordFormat::kText;
};

bool is_plain(const fs::path& file) {
  const auto kind = file_kind(file);
  return kind == FileKind::kText || kind == FileKind::kMarkdown;
}

// All records of a source in order, file after file.
class SourceRecords {
 public:
  SourceRecords(const Source& source, std::uint64_t document_bytes) : source_(source), document_bytes_(document_bytes) {}
  std::optional<Record> next(std::string& where) {
    for (; file_ < source_.files.size(); ++file_, reader_.reset()) {
      if (!reader_) reader_.emplace(source_.files[file_], document_bytes_);
      if (std::optional<Record> record = reader_->next()) {
        where = source_.files[file_].string() + ":" + std::to_string(record->line);
        return record;
      }
    }
    return std::nullopt;
  }
  const fs::path& file() const { return source_.files[file_]; }

 private:
  const Source& source_;
  std::uint64_t document_bytes_;
  std::size_t file_ = 0;
  std::optional<RecordReader> reader_;
};

bool blank(const std::string& text) { return text.find_first_not_of(" \t\n") == std::string::npos; }

Example example_of(const Source& source, const Record& record, const std::string& where) {
  if (!source.plain) return read_example(parse_json(record.text, where), source.format, source.config->columns, where);
  Example example;
  example.text = record.text;
  return example;
}

Source find_source(const SourceConfig& config) {
  const std::string where = "source \"" + config.name + "\"";
  Source source{.config = &config, .files = find_text_files(config.paths)};
  source.plain = is_plain(source.files[0]);
  for (const fs::path& file : source.files)
    if (is_plain(file) != source.plain)
      fail(ErrorKind::kUsage, where, ": mixes plain text and records: ", source.files[0].string(), " and ", file.string(), Remedy{"make two sources of it"});
  const bool wants_plain = config.format == "markdown";
  if (source.plain && config.format != "auto" && config.format != "text" && config.format != "markdown")
    fail(ErrorKind::kUsage, where, ": format: ", config.format, ", but ", source.files[0].string(), " is plain text");
  if (!source.plain && wants_plain) fail(ErrorKind::kUsage, where, ": format: markdown, but ", source.files[0].string(), " holds records");
  return source;
}

// Decides the format from the first records. Those that are no JSON count as bad later, where max_bad is known.
void detect(Source& source, SourceReport& report) {
  const SourceConfig& config = *source.config;
  const std::string where = "source \"" + config.name + "\"";
  for (const fs::path& file : source.files) report.files.push_back(file.string());
  if (source.plain) {
    const bool markdown = std::all_of(source.files.begin(), source.files.end(), [](const fs::path& file) { return file_kind(file) == FileKind::kMarkdown; });
    report.format = markdown || config.format == "markdown" ? "markdown" : "text";
    return;
  }
  SourceRecords records(source, 0);
  std::vector<Json> first;
  std::string record_where, first_problem;
  while (first.size() < kDetectRecords) {
    const std::optional<Record> record = records.next(record_where);
    if (!record) break;
    try {
      Json json = parse_json(record->text, record_where);
      if (!json.is_object()) fail(ErrorKind::kData, record_where, ": must be a JSON object, got ", json.type_name());
      first.push_back(std::move(json));
    } catch (const Error& error) {
      if (first_problem.empty()) first_problem = error.what();
    }
  }
  if (first.empty() && !first_problem.empty()) fail(ErrorKind::kData, first_problem);
  if (config.format == "auto") {
    source.format = detect_format(first, config.columns, where);
  } else {
    for (const RecordFormat format : {RecordFormat::kText, RecordFormat::kMessages, RecordFormat::kShareGpt, RecordFormat::kAlpaca, RecordFormat::kCompletion, RecordFormat::kPreference})
      if (format_name(format) == config.format) source.format = format;
  }
  report.format = std::string(format_name(source.format));
  if (source.format == RecordFormat::kPreference && config.preference != "chosen")
    fail(ErrorKind::kUsage, where, ": preference data (chosen and rejected answers), and preference losses are not there yet",
         Remedy{"set preference: chosen to train on the chosen answers, or another format"});
  std::set<std::string> seen;
  for (const Json& record : first)
    for (const std::string& name : unused_columns(record, source.format, config.columns))
      if (seen.insert(name).second) report.ignored_columns.push_back(name);
  if (!report.ignored_columns.empty()) {
    std::string names;
    for (const std::string& name : report.ignored_columns) names += (names.empty() ? "" : ", ") + name;
    log_info(where, ": columns not used: ", names);
  }
}

std::vector<SamplePiece> sample_of(const EncodedExample& encoded, const Tokenizer& tokenizer) {
  std::vector<SamplePiece> pieces;
  std::size_t from = 0;
  for (std::size_t i = 0; i < encoded.document.ids.size(); ++i) {
    const std::size_t end = encoded.end_byte[i];
    std::string text = encoded.text.substr(from, end - from);
    if (end == from && (i == 0 || i + 1 == encoded.document.ids.size())) text = tokenizer.token_of(encoded.document.ids[i]).value_or("");  // BOS or EOS
    from = end;
    const bool trained = encoded.document.mask[i] != 0;
    if (pieces.empty() || pieces.back().trained != trained) pieces.push_back({"", trained});
    pieces.back().text += text;
    if (from > kSampleBytes && i + 1 < encoded.document.ids.size()) {
      // The cut may fall inside a character, where two tokens share it.
      while (from < encoded.text.size() && (static_cast<unsigned char>(encoded.text[from]) & 0xC0) == 0x80) pieces.back().text += encoded.text[from++];
      pieces.push_back({" ... (" + std::to_string(encoded.document.ids.size() - i - 1) + " more tokens)", false});
      break;
    }
  }
  return pieces;
}

// Looks at the first documents of a source before anything is written.
void audit(const Source& source, const PrepareConfig& config, const ExampleEncoder& encoder, SourceReport& report) {
  const std::string where = "source \"" + source.config->name + "\"";
  SourceRecords records(source, config.document_bytes);
  std::string record_where;
  std::size_t num_bytes = 0;
  bool all_stop = true, any_answer = false;
  std::uint64_t trained = 0, documents = 0, bad = 0;
  bool all_trained = true;
  while (documents < kAuditRecords && num_bytes < kAuditBytes) {
    const std::optional<Record> record = records.next(record_where);
    if (!record) break;
    if (source.plain && blank(record->text)) continue;
    EncodedExample encoded;
    try {
      const Example example = example_of(source, *record, record_where);
      if (example.is_chat() && !encoder.chat_template())
        fail(ErrorKind::kUsage, where, ": conversations need a chat template, and ", config.tokenizer.string(), " has none", Remedy{"set chat_template to a Jinja file"});
      encoded = encoder.encode(example, record->last_of_file || !source.plain, true, record_where);
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::kData || ++bad > config.max_bad) throw;
      continue;
    }
    ++documents;
    num_bytes += encoded.text.size();
    if (report.sample.empty()) report.sample = sample_of(encoded, encoder.tokenizer());
    std::size_t role = 0;
    for (std::size_t i = 0; i < encoded.document.ids.size(); ++i) {
      while (role < encoded.roles.size() && encoded.end_byte[i] > encoded.roles[role].second) ++role;
      RoleShare& share = report.roles[role < encoded.roles.size() ? encoded.roles[role].first : "template"];
      ++share.tokens;
      share.trained_tokens += encoded.document.mask[i];
      trained += encoded.document.mask[i];
    }
    all_trained &= encoded.all_trained;
    any_answer |= encoded.has_answer;
    if (encoded.has_answer) all_stop &= encoded.all_answers_stop;
  }
  report.audited_documents = documents;
  report.stop_token_included = any_answer && all_stop;
  report.stop_token = encoder.end_token_text();
  if (documents == 0) fail(ErrorKind::kData, where, ": no document in any of its ", source.files.size(), " files");
  std::string roles;
  for (const auto& [name, share] : report.roles) roles += (roles.empty() ? "" : ", ") + name + " " + std::to_string(share.trained_tokens) + " of " + std::to_string(share.tokens);
  if (trained == 0 && !config.allow_none_trained)
    fail(ErrorKind::kUsage, where, ": no token would be trained in its first ", documents, " documents (trained tokens by role: ", roles, ")",
         Remedy{"set train_on to roles that occur, or allow_none_trained: true"});
  const bool is_text = source.plain || source.format == RecordFormat::kText;
  if (!is_text && all_trained && !config.allow_all_trained)
    fail(ErrorKind::kUsage, where, ": every token would be trained, prompts too, in its first ", documents, " documents (trained tokens by role: ", roles, ")",
         Remedy{"check the chat template and train_on, or set allow_all_trained: true"});
  if (!is_text && !report.stop_token_included)
    log_warning(where, ": not every trained answer ends with a stop token, so the model may not learn to stop; {% generation %} blocks should hold it");
}

Json recipe_of(const PrepareConfig& config, const std::vector<Source>& sources, const std::vector<SourceReport>& reports, const ExampleEncoder& encoder, bool holdout) {
  Json recipe = Json::object();
  recipe["train_on"] = config.train_on;
  recipe["begin_token"] = config.begin_token;
  recipe["end_token"] = config.end_token;
  recipe["document_bytes"] = config.document_bytes;
  recipe["holdout_every"] = config.holdout_every;
  recipe["is_holdout"] = holdout;
  recipe["allow_none_trained"] = config.allow_none_trained;
  recipe["chat_template_sha256"] = encoder.chat_template() ? Json(sha256_of(encoder.chat_template()->source)) : Json(nullptr);
  recipe["inputs"] = Json::array();
  for (std::size_t i = 0; i < sources.size(); ++i) {
    Json input = Json::object();
    input["source"] = sources[i].config->name;
    input["format"] = reports[i].format;
    input["columns"] = sources[i].config->columns;
    input["files"] = Json::array();
    // By name and content, not by path: the same texts prepared elsewhere give the same store.
    for (const fs::path& file : sources[i].files) {
      Json entry = Json::object();
      entry["name"] = file.filename().string();
      entry["bytes"] = fs::file_size(file);
      entry["sha256"] = sha256_of_file(file);
      input["files"].push_back(std::move(entry));
    }
    recipe["inputs"].push_back(std::move(input));
  }
  return recipe;
}

// ---- the threads ----

struct Item {
  Record record;
  std::string where;
  std::uint16_t source = 0;
  std::uint64_t position = 0;  // of the record in all inputs
  bool holdout = false;
  bool committed = false;      // in the store already: read for its faults, not tokenised
};

struct Outcome {
  std::optional<EncodedExample> encoded;  // none: bad, blank or committed
  std::string reason;                     // why it is bad
  std::string remedy;
};

using Job = std::vector<Item>;
using Results = std::vector<Outcome>;

// Workers take jobs in order; results are asked for in the same order.
class Workers {
 public:
  Workers(std::size_t count, std::function<Results(const Job&)> work) : work_(std::move(work)) {
    for (std::size_t i = 0; i < count; ++i) threads_.emplace_back([this](const std::stop_token& stop) { run(stop); });
  }
  ~Workers() {
    for (std::jthread& thread : threads_) thread.request_stop();
    wake_.notify_all();
  }
  std::future<Results> submit(const Job& job) {
    std::packaged_task<Results()> task([this, &job] { return work_(job); });
    std::future<Results> results = task.get_future();
    {
      const std::lock_guard guard(mutex_);
      waiting_.push_back(std::move(task));
    }
    wake_.notify_one();
    return results;
  }

 private:
  void run(const std::stop_token& stop) {
    for (;;) {
      std::packaged_task<Results()> task;
      {
        std::unique_lock guard(mutex_);
        if (!wake_.wait(guard, stop, [&] { return !waiting_.empty(); })) return;
        if (stop.stop_requested()) return;
        task = std::move(waiting_.front());
        waiting_.pop_front();
      }
      task();
    }
  }

  std::function<Results(const Job&)> work_;
  std::mutex mutex_;
  std::condition_variable_any wake_;
  std::deque<std::packaged_task<Results()>> waiting_;
  std::vector<std::jthread> threads_;
};

Outcome prepare_item(const Item& item, const Source& source, const ExampleEncoder& encoder) {
  Outcome outcome;
  if (source.plain && (item.committed || blank(item.record.text))) return outcome;
  try {
    const Example example = example_of(source, item.record, item.where);
    // Conversations are rendered also when they are committed: the count of bad records is then that of an unbroken run.
    if (item.committed && example.is_chat()) render_example(example, *encoder.chat_template(), encoder.settings().train_on, false, item.where);
    if (!item.committed) outcome.encoded = encoder.encode(example, item.record.last_of_file || !source.plain, false, item.where);
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::kData) throw;
    outcome.reason = error.what();
    outcome.remedy = error.remedy();
  }
  return outcome;
}

StoreInfo store_info(const PrepareConfig& config, const Tokenizer& tokenizer) {
  StoreInfo info{.tokenizer_hash = tokenizer.hash(), .vocabulary_size = tokenizer.vocabulary_size(), .sources = {}};
  for (const SourceConfig& source : config.sources)
    info.sources.push_back({.name = source.name, .origin = source.origin, .licence = source.licence, .language = source.language});
  return info;
}

void check(const PrepareConfig& config) {
  if (config.output.empty()) fail(ErrorKind::kUsage, "output: no folder is given");
  if (config.tokenizer.empty()) fail(ErrorKind::kUsage, "tokenizer: no model folder is given");
  if (config.sources.empty()) fail(ErrorKind::kUsage, "sources: there is none", Remedy{"list at least one source with name and paths"});
  std::set<std::string> names;
  for (const SourceConfig& source : config.sources) {
    if (source.name.empty()) fail(ErrorKind::kUsage, "sources: a source has no name");
    if (!names.insert(source.name).second) fail(ErrorKind::kUsage, "sources: the name \"", source.name, "\" is given twice");
    if (source.paths.empty()) fail(ErrorKind::kUsage, "source \"", source.name, "\": no paths");
  }
  if (config.train_on.empty() && !config.allow_none_trained) fail(ErrorKind::kUsage, "train_on: empty, so nothing of a conversation would be trained", Remedy{"list roles, or set allow_none_trained: true"});
  for (const std::string& role : config.train_on) {
    const std::vector<std::string> roles = {"system", "developer", "user", "assistant", "tool", "function"};
    if (std::find(roles.begin(), roles.end(), role) == roles.end()) {
      const std::string nearest = nearest_name(role, roles);
      fail(ErrorKind::kUsage, "train_on: unknown role \"", role, "\"", nearest.empty() ? "" : ", did you mean \"" + nearest + "\"?",
           Remedy{"known are system, developer, user, assistant, tool, function"});
    }
  }
  if (config.holdout_every == 1) fail(ErrorKind::kUsage, "holdout_every: 1 would leave nothing to train on");
}

fs::path with_suffix(fs::path path, const std::string& suffix) {
  if (!path.has_filename()) path = path.parent_path();  // "store/"
  path += suffix;
  return path;
}

}  // namespace

PrepareReport prepare(const PrepareConfig& config) {
  check(config);
  const Part part = parse_part(config.shard);
  std::optional<ChatTemplate> chat;
  const fs::path model_folder = fs::is_directory(config.tokenizer) ? config.tokenizer : config.tokenizer.parent_path();
  chat = read_chat_template(model_folder.empty() ? fs::path(".") : model_folder);
  if (!config.chat_template.empty()) {
    if (!chat) chat.emplace().special_tokens = Json::object();
    chat->source = read_file(config.chat_template, 4 << 20);
    chat->name = config.chat_template.string();
  }
  const ExampleEncoder encoder(config.tokenizer, std::move(chat), {.train_on = {config.train_on.begin(), config.train_on.end()}, .begin_token = config.begin_token, .end_token = config.end_token});

  PrepareReport report;
  std::vector<Source> sources;
  for (const SourceConfig& source_config : config.sources) {
    SourceReport source_report;
    source_report.name = source_config.name;
    sources.push_back(find_source(source_config));
    detect(sources.back(), source_report);
    audit(sources.back(), config, encoder, source_report);
    log_info("source \"", source_report.name, "\": format ", source_report.format, ", files: ", source_report.files.size());
    report.sources.push_back(std::move(source_report));
  }

  const StoreInfo info = store_info(config, encoder.tokenizer());
  TokenStoreWriter store(config.output, info, config.tokens_per_shard, part.index, part.count, recipe_of(config, sources, report.sources, encoder, false));
  std::optional<TokenStoreWriter> holdout;
  if (config.holdout_every > 0) {
    const fs::path folder = config.holdout_output.empty() ? with_suffix(config.output, "-holdout") : config.holdout_output;
    holdout.emplace(folder, info, config.tokens_per_shard, part.index, part.count, recipe_of(config, sources, report.sources, encoder, true));
  }
  if (store.complete() && (!holdout || holdout->complete())) {
    log_info(config.output.string(), ": complete already, nothing to do");
    report.totals = store.finish();
    if (holdout) report.holdout = holdout->finish();
    return report;
  }

  const auto started = std::chrono::steady_clock::now();
  auto last_said = started;
  const auto seconds_since = [](auto time) { return std::chrono::duration<double>(std::chrono::steady_clock::now() - time).count(); };
  std::uint64_t text_bytes = 0;
  std::string rejects;
  const auto work = [&](const Job& job) {
    Results results;
    for (const Item& item : job) results.push_back(prepare_item(item, sources[item.source], encoder));
    return results;
  };
  const auto take = [&](const Item& item, Outcome outcome) {
    ++report.records;
    if (!outcome.reason.empty()) {
      if (++report.rejected_records > config.max_bad) {
        if (config.max_bad > 0) outcome.reason += "; with it there are more than max_bad (" + std::to_string(config.max_bad) + ") bad records";
        throw Error(ErrorKind::kData, outcome.reason, outcome.remedy.empty() ? "correct the record, or set max_bad to set such records aside" : outcome.remedy);
      }
      const std::size_t colon = item.where.rfind(':');
      Json reject = Json::object();
      reject["file"] = item.where.substr(0, colon);
      reject["line"] = item.record.line;
      reject["reason"] = outcome.reason;
      rejects += to_line(reject) + "\n";
      return;
    }
    if (!outcome.encoded) return;
    Document& document = outcome.encoded->document;
    document.source = item.source;
    text_bytes += outcome.encoded->text.size();
    if (!config.allow_none_trained && std::find(document.mask.begin(), document.mask.end(), 1) == document.mask.end()) {
      ++report.this_run.untrained_documents;
      return;
    }
    ++report.this_run.documents;
    report.this_run.longest_document = std::max<std::uint64_t>(report.this_run.longest_document, document.ids.size());
    (item.holdout ? *holdout : store).append(document, item.position);
  };

  {
    const std::size_t num_threads = config.threads > 0 ? static_cast<std::size_t>(config.threads) : std::max(1u, std::thread::hardware_concurrency());
    // Declared before the workers, so that what they read outlives them when an error unwinds.
    std::deque<Job> jobs;
    std::deque<std::future<Results>> results;
    Workers workers(num_threads, work);
    const auto collect = [&] {
      Results done = results.front().get();
      for (std::size_t i = 0; i < done.size(); ++i) take(jobs.front()[i], std::move(done[i]));
      results.pop_front();
      jobs.pop_front();
      if (seconds_since(last_said) > 5) {
        last_said = std::chrono::steady_clock::now();
        const double seconds = seconds_since(started);
        const auto tenths = [](double value) { return std::round(value * 10) / 10; };
        log_info("prepared ", report.records, " records, ", tenths(static_cast<double>(text_bytes) / 1e6), " MB, ", tenths(static_cast<double>(text_bytes) / 1e6 / seconds), " MB/s");
      }
    };
    Job job;
    std::size_t job_bytes = 0;
    const auto send = [&] {
      if (job.empty()) return;
      jobs.push_back(std::exchange(job, {}));
      job_bytes = 0;
      results.push_back(workers.submit(jobs.back()));
      if (results.size() > 4 * num_threads) collect();
    };
    std::uint64_t position = 0;
    for (std::size_t s = 0; s < sources.size(); ++s) {
      SourceRecords records(sources[s], config.document_bytes);
      std::string where;
      for (std::uint64_t number = 0;; ++number, ++position) {
        std::optional<Record> record = records.next(where);
        if (!record) break;
        if (position % part.count != part.index) continue;
        Item item{.record = std::move(*record), .where = where, .source = static_cast<std::uint16_t>(s), .position = position};
        item.holdout = config.holdout_every > 0 && number % config.holdout_every == config.holdout_every - 1;
        const TokenStoreWriter& target = item.holdout ? *holdout : store;
        item.committed = target.complete() || (target.committed_position() && position <= *target.committed_position());
        job_bytes += item.record.text.size();
        job.push_back(std::move(item));
        if (job.size() >= kJobRecords || job_bytes >= kJobBytes) send();
      }
    }
    send();
    while (!results.empty()) collect();
  }
  PrepareRun& run = report.this_run;
  run.seconds = seconds_since(started);
  run.megabytes_per_second = static_cast<double>(text_bytes) / 1e6 / std::max(run.seconds, 1e-9);
  if (!rejects.empty()) {
    report.rejects = with_suffix(config.output, part.count > 1 ? "-rejects-" + std::to_string(part.index) + ".jsonl" : "-rejects.jsonl");
    write_file(report.rejects, rejects);
  }
  if (holdout) report.holdout = holdout->finish();
  report.totals = store.finish();
  return report;
}

Json to_json(const PrepareReport& report) {
  const auto totals_json = [](const StoreTotals& totals) {
    Json json = Json::object();
    json["documents"] = totals.documents;
    json["tokens"] = totals.tokens;
    json["trained_tokens"] = totals.trained_tokens;
    json["bytes"] = totals.bytes;
    json["words"] = totals.words;
    return json;
  };
  Json json = Json::object();
  json["sources"] = Json::array();
  for (const SourceReport& source : report.sources) {
    Json one = Json::object();
    one["name"] = source.name;
    one["format"] = source.format;
    one["files"] = source.files;
    one["ignored_columns"] = source.ignored_columns;
    one["sample"] = Json::array();
    for (const SamplePiece& piece : source.sample) {
      Json shown = Json::object();
      shown["text"] = piece.text;
      shown["trained"] = piece.trained;
      one["sample"].push_back(std::move(shown));
    }
    one["audited_documents"] = source.audited_documents;
    one["roles"] = Json::object();
    for (const auto& [name, share] : source.roles) {
      Json role = Json::object();
      role["tokens"] = share.tokens;
      role["trained_tokens"] = share.trained_tokens;
      one["roles"][name] = std::move(role);
    }
    one["stop_token"] = source.stop_token;
    one["stop_token_included"] = source.stop_token_included;
    json["sources"].push_back(std::move(one));
  }
  json["totals"] = totals_json(report.totals);
  json["holdout"] = totals_json(report.holdout);
  json["records"] = report.records;
  json["rejected_records"] = report.rejected_records;
  json["rejects"] = report.rejects.string();
  json["tokens_per_word"] = report.tokens_per_word();
  json["bytes_per_token"] = report.bytes_per_token();
  json["this_run"] = Json::object();
  json["this_run"]["documents"] = report.this_run.documents;
  json["this_run"]["untrained_documents"] = report.this_run.untrained_documents;
  json["this_run"]["longest_document"] = report.this_run.longest_document;
  json["this_run"]["seconds"] = report.this_run.seconds;
  json["this_run"]["megabytes_per_second"] = report.this_run.megabytes_per_second;
  return json;
}

std::string describe(const PrepareReport& report) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(2);
  const auto percent = [](std::uint64_t part, std::uint64_t whole) { return whole ? 100.0 * static_cast<double>(part) / static_cast<double>(whole) : 0.0; };
  for (const SourceReport& source : report.sources) {
    text << "source " << source.name << ": format " << source.format << ", " << source.files.size() << (source.files.size() == 1 ? " file\n" : " files\n");
    if (!source.ignored_columns.empty()) {
      text << "  columns not used:";
      for (const std::string& name : source.ignored_columns) text << ' ' << name;
      text << '\n';
    }
    text << "  first document, what is trained between [[ and ]]:\n    ";
    for (const SamplePiece& piece : source.sample) {
      if (piece.trained) text << "[[";
      for (const char letter : piece.text) text << (letter == '\n' ? "\n    " : std::string(1, letter));
      if (piece.trained) text << "]]";
    }
    text << "\n  trained in the first " << source.audited_documents << " documents:\n";
    for (const auto& [name, share] : source.roles)
      text << "    " << name << (name == "template" ? " (headers and inserted text)" : "") << ": " << share.trained_tokens << " of " << share.tokens << " tokens (" << percent(share.trained_tokens, share.tokens) << " %)\n";
    text << "  stop token included: " << (source.stop_token_included ? "yes" : "no") << '\n';
  }
  const StoreTotals& totals = report.totals;
  text << totals.documents << " documents, " << totals.tokens << " tokens, " << totals.trained_tokens << " of them trained (" << percent(totals.trained_tokens, totals.tokens) << " %)\n"
       << "fertility: " << report.tokens_per_word() << " tokens a word, " << report.bytes_per_token() << " bytes a trained token\n";
  if (report.holdout.documents > 0) text << "held out: " << report.holdout.documents << " documents, " << report.holdout.tokens << " tokens\n";
  if (report.rejected_records > 0) text << "bad records set aside: " << report.rejected_records << " of " << report.records << ", listed in " << report.rejects.string() << '\n';
  const PrepareRun& run = report.this_run;
  if (run.seconds > 0) {
    text << "this run: " << run.documents << " documents written, the longest of " << run.longest_document << " tokens; " << run.megabytes_per_second << " MB/s\n";
    if (run.untrained_documents > 0) text << "this run left out, since nothing in them would be trained: " << run.untrained_documents << " documents\n";
  }
  return text.str();
}

}  // namespace alambic::data
