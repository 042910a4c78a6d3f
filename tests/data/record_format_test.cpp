// SPDX-License-Identifier: Apache-2.0
#include "data/record_format.h"

#include <gtest/gtest.h>

#include "tests/support.h"

namespace alambic::data {
namespace {

using testing::fails_with;

Json parsed(const std::string& text) { return parse_json(text, "a test"); }

RecordFormat detected(const std::string& record, const std::map<std::string, std::string>& columns = {}) { return detect_format({parsed(record)}, columns, "here"); }

Example read(const std::string& record, const std::map<std::string, std::string>& columns = {}) { return read_example(parsed(record), detected(record, columns), columns, "f:1"); }

TEST(RecordFormat, IsToldFromTheColumns) {
  EXPECT_EQ(detected(R"({"text": "a", "url": "b"})"), RecordFormat::kText);
  EXPECT_EQ(detected(R"({"messages": [], "prompt": "x", "text": null})"), RecordFormat::kMessages);
  EXPECT_EQ(detected(R"({"conversations": []})"), RecordFormat::kShareGpt);
  EXPECT_EQ(detected(R"({"instruction": "a", "input": "", "output": "b"})"), RecordFormat::kAlpaca);
  EXPECT_EQ(detected(R"({"prompt": "a", "completion": "b"})"), RecordFormat::kCompletion);
  EXPECT_EQ(detected(R"({"prompt": "a", "chosen": "b", "rejected": "c"})"), RecordFormat::kPreference);
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "fit several formats: text, messages", [] { detected(R"({"messages": [], "text": "a"})"); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "these columns: body, id", [] { detected(R"({"body": "a", "id": 1})"); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "no record", [] { detect_format({}, {}, "here"); }));
  // Records that disagree fit nothing.
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "no known format", [] { detect_format({parsed(R"({"text": "a"})"), parsed(R"({"messages": []})")}, {}, "here"); }));
}

TEST(RecordFormat, MapsColumns) {
  EXPECT_EQ(read(R"({"body": "b", "id": 1})", {{"text", "body"}}).text, "b");
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "no column \"boddy\"; the first record has body", [] { read(R"({"body": "b"})", {{"text", "boddy"}}); }));
  const Example chat = read(R"({"dialogue": [{"speaker": "user", "said": "q"}, {"speaker": "assistant", "said": "a"}]})", {{"messages", "dialogue"}, {"role", "speaker"}, {"content", "said"}});
  EXPECT_EQ(to_line(chat.messages), R"([{"role":"user","content":"q"},{"role":"assistant","content":"a"}])");
  EXPECT_EQ(unused_columns(parsed(R"({"body": "b", "id": 1, "text": "x"})"), RecordFormat::kText, {{"text", "body"}}), (std::vector<std::string>{"id", "text"}));
}

TEST(RecordFormat, BringsConversationsToOneShape) {
  const Example sharegpt = read(R"({"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {}}"},
    {"from": "observation", "value": "r"}, {"from": "gpt", "value": "a"}], "tools": "[{\"name\": \"f\"}]"})");
  EXPECT_EQ(to_line(sharegpt.messages),
            R"([{"role":"system","content":"s"},{"role":"user","content":"q"},{"role":"assistant","content":null,"tool_calls":[{"type":"function","function":{"name":"f","arguments":{}}}]},{"role":"tool","content":"r"},{"role":"assistant","content":"a"}])");
  EXPECT_EQ(to_line(sharegpt.tools), R"([{"name":"f"}])");
  const Example alpaca = read(R"({"instruction": "i", "input": "more", "output": "o", "system": "s", "history": [["q1", "a1"]]})");
  EXPECT_EQ(to_line(alpaca.messages),
            R"([{"role":"system","content":"s"},{"role":"user","content":"q1"},{"role":"assistant","content":"a1"},{"role":"user","content":"i\n\nmore"},{"role":"assistant","content":"o"}])");
  const Example parts = read(R"({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": null}, {"role": "assistant", "content": "c", "thinking": "t"}]})");
  EXPECT_EQ(to_line(parts.messages), R"([{"role":"user","content":"ab"},{"role":"assistant","content":"c","thinking":"t"}])");
}

