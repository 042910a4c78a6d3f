// SPDX-License-Identifier: Apache-2.0
#include "train/base_state.h"

#include <ATen/ops/equal.h>

#include <map>

#include "core/error.h"
#include "lora/initialise.h"

namespace alambic::train {
namespace {

constexpr std::string_view kInitial = "initial.", kBase = "base.";

std::string base_name(const std::string& path) { return std::string(kBase) + path + ".weight"; }

std::string initial_name(const std::string& path, const char* part) { return std::string(kInitial) + path + "." + part + ".weight"; }

}  // namespace

bool is_beside_model(std::string_view name) {
  if (name.starts_with(kBesideModel)) return true;
  const std::size_t dot = name.find('.');
  return dot != name.npos && name.substr(dot + 1).starts_with(kBesideModel);
}

bool is_base_state(std::string_view name) { return name.starts_with(kInitial) || name.starts_with(kBase); }

NamedTensors base_state(models::Decoder& decoder, const lora::LoraConfig& config) {
  NamedTensors state;
  for (const models::NamedLinear& linear : decoder.linears()) {
    if (!linear.linear->adapter) continue;
    if (config.restart_every > 0) state.emplace_back(base_name(linear.path), linear.linear->weight_OI);
    if (!linear.linear->adapter->initial_a_RI.defined()) continue;
    state.emplace_back(initial_name(linear.path, "lora_A"), linear.linear->adapter->initial_a_RI);
    state.emplace_back(initial_name(linear.path, "lora_B"), linear.linear->adapter->initial_b_OR);
  }
  return state;
}

void restore_base(models::Decoder& decoder, const lora::LoraConfig& config, const NamedTensors& state) {
  std::map<std::string, at::Tensor> given(state.begin(), state.end());
  std::string problems;
  const auto take = [&](const std::string& name, const at::Tensor& like) {
    const auto found = given.find(name);
    at::Tensor tensor;
    if (found == given.end()) problems += " missing " + name + ";";
    else if (found->second.sizes() != like.sizes() || found->second.scalar_type() != at::kFloat) problems += " another shape or type of " + name + ";";
    else tensor = found->second.to(like.device());
    given.erase(name);
    return tensor;
  };
  std::vector<std::pair<models::Linear*, lora::Factors>> residuals;
  if (lora::parse_init(config.init).changes_base())  // nothing has an adapter in a full fine-tune
    for (const models::NamedLinear& linear : decoder.linears()) {
      if (!linear.linear->adapter) continue;
      const lora::Factors factors{take(initial_name(linear.path, "lora_A"), linear.linear->adapter->a_RI), take(initial_name(linear.path, "lora_B"), linear.linear->adapter->b_OR)};
      residuals.emplace_back(linear.linear, factors);
    }
  std::vector<std::pair<models::NamedLinear, at::Tensor>> merged;
  if (config.restart_every > 0)
    for (const models::NamedLinear& linear : decoder.linears())
      if (linear.linear->adapter) merged.emplace_back(linear, take(base_name(linear.path), linear.linear->weight_OI));
  for (const auto& [name, unknown] : given) problems += " unknown " + name + ";";
  if (!problems.empty()) fail(ErrorKind::kData, "the checkpoint does not fit the base that is trained on:", problems);
  for (const auto& [linear, weight_OI] : merged) {
    if (linear.layer < 0 && decoder.head_tied && !at::equal(weight_OI, linear.linear->weight_OI)) decoder.head_tied = false;
    if (linear.layer >= 0) linear.linear->weight_OI.copy_(weight_OI);  // in place: other tensors may share the memory (models/fused_blocks.h)
    else if (!decoder.head_tied) linear.linear->weight_OI = weight_OI.clone();  // the checkpoint may be removed
  }
  for (const auto& [linear, factors] : residuals) lora::take_out_of_base(*linear, factors);
}

}  // namespace alambic::train
