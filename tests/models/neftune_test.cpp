// SPDX-License-Identifier: Apache-2.0
#include "models/neftune.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "checkpoints/hf_folder.h"
#include "models/decoder.h"
#include "tests/golden.h"

namespace alambic::models {
namespace {

at::Tensor noise(const std::vector<std::int64_t>& lengths, std::int64_t width, double alpha, std::uint64_t seed) {
  at::Tensor h_TD = at::zeros({std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0}), width});
  add_neftune_noise_in_place(h_TD, lengths, alpha, seed);
  return h_TD;
}

/// The largest difference of two samples' distribution functions (Kolmogorov and Smirnov), over its 0.1 % threshold.
double distance(const at::Tensor& one, const at::Tensor& other) {
  const at::Tensor a = std::get<0>(one.flatten().sort()), b = std::get<0>(other.flatten().sort());
  const auto n = static_cast<double>(a.numel()), m = static_cast<double>(b.numel());
  double largest = 0;
  for (std::int64_t i = 0, j = 0; i < a.numel() && j < b.numel();) {
    (a[i].item<float>() <= b[j].item<float>() ? i : j) += 1;
    largest = std::max(largest, std::abs(static_cast<double>(i) / n - static_cast<double>(j) / m));
  }
  return largest / (1.95 * std::sqrt((n + m) / (n * m)));
}

TEST(Neftune, IsDistributedAsTransformersNoise) {  // tests/oracle/optimizer_oracle.py
  const testing::Golden golden("neftune.safetensors");
  SCOPED_TRACE(golden.provenance());
  for (const auto& [alpha, length] : {std::pair{5, 3}, std::pair{5, 50}, std::pair{15, 50}}) {
    const at::Tensor expected = golden[std::to_string(alpha) + "." + std::to_string(length)];
    const at::Tensor drawn = noise({length}, expected.size(1), alpha, 7);
    EXPECT_LT(distance(drawn, expected), 1) << alpha << " " << length;
    EXPECT_GT(distance(drawn * 1.3, expected), length == 3 ? 0.2 : 1);  // the measure sees a wrong scale
    const double bound = alpha / std::sqrt(static_cast<double>(expected.numel()));
    EXPECT_LE(drawn.abs().max().item<double>(), bound * (1 + 1e-6));
    EXPECT_LE(expected.abs().max().item<double>(), bound * (1 + 1e-6));
    EXPECT_GT(drawn.abs().max().item<double>(), 0.9 * bound);
  }
}

TEST(Neftune, EachDocumentHasTheScaleOfItsOwnLength) {
  const at::Tensor both = noise({100, 25}, 64, 5, 3);
  const double first = both.narrow(0, 0, 100).square().mean().item<double>(), second = both.narrow(0, 100, 25).square().mean().item<double>();
  EXPECT_NEAR(first, 25.0 / (100 * 64) / 3, 0.05 * 25.0 / (100 * 64) / 3);  // the variance of a uniform number is bound^2 / 3
  EXPECT_NEAR(second / first, 4, 0.4);
  EXPECT_NEAR(both.mean().item<double>(), 0, 4 * std::sqrt(second / static_cast<double>(both.numel())));
}

TEST(Neftune, IsAFunctionOfSeedAndPlace) {
  const std::vector<std::int64_t> lengths = {900, 3, 900};  // long enough to be cut between threads
  for (const std::int64_t width : {63, 64}) {
    const at::Tensor one = noise(lengths, width, 5, 11);
    const int threads = at::get_num_threads();
    for (const int other : {1, 3}) {
      at::set_num_threads(other);
      EXPECT_TRUE(at::equal(noise(lengths, width, 5, 11), one)) << other << " threads";
    }
    at::set_num_threads(threads);
    EXPECT_FALSE(at::equal(noise(lengths, width, 5, 12), one));
    EXPECT_FALSE(at::equal(one[0], one[1]));
    EXPECT_FALSE(at::equal(one[0], one[903]));  // the first rows of two documents of the same length
    // No place repeats another: as many values as a uniform draw of 24 bits has.
    EXPECT_GT(std::get<0>(at::sort(one.flatten())).diff().ne(0).sum().item<std::int64_t>(), one.numel() * 99 / 100);
  }
  EXPECT_EQ(noise(lengths, 8, 0, 11).abs().max().item<double>(), 0);
  EXPECT_EQ(noise(lengths, 8, 5, 0).abs().max().item<double>(), 0);
}

TEST(Neftune, ADecoderAddsItToItsEmbeddingsWhileTrainingOnly) {
  Decoder decoder = checkpoints::load_decoder(testing::golden_path("peft/gemma3"), at::kFloat);  // scales its embeddings
  Input input{.tokens_T = at::zeros({6}, at::kLong), .positions_T = at::zeros({6}, at::kLong), .document_lengths = {4, 2}};
  const at::Tensor plain = decoder.hidden_TD(input);
  input.neftune_alpha = 5;
  EXPECT_TRUE(at::equal(decoder.hidden_TD(input), plain));  // no dropout_seed: evaluating
  input.dropout_seed = 9;
  const at::Tensor noisy = decoder.hidden_TD(input);
  EXPECT_FALSE(at::equal(noisy, plain));
  EXPECT_TRUE(at::equal(decoder.hidden_TD(input), noisy));  // replays

  // The same as embeddings of which each token has its own, with the noise added beforehand.
  const double scale = std::sqrt(static_cast<double>(decoder.config.hidden_size));
  at::Tensor h_TD = decoder.embedding_VD.index_select(0, input.tokens_T) * scale;
  add_neftune_noise_in_place(h_TD, input.document_lengths, 5, 9);
  decoder.embedding_VD = h_TD / scale;
  Input own = input;
  for (std::int64_t i = 0; i < 6; ++i) own.tokens_T[i] = i;
  own.neftune_alpha = 0;
  EXPECT_LT((decoder.hidden_TD(own) - noisy).abs().max().item<double>(), 1e-5);
}

TEST(Neftune, GradientsPassThroughToATrainedEmbedding) {
  Decoder decoder = checkpoints::load_decoder(testing::golden_path("peft/llama_tied"), at::kFloat);
  decoder.embedding_VD = decoder.embedding_VD.clone().requires_grad_(true);
  Input input{.tokens_T = at::zeros({3}, at::kLong), .positions_T = at::zeros({3}, at::kLong), .document_lengths = {3}, .dropout_seed = 9};
  input.neftune_alpha = 5;
  decoder.hidden_TD(input).square().sum().backward();
  EXPECT_GT(decoder.embedding_VD.grad()[0].abs().max().item<double>(), 0);
}

}  // namespace
}  // namespace alambic::models
