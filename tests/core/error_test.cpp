// SPDX-License-Identifier: Apache-2.0
#include "core/error.h"

#include <gtest/gtest.h>

namespace alambic {
namespace {

TEST(Error, EachKindHasItsExitCode) {
  const std::pair<ErrorKind, int> codes[] = {{ErrorKind::kUsage, 2}, {ErrorKind::kData, 3}, {ErrorKind::kLicence, 4}, {ErrorKind::kResource, 5},
                                             {ErrorKind::kNumerics, 6}, {ErrorKind::kPeer, 7}, {ErrorKind::kBug, 70}, {ErrorKind::kStopped, 75}};
  for (const auto& [kind, code] : codes) EXPECT_EQ(exit_code(kind), code);
}

TEST(Error, FailJoinsItsPartsAndKeepsTheRemedy) {
  try {
    fail(ErrorKind::kData, "x.json", ": line ", 7, ", value ", 1.5, Remedy{"write it again"});
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kData);
    EXPECT_STREQ(error.what(), "x.json: line 7, value 1.5");
    EXPECT_EQ(error.remedy(), "write it again");
    return;
  }
  FAIL() << "nothing was thrown";
}

TEST(NearestName, FindsTypingSlipsAndNothingElse) {
  const std::vector<std::string> known = {"learning_rate", "warmup_steps", "batch_size", "q_proj"};
  EXPECT_EQ(nearest_name("learning_rat", known), "learning_rate");
  EXPECT_EQ(nearest_name("lerning_rate", known), "learning_rate");
  EXPECT_EQ(nearest_name("batchsize", known), "batch_size");
  EXPECT_EQ(nearest_name("q_porj", known), "q_proj");
  EXPECT_EQ(nearest_name("temperature", known), "");
  EXPECT_EQ(nearest_name("", known), "");
  EXPECT_EQ(nearest_name("x", {}), "");
}

TEST(NearestName, IsNotSlowOnHostileWords) {
  EXPECT_EQ(nearest_name(std::string(1 << 20, 'a'), {std::string(1 << 20, 'a')}), "");
}

}  // namespace
}  // namespace alambic
