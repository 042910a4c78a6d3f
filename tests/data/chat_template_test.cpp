// SPDX-License-Identifier: Apache-2.0
#include "data/chat_template.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>

#include "core/files.h"
#include "core/log.h"
#include "tests/golden.h"
#include "tests/support.h"

namespace alambic::data {
namespace {

using ::alambic::testing::fails_with;
using ::alambic::testing::golden_path;
using ::alambic::testing::ScratchFolder;

ChatTemplate of(std::string source) { return {std::move(source), "test.jinja", Json::object()}; }

Json conversation(const char* content = "hello") { return Json::array({{{"role", "user"}, {"content", content}}}); }

// The table of tests/oracle/chat_template_oracle.py: what transformers rendered, with spans of bytes, or refused.
void expect_table(const Json& table) {
  SCOPED_TRACE(to_line(table["script"]) + " " + to_line(table["versions"]));
  std::size_t wrong = 0, refused = 0, spans = 0;
  for (const Json& one : table["cases"]) {
    const auto name = one["template"].get<std::string>();
    const Json& chat = table["conversations"][one["conversation"].get<std::string>()];
    Json extra = table["extra"];
    extra.update(chat["extra"]);
    const ChatTemplate chat_template{table["templates"][name].get<std::string>(), name, table["special_tokens"]};
    const auto render = [&] { return chat_template.render(chat["messages"], chat["tools"], one["prompt"].get<bool>(), extra); };
    if (one.contains("refused")) {
      ++refused;
      EXPECT_TRUE(fails_with(ErrorKind::kData, name + ": line ", render)) << one["conversation"] << " " << one["refused"];
      continue;
    }
    const RenderedChat rendered = render();
    std::vector<std::pair<std::size_t, std::size_t>> expected;
    for (const Json& span : one["spans"]) expected.emplace_back(span[0].get<std::size_t>(), span[1].get<std::size_t>());
    spans += expected.size();
    if (rendered.text == one["text"].get<std::string>() && rendered.generation_bytes == expected) continue;
    if (++wrong <= 3)
      ADD_FAILURE() << name << ", " << one["conversation"] << ":\n" << Json(rendered.text) << "\nexpected\n" << one["text"] << "\nspans "
                    << Json(rendered.generation_bytes) << ", expected " << one["spans"];
  }
  EXPECT_EQ(wrong, 0u) << "of " << table["cases"].size() << " cases, " << refused << " refused, " << spans << " spans";
}

TEST(ChatTemplate, RendersAsTransformersDoes) {
  const Json table = read_json_file(golden_path("chat_templates.json"));
  ASSERT_GE(table["templates"].size(), 30u);
  ASSERT_GT(table["cases"].size(), 200u);
  expect_table(table);
}

TEST(ChatTemplateOracle, RendersTheRealModelsTemplate) {
  const char* input = std::getenv("ALAMBIC_ORACLE_INPUT");
  if (!input) GTEST_SKIP() << "run by tests/oracle/chat_template_oracle.py";
  expect_table(read_json_file(input));
}

TEST(ChatTemplate, GenerationSpansAreBytes) {
  const auto rendered = of("é{% generation %}ü{% endgeneration %}!{% generation %}{% endgeneration %}{% generation %}a{% generation %}b{% endgeneration %}c{% endgeneration %}")
                            .render(conversation(), nullptr, false);
  EXPECT_EQ(rendered.text, "éü!abc");
  const std::vector<std::pair<std::size_t, std::size_t>> expected = {{2, 4}, {5, 5}, {5, 8}, {6, 7}};
  EXPECT_EQ(rendered.generation_bytes, expected);
}

TEST(ChatTemplate, GenerationInAMacroIsFound) {
  const auto rendered = of("{% macro say(m) %}[{% generation %}{{ m.content }}{% endgeneration %}]{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}")
                            .render(conversation(), nullptr, false);
  EXPECT_EQ(rendered.text, "[hello]");
  ASSERT_EQ(rendered.generation_bytes.size(), 1u);
  EXPECT_EQ(rendered.generation_bytes[0], (std::pair<std::size_t, std::size_t>{1, 6}));
}

TEST(ChatTemplate, GenerationThatIsChangedAfterwardsIsRefused) {
  const auto chat_template = of("{% set x %}{% generation %} a {% endgeneration %}{% endset %}{{ x | trim }}");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "changes the text of its generation blocks", [&] { (void)chat_template.render(conversation(), nullptr, false); }));
}

