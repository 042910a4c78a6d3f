// SPDX-License-Identifier: Apache-2.0
#include "core/files.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>

#include "core/error.h"
#include "tests/support.h"

namespace alambic {
namespace {

using testing::fails_with;
using testing::ScratchFolder;

std::size_t num_entries(const fs::path& folder) { return static_cast<std::size_t>(std::distance(fs::directory_iterator(folder), fs::directory_iterator())); }

TEST(Sha256, GivesThePublishedValues) {  // FIPS 180-4 examples
  EXPECT_EQ(sha256_of(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256_of("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  const ScratchFolder folder;
  const std::string bytes(1'000'000, 'a');
  write_file(folder / "a", bytes);
  EXPECT_EQ(sha256_of_file(folder / "a"), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  Sha256 pieces;
  for (std::size_t i = 0; i < bytes.size(); i += 999) pieces.add(std::string_view(bytes).substr(i, 999));
  EXPECT_EQ(pieces.hex(), sha256_of(bytes));
}

TEST(AtomicFile, AppearsOnlyWhenItIsCommitted) {
  const ScratchFolder folder;
  {
    AtomicFile file(folder / "x");
    file.write("half");
    EXPECT_FALSE(fs::exists(folder / "x"));
  }
  EXPECT_EQ(num_entries(folder.path()), 0u);
  AtomicFile file(folder / "x");
  file.write("ab");
  file.write("c");
  EXPECT_EQ(file.num_bytes(), 3u);
  EXPECT_EQ(file.commit(), sha256_of("abc"));
  EXPECT_EQ(read_file(folder / "x"), "abc");
  EXPECT_EQ(num_entries(folder.path()), 1u);
}

TEST(AtomicFile, ReplacesAnOlderFileAsAWhole) {
  const ScratchFolder folder;
  write_file(folder / "x", "old");
  {
    AtomicFile file(folder / "x");
    file.write("new and never finished");
  }
  EXPECT_EQ(read_file(folder / "x"), "old");
  write_file(folder / "x", "new");
  EXPECT_EQ(read_file(folder / "x"), "new");
}

TEST(AtomicFile, AFullDiskIsAnErrorThatLeavesNothing) {
  const ScratchFolder folder;
  // A limit on file size stands for a full disk: the write call fails in the middle, with another code.
  rlimit before{};
  ::getrlimit(RLIMIT_FSIZE, &before);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{4096, before.rlim_max};
  ::setrlimit(RLIMIT_FSIZE, &small);
  const auto result = fails_with(ErrorKind::kResource, "cannot be written", [&] { write_file(folder / "x", std::string(100000, 'x')); });
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_TRUE(result);
  EXPECT_EQ(num_entries(folder.path()), 0u);
  EXPECT_TRUE(fails_with(ErrorKind::kResource, "check that the folder exists", [&] { write_file(folder / "absent/x", "x"); }));
}

TEST(ReadFile, ChecksKindAndSizeFirst) {
  const ScratchFolder folder;
  write_file(folder / "x", "12345");
  EXPECT_EQ(read_file(folder / "x", 5), "12345");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "5 bytes, more than the 4 allowed", [&] { read_file(folder / "x", 4); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "cannot be read", [&] { read_file(folder / "absent"); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "not a regular file", [&] { read_file(folder.path()); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "not a regular file", [&] { read_file("/dev/zero"); }));
  ASSERT_EQ(::mkfifo((folder / "pipe").c_str(), 0600), 0);
  EXPECT_TRUE(fails_with(ErrorKind::kData, "not a regular file", [&] { sha256_of_file(folder / "pipe"); }));
}

TEST(MappedFile, IsAPrivateCopyOnWriteView) {
  const ScratchFolder folder;
  write_file(folder / "x", std::string(10000, 'a'));
  const MappedFile file(folder / "x");
  EXPECT_EQ(file.text(), std::string(10000, 'a'));
  std::memset(const_cast<std::byte*>(file.bytes().data()), 'b', 10000);
  EXPECT_EQ(file.text(), std::string(10000, 'b'));
  EXPECT_EQ(read_file(folder / "x"), std::string(10000, 'a'));
  file.release(0, 4096);  // one whole page, whose changes are lost
  EXPECT_EQ(file.text(), std::string(4096, 'a') + std::string(10000 - 4096, 'b'));
  file.release(5000, 9000);  // no whole page within
  EXPECT_EQ(file.text()[6000], 'b');
}

TEST(MappedFile, OutlivesTheNameAndAnswersEmptyAndAbsentFiles) {
  const ScratchFolder folder;
  write_file(folder / "x", "text");
  MappedFile first(folder / "x");
  const MappedFile file(std::move(first));
  fs::remove(folder / "x");
  EXPECT_EQ(file.text(), "text");
  write_file(folder / "empty", "");
  EXPECT_TRUE(MappedFile(folder / "empty").bytes().empty());
  EXPECT_TRUE(fails_with(ErrorKind::kData, "cannot be read", [&] { MappedFile absent(folder / "absent"); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "not a regular file", [&] { MappedFile not_a_file(folder.path()); }));
}

TEST(CommitFolder, NeverReplacesWhatIsThere) {
  const ScratchFolder folder;
  fs::create_directory(folder / "new");
  write_file(folder / "new/x", "1");
  commit_folder(folder / "new", folder / "target");
  EXPECT_EQ(read_file(folder / "target/x"), "1");
  fs::create_directory(folder / "other");
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "exists already", [&] { commit_folder(folder / "other", folder / "target"); }));
  fs::create_symlink("nowhere", folder / "link");
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "exists already", [&] { commit_folder(folder / "other", folder / "link"); }));
  EXPECT_TRUE(fails_with(ErrorKind::kResource, "renamed", [&] { commit_folder(folder / "other", folder / "absent/target"); }));
}

TEST(FreeBytes, AsksTheNearestParentThatExists) {
  const ScratchFolder folder;
  EXPECT_GT(free_bytes(folder.path()), 0u);
  EXPECT_GT(free_bytes(folder / "not/yet/there"), 0u);
}

TEST(FolderLock, ASecondHolderIsToldOfTheFirst) {
  const ScratchFolder folder;
  {
    const FolderLock lock(folder.path());
    EXPECT_TRUE(fails_with(ErrorKind::kUsage, "process " + std::to_string(::getpid()), [&] { FolderLock second(folder.path()); }));
  }
  EXPECT_NO_THROW(FolderLock again(folder.path()));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "cannot be created", [&] { FolderLock absent(folder / "absent"); }));
}

TEST(FolderLock, EndsWithItsProcess) {
  const ScratchFolder folder;
  const pid_t child = ::fork();
  if (child == 0) {
    const FolderLock lock(folder.path());
    ::raise(SIGKILL);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFSIGNALED(status));
  EXPECT_NO_THROW(FolderLock after(folder.path()));
}

}  // namespace
}  // namespace alambic
