// SPDX-License-Identifier: Apache-2.0
#include "data/prepare.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <system_error>

#include "core/files.h"
#include "data/loss_mask.h"
#include "tests/support.h"

namespace alambic::data {
namespace {

using testing::fails_with;
using testing::ScratchFolder;

std::filesystem::path golden(const std::string& name) { return std::filesystem::path(ALAMBIC_SOURCE_DIR) / "tests/golden/prepare" / name; }

void write(const std::filesystem::path& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

PrepareConfig config_of(const ScratchFolder& scratch, const std::string& input, const std::string& output = "store") {
  PrepareConfig config;
  config.tokenizer = golden("model");
  config.output = scratch / output;
  config.sources.emplace_back();
  config.sources[0].name = "it";
  config.sources[0].paths = {input};
  config.threads = 2;
  return config;
}

std::map<std::string, std::string> contents(const std::filesystem::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder))
    if (entry.is_regular_file()) files[std::filesystem::relative(entry.path(), folder)] = read_file(entry.path());
  return files;
}

// tests/oracle/prepare_oracle.py wrote what transformers makes of the same data.
void expect_documents(const std::filesystem::path& store_folder, const Json& expected) {
  const TokenStore store(store_folder);
  ASSERT_EQ(store.num_documents(), expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const Document document = store.read(i);
    EXPECT_EQ(Json(document.ids), expected[i]["ids"]) << i;
    EXPECT_EQ(Json(document.mask), expected[i]["mask"]) << i;
    if (expected[i].contains("bytes")) {
      EXPECT_EQ(document.num_bytes, expected[i]["bytes"]) << i;
    }
  }
}

std::string chat_line(int number, const std::string& answer = "jawaban") {
  return R"({"messages": [{"role": "user", "content": "soal )" + std::to_string(number) + R"("}, {"role": "assistant", "content": ")" + answer + " " + std::to_string(number) + "\"}]}\n";
}

// A process of its own that prepares. It may not be a forked child, since the text bridge has started threads by then: this
// program is started again and, before its first test, prepares what the variable names. An alarm ends it if it hangs.
constexpr const char* kConfigVariable = "ALAMBIC_TEST_PREPARE";

class PrepareProcess : public ::testing::Environment {
  void SetUp() override {
    const char* config = std::getenv(kConfigVariable);
    if (!config) return;
    ::alarm(60);
    try {
      prepare(read_config<PrepareConfig>(config));
    } catch (const std::exception& error) {
      std::cerr << error.what() << std::endl;
      ::_exit(1);
    }
    ::_exit(0);
  }
};
[[maybe_unused]] const auto* const kPrepareProcess = ::testing::AddGlobalTestEnvironment(new PrepareProcess);

pid_t start_prepare(const PrepareConfig& config, const std::filesystem::path& file) {
  write(file, resolved_config(config).dump());
  std::string program = "data_tests", variable = kConfigVariable + ("=" + file.string());
  std::vector<char*> arguments = {program.data(), nullptr}, variables;
  for (char** one = environ; *one; ++one) variables.push_back(*one);
  variables.insert(variables.end(), {variable.data(), nullptr});
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);  // gtest's first lines
  pid_t process = 0;
  const int problem = ::posix_spawn(&process, "/proc/self/exe", &actions, nullptr, arguments.data(), variables.data());
  posix_spawn_file_actions_destroy(&actions);
  if (problem != 0) throw std::system_error(problem, std::generic_category(), "posix_spawn");
  return process;
}

TEST(Prepare, MasksConversationsAsTransformersDoes) {
  const Json expected = read_json_file(golden("expected.json"));
  const ScratchFolder scratch;
  // Without {% generation %} blocks the spans are found by rendering beginnings; with them they are taken as they are.
  for (const std::string input : {"chats.jsonl", "chats.parquet"})
    for (const bool marked : {false, true}) {
      PrepareConfig config = config_of(scratch, golden(input), input + (marked ? "marked" : ""));
      if (marked) config.chat_template = golden("marked.jinja");
      const PrepareReport report = prepare(config);
      EXPECT_EQ(report.sources[0].format, "messages");
      EXPECT_TRUE(report.sources[0].stop_token_included);
      EXPECT_EQ(report.sources[0].roles.at("user").trained_tokens, 0u);
      EXPECT_GT(report.sources[0].roles.at("assistant").trained_tokens, 10u);
      expect_documents(config.output, expected["chats"]);
    }
}

