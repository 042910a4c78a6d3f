// SPDX-License-Identifier: Apache-2.0
// The whole program but `main`, called in this process: exit codes, what is said where, and every mistake a user can make.
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <new>
#include <set>
#include <sstream>
#include <thread>

#include "cli/run.h"
#include "cli/verbs.h"
#include "core/error.h"
#include "distill/write_cache.h"
#include "parallel/nccl.h"
#include "tests/cli/tiny_model.h"
#include "tests/support.h"

namespace alambic::cli {
namespace {

namespace fs = std::filesystem;
using namespace alambic::testing;

struct Outcome {
  int code = 0;
  std::string out, err;
};

Outcome call(const std::vector<std::string>& words, const std::string& input = "") {
  std::istringstream in(input);
  std::ostringstream out, err;
  Outcome outcome;
  outcome.code = run(words, {in, out, err});
  outcome.out = out.str();
  outcome.err = err.str();
  return outcome;
}

/// The call ends with this code, prints no result, and says these words on stderr.
::testing::AssertionResult refuses(const std::vector<std::string>& words, int code, const std::string& said, const std::string& input = "") {
  const Outcome outcome = call(words, input);
  if (outcome.code != code) return ::testing::AssertionFailure() << "exit code " << outcome.code << ", expected " << code << ": " << outcome.err;
  if (!outcome.out.empty()) return ::testing::AssertionFailure() << "printed a result: " << outcome.out;
  if (!outcome.err.starts_with("alambic: ") && outcome.err.find("\nalambic: ") == std::string::npos) return ::testing::AssertionFailure() << "no line of cause: " << outcome.err;
  if (outcome.err.find(said) == std::string::npos) return ::testing::AssertionFailure() << "\"" << outcome.err << "\" does not contain \"" << said << "\"";
  return ::testing::AssertionSuccess();
}

/// Exactly one JSON object on one line.
Json object_of(const Outcome& outcome) {
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_EQ(std::count(outcome.out.begin(), outcome.out.end(), '\n'), 1) << outcome.out;
  EXPECT_TRUE(outcome.out.ends_with("\n"));
  return outcome.code == 0 ? parse_json(outcome.out, "stdout") : Json();
}

class CommandLine : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    root_ = new fs::path(fs::temp_directory_path() / ("alambic-cli-tests-" + std::to_string(::getpid())));
    fs::remove_all(*root_);
    write_tiny_model(*root_ / "model");
    write_tiny_model(*root_ / "other", true, 1.0);
    write_tiny_model(*root_ / "no-tokenizer", false);
    write_tiny_adapter(*root_ / "model", *root_ / "adapter");
    write_tiny_store(*root_ / "store", tiny_tokenizer_hash());
    write_tiny_store(*root_ / "foreign-store", std::string(64, 'f'));
    fs::create_directories(*root_ / "empty");
    write_file(*root_ / "words.txt", "w4 w5 w6 w7\n\nw8 w9 w10\n");
    write_file(*root_ / "notes.md", "nothing");
  }
  static void TearDownTestSuite() {
    fs::remove_all(*root_);
    delete root_;
  }
  static std::string there(const std::string& name) { return (*root_ / name).string(); }
  std::string yaml(const std::string& name, const std::string& text) {
    write_file(scratch_ / name, text);
    return (scratch_ / name).string();
  }
  std::string train_yaml(const std::string& more = "") {
    return yaml("train.yaml", "model: " + there("model") + "\noutput: " + (scratch_ / "run").string() +
                                  "\nlora: {rank: 2, alpha: 4, targets: [q_proj]}\ndata:\n  row_length: 16\n  batches_per_step: 1\n  mixture:\n    - store: " + there("store") +
                                  "\nevaluation:\n  stores: [{name: words, store: " + there("store") + "}]\nlimits: {max_steps: 2}\ncompute_type: f32\n" + more);
  }

  static fs::path* root_;
  ScratchFolder scratch_;
};

fs::path* CommandLine::root_ = nullptr;

// ---- The program itself --------------------------------------------------------------------------------------------

TEST_F(CommandLine, UnknownVerbsAndOptions) {
  EXPECT_TRUE(refuses({"scroe"}, 2, "alambic: unknown verb scroe; did you mean score?\n  remedy: alambic --help lists the verbs\n"));
  EXPECT_TRUE(refuses({"distil"}, 2, "alambic: unknown verb distil; did you mean distill?"));
  EXPECT_TRUE(refuses({"\x1b[31m"}, 2, "unknown verb \\x1b[31m"));
  EXPECT_TRUE(refuses({"--modle"}, 2, "alambic: unknown option --modle before the verb"));
  EXPECT_TRUE(refuses({"help", "tran"}, 2, "unknown verb tran; did you mean train?"));
  for (const Verb& verb : verbs()) EXPECT_TRUE(refuses({verb.name, "--hepl"}, 2, verb.name + ": unknown option --hepl; did you mean --help?"));
}

TEST_F(CommandLine, WithoutWordsTheVerbsAreListedAsAnError) {
  const Outcome outcome = call({});
  EXPECT_EQ(outcome.code, 2);
  EXPECT_EQ(outcome.out, "");
  EXPECT_TRUE(outcome.err.starts_with("Usage: alambic VERB"));
}

TEST_F(CommandLine, HelpGoesToStandardOutput) {
  for (const std::vector<std::string>& words : std::vector<std::vector<std::string>>{{"--help"}, {"-h"}, {"help"}}) {
    const Outcome outcome = call(words);
    EXPECT_EQ(outcome.code, 0);
    EXPECT_EQ(outcome.err, "");
    for (const Verb& verb : verbs()) EXPECT_NE(outcome.out.find("\n  " + verb.name + " "), std::string::npos) << verb.name;
  }
}

TEST_F(CommandLine, HelpOfEveryVerbNamesAllThatItsTableHolds) {
  for (const Verb& verb : verbs()) {
    const Outcome outcome = call({verb.name, "--help"});
    EXPECT_EQ(outcome.code, 0);
    EXPECT_EQ(outcome.err, "");
    EXPECT_EQ(call({"help", verb.name}).out, outcome.out);
    EXPECT_FALSE(verb.summary.empty());
    EXPECT_FALSE(verb.examples.empty()) << verb.name;
    for (const Option& option : verb.options) {
      EXPECT_NE(outcome.out.find(label_of(option) + "\n"), std::string::npos) << verb.name << " " << option.name;
      EXPECT_FALSE(option.help.empty()) << option.name;
      EXPECT_EQ(option.kind == Kind::kSwitch, option.value.empty()) << verb.name << " " << option.name;
    }
    for (const Positional& positional : verb.positionals) EXPECT_NE(outcome.out.find("  " + positional.name + "\n"), std::string::npos);
    std::istringstream lines(outcome.out);
    for (std::string line; std::getline(lines, line);)
      EXPECT_TRUE(verb.config_help || line.size() <= 125u) << line;  // examples are not filled
  }
  EXPECT_NE(call({"train", "--help"}).out.find("  schedule.learning_rate  (number from 0 to 1; default"), std::string::npos);
  EXPECT_NE(call({"prepare", "--help"}).out.find("  sources.N.licence  ("), std::string::npos);
}

TEST_F(CommandLine, OptionsOfOneVerbAreUniqueAndDefaultsKeepTheirOwnRules) {
  for (const Verb& verb : verbs()) {
    std::set<std::string> names;
    std::set<char> letters;
    for (const Option& option : verb.options) {
      EXPECT_TRUE(names.insert(option.name).second) << verb.name << " --" << option.name;
      EXPECT_TRUE(!option.letter || letters.insert(option.letter).second) << verb.name << " -" << option.letter;
      if (option.otherwise.empty()) continue;
      Verb alone = verb;
      alone.positionals.clear();
      for (Option& each : alone.options) each.required = false;
      EXPECT_EQ(parse(alone, std::vector<std::string>{"--" + option.name, option.otherwise}).text(option.name), option.otherwise);
    }
  }
}

