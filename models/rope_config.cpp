// SPDX-License-Identifier: Apache-2.0
#include "models/rope_config.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <set>

namespace alambic::models {
namespace {

constexpr double kTiny = 1e-30;  // "above zero" for factors

std::vector<double> as_doubles(const at::Tensor& values_F) {
  const at::Tensor wide_F = values_F.to(at::kDouble).contiguous();
  return {wide_F.data_ptr<double>(), wide_F.data_ptr<double>() + wide_F.numel()};
}

// The formulas below are those of transformers' modeling_rope_utils.py, step by step in f32, so that the frequencies are
// the same bits: at position 100,000 a frequency that is off by one f32 step turns a head by 0.006 radians.
at::Tensor plain_frequencies(double theta, std::int64_t size) {
  return at::reciprocal(at::pow(theta, at::arange(0, size, 2, at::kFloat) / size));
}

// Llama 3.1 model card, "RoPE scaling": long wavelengths are stretched, short ones kept, those between interpolated.
at::Tensor llama3_frequencies(ConfigReader& reader, double theta, std::int64_t size, double original_positions) {
  const double factor = reader.number("factor", kTiny);
  const double low = reader.number("low_freq_factor", kTiny), high = reader.number("high_freq_factor", kTiny);
  if (low == high) reader.problem("low_freq_factor and high_freq_factor must differ, both are ", low);
  const at::Tensor frequency_F = plain_frequencies(theta, size);
  const at::Tensor wavelength_F = at::reciprocal(frequency_F) * (2 * std::numbers::pi);
  const double longest = original_positions / low, shortest = original_positions / high;
  const at::Tensor scaled_F = at::where(wavelength_F > longest, frequency_F / factor, frequency_F);
  const at::Tensor smooth_F = (at::reciprocal(wavelength_F) * original_positions - low) / (high - low);
  const at::Tensor smoothed_F = (1 - smooth_F) * scaled_F / factor + smooth_F * scaled_F;
  return at::where((wavelength_F < shortest).logical_or(wavelength_F > longest), scaled_F, smoothed_F);
}

double log_scale(double factor, double multiple) { return factor <= 1 ? 1 : 0.1 * multiple * std::log(factor) + 1; }

// YaRN, arXiv:2309.00071, section 3.2.
at::Tensor yarn_frequencies(ConfigReader& reader, double theta, std::int64_t size, double original_positions, double& attention_factor) {
  const double factor = reader.number("factor", kTiny);
  const auto given_or = [&](const char* key, double otherwise) {  // 0 and null stand for "not given", as in transformers
    const double value = reader.is_null(key) ? 0 : reader.number(key, 0);
    return value == 0 ? otherwise : value;
  };
  const double fast = given_or("beta_fast", 32), slow = given_or("beta_slow", 1);
  const double scale = given_or("mscale", 0), scale_all = given_or("mscale_all_dim", 0);
  if (!reader.is_null("attention_factor")) attention_factor = reader.number("attention_factor", 0);
  else attention_factor = scale != 0 && scale_all != 0 ? log_scale(factor, scale) / log_scale(factor, scale_all) : log_scale(factor, 1);

  const auto dimension_of = [&](double rotations) {  // the pair of dimensions that turns so often over the original length
    return static_cast<double>(size) * std::log(original_positions / (rotations * 2 * std::numbers::pi)) / (2 * std::log(theta));
  };
  double first = dimension_of(fast), last = dimension_of(slow);
  if (reader.is_null("truncate") || reader.boolean("truncate")) {
    first = std::floor(first);
    last = std::ceil(last);
  }
  first = std::max(first, 0.0);
  last = std::min(last, static_cast<double>(size - 1));
  if (first == last) last += 0.001;
  const at::Tensor ramp_F = at::clamp((at::arange(size / 2, at::kFloat) - first) / (last - first), 0, 1);
  const at::Tensor keep_F = 1 - ramp_F;
  const at::Tensor power_F = at::pow(theta, at::arange(0, size, 2, at::kFloat) / size);
  return at::reciprocal(power_F * factor) * (1 - keep_F) + at::reciprocal(power_F) * keep_F;
}

// LongRoPE, arXiv:2402.13753: a divisor for each frequency, one set for short documents and one for long ones.
at::Tensor longrope_frequencies(ConfigReader& reader, const char* key, double theta, std::int64_t size) {
  const at::Tensor divisor_F = at::tensor(reader.numbers(key, static_cast<std::size_t>(size / 2), kTiny), at::kDouble).to(at::kFloat);
  return at::reciprocal(divisor_F * at::pow(theta, at::arange(0, size, 2, at::kFloat) / size));
}

const std::set<std::string> kRopeKeys = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings", "attention_factor",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor",
};

// parameters: the dictionary of one kind of layer. theta: where it names none.
Rope make_rope(ConfigReader& outer, const Json& parameters, double theta, const ModelConfig& config, std::vector<std::string>& problems) {
  const Json no_defaults = Json::object();
  ConfigReader reader(parameters, no_defaults, problems);
  for (const auto& [key, value] : parameters.items())
    if (!kRopeKeys.contains(key)) reader.problem("RoPE parameter ", key, " = ", shown(value), " is not implemented");

  Rope rope;
  rope.theta = reader.is_null("rope_theta") ? theta : reader.number("rope_theta", 1 + 1e-6, 1e15);
  const Json& partial = !reader.is_null("partial_rotary_factor") ? reader["partial_rotary_factor"] : outer["partial_rotary_factor"];
  double share = 1;
  if (!partial.is_null()) {
    share = partial.is_number() ? partial.get<double>() : -1;
    if (!(share > 0 && share <= 1)) reader.problem("partial_rotary_factor must be above 0 and at most 1, got ", shown(partial)), share = 1;
    if (share != 1 && !config.family->partial_longrope) reader.problem("partial_rotary_factor = ", share, " is not implemented for this family"), share = 1;
  }
  rope.rotary_size = static_cast<std::int64_t>(static_cast<double>(config.head_size) * share);
  if (rope.rotary_size < 2 || rope.rotary_size % 2 != 0) {
    reader.problem("the rotated part of a head must have an even size of at least 2, got ", rope.rotary_size, " of ", config.head_size);
    return rope;
  }

  const Json& named = !reader.is_null("rope_type") ? reader["rope_type"] : reader["type"];
  std::string type = named.is_null() ? "default" : named.is_string() ? named.get<std::string>() : shown(named);
  if (config.family->partial_longrope && (type == "su" || type == "yarn")) type = "longrope";
  const std::set<std::string> known =
      config.family->partial_longrope ? std::set<std::string>{"default", "longrope"} : std::set<std::string>{"default", "linear", "llama3", "longrope", "yarn"};
  if (!known.contains(type)) {
    std::string list;
    for (const std::string& name : known) list += (list.empty() ? "" : ", ") + name;
    reader.problem("rope_type ", type, " is not implemented for this family (", list, " are)");
    return rope;
  }
  // The length of pre-training: the key beside the RoPE parameters is the stronger one, as in transformers.
  const double original_positions = static_cast<double>(
      !outer.is_null("original_max_position_embeddings") ? outer.integer("original_max_position_embeddings", 2, 1ll << 40)
      : !reader.is_null("original_max_position_embeddings") ? reader.integer("original_max_position_embeddings", 2, 1ll << 40)
                                                            : config.max_positions);
  at::Tensor frequency_F = plain_frequencies(rope.theta, rope.rotary_size);
  if (type == "linear") frequency_F = frequency_F / reader.number("factor", kTiny);
  if (type == "llama3") frequency_F = llama3_frequencies(reader, rope.theta, rope.rotary_size, original_positions);
  if (type == "yarn") frequency_F = yarn_frequencies(reader, rope.theta, rope.rotary_size, original_positions, rope.attention_factor);
  if (type == "longrope") {
    frequency_F = longrope_frequencies(reader, "short_factor", rope.theta, rope.rotary_size);
    rope.long_inverse_frequency = as_doubles(longrope_frequencies(reader, "long_factor", rope.theta, rope.rotary_size));
    rope.long_from = static_cast<std::int64_t>(original_positions);
    const double factor = reader.is_null("factor") ? static_cast<double>(config.max_positions) / original_positions : reader.number("factor", kTiny);
    if (!reader.is_null("attention_factor")) rope.attention_factor = reader.number("attention_factor", 0);
    else if (factor > 1) rope.attention_factor = std::sqrt(1 + std::log(factor) / std::log(original_positions));
  }
  rope.inverse_frequency = as_doubles(frequency_F);
  return rope;
}

}  // namespace

