// SPDX-License-Identifier: Apache-2.0
#include "data/loss_mask.h"

#include <algorithm>

#include "core/error.h"
#include "core/files.h"
#include "data/text_reader.h"

namespace alambic::data {
namespace {

Json first_messages(const Json& messages, std::size_t count) {
  Json first = Json::array();
  for (std::size_t i = 0; i < count; ++i) first.push_back(messages[i]);
  return first;
}

// Length of the rendering of the first messages if it is a beginning of `whole`.
std::optional<std::size_t> prefix_length(const ChatTemplate& chat, const Example& example, std::size_t count, bool add_generation_prompt, const std::string& whole) {
  const std::string text = chat.render(first_messages(example.messages, count), example.tools, add_generation_prompt).text;
  return whole.starts_with(text) ? std::optional(text.size()) : std::nullopt;
}

// The message with a letter before its content that is not the one the content begins with. Content in parts: before the
// first part with text; a message without content: the letter alone.
Json with_letter_before(Json message) {
  Json* content = &message["content"];
  if (content->is_array())
    for (Json& part : *content)
      if (part.is_object() && part.contains("text") && part["text"].is_string()) {
        content = &part["text"];
        break;
      }
  const std::string text = content->is_string() ? content->get<std::string>() : "";
  const std::size_t first = text.find_first_not_of(" \t\r\n");
  *content = (first != std::string::npos && text[first] == 'a' ? "b" : "a") + text;
  return message;
}

// Where the content of message `index` begins in `text`, the rendering of the messages up to it.
std::size_t content_begin(const ChatTemplate& chat, const Example& example, std::size_t index, std::string_view text) {
  Json messages = first_messages(example.messages, index);
  messages.push_back(with_letter_before(example.messages[index]));
  const std::string changed = chat.render(messages, example.tools, false).text;
  return static_cast<std::size_t>(std::mismatch(text.begin(), text.end(), changed.begin(), changed.end()).first - text.begin());
}

// "<s>" in tokenizer_config.json, as text or as {"content": ...}; nullopt where the file, key or value is missing.
std::optional<std::string> named_token(const fs::path& file, const std::string& key) {
  if (!fs::exists(file)) return std::nullopt;
  const Json config = read_json_file(file);
  const auto found = config.is_object() ? config.find(key) : config.end();
  if (found == config.end() || found->is_null()) return std::nullopt;
  if (found->is_string()) return found->get<std::string>();
  return require<std::string>(*found, "content", file.string() + ": " + key);
}

std::optional<std::uint32_t> special_id(const fs::path& folder, const Tokenizer& tokenizer, const std::string& token_key, const std::string& id_key) {
  for (const char* file : {"tokenizer_config.json", "special_tokens_map.json"})
    if (const auto text = named_token(folder / file, token_key))
      if (const auto id = tokenizer.id_of(*text)) return id;
  if (!fs::exists(folder / "config.json")) return std::nullopt;
  const Json config = read_json_file(folder / "config.json");
  if (!config.is_object() || !config.contains(id_key)) return std::nullopt;
  const Json& value = config[id_key].is_array() && !config[id_key].empty() ? config[id_key][0] : config[id_key];
  if (!value.is_number_unsigned() || value.get<std::uint64_t>() >= tokenizer.vocabulary_size()) return std::nullopt;
  return value.get<std::uint32_t>();
}

std::set<std::uint32_t> special_ids(const Tokenizer& tokenizer) {
  // The model part is nearly the whole file and is not needed.
  const Json json = Json::parse(tokenizer.json(), [](int depth, Json::parse_event_t event, Json& value) {
    return !(depth == 1 && event == Json::parse_event_t::key && value == "model");
  });
  std::set<std::uint32_t> ids;
  if (const auto added = json.find("added_tokens"); added != json.end() && added->is_array())
    for (const Json& token : *added)
      if (value_or<bool>(token, "special", false, "added_tokens")) ids.insert(static_cast<std::uint32_t>(require<std::int64_t>(token, "id", "added_tokens")));
  return ids;
}

std::string_view text_between(std::string_view text, std::size_t begin, std::size_t end) { return text.substr(begin, end > begin ? end - begin : 0); }

bool is_blank(std::string_view text) { return text.find_first_not_of(" \t\r\n") == std::string_view::npos; }

}  // namespace

RenderedExample render_example(const Example& example, const ChatTemplate& chat, const std::set<std::string>& train_on, bool with_roles, const std::string& where) {
  RenderedExample rendered;
  RenderedChat whole;
  try {
    whole = chat.render(example.messages, example.tools, false);
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::kData) throw;
    throw Error(error.kind(), where + ": " + error.what(), error.remedy());
  }
  rendered.text = std::move(whole.text);
  const std::size_t count = example.messages.size();

