// SPDX-License-Identifier: Apache-2.0
#include "data/record_format.h"

#include <algorithm>
#include <array>

#include "core/error.h"

namespace alambic::data {
namespace {

struct FormatColumns {
  RecordFormat format;
  std::string_view name;
  std::vector<std::string> needed, optional;
};

const std::vector<FormatColumns>& formats() {
  static const std::vector<FormatColumns> table = {
      {RecordFormat::kText, "text", {"text"}, {}},
      {RecordFormat::kMessages, "messages", {"messages"}, {"tools"}},
      {RecordFormat::kShareGpt, "sharegpt", {"conversations"}, {"system", "tools"}},
      {RecordFormat::kAlpaca, "alpaca", {"instruction", "output"}, {"input", "system", "history"}},
      {RecordFormat::kCompletion, "completion", {"prompt", "completion"}, {"tools"}},
      {RecordFormat::kPreference, "preference", {"chosen", "rejected"}, {"prompt", "tools"}},
  };
  return table;
}

const FormatColumns& columns_of(RecordFormat format) { return formats()[static_cast<std::size_t>(format)]; }

// Missing and null are the same: Parquet has all columns in all rows.
const Json* column(const Json& record, const std::string& wanted, const std::map<std::string, std::string>& columns) {
  const auto mapped = columns.find(wanted);
  const auto found = record.find(mapped == columns.end() ? wanted : mapped->second);
  return found == record.end() || found->is_null() ? nullptr : &*found;
}

std::string names_of(const Json& record) {
  std::string names;
  for (const auto& [name, value] : record.items()) names += (names.empty() ? "" : ", ") + name;
  return names.empty() ? "none" : names;
}

constexpr std::string_view kFormatsKnown = "text; messages; conversations; instruction, output; prompt, completion; chosen, rejected";

std::string text_of(const Json* value, const std::string& name, const std::string& where) {
  if (!value) fail(ErrorKind::kData, where, ": the column \"", name, "\" is missing");
  if (!value->is_string()) fail(ErrorKind::kData, where, ": \"", name, "\" must be a string, got ", value->type_name());
  return value->get<std::string>();
}

std::string text_or_empty(const Json* value, const std::string& name, const std::string& where) { return value ? text_of(value, name, where) : ""; }

// A list, also when it is JSON inside a string, as data sets for tool calls often have it.
Json list_of(const Json* value, const std::string& name, const std::string& where) {
  if (!value) return nullptr;
  Json list = *value;
  if (list.is_string()) {
    const std::string text = list.get<std::string>();
    if (text.find_first_not_of(" \t\n") == std::string::npos) return nullptr;
    list = parse_json(text, where + ": \"" + name + "\"");
  }
  if (!list.is_array()) fail(ErrorKind::kData, where, ": \"", name, "\" must be a list, got ", list.type_name());
  return list;
}

// Text parts [{"type": "text", "text": ...}] become one string.
std::string content_of(const Json& content, const std::string& where) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array()) fail(ErrorKind::kData, where, ": \"content\" must be a string, got ", content.type_name());
  std::string text;
  for (const Json& part : content) {
    if (value_or<std::string>(part, "type", "", where) != "text") fail(ErrorKind::kData, where, ": content of another type than text: ", to_line(part).substr(0, 80));
    text += require<std::string>(part, "text", where);
  }
  return text;
}

Json message_of(const Json& entry, const std::map<std::string, std::string>& columns, const std::string& where) {
  if (!entry.is_object()) fail(ErrorKind::kData, where, ": must be an object with \"role\" and \"content\", got ", entry.type_name());
  const Json* role = column(entry, "role", columns);
  const Json* content = column(entry, "content", columns);
  const auto found_name = [&](const std::string& wanted) { return columns.contains(wanted) ? columns.at(wanted) : wanted; };
  Json message = Json::object();
  message["role"] = text_of(role, found_name("role"), where);
  message["content"] = content ? Json(content_of(*content, where)) : Json(nullptr);
  for (const auto& [key, value] : entry.items())
    if (!value.is_null() && key != found_name("role") && key != found_name("content")) message[key] = value;
  return message;
}

// ShareGPT's names of roles, as its published data sets write them.
std::string sharegpt_role(const std::string& from, const std::string& where) {
  static const std::map<std::string, std::string> roles = {
      {"human", "user"}, {"user", "user"}, {"gpt", "assistant"}, {"assistant", "assistant"}, {"model", "assistant"}, {"chatgpt", "assistant"}, {"bing", "assistant"},
      {"bard", "assistant"}, {"system", "system"}, {"tool", "tool"}, {"observation", "tool"}, {"function_response", "tool"}, {"function_call", "function_call"}};
  const auto found = roles.find(from);
  if (found == roles.end()) fail(ErrorKind::kData, where, ": unknown speaker \"", from, "\"; known are human, gpt, system, observation, function_call");
  return found->second;
}

