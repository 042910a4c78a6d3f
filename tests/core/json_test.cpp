// SPDX-License-Identifier: Apache-2.0
#include "core/json.h"

#include <gtest/gtest.h>

#include "core/files.h"
#include "tests/support.h"

namespace alambic {
namespace {

using testing::fails_with;
using testing::ScratchFolder;

TEST(Json, KeepsTheOrderOfKeysAndWritesOneLine) {
  const std::string text = R"({"z":1,"a":[true,null,-2.5,"h\u00e9"],"m":{"k":18446744073709551615}})";
  EXPECT_EQ(to_line(parse_json(text, "x")), R"({"z":1,"a":[true,null,-2.5,"hé"],"m":{"k":18446744073709551615}})");
}

TEST(Json, RefusesWhatIsNotStrictlyJson) {
  const auto refuses = [](std::string_view text, const std::string& words) {
    return fails_with(ErrorKind::kData, words, [&] { parse_json(text, "x.json"); });
  };
  EXPECT_TRUE(refuses("", "x.json: not valid JSON at byte"));
  EXPECT_TRUE(refuses("{", "not valid JSON at byte 2"));
  EXPECT_TRUE(refuses("{} {}", "not valid JSON"));
  EXPECT_TRUE(refuses("{'a':1}", "not valid JSON"));
  EXPECT_TRUE(refuses("[1,]", "not valid JSON"));
  EXPECT_TRUE(refuses("// no\n1", "not valid JSON"));
  EXPECT_TRUE(refuses("NaN", "not valid JSON"));
  EXPECT_TRUE(refuses("[01]", "not valid JSON"));
  EXPECT_TRUE(refuses("\"\xff\"", "not valid JSON"));
  EXPECT_TRUE(refuses("\"\xed\xa0\x80\"", "not valid JSON"));        // a surrogate as UTF-8
  EXPECT_TRUE(refuses(R"("\ud800")", "not valid JSON"));              // half a pair
  EXPECT_TRUE(refuses(R"({"a":1,"b":{"c":1,"c":2}})", "the key \"c\" is given twice"));
  EXPECT_TRUE(refuses(R"({"a":1,"\u0061":2})", "the key \"a\" is given twice"));
  EXPECT_TRUE(refuses("1e999", "not valid JSON"));
}

TEST(Json, BottomlessNestingIsAnErrorAndNoCrash) {
  const std::string text = std::string(1'000'000, '[');
  EXPECT_TRUE(fails_with(ErrorKind::kData, "nested deeper than 200", [&] { parse_json(text, "x"); }));
  std::string objects;
  for (int i = 0; i < 300; ++i) objects += "{\"a\":";
  EXPECT_TRUE(fails_with(ErrorKind::kData, "nested deeper than 200", [&] { parse_json(objects, "x"); }));
}

TEST(Json, ManyKeysAreReadInLinearTime) {
  std::string text = "{";
  for (int i = 0; i < 200000; ++i) text += (i ? ",\"k" : "\"k") + std::to_string(i) + "\":" + std::to_string(i);
  EXPECT_EQ(parse_json(text + "}", "x").size(), 200000u);
}

TEST(Json, ManySmallValuesAreRefusedBeforeTheyFillTheMemory) {
  const auto many = [](const std::string& piece, std::size_t count) {
    std::string text = "[";
    for (std::size_t i = 0; i < count; ++i) text += (i ? "," : "") + piece;
    return text + "]";
  };
  for (const char* piece : {"0", "[]", "{}", "\"\"", "{\"\":0}"})
    EXPECT_TRUE(fails_with(ErrorKind::kData, "x: JSON of so many small values", [&] { parse_json(many(piece, 3'000'000), "x"); })) << piece;
  EXPECT_EQ(parse_json(many("0", 2'000'000), "x").size(), 2'000'000u);
  EXPECT_EQ(parse_json(many("\"" + std::string(1000, 'a') + "\"", 20'000), "x").size(), 20'000u);  // 20 MB in large values
}

TEST(Json, FilesAreReadUpToALimit) {
  const ScratchFolder folder;
  write_file(folder / "a.json", R"({"a": [1, 2]})");
  EXPECT_EQ(read_json_file(folder / "a.json")["a"][1], 2);
  EXPECT_TRUE(fails_with(ErrorKind::kData, "13 bytes, more than the 12 allowed", [&] { read_json_file(folder / "a.json", 12); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "cannot be read", [&] { read_json_file(folder / "absent.json"); }));
}

TEST(Require, TypesAreExact) {
  const Json json = parse_json(R"({"i":3,"f":3.5,"w":3.0,"s":"text","b":true,"n":null,"big":18446744073709551615,"neg":-7})", "x");
  EXPECT_EQ(require<std::int64_t>(json, "i", "x"), 3);
  EXPECT_EQ(require<std::int64_t>(json, "neg", "x"), -7);
  EXPECT_EQ(require<double>(json, "i", "x"), 3.0);
  EXPECT_EQ(require<std::string>(json, "s", "x"), "text");
  EXPECT_TRUE(require<bool>(json, "b", "x"));
  EXPECT_TRUE(require<Json>(json, "n", "x").is_null());
  const auto refuses = [&](const std::string& words, const std::function<void()>& act) { return fails_with(ErrorKind::kData, words, act); };
  EXPECT_TRUE(refuses("x.json: the key \"absent\" is missing", [&] { require<bool>(json, "absent", "x.json"); }));
  EXPECT_TRUE(refuses("\"f\" must be a whole number, got 3.5", [&] { require<std::int64_t>(json, "f", "x"); }));
  EXPECT_TRUE(refuses("\"w\" must be a whole number", [&] { require<std::int64_t>(json, "w", "x"); }));
  EXPECT_TRUE(refuses("\"big\" must be a whole number", [&] { require<std::int64_t>(json, "big", "x"); }));
  EXPECT_TRUE(refuses("\"b\" must be a whole number, got true", [&] { require<std::int64_t>(json, "b", "x"); }));
  EXPECT_TRUE(refuses("\"b\" must be a number", [&] { require<double>(json, "b", "x"); }));
  EXPECT_TRUE(refuses("\"i\" must be true or false", [&] { require<bool>(json, "i", "x"); }));
  EXPECT_TRUE(refuses("\"i\" must be a string", [&] { require<std::string>(json, "i", "x"); }));
  EXPECT_TRUE(refuses("\"n\" must be a string, got null", [&] { require<std::string>(json, "n", "x"); }));
  Json letters;
  for (const std::string& text : {std::string(50, 'x') + "\xc3\xa9", std::string(75, 'x') + "\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9", std::string(74, 'x') + "\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9"}) {
    letters["long"] = text;
    try {
      require<bool>(letters, "long", "x");
      ADD_FAILURE();
    } catch (const Error& error) {
      EXPECT_NO_THROW((void)Json(error.what()).dump()) << "cut within a character: " << error.what();
    }
  }
  EXPECT_TRUE(refuses("expected a JSON object", [&] { require<bool>(Json::array(), "a", "x"); }));
}

TEST(ValueOr, TheDefaultStandsForAbsentAndNullOnly) {
  const Json json = parse_json(R"({"i":3,"n":null})", "x");
  EXPECT_EQ(value_or<std::int64_t>(json, "i", 9, "x"), 3);
  EXPECT_EQ(value_or<std::int64_t>(json, "n", 9, "x"), 9);
  EXPECT_EQ(value_or<std::int64_t>(json, "absent", 9, "x"), 9);
  EXPECT_TRUE(fails_with(ErrorKind::kData, "must be a string", [&] { value_or<std::string>(json, "i", "", "x"); }));
}

}  // namespace
}  // namespace alambic
