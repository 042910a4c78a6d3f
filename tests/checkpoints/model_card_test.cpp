// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/model_card.h"

#include <gtest/gtest.h>
#include <yaml-cpp/yaml.h>

#include "checkpoints/manifest.h"
#include "core/files.h"
#include "tests/support.h"

namespace alambic::checkpoints {
namespace {

using testing::fails_with;
using testing::ScratchFolder;

YAML::Node front_matter_of(const std::string& card) {
  EXPECT_TRUE(card.starts_with("---\n"));
  return YAML::Load(card.substr(4, card.find("\n---\n") - 4));
}

CardInfo merged_card() {
  CardInfo info;
  info.title = "SmolLM2 for Indonesian";
  info.summary = "A language model.";
  info.licence = info.base_licence = find_licence("apache-2.0");
  info.base_models = {"HuggingFaceTB/SmolLM2-135M-Instruct"};
  info.base_relation = "merge";
  info.languages = {"id", "no", "not a code"};
  info.tags = {"lora", "yes"};
  info.data = {{"org/corpus", "CC0-1.0", "https://example.org/corpus", "id", "12 documents"}, {"debian-handbook", "CC-BY-SA-3.0", "Debian package", "id", ""}};
  info.training = {{"rank", "16"}};
  info.measures = {{"bits per UTF-8 byte, held out", "1.90", "1.52"}};
  info.proof = {{"largest logit difference", "0.0003"}};
  return info;
}

TEST(ModelCard, FrontMatterIsWhatTheHubReads) {
  const std::string card = model_card(merged_card());
  const YAML::Node front = front_matter_of(card);
  EXPECT_EQ(front["license"].as<std::string>(), "apache-2.0");
  EXPECT_EQ(front["base_model"][0].as<std::string>(), "HuggingFaceTB/SmolLM2-135M-Instruct");
  EXPECT_EQ(front["base_model_relation"].as<std::string>(), "merge");
  EXPECT_EQ(front["language"].size(), 2u);
  EXPECT_EQ(front["language"][1].as<std::string>(), "no");
  EXPECT_NE(card.find("- \"no\"\n"), std::string::npos);  // Norwegian, which YAML 1.1 reads as false when it is not quoted
  EXPECT_EQ(front["datasets"].size(), 1u);
  EXPECT_EQ(front["datasets"][0].as<std::string>(), "org/corpus");
  EXPECT_EQ(front["pipeline_tag"].as<std::string>(), "text-generation");
  EXPECT_EQ(front["library_name"].as<std::string>(), "transformers");
  EXPECT_EQ(front["tags"].size(), 3u);
}

TEST(ModelCard, BodyNamesDataMeasuresProofAndWarnings) {
  const std::string card = model_card(merged_card());
  for (const char* words : {"# SmolLM2 for Indonesian", "| debian-handbook | CC-BY-SA-3.0 | Debian package | id |", "| bits per UTF-8 byte, held out | 1.90 | 1.52 |",
                            "| largest logit difference | 0.0003 |", "| rank | 16 |", "Made with alambic 0.1.0",
                            "the corpus \"debian-handbook\" is under CC-BY-SA-3.0, a share-alike licence."})
    EXPECT_NE(card.find(words), std::string::npos) << words << "\n" << card;
}

TEST(ModelCard, WarnsOfEveryLicenceThatIsNotPermissive) {
  CardInfo info = merged_card();
  info.data.push_back({"chats", "", "", "", ""});
  info.base_licence = find_licence("gemma");
  const auto warnings = licence_warnings(info);
  ASSERT_EQ(warnings.size(), 3u);
  EXPECT_NE(warnings[0].find("HuggingFaceTB/SmolLM2-135M-Instruct is under LicenseRef-gemma, which is not a permissive licence"), std::string::npos);
  EXPECT_NE(warnings[2].find("The licence of the corpus \"chats\" is not stated"), std::string::npos);
  info.data = {{"a", "MIT", "", "", ""}};
  info.base_licence = find_licence("mit");
  EXPECT_TRUE(licence_warnings(info).empty());
  EXPECT_EQ(model_card(info).find("## Before you use"), std::string::npos);
}

TEST(ModelCard, LicencesWithoutAHubIdAreNamed) {
  CardInfo info = merged_card();
  info.licence = find_licence("Apache-2.0 AND CC-BY-SA-3.0");
  const YAML::Node front = front_matter_of(model_card(info));
  EXPECT_EQ(front["license"].as<std::string>(), "other");
  EXPECT_EQ(front["license_name"].as<std::string>(), "Apache-2.0 AND CC-BY-SA-3.0");
  EXPECT_EQ(front["license_link"].as<std::string>(), "LICENSE");
  info.licence = find_licence("");
  EXPECT_EQ(front_matter_of(model_card(info))["license"].as<std::string>(), "unknown");
}

TEST(ModelCard, ValuesFromOutsideCannotBreakOut) {
  CardInfo info = merged_card();
  const std::string hostile = "x\n---\nlicense: mit\n# <script>alert(1)</script> | [a](b) `c` \"q\" \\ \x01";
  info.title = info.summary = info.base_relation = info.library_name = hostile;
  info.tags = {hostile, "1.0", "~", ": x"};
  info.base_models.push_back(hostile);
  info.data = {{hostile, hostile, hostile, hostile, hostile}};
  info.licence = find_licence(hostile);
  info.measures = {{hostile, hostile, hostile}};
  info.warnings = {hostile};
  const std::string card = model_card(info);
  const YAML::Node front = front_matter_of(card);
  EXPECT_EQ(front["license"].as<std::string>(), "other");
  EXPECT_EQ(front["tags"][0].as<std::string>(), hostile);
  EXPECT_EQ(front["tags"][1].as<std::string>(), "1.0");
  EXPECT_EQ(front["tags"][2].as<std::string>(), "~");
  EXPECT_EQ(front["base_model"].size(), 1u);
  const std::string body = card.substr(card.find("\n---\n") + 5);
  EXPECT_EQ(body.find("<script>"), std::string::npos);
  EXPECT_EQ(body.find("\nlicense: mit"), std::string::npos);
  EXPECT_EQ(body.find("[a](b)"), std::string::npos);
}

TEST(Manifest, ListsEveryFileAndFindsEveryChange) {
  const ScratchFolder folder;
  std::filesystem::create_directories(folder / "sub");
  write_file(folder / "a", "text");
  write_file(folder / "sub/b", "more");
  write_manifest(folder.path(), {{"made", "by a test"}}, {{"a", sha256_of("text")}});
  const Json manifest = check_manifest(folder.path());
  EXPECT_EQ(manifest["made"], "by a test");
  EXPECT_EQ(manifest["alambic"], alambic_version());
  EXPECT_EQ(manifest["files"].size(), 2u);
  EXPECT_EQ(manifest["files"]["sub/b"]["sha256"], sha256_of("more"));
  EXPECT_EQ(manifest["files"]["sub/b"]["bytes"], 4);

  write_file(folder / "sub/b", "mode");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "sub/b has the SHA-256", [&] { check_manifest(folder.path()); }));
  std::filesystem::remove(folder / "sub/b");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "sub/b is missing", [&] { check_manifest(folder.path()); }));
  for (const char* name : {"../x", "/etc/passwd", "a/../../x"}) {
    write_file(folder / "manifest.json", Json{{"files", {{name, {{"sha256", "0"}, {"bytes", 1}}}}}}.dump());
    EXPECT_TRUE(fails_with(ErrorKind::kData, "no name of a file in this folder", [&] { check_manifest(folder.path()); })) << name;
  }
  write_file(folder / "manifest.json", "{}");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "\"files\" is missing", [&] { check_manifest(folder.path()); }));
}

