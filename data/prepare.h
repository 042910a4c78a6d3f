// SPDX-License-Identifier: Apache-2.0
#pragma once
// Text, JSONL and Parquet -> token store. The formats of records are detected, named and shown; what is trained is
// audited before anything is written; the work is cut into shards that survive a kill.
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "core/config.h"
#include "core/json.h"
#include "data/token_store.h"

namespace alambic::data {

/// One corpus of the store, with its terms. They are written into the store and carried to the model card.
struct SourceConfig {
  std::string name;                            // short, unique in the store
  std::vector<std::string> paths;              // files, folders (all files of known endings below them) or globs
  std::string format = "auto";                 // see visit()
  std::string licence, origin, language;       // SPDX expression; URL or package; BCP 47
  std::map<std::string, std::string> columns;  // wanted -> found, e.g. {"text": "body"}; also "role" and "content" of messages
  std::string preference = "refuse";           // what to do with prompt/chosen/rejected: refuse | chosen
  void visit(FieldVisitor& fields);
};

struct PrepareConfig {
  std::filesystem::path tokenizer;      // a model folder: tokenizer.json, tokenizer_config.json, chat template
  std::filesystem::path output;         // folder of the store; made, or gone on with
  std::vector<SourceConfig> sources;
  std::filesystem::path chat_template;  // a Jinja file used instead of the model's; empty: the model's
  std::vector<std::string> train_on = {"assistant"};  // roles whose messages are predicted: content and stop token, not the header
  std::string begin_token = "auto";     // of plain text: auto (as the tokenizer does) | always | never
  bool end_token = true;                // a document of plain text, and a completion, ends with the model's EOS
  std::uint64_t document_bytes = 0;     // plain text is cut into documents of about so many bytes at blank lines; 0: a file is one
  std::uint64_t holdout_every = 0;      // every n-th document of each source goes to the hold-out store; 0: none
  std::filesystem::path holdout_output; // folder of that store; empty: <output>-holdout
  std::uint64_t tokens_per_shard = 16ull << 20;
  std::int64_t threads = 0;             // of tokenisation; 0: one a processor
  std::uint64_t max_bad = 0;            // bad records to set aside (see PrepareReport::rejects) before giving up
  bool allow_all_trained = false;       // accept conversations or completions in which every token is trained
  bool allow_none_trained = false;      // accept a source in which no token is trained
  std::string shard = "0/1";            // "i/n": this process writes part i of n, 0 <= i < n
  void visit(FieldVisitor& fields);
};

/// A piece of the rendered sample; in order they are the whole text of one document.
struct SamplePiece {
  std::string text;
  bool trained = false;
};

struct RoleShare {
  std::uint64_t tokens = 0, trained_tokens = 0;
};

/// What the audit saw in the first documents of a source (all of a small one), and what was written of it.
struct SourceReport {
  std::string name, format;                      // the format as detected or as asked for
  std::vector<std::string> files;                // in reading order
  std::vector<std::string> ignored_columns;      // never used; named once
  std::vector<SamplePiece> sample;               // the first document
  std::map<std::string, RoleShare> roles;        // "text", "prompt", "completion", or the roles of the conversation and "template" (see RenderedExample)
  std::uint64_t audited_documents = 0;
  bool stop_token_included = false;              // every trained answer of the audit ends with a stop token
  std::string stop_token;                        // as text
};

/// What this run did. After a kill that is the rest of the work only; nothing when the store was complete already.
struct PrepareRun {
  std::uint64_t documents = 0;             // written to the store and the hold-out store
  std::uint64_t untrained_documents = 0;   // left out, since nothing in them would be trained
  std::uint64_t longest_document = 0;      // tokens
  double seconds = 0, megabytes_per_second = 0;  // of text tokenised (10^6 bytes of UTF-8)
};

struct PrepareReport {
  std::vector<SourceReport> sources;
  // Of this part as a whole, earlier runs included. An earlier run's records are read again for their faults.
  StoreTotals totals, holdout;
  std::uint64_t records = 0;                 // of the inputs, both 0 when the store was complete already
  std::uint64_t rejected_records = 0;        // set aside under max_bad
  std::filesystem::path rejects;             // JSON lines {"file", "line", "reason"}; empty when there are none
  PrepareRun this_run;
  double tokens_per_word() const;
  double bytes_per_token() const;
};

/// Error: kUsage for settings and for what the person must decide (two formats fit, preference data, all or nothing
/// trained); kData for records ("file:line: ...") and damaged inputs; kResource when the disk is full.
/// Run again after a kill it goes on behind the last committed shard; the store is byte for byte the same.
PrepareReport prepare(const PrepareConfig& config);

/// For a person, several lines; trained text stands between [[ and ]].
std::string describe(const PrepareReport& report);
Json to_json(const PrepareReport& report);

}  // namespace alambic::data