  if (with_roles) {
    bool told_apart = true;  // the message before
    for (std::size_t i = 0; i < count; ++i) {
      std::size_t begin = 0, end = 0;
      try {
        end = i + 1 == count ? rendered.text.size() : prefix_length(chat, example, i + 1, false, rendered.text).value_or(0);
        if (end > 0 && told_apart) begin = content_begin(chat, example, i, std::string_view(rendered.text).substr(0, end));
      } catch (const Error&) {  // many templates refuse a conversation of the system's message alone: it then counts with the next
      }
      const std::size_t last = rendered.roles.empty() ? 0 : rendered.roles.back().second;
      if (begin > last) rendered.roles.emplace_back("template", begin);
      if (end > std::max(begin, last)) rendered.roles.emplace_back(example.messages[i].at("role").get<std::string>(), end);
      told_apart = end > 0;
    }
  }

  const bool has_blocks = chat.source.find("generation") != std::string::npos && !whole.generation_bytes.empty();
  if (has_blocks && train_on == std::set<std::string>{"assistant"} && example.first_trained_message == 0) {
    rendered.from_template = true;
    for (const auto& [begin, end] : whole.generation_bytes)
      if (begin < end) rendered.trained.push_back({begin, end});
    return rendered;
  }
  for (std::size_t i = example.first_trained_message; i < count; ++i) {
    const std::string role = example.messages[i].at("role").get<std::string>();
    if (!train_on.contains(role)) continue;
    std::optional<std::size_t> begin, end;
    try {
      end = i + 1 == count ? rendered.text.size() : prefix_length(chat, example, i + 1, false, rendered.text);
      if (i > 0 && role == "assistant") begin = prefix_length(chat, example, i, true, rendered.text);
      else if (end) begin = content_begin(chat, example, i, std::string_view(rendered.text).substr(0, *end));
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::kData) throw;
      throw Error(error.kind(), where + ": message " + std::to_string(i + 1) + ": " + error.what(), error.remedy());
    }
    if (begin && !end) {
      // Templates that drop the reasoning of all but the last answer: the end is found if the answer stands there as it is.
      // The encoder adds the stop token behind it.
      const Json& content = example.messages[i].at("content");
      const std::string answer = content.is_string() ? content.get<std::string>() : "";
      if (!answer.empty() && std::string_view(rendered.text).substr(*begin).starts_with(answer)) end = *begin + answer.size();
    }
    if (!begin || !end || *end < *begin)
      fail(ErrorKind::kData, where, ": message ", i + 1, " (", role, "): ", chat.name, " writes earlier messages differently when later ones follow, so what is trained cannot be told",
           Remedy{"give a chat_template with {% generation %} blocks, or data with one answer a conversation"});
    if (!rendered.trained.empty() && rendered.trained.back().end == *begin) rendered.trained.back().end = *end;
    else if (*begin < *end) rendered.trained.push_back({*begin, *end});
  }
  return rendered;
}

