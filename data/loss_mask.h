// SPDX-License-Identifier: Apache-2.0
#pragma once
// From an example to a document: rendered, tokenised, and each token marked as trained or as context.
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "data/chat_template.h"
#include "data/record_format.h"
#include "data/token_store.h"
#include "data/tokenizer.h"

namespace alambic::data {

struct ByteSpan {
  std::size_t begin = 0, end = 0;
};

/// A conversation as text. Spans rise and do not overlap.
struct RenderedExample {
  std::string text;
  std::vector<ByteSpan> trained;
  bool from_template = false;  // the template's own {% generation %} blocks, taken as they are
  /// Role and end, in order, covering the text. A message's own are its content and end marker; "template" is what the
  /// template writes before the content: headers, and before the first message perhaps a system prompt of its own.
  std::vector<std::pair<std::string, std::size_t>> roles;
};

/// Where a template has {% generation %} blocks and train_on is {"assistant"}, they are the trained spans. Elsewhere:
///   - An answer is trained from behind the generation prompt to its end marker, as the model will generate it.
///   - A message of another role is trained from the first byte of its content to its end marker. The header ("user\n")
///     is never trained, nor is what the template inserts before the first message (a system prompt of its own).
///   - An answer that opens the conversation follows no prompt, so it counts from its content on, too.
/// To find these places the conversation is rendered again up to the message and up to its end, which must be beginnings of
/// the whole text, else Error(kData): the template rewrites earlier turns and says nothing of what it generates. Where
/// content begins is where the text changes when a letter is put before it.
/// with_roles: also find the places of every message (two renderings each), for the audit.
RenderedExample render_example(const Example& example, const ChatTemplate& chat, const std::set<std::string>& train_on, bool with_roles, const std::string& where);

struct EncodedExample {
  Document document;                  // source 0
  /// Per token, rising: its share of the text is from the end of the one before to its own. Empty for plain text without
  /// roles, where only the first token's share is needed and finding all would take half as long again.
  std::vector<std::uint32_t> end_byte;
  std::string text;                   // what was tokenised
  std::vector<std::pair<std::string, std::size_t>> roles;  // as above; "prompt", "completion" and "text" for the others
  bool has_answer = false, all_answers_stop = true;  // every trained answer ends with a stop token
  bool all_trained = false;           // no part of the text is context only
};

struct EncodeSettings {
  std::set<std::string> train_on = {"assistant"};
  std::string begin_token = "auto";  // of plain text and completions: auto | always | never
  bool end_token = true;
};

/// Safe to call from several threads.
class ExampleEncoder {
 public:
  /// tokenizer_path  tokenizer.json or a model folder: there the end token and the special tokens are looked up. Error(kUsage)
  ///                 if the settings need a token that the folder does not name.
  ExampleEncoder(const std::filesystem::path& tokenizer_path, std::optional<ChatTemplate> chat, EncodeSettings settings);

  const Tokenizer& tokenizer() const { return tokenizer_; }
  const std::optional<ChatTemplate>& chat_template() const { return chat_; }
  const EncodeSettings& settings() const { return settings_; }
  std::string end_token_text() const;

  /// ends_here: plain text gets the end token only where the file ends. Error(kData) "<where>: ...".
  EncodedExample encode(const Example& example, bool ends_here, bool with_roles, const std::string& where) const;

 private:
  EncodedExample encode_text(std::string text, bool ends_here) const;

  Tokenizer tokenizer_;
  std::optional<ChatTemplate> chat_;
  EncodeSettings settings_;
  std::optional<std::uint32_t> begin_id_, end_id_;
  std::set<std::uint32_t> stop_ids_;  // special tokens: one of them ends an answer
};

}  // namespace alambic::data