TEST_F(CommandLine, VersionNamesTheLibraries) {
  const Outcome outcome = call({"--version"});
  EXPECT_EQ(outcome.code, 0);
  EXPECT_TRUE(outcome.out.starts_with("alambic 0."));
  for (const char* name : {"\nlibtorch 2.", "\nHDF5 1.", "\nOpenSSL ", "\nMKL ", "\noneDNN ", "\nzstd ", "\nzlib "}) EXPECT_NE(outcome.out.find(name), std::string::npos) << name;
  EXPECT_EQ(outcome.out.find("  "), std::string::npos) << "a version is empty";
}

TEST_F(CommandLine, EveryExceptionBecomesItsExitCode) {
  const auto report = [](const std::function<void()>& thrower) {
    std::ostringstream err;
    int code = 0;
    try {
      thrower();
    } catch (...) {
      code = report_current_exception(err);
    }
    return std::to_string(code) + " " + err.str();
  };
  EXPECT_EQ(report([] { fail(ErrorKind::kUsage, "a"); }), "2 alambic: a\n");
  EXPECT_EQ(report([] { fail(ErrorKind::kData, "a", Remedy{"b"}); }), "3 alambic: a\n  remedy: b\n");
  EXPECT_EQ(report([] { fail(ErrorKind::kLicence, "a"); }).substr(0, 2), "4 ");
  EXPECT_EQ(report([] { fail(ErrorKind::kResource, "a"); }).substr(0, 2), "5 ");
  EXPECT_EQ(report([] { fail(ErrorKind::kNumerics, "a"); }).substr(0, 2), "6 ");
  EXPECT_EQ(report([] { fail(ErrorKind::kPeer, "a"); }).substr(0, 2), "7 ");
  EXPECT_EQ(report([] { fail(ErrorKind::kStopped, "a"); }).substr(0, 3), "75 ");
  EXPECT_EQ(report([] { fail(ErrorKind::kBug, "a"); }).substr(0, 45), "70 alambic: a\n  remedy: this is a bug of alam");
  EXPECT_EQ(report([] { throw std::bad_alloc(); }).substr(0, 24), "5 alambic: out of memory");
  EXPECT_EQ(report([] { (void)at::empty({1ll << 46}); }).substr(0, 24), "5 alambic: out of memory");
  EXPECT_EQ(report([] { TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate 2.00 GiB"); }).substr(0, 41), "5 alambic: out of memory: CUDA out of mem");  // as a GPU's allocator does
  EXPECT_EQ(report([] { (void)at::empty({2}).reshape({3}); }).substr(0, 21), "70 alambic: libtorch:");
  EXPECT_EQ(report([] { (void)fs::file_size("/no/such/file"); }).substr(0, 49), "3 alambic: /no/such/file: No such file or directo");
  EXPECT_EQ(report([] { throw fs::filesystem_error("x", "/full", std::make_error_code(std::errc::no_space_on_device)); }).substr(0, 19), "5 alambic: /full: N");
  EXPECT_EQ(report([] { throw std::runtime_error("what"); }).substr(0, 28), "70 alambic: unexpected: what");
  EXPECT_EQ(report([] { throw 3; }).substr(0, 44), "70 alambic: an exception of an unknown kind\n");
}

TEST_F(CommandLine, AResultThatCannotBeWrittenIsAnError) {
  std::istringstream in;
  std::ostringstream err;
  std::ofstream full("/dev/full");
  EXPECT_EQ(run(std::vector<std::string>{"--help"}, {in, full, err}), 5);
  EXPECT_EQ(err.str(), "alambic: standard output cannot be written\n  remedy: check the disk that it goes to\n");
}

TEST_F(CommandLine, NumbersHaveAPointWhateverTheLocale) {
  struct Comma : std::numpunct<char> {
    char do_decimal_point() const override { return ','; }
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
  };
  const Outcome expected = call({"score", "-m", there("model"), "--ids", "4,5,6"});
  const std::locale before = std::locale::global(std::locale(std::locale(), new Comma));
  const Outcome outcome = call({"score", "-m", there("model"), "--ids", "4,5,6"});
  const Outcome sampled = call({"generate", "-m", there("model"), "--prompt", "w4", "--temperature", "0.5", "--max-new-tokens", "3"});
  const Outcome wrong = call({"train", train_yaml("schedule: {learning_rate: 2000.5}\n")});
  std::locale::global(before);
  EXPECT_EQ(outcome.out, expected.out);
  EXPECT_EQ(sampled.code, 0) << sampled.err;
  EXPECT_NE(wrong.err.find("schedule.learning_rate must be from 0 to 1, got 2000.5"), std::string::npos) << wrong.err;
}

// ---- Configs and --set ---------------------------------------------------------------------------------------------

TEST_F(CommandLine, ConfigProblemsHaveFileLineAndColumn) {
  for (const std::string verb : {"train", "plan"}) {
    const std::string file = yaml("bad.yaml", "model: m\noutput: o\nsteps: 010\nschedule:\n  shpae: wsd\n  learning_rate: fast\n");
    EXPECT_TRUE(refuses({verb, file}, 2, file + ":5:3: unknown key schedule.shpae; did you mean schedule.shape?\n"));
    EXPECT_TRUE(refuses({verb, file}, 2, file + ":6:18: schedule.learning_rate must be a finite number from 0 to 1, got fast"));
    EXPECT_TRUE(refuses({verb, file}, 2, "data.mixture is missing"));
    EXPECT_TRUE(refuses({verb, train_yaml(), "--set", "data.row_lenght=3"}, 2, "--set data.row_lenght: unknown key data.row_lenght; did you mean data.row_length?"));
    EXPECT_TRUE(refuses({verb, train_yaml(), "--set=data.row_length=many"}, 2, "--set data.row_length: data.row_length must be a whole number"));
    EXPECT_TRUE(refuses({verb, train_yaml(), "--set", "seed"}, 2, "--set seed: must look like key=value"));
    EXPECT_TRUE(refuses({verb, there("no.yaml")}, 3, "no.yaml: cannot be read: No such file or directory"));
    EXPECT_TRUE(refuses({verb, there("model")}, 3, "not a regular file"));
    EXPECT_TRUE(refuses({verb}, 2, verb + ": CONFIG is missing"));
    EXPECT_TRUE(refuses({verb, yaml("list.yaml", "- a\n")}, 2, "list.yaml:1:1: a config is a mapping of keys to values, got a list"));
  }
}

// ---- score ---------------------------------------------------------------------------------------------------------

TEST_F(CommandLine, ScoreGivesIdsAndLogprobs) {
  const Json scored = object_of(call({"score", "--model", there("model"), "--ids", "4,5,6,7", "--json"}));
  EXPECT_EQ(scored["ids"], (Json{4, 5, 6, 7}));
  ASSERT_EQ(scored["logprobs"].size(), 3u);
  EXPECT_EQ(scored.size(), 2u);
  for (const Json& each : scored["logprobs"]) EXPECT_LT(each.get<double>(), 0);
  // The text of these ids, ids from stdin, and a folder without a tokenizer all give the same.
  EXPECT_EQ(object_of(call({"score", "-m", there("model"), "--text", "w4 w5 w6 w7", "--json"})), scored);
  EXPECT_EQ(object_of(call({"score", "-m", there("model"), "--text", "-", "--json"}, "w4 w5 w6 w7")), scored);
  EXPECT_EQ(object_of(call({"score", "-m", there("model"), "--ids=-", "--json"}, "4 5\n6,7\n")), scored);
  EXPECT_EQ(object_of(call({"score", "-m", there("no-tokenizer"), "--ids", "4,5,6,7", "--json"})), scored);
  // Each logprob depends on what is before it alone.
  const Json shorter = object_of(call({"score", "-m", there("model"), "--ids", "4,5,6", "--json"}));
  EXPECT_NEAR(shorter["logprobs"][1].get<double>(), scored["logprobs"][1].get<double>(), 1e-6);
  EXPECT_EQ(object_of(call({"score", "-m", there("model"), "--ids", "4", "--json"})), Json::parse(R"({"ids": [4], "logprobs": []})"));
}

TEST_F(CommandLine, ScoreProbabilitiesSumToOne) {
  double sum = 0;
  for (std::int64_t id = 0; id < kTinyVocabulary; ++id)
    sum += std::exp(object_of(call({"score", "-m", there("model"), "--json", "--ids", "9," + std::to_string(id)}))["logprobs"][0].get<double>());
  EXPECT_NEAR(sum, 1, 1e-5);
}

TEST_F(CommandLine, ScorePrintsFullPrecisionForAPersonToo) {
  const Json scored = object_of(call({"score", "-m", there("model"), "--text", "w4 w5", "--json"}));
  const Outcome lines = call({"score", "-m", there("model"), "--text", "w4 w5"});
  EXPECT_TRUE(lines.out.starts_with("4\t-\t\"w4\"\n5\t")) << lines.out;
  EXPECT_EQ(std::stod(lines.out.substr(lines.out.find("\n5\t") + 3)), scored["logprobs"][0].get<double>());
  EXPECT_NE(lines.out.find("\ntotal\t"), std::string::npos);
}

TEST_F(CommandLine, ScoreWithAnAdapterDiffers) {
  const std::vector<std::string> words = {"score", "-m", there("model"), "--ids", "4,5,6", "--json"};
  std::vector<std::string> with = words;
  with.insert(with.end(), {"--adapter", there("adapter")});
  EXPECT_NE(object_of(call(with))["logprobs"], object_of(call(words))["logprobs"]);
}

TEST_F(CommandLine, ScoreMistakes) {
  EXPECT_TRUE(refuses({"score", "--ids", "1"}, 2, "score: --model is missing"));
  EXPECT_TRUE(refuses({"score", "-m", there("model")}, 2, "score: one of --ids, --text is needed"));
  EXPECT_TRUE(refuses({"score", "-m", there("model"), "--ids", "1", "--text", "x"}, 2, "score: --ids and --text exclude each other"));
  EXPECT_TRUE(refuses({"score", "-m", there("model"), "--ids", "1", "--no-special-tokens"}, 2, "score: --no-special-tokens goes with --text"));
  EXPECT_TRUE(refuses({"score", "-m", there("model"), "--ids", "1,32"}, 2, "score: token id 32 (number 2) is not below the model's vocabulary of 32 tokens"));
  EXPECT_TRUE(refuses({"score", "-m", there("model"), "--ids", "1,-2"}, 2, "score: --ids: number 2 is no token id: -2"));
  EXPECT_TRUE(refuses({"score", "-m", there("model"), "--ids", "1,w4"}, 2, "score: --ids: number 2 is no token id: w4"));
  EXPECT_TRUE(refuses({"score", "-m", there("model"), "--ids", "99999999999999999999"}, 2, "score: --ids: number 1 is no token id"));
  EXPECT_TRUE(refuses({"score", "-m", there("model"), "--ids", ", ,"}, 2, "score: --ids: no token ids were given"));
  EXPECT_TRUE(refuses({"score", "-m", there("model"), "--text", ""}, 2, "score: --text: the text has no tokens"));
  EXPECT_TRUE(refuses({"score", "-m", there("model"), "--text", "\xff"}, 3, "UTF-8"));
  EXPECT_TRUE(refuses({"score", "-m", there("model"), "--ids", "1", "--compute", "fp32"}, 2, "--compute must be one of auto, f32, bf16, got fp32; did you mean f32?"));
  if (parallel::gpus().seen.empty()) {
    EXPECT_TRUE(refuses({"score", "-m", there("model"), "--ids", "1,2", "--device", "cuda"}, 5, "device: cuda: there is no GPU: "));
  }
  EXPECT_TRUE(refuses({"score", "-m", there("no-tokenizer"), "--text", "w4"}, 3, "tokenizer.json: there is no such file"));
  EXPECT_TRUE(refuses({"score", "-m", there("model"), "--ids", "1", "--threads", "0"}, 2, "--threads must be from 1 to 4096, got 0"));
  EXPECT_TRUE(refuses({"score", "-m", there("model"), "--ids", "1,2", "extra"}, 2, "score: one argument too many: extra"));
}

TEST_F(CommandLine, WhatIsNoModelFolderIsToldApart) {
  const auto score = [](const std::string& model) { return std::vector<std::string>{"score", "--ids", "1,2", "-m", model}; };
  EXPECT_TRUE(refuses(score(there("nowhere")), 3, "nowhere: there is no such folder\n  remedy: give the folder of a model"));
  EXPECT_TRUE(refuses(score(there("empty")), 3, "empty: not a model folder: it holds no config.json\n  remedy: alambic inspect"));
  EXPECT_TRUE(refuses(score(there("adapter")), 3, "adapter: an adapter, not a model\n  remedy: give its base as --model and this folder as --adapter"));
  EXPECT_TRUE(refuses(score(there("words.txt")), 3, "words.txt: a file, not a model folder"));
  write_file(scratch_ / "x.gguf", "GGUF");
  EXPECT_TRUE(refuses(score((scratch_ / "x.gguf").string()), 3, "x.gguf FOLDER makes a folder of it"));
  write_tiny_model(scratch_ / "odd");
  write_file(scratch_ / "odd/config.json", R"({"model_type": "lama"})");
  EXPECT_TRUE(refuses(score((scratch_ / "odd").string()), 3, "lama"));
  write_file(scratch_ / "odd/config.json", "{");
  EXPECT_TRUE(refuses(score((scratch_ / "odd").string()), 3, "config.json"));
}

TEST_F(CommandLine, AdaptersOfAnotherBaseAndOtherFoldersAreRefused) {
  const auto score = [](const std::string& model, const std::string& adapter) { return std::vector<std::string>{"score", "--ids", "1,2", "-m", model, "--adapter", adapter}; };
  EXPECT_TRUE(refuses(score(there("other"), there("adapter")), 3, "was trained on another base"));
  EXPECT_TRUE(refuses(score(there("model"), there("nowhere")), 3, "nowhere: there is no such folder"));
  EXPECT_TRUE(refuses(score(there("model"), there("empty")), 3, "empty: not an adapter: it holds neither adapter_config.json nor the adapter/ of a finished run"));
  EXPECT_TRUE(refuses(score(there("model"), there("model")), 3, "model: not an adapter"));
  fs::create_directories(scratch_ / "run");
  fs::copy(there("adapter"), scratch_ / "run/adapter");
  EXPECT_EQ(call(score(there("model"), (scratch_ / "run").string())).code, 0);
}

// ---- generate ------------------------------------------------------------------------------------------------------

TEST_F(CommandLine, GenerateStreamsTextAndRepeatsItself) {
  const std::vector<std::string> words = {"generate", "-m", there("model"), "--prompt", "w4 w5", "-n", "6"};
  const Outcome outcome = call(words);
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_NE(outcome.err.find("tokens/s"), std::string::npos);
  EXPECT_EQ(call(words).out, outcome.out);
  std::vector<std::string> more = words;
  more.insert(more.end(), {"--json"});
  const Json object = object_of(call(more));
  EXPECT_EQ(object["text"].get<std::string>() + "\n", outcome.out);
  EXPECT_EQ(object["prompt_ids"], (Json{4, 5}));
  EXPECT_LE(object["ids"].size(), 6u);
  EXPECT_TRUE(object["finish_reason"] == "length" || object["finish_reason"] == "stop_token");
  EXPECT_GT(object["tokens_per_second"].get<double>(), 0);
  more.push_back("--quiet");
  EXPECT_EQ(call(more).err, "");
}

TEST_F(CommandLine, GenerateTakesTheLikeliestToken) {
  const Json object = object_of(call({"generate", "-m", there("model"), "--prompt", "w4 w5", "-n", "1", "--json", "--compute", "f32"}));
  double best = -1e9;
  std::int64_t likeliest = -1;
  for (std::int64_t id = 0; id < kTinyVocabulary; ++id) {
    const double logprob = object_of(call({"score", "-m", there("model"), "--json", "--ids", "4,5," + std::to_string(id)}))["logprobs"][1].get<double>();
    if (logprob > best) best = logprob, likeliest = id;
  }
  EXPECT_EQ(object["ids"], Json{likeliest});
}

TEST_F(CommandLine, GenerateStopsAtAStopString) {
  const Json whole = object_of(call({"generate", "-m", there("model"), "--prompt", "w4", "-n", "8", "--temperature", "2", "--seed", "5", "--json"}));
  const std::string text = whole["text"];
  ASSERT_GT(text.size(), 8u);
  const std::string stop = text.substr(text.size() / 2, 3);
  const Json object = object_of(call({"generate", "-m", there("model"), "--prompt", "w4", "-n", "8", "--temperature", "2", "--seed", "5", "--json", "--stop", stop}));
  EXPECT_EQ(object["finish_reason"], "stop_string");
  EXPECT_EQ(object["text"], text.substr(0, text.find(stop)));
}

TEST_F(CommandLine, GenerateEndsWhereTheContextEnds) {
  std::string prompt = "w4";
  for (int i = 0; i < 59; ++i) prompt += " w5";
  const Json object = object_of(call({"generate", "-m", there("model"), "--prompt", "-", "--temperature", "3", "--seed", "1", "--json"}, prompt));
  EXPECT_LE(object["ids"].size(), 4u);
  EXPECT_TRUE(object["finish_reason"] == "context" || object["finish_reason"] == "stop_token");
  EXPECT_TRUE(refuses({"generate", "-m", there("model"), "--prompt", prompt + " " + prompt}, 2, "generate: the prompt has 120 tokens, the model at most 64 positions"));
}

TEST_F(CommandLine, GenerateChatsThroughTheTemplate) {
  fs::copy(there("model"), scratch_ / "chat");
  write_file(scratch_ / "chat/chat_template.jinja", "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}");
  const Json object = object_of(call({"generate", "-m", (scratch_ / "chat").string(), "--chat", "w9", "--system", "w8", "-n", "1", "--json"}));
  EXPECT_EQ(object["prompt_ids"], (Json{0, 8, 3, 9}));  // "system" is no word of the vocabulary
  EXPECT_TRUE(refuses({"generate", "-m", there("model"), "--chat", "w9"}, 3, "model: the model has no chat template\n  remedy: use --prompt"));
  write_file(scratch_ / "chat/chat_template.jinja", "{{ raise_exception('no such role') }}");
  EXPECT_TRUE(refuses({"generate", "-m", (scratch_ / "chat").string(), "--chat", "w9"}, 3, "no such role"));
}

TEST_F(CommandLine, GenerateMistakes) {
  const auto generate = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"generate", "-m", there("model")});
    return more;
  };
  EXPECT_TRUE(refuses(generate({}), 2, "generate: one of --prompt, --chat is needed"));
  EXPECT_TRUE(refuses(generate({"--prompt", "w4", "--chat", "w5"}), 2, "generate: --prompt and --chat exclude each other"));
  EXPECT_TRUE(refuses(generate({"--prompt", "w4", "--system", "w5"}), 2, "generate: --system goes with --chat"));
  EXPECT_TRUE(refuses(generate({"--prompt", ""}), 2, "generate: the prompt has no tokens"));
  EXPECT_TRUE(refuses(generate({"--prompt", "w4", "--stop", ""}), 2, "generate: --stop must not be empty"));
  EXPECT_TRUE(refuses(generate({"--prompt", "w4", "--top-p", "1.5"}), 2, "generate: --top-p must be from 0 to 1, got 1.5"));
  EXPECT_TRUE(refuses(generate({"--prompt", "w4", "--min-p", "-1"}), 2, "generate: --min-p must be from 0 to 1, got -1"));
  EXPECT_TRUE(refuses(generate({"--prompt", "w4", "--top-k", "-1"}), 2, "generate: --top-k must be from 0 to 1000000000, got -1"));
  EXPECT_TRUE(refuses(generate({"--prompt", "w4", "--temperature", "hot"}), 2, "generate: --temperature must be a number from 0 to 100, got hot"));
  EXPECT_TRUE(refuses(generate({"--prompt", "w4", "--repetition-penalty", "0"}), 2, "generate: --repetition-penalty must be from 0.01 to 100, got 0"));
  EXPECT_TRUE(refuses(generate({"--prompt", "w4", "-n", "0"}), 2, "generate: --max-new-tokens must be from 1 to 1000000000, got 0"));
  EXPECT_TRUE(refuses(generate({"--prompt", "w4", "--seed", "-1"}), 2, "generate: --seed must be at least 0, got -1"));
  EXPECT_TRUE(refuses({"generate", "-m", there("no-tokenizer"), "--prompt", "w4"}, 3, "tokenizer.json: there is no such file"));
  EXPECT_NE(call(generate({"--prompt", "w4", "-n", "1", "--top-k", "3"})).err.find("warning: --top-k has no effect without --temperature"), std::string::npos);
  write_tiny_model(scratch_ / "wrong");
  std::string tokenizer = tiny_tokenizer_json();
  tokenizer.replace(tokenizer.find(":31}"), 4, ":99}");
  write_file(scratch_ / "wrong/tokenizer.json", tokenizer);
  EXPECT_TRUE(refuses({"generate", "-m", (scratch_ / "wrong").string(), "--prompt", "w31"}, 3, "the tokenizer gives id 99, but the model's vocabulary has 32 tokens"));
  write_file(scratch_ / "wrong/tokenizer.json", "{}");
  EXPECT_TRUE(refuses({"generate", "-m", (scratch_ / "wrong").string(), "--prompt", "w31"}, 3, "tokenizer.json: not a tokenizer"));
}

