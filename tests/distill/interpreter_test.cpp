// SPDX-License-Identifier: Apache-2.0
#include "distill/interpreter.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>

#include "checkpoints/hf_folder.h"
#include "core/files.h"
#include "distill/distill.h"
#include "tests/support.h"
#include "tests/train/tiny_run.h"

namespace alambic::distill {
namespace {

namespace fs = std::filesystem;
using testing::fails_with;
using testing::golden_path;
using testing::ScratchFolder;

const auto never = [] { return false; };

const Json& cases() {
  static const Json golden = read_json_file(golden_path("tokenizers.json"));
  return golden["cases"];
}

// A model of V tokens with a tokenizer; `row_of`: which row of a model of the same seed each of its tokens has (-1: one of its own).
void make_model(const fs::path& folder, const Json& tokenizer, std::int64_t V, std::uint64_t seed, const std::vector<std::int64_t>& row_of = {}, std::int64_t rows = 0) {
  fs::create_directories(folder);
  Json config = read_json_file(golden_path("peft/llama_tied") / "config.json");
  config["vocab_size"] = V, config["max_position_embeddings"] = 512;
  config["bos_token_id"] = 0, config["eos_token_id"] = 1;
  write_file(folder / "config.json", to_line(config));
  write_file(folder / "tokenizer.json", to_line(tokenizer));
  models::Decoder decoder = checkpoints::load_decoder(golden_path("peft/llama_tied"), at::kFloat);
  std::vector<std::pair<std::string, std::vector<std::int64_t>>> shapes;
  for (const models::NamedTensor& named : decoder.tensors()) {
    shapes.emplace_back(named.name, named.tensor->sizes().vec());
    if (shapes.back().second[0] == testing::kTinyVocabulary) shapes.back().second[0] = V;
  }
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  checkpoints::write_weights(folder, shapes, at::kFloat, [&](std::size_t i) {
    if (shapes[i].second.size() == 1) return at::ones(shapes[i].second);
    if (shapes[i].second[0] != V) return at::randn(shapes[i].second, generator) * 0.2;
    const at::Tensor whole = at::randn({rows == 0 ? V : rows, shapes[i].second[1]}, generator);
    if (row_of.empty()) return whole;
    at::Tensor mapped = at::randn({V, whole.size(1)}) * 3;
    for (std::size_t id = 0; id < row_of.size(); ++id)
      if (row_of[id] >= 0) mapped[static_cast<std::int64_t>(id)].copy_(whole[row_of[id]]);
    return mapped;
  });
}

void write_texts(const fs::path& folder, const fs::path& model) {
  const data::Tokenizer tokenizer = data::Tokenizer::from_file(model);
  data::TokenStoreWriter writer(folder, {.tokenizer_hash = tokenizer.hash(), .vocabulary_size = tokenizer.vocabulary_size(), .sources = {{.name = "rows", .origin = "made by a test", .licence = "CC0-1.0", .language = "en"}}});
  for (const Json& row : cases()["byte_level_bpe"]["rows"]) {
    data::Document document;
    document.ids = tokenizer.encode(row[0].get<std::string>(), false);
    if (document.ids.size() < 3) continue;
    document.mask.assign(document.ids.size(), 1);
    document.mask[0] = 0;
    if (document.mask.size() > 8) document.mask[6] = 0;
    document.num_bytes = row[0].get<std::string>().size(), document.num_words = 1;
    writer.append(document);
  }
  writer.finish();
}

struct Setting {
  ScratchFolder folder;
  fs::path student = folder / "student", teacher = folder / "teacher";

