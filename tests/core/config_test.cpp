// SPDX-License-Identifier: Apache-2.0
#include "core/config.h"

#include <gtest/gtest.h>

#include <fstream>

#include "tests/support.h"

namespace alambic {
namespace {

using testing::ScratchFolder;

struct Entry {
  std::filesystem::path store;
  double weight = 1;
  void visit(FieldVisitor& fields) {
    fields.field("store", store, {.help = "token store", .required = true});
    fields.field("weight", weight, {.help = "share of rows", .low = 0});
  }
};

struct Schedule {
  double learning_rate = 2e-4;
  std::string shape = "cosine";
  std::int64_t warmup = 10;
  void visit(FieldVisitor& fields) {
    fields.field("learning_rate", learning_rate, {.help = "highest learning rate", .low = 0, .high = 1});
    fields.field("shape", shape, {.help = "how it falls", .choices = {"cosine", "linear", "constant", "wsd"}});
    fields.field("warmup", warmup, {.help = "steps of warm-up", .unit = "steps", .low = 0, .high = 1000});
  }
};

struct RunConfig {
  std::string name = "run";
  std::filesystem::path output;
  std::uint64_t seed = 0;
  std::int64_t steps = 100;
  bool pack = true;
  std::vector<std::string> targets = {"all-linear"};
  std::map<std::string, std::int64_t> ranks;
  std::map<std::string, double> alphas;
  std::map<std::string, std::string> columns;
  std::vector<Entry> mixture;
  Schedule schedule;
  void visit(FieldVisitor& fields) {
    fields.field("name", name, {.help = "a name"});
    fields.field("output", output, {.help = "folder to write"});
    fields.field("seed", seed, {.help = "seed of everything"});
    fields.field("steps", steps, {.help = "how many steps", .low = 1});
    fields.field("pack", pack, {.help = "whole documents into rows"});
    fields.field("targets", targets, {.help = "modules"});
    fields.field("ranks", ranks, {.help = "rank by module", .low = 1, .high = 512});
    fields.field("alphas", alphas, {.help = "alpha by module"});
    fields.field("columns", columns, {.help = "column by role"});
    fields.list("mixture", mixture, {.help = "the stores"});
    fields.group("schedule", "learning rate over time", schedule);
  }
};

class Config : public ::testing::Test {
 protected:
  std::filesystem::path file(const std::string& text) {
    const std::filesystem::path path = scratch_ / "run.yaml";
    std::ofstream(path, std::ios::binary) << text;
    return path;
  }
  RunConfig read(const std::string& text, const std::vector<std::string>& overrides = {}) { return read_config<RunConfig>(file(text), overrides); }
  /// What reading complains about, without the folder's name; "" when it does not.
  std::string complaint(const std::string& text, const std::vector<std::string>& overrides = {}, ErrorKind kind = ErrorKind::kUsage) {
    try {
      read(text, overrides);
    } catch (const Error& error) {
      EXPECT_EQ(exit_code(error.kind()), exit_code(kind)) << error.what();
      std::string said = error.what();
      const std::string folder = scratch_.path().string() + "/";
      for (std::size_t at; (at = said.find(folder)) != said.npos;) said.erase(at, folder.size());
      return said;
    }
    return "";
  }

