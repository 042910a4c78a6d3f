// SPDX-License-Identifier: Apache-2.0
#pragma once
// Hugging Face folder -> GGUF that llama.cpp runs, and PEFT adapter -> GGUF LoRA. docs/gguf.md says what is written and how
// types are chosen.
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "checkpoints/importance_matrix.h"
#include "checkpoints/model_card.h"
#include "core/json.h"

namespace alambic::checkpoints {

struct GgufExportConfig {
  std::filesystem::path folder, output;
  std::string type = "q8_0";  // a mix of gguf_mix.h
  std::string name = "";      // general.name; "": the folder's
  std::string base_name = ""; // what others call the model in `folder`, such as org/model; "": as its card says what it was made from
  const ImportanceMatrix* importance = nullptr;
};

struct GgufExportReport {
  std::filesystem::path output;
  std::string type, architecture, sha256;
  std::map<std::string, std::int64_t> tensors_of_type;
  std::int64_t num_parameters = 0, num_weighted = 0;  // tensors whose errors were weighed
  std::uint64_t num_bytes = 0;
  double seconds = 0;
  std::vector<std::string> warnings;  // what llama.cpp does otherwise, and what the licences ask for
  CardInfo card;                      // for write_export_card, measures to be added
  double bits_per_weight() const;
  Json json() const;
};

/// Error(kUsage): the output exists, no such type. Error(kData): no tokenizer, a family or a switch of it that llama.cpp has
/// not, weights that are not finite or that the type cannot hold, an importance matrix of another model. Nothing is left behind.
GgufExportReport export_gguf(const GgufExportConfig& config);

/// An adapter that a PEFT folder holds, as GGUF LoRA in f32, f16 or bf16 for the base's GGUF. base: the model folder that it was
/// trained on. Error(kUsage) names what llama.cpp cannot add to a base: DoRA, tensors trained whole, rows of tokens.
GgufExportReport export_gguf_adapter(const std::filesystem::path& base, const std::filesystem::path& adapter, const GgufExportConfig& config);

/// Where the card of a GGUF file goes: README.md beside it, or NAME.md for NAME.gguf where there is one already. Error(kUsage): both exist.
std::filesystem::path export_card_path(const std::filesystem::path& output);

/// Writes it, and the texts LICENSE, NOTICE and the like of `folder` that are not beside it yet. Returns the card's path.
std::filesystem::path write_export_card(const GgufExportReport& report, const std::filesystem::path& folder);

}  // namespace alambic::checkpoints
