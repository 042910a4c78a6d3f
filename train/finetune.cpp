// SPDX-License-Identifier: Apache-2.0
#include "train/finetune.h"

#include "train/recipe.h"

namespace alambic::train {

TrainReport finetune(const TrainConfig& config, bool resume, const std::function<bool()>& stop_requested) {
  return run_recipe(config, resume, stop_requested, text_recipe(config));
}

}  // namespace alambic::train