void read_rope(ConfigReader& reader, ModelConfig& config, std::vector<std::string>& problems) {
  const Family& family = *config.family;
  const auto object_or_empty = [&](const char* key) {
    const Json& value = reader[key];
    if (!value.is_null() && !value.is_object()) reader.problem(key, " must be an object, got ", shown(value));
    return value.is_object() ? value : Json(Json::object());
  };
  const auto theta_or = [&](const char* key, double otherwise) { return reader.is_null(key) ? otherwise : reader.number(key, 1 + 1e-6, 1e15); };
  const Json scaling = object_or_empty("rope_scaling"), parameters = object_or_empty("rope_parameters");

  if (family.local_rope_theta == 0) {
    // The older key wins where both stand, as in transformers.
    config.rope = make_rope(reader, scaling.empty() ? parameters : scaling, theta_or("rope_theta", family.rope_theta), config, problems);
    return;
  }
  Json full = Json::object(), sliding = Json::object();
  for (const auto& [key, value] : parameters.items()) {
    if (key != "full_attention" && key != "sliding_attention") reader.problem("rope_parameters.", key, " is not a kind of layer");
    else if (!value.is_object()) reader.problem("rope_parameters.", key, " must be an object, got ", shown(value));
    else (key == "full_attention" ? full : sliding) = value;
  }
  // transformers lays rope_scaling over a dictionary that holds "rope_type" already, so that "type" would be read by nobody.
  if (scaling.contains("type") && !scaling.contains("rope_type")) reader.problem("rope_scaling.type is not read for this family; its key is rope_type");
  for (const auto& [key, value] : scaling.items()) full[key] = value;
  config.rope = make_rope(reader, full, theta_or("rope_theta", family.rope_theta), config, problems);
  config.local_rope = make_rope(reader, sliding, theta_or("rope_local_base_freq", family.local_rope_theta), config, problems);
}

}  // namespace alambic::models