Json sharegpt_message(const Json& entry, const std::map<std::string, std::string>& columns, const std::string& where) {
  if (!entry.is_object()) fail(ErrorKind::kData, where, ": must be an object with \"from\" and \"value\", got ", entry.type_name());
  if (!column(entry, "from", columns) && column(entry, "role", columns)) return message_of(entry, columns, where);
  const std::string role = sharegpt_role(text_of(column(entry, "from", columns), "from", where), where);
  const std::string value = text_of(column(entry, "value", columns), "value", where);
  if (role != "function_call") return {{"role", role}, {"content", value}};
  const Json call = parse_json(value, where + ": the function call");
  if (!call.is_object() || !call.contains("name")) fail(ErrorKind::kData, where, ": a function call must be {\"name\", \"arguments\"}");
  const Json tool_call = {{"type", "function"}, {"function", call}};
  return {{"role", "assistant"}, {"content", nullptr}, {"tool_calls", Json::array({tool_call})}};
}

void check_conversation(const Json& messages, const std::string& where) {
  if (messages.empty()) fail(ErrorKind::kData, where, ": an empty conversation");
  std::string before;
  for (std::size_t i = 0; i < messages.size(); ++i) {
    const Json& message = messages[i];
    const std::string role = message.at("role").get<std::string>();
    const auto wrong = [&](const std::string& why) { fail(ErrorKind::kData, where, ": message ", i + 1, " (", role, ") ", why); };
    const bool is_tool = role == "tool" || role == "function";
    if (role == "system" || role == "developer") {
      if (i > 0) wrong("stands behind another message; it must be the first");
    } else if (role == "user") {
      if (before == "user") wrong("follows a user's message");
    } else if (role == "assistant") {
      if (before == "assistant") wrong("follows an assistant's message");
      if (before.empty() || before == "system" || before == "developer") wrong("comes before any user's message");
    } else if (is_tool) {
      if (before != "assistant" && before != "tool" && before != "function") wrong("does not follow an assistant's call");
    } else {
      wrong("has an unknown role; known are system, developer, user, assistant, tool, function");
    }
    const bool has_calls = message.contains("tool_calls") && message.at("tool_calls").is_array() && !message.at("tool_calls").empty();
    const Json& content = message.at("content");
    if (content.is_null() && !has_calls) wrong("has no content");
    if (role == "assistant" && !has_calls && content.get<std::string>().empty()) wrong("is empty");
    before = role;
  }
}

Json messages_of(const Json& list, const std::map<std::string, std::string>& columns, const std::string& where, bool sharegpt = false) {
  if (!list.is_array()) fail(ErrorKind::kData, where, ": the conversation must be a list of messages, got ", list.type_name());
  Json messages = Json::array();
  for (const Json& entry : list) {
    const std::string here = where + ": message " + std::to_string(messages.size() + 1);
    messages.push_back(sharegpt ? sharegpt_message(entry, columns, here) : message_of(entry, columns, here));
  }
  return messages;
}

Json said(const char* role, std::string content) { return {{"role", role}, {"content", std::move(content)}}; }

// prompt and answer, each a text or a list of messages.
Example prompted(const Json* prompt, const Json* answer, const std::string& answer_name, const std::map<std::string, std::string>& columns, const std::string& where) {
  Example example;
  if (!answer) fail(ErrorKind::kData, where, ": the column \"", answer_name, "\" is missing");
  if (answer->is_string()) {
    example.text = text_of(prompt, "prompt", where);
    example.completion = answer->get<std::string>();
    if (example.completion.empty()) fail(ErrorKind::kData, where, ": \"", answer_name, "\" is empty");
    return example;
  }
  const Json answers = messages_of(*answer, columns, where + ": \"" + answer_name + "\"");
  // An answer that begins with the user's turn is the whole conversation; the prompt then only repeats its beginning.
  const bool whole = !answers.empty() && answers[0].at("role") != "assistant";
  example.messages = Json::array();
  if (!whole && prompt) example.messages = prompt->is_string() ? Json::array({said("user", prompt->get<std::string>())}) : messages_of(*prompt, columns, where + ": \"prompt\"");
  example.first_trained_message = example.messages.size();
  for (const Json& message : answers) example.messages.push_back(message);
  if (whole) {  // only the last answer was chosen; those before it are context
    example.first_trained_message = example.messages.size() - 1;
  }
  check_conversation(example.messages, where);
  return example;
}

}  // namespace

std::string_view format_name(RecordFormat format) { return columns_of(format).name; }

