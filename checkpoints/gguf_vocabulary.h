// SPDX-License-Identifier: Apache-2.0
#pragma once
// The tokenizer of a model folder as GGUF metadata: the inverse of gguf_tokenizer.h.
#include <filesystem>
#include <string>
#include <vector>

#include "checkpoints/gguf_write.h"
#include "models/config.h"

namespace alambic::checkpoints {

struct GgufVocabulary {
  GgufKeys keys;                      // tokenizer.ggml.*, tokenizer.chat_template*
  std::vector<std::string> warnings;  // what llama.cpp does otherwise than the folder's tokenizer
};

/// From tokenizer.json (byte-level BPE becomes "gpt2", SentencePiece-like BPE "llama"), tokenizer_config.json, config.json,
/// generation_config.json and the chat templates. Rows of the embedding without a token get one that is never used.
/// Error(kData): no tokenizer.json, or a vocabulary, normaliser or pre-tokenizer that llama.cpp has no name for.
GgufVocabulary gguf_vocabulary(const std::filesystem::path& folder, const models::ModelConfig& config);

}  // namespace alambic::checkpoints