  explicit Setting(const std::string& tokenizer = "byte_level_bpe") {
    make_model(student, cases()[tokenizer]["tokenizer"], cases()[tokenizer]["vocabulary_size"].get<std::int64_t>(), 1);
    write_texts(folder / "texts", student);
  }
  DistillConfig config(const std::string& run, const std::string& across) const {
    DistillConfig config{.train = testing::tiny_config(folder.path(), run), .distill = {}};
    config.train.model = student;
    config.train.data.mixture = {{.store = folder / "texts"}};
    config.train.data.row_length = 64;
    config.train.evaluation.stores = {};
    config.train.evaluation.every = 0;
    config.train.limits.max_steps = 3;
    config.distill.teachers = {{.model = teacher, .across = {.across_tokenizers = across}}};
    config.distill.alpha = 0.5;
    return config;
  }
};

std::vector<double> divergences(const DistillConfig& config) {
  distill(config, false, never);
  std::vector<double> found;
  std::ifstream lines(config.train.output / "metrics.jsonl");
  for (std::string line; std::getline(lines, line);)
    if (const Json json = parse_json(line, "metrics"); json["kind"] == "train") found.push_back(json["divergence"].get<double>());
  return found;
}

// Fault 24: the same size and other ids. Exact mapping finds the student itself behind them.
TEST(AcrossTokenizers, ExactMappingUndoesAPermutation) {
  const Setting setting;
  Json permuted = cases()["byte_level_bpe"]["tokenizer"];
  std::vector<std::int64_t> row_of(422);
  for (std::size_t id = 0; id < row_of.size(); ++id) row_of[id] = static_cast<std::int64_t>(id);
  // Every letter takes the next one's id.
  std::vector<std::string> letters;
  for (char letter = 'a'; letter <= 'z'; ++letter) letters.emplace_back(1, letter);
  Json& vocabulary = permuted["model"]["vocab"];
  const Json before = vocabulary;
  for (std::size_t i = 0; i < letters.size(); ++i) {
    const auto own = before[letters[i]].get<std::int64_t>(), given = before[letters[(i + 1) % letters.size()]].get<std::int64_t>();
    vocabulary[letters[i]] = given, row_of[static_cast<std::size_t>(given)] = own;
  }
  make_model(setting.teacher, permuted, 422, 1, row_of);
  EXPECT_TRUE(fails_with(ErrorKind::kData, "set across_tokenizers: exact, uld or gold", [&] { distill(setting.config("refused", "none"), false, never); }));
  const std::vector<double> exact = divergences(setting.config("exact", "exact"));
  EXPECT_NEAR(exact[0], 0, 1e-9);
  EXPECT_GT(exact[2], 1e-5);  // the text moves the student

  // Its rows are those of the student's tokens, so that its inside can be matched too.
  DistillConfig matching = setting.config("matching", "exact");
  matching.distill.match = {.hidden = 1, .attention = 1, .relations = {"qk", "vv"}};
  distill(matching, false, never);
  std::ifstream lines(matching.train.output / "metrics.jsonl");
  std::vector<Json> steps;
  for (std::string line; std::getline(lines, line);)
    if (const Json json = parse_json(line, "metrics"); json["kind"] == "train") steps.push_back(json);
  for (const char* figure : {"hidden_loss", "attention_loss"}) {
    EXPECT_NEAR(steps.at(0)[figure].get<double>(), 0, 1e-9) << figure;
    EXPECT_GT(steps.at(2)[figure].get<double>(), 1e-9) << figure;
  }
}

TEST(AcrossTokenizers, ExactMappingPassesPaddingAndTokensOfOneSide) {
  const Setting setting;
  // The teacher has 10 rows of padding, and does not know the student's last token; what it says of the others is what the student says.
  Json fewer = cases()["byte_level_bpe"]["tokenizer"];
  fewer["added_tokens"].erase(fewer["added_tokens"].size() - 1);
  std::vector<std::int64_t> row_of(431, -1);
  for (std::size_t id = 0; id < 421; ++id) row_of[id] = static_cast<std::int64_t>(id);
  make_model(setting.teacher, fewer, 431, 1, row_of, 422);
  const std::vector<double> found = divergences(setting.config("exact", "exact"));
  EXPECT_NEAR(found[0], 0, 1e-6);
  EXPECT_GT(found[2], 1e-5);
}

TEST(AcrossTokenizers, TheStudentItselfTeachesNothingByRankEither) {
  const Setting setting;
  for (const std::string across : {"uld", "gold"}) {
    DistillConfig config = setting.config(across, across);
    config.distill.teachers[0].model = setting.student;
    config.distill.divergence.objective = "jensen_shannon";
    const std::vector<double> found = divergences(config);
    // Not 0: the teacher reads a begin that its tokenizer adds.
    EXPECT_GT(found[0], 0) << across;
    Json bare = cases()["byte_level_bpe"]["tokenizer"];
    bare["post_processor"] = nullptr;
    make_model(setting.folder / ("bare" + across), bare, 422, 1);
    config.distill.teachers[0].model = setting.folder / ("bare" + across);
    config.train.output = setting.folder / ("bare-run" + across);
    const std::vector<double> equal = divergences(config);
    EXPECT_NEAR(equal[0], 0, 1e-6) << across;
    EXPECT_GT(equal[2], 1e-5) << across;
  }
}

TEST(AcrossTokenizers, AStudentLearnsFromATeacherOfOtherTokens) {
  for (const std::string student : {"byte_level_bpe", "sentencepiece_bpe"}) {
    const Setting setting(student);
    const std::string other = student == "byte_level_bpe" ? "sentencepiece_bpe" : "byte_level_bpe";
    make_model(setting.teacher, cases()[other]["tokenizer"], cases()[other]["vocabulary_size"].get<std::int64_t>() + 9, 4);
    write_file(setting.teacher / "README.md", "---\nlicense: gemma\n---\n");
    for (const std::string across : {"uld", "gold"}) {
      DistillConfig config = setting.config(across, across);
      config.distill.alpha = 1;
      config.train.limits.max_steps = 30;
      config.distill.divergence.objective = "jensen_shannon";
      const std::vector<double> found = divergences(config);
      for (const double one : found) ASSERT_TRUE(std::isfinite(one) && one > 0) << student << across;
      // (The texts of the other student's steps differ by more than thirty steps teach it.)
      if (student == "byte_level_bpe") {
        EXPECT_LT(found[27] + found[28] + found[29], 0.95 * (found[0] + found[1] + found[2])) << across;
      }
      const Json report = read_json_file(config.train.output / "report.json");
      EXPECT_EQ(report["teachers"][0]["across_tokenizers"], across);
      EXPECT_EQ(report["teachers"][0]["licence"], "LicenseRef-gemma");
      EXPECT_EQ(report["licence"]["verdict"], "restricted");
      if (across == "uld") continue;
      // The same steps again, bit for bit.
      DistillConfig again = config;
      again.train.output = setting.folder / (across + "-again");
      EXPECT_EQ(divergences(again), found);
    }
  }
}

TEST(AcrossTokenizers, RefusesWhatItCannotDo) {
  const Setting setting;
  make_model(setting.teacher, cases()["sentencepiece_bpe"]["tokenizer"], 647, 4);
  EXPECT_TRUE(fails_with(ErrorKind::kData, "use across_tokenizers: gold or uld", [&] { distill(setting.config("exact", "exact"), false, never); }));
  DistillConfig gold = setting.config("gold", "gold");
  gold.distill.divergence.objective = "total_variation";
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "knows no total_variation", [&] { distill(gold, false, never); }));
  fs::remove(setting.teacher / "tokenizer.json");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "there is no such file", [&] { distill(setting.config("uld", "uld"), false, never); }));
}

}  // namespace
}  // namespace alambic::distill