TEST(Prepare, TokenisesTextAsTransformersDoes) {
  const Json expected = read_json_file(golden("expected.json"));
  const ScratchFolder scratch;
  for (const std::string model : {"model", "model_begin"}) {
    PrepareConfig config = config_of(scratch, golden("texts.parquet"), model);
    config.tokenizer = golden(model);
    config.sources[0].columns = {{"text", "body"}};
    const PrepareReport report = prepare(config);
    EXPECT_EQ(report.sources[0].ignored_columns, std::vector<std::string>{"id"});
    expect_documents(config.output, expected[model == "model" ? "texts" : "texts_begin"]);
  }
}

TEST(Prepare, ShowsASampleWithItsMask) {
  const ScratchFolder scratch;
  write(scratch / "a.jsonl", chat_line(1));
  const std::string text = describe(prepare(config_of(scratch, scratch / "a.jsonl")));
  EXPECT_NE(text.find("<|im_start|>assistant\n    [[jawaban 1<|im_end|>]]"), std::string::npos) << text;
  EXPECT_NE(text.find("format messages, 1 file"), std::string::npos) << text;
  EXPECT_NE(text.find("stop token included: yes"), std::string::npos) << text;
}

TEST(Prepare, CountsEachByteOnce) {
  const ScratchFolder scratch;
  const std::string text = "ꦱꦸꦒꦼꦁ  ꦫꦮꦸꦃ 👩‍👩‍👧 na\u00efve\t\n\n  x\n";
  write(scratch / "a.txt", text);
  PrepareConfig config = config_of(scratch, scratch / "a.txt");
  config.begin_token = "always";
  prepare(config);
  EXPECT_EQ(TokenStore(config.output).totals().bytes, text.size());  // the begin token stands before all of them
}

TEST(Prepare, CutsLongFilesIntoDocuments) {
  const ScratchFolder scratch;
  std::string text;
  for (int i = 0; i < 100; ++i) text += "Alinea " + std::to_string(i) + " dari buku.\n\n";
  write(scratch / "book.md", text);
  PrepareConfig config = config_of(scratch, scratch / "book.md");
  config.document_bytes = 200;
  config.holdout_every = 5;
  const PrepareReport report = prepare(config);
  EXPECT_EQ(report.sources[0].format, "markdown");
  const TokenStore store(config.output), holdout(scratch / "store-holdout");
  EXPECT_EQ(holdout.num_documents(), (store.num_documents() + holdout.num_documents()) / 5);
  // Only the end of the file ends with the end token.
  const Tokenizer tokenizer = Tokenizer::from_file(golden("model"));
  int ended = 0;
  for (const TokenStore* one : {&store, &holdout})
    for (std::uint64_t i = 0; i < one->num_documents(); ++i) ended += one->read(i).ids.back() == *tokenizer.id_of("<|endoftext|>");
  EXPECT_EQ(ended, 1);
}

TEST(Prepare, PartsCoverEveryDocumentOnce) {
  const ScratchFolder scratch;
  std::string lines;
  for (int i = 0; i < 500; ++i) lines += chat_line(i);
  write(scratch / "a.jsonl", lines);
  PrepareConfig config = config_of(scratch, scratch / "a.jsonl", "whole");
  prepare(config);
  std::multiset<std::vector<std::uint32_t>> whole, parts;
  const TokenStore one(config.output);
  for (std::uint64_t i = 0; i < one.num_documents(); ++i) whole.insert(one.read(i).ids);
  config.output = scratch / "parts";
  for (const char* part : {"2/3", "0/3", "1/3"}) {
    config.shard = part;
    prepare(config);
  }
  const TokenStore three(config.output);
  for (std::uint64_t i = 0; i < three.num_documents(); ++i) parts.insert(three.read(i).ids);
  EXPECT_EQ(whole.size(), 500u);
  EXPECT_TRUE(whole == parts);
}

TEST(Prepare, PartsByTwoProcessesAtOnce) {
  const ScratchFolder scratch;
  std::string lines;
  for (int i = 0; i < 400; ++i) lines += chat_line(i);
  write(scratch / "a.jsonl", lines);
  PrepareConfig config = config_of(scratch, scratch / "a.jsonl", "one_by_one");
  config.tokens_per_shard = 1000;
  for (const char* part : {"0/2", "1/2"}) {
    config.shard = part;
    prepare(config);
  }
  const auto wanted = contents(config.output);
  ASSERT_GT(wanted.size(), 4u);
  config.output = scratch / "at_once";
  std::vector<pid_t> processes;
  for (const char* part : {"0/2", "1/2"}) {
    config.shard = part;
    processes.push_back(start_prepare(config, scratch / ("config" + std::to_string(processes.size()))));
  }
  for (const pid_t process : processes) {
    int status = 0;
    ASSERT_EQ(::waitpid(process, &status, 0), process);
    EXPECT_EQ(status, 0);
  }
  EXPECT_EQ(TokenStore(config.output).num_documents(), 400u);
  EXPECT_TRUE(contents(config.output) == wanted);
}

