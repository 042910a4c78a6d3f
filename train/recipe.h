// SPDX-License-Identifier: Apache-2.0
#pragma once
// What all recipes on the one loop do in the same way: open and check, load, attach or free what trains, resume, run, write the
// result. A recipe adds its loss, and what that needs.
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "lora/adapter.h"
#include "train/finetune.h"
#include "train/inputs.h"
#include "train/step.h"

namespace alambic::train {

struct Recipe {
  std::string verb = "train";
  /// Opens what the recipe reads besides base and data, checks it against them and notes it in the inputs. Nothing large is loaded yet.
  std::function<void(Inputs&)> open = {};
  /// Sees the decoder as it was loaded, before anything of it is made to train.
  std::function<void(const models::Decoder&)> see_base = {};
  /// Whether the loss shares rows with decoder.context (ranks.context).
  bool shares_rows = false;
  /// Why the loss sees what the fused blocks do not show, so that they must not be used; "": it does not.
  std::string not_fused = {};
  /// The loss of the decoder, which is ready to train and stays where it is; further tensors to train may be added to the list, under
  /// names that begin with kBesideModel.
  std::function<LossSum(models::Decoder&, const Inputs&, std::vector<models::NamedTensor>& trained)> loss;
  Figures figures = {};  // LoopParts::figures
  /// In place of what the config's `device` says, for tests that compute on a device of their own.
  std::optional<at::Device> device = {};
  /// Bytes that the recipe takes besides the decoder and its training; asked after `loss`.
  std::function<std::uint64_t()> memory = {};
};

/// finetune() with another loss.
TrainReport run_recipe(const TrainConfig& config, bool resume, const std::function<bool()>& stop_requested, const Recipe& recipe);

/// Error(kUsage) for what a number of ranks cannot do with this config.
void require_sharing(const TrainConfig& config, const Recipe& recipe, int num_ranks);

/// Cross-entropy on the kept tokens: what finetune() trains by.
Recipe text_recipe(const TrainConfig& config);

/// The inputs of a run, a recipe's included.
Inputs open_inputs(const TrainConfig& config, const Recipe& recipe);

}  // namespace alambic::train
