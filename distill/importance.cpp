// SPDX-License-Identifier: Apache-2.0
#include "distill/importance.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <numeric>

#include "core/error.h"
#include "core/log.h"
#include "data/batch_stream.h"
#include "train/cross_entropy.h"

namespace alambic::distill {
namespace {

constexpr double kTiny = 1e-30;  // under the product of two norms: a stream of zeros has no direction, and is taken as turned

models::Input input_of(const at::Tensor& tokens_T) {
  return {.tokens_T = tokens_T, .positions_T = at::arange(tokens_T.size(0)), .document_lengths = {tokens_T.size(0)}};
}

// Sum over tokens of the cosine between rows of before_TD and after_TD.
double cosine_sum(const at::Tensor& before_TD, const at::Tensor& after_TD) {
  const at::Tensor a_TD = before_TD.to(at::kDouble), b_TD = after_TD.to(at::kDouble);
  const auto norm = [](const at::Tensor& x_TD) { return at::linalg_vector_norm(x_TD, 2, at::IntArrayRef{1}); };
  return ((a_TD * b_TD).sum(1) / (norm(a_TD) * norm(b_TD)).clamp_min(kTiny)).sum().item<double>();
}

double loss_of(const models::Decoder& decoder, const std::vector<Sequence>& sample) {
  double nats = 0;
  for (const Sequence& sequence : sample) {
    const at::Tensor hidden_TD = decoder.hidden_TD(input_of(sequence.tokens_T));
    nats += train::cross_entropy_of_kept(hidden_TD, decoder.head, sequence.targets_T, sequence.keep_T).sum(at::kDouble).item<double>();
  }
  return nats;
}

}  // namespace

void CalibrationConfig::visit(FieldVisitor& fields) {
  fields.field("stores", stores, {.help = "token stores whose text the parts of the model are scored on, made with its tokenizer"});
  fields.field("row_length", row_length, {.help = "most tokens of a sequence; longer documents become several", .unit = "tokens", .low = 2, .high = 1 << 20});
  fields.field("max_tokens", max_tokens, {.help = "tokens read of each store, spread over it; 0: all", .unit = "tokens", .low = 0, .high = 1e15});
  fields.field("aggregate", aggregate, {.help = "magnitudes of an activation as one score: mean over a sequence and root of the sum of squares over sequences (mean-l2); mean over all tokens; root mean square over all tokens",
                                        .choices = {"mean-l2", "mean", "rms"}});
}

void for_each_sequence(const std::vector<data::TokenStore>& stores, const CalibrationConfig& config, const std::function<void(const Sequence&)>& act) {
  for (const data::TokenStore& store : stores) {
    data::EvaluationBatches batches(store, config.row_length, /*rows_per_batch=*/1, static_cast<std::uint64_t>(config.max_tokens));
    while (const std::optional<data::EvaluationBatch> next = batches.next()) {
      const data::Batch& batch = next->batch;
      std::int64_t first = 0;
      for (const std::int64_t length : batch.document_lengths) {
        act({.tokens_T = batch.tokens_T.narrow(0, first, length), .targets_T = batch.targets_T.narrow(0, first, length), .keep_T = batch.keep_T.narrow(0, first, length)});
        first += length;
      }
    }
  }
}

ImportanceSums::ImportanceSums(const models::Decoder& decoder, std::string aggregate) : decoder_(decoder), aggregate_(std::move(aggregate)) {
  const models::ModelConfig& config = decoder.config;
  const auto zeros = [](std::int64_t size) { return at::zeros({size}, at::kDouble); };
  for (std::size_t layer = 0; layer < decoder.blocks.size(); ++layer) {
    neurons_.push_back(zeros(config.intermediate_size));
    heads_.push_back(zeros(config.num_heads));
    attention_channels_.push_back(zeros(config.hidden_size));
    mlp_channels_.push_back(zeros(config.hidden_size));
  }
  last_channels_ = zeros(config.hidden_size);
  cosines_.assign(decoder.blocks.size(), 0);
}

void ImportanceSums::add_magnitudes(at::Tensor& sum_N, const at::Tensor& magnitudes_TN) const {
  if (aggregate_ == "mean-l2") sum_N += magnitudes_TN.mean(0).square_();
  else if (aggregate_ == "mean") sum_N += magnitudes_TN.sum(0);
  else sum_N += magnitudes_TN.square().sum(0);
}

void ImportanceSums::add(const at::Tensor& tokens_T) {
  const at::NoGradGuard no_gradients;
  const auto magnitudes = [](const at::Tensor& x_TN) { return x_TN.to(at::kDouble).abs_(); };
  at::Tensor before_TD;
  const models::Observer observer = [&](models::Place place, std::size_t layer, const at::Tensor& x) {
    switch (place) {
      case models::Place::kBlockInput: before_TD = x; break;
      case models::Place::kAttentionInput: add_magnitudes(attention_channels_[layer], magnitudes(x)); break;
      case models::Place::kHeads:
        add_magnitudes(heads_[layer], at::linalg_vector_norm(x.to(at::kDouble).unflatten(1, {-1, decoder_.config.head_size}), 2, at::IntArrayRef{2}));
        break;
      case models::Place::kMlpInput: add_magnitudes(mlp_channels_[layer], magnitudes(x)); break;
      case models::Place::kNeurons: add_magnitudes(neurons_[layer], magnitudes(x)); break;
      case models::Place::kBlockOutput: cosines_[layer] += cosine_sum(before_TD, x); break;
    }
  };
  models::Input input = input_of(tokens_T);
  input.observer = &observer;
  add_magnitudes(last_channels_, magnitudes(decoder_.hidden_TD(input)));
  ++sequences_;
  tokens_ += tokens_T.size(0);
}

Importance ImportanceSums::result() const {
  if (sequences_ == 0) fail(ErrorKind::kBug, "importance of no sequence at all");
  const auto tokens = static_cast<double>(tokens_);
  const auto score = [&](const at::Tensor& sum_N) { return aggregate_ == "mean-l2" ? sum_N.sqrt() : aggregate_ == "mean" ? sum_N / tokens : (sum_N / tokens).sqrt(); };
  Importance importance{.sequences = sequences_, .tokens = tokens_};
  std::vector<at::Tensor> neurons, heads;
  importance.channels_D = score(last_channels_);
  std::vector<double> influence;
  for (std::size_t layer = 0; layer < neurons_.size(); ++layer) {
    neurons.push_back(score(neurons_[layer]));
    heads.push_back(score(heads_[layer]));
    importance.channels_D += score(attention_channels_[layer]) + score(mlp_channels_[layer]);
    influence.push_back(1 - cosines_[layer] / tokens);
  }
  importance.neurons_LF = at::stack(neurons);
  importance.heads_LH = at::stack(heads);
  importance.block_influence_L = at::zeros({static_cast<std::int64_t>(influence.size())}, at::kDouble);
  std::copy(influence.begin(), influence.end(), importance.block_influence_L.mutable_data_ptr<double>());
  for (const at::Tensor& scores : {importance.neurons_LF, importance.heads_LH, importance.channels_D, importance.block_influence_L})
    if (!at::isfinite(scores).all().item<bool>()) fail(ErrorKind::kNumerics, "the model's activations on the calibration text are not finite", Remedy{"compute in f32, or look at the weights"});
  return importance;
}

Importance measure_importance(const models::Decoder& decoder, const std::vector<data::TokenStore>& stores, const CalibrationConfig& config) {
  ImportanceSums sums(decoder, config.aggregate);
  for_each_sequence(stores, config, [&](const Sequence& sequence) { sums.add(sequence.tokens_T); });
  return sums.result();
}

models::Decoder with_layers(const models::Decoder& decoder, const std::vector<std::int64_t>& layers) {
  models::Decoder kept = decoder;
  kept.blocks.clear();
  kept.config.layers.clear();
  for (const std::int64_t layer : layers) {
    kept.blocks.push_back(decoder.blocks.at(static_cast<std::size_t>(layer)));
    kept.config.layers.push_back(decoder.config.layers.at(static_cast<std::size_t>(layer)));
  }
  kept.config.num_layers = static_cast<std::int64_t>(layers.size());
  return kept;
}

std::vector<std::int64_t> largest(const at::Tensor& scores_N, std::int64_t count) {
  const at::Tensor scores = scores_N.to(at::kDouble).contiguous();
  const double* const score = scores.const_data_ptr<double>();
  std::vector<std::int64_t> order(static_cast<std::size_t>(scores.numel()));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return score[a] > score[b]; });
  order.resize(static_cast<std::size_t>(count));
  std::sort(order.begin(), order.end());
  return order;
}