// ---- evaluate ------------------------------------------------------------------------------------------------------

TEST_F(CommandLine, EvaluateAgreesWithScore) {
  const Json report = object_of(call({"evaluate", "-m", there("model"), "--store", there("store"), "--compute", "f32", "--json"}));
  ASSERT_EQ(report["stores"].size(), 1u);
  double nats = 0;
  for (int number = 0; number < 4; ++number) {
    std::string ids;
    for (int i = 0; i < 12; ++i) ids += std::to_string(4 + (number * 5 + i * 3) % 28) + ",";
    const Json scored = object_of(call({"score", "-m", there("model"), "--ids", ids, "--json"}));
    for (const Json& each : scored["logprobs"]) nats -= each.get<double>();
  }
  const Json& store = report["stores"][0];
  EXPECT_EQ(store["tokens"], 44);
  EXPECT_NEAR(store["nats"].get<double>(), nats, 1e-4);
  EXPECT_NEAR(store["bits_per_byte"].get<double>(), nats / std::log(2.0) / (4 * 44), 1e-6);
  EXPECT_EQ(store["name"], there("store"));
  EXPECT_EQ(report["adapter"], nullptr);
  const Outcome lines = call({"evaluate", "-m", there("model"), "-s", there("store"), "-s", there("store")});
  EXPECT_EQ(std::count(lines.out.begin(), lines.out.end(), '\n'), 3) << lines.out;
}

