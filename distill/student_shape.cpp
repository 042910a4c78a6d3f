// SPDX-License-Identifier: Apache-2.0
#include "distill/student_shape.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <set>

#include "core/error.h"

namespace alambic::distill {
namespace {

constexpr int kSteps = 1000;  // factors tried

struct HeadCounts {
  std::int64_t heads, kv_heads;
};

HeadCounts nearest_heads(const Shape& base, double wanted) {
  const std::int64_t most = base.heads / base.kv_heads;
  HeadCounts best{base.heads, base.kv_heads};
  for (std::int64_t kv_heads = base.kv_heads; kv_heads >= 1; --kv_heads)
    for (std::int64_t in_group = most; in_group >= 1; --in_group) {
      const std::int64_t heads = kv_heads * in_group;
      if (std::abs(static_cast<double>(heads) - wanted) < std::abs(static_cast<double>(best.heads) - wanted)) best = {heads, kv_heads};
    }
  return best;
}

std::int64_t rounded(std::int64_t size, double factor, std::int64_t round_to) {
  if (factor >= 1) return size;
  const auto multiple = static_cast<std::int64_t>(std::llround(factor * static_cast<double>(size) / static_cast<double>(round_to))) * round_to;
  return std::min(size, std::max(round_to, multiple));
}

bool has(const std::vector<std::string>& list, const char* name) { return std::find(list.begin(), list.end(), name) != list.end(); }

void check_shape(const Shape& shape, const Shape& base, bool may_grow) {
  std::string problems, remedy;
  const auto problem = [&](const std::string& line) { problems += (problems.empty() ? "" : "\n") + line; };
  const auto problem_of_heads = [&](const std::string& line) {
    problem(line);
    remedy = "heads are kept evenly: of each key-value head that is kept, the same number of query heads";
  };
  if (shape.heads % shape.kv_heads != 0)
    problem_of_heads("sizes: num_attention_heads = " + std::to_string(shape.heads) + " is not a multiple of num_key_value_heads = " + std::to_string(shape.kv_heads));
  if (!may_grow) {
    const auto at_most = [&](const char* key, std::int64_t size, std::int64_t most) {
      if (size > most) problem(std::string("sizes.") + key + ": " + std::to_string(size) + " is more than the " + std::to_string(most) + " of the model that is pruned");
    };
    at_most("hidden_size", shape.hidden, base.hidden);
    at_most("intermediate_size", shape.intermediate, base.intermediate);
    at_most("num_attention_heads", shape.heads, base.heads);
    at_most("num_key_value_heads", shape.kv_heads, base.kv_heads);
    at_most("num_hidden_layers", shape.layers, base.layers);
    if (shape.heads / shape.kv_heads > base.heads / base.kv_heads)
      problem_of_heads("sizes: " + std::to_string(shape.heads / shape.kv_heads) + " query heads for each key-value head, the model that is pruned has " + std::to_string(base.heads / base.kv_heads));
  }
  if (!problems.empty()) fail(ErrorKind::kUsage, problems, Remedy{remedy});
}

}  // namespace

Json Shape::json() const {
  return {{"vocab_size", vocabulary}, {"hidden_size", hidden}, {"intermediate_size", intermediate}, {"num_attention_heads", heads}, {"num_key_value_heads", kv_heads}, {"num_hidden_layers", layers}};
}

Shape shape_of(const models::ModelConfig& config) {
  return {config.vocabulary_size, config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads, config.num_layers};
}

std::int64_t parameters_of(const models::ModelConfig& base, const Shape& shape) {
  models::ModelConfig config = base;
  config.vocabulary_size = shape.vocabulary;
  config.hidden_size = shape.hidden;
  config.intermediate_size = shape.intermediate;
  config.num_heads = shape.heads;
  config.num_kv_heads = shape.kv_heads;
  config.num_layers = shape.layers;
  return config.num_parameters();
}

void SizesConfig::visit(FieldVisitor& fields) {
  constexpr double kMost = 1 << 20;
  fields.field("hidden_size", hidden_size, {.help = "channels of the residual stream; 0: as keep has it, else as the model has it", .low = 0, .high = kMost});
  fields.field("intermediate_size", intermediate_size, {.help = "neurons of each feed-forward part; 0: likewise", .low = 0, .high = kMost});
  fields.field("num_attention_heads", num_attention_heads, {.help = "query heads; 0: likewise", .low = 0, .high = 1 << 14});
  fields.field("num_key_value_heads", num_key_value_heads, {.help = "key and value heads; 0: the most that num_attention_heads allows", .low = 0, .high = 1 << 14});
  fields.field("num_hidden_layers", num_hidden_layers, {.help = "layers; 0: as keep has it, else as the model has it. depth_by says which are kept", .low = 0, .high = 10000});
  fields.field("layers", layers, {.help = "the layers to keep, by number and range (\"0..9\"), instead of num_hidden_layers"});
}

std::vector<std::int64_t> layer_numbers(const std::vector<std::string>& layers, std::int64_t num_layers) {
  std::set<std::int64_t> numbers;
  const auto number_of = [&](std::string_view text, const std::string& entry) {
    std::int64_t number = -1;
    const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (problem != std::errc{} || end != text.data() + text.size() || number < 0 || number >= num_layers)
      fail(ErrorKind::kUsage, "sizes.layers: ", to_line(Json(entry)), " must be a layer from 0 to ", num_layers - 1, " or a range of them", Remedy{"for example [0..9, 20, 29]"});
    return number;
  };
  for (const std::string& entry : layers) {
    const std::size_t between = entry.find("..");
    const std::string_view text = entry;
    const std::int64_t first = number_of(text.substr(0, between), entry), last = between == std::string::npos ? first : number_of(text.substr(between + 2), entry);
    if (last < first) fail(ErrorKind::kUsage, "sizes.layers: the range ", to_line(Json(entry)), " ends before it begins");
    for (std::int64_t number = first; number <= last; ++number)
      if (!numbers.insert(number).second) fail(ErrorKind::kUsage, "sizes.layers: layer ", number, " is named twice");
  }
  return {numbers.begin(), numbers.end()};
}

Shape chosen_shape(const models::ModelConfig& model, const SizesConfig& sizes, double keep, const std::vector<std::string>& shrink, std::int64_t round_to,
                   std::int64_t vocabulary, bool may_grow) {
  const Shape base = shape_of(model);
  const auto with_factor = [&](double factor) {
    const auto size = [&](std::int64_t given, const char* axis, std::int64_t of_base) { return given > 0 ? given : has(shrink, axis) ? rounded(of_base, factor, round_to) : of_base; };
    Shape shape = base;
    shape.vocabulary = vocabulary;
    shape.hidden = size(sizes.hidden_size, "hidden", base.hidden);
    shape.intermediate = size(sizes.intermediate_size, "mlp", base.intermediate);
    if (!sizes.layers.empty()) shape.layers = static_cast<std::int64_t>(layer_numbers(sizes.layers, base.layers).size());
    else if (sizes.num_hidden_layers > 0) shape.layers = sizes.num_hidden_layers;
    else if (has(shrink, "depth")) shape.layers = rounded(base.layers, factor, 1);
    if (sizes.num_attention_heads > 0) {
      shape.heads = sizes.num_attention_heads;
      shape.kv_heads = sizes.num_key_value_heads;
      for (std::int64_t kv_heads = base.kv_heads; shape.kv_heads == 0; --kv_heads)  // ends at 1, which divides everything
        if (shape.heads % kv_heads == 0) shape.kv_heads = kv_heads;
    } else if (sizes.num_key_value_heads > 0) {
      shape.kv_heads = sizes.num_key_value_heads;
      shape.heads = shape.kv_heads * (base.heads / base.kv_heads);
    } else if (has(shrink, "heads")) {
      const HeadCounts counts = nearest_heads(base, factor * static_cast<double>(base.heads));
      shape.heads = counts.heads, shape.kv_heads = counts.kv_heads;
    }
    check_shape(shape, base, may_grow);
    return shape;
  };
  if (keep == 0) return with_factor(1);
  const double most = keep * static_cast<double>(model.num_parameters());
  const auto fits = [&](const Shape& shape) { return static_cast<double>(parameters_of(model, shape)) <= most; };
  for (int step = kSteps; step >= 1; --step) {
    Shape shape = with_factor(static_cast<double>(step) / kSteps);
    if (!fits(shape)) continue;
    if (has(shrink, "mlp") && sizes.intermediate_size == 0)
      for (Shape more = shape; more.intermediate < base.intermediate; shape = more) {
        more.intermediate = std::min(base.intermediate, more.intermediate + round_to);
        if (!fits(more)) break;
      }
    return shape;
  }
  std::string axes;
  for (const std::string& axis : shrink) axes += (axes.empty() ? "" : ", ") + axis;
  fail(ErrorKind::kUsage, "keep: ", keep, " of ", model.num_parameters(), " parameters cannot be reached by making ", axes.empty() ? "nothing" : axes, " smaller; the least is ",
       parameters_of(model, with_factor(1.0 / kSteps)), Remedy{"let more axes shrink, a smaller vocabulary, or keep more"});
}

}  // namespace alambic::distill