  ScratchFolder scratch_;
};

TEST_F(Config, ReadsEveryKindOfField) {
  const RunConfig run = read(
      "# a comment\n"
      "name: yes  # the word\n"
      "output: \"with space/\\u00e9\"\n"
      "seed: 18446744073709551615\n"
      "steps: 7\n"
      "pack: false\n"
      "targets: [q_proj, 'v_proj']\n"
      "ranks: {a.b: 8, 'c': 4}\n"
      "alphas: {a: 1e1, b: -0.5}\n"
      "columns:\n"
      "  text: body\n"
      "mixture:\n"
      "  - store: one\n"
      "  - {store: two, weight: 2}\n"
      "schedule:\n"
      "  learning_rate: 3e-05\n"
      "  shape: wsd\n");
  EXPECT_EQ(run.name, "yes");
  EXPECT_EQ(run.output, "with space/\xc3\xa9");
  EXPECT_EQ(run.seed, 18446744073709551615u);
  EXPECT_EQ(run.steps, 7);
  EXPECT_FALSE(run.pack);
  EXPECT_EQ(run.targets, (std::vector<std::string>{"q_proj", "v_proj"}));
  EXPECT_EQ(run.ranks, (std::map<std::string, std::int64_t>{{"a.b", 8}, {"c", 4}}));
  EXPECT_EQ(run.alphas, (std::map<std::string, double>{{"a", 10.0}, {"b", -0.5}}));
  EXPECT_EQ(run.columns, (std::map<std::string, std::string>{{"text", "body"}}));
  ASSERT_EQ(run.mixture.size(), 2u);
  EXPECT_EQ(run.mixture[0].store, "one");
  EXPECT_EQ(run.mixture[0].weight, 1);
  EXPECT_EQ(run.mixture[1].weight, 2);
  EXPECT_EQ(run.schedule.learning_rate, 3e-5);
  EXPECT_EQ(run.schedule.shape, "wsd");
  EXPECT_EQ(run.schedule.warmup, 10);
}

TEST_F(Config, WithoutAFileTheDefaultsStand) {
  const RunConfig run = read_config<RunConfig>("", {"name=x"});
  EXPECT_EQ(run.name, "x");
  EXPECT_EQ(run.steps, 100);
  EXPECT_EQ(read("# only a comment\n").steps, 100);
  EXPECT_EQ(read("").steps, 100);
}

TEST_F(Config, ResolvedConfigReadsBackAsItself) {
  RunConfig run = read("name: \"a: b # c \\\" \\\\ \\n \\u0001 \xc3\xa9\"\nseed: 18446744073709551615\nranks: {x.y: 3}\nmixture: [{store: s, weight: 0.1}]\n"
                 "schedule: {learning_rate: 1.0e-7}\n");
  run.columns["true"] = "010";
  const Json resolved = resolved_config(run);
  EXPECT_EQ(resolved["columns"]["true"], "010");
  for (const int indent : {-1, 2}) EXPECT_EQ(resolved_config(read(resolved.dump(indent))), resolved) << "indent " << indent;
}

TEST_F(Config, EveryWrongValueHasItsPlaceAndItsReason) {
  const struct {
    const char* text;
    const char* said;
  } cases[] = {
      {"steps: 010\n", "run.yaml:1:8: steps must be a whole number in plain digits at least 1, got 010"},
      {"steps: 0x10\n", "run.yaml:1:8: steps must be a whole number in plain digits at least 1, got 0x10"},
      {"steps: 1e6\n", "run.yaml:1:8: steps must be a whole number in plain digits at least 1, got 1e6"},
      {"steps: 1_000\n", "run.yaml:1:8: steps must be a whole number in plain digits at least 1, got 1_000"},
      {"steps: 1.0\n", "run.yaml:1:8: steps must be a whole number in plain digits at least 1, got 1.0"},
      {"steps: +1\n", "run.yaml:1:8: steps must be a whole number in plain digits at least 1, got +1"},
      {"steps: \"8\"\n", "run.yaml:1:8: steps must be a whole number in plain digits at least 1, got the quoted text \"8\""},
      {"steps: 0\n", "run.yaml:1:8: steps must be at least 1, got 0"},
      {"steps: 9223372036854775808\n", "run.yaml:1:8: steps is outside what 64 bits can hold, got 9223372036854775808"},
      {"seed: -1\n", "run.yaml:1:7: seed must not be negative, got -1"},
      {"seed: 18446744073709551616\n", "run.yaml:1:7: seed is outside what 64 bits can hold, got 18446744073709551616"},
      {"steps: [1]\n", "run.yaml:1:8: steps must be a whole number in plain digits at least 1, got a list"},
      {"steps:\n", "run.yaml:1:1: steps has no value; remove the key to keep the default, or quote the word to mean the text"},
      {"name: null\n", "run.yaml:1:1: name has no value; remove the key to keep the default, or quote the word to mean the text"},
      {"name: {a: b}\n", "run.yaml:1:7: name must be a text, got a mapping of keys to values"},
      {"output: \"a\\0b\"\n", "run.yaml:1:9: output contains a NUL character"},
      {"pack: yes\n", "run.yaml:1:7: pack must be true or false, got yes"},
      {"pack: True\n", "run.yaml:1:7: pack must be true or false, got True"},
      {"pack: \"true\"\n", "run.yaml:1:7: pack must be true or false, got the quoted text \"true\""},
      {"targets: q_proj\n", "run.yaml:1:10: targets must be a list such as [a, b], got q_proj"},
      {"targets: [a, [b]]\n", "run.yaml:1:14: targets.1 must be a text, got a list"},
      {"ranks: [8]\n", "run.yaml:1:8: ranks must be a mapping such as {name: value}, got a list"},
      {"ranks: {a: 513}\n", "run.yaml:1:12: ranks.a must be from 1 to 512, got 513"},
      {"schedule:\n  learning_rate: 2\n", "run.yaml:2:18: schedule.learning_rate must be from 0 to 1, got 2"},
      {"schedule:\n  learning_rate: .nan\n", "run.yaml:2:18: schedule.learning_rate must be a finite number from 0 to 1, got .nan"},
      {"schedule:\n  learning_rate: inf\n", "run.yaml:2:18: schedule.learning_rate must be a finite number from 0 to 1, got inf"},
      {"schedule:\n  learning_rate: 1e999\n", "run.yaml:2:18: schedule.learning_rate is outside what a double can hold, got 1e999"},
      {"schedule:\n  learning_rate: 0,5\n", "run.yaml:2:18: schedule.learning_rate must be a finite number from 0 to 1, got 0,5"},
      {"schedule:\n  warmup: 1001\n", "run.yaml:2:11: schedule.warmup must be from 0 to 1000 steps, got 1001"},
      {"schedule:\n  shape: linaer\n", "run.yaml:2:10: schedule.shape must be one of cosine, linear, constant, wsd; got linaer, did you mean linear?"},
      {"schedule: cosine\n", "run.yaml:1:11: schedule is a group of keys, got cosine"},
      {"mixture: {store: a}\n", "run.yaml:1:10: mixture must be a list, got a mapping of keys to values"},
      {"mixture: [a]\n", "run.yaml:1:11: mixture.0 must be a mapping of keys to values, got a"},
      {"mixture:\n  - weight: 1\n", "run.yaml:2:5: mixture.0.store is missing: token store"},
  };
  for (const auto& each : cases) EXPECT_EQ(complaint(each.text), each.said) << each.text;
}

TEST_F(Config, UnknownKeysNameTheNearest) {
  EXPECT_EQ(complaint("stesp: 3\n"), "run.yaml:1:1: unknown key stesp; did you mean steps?");
  EXPECT_EQ(complaint("schedule:\n  shpae: wsd\n"), "run.yaml:2:3: unknown key schedule.shpae; did you mean schedule.shape?");
  EXPECT_EQ(complaint("mixture:\n  - store: a\n    wieght: 1\n"), "run.yaml:3:5: unknown key mixture.0.wieght; did you mean mixture.0.weight?");
  EXPECT_EQ(complaint("learning_rate: 1\n"), "run.yaml:1:1: unknown key learning_rate; did you mean schedule.learning_rate?");
  EXPECT_EQ(complaint("schedule:\n  zzzzzz: 1\n"), "run.yaml:2:3: unknown key schedule.zzzzzz; known here: learning_rate, shape, warmup");
  EXPECT_EQ(complaint("schedule.shape: wsd\n"), "run.yaml:1:1: unknown key schedule.shape; known here: name, output, seed, steps, pack, targets, ranks, "
                                                "alphas, columns, mixture, schedule");
}

TEST_F(Config, WhatYamlAllowsAndAConfigDoesNot) {
  EXPECT_EQ(complaint("steps: 1\nname: a\nsteps: 2\n"), "run.yaml:3:1: the key steps stands twice, first at run.yaml:1:1");
  EXPECT_EQ(complaint("ranks: {a: 1, 'a': 2}\n"), "run.yaml:1:15: the key a stands twice, first at run.yaml:1:9");
  EXPECT_EQ(complaint("schedule:\n\twarmup: 1\n"), "run.yaml:2:1: a tab in the indentation; indent with spaces");
  EXPECT_EQ(complaint("schedule:\n \twarmup: 1\n"), "run.yaml:2:2: a tab in the indentation; indent with spaces");
  EXPECT_EQ(complaint("name: &a x\n"), "run.yaml:1:7: anchors (&name) are not read in a config; write the value out");
  EXPECT_NE(complaint("schedule: &s {shape: wsd}\nname: *s\n").find("aliases (*name) are not read"), std::string::npos);
  EXPECT_EQ(complaint("<<: {steps: 1}\n"), "run.yaml:1:1: merge keys (<<) are not read in a config; write the values out");
  EXPECT_EQ(complaint("steps: !!int 3\n").substr(0, 47), "run.yaml:1:8: tags are not read in a config, go");
  EXPECT_EQ(complaint("steps: 1\n---\nsteps: 2\n"), "run.yaml: more than one YAML document; only one is read");
  EXPECT_EQ(complaint("steps: 1\n...\nsteps: 2\n"), "run.yaml: more than one YAML document; only one is read");
  EXPECT_EQ(complaint("? [a, b]\n: 1\n"), "run.yaml:1:3: a key must be a name, got a list");
  EXPECT_EQ(complaint("- a\n"), "run.yaml:1:1: a config is a mapping of keys to values, got a list");
  EXPECT_EQ(complaint("just words\n"), "run.yaml:1:1: a config is a mapping of keys to values, got just words");
  EXPECT_EQ(complaint("steps: [1\n").substr(0, 9), "run.yaml:");
  EXPECT_NE(complaint("steps: [1\n").find("not valid YAML"), std::string::npos);
  EXPECT_NE(complaint("steps: {a: 1} 5\n"), "");
  EXPECT_NE(complaint("steps: 1\n name: x\n"), "");
}

TEST_F(Config, AllProblemsAreReportedAtOnceInTheOrderOfTheFile) {
  EXPECT_EQ(complaint("stesp: 3\nsteps: 0\nschedule:\n  shape: round\n  shape: wsd\n"),
            "run.yaml:1:1: unknown key stesp; did you mean steps?\n"
            "run.yaml:2:8: steps must be at least 1, got 0\n"
            "run.yaml:4:10: schedule.shape must be one of cosine, linear, constant, wsd; got round\n"
            "run.yaml:5:3: the key shape stands twice, first at run.yaml:4:3");
  std::string many;
  for (int i = 0; i < 70; ++i) many += "zz" + std::to_string(i) + "zzzzzz: 1\n";
  EXPECT_TRUE(complaint(many).ends_with("\n... and 20 more problems"));
}

TEST_F(Config, HostileFilesAreRefusedQuickly) {
  EXPECT_EQ(complaint(std::string("steps: 1\n\x04name: x\n"), {}, ErrorKind::kData), "run.yaml:2:1: a control character (byte 4) in the text");
  EXPECT_EQ(complaint(std::string("name: a\0b\n", 10), {}, ErrorKind::kData), "run.yaml:1:8: a control character (byte 0) in the text");
  EXPECT_EQ(complaint("name: \xff\n", {}, ErrorKind::kData), "run.yaml:1:7: not UTF-8 text");
  EXPECT_EQ(complaint("name: \xed\xa0\x80\n", {}, ErrorKind::kData), "run.yaml:1:7: not UTF-8 text");
  EXPECT_EQ(complaint("name: \xc0\xaf\n", {}, ErrorKind::kData), "run.yaml:1:7: not UTF-8 text");
  EXPECT_NE(complaint("name: " + std::string(100000, '[')).find("nested deeper"), std::string::npos);
  EXPECT_NE(complaint("name: " + std::string(100, '{') + "\n").find("nested deeper"), std::string::npos);
  EXPECT_NE(complaint(std::string((1 << 20) + 1, '#'), {}, ErrorKind::kData).find("more than the 1048576 allowed"), std::string::npos);
  EXPECT_NE(complaint("\"" + std::string(900000, 'k') + "\": 1\n"), "");
  EXPECT_TRUE(testing::fails_with(ErrorKind::kData, "no-such.yaml: cannot be read", [&] { read_config<RunConfig>(scratch_ / "no-such.yaml"); }));
  EXPECT_TRUE(testing::fails_with(ErrorKind::kData, "not a regular file", [&] { read_config<RunConfig>(scratch_.path()); }));
}

TEST_F(Config, ByteOrderMarkAndCarriageReturnsAreRead) {
  EXPECT_EQ(read("\xef\xbb\xbfsteps: 5\r\nname: x\r\n").steps, 5);
  EXPECT_EQ(read("\xef\xbb\xbfsteps: 5\r\nname: x\r\n").name, "x");
}

TEST_F(Config, OverridesReplaceWhatTheFileSays) {
  const std::string text = "steps: 5\nmixture:\n  - {store: a}\n  - {store: b, weight: 3}\nschedule:\n  warmup: 7\n";
  const RunConfig run = read(text, {"steps=6", "steps=8", "mixture.0.weight=2", "mixture.2.store=c", "schedule.shape=linear", "targets=[q, v]", "targets.1=k",
                              "ranks={model.layers.0: 4}", "name='a # b'", "output=x=y"});
  EXPECT_EQ(run.steps, 8);
  ASSERT_EQ(run.mixture.size(), 3u);
  EXPECT_EQ(run.mixture[0].weight, 2);
  EXPECT_EQ(run.mixture[1].weight, 3);
  EXPECT_EQ(run.mixture[2].store, "c");
  EXPECT_EQ(run.schedule.shape, "linear");
  EXPECT_EQ(run.schedule.warmup, 7);
  EXPECT_EQ(run.targets, (std::vector<std::string>{"q", "k"}));
  EXPECT_EQ(run.ranks, (std::map<std::string, std::int64_t>{{"model.layers.0", 4}}));
  EXPECT_EQ(run.name, "a # b");
  EXPECT_EQ(run.output, "x=y");
  EXPECT_EQ(read_config<RunConfig>("", {"mixture.0.store=a", "mixture.1.store=b"}).mixture.size(), 2u);
}

TEST_F(Config, OverridesAreCheckedByTheSameRules) {
  const struct {
    const char* assignment;
    const char* said;
  } cases[] = {
      {"steps=010", "--set steps: steps must be a whole number in plain digits at least 1, got 010"},
      {"steps=0", "--set steps: steps must be at least 1, got 0"},
      {"stesp=1", "--set stesp: unknown key stesp; did you mean steps?"},
      {"schedule.shpae=wsd", "--set schedule.shpae: unknown key schedule.shpae; did you mean schedule.shape?"},
      {"steps", "--set steps: must look like key=value, for example schedule.shape=linear"},
      {"=3", "--set : must look like key=value, for example schedule.shape=linear"},
      {"schedule..shape=wsd", "--set schedule..shape: an empty name in the key"},
      {"steps=", "--set steps: steps has no value; remove the key to keep the default, or quote the word to mean the text"},
      {"name=a #b", "--set name: YAML reads this value as \"a\" only; put it into quotes"},
      {"name=[a", "--set name: not valid YAML: end of sequence flow not found"},
      {"steps.more=1", "--set steps.more: steps.more: there is a single value before this name, not a group"},
      {"mixture.5.store=x", "--set mixture.5.store: mixture.5: the list has 1 entries; the next one is number 1"},
      {"mixture.99999999999.store=x", "--set mixture.99999999999.store: mixture.99999999999: a list is addressed by number, got 99999999999"},
      {"mixture.first.store=x", "--set mixture.first.store: mixture.first: a list is addressed by number, got first"},
      {"schedule={shape: wsd}", "--set schedule: schedule this would drop the group's other values; set its keys one by one"},
      {"name=*a", "--set name: not valid YAML: the referenced anchor is not defined"},
  };
  for (const auto& each : cases)
    EXPECT_EQ(complaint("steps: 5\nmixture: [{store: a}]\nschedule: {warmup: 2}\n", {each.assignment}), each.said) << each.assignment;
  EXPECT_EQ(complaint("", {"name=\xff"}, ErrorKind::kData), "--set name: not UTF-8 text");
}

TEST_F(Config, HelpNamesEveryKey) {
  const std::string help = config_help<RunConfig>();
  for (const char* line : {"name  (text; default run)", "seed  (whole number; default 0)", "steps  (whole number at least 1; default 100)",
                           "pack  (true or false; default true)", "targets  (list of texts; default [all-linear])",
                           "ranks  (mapping of names to whole numbers from 1 to 512; default {})", "mixture.N.store  (path; required)",
                           "schedule.learning_rate  (number from 0 to 1; default 2e-04)", "schedule.shape  (cosine | linear | constant | wsd; default cosine)",
                           "schedule.warmup  (whole number from 0 to 1000, steps; default 10)", "output  (path; default empty)"})
    EXPECT_NE(help.find(line), std::string::npos) << line << "\nis not in\n" << help;
}

}  // namespace
}  // namespace alambic