TEST(RecordFormat, SeparatesPromptsFromAnswers) {
  const Example texts = read(R"({"prompt": "p ", "completion": "c"})");
  EXPECT_EQ(texts.text + "|" + texts.completion, "p |c");
  const Example lists = read(R"({"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "q2"}], "completion": [{"role": "assistant", "content": "a2"}]})");
  EXPECT_EQ(lists.messages.size(), 4u);
  EXPECT_EQ(lists.first_trained_message, 3u);
  const Example chosen = read(R"({"prompt": "q", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}], "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}]})");
  EXPECT_EQ(to_line(chosen.messages), R"([{"role":"user","content":"q"},{"role":"assistant","content":"good"}])");
  EXPECT_EQ(chosen.first_trained_message, 1u);
  const Example plain = read(R"({"prompt": "q", "chosen": "good", "rejected": "bad"})");
  EXPECT_EQ(plain.text + "|" + plain.completion, "q|good");
}

TEST(RecordFormat, RefusesWhatIsNoConversation) {
  const auto refused = [](const std::string& words, const std::string& messages) { return fails_with(ErrorKind::kData, words, [&] { read("{\"messages\": " + messages + "}"); }); };
  EXPECT_TRUE(refused("f:1: an empty conversation", "[]"));
  EXPECT_TRUE(refused("f:1: message 2 (assistant) is empty", R"([{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}])"));
  EXPECT_TRUE(refused("message 2 (system) stands behind", R"([{"role": "user", "content": "q"}, {"role": "system", "content": "s"}])"));
  EXPECT_TRUE(refused("message 2 (user) follows a user's", R"([{"role": "user", "content": "q"}, {"role": "user", "content": "q"}])"));
  EXPECT_TRUE(refused("message 3 (assistant) follows an assistant's", R"([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "a"}])"));
  EXPECT_TRUE(refused("message 2 (assistant) comes before any user's", R"([{"role": "system", "content": "q"}, {"role": "assistant", "content": "a"}])"));
  EXPECT_TRUE(refused("message 2 (tool) does not follow", R"([{"role": "user", "content": "q"}, {"role": "tool", "content": "a"}])"));
  EXPECT_TRUE(refused("message 1 (bot) has an unknown role", R"([{"role": "bot", "content": "q"}])"));
  EXPECT_TRUE(refused("message 1: \"content\" must be a string, got number", R"([{"role": "user", "content": 3}])"));
  EXPECT_TRUE(refused("another type than text", R"([{"role": "user", "content": [{"type": "image", "url": "x"}]}])"));
  EXPECT_TRUE(refused("message 1: the column \"role\" is missing", R"([{"content": "q"}])"));
  EXPECT_TRUE(refused("message 1 (user) has no content", R"([{"role": "user"}])"));
  EXPECT_TRUE(refused("message 1: must be an object", R"(["q"])"));
  EXPECT_TRUE(refused("must be a list", R"({"role": "user"})"));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "unknown speaker \"martian\"", [] { read(R"({"conversations": [{"from": "martian", "value": "x"}]})"); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "f:1: \"text\" must be a string, got array", [] { read(R"({"text": []})"); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "\"text\" is empty", [] { read(R"({"text": ""})"); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "\"completion\" is empty", [] { read(R"({"prompt": "a", "completion": ""})"); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "\"history\" entry 1", [] { read(R"({"instruction": "a", "output": "b", "history": [["q"]]})"); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "the column \"text\" is missing", [] { read_example(parsed(R"({"other": 1})"), RecordFormat::kText, {}, "f:2"); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "f:2: must be a JSON object", [] { read_example(parsed("[1]"), RecordFormat::kText, {}, "f:2"); }));
}

}  // namespace
}  // namespace alambic::data
