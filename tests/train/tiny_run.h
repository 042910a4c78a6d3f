// SPDX-License-Identifier: Apache-2.0
#pragma once
// A training run small enough for a test: a model of tests/golden/peft (48 tokens) and token stores of counted-out text.
#include <filesystem>
#include <string>

#include "core/random.h"
#include "data/token_store.h"
#include "tests/golden.h"
#include "train/train_config.h"

namespace alambic::testing {

inline constexpr std::uint32_t kTinyVocabulary = 48;

/// Documents of 3 to 40 tokens in which a token mostly decides the next one; a part of them masked.
inline void write_store(const std::filesystem::path& folder, std::uint64_t num_documents, std::uint64_t seed, std::uint32_t vocabulary = kTinyVocabulary) {
  data::TokenStoreWriter writer(folder, {.tokenizer_hash = "tiny", .vocabulary_size = vocabulary,
                                         .sources = {{.name = "counted", .origin = "made by a test", .licence = "CC0-1.0", .language = "en"},
                                                     {.name = "other", .origin = "made by a test", .licence = "", .language = "mt"}}});
  std::uint64_t draw = seed;
  const auto next = [&](std::uint64_t below) { return (draw = mix64(draw)) % below; };
  for (std::uint64_t i = 0; i < num_documents; ++i) {
    data::Document document;
    document.source = static_cast<std::uint16_t>(i % 2);
    const std::uint64_t length = 3 + next(38);
    for (std::uint64_t t = 0; t < length; ++t) {
      const bool surprise = t == 0 || next(5) == 0;
      document.ids.push_back(static_cast<std::uint32_t>(surprise ? next(vocabulary) : (document.ids.back() * 5 + 3) % vocabulary));
      document.mask.push_back(t > 0 && (t == 1 || next(4) > 0));
      document.num_bytes += 4 * document.mask.back();
    }
    document.num_words = length;
    writer.append(document);
  }
  writer.finish();
}

/// Twenty steps with packing, dropout and two micro-batches a step, over less than three epochs. Stores are made in `folder`.
inline train::TrainConfig tiny_config(const std::filesystem::path& folder, const std::string& run) {
  if (!std::filesystem::exists(folder / "text")) {
    write_store(folder / "text", 60, 1);
    write_store(folder / "held", 12, 2);
  }
  train::TrainConfig config;
  config.model = golden_path("peft/llama_tied");
  config.output = folder / run;
  config.lora.rank = 4;
  config.lora.alpha = 8;
  config.lora.dropout = 0.1;
  config.data.mixture = {{.store = folder / "text"}};
  config.data.row_length = 32;
  config.data.rows_per_batch = 2;
  config.data.batches_per_step = 2;
  config.evaluation.stores = {{.name = "held", .store = folder / "held"}};
  config.evaluation.every = 6;
  config.schedule.learning_rate = 1e-2;
  config.schedule.warmup_steps = 3;
  config.limits.max_steps = 20;
  config.checkpoint.every = 4;
  config.compute_type = "f32";
  config.threads = 2;
  config.seed = 5;
  return config;
}

}  // namespace alambic::testing
