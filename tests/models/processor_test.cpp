// SPDX-License-Identifier: Apache-2.0
#include "models/processor.h"

#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <string>

#include "models/decoder.h"

namespace alambic::models {
namespace {

TEST(Processor, ComputesInBf16OnlyWhereItMultipliesBf16) {
  EXPECT_EQ(fastest_compute_type_with(false, false), at::kFloat);  // AVX2 alone
  EXPECT_EQ(fastest_compute_type_with(true, false), at::kBFloat16);
  EXPECT_EQ(fastest_compute_type_with(false, true), at::kBFloat16);
  EXPECT_EQ(fastest_compute_type_with(true, true), at::kBFloat16);
}

TEST(Processor, IsAskedForWhatTheKernelLists) {
  std::ifstream file("/proc/cpuinfo");
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (text.find("\nflags\t") == std::string::npos) GTEST_SKIP() << "no list of an x86 processor's instructions";
  const auto has = [&](const char* word) { return text.find(word) != std::string::npos; };
  EXPECT_EQ(fastest_compute_type(), fastest_compute_type_with(has(" avx512_bf16"), has(" amx_bf16")));
}

}  // namespace
}  // namespace alambic::models
