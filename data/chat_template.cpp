// SPDX-License-Identifier: Apache-2.0
#include "data/chat_template.h"

#include <algorithm>
#include <array>

#include "core/error.h"
#include "core/files.h"
#include "core/log.h"
#include "data/text_bridge/ownership.h"

namespace alambic::data {
namespace {

// A template's steps grow with the conversation; the longest real ones take a few thousand a message.
constexpr std::uint64_t kMostSteps = 50'000'000, kMostBytes = 64ull << 20, kMostTemplateBytes = 4ull << 20;

// PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES: what transformers passes to every template.
constexpr std::array kSpecialTokens = {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"};

// What apply_chat_template does to messages before the template sees them: keys without a value are absent, and the
// reasoning of a message goes by the two names that templates ask for.
Json prepared(const Json& messages, const std::string& name) {
  if (!messages.is_array()) fail(ErrorKind::kData, name, ": the messages are not a list but ", messages.type_name());
  Json out = Json::array();
  for (std::size_t i = 0; i < messages.size(); ++i) {
    if (!messages[i].is_object())
      fail(ErrorKind::kData, name, ": message ", i + 1, " is not an object with role and content but ", messages[i].type_name());
    Json message = Json::object();
    for (const auto& [key, value] : messages[i].items())
      if (!value.is_null()) message[key] = value;
    for (const char* key : {"reasoning_content", "thinking", "reasoning"}) {
      if (!message.contains(key)) continue;
      const Json reasoning = message[key];
      if (!message.contains("thinking")) {
        Json named = Json::object();  // in front, as transformers puts it: a template may walk over the keys
        named["thinking"] = reasoning;
        for (const auto& [other, value] : message.items()) named[other] = value;
        message = std::move(named);
      }
      message["reasoning_content"] = reasoning;
      break;
    }
    out.push_back(std::move(message));
  }
  return out;
}

// "<s>" or {"content": "<s>", ...}; null where the folder does not name the token.
std::optional<std::string> token_text(const Json& value, std::string_view key, const std::string& source) {
  if (value.is_null()) return std::nullopt;
  if (value.is_string()) return value.get<std::string>();
  if (value.is_object()) return require<std::string>(value, "content", source + ": " + std::string(key));
  fail(ErrorKind::kData, source, ": ", key, ": a special token is text or an object with \"content\", not ", value.type_name());
}

std::optional<std::string> default_template(const Json& value, const std::string& source) {
  if (value.is_null()) return std::nullopt;
  if (value.is_string()) return value.get<std::string>();
  if (!value.is_array()) fail(ErrorKind::kData, source, ": chat_template is neither text nor a list of {name, template} but ", value.type_name());
  std::optional<std::string> found;
  std::string others;
  for (const Json& entry : value) {
    const auto name = require<std::string>(entry, "name", source + ": chat_template");
    auto text = require<std::string>(entry, "template", source + ": chat_template");
    if (name == "default") found = std::move(text);
    else others += (others.empty() ? "" : ", ") + name;
  }
  if (!found)
    fail(ErrorKind::kData, source, ": chat_template names ", others.empty() ? "nothing" : others, " and no \"default\"",
         Remedy{"put the template to use into chat_template.jinja in the model's folder"});
  if (!others.empty()) log_info(source, ": using the chat template \"default\"; also there and not used: ", others);
  return found;
}

}  // namespace

RenderedChat ChatTemplate::render(const Json& messages, const Json& tools, bool add_generation_prompt, const Json& extra) const {
  Json variables = Json::object();
  if (special_tokens.is_object()) variables.update(special_tokens);
  if (!extra.is_null()) {
    if (!extra.is_object()) fail(ErrorKind::kData, name, ": the template's further variables are not an object but ", extra.type_name());
    variables.update(extra);
  }
  variables["messages"] = prepared(messages, name);
  variables["tools"] = tools;
  if (!variables.contains("documents")) variables["documents"] = nullptr;
  variables["add_generation_prompt"] = add_generation_prompt;

  const std::string text = to_line(variables);
  OwnedText rendered, error;
  OwnedNumbers spans;
  if (!alambic_template_render(source.data(), source.size(), text.data(), text.size(), kMostSteps, kMostBytes, &rendered.text, &spans.numbers,
                               &error.text))
    fail(ErrorKind::kData, name, ": ", error.view(), Remedy{"the template and the conversation do not fit each other: change one of them"});
  RenderedChat chat{std::string(rendered.view()), {}};
  const auto numbers = spans.view();
  for (std::size_t i = 0; i + 1 < numbers.size(); i += 2) chat.generation_bytes.emplace_back(numbers[i], numbers[i + 1]);
  return chat;
}

std::optional<ChatTemplate> read_chat_template(const std::filesystem::path& model_folder) {
  const auto template_file = model_folder / "chat_template.jinja", config_file = model_folder / "tokenizer_config.json",
             map_file = model_folder / "special_tokens_map.json";
  const Json config = std::filesystem::exists(config_file) ? read_json_file(config_file) : Json::object();
  if (!config.is_object()) fail(ErrorKind::kData, config_file.string(), ": not an object but ", config.type_name());

  ChatTemplate result;
  result.special_tokens = Json::object();
  if (std::filesystem::exists(template_file)) {
    result.source = read_file(template_file, kMostTemplateBytes);
    result.name = template_file.string();
  } else if (const auto found = config.find("chat_template"); found != config.end()) {
    const auto text = default_template(*found, config_file.string());
    if (!text) return std::nullopt;
    result.source = *text;
    result.name = config_file.string() + ": chat_template";
  } else {
    return std::nullopt;
  }
  const auto more = model_folder / "additional_chat_templates";
  if (std::filesystem::is_directory(more)) {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(more)) names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    std::string list;
    for (const std::string& file : names) list += (list.empty() ? "" : ", ") + file;
    if (!list.empty()) log_info(more.string(), ": these further chat templates are not used: ", list);
  }

  // tokenizer_config.json wins over the older file, as in transformers.
  const auto take = [&](const Json& object, const std::string& source) {
    for (const char* key : kSpecialTokens) {
      if (!object.contains(key)) continue;
      if (const auto text = token_text(object[key], key, source)) result.special_tokens[key] = *text;
    }
  };
  if (std::filesystem::exists(map_file)) {
    const Json map = read_json_file(map_file);
    if (!map.is_object()) fail(ErrorKind::kData, map_file.string(), ": not an object but ", map.type_name());
    take(map, map_file.string());
  }
  take(config, config_file.string());
  return result;
}

}  // namespace alambic::data
