// SPDX-License-Identifier: Apache-2.0
#pragma once
// NEFTune (arXiv:2310.05914): noise on embeddings while fine-tuning.
#include <cstdint>
#include <vector>

namespace at {
class Tensor;
}

namespace alambic::models {

class SharedRow;

/// Adds uniform noise in (-1, 1) * alpha / sqrt(L * D) to each row of the embedded tokens, L being the number of tokens of the
/// row's document (not of a packed row or of padding). Each number is a function of (seed, place), so a recompute and a
/// resumed run draw the same. Nothing happens where alpha or seed is 0: no noise, or not training.
/// shared: the rows are a rank's own of the documents' (models/shared_row.h), and get the noise that they get in one piece.
/// h_TD  f32, contiguous; changed in place, also where autograd watches (noise is a constant, so gradients pass through).
void add_neftune_noise_in_place(at::Tensor& h_TD, const std::vector<std::int64_t>& document_lengths, double alpha, std::uint64_t seed, const SharedRow* shared = nullptr);

/// What it does elsewhere than in a processor's memory: the device's own numbers (models/device.h), a function of seed and shape.
void add_neftune_noise_by_operators(at::Tensor& h_TD, const std::vector<std::int64_t>& document_lengths, double alpha, std::uint64_t seed);

}  // namespace alambic::models
