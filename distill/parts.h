// SPDX-License-Identifier: Apache-2.0
#pragma once
// Which layers, channels, neurons, heads and tokens of a base make a student, and the base's tensors cut down to them.
// Families differ by their slots alone (models/family.h): nothing here asks for a name.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "core/json.h"
#include "distill/importance.h"
#include "distill/student_shape.h"
#include "models/decoder.h"

namespace alambic::distill {

/// i64 indices into the base, ascending; an undefined tensor stands for all of them.
struct Parts {
  std::vector<std::int64_t> layers;     // of the base, in the student's order
  at::Tensor channels = {}, tokens = {};
  std::vector<at::Tensor> neurons = {}, heads = {}, kv_heads = {};  // one for each of `layers`
  std::int64_t rows = 0;                // of the embedding; those behind `tokens` are the mean of the rows that are kept
};

/// The parts of the largest scores. importance: of the base with only `layers` (with_layers). Of heads, the key-value heads whose query
/// heads have the largest sum are kept, and of each the same number of query heads. importance may lack what `shape` keeps whole.
Parts chosen_parts(const models::ModelConfig& base, const Shape& shape, const std::vector<std::int64_t>& layers, const Importance& importance);

/// What a tensor of a decoder is.
struct TensorPlace {
  std::string name;
  models::Slot slot;
  std::int64_t layer = -1;  // -1: outside of the blocks
  bool is_bias = false;
  std::vector<std::int64_t> shape;
};
std::vector<TensorPlace> tensor_places(const models::ModelConfig& config);  // as models::expected_shapes lists them

/// The base's tensor at `place` (a student's, or its twin in the base: the same but for the layer), cut down; in its own type, and
/// itself where all of it is kept. Where the family multiplies embeddings by the root of the hidden size, that root shrinks, so
/// embedding rows are made larger by what it lost; a tied head undoes that in the final norm.
at::Tensor cut_tensor(const at::Tensor& base, const TensorPlace& place, const Parts& parts, const models::ModelConfig& config);

/// config.json of the student: sizes, head_dim where it no longer follows from them, and lists of one entry a layer. Each layer
/// keeps its window and rotation (a layer that the base does not have takes those of its number modulo the base's layers);
/// Error(kUsage) where the family cannot say so.
Json student_config(const models::ModelConfig& base, const Shape& shape, const std::vector<std::int64_t>& layers);

}  // namespace alambic::distill
