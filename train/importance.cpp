// SPDX-License-Identifier: Apache-2.0
#include "train/importance.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <functional>

#include "checkpoints/gguf_names.h"
#include "core/error.h"
#include "core/files.h"
#include "data/batch_stream.h"
#include "data/tokenizer.h"
#include "train/step.h"

namespace alambic::train {
namespace {

/// Passes the inputs through the decoder and takes the sums; each() calls back with every input.
checkpoints::ImportanceMatrix measure(models::Decoder& decoder, const std::string& what, std::int64_t row_length,
                                      const std::function<void(const std::function<void(const models::Input&)>&)>& each) {
  const at::NoGradGuard no_grad;
  const checkpoints::GgufArchitecture* architecture = nullptr;
  for (const checkpoints::GgufArchitecture& candidate : checkpoints::gguf_architectures())
    if (candidate.model_type == decoder.config.family->model_type) architecture = &candidate;
  if (architecture == nullptr) fail(ErrorKind::kData, "GGUF has no names for the family ", decoder.config.family->model_type);

  struct Restore {
    models::Decoder& decoder;
    bool fused;
    ~Restore() {
      for (const models::NamedLinear& named : decoder.linears()) named.linear->input_squares_I = at::Tensor();
      decoder.fused = fused;
    }
  } const restore{decoder, decoder.fused};
  decoder.fused = false;
  for (const models::NamedLinear& named : decoder.linears())
    if (named.layer >= 0) named.linear->input_squares_I = at::zeros({named.linear->inputs()}, at::kDouble);
  std::int64_t tokens = 0;
  each([&](const models::Input& input) {
    decoder.hidden_TD(input);
    tokens += input.tokens_T.numel();
  });
  if (tokens == 0) fail(ErrorKind::kData, what, ": holds no token to measure on");

  checkpoints::ImportanceMatrix matrix;
  matrix.datasets = {what};
  matrix.chunk_size = static_cast<std::uint32_t>(row_length);
  std::map<std::string, std::string> names;
  for (const checkpoints::GgufMove& move : checkpoints::gguf_moves(decoder.config, *architecture)) names.emplace(move.published, move.gguf);
  for (const models::NamedLinear& named : decoder.linears()) {
    if (named.layer < 0) continue;
    const at::Tensor squares = named.linear->input_squares_I.to(at::kFloat);
    if (!at::isfinite(squares).all().item<bool>()) fail(ErrorKind::kNumerics, what, ": the inputs of ", named.path, " are not finite");
    matrix.entries.emplace(names.at(named.path + ".weight"), checkpoints::ImportanceMatrix::Entry{.squares_I = squares, .tokens = static_cast<float>(tokens)});
  }
  return matrix;
}

}  // namespace

checkpoints::ImportanceMatrix measure_importance(models::Decoder& decoder, const data::TokenStore& store, std::int64_t row_length, std::uint64_t max_tokens) {
  if (store.info().vocabulary_size > decoder.config.vocabulary_size)
    fail(ErrorKind::kData, store.folder().string(), ": its tokenizer has ", store.info().vocabulary_size, " tokens, the model only ", decoder.config.vocabulary_size,
         Remedy{"prepare the text with the tokenizer of this model"});
  return measure(decoder, store.folder().filename().string(), row_length, [&](const auto& pass) {
    data::EvaluationBatches batches(store, row_length, 1, max_tokens);
    while (const std::optional<data::EvaluationBatch> next = batches.next()) pass(input_of(next->batch, /*dropout_seed=*/0));
  });
}

checkpoints::ImportanceMatrix measure_importance(models::Decoder& decoder, const std::filesystem::path& model_folder, const std::filesystem::path& text,
                                                 std::int64_t row_length, std::uint64_t max_tokens) {
  constexpr std::uint64_t kLongest = 256 << 20;
  const std::vector<std::uint32_t> ids = data::Tokenizer::from_file(model_folder).encode(read_file(text, kLongest), /*add_special_tokens=*/false);
  const std::size_t count = max_tokens > 0 ? std::min<std::size_t>(ids.size(), max_tokens) : ids.size();
  return measure(decoder, text.filename().string(), row_length, [&](const auto& pass) {
    for (std::size_t begin = 0; begin < count; begin += static_cast<std::size_t>(row_length)) {
      const auto length = static_cast<std::int64_t>(std::min(count - begin, static_cast<std::size_t>(row_length)));
      std::vector<std::int64_t> piece;
      for (std::int64_t i = 0; i < length; ++i) {
        const std::uint32_t id = ids[begin + static_cast<std::size_t>(i)];
        if (id >= decoder.config.vocabulary_size) fail(ErrorKind::kData, text.string(), ": the tokenizer gives id ", id, ", the model has ", decoder.config.vocabulary_size, " tokens");
        piece.push_back(id);
      }
      pass({.tokens_T = at::tensor(piece), .positions_T = at::arange(length, at::kLong), .document_lengths = {length}});
    }
  });
}

}  // namespace alambic::train