std::vector<std::int64_t> layers_by_influence(const at::Tensor& block_influence_L, std::int64_t count) { return largest(block_influence_L, count); }

std::vector<std::int64_t> layers_by_loss(const models::Decoder& decoder, std::int64_t count, const std::vector<data::TokenStore>& stores, const CalibrationConfig& config) {
  const at::NoGradGuard no_gradients;
  std::vector<Sequence> sample;
  for_each_sequence(stores, config, [&](const Sequence& sequence) { sample.push_back(sequence); });
  std::vector<std::int64_t> kept(decoder.blocks.size());
  std::iota(kept.begin(), kept.end(), 0);
  while (static_cast<std::int64_t>(kept.size()) > count) {
    std::size_t best = 0;
    double least = 0;
    for (std::size_t i = 0; i < kept.size(); ++i) {
      std::vector<std::int64_t> without = kept;
      without.erase(without.begin() + static_cast<std::ptrdiff_t>(i));
      const double nats = loss_of(with_layers(decoder, without), sample);
      if (i == 0 || nats < least) least = nats, best = i;
    }
    log_info("layer ", kept[best], " is dropped, ", kept.size() - 1, " are left; loss of the sample ", least, " nats");
    kept.erase(kept.begin() + static_cast<std::ptrdiff_t>(best));
  }
  return kept;
}

}  // namespace alambic::distill
