// SPDX-License-Identifier: Apache-2.0
#include "distill/teacher_text.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <numeric>

#include "core/random.h"
#include "data/prepare.h"
#include "distill/distill.h"
#include "models/generate.h"
#include "tests/cli/tiny_model.h"
#include "tests/support.h"

namespace alambic::distill {
namespace {

namespace fs = std::filesystem;
using testing::fails_with;
using testing::ScratchFolder;

const auto never = [] { return false; };

class TeacherText : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::write_tiny_model(folder_ / "teacher");
    write_file(folder_ / "prompts.jsonl", "{\"prompt\": \"w4 w5\"}\n{\"prompt\": \"w9 w10\", \"completion\": \"not this\"}\n\n{\"prompt\": \"w20 w6 w7\"}\n");
  }
  DistillConfig config(const std::string& output) const {
    DistillConfig config;
    config.distill.teachers = {{.model = folder_ / "teacher"}};
    config.train.compute_type = "f32";
    config.train.threads = 2;
    config.train.seed = 3;
    config.generate = {.prompts = folder_ / "prompts.jsonl", .output = folder_ / output, .samples = 6, .keep = 2, .temperature = 4, .max_new_tokens = 40};
    return config;
  }
  std::vector<Json> lines(const fs::path& file) const {
    std::vector<Json> all;
    std::ifstream stream(file);
    for (std::string line; std::getline(stream, line);) all.push_back(parse_json(line, "line"));
    return all;
  }
  ScratchFolder folder_;
};

// Every sample by generate() and score(), the filters and the order as they are described.
TEST_F(TeacherText, KeepsTheLikeliestOfTheWholeAnswers) {
  const DistillConfig made = config("answers.jsonl");
  const Json provenance = write_teacher_text(made, never);
  const data::Tokenizer tokenizer = data::Tokenizer::from_file(folder_ / "teacher");
  const models::Decoder teacher = checkpoints::load_decoder(folder_ / "teacher", at::kFloat);
  std::vector<Json> expected;
  std::int64_t not_ended = 0, less_likely = 0, tokens = 0;
  const std::vector<std::string> prompts = {"w4 w5", "w9 w10", "w20 w6 w7"};
  for (std::uint64_t number = 0; number < prompts.size(); ++number) {
    std::vector<std::pair<double, std::string>> answers;
    const auto encoded = tokenizer.encode(prompts[number], true);
    for (std::uint64_t sample = 0; sample < 6; ++sample) {
      std::vector<std::int64_t> all(encoded.begin(), encoded.end());
      const auto drawn = models::generate(teacher, all, {.temperature = 4, .max_new_tokens = 40, .seed = derive_seed(3, "teacher text", {number, sample})}, {2});
      tokens += static_cast<std::int64_t>(drawn.size());
      if (drawn.back() != 2) {
        ++not_ended;
        continue;
      }
      all.insert(all.end(), drawn.begin(), drawn.end());
      const std::vector<double> scores = models::score(teacher, all);
      const double mean = std::accumulate(scores.end() - static_cast<std::ptrdiff_t>(drawn.size()), scores.end(), 0.0) / static_cast<double>(drawn.size());
      const std::vector<std::uint32_t> ids(drawn.begin(), drawn.end() - 1);
      if (!ids.empty()) answers.emplace_back(-mean, " " + tokenizer.decode(ids, true));  // prompt and answer are one text
    }
    std::sort(answers.begin(), answers.end());
    for (std::size_t i = 0; i < answers.size(); ++i) {
      if (i < 2) expected.push_back({{"prompt", prompts[number]}, {"completion", answers[i].second}});
      else ++less_likely;
    }
  }
  ASSERT_GT(not_ended, 0);
  ASSERT_GT(less_likely, 0);
  EXPECT_EQ(lines(made.generate.output), expected);
  const Json counts = provenance["counts"];
  EXPECT_EQ(counts["prompts"], 3);
  EXPECT_EQ(counts["samples"], 18);
  EXPECT_EQ(counts["tokens"], tokens);
  EXPECT_EQ(counts["kept"], expected.size());
  EXPECT_EQ(counts["dropped"]["not_ended"], not_ended);
  EXPECT_EQ(counts["dropped"]["less_likely"], less_likely);
  EXPECT_EQ(provenance["teacher"]["licence"], "Apache-2.0");
  EXPECT_EQ(provenance["teacher"]["sha256"], checkpoints::base_hash(folder_ / "teacher"));
  EXPECT_EQ(provenance["settings"]["temperature"], 4);
  EXPECT_EQ(provenance["seed"], 3);
  EXPECT_EQ(provenance["compute_type"], "Float");
  EXPECT_EQ(provenance["sha256"], sha256_of_file(made.generate.output));
  EXPECT_EQ(read_json_file(folder_ / "answers.jsonl.provenance.json"), provenance);

  DistillConfig narrow = config("narrow.jsonl");
  narrow.generate.batch = 4;  // less than the samples of one prompt
  write_teacher_text(narrow, never);
  EXPECT_EQ(sha256_of_file(narrow.generate.output), provenance["sha256"]);
}

