// SPDX-License-Identifier: Apache-2.0
#pragma once
// The sizes of a student: given, or found so that it has a share of its teacher's parameters.
#include <cstdint>
#include <string>
#include <vector>

#include "core/config.h"
#include "core/json.h"
#include "models/config.h"

namespace alambic::distill {

/// The sizes that make a decoder's number of parameters; a head's size is never changed.
struct Shape {
  std::int64_t vocabulary = 0, hidden = 0, intermediate = 0, heads = 0, kv_heads = 0, layers = 0;
  bool operator==(const Shape&) const = default;
  Json json() const;  // under the names of config.json
};

Shape shape_of(const models::ModelConfig& config);
std::int64_t parameters_of(const models::ModelConfig& base, const Shape& shape);

/// 0: as `keep` has it, or else as the base has it. Names as in config.json.
struct SizesConfig {
  std::int64_t hidden_size = 0, intermediate_size = 0, num_attention_heads = 0, num_key_value_heads = 0, num_hidden_layers = 0;
  std::vector<std::string> layers;  // numbers and ranges "0..9" of the base's layers to keep
  void visit(FieldVisitor& fields);
};

/// Numbers of `layers`, ascending. Error(kUsage): not a number or a range, given twice, not below num_layers.
std::vector<std::int64_t> layer_numbers(const std::vector<std::string>& layers, std::int64_t num_layers);

/// With keep = 0: the sizes given, the others as the base has them. With a share of all parameters of the base: all axes in
/// `shrink` (hidden, mlp, heads, depth) that have no size given are multiplied by one factor, the largest in thousandths with
/// which the student has at most that share; then the intermediate size, if it is among them, takes what is left. Hidden and
/// intermediate size are rounded to the nearest multiple of round_to (and are never more than the base's); layers to the nearest
/// whole number; heads to the nearest number that keeps the same number of query heads in each group of a key-value head, of
/// two as near the one with more key-value heads. vocabulary: rows of the student's embedding.
/// Error(kUsage): a share that no factor reaches, or sizes that contradict each other, or (unless may_grow) more than the base has.
Shape chosen_shape(const models::ModelConfig& base, const SizesConfig& sizes, double keep, const std::vector<std::string>& shrink, std::int64_t round_to,
                   std::int64_t vocabulary, bool may_grow);

}  // namespace alambic::distill