ExampleEncoder::ExampleEncoder(const fs::path& tokenizer_path, std::optional<ChatTemplate> chat, EncodeSettings settings)
    : tokenizer_(Tokenizer::from_file(tokenizer_path)), chat_(std::move(chat)), settings_(std::move(settings)), stop_ids_(special_ids(tokenizer_)) {
  const fs::path folder = fs::is_directory(tokenizer_path) ? tokenizer_path : tokenizer_path.parent_path();
  begin_id_ = special_id(folder, tokenizer_, "bos_token", "bos_token_id");
  end_id_ = special_id(folder, tokenizer_, "eos_token", "eos_token_id");
  if (end_id_) stop_ids_.insert(*end_id_);
  if (settings_.end_token && !end_id_)
    fail(ErrorKind::kUsage, folder.string(), ": no end-of-text token: neither eos_token in tokenizer_config.json nor eos_token_id in config.json", Remedy{"add one, or set end_token: false"});
  if (settings_.begin_token == "always" && !begin_id_)
    fail(ErrorKind::kUsage, folder.string(), ": begin_token: always, but the model names no bos_token", Remedy{"set begin_token: auto"});
}

std::string ExampleEncoder::end_token_text() const { return end_id_ ? tokenizer_.token_of(*end_id_).value_or("") : ""; }

// All of the text is trained, so its bytes less those of the first token are: the offsets of the other tokens are not
// needed. The first token's own are those it has in a short beginning of the text, if it is the same token there. Returns
// no ids when that cannot be told; encode() then does it the long way.
EncodedExample ExampleEncoder::encode_text(std::string text, bool ends_here) const {
  constexpr std::size_t kBeginningBytes = 64;
  EncodedExample result;
  if (text.size() < 2 * kBeginningBytes) return result;
  std::size_t cut = kBeginningBytes;
  while ((static_cast<unsigned char>(text[cut]) & 0xC0) == 0x80) --cut;
  const bool add_special = settings_.begin_token != "never";
  const Encoding beginning = tokenizer_.encode_with_offsets(std::string_view(text).substr(0, cut), add_special);
  std::vector<std::uint32_t> ids = tokenizer_.encode(text, add_special);
  if (ids.size() < 2 || beginning.ids.size() < 4 || beginning.ids[0] != ids[0] || beginning.ids[1] != ids[1]) return result;
  std::size_t first_bytes = beginning.end_byte[0];
  if (settings_.begin_token == "always" && ids[0] != *begin_id_) {
    ids.insert(ids.begin(), *begin_id_);
    first_bytes = 0;
  }
  if (settings_.end_token && ends_here) {
    if (ids.back() != *end_id_) ids.push_back(*end_id_);
    result.has_answer = true;
  }
  result.document.mask.assign(ids.size(), 1);
  result.document.mask[0] = 0;
  // An end token that the tokenizer itself puts behind every document is trained only where the text does end.
  if (stop_ids_.contains(ids.back()) && !result.has_answer) return {};
  result.document.ids = std::move(ids);
  result.document.num_bytes = text.size() - first_bytes;
  result.document.num_words = count_words(text);
  result.all_trained = true;
  result.text = std::move(text);
  return result;
}