TEST_F(TeacherText, PrepareReadsItAndTrainsTheAnswersAlone) {
  const DistillConfig made = config("answers.jsonl");
  write_teacher_text(made, never);
  data::PrepareConfig prepare;
  prepare.tokenizer = folder_ / "teacher", prepare.output = folder_ / "store";
  data::SourceConfig& source = prepare.sources.emplace_back();
  source.name = "teacher", source.paths = {made.generate.output.string()}, source.licence = "Apache-2.0";
  data::prepare(prepare);
  const data::TokenStore store(folder_ / "store");
  const std::vector<Json> answers = lines(made.generate.output);
  const data::Tokenizer tokenizer = data::Tokenizer::from_file(folder_ / "teacher");
  ASSERT_EQ(store.num_documents(), answers.size());
  for (std::uint64_t i = 0; i < store.num_documents(); ++i) {
    const data::Document document = store.read(i);
    const std::size_t prompt = tokenizer.encode(answers[i]["prompt"].get<std::string>(), true).size();
    for (std::size_t t = 0; t < document.mask.size(); ++t) EXPECT_EQ(document.mask[t], t >= prompt);
    EXPECT_EQ(document.ids.back(), 2u);
  }
  // The prompts of that store give the same questions again.
  DistillConfig again = config("again.jsonl");
  again.generate.prompts.clear();
  again.train.data.mixture = {{.store = folder_ / "store"}};
  const Json provenance = write_teacher_text(again, never);
  EXPECT_EQ(provenance["counts"]["prompts"], answers.size());
  EXPECT_EQ(provenance["counts"]["dropped"]["prompt_is_no_text"], 0);
  EXPECT_EQ(provenance["prompts"][0]["sources"][0]["licence"], "Apache-2.0");
  std::set<std::string> asked, given;
  for (const Json& line : answers) asked.insert(line["prompt"]);
  for (const Json& line : lines(again.generate.output)) given.insert(line["prompt"]);
  EXPECT_EQ(given, asked);
}

TEST_F(TeacherText, ConversationsGoThroughTheTemplate) {
  write_file(folder_ / "teacher/chat_template.jinja", "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}w27{% endif %}");
  write_file(folder_ / "prompts.jsonl",
             "{\"messages\": [{\"role\": \"user\", \"content\": \"w4\"}, {\"role\": \"assistant\", \"content\": \"w5\"}, {\"role\": \"user\", \"content\": \"w6\"}, {\"role\": \"assistant\", \"content\": \"w7\"}]}\n"
             "{\"prompt\": [{\"role\": \"user\", \"content\": \"w8\"}]}\n");
  DistillConfig made = config("answers.jsonl");
  made.generate.whole_answers = false;
  made.generate.samples = made.generate.keep = 1;
  write_teacher_text(made, never);
  const std::vector<Json> answers = lines(made.generate.output);
  ASSERT_EQ(answers.size(), 2u);
  EXPECT_EQ(answers[0]["prompt"].size(), 3u);
  EXPECT_EQ(answers[0]["prompt"][2]["content"], "w6");
  EXPECT_EQ(answers[0]["completion"][0]["role"], "assistant");
  const data::Tokenizer tokenizer = data::Tokenizer::from_file(folder_ / "teacher");
  const models::Decoder teacher = checkpoints::load_decoder(folder_ / "teacher", at::kFloat);
  const auto prompt = tokenizer.encode("user w8 </s> w27", false);
  auto drawn = models::generate(teacher, {prompt.begin(), prompt.end()}, {.temperature = 4, .max_new_tokens = 40, .seed = derive_seed(3, "teacher text", {1, 0})}, {2});
  if (drawn.back() == 2) drawn.pop_back();
  EXPECT_EQ(answers[1]["completion"][0]["content"], tokenizer.decode(std::vector<std::uint32_t>(drawn.begin(), drawn.end()), true));
}

