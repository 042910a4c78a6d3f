// SPDX-License-Identifier: Apache-2.0
#pragma once
// Cross-entropy of a frozen f32 head by tiles of the vocabulary: a running softmax as in attention (arXiv:2205.14135), keys and
// values being the head's rows. Logits exist only as tiles in a processor's cache, and are made once for value and gradient.
// Letters: K = rows, D = hidden size, V = vocabulary.
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace alambic::models {

/// nats[i] gets the value of row i as kernels::cross_entropy_rows defines it; d_hidden_KD, unless undefined, its gradient.
/// hidden_KD, weight_VD, d_hidden_KD: f32, rows contiguous. Nothing depends on the number of threads.
void tiled_cross_entropy(const at::Tensor& hidden_KD, const at::Tensor& weight_VD, const std::int64_t* targets, double smoothing, double z_loss, double* nats,
                         at::Tensor& d_hidden_KD);

}  // namespace alambic::models
