// SPDX-License-Identifier: Apache-2.0
#pragma once
// A model folder with more tokens: their texts in tokenizer.json, a row each in embedding and head, all else as it was, bit for bit.
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "core/json.h"

namespace alambic::checkpoints {

struct ExtendConfig {
  std::filesystem::path base, output;
  std::vector<std::string> tokens;
  bool special = false;         // never split, whatever the normaliser does, and left out of decoded text where that is asked for
  /// What a new row begins as. mean: of the rows of the pieces that the old tokenizer makes of the token's text; mean-norm: the
  /// same, scaled to the mean of those rows' norms (a mean of unlike rows is short); random: normal, with the mean and the
  /// deviation that each column has over the old rows.
  std::string init = "mean";
  std::int64_t pad_to_multiple = 1;  // the number of rows is rounded up to it; rows of no token are the mean of the old ones
  std::uint64_t seed = 0;            // of random
  std::string name, base_name;       // in the card; "": of the folders
};

struct NewToken {
  std::string text;
  std::int64_t id = 0;
  std::vector<std::int64_t> pieces;  // ids that the old tokenizer gives the text
};

struct ExtendReport {
  std::filesystem::path output;
  bool already_done = false;
  std::vector<NewToken> tokens;
  std::int64_t rows_before = 0, rows = 0;  // of the embedding
  bool head_tied = false;
  std::vector<std::string> warnings;
  Json json() const;
};

/// Error(kUsage): no token, an empty one, one given twice, one the tokenizer knows already (also under another spelling that its
/// normaliser makes the same), one whose text would still be split; all of them at once. The output exists and is not this
/// very extension. Error(kData): no tokenizer, or one with more tokens than the model has rows. Error(kResource): disk.
/// The written folder is read again and compared before it is published; after an error nothing is left behind.
ExtendReport extend_folder(const ExtendConfig& config);

}  // namespace alambic::checkpoints
