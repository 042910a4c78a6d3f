// SPDX-License-Identifier: Apache-2.0
#include "train/dynamic_map.h"

#include <ATen/ops/linspace.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/error.h"

namespace alambic::train {

DynamicMap::DynamicMap(bool with_negatives) {
  // bitsandbytes.functional.create_dynamic_map: seven powers of ten, each next one cut into twice as many values.
  std::vector<float> all = {0, 1};
  for (int power = 0; power < 7; ++power) {
    const std::int64_t count = (std::int64_t{1} << power) * (with_negatives ? 1 : 2);
    const at::Tensor edges = at::linspace(0.1, 1, count + 1, at::kFloat);
    const float* const edge = edges.const_data_ptr<float>();
    const auto scale = static_cast<float>(std::pow(10.0, power - 6));
    for (std::int64_t i = 0; i < count; ++i) {
      const float value = scale * ((edge[i] + edge[i + 1]) / 2);
      all.push_back(value);
      if (with_negatives) all.push_back(-value);
    }
  }
  if (all.size() != values.size()) fail(ErrorKind::kBug, "a dynamic map of ", all.size(), " values");
  std::sort(all.begin(), all.end());
  std::copy(all.begin(), all.end(), values.begin());
  std::array<float, 255> bounds;  // between one value and the next; what lies on it goes down
  for (std::size_t i = 0; i < bounds.size(); ++i) bounds[i] = (values[i] + values[i + 1]) / 2;
  for (std::size_t step = 0; step < codes.size(); ++step) {
    const float number = static_cast<float>(step) / 65535.0f * 2.0f - 1.0f;
    codes[step] = static_cast<std::uint8_t>(std::lower_bound(bounds.begin(), bounds.end(), number) - bounds.begin());
  }
}

const DynamicMap& signed_map() {
  static const DynamicMap map(true);
  return map;
}

const DynamicMap& unsigned_map() {
  static const DynamicMap map(false);
  return map;
}

}  // namespace alambic::train
