// SPDX-License-Identifier: Apache-2.0
#include "train/compare.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/nonzero.h>

#include <cmath>

#include "core/error.h"
#include "data/batch_stream.h"
#include "models/fused_blocks.h"
#include "train/step.h"

namespace alambic::train {
namespace {

constexpr std::int64_t kRows = 64;  // rows of logits at a time

Json number_or_null(double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); }

}  // namespace

double Comparison::kl_per_token() const { return before.tokens > 0 ? kl / static_cast<double>(before.tokens) : std::nan(""); }
double Comparison::same_share() const { return before.tokens > 0 ? static_cast<double>(same_first) / static_cast<double>(before.tokens) : std::nan(""); }

Json Comparison::json() const {
  return {{"tokens", before.tokens},
          {"bits_per_byte_before", number_or_null(before.bits_per_byte())},
          {"bits_per_byte_after", number_or_null(after.bits_per_byte())},
          {"loss_before", number_or_null(before.loss())},
          {"loss_after", number_or_null(after.loss())},
          {"kl", number_or_null(kl_per_token())},
          {"same_first", number_or_null(same_share())}};
}

Comparison compare(models::Decoder& before, models::Decoder& after, const data::TokenStore& store, std::int64_t row_length, std::uint64_t max_tokens) {
  const at::NoGradGuard no_grad;
  if (before.config.vocabulary_size != after.config.vocabulary_size)
    fail(ErrorKind::kData, "the two models have ", before.config.vocabulary_size, " and ", after.config.vocabulary_size, " tokens and cannot be compared");
  if (store.info().vocabulary_size > before.config.vocabulary_size)
    fail(ErrorKind::kData, store.folder().string(), ": its tokenizer has ", store.info().vocabulary_size, " tokens, the model only ", before.config.vocabulary_size,
         Remedy{"prepare the text with the tokenizer of this model"});
  for (models::Decoder* decoder : {&before, &after}) models::use_fused_blocks(*decoder);  // what it cannot take, ATen operators do
  Comparison result;
  data::EvaluationBatches batches(store, row_length, 1, max_tokens);
  while (const std::optional<data::EvaluationBatch> next = batches.next()) {
    const data::Batch& batch = next->batch;
    for (std::size_t i = 0; i < batch.document_lengths.size(); ++i) {
      result.before.documents += batch.origins[i].first_token == 0;
      result.before.bytes += next->document_bytes[i];
    }
    const at::Tensor kept_K = at::nonzero(batch.keep_T).flatten();
    const at::Tensor targets_K = batch.targets_T.index_select(0, kept_K);
    const at::Tensor one_KD = before.hidden_TD(input_of(batch, 0)).index_select(0, kept_K), other_KD = after.hidden_TD(input_of(batch, 0)).index_select(0, kept_K);
    for (std::int64_t at = 0; at < kept_K.numel(); at += kRows) {
      const std::int64_t count = std::min(kRows, kept_K.numel() - at);
      // f64: of two models that nearly agree, the difference of f32 logarithms would be mostly their rounding.
      const auto log_probabilities = [&](const models::Decoder& decoder, const at::Tensor& hidden_KD) {
        return at::log_softmax(decoder.logits_TV(hidden_KD.narrow(0, at, count)).to(at::kDouble), 1);
      };
      const at::Tensor p_KV = log_probabilities(before, one_KD), q_KV = log_probabilities(after, other_KD);
      const at::Tensor target_K1 = targets_K.narrow(0, at, count).unsqueeze(1);
      result.before.nats -= p_KV.gather(1, target_K1).sum(at::kDouble).item<double>();
      result.after.nats -= q_KV.gather(1, target_K1).sum(at::kDouble).item<double>();
      result.kl += (p_KV.exp() * (p_KV - q_KV)).sum(at::kDouble).item<double>();
      result.same_first += static_cast<std::uint64_t>((p_KV.argmax(1) == q_KV.argmax(1)).sum().item<std::int64_t>());
    }
    result.before.tokens += static_cast<std::uint64_t>(kept_K.numel());
  }
  result.after.tokens = result.before.tokens;
  result.after.bytes = result.before.bytes;
  result.after.documents = result.before.documents;
  if (!std::isfinite(result.before.nats) || !std::isfinite(result.after.nats) || !std::isfinite(result.kl))
    fail(ErrorKind::kNumerics, store.folder().string(), ": the loss of the ", std::isfinite(result.before.nats) ? "quantised" : "original", " model is not finite");
  return result;
}

}  // namespace alambic::train
