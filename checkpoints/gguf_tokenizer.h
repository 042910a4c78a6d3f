// SPDX-License-Identifier: Apache-2.0
#pragma once
// The tokenizer that GGUF metadata describes, as the files of a Hugging Face folder.
#include <string>
#include <string_view>

#include "core/json.h"

namespace alambic::checkpoints {

/// tokenizer.json for tokenizer.ggml.model "gpt2" (byte-level BPE, by tokenizer.ggml.pre), "llama" (SentencePiece BPE) or
/// "t5" (SentencePiece unigram). Ids are those transformers 5.23 gives for the same file.
/// metadata  GgufFile::metadata(); source names the file in messages.
/// Error(kData) if keys are missing, of a wrong type or do not fit each other, or if the model or pre-tokenizer is not
/// known: the message names it and the known ones.
Json tokenizer_json_from_gguf(const Json& metadata, std::string_view source);

/// tokenizer_config.json for the same tokenizer: bos, eos, unk and pad token, what is added to a text, and, where the file
/// has one, "chat_template" (a folder of today keeps that in chat_template.jinja instead).
Json tokenizer_config_from_gguf(const Json& metadata, std::string_view source);

struct PreTokenizerName {
  std::string name;            // tokenizer.ggml.pre
  bool ignore_merges = false;  // llama.cpp looks a whole word up first under this name
};

/// The inverse: what llama.cpp calls the byte-level pre-tokenizer of a tokenizer.json. ignore_merges: of its model; a name that
/// goes with it is preferred. Error(kData) showing the pre-tokenizer where none does the same.
PreTokenizerName gguf_pre_tokenizer(const Json& pre_tokenizer, bool ignore_merges, std::string_view source);

}  // namespace alambic::checkpoints
