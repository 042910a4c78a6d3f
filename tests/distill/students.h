// SPDX-License-Identifier: Apache-2.0
#pragma once
// Model folders and token stores to prune, made from the goldens of tests/oracle/families_oracle.py.
#include <string>
#include <vector>

#include "checkpoints/hf_folder.h"
#include "core/files.h"
#include "data/token_store.h"
#include "tests/models/tiny_model.h"

namespace alambic::testing {

/// The golden's model as a folder, without a tokenizer.
inline void write_model(const Golden& golden, const fs::path& folder) {
  fs::create_directories(folder);
  write_file(folder / "config.json", golden.metadata().at("config"));
  write_file(folder / "README.md", "---\nlicense: apache-2.0\n---\n# A base\n");
  const auto shapes = models::expected_shapes(models::read_model_config(folder));
  checkpoints::write_weights(folder, shapes, at::kFloat, [&](std::size_t i) { return golden[shapes[i].first]; });
}

/// The golden's documents as a token store.
inline void write_store(const Golden& golden, const fs::path& folder, const std::string& tokenizer_hash = "", std::uint32_t vocabulary = 64) {
  const models::Input input = input_of(golden);
  data::TokenStoreWriter writer(folder, {.tokenizer_hash = tokenizer_hash, .vocabulary_size = vocabulary, .sources = {{"ids", "nowhere", "CC0-1.0", "en"}}});
  const std::int64_t* id = input.tokens_T.const_data_ptr<std::int64_t>();
  for (const std::int64_t length : input.document_lengths) {
    data::Document document;
    for (std::int64_t i = 0; i < length; ++i) document.ids.push_back(static_cast<std::uint32_t>(*id++));
    document.mask.assign(document.ids.size(), 1);
    document.mask[0] = 0;
    document.num_bytes = 4 * (document.ids.size() - 1);
    document.num_words = document.ids.size();
    writer.append(document);
  }
  writer.finish();
}

}  // namespace alambic::testing