TEST_F(CommandLine, EvaluateMistakes) {
  EXPECT_TRUE(refuses({"evaluate"}, 2, "evaluate: neither CONFIG nor --model was given"));
  EXPECT_TRUE(refuses({"evaluate", "-m", there("model")}, 2, "evaluate: --store is missing"));
  EXPECT_TRUE(refuses({"evaluate", train_yaml(), "-m", there("model")}, 2, "evaluate: --model and CONFIG exclude each other"));
  EXPECT_TRUE(refuses({"evaluate", "-m", there("model"), "-s", there("store"), "--set", "a=b"}, 2, "evaluate: --set needs a CONFIG"));
  EXPECT_TRUE(refuses({"evaluate", "-m", there("model"), "-s", there("model")}, 3, "model: not a token store"));
  EXPECT_TRUE(refuses({"evaluate", "-m", there("model"), "-s", there("nowhere")}, 3, "nowhere"));
  EXPECT_TRUE(refuses({"evaluate", "-m", there("model"), "-s", there("foreign-store")}, 3, "foreign-store: made by another tokenizer: its hash is ffffffff"));
  EXPECT_TRUE(refuses({"evaluate", "-m", there("model"), "-s", there("store"), "--row-length", "1"}, 2, "--row-length must be from 2 to 1048576, got 1"));
  EXPECT_TRUE(refuses({"evaluate", train_yaml()}, 3, "run: the run has no result yet"));
}

