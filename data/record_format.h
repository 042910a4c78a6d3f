// SPDX-License-Identifier: Apache-2.0
#pragma once
// What a record of a data set means: the formats people publish, told apart by their columns, and brought to one shape.
//   text        {"text"}                                                      all of it is trained
//   messages    {"messages": [{"role", "content", ...}], "tools"}              the answers are trained
//   sharegpt    {"conversations": [{"from", "value"}], "system", "tools"}      the same
//   alpaca      {"instruction", "input", "output", "system", "history"}        a conversation of user and assistant
//   completion  {"prompt", "completion"}: texts, or lists of messages          the completion is trained
//   preference  {"prompt", "chosen", "rejected"}: texts, or lists of messages  the chosen answer is trained
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "core/json.h"

namespace alambic::data {

enum class RecordFormat { kText, kMessages, kShareGpt, kAlpaca, kCompletion, kPreference };

std::string_view format_name(RecordFormat format);

/// The one format whose columns every record has. Error(kUsage) naming `source` and the columns found when none or more
/// than one fits. `columns` (wanted -> found) is applied first; Error(kUsage) when the first record lacks a found column.
RecordFormat detect_format(const std::vector<Json>& records, const std::map<std::string, std::string>& columns, const std::string& source);

/// Columns of the record that the format does not use, in order.
std::vector<std::string> unused_columns(const Json& record, RecordFormat format, const std::map<std::string, std::string>& columns);

/// One document to be: text (completion empty, messages null), prompt and completion, or a conversation.
struct Example {
  std::string text;                       // plain text, or the prompt
  std::string completion;                 // what is trained of prompt and completion
  Json messages;                          // array of {"role", "content", ...}
  Json tools;                             // array or null
  std::size_t first_trained_message = 0;  // messages before it belong to the prompt
  bool is_chat() const { return messages.is_array(); }
};

/// Error(kData) "<where>: ..." for a missing or mistyped column, an unknown role, an order no conversation has (system
/// later than first, an assistant first, two of user or assistant in a row, a tool's answer without a call), an empty
/// conversation or answer, and content that is not text.
Example read_example(const Json& record, RecordFormat format, const std::map<std::string, std::string>& columns, const std::string& where);

}  // namespace alambic::data
