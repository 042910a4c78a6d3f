// SPDX-License-Identifier: Apache-2.0
#pragma once
// What the frozen weights have in common: checking where the dense weight goes, and cutting it into pieces for the threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>

#include "core/error.h"
#include "models/frozen_weight.h"

// A loop compiled for several sets of vector instructions; the processor's best is chosen when the program starts.
#if defined(__x86_64__)
#define ALAMBIC_VECTOR_CLONES [[gnu::target_clones("avx512f", "avx2", "default")]]
#else
#define ALAMBIC_VECTOR_CLONES
#endif

namespace alambic::lora {

inline void check_dense(const models::FrozenWeight& weight, const at::Tensor& out_OI) {
  const bool type_fits = out_OI.scalar_type() == at::kFloat || out_OI.scalar_type() == at::kBFloat16;
  if (!type_fits || out_OI.dim() != 2 || out_OI.size(0) != weight.outputs() || out_OI.size(1) != weight.inputs() ||
      (weight.inputs() > 1 && out_OI.stride(1) != 1) || (weight.outputs() > 1 && out_OI.stride(0) < weight.inputs()))
    fail(ErrorKind::kBug, "a dense weight of [", weight.outputs(), ", ", weight.inputs(), "] cannot be written into ", toString(out_OI.scalar_type()), " ", out_OI.sizes(),
         " with strides ", out_OI.strides());
}

/// write(begin, end, out) for pieces of the flattened [O, I] on all threads; out: where element `begin` goes, float or
/// std::uint16_t (the bits of bf16). A piece never leaves a row unless all rows lie one behind the other.
template <class Write>
void for_each_piece(const at::Tensor& out_OI, const Write& write) {
  constexpr std::int64_t kPiece = 1 << 15;
  const std::int64_t outputs = out_OI.size(0), inputs = out_OI.size(1), stride = outputs > 1 ? out_OI.stride(0) : inputs;
  const auto over = [&]<class Out>(Out* out) {
    if (stride == inputs) {
      at::parallel_for(0, outputs * inputs, kPiece, [&](std::int64_t begin, std::int64_t end) { write(begin, end, out + begin); });
    } else {
      at::parallel_for(0, outputs, std::max<std::int64_t>(1, kPiece / std::max<std::int64_t>(inputs, 1)), [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t row = first; row < last; ++row) write(row * inputs, (row + 1) * inputs, out + row * stride);
      });
    }
  };
  if (out_OI.scalar_type() == at::kFloat) over(out_OI.mutable_data_ptr<float>());
  else over(reinterpret_cast<std::uint16_t*>(out_OI.mutable_data_ptr<at::BFloat16>()));
}

}  // namespace alambic::lora
