// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <functional>
#include <string>

#include "core/error.h"

namespace alambic::testing {

/// An empty folder of this test's own, removed at the end.
class ScratchFolder {
 public:
  ScratchFolder() {
    const auto* info = ::testing::UnitTest::GetInstance()->current_test_info();
    std::string name = std::string(info->test_suite_name()) + "." + info->name() + "." + std::to_string(::getpid());
    for (char& letter : name)
      if (letter == '/') letter = '_';
    path_ = std::filesystem::temp_directory_path() / ("alambic-" + name);
    std::filesystem::remove_all(path_);
    std::filesystem::create_directories(path_);
  }
  ~ScratchFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

/// Passes when `act` throws an Error of this kind whose message (or remedy) contains `words`.
inline ::testing::AssertionResult fails_with(ErrorKind kind, const std::string& words, const std::function<void()>& act) {
  try {
    act();
  } catch (const Error& error) {
    const std::string said = std::string(error.what()) + " / " + error.remedy();
    if (error.kind() != kind)
      return ::testing::AssertionFailure() << "kind with exit code " << exit_code(error.kind()) << ", expected " << exit_code(kind) << ": " << said;
    if (said.find(words) == std::string::npos) return ::testing::AssertionFailure() << "\"" << said << "\" does not contain \"" << words << "\"";
    return ::testing::AssertionSuccess();
  } catch (const std::exception& other) {
    return ::testing::AssertionFailure() << "another exception: " << other.what();
  }
  return ::testing::AssertionFailure() << "nothing was thrown";
}

}  // namespace alambic::testing
