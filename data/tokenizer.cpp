// SPDX-License-Identifier: Apache-2.0
#include "data/tokenizer.h"

#include "core/error.h"
#include "core/files.h"
#include "core/json.h"
#include "data/text_bridge/ownership.h"

namespace alambic::data {
namespace {

constexpr std::uint64_t kMostBytes = 256ull << 20;  // the largest tokenizer.json in the wild is about 40 MB

}  // namespace

struct Tokenizer::State {
  AlambicTokenizer* tokenizer = nullptr;
  std::string json, source, hash;
  std::uint32_t vocabulary_size = 0;

  State() = default;
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() { alambic_tokenizer_free(tokenizer); }
};

Tokenizer::Tokenizer(std::unique_ptr<State> state) : state_(std::move(state)) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

Tokenizer Tokenizer::from_file(const std::filesystem::path& path) {
  const std::filesystem::path file = std::filesystem::is_directory(path) ? path / "tokenizer.json" : path;
  if (!std::filesystem::exists(file))
    fail(ErrorKind::kData, file.string(), ": there is no such file",
         Remedy{"the folder of a model holds a tokenizer.json; older folders get one from transformers' save_pretrained"});
  return from_json(read_file(file, kMostBytes), file.string());
}

Tokenizer Tokenizer::from_json(std::string_view tokenizer_json, std::string_view source) {
  auto state = std::make_unique<State>();
  state->json = tokenizer_json;
  state->source = source;
  OwnedText error, canonical;
  const Remedy remedy{"take tokenizer.json again from where the model came from"};
  if (!alambic_tokenizer_new(state->json.data(), state->json.size(), &state->tokenizer, &error.text))
    fail(ErrorKind::kData, source, ": not a tokenizer that can be used: ", error.view(), remedy);
  if (!alambic_tokenizer_canonical(state->tokenizer, &canonical.text, &error.text))
    fail(ErrorKind::kData, source, ": not a tokenizer that can be used: ", error.view(), remedy);
  state->hash = sha256_of(canonical.view());
  state->vocabulary_size = alambic_tokenizer_vocabulary_size(state->tokenizer);
  return Tokenizer(std::move(state));
}

namespace {

OwnedNumbers encode_numbers(const AlambicTokenizer* tokenizer, std::string_view source, std::string_view text, bool add_special_tokens,
                            bool with_offsets) {
  OwnedNumbers numbers;
  OwnedText error;
  if (!alambic_tokenizer_encode(tokenizer, text.data(), text.size(), add_special_tokens, with_offsets, &numbers.numbers, &error.text))
    fail(ErrorKind::kData, source, ": the text cannot be encoded: ", error.view());
  return numbers;
}

}  // namespace

std::vector<std::uint32_t> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  const OwnedNumbers numbers = encode_numbers(state_->tokenizer, state_->source, text, add_special_tokens, false);
  return {numbers.view().begin(), numbers.view().end()};
}

Encoding Tokenizer::encode_with_offsets(std::string_view text, bool add_special_tokens) const {
  const OwnedNumbers numbers = encode_numbers(state_->tokenizer, state_->source, text, add_special_tokens, true);
  const std::span<const std::uint32_t> all = numbers.view();
  const std::size_t count = all.size() / 3;
  const auto part = [&](std::size_t index) {
    const auto piece = all.subspan(index * count, count);
    return std::vector<std::uint32_t>(piece.begin(), piece.end());
  };
  return {part(0), part(1), part(2)};
}

std::string Tokenizer::decode(std::span<const std::uint32_t> ids, bool skip_special_tokens) const {
  OwnedText text, error;
  if (!alambic_tokenizer_decode(state_->tokenizer, ids.data(), ids.size(), skip_special_tokens, &text.text, &error.text))
    fail(ErrorKind::kData, state_->source, ": the ids cannot be decoded: ", error.view());
  return std::string(text.view());
}

std::uint32_t Tokenizer::vocabulary_size() const { return state_->vocabulary_size; }

std::optional<std::uint32_t> Tokenizer::id_of(std::string_view token) const {
  std::uint32_t id = 0;
  if (!alambic_tokenizer_id_of(state_->tokenizer, token.data(), token.size(), &id)) return std::nullopt;
  return id;
}

std::optional<std::string> Tokenizer::token_of(std::uint32_t id) const {
  OwnedText token;
  if (!alambic_tokenizer_token_of(state_->tokenizer, id, &token.text)) return std::nullopt;
  return std::string(token.view());
}

std::optional<std::uint32_t> Tokenizer::unknown_id() const {
  std::uint32_t id = 0;
  if (!alambic_tokenizer_unknown_id(state_->tokenizer, &id)) return std::nullopt;
  return id;
}

std::string Tokenizer::extended_json(const std::vector<std::string>& tokens, bool special) const {
  const std::string list = to_line(Json(tokens));
  OwnedText text, error;
  if (!alambic_tokenizer_extend(state_->json.data(), state_->json.size(), list.data(), list.size(), special, &text.text, &error.text))
    fail(ErrorKind::kData, state_->source, ": the tokens cannot be added: ", error.view());
  return std::string(text.view());
}

const std::string& Tokenizer::hash() const { return state_->hash; }
const std::string& Tokenizer::json() const { return state_->json; }

}  // namespace alambic::data