TEST(ChatTemplate, MarksInTheTextAreRefusedNotMistaken) {
  const auto chat_template = of("{% generation %}{{ messages[0].content }}{% endgeneration %}");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "generation", [&] { (void)chat_template.render(conversation("a\U0010FFFEb"), nullptr, false); }));
  EXPECT_EQ(of("{{ messages[0].content }}").render(conversation("a\U0010FFFEb"), nullptr, false).text, "a\U0010FFFEb");
}

TEST(ChatTemplate, TheClockIsRead) {
  const auto now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  char year[8];
  ASSERT_GT(std::strftime(year, sizeof year, "%Y", std::localtime(&now)), 0u);
  EXPECT_EQ(of("{{ strftime_now('%Y') }}").render(conversation(), nullptr, false).text, year);
}

// ---- damage ----

TEST(ChatTemplateDamage, WhatTheTemplateRaisesIsSaidWithItsLine) {
  const auto chat_template = of("one\ntwo\n{{ raise_exception('roles must alternate') }}");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "test.jinja: line 3: the template refuses: roles must alternate", [&] { (void)chat_template.render(conversation(), nullptr, false); }));
}

TEST(ChatTemplateDamage, MistakesAreSaidWithTheirLine) {
  EXPECT_TRUE(fails_with(ErrorKind::kData, "line 2: syntax error", [] { (void)of("a\n{% if %}").render(conversation(), nullptr, false); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "line 3: ", [] { (void)of("a\n\n{{ nothing.at_all }}").render(conversation(), nullptr, false); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "line 1: ", [] { (void)of("{% generation %}").render(conversation(), nullptr, false); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "line 1: ", [] { (void)of("{{ messages[0].content.nonsense() }}").render(conversation(), nullptr, false); }));
}

TEST(ChatTemplateDamage, AnEndlessTemplateEnds) {
  const auto start = std::chrono::steady_clock::now();
  const auto chat_template = of("{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "steps", [&] { (void)chat_template.render(conversation(), nullptr, false); }));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(30));
}

TEST(ChatTemplateDamage, EndlessRecursionEnds) {
  const auto chat_template = of("{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "recursion limit", [&] { (void)chat_template.render(conversation(), nullptr, false); }));
}

TEST(ChatTemplateDamage, HugeOutputIsCut) {
  const auto chat_template = of("{% for a in range(99999) %}{{ 'x' * 100000 }}{% endfor %}");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "renders more than 67108864 bytes", [&] { (void)chat_template.render(conversation(), nullptr, false); }));
}

TEST(ChatTemplateDamage, TextThatDoublesIsCut) {
  std::string source = "{% set x = 'xxxxxxxxxxxxxxxx' %}";
  for (int i = 0; i < 60; ++i) source += "{% set x = x ~ x %}";
  EXPECT_TRUE(fails_with(ErrorKind::kData, "memory", [&] { (void)of(source + "{{ x }}").render(conversation(), nullptr, false); }));
}

TEST(ChatTemplateDamage, JsonThatDoublesIsCut) {
  std::string source = "{{ '\"' ";
  for (int i = 0; i < 200; ++i) source += "|tojson";
  EXPECT_TRUE(fails_with(ErrorKind::kData, "tojson: makes more than 16 MiB of text", [&] { (void)of(source + " }}").render(conversation(), nullptr, false); }));
}

TEST(ChatTemplateDamage, DeepNestingIsRefused) {
  std::string source = "{{ ";
  for (int i = 0; i < 100'000; ++i) source += "(";
  EXPECT_TRUE(fails_with(ErrorKind::kData, "line 1", [&] { (void)of(source).render(conversation(), nullptr, false); }));
}

TEST(ChatTemplateDamage, InvalidUtf8IsRefused) {
  EXPECT_TRUE(fails_with(ErrorKind::kData, "not UTF-8 at byte 1", [] { (void)of("a\xff").render(conversation(), nullptr, false); }));
}

TEST(ChatTemplateDamage, MessagesOfAnotherShapeAreRefused) {
  EXPECT_TRUE(fails_with(ErrorKind::kData, "not a list but object", [] { (void)of("x").render(Json::object(), nullptr, false); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "message 1 is not an object", [] { (void)of("x").render(Json::array({"hi"}), nullptr, false); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "not an object but string", [] { (void)of("x").render(conversation(), nullptr, false, "y"); }));
}

TEST(ChatTemplateDamage, NothingOutsideIsReached) {
  const ScratchFolder scratch;
  write_file(scratch / "secret.txt", "secret");
  for (const std::string& source : {"{% include '" + (scratch / "secret.txt").string() + "' %}", std::string("{% extends '/etc/passwd' %}"),
                                    std::string("{{ ''.__class__.__mro__ }}"), std::string("{% import '/etc/passwd' as x %}")})
    EXPECT_TRUE(fails_with(ErrorKind::kData, "line 1", [&] { (void)of(source).render(conversation(), nullptr, false); })) << source;
}

// ---- a model's folder ----

TEST(ReadChatTemplate, JinjaFileComesFirst) {
  const ScratchFolder scratch;
  write_file(scratch / "tokenizer_config.json", R"({"chat_template": "old", "bos_token": {"content": "<b>", "lstrip": false}, "eos_token": "</s>", "unk_token": null, "model_max_length": 5})");
  write_file(scratch / "special_tokens_map.json", R"({"eos_token": "</older>", "pad_token": {"content": "<pad>"}, "additional_special_tokens": ["<x>"]})");
  auto found = read_chat_template(scratch.path());
  ASSERT_TRUE(found);
  EXPECT_EQ(found->source, "old");
  EXPECT_EQ(found->special_tokens, Json::parse(R"({"eos_token": "</s>", "pad_token": "<pad>", "bos_token": "<b>"})"));
  write_file(scratch / "chat_template.jinja", "{{ bos_token }}new{{ pad_token }}");
  found = read_chat_template(scratch.path());
  ASSERT_TRUE(found);
  EXPECT_EQ(found->render(conversation(), nullptr, false).text, "<b>new<pad>");
}

TEST(ReadChatTemplate, AListNamesADefault) {
  const ScratchFolder scratch;
  std::string said;
  const LogSink before = set_log_sink([&](LogLevel, std::string_view line) { said += std::string(line) + "\n"; });
  write_file(scratch / "tokenizer_config.json", R"({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]})");
  const auto found = read_chat_template(scratch.path());
  write_file(scratch / "chat_template.jinja", "j");
  std::filesystem::create_directories(scratch / "additional_chat_templates");
  write_file(scratch / "additional_chat_templates" / "rag.jinja", "r");
  const auto with_more = read_chat_template(scratch.path());
  set_log_sink(before);
  ASSERT_TRUE(found && with_more);
  EXPECT_EQ(found->source, "d");
  EXPECT_EQ(with_more->source, "j");
  EXPECT_NE(said.find("tool_use"), std::string::npos);
  EXPECT_NE(said.find("rag.jinja"), std::string::npos);
}

TEST(ReadChatTemplate, NoneIsNoError) {
  const ScratchFolder scratch;
  EXPECT_FALSE(read_chat_template(scratch.path()));
  write_file(scratch / "tokenizer_config.json", R"({"bos_token": "<s>"})");
  EXPECT_FALSE(read_chat_template(scratch.path()));
}

TEST(ReadChatTemplate, OddFilesAreRefused) {
  const ScratchFolder scratch;
  const auto refuses = [&](const char* config, const char* words) {
    write_file(scratch / "tokenizer_config.json", config);
    return fails_with(ErrorKind::kData, words, [&] { (void)read_chat_template(scratch.path()); });
  };
  EXPECT_TRUE(refuses("[]", "not an object"));
  EXPECT_TRUE(refuses(R"({"chat_template": 5})", "neither text nor a list"));
  EXPECT_TRUE(refuses(R"({"chat_template": [{"name": "rag", "template": "x"}]})", "no \"default\""));
  EXPECT_TRUE(refuses(R"({"chat_template": [{"name": "default"}]})", "template"));
  EXPECT_TRUE(refuses(R"({"chat_template": "x", "bos_token": 5})", "bos_token"));
}

}  // namespace
}  // namespace alambic::data
