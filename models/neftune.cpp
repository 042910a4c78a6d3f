// SPDX-License-Identifier: Apache-2.0
#include "models/neftune.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/random.h"
#include "core/vector_loops.h"
#include "models/device.h"
#include "models/shared_row.h"

namespace alambic::models {
namespace {

struct AddNoise {
  /// values[i] += scale * noise(first + i): 64 random bits serve two places, so `first` is even.
  [[gnu::always_inline]] static void run(float* values, std::int64_t count, std::uint64_t first, float scale, std::uint64_t seed) {
    const auto noise = [&](std::uint64_t bits) __attribute__((always_inline)) { return static_cast<float>(static_cast<std::int32_t>(bits)) * 0x1p-31f; };
    std::int64_t i = 0;
    for (; i + 2 <= count; i += 2) {
      const std::uint64_t bits = mix64(seed + (first + static_cast<std::uint64_t>(i)) / 2);
      values[i] += scale * noise(bits & 0xffffffffu);
      values[i + 1] += scale * noise(bits >> 32);
    }
    if (i < count) values[i] += scale * noise(mix64(seed + (first + static_cast<std::uint64_t>(i)) / 2) & 0xffffffffu);
  }
};

}  // namespace

void add_neftune_noise_in_place(at::Tensor& h_TD, const std::vector<std::int64_t>& document_lengths, double alpha, std::uint64_t seed, const SharedRow* shared) {
  if (alpha == 0 || seed == 0) return;
  if (!h_TD.is_cpu()) return add_neftune_noise_by_operators(h_TD, document_lengths, alpha, seed);
  if (h_TD.scalar_type() != at::kFloat || !h_TD.is_contiguous()) fail(ErrorKind::kBug, "noise on embeddings of type ", toString(h_TD.scalar_type()));
  const std::int64_t width = h_TD.size(1);
  const std::uint64_t own_seed = derive_seed(seed, "neftune");
  float* const values = h_TD.mutable_data_ptr<float>();
  struct Piece {
    std::int64_t row, place, count;  // rows from `row` on are the documents' rows from `place` on
  };
  std::vector<Piece> pieces;
  if (shared == nullptr) pieces.push_back({0, 0, h_TD.size(0)});
  for (int half = 0; shared != nullptr && half < 2; ++half) pieces.push_back({half * shared->chunk(), shared->first(shared->context().member, half), shared->chunk()});
  std::int64_t begin = 0;
  for (const std::int64_t length : document_lengths) {
    const auto scale = static_cast<float>(alpha / std::sqrt(static_cast<double>(length) * static_cast<double>(width)));
    // A row begins at an even place whatever the width, so that rows can be drawn one by one.
    const auto padded_width = static_cast<std::uint64_t>(width + width % 2);
    for (const Piece& piece : pieces) {
      const std::int64_t first = std::max(begin, piece.place), end = std::min(begin + length, piece.place + piece.count);
      if (first >= end) continue;
      at::parallel_for(first, end, std::max<std::int64_t>(1, (1 << 14) / width), [&](std::int64_t from, std::int64_t to) {
        for (std::int64_t place = from; place < to; ++place)
          run_vectorised<AddNoise>(values + (place - piece.place + piece.row) * width, width, static_cast<std::uint64_t>(place) * padded_width, scale, own_seed);
      });
    }
    begin += length;
  }
}

void add_neftune_noise_by_operators(at::Tensor& h_TD, const std::vector<std::int64_t>& document_lengths, double alpha, std::uint64_t seed) {
  const at::NoGradGuard constant;
  const at::Tensor scale_T1 = at::empty({h_TD.size(0), 1}, at::kFloat);
  std::int64_t begin = 0;
  for (const std::int64_t length : document_lengths) {
    scale_T1.narrow(0, begin, length).fill_(alpha / std::sqrt(static_cast<double>(length) * static_cast<double>(h_TD.size(1))));
    begin += length;
  }
  const at::Tensor noise_TD = at::empty_like(h_TD.detach(), at::MemoryFormat::Contiguous).uniform_(-1, 1, generator_on(h_TD.device(), derive_seed(seed, "neftune")));
  h_TD.detach().add_(noise_TD.mul_(scale_T1.to(h_TD.device())));
}

}  // namespace alambic::models