// ---- plan, train, merge: one small run -----------------------------------------------------------------------------

TEST_F(CommandLine, ARunFromPlanToMerge) {
  const std::string config = train_yaml(), run = (scratch_ / "run").string(), merged = (scratch_ / "merged").string();
  const Json planned = object_of(call({"plan", config, "--json", "--no-probe"}));
  EXPECT_EQ(planned["steps"], 2);
  EXPECT_FALSE(fs::exists(run)) << "plan wrote something";
  EXPECT_EQ(call({"plan", config, "--no-probe"}).code, 0);
  const auto of_ranks = [&](const char* ranks, const char* set) { return object_of(call({"plan", config, "--json", "--no-probe", "-n", ranks, "--set", "data.batches_per_step=4", "--set", set})); };
  const Json of_one = of_ranks("1", "ranks.shard=true"), of_two = of_ranks("2", "ranks.shard=false"), sharing = of_ranks("2", "ranks.shard=true");
  EXPECT_FALSE(of_one.contains("ranks"));
  EXPECT_EQ(of_two["ranks"], (Json{{"size", 2}, {"micro_batches_each", 2}, {"gradient_bytes", of_two["ranks"]["gradient_bytes"]}, {"bytes_received_a_step", of_two["ranks"]["gradient_bytes"]}}));
  EXPECT_GT(of_two["ranks"]["gradient_bytes"], 0);
  for (const char* same : {"steps", "tokens", "tokens_per_step"}) EXPECT_EQ(of_two[same], of_one[same]) << same;
  for (const auto& [key, bytes] : of_one["memory"].items())
    if (key != "available") {
      EXPECT_EQ(of_two["memory"][key], bytes) << key;
    }
  EXPECT_GT(sharing["ranks"]["bytes_received_a_step"], of_two["ranks"]["bytes_received_a_step"]);
  EXPECT_NE(sharing["memory"]["weights"], of_two["memory"]["weights"]);
  const auto full_of = [&](const char* ranks, const char* batches) {
    return object_of(call({"plan", config, "--json", "--no-probe", "-n", ranks, "--set", "method=full", "--set", "ranks.shard=true", "--set", std::string("data.batches_per_step=") + batches}))["memory"];
  };
  const Json whole = full_of("1", "2"), one_each = full_of("2", "2"), two_each = full_of("2", "4");
  for (const Json& memory : {one_each, two_each}) EXPECT_EQ(2 * memory["optimizer"].get<std::uint64_t>(), whole["optimizer"]);
  EXPECT_NE(one_each["trained"], whole["trained"]);
  EXPECT_EQ(two_each["trained"], whole["trained"]);  // sums of the first micro-batch
  EXPECT_TRUE(refuses({"plan", config, "--no-probe", "-n", "3", "--set", "data.batches_per_step=4"}, 2, "data.batches_per_step: 4 micro-batches cannot be shared evenly by 3 ranks"));

  const Outcome trained = call({"train", config, "--json"});
  const Json report = object_of(trained);
  EXPECT_FALSE(trained.err.empty()) << "no progress was shown";
  EXPECT_TRUE(refuses({"train", config}, 2, "run"));                 // the folder is not empty
  EXPECT_EQ(planned["warnings"].size(), 1u) << "the store that is learnt from, and nothing of the output: " << planned["warnings"];
  EXPECT_NE(call({"plan", config, "--no-probe"}).out.find("run holds a finished run: train needs --resume"), std::string::npos);
  EXPECT_EQ(call({"train", config, "--resume", "-q"}).code, 0);      // finished: left alone
  EXPECT_TRUE(refuses({"train", config, "--resume", "--set", "seed=5"}, 2, "this run was started with other settings or data:\n  seed: 0 then, 5 now"));

  const Json evaluated = object_of(call({"evaluate", config, "--json"}));
  EXPECT_EQ(evaluated["stores"][0]["name"], "words");
  EXPECT_NE(evaluated["adapter"], nullptr);

  EXPECT_TRUE(refuses({"score", "-m", run, "--ids", "4,5"}, 3, "run: a run, not a model\n  remedy: give its base as --model and this folder as --adapter"));
  const Json merge = object_of(call({"merge", run, merged, "--json"}));
  EXPECT_EQ(call({"merge", run, merged}).code, 0);  // the same merge again
  EXPECT_TRUE(refuses({"merge", there("adapter"), merged, "--base", there("model")}, 2, "merged"));
  const Json a = object_of(call({"score", "-m", merged, "--ids", "4,5,6", "--json"}));
  const Json b = object_of(call({"score", "-m", there("model"), "--adapter", run, "--ids", "4,5,6", "--json"}));
  for (int i = 0; i < 2; ++i) EXPECT_NEAR(a["logprobs"][i].get<double>(), b["logprobs"][i].get<double>(), 1e-4);

  for (const auto& [path, kind] : {std::pair{run, "run"}, std::pair{merged, "model"}, std::pair{run + "/adapter", "adapter"}}) {
    EXPECT_EQ(object_of(call({"inspect", path, "--json"}))["kind"], kind);
    EXPECT_EQ(call({"inspect", path}).code, 0);
  }
  EXPECT_EQ(object_of(call({"inspect", run + "/checkpoint-2", "--json"}))["step"], 2);
}

TEST_F(CommandLine, WhichBlocksRunIsInThePlanAndInTheLog) {
  const auto said = [&](const char* verb, const char* output, const char* setting) {
    return call({verb, train_yaml(), "--json", "--set", "limits.max_steps=1", "--set", setting, "--set", "output=" + (scratch_ / output).string()});
  };
  EXPECT_EQ(object_of(said("plan", "mlp", "memory=mlp"))["blocks"], (Json{{"path", "fused"}, {"memory", "mlp"}}));
  EXPECT_NE(said("train", "mlp", "memory=mlp").err.find("blocks: fused, memory: mlp\n"), std::string::npos);
  // Of so many ranks on this machine none has memory for more than the least; alone, it has for all.
  const auto planned = [&](const char* ranks) { return object_of(call({"plan", train_yaml(), "--json", "--no-probe", "-n", ranks, "--set", "data.batches_per_step=1024", "--set", "memory=auto"})); };
  const Json alone = planned("1"), of_many = planned("1024");
  EXPECT_EQ(alone["blocks"]["memory"], "store");
  EXPECT_EQ(of_many["blocks"]["memory"], "block");
  EXPECT_NEAR(of_many["memory"]["available"].get<double>() * 1024 / alone["memory"]["available"].get<double>(), 1, 0.2);
  EXPECT_NE(to_line(of_many["warnings"]).find("MiB are needed"), std::string::npos);
  constexpr std::pair<const char*, const char*> kOneOfMany[] = {{"RANK", "0"}, {"WORLD_SIZE", "1"}, {"LOCAL_WORLD_SIZE", "1024"}};
  for (const auto& [name, value] : kOneOfMany) ::setenv(name, value, 1);
  const std::string trained = said("train", "many", "memory=auto").err;
  for (const auto& [name, value] : kOneOfMany) ::unsetenv(name);
  EXPECT_NE(trained.find("blocks: fused, memory: block\n"), std::string::npos) << trained;
  const std::string operators = "ATen operators, as model.layers.0.self_attn.q_proj has a DoRA adapter";
  EXPECT_EQ(object_of(said("plan", "dora", "lora.dora=true"))["blocks"], (Json{{"path", operators}, {"memory", "store"}}));
  EXPECT_NE(said("train", "dora", "lora.dora=true").err.find("blocks: " + operators + "\n"), std::string::npos);
}

