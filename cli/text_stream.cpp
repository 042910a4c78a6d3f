// SPDX-License-Identifier: Apache-2.0
#include "cli/text_stream.h"

#include <algorithm>

namespace alambic::cli {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // what incomplete UTF-8 is decoded to

}  // namespace

bool TextStream::push(std::uint32_t id) {
  if (stopped_) return false;
  ids_.push_back(id);
  // A token's text depends on its neighbours (a leading space, half a character), so a piece is the difference of two
  // decodings that begin at the same earlier token.
  const std::span<const std::uint32_t> all(ids_);
  const std::string before = decode_(all.subspan(context_, read_ - context_)), now = decode_(all.subspan(context_));
  if (now.size() <= before.size() || now.ends_with(kReplacement)) return true;
  context_ = read_;
  read_ = ids_.size();
  return add(std::string_view(now).substr(before.size()), false);
}

void TextStream::finish() {
  if (stopped_) return;
  const std::span<const std::uint32_t> all(ids_);
  const std::string before = decode_(all.subspan(context_, read_ - context_)), now = decode_(all.subspan(context_));
  read_ = context_ = ids_.size();
  add(now.size() > before.size() ? std::string_view(now).substr(before.size()) : std::string_view(), true);
}

bool TextStream::add(std::string_view piece, bool last) {
  pending_ += piece;
  std::size_t stop = pending_.npos;
  for (const std::string& each : stop_strings_) stop = std::min(stop, pending_.find(each));
  stopped_ = stop != pending_.npos;
  std::size_t certain = stopped_ ? stop : pending_.size();
  if (!stopped_ && !last)  // the longest end of the text that begins a stop string stays back
    for (const std::string& each : stop_strings_)
      for (std::size_t length = std::min(each.size() - 1, pending_.size()); length > 0; --length)
        if (std::string_view(pending_).ends_with(std::string_view(each).substr(0, length))) {
          certain = std::min(certain, pending_.size() - length);
          break;
        }
  if (certain > 0) {
    emit_(std::string_view(pending_).substr(0, certain));
    text_.append(pending_, 0, certain);
  }
  pending_.erase(0, certain);
  return !stopped_;
}

}  // namespace alambic::cli
