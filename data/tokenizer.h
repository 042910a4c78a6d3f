// SPDX-License-Identifier: Apache-2.0
#pragma once
// Text to token ids and back, by Hugging Face's tokenizers crate behind the text bridge.
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace alambic::data {

struct Encoding {
  std::vector<std::uint32_t> ids;
  std::vector<std::uint32_t> begin_byte, end_byte;  // of each token in the UTF-8 input; equal for tokens without text
};

class Tokenizer {
 public:
  /// A tokenizer.json, or a folder that holds one. Error(kData) if it is missing or refused by the crate (a panic inside is one).
  static Tokenizer from_file(const std::filesystem::path& path);
  static Tokenizer from_json(std::string_view tokenizer_json, std::string_view source);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  /// text is UTF-8, else Error(kData). add_special_tokens: what the post-processor adds (BOS and such).
  /// Special tokens written in the text become their ids. Safe to call from several threads.
  std::vector<std::uint32_t> encode(std::string_view text, bool add_special_tokens) const;
  Encoding encode_with_offsets(std::string_view text, bool add_special_tokens) const;
  std::string decode(std::span<const std::uint32_t> ids, bool skip_special_tokens) const;

  std::uint32_t vocabulary_size() const;  // largest id + 1, added tokens included
  std::optional<std::uint32_t> id_of(std::string_view token) const;
  std::optional<std::string> token_of(std::uint32_t id) const;
  /// What text becomes that the vocabulary cannot spell.
  std::optional<std::uint32_t> unknown_id() const;
  /// The tokenizer.json with further tokens, as transformers' add_tokens makes it: each gets the next id, and one that is not
  /// special is looked for in the normalised text. Error(kData) names a token the crate refuses.
  std::string extended_json(const std::vector<std::string>& tokens, bool special) const;
  /// SHA-256 over the sorted (token, id) pairs and the canonical pipeline JSON: equal iff the ids would be equal.
  const std::string& hash() const;
  /// The tokenizer.json text, as it was given.
  const std::string& json() const;

 private:
  struct State;
  explicit Tokenizer(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace alambic::data
