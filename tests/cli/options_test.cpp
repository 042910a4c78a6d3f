// SPDX-License-Identifier: Apache-2.0
#include "cli/options.h"

#include <gtest/gtest.h>

#include "cli/figures.h"
#include "tests/support.h"

namespace alambic::cli {
namespace {

using testing::fails_with;

Verb sample_verb() {
  return {.name = "sample",
          .summary = "a verb for tests",
          .description = "Does nothing.",
          .positionals = {{.name = "INPUT", .help = "what is read"}, {.name = "MODE", .help = "how", .kind = Kind::kText, .required = false, .choices = {"fast", "slow"}}},
          .options = {{.name = "model", .kind = Kind::kFolder, .value = "FOLDER", .help = "a folder", .required = true, .letter = 'm'},
                      {.name = "count", .kind = Kind::kWhole, .value = "N", .help = "a count", .otherwise = "3", .low = 1, .high = 10, .letter = 'n'},
                      {.name = "heat", .kind = Kind::kNumber, .value = "X", .help = "a number", .otherwise = "0", .low = 0},
                      {.name = "type", .kind = Kind::kText, .value = "T", .help = "a choice", .otherwise = "f32", .choices = {"f32", "bf16"}},
                      {.name = "stop", .kind = Kind::kText, .value = "TEXT", .help = "texts", .repeatable = true},
                      {.name = "quiet", .help = "say less", .letter = 'q'},
                      {.name = "help", .help = "help", .letter = 'h'}},
          .examples = {{"alambic sample x -m y", "an example"}},
          .run = nullptr};
}

Arguments parsed(const std::vector<std::string>& words) { return parse(sample_verb(), words); }

TEST(Options, EveryWayOfWritingAValue) {
  for (const std::vector<std::string>& words : std::vector<std::vector<std::string>>{{"in", "--model", "m", "--count", "7"},
                                                                                     {"--model=m", "in", "--count=7"},
                                                                                     {"-m", "m", "-n", "7", "in"},
                                                                                     {"-mm", "-n7", "in"},
                                                                                     {"-qn7", "-m", "m", "--", "in"}}) {
    const Arguments arguments = parsed(words);
    EXPECT_EQ(arguments.text("model"), "m");
    EXPECT_EQ(arguments.whole("count"), 7);
    EXPECT_EQ(arguments.positionals(), std::vector<std::string>{"in"});
    EXPECT_EQ(arguments.has("quiet"), words[0] == "-qn7");
  }
}

TEST(Options, DefaultsStandAndRepeatsAdd) {
  const Arguments arguments = parsed({"in", "-m", "m", "--stop", "a,b", "--stop=", "--stop", "--model"});
  EXPECT_EQ(arguments.whole("count"), 3);
  EXPECT_FALSE(arguments.has("count"));
  EXPECT_EQ(arguments.number("heat"), 0);
  EXPECT_EQ(arguments.text("type"), "f32");
  EXPECT_EQ(arguments.texts("stop"), (std::vector<std::string>{"a,b", "", "--model"}));  // a value may look like an option
  EXPECT_FALSE(arguments.has_positional(1));
}

TEST(Options, AValueMayHoldAnything) {
  const std::string long_text(120'000, 'x');
  for (const std::string& text : {std::string("a,b"), std::string("line\nbreak"), std::string("--model=x"), std::string("-m"), std::string("0.5"), std::string("\x01" "2"), std::string("\x01"),
                                  std::string("caf\xc3\xa9"), std::string("\xff"), std::string("="), std::string(" "), long_text}) {
    EXPECT_EQ(parsed({"in", "-m", "m", "--stop", text}).texts("stop"), std::vector<std::string>{text});
    EXPECT_EQ(parsed({"in", "-m", "m", "--stop=" + text}).texts("stop"), std::vector<std::string>{text});
    EXPECT_EQ(parsed({"in", "-m" + text}).text("model"), text);
    EXPECT_EQ(parsed({"in", "-qm" + text}).text("model"), text);
    EXPECT_EQ(parsed({"-m", "m", "--", text}).positionals(), std::vector<std::string>{text});
  }
  EXPECT_EQ(parsed({"line\nbreak", "-m", "m"}).positionals(), std::vector<std::string>{"line\nbreak"});
}

TEST(Options, DashesBehindTheDoubleDashAndAloneArePositional) {
  EXPECT_EQ(parsed({"-m", "m", "--", "--count", "fast"}).positionals(), (std::vector<std::string>{"--count", "fast"}));
  EXPECT_EQ(parsed({"-m", "m", "-"}).positionals(), std::vector<std::string>{"-"});
}

TEST(Options, EveryMistakeIsNamed) {
  const struct {
    std::vector<std::string> words;
    const char* said;
  } cases[] = {
      {{"in", "--modle", "m"}, "sample: unknown option --modle; did you mean --model? / alambic sample --help"},
      {{"in", "-model", "m"}, "sample: unknown option -model; did you mean --model, with two dashes? / "},
      {{"in", "-model=m"}, "sample: unknown option -model=m; did you mean --model, with two dashes?"},
      {{"in", "-type", "f32"}, "sample: unknown option -t in -type; did you mean --type?"},
      {{"in", "--m", "m"}, "sample: unknown option --m / "},
      {{"in", "--=x"}, "sample: unknown option -- / "},
      {{"in", "-?"}, "sample: unknown option -? / "},
      {{"in", "-5"}, "sample: unknown option -5 / alambic sample --help lists what it accepts; a value that begins with a dash goes behind --"},
      {{"in", "-m", "m", "--quiet="}, "sample: --quiet takes no value, got "},
      {{"in", "--" + std::string(100'000, 'a')}, "sample: unknown option --aaaa"},
      {{"in", "-" + std::string(100'000, 'z')}, "sample: unknown option -z in -zzzz"},
      {{"in", "-" + std::string(100'000, 'q')}, "sample: 100000 options in one word: -qqqqqqqqqqqqqqqqqqq... / "},
      {{"in", "-q\x01", "-m", "m"}, "sample: unknown option -\\x01 in -q\\x01"},
      {{"in", "--zzzzzz"}, "sample: unknown option --zzzzzz / "},
      {{"in", "-x"}, "sample: unknown option -x / "},
      {{"in", "-qx", "-m", "m"}, "sample: unknown option -x in -qx"},
      {{"in", "--model"}, "sample: --model needs a value, FOLDER"},
      {{"in", "-m"}, "sample: -m needs a value, FOLDER"},
      {{"in", "--model="}, "sample: --model must not be empty"},
      {{"in", "-m", "m", "--quiet=yes"}, "sample: --quiet takes no value, got yes"},
      {{"in", "-m", "m", "-m", "o"}, "sample: --model is given twice, as m and as o"},
      {{"in", "-m", "m", "--count", "x"}, "sample: --count must be a whole number from 1 to 10, got x"},
      {{"in", "-m", "m", "--count", "1.5"}, "sample: --count must be a whole number from 1 to 10, got 1.5"},
      {{"in", "-m", "m", "--count", "0x5"}, "sample: --count must be a whole number from 1 to 10, got 0x5"},
      {{"in", "-m", "m", "--count", ""}, "sample: --count must be a whole number from 1 to 10, got "},
      {{"in", "-m", "m", "--count", "11"}, "sample: --count must be from 1 to 10, got 11"},
      {{"in", "-m", "m", "--count=99999999999999999999"}, "sample: --count must be a whole number from 1 to 10, got 99999999999999999999"},
      {{"in", "-m", "m", "--heat", "-1"}, "sample: --heat must be at least 0, got -1"},
      {{"in", "-m", "m", "--heat", "nan"}, "sample: --heat must be a number at least 0, got nan"},
      {{"in", "-m", "m", "--heat", "0,5"}, "sample: --heat must be a number at least 0, got 0,5"},
      {{"in", "-m", "m", "--type", "bf61"}, "sample: --type must be one of f32, bf16, got bf61; did you mean bf16?"},
      {{"in", "fast", "more", "-m", "m"}, "sample: one argument too many: more / alambic sample INPUT [MODE] --model FOLDER [OPTION]..."},
      {{"-m", "m"}, "sample: INPUT is missing: what is read / alambic sample INPUT"},
      {{"", "-m", "m"}, "sample: INPUT must not be empty"},
      {{"in", "fats", "-m", "m"}, "sample: MODE must be one of fast, slow, got fats; did you mean fast?"},
      {{"in"}, "sample: --model is missing: a folder / alambic sample"},
  };
  for (const auto& each : cases) EXPECT_TRUE(fails_with(ErrorKind::kUsage, each.said, [&] { parsed(each.words); })) << each.said;
}

TEST(Options, ASwitchMayBeRepeated) { EXPECT_TRUE(parsed({"in", "-m", "m", "-qqq", "--quiet"}).has("quiet")); }

TEST(Options, HelpIsAskedForAlongWithAnything) { EXPECT_TRUE(parsed({"-h"}).has("help")); }

TEST(Options, KeysOfAConfigLeadToSet) {
  Verb verb = sample_verb();
  verb.options.push_back({.name = "set", .kind = Kind::kText, .value = "KEY=VALUE", .help = "keys", .repeatable = true});
  const auto fails = [&](const std::vector<std::string>& words, const std::string& said) { return fails_with(ErrorKind::kUsage, said, [&] { parse(verb, words); }); };
  EXPECT_TRUE(fails({"in", "fast", "seed=3", "-m", "m"}, "one argument too many: seed=3 / --set seed=3 sets a key of CONFIG"));
  EXPECT_TRUE(fails({"in", "-m", "m", "--lora.rank", "8"}, "unknown option --lora.rank / alambic sample --help lists what it accepts; --set KEY=VALUE sets a key of CONFIG"));
  EXPECT_EQ(parse(verb, std::vector<std::string>{"in", "-m", "m", "--set", "a=[x, y]", "--set=b=c=d"}).texts("set"), (std::vector<std::string>{"a=[x, y]", "b=c=d"}));
}

TEST(Figures, AreReadable) {
  EXPECT_EQ(figure(20.356592079520727, 1), "20.4");
  EXPECT_EQ(figure(nullptr, 1), "-");
  EXPECT_EQ(short_figure(9.679794311523438e-05), "9.68e-05");
  EXPECT_EQ(short_figure(37.663883), "37.7");
  EXPECT_EQ(grouped(59700.0), "59,700");
  EXPECT_EQ(grouped(999), "999");
  EXPECT_EQ(grouped(-1000000), "-1,000,000");
  EXPECT_EQ(gigabytes(2'345'678'901), "2.35 GB");
  EXPECT_EQ(gigabytes(nullptr), "unknown");
  EXPECT_EQ(duration(7.26), "7.3 s");
  EXPECT_EQ(duration(59.99), "60.0 s");
  EXPECT_EQ(duration(2932.7), "48 m 53 s");
  EXPECT_EQ(duration(3599.8), "1 h 0 m");
  EXPECT_EQ(duration(3 * 3600 + 5 * 60 + 31), "3 h 5 m");
  EXPECT_EQ(duration(2 * 86400 + 4 * 3600), "2 d 4 h");
}

TEST(Options, ExclusiveOptions) {
  const Arguments both = parsed({"in", "-m", "m", "--stop", "x", "-q"});
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "sample: --stop and --quiet exclude each other", [&] { both.exactly_one({"stop", "quiet"}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "sample: one of --heat, --type is needed", [&] { both.exactly_one({"heat", "type"}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "sample: --stop goes elsewhere", [&] { both.refuse("stop", "goes elsewhere"); }));
  both.at_most_one({"heat", "stop"});
  EXPECT_TRUE(fails_with(ErrorKind::kBug, "asks for --nothing", [&] { both.text("nothing"); }));
}

TEST(Options, HelpShowsTermsAndUsage) {
  const std::string help = help_of(sample_verb());
  for (const char* part : {"Usage: alambic sample INPUT [MODE] --model FOLDER [OPTION]...", "-m, --model FOLDER\n          a folder (required)",
                           "--count N\n          a count (from 1 to 10; default 3)", "--type T\n          a choice (f32 | bf16; default f32)", "texts (may be repeated)",
                           "  alambic sample x -m y\n          an example"})
    EXPECT_NE(help.find(part), std::string::npos) << part << "\nis not in\n" << help;
}

TEST(Options, TextIsFilledToTheWidth) {
  EXPECT_EQ(filled("one two three four", 2, 11), "  one two\n  three\n  four\n");
  EXPECT_EQ(filled("a\n\nb", 1), " a\n\n b\n");
}

}  // namespace
}  // namespace alambic::cli