TEST_F(CommandLine, SigtermSavesAndEndsWith75AndResumeGoesOn) {
  const std::string config = train_yaml();
  const fs::path metrics = scratch_ / "run/metrics.jsonl";
  std::uintmax_t told = 0;
  for (const bool resume : {false, true}) {
    std::atomic<bool> ended = false;
    // The signal is sent once the run has told something more: its handlers then stand.
    std::thread killer([&] {
      while (!ended && !(fs::exists(metrics) && fs::file_size(metrics) > told)) std::this_thread::sleep_for(std::chrono::milliseconds(5));
      if (!ended) ::kill(::getpid(), SIGTERM);
    });
    std::vector<std::string> words = {"train", config, "--set", "limits.max_steps=1000000"};
    if (resume) words.push_back("--resume");
    const Outcome outcome = call(words);
    ended = true;
    killer.join();
    EXPECT_EQ(outcome.code, 75) << outcome.err;
    EXPECT_EQ(outcome.out, "");
    EXPECT_NE(outcome.err.find("alambic: "), std::string::npos);
    told = fs::file_size(metrics);
  }
  EXPECT_EQ(object_of(call({"inspect", (scratch_ / "run").string(), "--json"}))["finished"], false);
  EXPECT_TRUE(refuses({"train", config, "--set", "limits.max_steps=1000000", "--set", "seed=5", "--resume"}, 2, "seed"));
  EXPECT_TRUE(refuses({"merge", (scratch_ / "run").string(), (scratch_ / "merged").string()}, 3, "run: the run is not finished\n  remedy: alambic train CONFIG --resume"));
}

TEST_F(CommandLine, TrainMistakes) {
  for (const char* verb : {"train", "plan"})
    EXPECT_TRUE(refuses({verb, train_yaml(), "--set", "output=" + there("notes.md") + "/run"}, 2, "notes.md/run: cannot be made"));
  EXPECT_TRUE(refuses({"train", train_yaml(), "--set", "model=" + there("nowhere")}, 3, "nowhere"));
  EXPECT_TRUE(refuses({"train", train_yaml(), "--set", "data.mixture.0.store=" + there("nowhere")}, 3, "nowhere"));
  EXPECT_TRUE(refuses({"train", train_yaml(), "--set", "data.mixture.0.store=" + there("foreign-store")}, 3, "tokenizer"));
  EXPECT_TRUE(refuses({"train", train_yaml(), "--set", "lora.targets=[q_porj]"}, 2, "q_porj"));
  EXPECT_TRUE(refuses({"train", train_yaml(), "--set", "method=qlora"}, 2, "--set method: method must be one of lora, full; got qlora, did you mean lora?"));
}

TEST_F(CommandLine, MergeMistakes) {
  const std::string out = (scratch_ / "out").string();
  EXPECT_TRUE(refuses({"merge", there("adapter")}, 2, "merge: OUTPUT is missing"));
  EXPECT_TRUE(refuses({"merge", there("nowhere"), out}, 3, "nowhere: there is no such folder"));
  EXPECT_TRUE(refuses({"merge", there("empty"), out}, 3, "empty: not an adapter"));
  EXPECT_TRUE(refuses({"merge", there("adapter"), out, "--base", there("nowhere")}, 3, "nowhere: there is no such folder"));
  EXPECT_TRUE(refuses({"merge", there("adapter"), out, "--base", there("other")}, 3, "another base"));
  EXPECT_TRUE(refuses({"merge", there("adapter"), there("empty")}, 2, "empty"));
  EXPECT_TRUE(refuses({"merge", there("adapter"), out, "--weights", "int8"}, 2, "--weights must be one of auto, f32, bf16, f16, got int8"));
  fs::copy(there("adapter"), scratch_ / "lost");
  Json config = read_json_file(scratch_ / "lost/adapter_config.json");
  config["base_model_name_or_path"] = "somebody/else";
  write_file(scratch_ / "lost/adapter_config.json", to_line(config));
  EXPECT_TRUE(refuses({"merge", (scratch_ / "lost").string(), out}, 2, "which base " + (scratch_ / "lost").string() + " was trained on cannot be told from it"));
  EXPECT_FALSE(fs::exists(out));
}

// ---- prepare, import, inspect, doctor ------------------------------------------------------------------------------

TEST_F(CommandLine, PrepareFromFlags) {
  const std::string out = (scratch_ / "store").string();
  const std::vector<std::string> words = {"prepare", "-m", there("model"), "-i", there("words.txt"), "-o", out, "--licence", "CC0-1.0", "--language", "en", "--json"};
  object_of(call(words));
  const Json store = object_of(call({"inspect", out, "--json"}));
  EXPECT_EQ(store["kind"], "token_store");
  EXPECT_EQ(store["sources"][0]["licence"], "CC0-1.0");
  EXPECT_EQ(call(words).code, 0);  // a finished store is left alone
  EXPECT_EQ(call({"evaluate", "-m", there("model"), "-s", out}).code, 0);
  const Outcome told = call({"prepare", "-m", there("model"), "-i", there("words.txt"), "-o", out + "2"});
  EXPECT_NE(told.out.find("[["), std::string::npos) << told.out;
}

TEST_F(CommandLine, PrepareMistakes) {
  const std::string out = (scratch_ / "store").string();
  const auto prepare = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"prepare", "-m", there("model"), "-o", out});
    return more;
  };
  EXPECT_TRUE(refuses({"prepare"}, 2, "prepare: neither CONFIG nor --model was given"));
  EXPECT_TRUE(refuses(prepare({}), 2, "prepare: neither CONFIG nor --input was given"));
  EXPECT_TRUE(refuses({"prepare", yaml("p.yaml", ""), "-i", "x"}, 2, "prepare: --input and CONFIG exclude each other"));
  EXPECT_TRUE(refuses({"prepare", yaml("p.yaml", "tokeniser: x\n")}, 2, "p.yaml:1:1: unknown key tokeniser; did you mean tokenizer?"));
  EXPECT_TRUE(refuses(prepare({"-i", there("nowhere.txt")}), 2, "nowhere.txt"));
  EXPECT_TRUE(refuses(prepare({"-i", there("words.txt"), "--format", "jsonn"}), 2, "sources.0.format must be one of"));
  EXPECT_TRUE(refuses(prepare({"-i", there("words.txt"), "--shard", "3/2"}), 2, "3/2"));
  EXPECT_TRUE(refuses(prepare({"-i", "bad\xff.txt"}), 2, "prepare: --input is not UTF-8 text"));
  write_file(scratch_ / "bad.txt", "a\xff");
  EXPECT_TRUE(refuses(prepare({"-i", (scratch_ / "bad.txt").string()}), 3, "UTF-8"));
  write_file(scratch_ / "bad.jsonl", "{\"text\": \"w4\"}\n{\n");
  EXPECT_TRUE(refuses(prepare({"-i", (scratch_ / "bad.jsonl").string()}), 3, "bad.jsonl:2"));
  EXPECT_TRUE(refuses({"prepare", "-m", there("no-tokenizer"), "-i", there("words.txt"), "-o", out}, 3, "tokenizer.json"));
  EXPECT_TRUE(refuses({"prepare", "-m", there("model"), "-i", there("words.txt"), "-o", there("model")}, 2, "model"));
}

TEST_F(CommandLine, ExtendAddsTokensOfFilesAndFlags) {
  const std::string out = (scratch_ / "extended").string();
  write_file(scratch_ / "tokens.txt", "new one\r\nw4 w5\n");
  const std::vector<std::string> words = {"extend", there("model"), out, "--tokens", (scratch_ / "tokens.txt").string(), "--token", "last", "--pad-to-multiple", "8"};
  const Outcome told = call(words);
  EXPECT_EQ(told.code, 0) << told.err;
  for (const char* shown : {"3 new tokens; 32 rows before, 40 now; head tied", "32\t\"new one\"\t", "33\t\"w4 w5\"\t2 pieces before", "34\t\"last\"\t"}) EXPECT_NE(told.out.find(shown), std::string::npos) << told.out;
  std::vector<std::string> again = words;
  again.push_back("--json");
  EXPECT_EQ(object_of(call(again))["already_done"], true);
  EXPECT_EQ(object_of(call({"inspect", out, "--json"}))["vocabulary"], 40);
  EXPECT_EQ(object_of(call({"score", "-m", out, "--text", "w7 last w4 w5", "--json"}))["ids"], Json({7, 34, 33}));

  const std::string other = (scratch_ / "other").string();
  const auto extend = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"extend", there("model"), other});
    return more;
  };
  EXPECT_TRUE(refuses(extend({}), 2, "no token was given"));
  EXPECT_TRUE(refuses(extend({"--token", "w4"}), 2, "has it already, with the id 4"));
  EXPECT_TRUE(refuses(extend({"--token", "x", "--init", "zeros"}), 2, "--init"));
  EXPECT_TRUE(refuses(extend({"--tokens", there("nowhere.txt")}), 3, "nowhere.txt"));
  write_file(scratch_ / "gap.txt", "one\n\ntwo\n");
  EXPECT_TRUE(refuses(extend({"--tokens", (scratch_ / "gap.txt").string()}), 3, "gap.txt:2: an empty line is no token"));
  write_file(scratch_ / "tokens.json", "[\"a\\nb\", 3]");
  EXPECT_TRUE(refuses(extend({"--tokens", (scratch_ / "tokens.json").string()}), 3, "must hold a JSON list of strings, has 3"));
  EXPECT_TRUE(refuses({"extend", there("no-tokenizer"), other, "--token", "x"}, 3, "tokenizer.json"));
  EXPECT_TRUE(refuses({"extend", there("model"), there("other"), "--token", "x"}, 2, "exists and is another folder"));
  write_file(scratch_ / "tokens.json", "[\"a\\nb\"]");
  EXPECT_EQ(object_of(call(extend({"--tokens", (scratch_ / "tokens.json").string(), "--special", "--json"})))["tokens"][0]["text"], "a\nb");
}

