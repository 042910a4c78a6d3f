// SPDX-License-Identifier: Apache-2.0
#pragma once
// A fixed batch of tokens on which two decoders are compared.
// Letters: T = tokens, V = vocabulary.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "models/decoder.h"

namespace alambic::checkpoints {

struct Probe {
  std::vector<std::vector<std::int64_t>> documents;
  std::int64_t num_tokens() const;
};

/// Two documents of ids spread over the vocabulary, the same for every model of its size, and the text (at most 64 tokens)
/// where the folder has a tokenizer.json.
Probe make_probe(const std::filesystem::path& model_folder, std::int64_t vocabulary_size, const std::string& text);

/// f32 logits of all documents' tokens, [T, V], evaluating.
at::Tensor probe_logits(const models::Decoder& decoder, const Probe& probe);

struct LogitDistance {
  double largest_difference = 0;  // of a logit; NaN where either is not finite
  double largest_logit = 0;       // of the first, absolute
  double kl = 0;                  // mean over T of KL(softmax(a) || softmax(b)), nats, in f64
};
LogitDistance logit_distance(const at::Tensor& a_TV, const at::Tensor& b_TV);

}  // namespace alambic::checkpoints
