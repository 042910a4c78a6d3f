// SPDX-License-Identifier: Apache-2.0
#pragma once
// Feeds a parser with damaged samples. Allowed outcomes are success and alambic::Error; another exception, more time or
// more memory than the parser may take is a failure, and the input is kept. With the preset `dev` the sanitizers watch too.
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace alambic::testing {

struct FuzzedParser {
  std::vector<std::string> samples;                              // valid: parse() takes each of them
  std::vector<std::string> words;                                // pieces of the format, put in here and there
  std::function<void(const std::string&)> parse;
  std::function<std::string(std::string)> repair = nullptr;      // makes lengths and hashes fit again; half of the inputs get it
  double most_seconds = 1;                                       // of processor time, for one input
};

/// The input number `number` of a seed: a sample changed in one to eight places (bits, bytes, numbers binary and decimal,
/// pieces cut out, doubled, moved, nested deeply or taken from another sample).
std::string damaged(const FuzzedParser& parser, std::uint64_t seed, std::uint64_t number);

/// Runs inputs 0, 1, ... within a test of gtest: for 8 seconds and at most 100,000, or for ALAMBIC_FUZZ_SECONDS without
/// that limit, with the seed ALAMBIC_FUZZ_SEED (default 1). C++ may hold 64 MiB and twice the input. The input that runs
/// is in the file alambic-fuzz-<test>.last of the temporary folder, where it is found after a crash.
void fuzz(const FuzzedParser& parser);

}  // namespace alambic::testing
