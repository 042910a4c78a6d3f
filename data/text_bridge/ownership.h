// SPDX-License-Identifier: Apache-2.0
#pragma once
// What the text bridge hands out, freed by the bridge when it goes out of scope.
#include <span>
#include <string_view>
#include <utility>

#include "data/text_bridge/text_bridge.h"

namespace alambic::data {

struct OwnedText {
  AlambicText text{};
  OwnedText() = default;
  OwnedText(const OwnedText&) = delete;
  OwnedText& operator=(const OwnedText&) = delete;
  ~OwnedText() { alambic_text_free(text); }
  std::string_view view() const { return text.size == 0 ? std::string_view() : std::string_view(text.data, text.size); }
};

struct OwnedNumbers {
  AlambicNumbers numbers{};
  OwnedNumbers() = default;
  OwnedNumbers(OwnedNumbers&& other) noexcept : numbers(std::exchange(other.numbers, {})) {}
  OwnedNumbers& operator=(OwnedNumbers&&) = delete;
  ~OwnedNumbers() { alambic_numbers_free(numbers); }
  std::span<const uint32_t> view() const {
    return numbers.size == 0 ? std::span<const uint32_t>() : std::span<const uint32_t>(numbers.data, numbers.size);
  }
};

}  // namespace alambic::data
