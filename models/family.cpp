// SPDX-License-Identifier: Apache-2.0
#include "models/family.h"

#include <algorithm>

#include "core/error.h"
#include "models/families/families.h"

namespace alambic::models {

bool Family::has(Slot slot) const {
  return std::any_of(names.begin(), names.end(), [&](const WeightName& name) { return name.slot == slot; });
}

std::vector<const Family*> all_families() {
  return {&kGemma2, &kGemma3Text, &kLlama, &kMistral, &kPhi3, &kQwen2, &kQwen3, &kSmolLm3};
}

const Family& find_family(std::string_view model_type) {
  std::string known;
  for (const Family* family : all_families()) {
    if (family->model_type == model_type) return *family;
    known += (known.empty() ? "" : ", ") + std::string(family->model_type);
  }
  fail(ErrorKind::kData, "model_type \"", model_type, "\" is not one of the families implemented here: ", known);
}

}  // namespace alambic::models