TEST(Prepare, GoesOnAfterAKillWithTheSameBytes) {
  constexpr std::size_t kKills = 3;
  const ScratchFolder scratch;
  std::string lines;
  for (int i = 0; i < 1200; ++i) lines += i % 100 == 7 ? std::string("{broken\n") : chat_line(i);
  write(scratch / "a.jsonl", lines);
  PrepareConfig config = config_of(scratch, scratch / "a.jsonl", "whole");
  config.tokens_per_shard = 2000;
  config.max_bad = 100;
  config.holdout_every = 9;
  config.holdout_output = scratch / "whole-holdout";
  const PrepareReport whole = prepare(config);
  EXPECT_EQ(whole.rejected_records, 12u);
  EXPECT_EQ(whole.this_run.documents, whole.totals.documents + whole.holdout.documents);
  const auto wanted = contents(config.output), wanted_holdout = contents(config.holdout_output);
  ASSERT_GT(wanted.size(), 2 * kKills);
  config.output = scratch / "killed";
  config.holdout_output = scratch / "killed-holdout";
  const auto num_shards = [&] {
    std::size_t count = 0;
    std::error_code ignored;
    for (const auto& entry : std::filesystem::directory_iterator(config.output, ignored)) count += entry.path().extension() == ".h5";
    return count;
  };
  std::size_t kills = 0;
  for (; kills < kKills; ++kills) {
    const std::size_t shards_before = num_shards();
    const pid_t process = start_prepare(config, scratch / "config");
    // Killed as soon as another shard is there: somewhere in the middle of the next.
    int status = 0;
    while (::waitpid(process, &status, WNOHANG) == 0) {
      if (num_shards() > shards_before) {
        ::kill(process, SIGKILL);
        ::waitpid(process, &status, 0);
        break;
      }
      ::usleep(200);
    }
    ASSERT_TRUE(WIFSIGNALED(status) || WEXITSTATUS(status) == 0);
    if (!WIFSIGNALED(status)) break;  // at its end before the signal came
    ASSERT_EQ(WTERMSIG(status), SIGKILL);
  }
  EXPECT_GT(kills, 0u);
  const PrepareReport again = prepare(config);  // the rest
  EXPECT_EQ(again.totals.documents, whole.totals.documents);
  EXPECT_LT(again.this_run.documents, whole.this_run.documents);
  EXPECT_TRUE(contents(config.output) == wanted);
  EXPECT_TRUE(contents(config.holdout_output) == wanted_holdout);
}

TEST(Prepare, SetsBadRecordsAside) {
  const ScratchFolder scratch;
  write(scratch / "a.jsonl", chat_line(1) + "{\"messages\": []}\n" + "{\"messages\": \"\\ud800\"}\n" + chat_line(2) + "not json\n");
  PrepareConfig config = config_of(scratch, scratch / "a.jsonl");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "a.jsonl:2: an empty conversation", [&] { prepare(config); }));
  EXPECT_FALSE(std::filesystem::exists(config.output));
  config.max_bad = 2;
  EXPECT_TRUE(fails_with(ErrorKind::kData, "a.jsonl:5: ", [&] { prepare(config); }));
  config.max_bad = 3;
  const PrepareReport report = prepare(config);
  EXPECT_EQ(report.rejected_records, 3u);
  EXPECT_EQ(report.totals.documents, 2u);
  const std::string rejects = read_file(report.rejects);
  EXPECT_NE(rejects.find("\"line\":3,\"reason\":"), std::string::npos) << rejects;
  EXPECT_NE(rejects.find("surrogate"), std::string::npos) << rejects;
}

TEST(Prepare, AuditsBeforeItWrites) {
  const ScratchFolder scratch;
  write(scratch / "user.jsonl", R"({"messages": [{"role": "user", "content": "saja"}]})");
  PrepareConfig config = config_of(scratch, scratch / "user.jsonl");
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "no token would be trained", [&] { prepare(config); }));
  EXPECT_FALSE(std::filesystem::exists(config.output));
  config.allow_none_trained = true;
  EXPECT_EQ(prepare(config).totals.trained_tokens, 0u);

  write(scratch / "all.jsonl", R"({"prompt": "", "completion": "semua"})");
  config = config_of(scratch, scratch / "all.jsonl", "all");
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "every token would be trained", [&] { prepare(config); }));
  EXPECT_FALSE(std::filesystem::exists(config.output));
  config.allow_all_trained = true;
  EXPECT_GT(prepare(config).totals.trained_tokens, 0u);

  write(scratch / "pairs.jsonl", R"({"prompt": "p", "chosen": "baik", "rejected": "buruk"})");
  config = config_of(scratch, scratch / "pairs.jsonl", "pairs");
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "preference: chosen", [&] { prepare(config); }));
  config.sources[0].preference = "chosen";
  EXPECT_EQ(prepare(config).sources[0].format, "preference");
}