EncodedExample ExampleEncoder::encode(const Example& example, bool ends_here, bool with_roles, const std::string& where) const {
  if (!example.is_chat() && example.completion.empty() && !with_roles)
    if (EncodedExample text = encode_text(example.text, ends_here); !text.document.ids.empty()) return text;
  EncodedExample result;
  std::vector<ByteSpan> trained;
  bool from_template = false;
  if (example.is_chat()) {
    if (!chat_)
      fail(ErrorKind::kUsage, where, ": conversations need a chat template and the model has none", Remedy{"set chat_template to a Jinja file"});
    RenderedExample rendered = render_example(example, *chat_, settings_.train_on, with_roles, where);
    result.text = std::move(rendered.text);
    result.roles = std::move(rendered.roles);
    trained = std::move(rendered.trained);
    from_template = rendered.from_template;
  } else {
    result.text = example.text + example.completion;
    trained = {{example.completion.empty() ? 0 : example.text.size(), result.text.size()}};
    if (example.completion.empty()) result.roles = {{"text", result.text.size()}};
    else result.roles = {{"prompt", example.text.size()}, {"completion", result.text.size()}};
  }

  result.all_trained = trained.size() == 1 && trained[0].begin == 0 && trained[0].end == result.text.size();

  // A chat template writes the special tokens itself.
  Encoding encoding = tokenizer_.encode_with_offsets(result.text, !example.is_chat() && settings_.begin_token != "never");
  Document& document = result.document;
  document.ids = std::move(encoding.ids);
  if (!example.is_chat() && settings_.begin_token == "always" && (document.ids.empty() || document.ids[0] != *begin_id_)) {
    document.ids.insert(document.ids.begin(), *begin_id_);
    encoding.begin_byte.insert(encoding.begin_byte.begin(), 0);
    encoding.end_byte.insert(encoding.end_byte.begin(), 0);
  }
  const std::size_t num_text_tokens = document.ids.size();
  document.mask.assign(num_text_tokens, 0);

  std::size_t token = 0;
  for (const ByteSpan& span : trained) {
    // Every token that holds a byte of the span. Tokens without text (a BOS) belong to the plain text they stand before or behind.
    while (token < num_text_tokens && encoding.end_byte[token] <= span.begin) ++token;
    const std::size_t first = token;
    std::size_t behind = token;
    for (; token < num_text_tokens && encoding.begin_byte[token] < span.end; ++token)
      if (encoding.begin_byte[token] < encoding.end_byte[token]) behind = token + 1;
    token = behind;
    if (example.is_chat() && first < behind) {
      std::size_t stop = behind;  // behind the last special token, if nothing but white space follows it
      while (stop > first && !stop_ids_.contains(document.ids[stop - 1])) --stop;
      if (!from_template && stop == first && behind < num_text_tokens && encoding.begin_byte[behind] == span.end && stop_ids_.contains(document.ids[behind]))
        stop = token = ++behind;
      const bool stops = stop > first && is_blank(text_between(result.text, encoding.end_byte[stop - 1], span.end));
      if (stops && !from_template) behind = stop;
      result.has_answer = true;
      result.all_answers_stop &= stops;
    }
    std::fill(document.mask.begin() + static_cast<std::ptrdiff_t>(first), document.mask.begin() + static_cast<std::ptrdiff_t>(behind), std::uint8_t{1});
  }
  if (!example.is_chat()) {
    if (settings_.end_token && ends_here && end_id_) {
      if (document.ids.empty() || document.ids.back() != *end_id_) {
        document.ids.push_back(*end_id_);
        document.mask.push_back(0);
        encoding.end_byte.push_back(static_cast<std::uint32_t>(result.text.size()));
      }
      document.mask.back() = 1;
      result.has_answer = true;
    } else {
      result.all_answers_stop = false;
    }
  }
  if (document.ids.empty()) fail(ErrorKind::kData, where, ": no token comes out of this text");
  document.mask[0] = 0;  // nothing stands before it

  // Each byte belongs to one token: what lies between two tokens to the later one, a character cut into several tokens
  // to the first of them, a rest behind the last token to that.
  std::uint32_t covered = 0;
  result.end_byte.resize(document.ids.size());
  for (std::size_t i = 0; i < document.ids.size(); ++i) {
    std::uint32_t end = std::max(covered, encoding.end_byte[i]);
    if (i + 1 == document.ids.size()) end = static_cast<std::uint32_t>(result.text.size());
    if (document.mask[i]) document.num_bytes += end - covered;
    covered = end;
    result.end_byte[i] = end;
  }
  document.num_words = count_words(result.text);
  return result;
}

}  // namespace alambic::data