TEST(Manifest, BeginsAFolderBesideItsTarget) {
  const ScratchFolder folder;
  std::filesystem::create_directories(folder / "out/.tmp-model-999999999");     // of a process that is gone
  std::filesystem::create_directories(folder / "out/.tmp-model-1");             // of one that lives
  std::filesystem::create_directories(folder / "out/.tmp-other-999999999");     // of another target
  std::filesystem::path left;
  {
    const TemporaryFolder made(folder / "out/model");
    left = made.path();
    EXPECT_EQ(left.parent_path(), folder / "out");
    EXPECT_TRUE(std::filesystem::is_empty(left));
    write_file(left / "a", "text");
  }
  EXPECT_FALSE(std::filesystem::exists(left)) << "nothing was committed";
  EXPECT_FALSE(std::filesystem::exists(folder / "out/.tmp-model-999999999"));
  EXPECT_TRUE(std::filesystem::exists(folder / "out/.tmp-model-1"));
  EXPECT_TRUE(std::filesystem::exists(folder / "out/.tmp-other-999999999"));
  std::filesystem::create_directories(left / "of an object that did not come to its end");
  EXPECT_TRUE(std::filesystem::is_empty(TemporaryFolder(folder / "out/model").path()));
  std::filesystem::create_directories(folder / "out/model");
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "exists already", [&] { const TemporaryFolder made(folder / "out/model"); }));
  write_file(folder / "file", "");
  EXPECT_TRUE(fails_with(ErrorKind::kResource, "cannot be created", [&] { const TemporaryFolder made(folder / "file/model"); }));
}

}  // namespace
}  // namespace alambic::checkpoints
