// SPDX-License-Identifier: Apache-2.0
#pragma once
// Text that grows token by token: what is certain is given out at once, a stop string never.
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace alambic::cli {

class TextStream {
 public:
  using Decode = std::function<std::string(std::span<const std::uint32_t>)>;
  /// decode turns ids into text; emit gets each piece of text once, in order, whole UTF-8 characters only.
  TextStream(Decode decode, std::vector<std::string> stop_strings, std::function<void(std::string_view)> emit)
      : decode_(std::move(decode)), stop_strings_(std::move(stop_strings)), emit_(std::move(emit)) {}

  /// False once a stop string is complete; the text then ends before it, and nothing more is emitted.
  bool push(std::uint32_t id);
  /// Emits what was held back because a stop string might have begun or a character was incomplete.
  void finish();
  const std::string& text() const { return text_; }  // all that was emitted
  bool stopped() const { return stopped_; }

 private:
  bool add(std::string_view piece, bool last);

  Decode decode_;
  std::vector<std::string> stop_strings_;
  std::function<void(std::string_view)> emit_;
  std::vector<std::uint32_t> ids_;
  std::size_t context_ = 0, read_ = 0;  // ids_[context_, read_) have been turned to text; they are decoded again as context
  std::string pending_;                 // text that may be the beginning of a stop string
  std::string text_;
  bool stopped_ = false;
};

}  // namespace alambic::cli