TEST(Prepare, SaysWhatIsWrongWithSettings) {
  const ScratchFolder scratch;
  write(scratch / "a.txt", "halo\n");
  write(scratch / "a.jsonl", chat_line(1));
  const auto refused = [&](ErrorKind kind, const std::string& words, const std::function<void(PrepareConfig&)>& change) {
    PrepareConfig config = config_of(scratch, scratch / "a.txt");
    change(config);
    return fails_with(kind, words, [&] { prepare(config); });
  };
  EXPECT_TRUE(refused(ErrorKind::kUsage, "shard: must be i/n", [](auto& config) { config.shard = "2/2"; }));
  EXPECT_TRUE(refused(ErrorKind::kUsage, "did you mean \"assistant\"", [](auto& config) { config.train_on = {"asistant"}; }));
  EXPECT_TRUE(refused(ErrorKind::kUsage, "is given twice", [](auto& config) { config.sources.push_back(config.sources[0]); }));
  EXPECT_TRUE(refused(ErrorKind::kUsage, "no paths", [](auto& config) { config.sources[0].paths.clear(); }));
  EXPECT_TRUE(refused(ErrorKind::kUsage, "sources: there is none", [](auto& config) { config.sources.clear(); }));
  EXPECT_TRUE(refused(ErrorKind::kUsage, "mixes plain text and records", [&](auto& config) { config.sources[0].paths.push_back(scratch / "a.jsonl"); }));
  EXPECT_TRUE(refused(ErrorKind::kUsage, "is plain text", [](auto& config) { config.sources[0].format = "messages"; }));
  EXPECT_TRUE(refused(ErrorKind::kUsage, "holdout_every", [](auto& config) { config.holdout_every = 1; }));
  EXPECT_TRUE(refused(ErrorKind::kData, "tokenizer", [&](auto& config) { config.tokenizer = scratch / "nothing"; }));
  EXPECT_TRUE(refused(ErrorKind::kUsage, "no such file", [](auto& config) { config.sources[0].paths = {"/nowhere/*.txt"}; }));
  // A tokenizer alone: no chat template, no end token.
  std::filesystem::create_directories(scratch / "bare");
  std::filesystem::copy(golden("model/tokenizer.json"), scratch / "bare/tokenizer.json");
  EXPECT_TRUE(refused(ErrorKind::kUsage, "end_token: false", [&](auto& config) { config.tokenizer = scratch / "bare"; }));
  EXPECT_TRUE(refused(ErrorKind::kUsage, "need a chat template", [&](auto& config) {
    config.tokenizer = scratch / "bare";
    config.end_token = false;
    config.sources[0].paths = {scratch / "a.jsonl"};
  }));
  // The same folder with other inputs.
  prepare(config_of(scratch, scratch / "a.txt"));
  write(scratch / "a.txt", "lain\n");
  EXPECT_TRUE(refused(ErrorKind::kUsage, "other settings or inputs: recipe.inputs[0].files[0].sha256", [](auto&) {}));
}

TEST(LossMask, RefusesTemplatesThatRewriteEarlierTurns) {
  // The answers stand reversed, so neither a beginning nor the answer itself is found.
  const ChatTemplate chat{.source = "{{ messages | length }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}", .name = "odd.jinja", .special_tokens = Json::object()};
  Example example;
  example.messages = parse_json(R"([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])", "test");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "f:1: message 2 (assistant): odd.jinja writes earlier messages differently", [&] { render_example(example, chat, {"assistant"}, false, "f:1"); }));
}

