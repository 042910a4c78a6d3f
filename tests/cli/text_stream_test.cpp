// SPDX-License-Identifier: Apache-2.0
#include "cli/text_stream.h"

#include <gtest/gtest.h>

namespace alambic::cli {
namespace {

// Ids are bytes, as in a byte-level vocabulary; incomplete UTF-8 becomes the replacement character, as decoders write it.
std::string decode_bytes(std::span<const std::uint32_t> ids) {
  std::string bytes;
  for (const std::uint32_t id : ids) bytes += static_cast<char>(id);
  std::string text;
  for (std::size_t i = 0; i < bytes.size();) {
    const auto first = static_cast<unsigned char>(bytes[i]);
    const std::size_t length = first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    if (i + length > bytes.size()) return text + "\xEF\xBF\xBD";
    text += bytes.substr(i, length);
    i += length;
  }
  return text;
}

struct Heard {
  std::vector<std::string> pieces;
  std::string text, left_over;
  bool stopped = false;
};

Heard listen(const std::string& bytes, const std::vector<std::string>& stops) {
  Heard heard;
  TextStream stream(decode_bytes, stops, [&](std::string_view piece) { heard.pieces.emplace_back(piece); });
  for (std::size_t i = 0; i < bytes.size(); ++i)
    if (!stream.push(static_cast<unsigned char>(bytes[i]))) {
      heard.left_over = bytes.substr(i + 1);
      break;
    }
  stream.finish();
  heard.text = stream.text();
  heard.stopped = stream.stopped();
  std::string together;
  for (const std::string& piece : heard.pieces) together += piece;
  EXPECT_EQ(together, heard.text);
  return heard;
}

TEST(TextStream, GivesTextOutAtOnceAndCharactersWhole) {
  EXPECT_EQ(listen("abc", {}).pieces, (std::vector<std::string>{"a", "b", "c"}));
  EXPECT_EQ(listen("a\xc3\xa9\xf0\x9f\x99\x82z", {}).pieces, (std::vector<std::string>{"a", "\xc3\xa9", "\xf0\x9f\x99\x82", "z"}));
}

TEST(TextStream, AnIncompleteCharacterAtTheEndIsNotLost) { EXPECT_EQ(listen("a\xc3", {}).text, "a\xEF\xBF\xBD"); }

TEST(TextStream, StopStringsAreNeverShown) {
  const Heard heard = listen("one two END three", {"END"});
  EXPECT_TRUE(heard.stopped);
  EXPECT_EQ(heard.text, "one two ");
  EXPECT_EQ(heard.left_over, " three");
  for (const std::string& piece : heard.pieces) EXPECT_EQ(piece.find('E'), std::string::npos);
}

TEST(TextStream, WhatOnlyBeginsAStopStringComesLater) {
  EXPECT_EQ(listen("a EN b E", {"END"}).text, "a EN b E");
  EXPECT_FALSE(listen("a EN b E", {"END"}).stopped);
  EXPECT_EQ(listen("aab", {"aac", "ab"}).text, "a");  // overlapping beginnings
}

TEST(TextStream, TheEarliestStopStringWins) {
  EXPECT_EQ(listen("xyzw", {"zw", "yz"}).text, "x");
  EXPECT_EQ(listen("\n\nUser:", {"\n\n"}).text, "");
}

}  // namespace
}  // namespace alambic::cli