TEST_F(CommandLine, PruneMakesAStudentAndTellsOfIt) {
  const std::string out = (scratch_ / "student").string();
  const std::string config = yaml("prune.yaml", "model: " + there("model") + "\noutput: " + out + "\nsizes: {hidden_size: 8, num_hidden_layers: 1}\ncalibration: {stores: [" + there("store") +
                                                    "]}\nevaluation:\n  stores: [{name: words, store: " + there("store") + "}]\n");
  const Outcome told = call({"prune", config});
  EXPECT_EQ(told.code, 0) << told.err;
  for (const char* shown : {"student: written", "parameters: ", "hidden_size: 16 -> 8", "num_hidden_layers: 2 -> 1", "layers kept: ", "words: bits per byte "}) EXPECT_NE(told.out.find(shown), std::string::npos) << told.out;
  const Json again = object_of(call({"prune", config, "--json"}));
  EXPECT_EQ(again["already_done"], true);
  EXPECT_EQ(again["shape"]["hidden_size"], 8);
  EXPECT_EQ(object_of(call({"score", "-m", out, "--text", "w7 w4 w5", "--json"}))["ids"], Json({7, 4, 5}));
  EXPECT_TRUE(refuses({"prune"}, 2, "prune: CONFIG is missing"));
  EXPECT_TRUE(refuses({"prune", config, "--set", "keep=2"}, 2, "keep"));
  EXPECT_TRUE(refuses({"prune", config, "--set", "shrink=[widht]"}, 2, "must be hidden, mlp, heads or depth"));
  EXPECT_TRUE(refuses({"prune", config, "--set", "sizes.hidden_size=12"}, 2, "exists and is another folder"));
  EXPECT_TRUE(refuses({"prune", config, "--set", "model=" + there("no-such")}, 3, "there is no such folder"));
  EXPECT_TRUE(refuses({"prune", config, "--set", "output=" + out + "2", "--set", "vocabulary.stores=[" + there("store") + "]"}, 2, "type WordLevel cannot be made smaller"));
}

TEST_F(CommandLine, ExportChecksWhatItIsAskedFor) {
  const std::string out = (scratch_ / "out.gguf").string();
  EXPECT_TRUE(refuses({"export", there("model")}, 2, "export: GGUF is missing"));
  EXPECT_TRUE(refuses({"export", there("model"), out, "--type", "q4_k"}, 2, "--type must be one of f32, f16, bf16, q8_0"));
  EXPECT_TRUE(refuses({"export", there("empty"), out}, 3, "config.json"));
  EXPECT_TRUE(refuses({"export", there("no-tokenizer"), out, "-t", "f32"}, 3, "holds no tokenizer.json"));
  EXPECT_TRUE(refuses({"export", there("model"), out, "-t", "f32"}, 3, "a tokenizer of type \"WordLevel\" is not exported; BPE is"));
  EXPECT_TRUE(refuses({"export", there("model"), there("notes.md")}, 2, "notes.md: exists already and is never overwritten"));
  EXPECT_TRUE(refuses({"export", there("model"), out, "--evaluate", there("foreign-store")}, 3, "made by another tokenizer"));
  EXPECT_TRUE(refuses({"export", there("model"), out, "--importance", there("words.txt")}, 3, "words.txt"));
  EXPECT_TRUE(refuses({"export", there("model"), out, "--write-importance", out}, 2, "--write-importance needs --calibration"));
  EXPECT_TRUE(refuses({"export", there("model"), out, "--base", there("other")}, 2, "--base goes with an adapter"));
  EXPECT_TRUE(refuses({"export", there("adapter"), out, "--base", there("model"), "--evaluate", there("store")}, 2, "--evaluate does not go with an adapter"));
  EXPECT_FALSE(fs::exists(out));
  const Json report = object_of(call({"export", there("adapter"), out, "--base", there("model"), "--json"}));
  EXPECT_EQ(report["type"], "f32");
  EXPECT_TRUE(fs::exists(out));
  EXPECT_TRUE(fs::exists(scratch_ / "README.md"));
}

TEST_F(CommandLine, ImportMistakes) {
  const std::string out = (scratch_ / "out").string();
  EXPECT_TRUE(refuses({"import", there("words.txt")}, 2, "import: FOLDER is missing"));
  EXPECT_TRUE(refuses({"import", there("nowhere.gguf"), out}, 3, "nowhere.gguf"));
  EXPECT_TRUE(refuses({"import", there("words.txt"), out}, 3, "words.txt"));
  EXPECT_TRUE(refuses({"import", there("words.txt"), out, "--weights", "q4"}, 2, "--weights must be one of f32, bf16, f16"));
  write_file(scratch_ / "x.gguf", "GGUF");
  EXPECT_TRUE(refuses({"import", (scratch_ / "x.gguf").string(), out}, 3, "x.gguf"));
  EXPECT_FALSE(fs::exists(out));
}

TEST_F(CommandLine, InspectTellsWhatThingsAre) {
  const Json model = object_of(call({"inspect", there("model"), "--json"}));
  EXPECT_EQ(model["kind"], "model");
  EXPECT_EQ(model["family"], "llama");
  EXPECT_EQ(model["licence"], "Apache-2.0");
  EXPECT_EQ(model["tokenizer"]["hash"], tiny_tokenizer_hash());
  const Json adapter = object_of(call({"inspect", there("adapter"), "--json"}));
  EXPECT_EQ(adapter["kind"], "adapter");
  EXPECT_EQ(adapter["lora"]["rank"], 2);
  const Json store = object_of(call({"inspect", there("store"), "--json"}));
  EXPECT_EQ(store["documents"], 4);
  EXPECT_EQ(store["trained_tokens"], 44);
  const Json weights = object_of(call({"inspect", there("model/model.safetensors"), "--json"}));
  EXPECT_EQ(weights["kind"], "safetensors");
  const Json config = object_of(call({"inspect", train_yaml(), "--json"}));
  EXPECT_EQ(config["of"], "train");
  EXPECT_EQ(config["config"]["data"]["row_length"], 16);
  const std::string prepare = yaml("p.yaml", "tokenizer: a\noutput: b\nsources: [{name: n, paths: [x]}]\n");
  EXPECT_EQ(object_of(call({"inspect", prepare, "--json"}))["of"], "prepare");
  distill::CacheConfig cache;
  cache.model = there("model");
  cache.stores = {{.store = there("store")}};
  cache.output = scratch_ / "cache";
  cache.compute_type = "f32";
  cache.threads = 1;
  const std::string cache_yaml = yaml("c.yaml", "model: " + cache.model.string() + "\noutput: " + cache.output.string() + "\nstores: [{store: " + there("store") + "}]\ncompute_type: f32\nthreads: 1\n");
  EXPECT_EQ(object_of(call({"inspect", cache_yaml, "--json"}))["of"], "distill --cache");
  EXPECT_EQ(object_of(call({"inspect", yaml("t.yaml", "model: a\noutput: b\nkeep: 0.5\nshrink: [depth]\n"), "--json"}))["of"], "prune");
  EXPECT_TRUE(refuses({"inspect", yaml("u.yaml", "model: a\noutput: b\nstores: [{store: c}]\nkin: top_k\n")}, 2, "it was read as the config of distill --cache"));
  const Json planned = object_of(call({"plan", cache_yaml, "--json"}));
  EXPECT_FALSE(fs::exists(cache.output)) << "plan wrote something";
  EXPECT_EQ(call({"plan", cache_yaml, "--no-probe"}).code, 0);
  const distill::CacheReport written = distill::write_cache(cache, [] { return false; });
  EXPECT_EQ(planned["tokens"], written.tokens);
  EXPECT_EQ(planned["documents"], written.totals.documents);
  EXPECT_GE(planned["disk"]["total"].get<std::uint64_t>(), written.totals.bytes);
  EXPECT_GT(planned["time"]["tokens_per_second"].get<double>(), 0);
  const Json cached = object_of(call({"inspect", cache.output.string(), "--json"}));
  EXPECT_EQ(cached["kind"], "teacher_cache");
  EXPECT_EQ(cached["rows"], 44);
  EXPECT_EQ(cached["signal"], "sampled");
  EXPECT_EQ(cached["teacher"]["licence"], "Apache-2.0");
  for (const std::string& path : {there("model"), there("adapter"), there("store"), cache.output.string(), there("model/model.safetensors"), train_yaml()}) EXPECT_EQ(call({"inspect", path}).code, 0) << path;
}