TEST(LossMask, FindsAnswersOfTemplatesThatDropReasoning) {
  // As Qwen3 does: the last answer alone is preceded by an empty block of thoughts, so [q a] is no beginning of [q a q a].
  const ChatTemplate chat{
      .source = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ message['content'] }}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
      .name = "thinking.jinja",
      .special_tokens = Json::object()};
  Example example;
  example.messages = parse_json(R"([{"role": "user", "content": "q"}, {"role": "assistant", "content": "satu"}, {"role": "user", "content": "r"}, {"role": "assistant", "content": "dua"}])", "test");
  const ExampleEncoder encoder(golden("model"), chat, {});
  const EncodedExample encoded = encoder.encode(example, true, false, "f:1");
  std::string trained;
  std::uint32_t from = 0;
  for (std::size_t i = 0; i < encoded.end_byte.size(); ++i) {
    if (encoded.document.mask[i]) trained += encoded.text.substr(from, encoded.end_byte[i] - from);
    from = encoded.end_byte[i];
  }
  EXPECT_EQ(trained, "satu<|im_end|><think></think>dua<|im_end|>");
  EXPECT_TRUE(encoded.all_answers_stop);
  EXPECT_EQ(encoded.document.num_bytes, trained.size());
}

TEST(LossMask, TheShortWayForTextIsTheLongWay) {
  std::string text = "Selamat datang ";
  while (text.size() < 3000) text += "ke 日本 naïve 👋🏽 Debian.\n\n  ";
  for (const std::string begin : {"auto", "always", "never"})
    for (const std::string model : {"model", "model_begin"})
      for (const bool ends : {false, true})
        for (const std::string start : {"", "日本", " ", "\n\n", "👋"}) {
          const ExampleEncoder encoder(golden(model), std::nullopt, {.begin_token = begin});
          Example example;
          example.text = start + text;
          const EncodedExample quick = encoder.encode(example, ends, false, "f:1"), slow = encoder.encode(example, ends, true, "f:1");
          EXPECT_TRUE(quick.end_byte.empty() && !slow.end_byte.empty());
          EXPECT_EQ(quick.document.ids, slow.document.ids);
          EXPECT_EQ(quick.document.mask, slow.document.mask);
          EXPECT_EQ(quick.document.num_bytes, slow.document.num_bytes) << begin << " " << model << " " << start;
          EXPECT_EQ(quick.document.num_words, slow.document.num_words);
        }
}

std::string trained_text(const EncodedExample& encoded) {
  std::string trained;
  std::uint32_t from = 0;
  for (std::size_t i = 0; i < encoded.end_byte.size(); ++i) {
    if (encoded.document.mask[i]) trained += encoded.text.substr(from, encoded.end_byte[i] - from);
    from = encoded.end_byte[i];
  }
  return trained;
}

TEST(LossMask, TrainsContentAndEndOfTheRolesAskedFor) {
  // As SmolLM2 does: a conversation without a system message gets one from the template.
  const ChatTemplate chat{
      .source = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBantu.<|im_end|>\n' }}{% endif %}"
                "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
      .name = "smol.jinja",
      .special_tokens = Json::object()};
  using Roles = std::set<std::string>;
  const auto trained = [&](const Roles& train_on, const std::string& messages) {
    const ExampleEncoder encoder(golden("model"), chat, {.train_on = train_on});
    Example example;
    example.messages = parse_json(messages, "test");
    const EncodedExample encoded = encoder.encode(example, true, true, "f:1");
    EXPECT_EQ(encoded.document.num_bytes, trained_text(encoded).size());
    EXPECT_TRUE(encoded.all_answers_stop);
    EXPECT_EQ(encoded.roles.back().second, encoded.text.size());
    return trained_text(encoded);
  };
  const std::string talk = R"([{"role": "user", "content": "user"}, {"role": "assistant", "content": "abc"}, {"role": "user", "content": "  awan"}])";
  EXPECT_EQ(trained({"user"}, talk), "user<|im_end|>  awan<|im_end|>");
  EXPECT_EQ(trained({"user", "assistant"}, talk), "user<|im_end|>abc<|im_end|>  awan<|im_end|>");
  EXPECT_EQ(trained({"assistant"}, talk), "abc<|im_end|>");
  EXPECT_EQ(trained({"assistant"}, R"([{"role": "assistant", "content": "Halo"}])"), "Halo<|im_end|>");
  EXPECT_EQ(trained({"system"}, R"([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}])"), "s<|im_end|>");

  Example example;
  example.messages = parse_json(talk, "test");
  const RenderedExample rendered = render_example(example, chat, {"user"}, true, "f:1");
  const std::string inserted = "<|im_start|>system\nBantu.<|im_end|>\n<|im_start|>user\n";
  ASSERT_EQ(rendered.roles.size(), 6u);
  EXPECT_EQ(rendered.roles[0], (std::pair<std::string, std::size_t>("template", inserted.size())));
  EXPECT_EQ(rendered.roles[1], (std::pair<std::string, std::size_t>("user", inserted.size() + std::string("user<|im_end|>\n").size())));
}

}  // namespace
}  // namespace alambic::data
