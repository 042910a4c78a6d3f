// SPDX-License-Identifier: Apache-2.0
#pragma once
// Chat templates (Jinja) rendered as transformers renders them, by minijinja behind the text bridge.
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/json.h"

namespace alambic::data {

struct RenderedChat {
  std::string text;
  /// Byte ranges of `text` inside {% generation %} ... {% endgeneration %}; empty when the template has no such block.
  std::vector<std::pair<std::size_t, std::size_t>> generation_bytes;
};

struct ChatTemplate {
  std::string source;   // Jinja
  std::string name;     // file it came from, for messages
  Json special_tokens;  // {"bos_token": "<s>", "eos_token": "</s>", ...}: variables of the template

  /// messages  JSON array of {"role", "content", ...}; tools: JSON array or null; extra: object of further variables or null.
  /// Error(kData) with the template's line when it raises, runs out of fuel, or renders more than 64 MiB.
  RenderedChat render(const Json& messages, const Json& tools, bool add_generation_prompt, const Json& extra = nullptr) const;
};

/// The template of a model folder: chat_template.jinja, else "chat_template" in tokenizer_config.json; special tokens
/// from tokenizer_config.json and special_tokens_map.json. nullopt when the folder has none.
std::optional<ChatTemplate> read_chat_template(const std::filesystem::path& model_folder);

}  // namespace alambic::data
