// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/licence.h"

#include <gtest/gtest.h>

#include "core/files.h"
#include "tests/support.h"

namespace alambic::checkpoints {
namespace {

using testing::ScratchFolder;

struct Known {
  const char *written, *spdx, *hub_id;
  LicenceClass kind;
};

class KnownLicences : public ::testing::TestWithParam<Known> {};

TEST_P(KnownLicences, AreFound) {
  const Licence licence = find_licence(GetParam().written);
  EXPECT_EQ(licence.spdx, GetParam().spdx);
  EXPECT_EQ(licence.hub_id, GetParam().hub_id);
  EXPECT_EQ(static_cast<int>(licence.kind), static_cast<int>(GetParam().kind));
  EXPECT_EQ(licence.permissive, licence.kind == LicenceClass::kPermissive);
  EXPECT_EQ(licence.open(), licence.kind == LicenceClass::kPermissive || licence.kind == LicenceClass::kShareAlike);
}

using enum LicenceClass;
INSTANTIATE_TEST_SUITE_P(
    Table, KnownLicences,
    ::testing::Values(Known{"apache-2.0", "Apache-2.0", "apache-2.0", kPermissive}, Known{"Apache 2.0", "Apache-2.0", "apache-2.0", kPermissive},
                      Known{" MIT ", "MIT", "mit", kPermissive}, Known{"Expat", "MIT", "mit", kPermissive}, Known{"bsd-3-clause", "BSD-3-Clause", "bsd-3-clause", kPermissive},
                      Known{"CC0-1.0", "CC0-1.0", "cc0-1.0", kPermissive}, Known{"cc-by-4.0", "CC-BY-4.0", "cc-by-4.0", kPermissive},
                      Known{"odc-by", "ODC-By-1.0", "odc-by", kPermissive}, Known{"ODC-By-1.0", "ODC-By-1.0", "odc-by", kPermissive},
                      Known{"cc-by-sa-3.0", "CC-BY-SA-3.0", "cc-by-sa-3.0", kShareAlike}, Known{"CC-BY-SA-4.0", "CC-BY-SA-4.0", "cc-by-sa-4.0", kShareAlike},
                      Known{"GPL-2.0-or-later", "GPL-2.0-or-later", "gpl-2.0", kShareAlike}, Known{"GPL-2+", "GPL-2.0-or-later", "gpl-2.0", kShareAlike},
                      Known{"gpl-3.0", "GPL-3.0-only", "gpl-3.0", kShareAlike}, Known{"AGPL-3.0-or-later", "AGPL-3.0-or-later", "agpl-3.0", kShareAlike},
                      Known{"GPL-2.0-only WITH Classpath-exception-2.0", "GPL-2.0-only WITH Classpath-exception-2.0", "gpl-2.0", kShareAlike},
                      Known{"cc-by-nc-4.0", "CC-BY-NC-4.0", "cc-by-nc-4.0", kRestricted}, Known{"CC-BY-NC-SA-4.0", "CC-BY-NC-SA-4.0", "cc-by-nc-sa-4.0", kRestricted},
                      Known{"gemma", "LicenseRef-gemma", "gemma", kRestricted}, Known{"llama3.1", "LicenseRef-llama3.1", "llama3.1", kRestricted},
                      Known{"LicenseRef-llama3.3", "LicenseRef-llama3.3", "llama3.3", kRestricted}, Known{"qwen-research", "LicenseRef-qwen-research", "other", kRestricted},
                      Known{"openrail++", "LicenseRef-openrail-plus-plus", "openrail++", kRestricted}, Known{"", "", "other", kUnknown},
                      Known{"house rules", "", "other", kUnknown}, Known{"other", "", "other", kUnknown}, Known{"LicenseRef-mine", "", "other", kUnknown}));

TEST(Licences, OfAnOrTheBranchThatBindsLeastIsChosenAndNamed) {
  const Licence licence = find_licence("GPL-3.0-only OR MIT");
  EXPECT_EQ(licence.spdx, "MIT");
  EXPECT_EQ(licence.given, "GPL-3.0-only OR MIT");
  EXPECT_TRUE(licence.permissive);
  EXPECT_EQ(find_licence("GPL-2.0-or-later OR CC-BY-SA-3.0").spdx, "CC-BY-SA-3.0");  // the Debian handbook
  EXPECT_EQ(find_licence("house rules OR gemma").spdx, "LicenseRef-gemma");
}

TEST(Licences, AnAndBindsByItsStricterPart) {
  const Licence both = find_licence("MIT AND CC-BY-SA-4.0");
  EXPECT_EQ(both.spdx, "MIT AND CC-BY-SA-4.0");
  EXPECT_EQ(both.hub_id, "other");
  EXPECT_FALSE(both.permissive);
  EXPECT_TRUE(both.open());
  EXPECT_NE(both.duty.find("copyright line"), std::string::npos);
  EXPECT_NE(both.duty.find("same licence"), std::string::npos);
  EXPECT_TRUE(find_licence("MIT AND Apache-2.0").permissive);
  EXPECT_FALSE(find_licence("MIT AND gemma").open());
  EXPECT_EQ(find_licence("MIT AND house-rules").kind, kUnknown);
  EXPECT_EQ(find_licence("MIT AND house-rules").spdx, "");
  EXPECT_EQ(find_licence("MIT AND mit").spdx, "MIT");
}

TEST(Licences, BracketsAndPrecedence) {
  EXPECT_EQ(find_licence("(GPL-3.0-only OR MIT) AND CC-BY-4.0").spdx, "MIT AND CC-BY-4.0");
  EXPECT_EQ(find_licence("CC-BY-NC-4.0 AND MIT OR GPL-3.0-only").spdx, "GPL-3.0-only");  // AND binds tighter than OR
  for (const char* broken : {"(MIT", "MIT)", "MIT OR", "AND MIT", "MIT MIT", "()", "OR"}) EXPECT_EQ(find_licence(broken).kind, kUnknown) << broken;
  EXPECT_EQ(find_licence(std::string(900, '(').append("MIT")).kind, kUnknown);
  EXPECT_EQ(find_licence(std::string(100000, 'x')).kind, kUnknown);
}

TEST(Licences, OfAText) {
  EXPECT_EQ(licence_of_text(licence_text("Apache-2.0")).spdx, "Apache-2.0");
  EXPECT_GT(licence_text("Apache-2.0").size(), 11000u);
  EXPECT_EQ(licence_text("MIT"), "");
  EXPECT_EQ(licence_of_text("MIT License\n\nCopyright (c) 2024 Somebody\n\nPermission is hereby granted, free\nof charge, to any person").spdx, "MIT");
  EXPECT_EQ(licence_of_text("Modified MIT License\n\nPermission is hereby granted, free of charge").spdx, "LicenseRef-modified-mit");
  EXPECT_EQ(licence_of_text("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT").spdx, "LicenseRef-llama3.1");
  EXPECT_EQ(licence_of_text("Gemma Terms of Use\nLast modified").spdx, "LicenseRef-gemma");
  EXPECT_EQ(licence_of_text("    GNU GENERAL PUBLIC LICENSE\n       Version 3, 29 June 2007").spdx, "GPL-3.0-only");
  EXPECT_EQ(licence_of_text("Do as you please").kind, kUnknown);
}

TEST(LicenceOfModel, ReadsFrontMatterAndText) {
  const ScratchFolder folder;
  const auto licence_with = [&](const std::string& readme, const std::string& text) {
    std::filesystem::remove(folder / "LICENSE");
    write_file(folder / "README.md", readme);
    if (!text.empty()) write_file(folder / "LICENSE", text);
    return licence_of_model(folder.path());
  };
  EXPECT_EQ(licence_of_model(folder.path()).kind, kUnknown);
  EXPECT_EQ(licence_with("---\nlicense: apache-2.0\n---\n# x", "").spdx, "Apache-2.0");
  EXPECT_EQ(licence_with("---\r\nlicense: \"mit\"\r\n---\r\n", "").spdx, "MIT");
  EXPECT_EQ(licence_with("---\nlicense:\n- mit\n- cc-by-4.0\ntags: [x]\n---\n", "").spdx, "MIT AND CC-BY-4.0");
  EXPECT_EQ(licence_with("---\nlicense: other\nlicense_name: qwen-research\n---\n", "").spdx, "LicenseRef-qwen-research");
  EXPECT_EQ(licence_with("---\nlicense: other\nlicense_name: house-rules\n---\n", "").given, "house-rules");
  EXPECT_EQ(licence_with("license: mit\n", "").kind, kUnknown);           // no front matter
  EXPECT_EQ(licence_with("---\nlicense: mit\n", "").kind, kUnknown);      // never ended
  EXPECT_EQ(licence_with("# x", std::string(licence_text("Apache-2.0"))).spdx, "Apache-2.0");
  EXPECT_EQ(licence_with("---\nlicense: apache-2.0\n---\n", std::string(licence_text("Apache-2.0"))).spdx, "Apache-2.0");
  // A card that says MIT over a licence text that says otherwise: both bind.
  const Licence both = licence_with("---\nlicense: mit\n---\n", "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT");
  EXPECT_EQ(both.spdx, "MIT AND LicenseRef-llama3.1");
  EXPECT_FALSE(both.open());
  EXPECT_EQ(licence_with("---\nlicense: gpl-2.0\n---\n", "GNU GENERAL PUBLIC LICENSE Version 2").spdx, "GPL-2.0-only");
  EXPECT_EQ(licence_with("---\nlicense: mit\n---\n", "a text nobody knows").spdx, "MIT");
}

}  // namespace
}  // namespace alambic::checkpoints