TEST_F(TeacherText, FiltersLeaveOutWhatTheyName) {
  EXPECT_EQ(repetition({1, 2, 3}), 0);
  EXPECT_EQ(repetition({1, 2, 3, 4, 5, 6, 7}), 0);
  EXPECT_DOUBLE_EQ(repetition({1, 1, 1, 1, 1, 1, 1}), 0.75);          // one of four runs
  EXPECT_DOUBLE_EQ(repetition({1, 2, 3, 1, 2, 3, 1, 2, 3}), 0.5);     // three of six
  const auto dropped = [&](const std::string& output, const std::function<void(TeacherTextConfig&)>& change) {
    DistillConfig made = config(output);
    change(made.generate);
    return write_teacher_text(made, never)["counts"]["dropped"];
  };
  const auto count = [](const Json& counts, const char* why) { return counts[why].get<std::int64_t>(); };
  EXPECT_GT(count(dropped("short", [](TeacherTextConfig& text) { text.min_tokens = 8; }), "too_short"), 0);
  EXPECT_GT(count(dropped("cold", [](TeacherTextConfig& text) { text.temperature = 0.02, text.whole_answers = false, text.max_repetition = 1; }), "duplicate"), 0);
  EXPECT_EQ(count(dropped("open", [](TeacherTextConfig& text) { text.whole_answers = false; }), "not_ended"), 0);
  EXPECT_TRUE(fails_with(ErrorKind::kData, "no answer of 18 was kept", [&] { dropped("none", [](TeacherTextConfig& text) { text.min_tokens = text.max_new_tokens = 40, text.max_repetition = 0; }); }));
  EXPECT_FALSE(fs::exists(folder_ / "none"));
  const DistillConfig made = config("one");
  DistillConfig one = made;
  one.generate.max_prompts = 1;
  EXPECT_EQ(write_teacher_text(one, never)["counts"]["prompts"], 1);
}

TEST_F(TeacherText, ContradictionsAndBadPromptsAreRefused) {
  const auto refuses = [&](ErrorKind kind, const std::string& why, const std::function<void(DistillConfig&)>& change) {
    DistillConfig made = config("answers.jsonl");
    change(made);
    return fails_with(kind, why, [&] { write_teacher_text(made, never); });
  };
  EXPECT_TRUE(refuses(ErrorKind::kUsage, "one teacher writes the corpus, 2 are named", [](DistillConfig& c) { c.distill.teachers.push_back(c.distill.teachers[0]); }));
  EXPECT_TRUE(refuses(ErrorKind::kUsage, "generate.output is missing", [](DistillConfig& c) { c.generate.output.clear(); }));
  EXPECT_TRUE(refuses(ErrorKind::kUsage, "exists", [&](DistillConfig& c) { c.generate.output = folder_ / "prompts.jsonl"; }));
  EXPECT_TRUE(refuses(ErrorKind::kUsage, "generate.keep is 7", [](DistillConfig& c) { c.generate.keep = 7; }));
  EXPECT_TRUE(refuses(ErrorKind::kUsage, "generate.temperature is 0", [](DistillConfig& c) { c.generate.temperature = 0; }));
  EXPECT_TRUE(refuses(ErrorKind::kUsage, "generate.min_tokens is 41", [](DistillConfig& c) { c.generate.min_tokens = 41; }));
  EXPECT_TRUE(refuses(ErrorKind::kUsage, "has no store", [](DistillConfig& c) { c.generate.prompts.clear(); }));
  EXPECT_TRUE(refuses(ErrorKind::kUsage, "JSON lines or Parquet", [&](DistillConfig& c) { c.generate.prompts = folder_ / "teacher/README.md"; }));
  EXPECT_TRUE(fails_with(ErrorKind::kStopped, "nothing is written", [&] { write_teacher_text(config("stopped"), [] { return true; }); }));
  EXPECT_FALSE(fs::exists(folder_ / "stopped"));
  const auto prompts_fail = [&](const std::string& text, const std::string& why) {
    write_file(folder_ / "prompts.jsonl", text);
    return refuses(ErrorKind::kData, why, [](DistillConfig&) {});
  };
  EXPECT_TRUE(prompts_fail("{\"prompt\": \"w4\"}\n[1]\n", "prompts.jsonl:2: must be a JSON object"));
  EXPECT_TRUE(prompts_fail("{\"text\": \"w4\"}\n", "prompts.jsonl:1: plain text has no prompt"));
  EXPECT_TRUE(prompts_fail("{\"prompt\": \"\"}\n", "prompts.jsonl:1: the prompt has no tokens"));
  EXPECT_TRUE(prompts_fail("{\"prompt\": [{\"role\": \"user\", \"content\": \"w8\"}]}\n", "the teacher has no chat template"));
  testing::write_tiny_store(folder_ / "store", "another");
  EXPECT_TRUE(refuses(ErrorKind::kData, "another tokenizer", [&](DistillConfig& c) { c.generate.prompts.clear(), c.train.data.mixture = {{.store = folder_ / "store"}}; }));
}

}  // namespace
}  // namespace alambic::distill
