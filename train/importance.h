// SPDX-License-Identifier: Apache-2.0
#pragma once
// The importance matrix of a model: mean squares of what each matrix of its blocks is multiplied with, over a text.
#include <cstdint>
#include <filesystem>

#include "checkpoints/importance_matrix.h"
#include "data/token_store.h"
#include "models/decoder.h"

namespace alambic::train {

/// Over the documents that data::EvaluationBatches chooses (max_tokens 0: all of the store), masked tokens too. Names are
/// GGUF's. Embedding and head are not measured, as llama-imatrix does not by default. Error(kData): the store's ids do not fit the
/// decoder. Error(kNumerics): a sum is not finite.
checkpoints::ImportanceMatrix measure_importance(models::Decoder& decoder, const data::TokenStore& store, std::int64_t row_length, std::uint64_t max_tokens = 0);

/// The same over a text file, tokenised with the model folder's tokenizer and cut into pieces of row_length tokens.
checkpoints::ImportanceMatrix measure_importance(models::Decoder& decoder, const std::filesystem::path& model_folder, const std::filesystem::path& text,
                                                 std::int64_t row_length, std::uint64_t max_tokens = 0);

}  // namespace alambic::train
