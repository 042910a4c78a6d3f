// SPDX-License-Identifier: Apache-2.0
#pragma once
// How much is multiplied: what is computed for nothing shows in no result.
#include <ATen/record_function.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string_view>

namespace alambic::testing {

/// Products of whole matrices that `act` asks ATen and oneDNN for, on any thread; those of our own tiles are not among them.
inline int products_of(const std::function<void()>& act) {
  static std::atomic<int> products = 0;
  products = 0;
  const auto count = [](const at::RecordFunction& function) -> std::unique_ptr<at::ObserverContext> {
    const std::string_view name = function.name();
    if (name == "aten::mm" || name == "mkldnn::_linear_pointwise") ++products;
    return nullptr;
  };
  const at::CallbackHandle handle = at::addGlobalCallback(at::RecordFunctionCallback(count).scopes({at::RecordScope::FUNCTION}));
  act();
  at::removeCallback(handle);
  return products;
}

}  // namespace alambic::testing