TEST_F(CommandLine, InspectMistakes) {
  EXPECT_TRUE(refuses({"inspect"}, 2, "inspect: PATH is missing"));
  EXPECT_TRUE(refuses({"inspect", there("nowhere")}, 3, "nowhere: there is no such file or folder"));
  EXPECT_TRUE(refuses({"inspect", there("empty")}, 3, "empty: none of the folders alambic knows"));
  EXPECT_TRUE(refuses({"inspect", there("notes.md")}, 3, "notes.md: a file of a kind alambic does not know"));
  EXPECT_TRUE(refuses({"inspect", "/dev/null"}, 3, "/dev/null: neither a regular file nor a folder"));
  EXPECT_TRUE(refuses({"inspect", yaml("bad.yaml", "model: m\noutput: o\nshedule: {}\ndata: {mixture: []}\n")}, 2, "bad.yaml:3:1: unknown key shedule; did you mean schedule?"));
  EXPECT_TRUE(refuses({"inspect", yaml("bad.yaml", "model: m\noutput: o\nshedule: {}\ndata: {mixture: []}\n")}, 2, "remedy: it was read as the config of train"));
  write_file(scratch_ / "x.gguf", "GGUF");
  EXPECT_TRUE(refuses({"inspect", (scratch_ / "x.gguf").string()}, 3, "x.gguf"));
  write_file(scratch_ / "x.safetensors", "short");
  EXPECT_TRUE(refuses({"inspect", (scratch_ / "x.safetensors").string()}, 3, "x.safetensors"));
}

TEST_F(CommandLine, DoctorReportsTheMachine) {
  const Outcome outcome = call({"doctor", "--json"});
  ASSERT_TRUE(outcome.code == 0 || outcome.code == 5) << outcome.err;
  const Json report = parse_json(outcome.out, "doctor");
  EXPECT_EQ(outcome.code == 0, report["missing"].empty()) << outcome.out;
  EXPECT_GT(report["matrix_product_gflops"]["f32"].get<double>(), 0);
  EXPECT_GT(report["memory"]["available"].get<std::uint64_t>(), 0u);
  EXPECT_TRUE(report["compute_type"] == "f32" || report["compute_type"] == "bf16");
  EXPECT_EQ(report["gpus"].empty(), report.contains("gpus_why_none")) << outcome.out;  // which there are, or why none
  EXPECT_EQ(call({"doctor"}).code, outcome.code);
}

// ---- completion and man --------------------------------------------------------------------------------------------

int shell(const std::string& command) {
  const int status = std::system(command.c_str());
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/// What bash offers when the cursor stands behind the last of these words, sorted.
std::string offered(const fs::path& script, const std::vector<std::string>& words) {
  const fs::path file = script.parent_path() / "offered";
  std::string command = "cd '" + script.parent_path().string() + "' && bash --norc -c 'source \"$0\"; COMP_WORDS=(\"$@\"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); "
                        "_alambic; printf \"%s\\n\" \"${COMPREPLY[@]}\" | LC_ALL=C sort | tr \"\\n\" \" \"' '" + script.string() + "'";
  for (const std::string& word : words) command += " '" + word + "'";
  EXPECT_EQ(shell(command + " > '" + file.string() + "'"), 0) << command;
  return read_file(file);
}

TEST_F(CommandLine, BashCompletesVerbsOptionsAndValues) {
  const Outcome outcome = call({"completion", "bash"});
  ASSERT_EQ(outcome.code, 0);
  const fs::path script = scratch_ / "alambic.bash";
  write_file(script, outcome.out);
  EXPECT_EQ(shell("bash -n '" + script.string() + "'"), 0);
  fs::create_directories(scratch_ / "weights");
  write_file(scratch_ / "wish.yaml", "");
  EXPECT_EQ(offered(script, {"alambic", "sc"}), "score ");
  EXPECT_EQ(offered(script, {"alambic", "--v"}), "--version ");
  EXPECT_EQ(offered(script, {"alambic", "score", "--mo"}), "--model ");
  EXPECT_EQ(offered(script, {"alambic", "score", "--compute", ""}), "auto bf16 f32 ");
  EXPECT_EQ(offered(script, {"alambic", "score", "--compute", "=", "b"}), "bf16 ");
  EXPECT_EQ(offered(script, {"alambic", "score", "--compute", "="}), "auto bf16 f32 ");
  EXPECT_EQ(offered(script, {"alambic", "score", "--model", "w"}), "weights ");
  EXPECT_EQ(offered(script, {"alambic", "score", "-m", "w"}), "weights ");
  EXPECT_EQ(offered(script, {"alambic", "train", "wi"}), "wish.yaml ");
  EXPECT_EQ(offered(script, {"alambic", "merge", "--base", "x", "--weights", "f32", "w"}), "weights ");
  EXPECT_EQ(offered(script, {"alambic", "completion", ""}), "bash ");
  EXPECT_EQ(offered(script, {"alambic", "help", "pre"}), "prepare ");
  EXPECT_EQ(offered(script, {"alambic", "score", "--text", "w"}), " ");
  for (const Verb& verb : verbs())
    for (const Option& option : verb.options) EXPECT_EQ(offered(script, {"alambic", verb.name, "--" + option.name}).find("--" + option.name), 0u) << verb.name;
  EXPECT_TRUE(refuses({"completion", "bsh"}, 2, "completion: SHELL must be one of bash, got bsh; did you mean bash?"));
  EXPECT_TRUE(refuses({"completion"}, 2, "completion: SHELL is missing"));
}

TEST_F(CommandLine, TheManualPageIsSoundRoffAndNamesEveryOption) {
  const Outcome outcome = call({"man"});
  ASSERT_EQ(outcome.code, 0);
  for (const Verb& verb : verbs())
    for (const Option& option : verb.options) {
      std::string label = label_of(option);
      for (std::size_t i = 0; (i = label.find('-', i)) != label.npos; i += 2) label.replace(i, 1, "\\-");
      EXPECT_NE(outcome.out.find(label), std::string::npos) << verb.name << " " << option.name;
    }
  if (shell("command -v groff > /dev/null") != 0) GTEST_SKIP() << "groff is not installed, so the page's roff cannot be checked";
  write_file(scratch_ / "alambic.1", outcome.out);
  const std::string page = (scratch_ / "alambic.1").string();
  EXPECT_EQ(shell("groff -man -Tascii -ww -z '" + page + "' 2> '" + page + ".warnings'"), 0);
  EXPECT_EQ(read_file(page + ".warnings"), "");
}

}  // namespace
}  // namespace alambic::cli