RecordFormat detect_format(const std::vector<Json>& records, const std::map<std::string, std::string>& columns, const std::string& source) {
  if (records.empty()) fail(ErrorKind::kData, source, ": no record in any of its files");
  for (const auto& [wanted, found] : columns)
    if (wanted != "role" && wanted != "content" && wanted != "from" && wanted != "value" && !records[0].contains(found))
      fail(ErrorKind::kUsage, source, ": columns: ", wanted, ": there is no column \"", found, "\"; the first record has ", names_of(records[0]));
  std::vector<const FormatColumns*> fitting;
  for (const FormatColumns& candidate : formats()) {
    const bool fits = std::all_of(records.begin(), records.end(), [&](const Json& record) {
      return std::all_of(candidate.needed.begin(), candidate.needed.end(), [&](const std::string& name) { return column(record, name, columns) != nullptr; });
    });
    if (fits) fitting.push_back(&candidate);
  }
  if (fitting.empty())
    fail(ErrorKind::kUsage, source, ": no known format has these columns: ", names_of(records[0]), "; known are ", kFormatsKnown,
         Remedy{"map them, for instance columns: {text: " + (records[0].empty() ? std::string("body") : records[0].begin().key()) + "}, or set format"});
  if (fitting.size() > 1) {
    std::string names;
    for (const FormatColumns* one : fitting) names += (names.empty() ? "" : ", ") + std::string(one->name);
    fail(ErrorKind::kUsage, source, ": the columns fit several formats: ", names, Remedy{"choose one with format"});
  }
  return fitting[0]->format;
}

std::vector<std::string> unused_columns(const Json& record, RecordFormat format, const std::map<std::string, std::string>& columns) {
  std::vector<std::string> unused;
  const FormatColumns& known = columns_of(format);
  for (const auto& [name, value] : record.items()) {
    const auto is_used = [&](const std::string& wanted) {
      const auto mapped = columns.find(wanted);
      return (mapped == columns.end() ? wanted : mapped->second) == name;
    };
    if (std::none_of(known.needed.begin(), known.needed.end(), is_used) && std::none_of(known.optional.begin(), known.optional.end(), is_used)) unused.push_back(name);
  }
  return unused;
}

Example read_example(const Json& record, RecordFormat format, const std::map<std::string, std::string>& columns, const std::string& where) {
  if (!record.is_object()) fail(ErrorKind::kData, where, ": must be a JSON object, got ", record.type_name());
  const auto get = [&](const std::string& name) { return column(record, name, columns); };
  Example example;
  switch (format) {
    case RecordFormat::kText:
      example.text = text_of(get("text"), "text", where);
      if (example.text.empty()) fail(ErrorKind::kData, where, ": \"text\" is empty");
      return example;
    case RecordFormat::kMessages: {
      const Json* messages = get("messages");
      if (!messages) fail(ErrorKind::kData, where, ": the column \"messages\" is missing");
      example.messages = messages_of(list_of(messages, "messages", where), columns, where);
      break;
    }
    case RecordFormat::kShareGpt: {
      const Json* conversations = get("conversations");
      if (!conversations) fail(ErrorKind::kData, where, ": the column \"conversations\" is missing");
      example.messages = messages_of(list_of(conversations, "conversations", where), columns, where, true);
      if (const std::string system = text_or_empty(get("system"), "system", where); !system.empty()) example.messages.insert(example.messages.begin(), said("system", system));
      break;
    }
    case RecordFormat::kAlpaca: {
      example.messages = Json::array();
      if (const std::string system = text_or_empty(get("system"), "system", where); !system.empty()) example.messages.push_back(said("system", system));
      const Json history = list_of(get("history"), "history", where);
      for (std::size_t i = 0; history.is_array() && i < history.size(); ++i) {
        const Json& turn = history[i];
        if (!turn.is_array() || turn.size() != 2 || !turn[0].is_string() || !turn[1].is_string())
          fail(ErrorKind::kData, where, ": \"history\" entry ", i + 1, " must be [instruction, answer]");
        example.messages.push_back(said("user", turn[0]));
        example.messages.push_back(said("assistant", turn[1]));
      }
      const std::string input = text_or_empty(get("input"), "input", where);
      example.messages.push_back(said("user", text_of(get("instruction"), "instruction", where) + (input.empty() ? "" : "\n\n" + input)));
      example.messages.push_back(said("assistant", text_of(get("output"), "output", where)));
      break;
    }
    case RecordFormat::kCompletion: example = prompted(get("prompt"), get("completion"), "completion", columns, where); break;
    case RecordFormat::kPreference: example = prompted(get("prompt"), get("chosen"), "chosen", columns, where); break;
  }
  if (example.is_chat()) {
    check_conversation(example.messages, where);
    example.tools = list_of(get("tools"), "tools", where);
  }
  return example;
}

}  // namespace alambic::data
