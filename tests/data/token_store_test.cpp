// SPDX-License-Identifier: Apache-2.0
#include "data/token_store.h"

#include <gtest/gtest.h>

#include <fstream>
#include <thread>

#include "core/files.h"
#include "core/random.h"
#include "data/hdf5.h"
#include "tests/killed_at.h"
#include "tests/support.h"

namespace alambic::data {
namespace {

using testing::fails_with;
using testing::killed_at;
using testing::ScratchFolder;

StoreInfo info_with(std::uint32_t vocabulary_size) {
  return {.tokenizer_hash = std::string(64, 'a'),
          .vocabulary_size = vocabulary_size,
          .sources = {{.name = "book", .origin = "a package", .licence = "CC-BY-SA-3.0", .language = "id"}, {.name = "talk", .origin = "", .licence = "", .language = ""}}};
}

Document document_number(std::uint64_t number, std::uint32_t vocabulary_size) {
  Document document;
  const std::uint64_t length = 1 + mix64(number) % 40;
  for (std::uint64_t i = 0; i < length; ++i) {
    document.ids.push_back(static_cast<std::uint32_t>(mix64(number * 1000 + i) % vocabulary_size));
    document.mask.push_back(i > 0 && mix64(number * 77 + i) % 3 != 0);
  }
  document.source = static_cast<std::uint16_t>(number % 2);
  document.num_bytes = length * 4;
  document.num_words = length / 2;
  return document;
}

// What prepare does: skips what is committed, appends the rest.
void write_store(const std::filesystem::path& folder, std::uint64_t num_documents, std::uint64_t tokens_per_shard, std::uint32_t part = 0, std::uint32_t num_parts = 1,
                 std::uint32_t vocabulary_size = 5000) {
  TokenStoreWriter writer(folder, info_with(vocabulary_size), tokens_per_shard, part, num_parts, {{"made", "by a test"}});
  if (!writer.complete()) {
    for (std::uint64_t i = part, n = 0; i < num_documents; i += num_parts, ++n)
      if (n >= writer.committed_documents()) writer.append(document_number(i, vocabulary_size), i);
  }
  writer.finish();
}

std::map<std::string, std::string> contents(const std::filesystem::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder))
    if (entry.is_regular_file()) files[std::filesystem::relative(entry.path(), folder)] = read_file(entry.path());
  return files;
}

void overwrite(const std::filesystem::path& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

// Changes index.json and gives it a fitting seal again, as an attacker would.
void edit_index(const std::filesystem::path& folder, const std::function<void(Json&)>& edit) {
  Json index = read_json_file(folder / "index.json");
  edit(index);
  index["index_sha256"] = std::string(64, '0');
  std::string text = index.dump(1) + "\n";
  text.replace(text.find(std::string(64, '0')), 64, sha256_of(text));
  overwrite(folder / "index.json", text);
}

void admit_shard(const std::filesystem::path& folder, const std::string& file) {
  edit_index(folder, [&](Json& index) {
    index["shards"][0]["sha256"] = sha256_of_file(folder / file);
    index["shards"][0]["file_bytes"] = std::filesystem::file_size(folder / file);
  });
}

TEST(TokenStore, GivesBackWhatWasWritten) {
  for (const std::uint32_t vocabulary_size : {65536u, 65537u, 300000u}) {
    const ScratchFolder scratch;
    constexpr std::uint64_t kDocuments = 3000;
    write_store(scratch / "store", kDocuments, 9000, 0, 1, vocabulary_size);
    const TokenStore store(scratch / "store");
    EXPECT_EQ(store.info().sources, info_with(1).sources);
    EXPECT_EQ(store.info().vocabulary_size, vocabulary_size);
    EXPECT_EQ(store.recipe().at("made"), "by a test");
    ASSERT_EQ(store.num_documents(), kDocuments);
    StoreTotals expected;
    for (std::uint64_t step = 0; step < kDocuments; ++step) {
      const std::uint64_t i = step * 1009 % kDocuments;  // out of order
      const Document wanted = document_number(i, vocabulary_size), found = store.read(i);
      ASSERT_EQ(found.ids, wanted.ids) << i;
      ASSERT_EQ(found.mask, wanted.mask) << i;
      ASSERT_EQ(store.length(i), wanted.ids.size());
      ASSERT_EQ(found.source, wanted.source);
      ASSERT_EQ(found.num_bytes, wanted.num_bytes);
      ASSERT_EQ(found.num_words, wanted.num_words);
      expected.tokens += wanted.ids.size();
      for (const std::uint8_t kept : wanted.mask) expected.trained_tokens += kept;
    }
    EXPECT_EQ(store.totals().tokens, expected.tokens);
    EXPECT_EQ(store.totals().trained_tokens, expected.trained_tokens);
    EXPECT_EQ(store.totals().documents, kDocuments);
  }
}

TEST(TokenStore, ReadsFromSeveralThreads) {
  const ScratchFolder scratch;
  write_store(scratch / "store", 4000, 20000);
  const TokenStore store(scratch / "store");
  std::vector<std::thread> threads;
  std::atomic<int> wrong = 0;
  for (std::uint64_t t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (std::uint64_t i = 0; i < 2000; ++i) {
        const std::uint64_t number = mix64(t * 10000 + i) % 4000;
        wrong += store.read(number).ids != document_number(number, 5000).ids;
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(TokenStore, AnErrorInAnotherThreadPrintsNothing) {
  const ScratchFolder folder;
  write_store(folder / "store", 50, 1 << 20);
  const TokenStore store(folder / "store");
  const fs::path shard = folder / "store" / "tokens-00000-000000.h5";
  {
    std::fstream file(shard, std::ios::binary | std::ios::in | std::ios::out);
    file.seekp(48);
    file << std::string(fs::file_size(shard) - 48, 'x');
  }
  ::testing::internal::CaptureStderr();
  std::thread([&] { EXPECT_TRUE(fails_with(ErrorKind::kData, "the shard is damaged", [&] { store.read(0); })); }).join();
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "");
}

TEST(TokenStore, BytesAreAFunctionOfTheContents) {
  const ScratchFolder scratch;
  write_store(scratch / "one", 300, 1000);
  std::this_thread::sleep_for(std::chrono::milliseconds(1100));  // a time stamp would change
  write_store(scratch / "two", 300, 1000);
  EXPECT_TRUE(contents(scratch / "one") == contents(scratch / "two"));
}

TEST(TokenStore, PartsMakeOneStore) {
  const ScratchFolder scratch;
  write_store(scratch / "store", 100, 300, 1, 3);
  write_store(scratch / "store", 100, 300, 0, 3);
  EXPECT_TRUE(fails_with(ErrorKind::kData, "unfinished token store", [&] { TokenStore(scratch / "store"); }));
  write_store(scratch / "store", 100, 300, 2, 3);
  const TokenStore store(scratch / "store");
  ASSERT_EQ(store.num_documents(), 100u);
  std::vector<std::uint64_t> order;
  for (std::uint64_t part = 0; part < 3; ++part)
    for (std::uint64_t i = part; i < 100; i += 3) order.push_back(i);
  for (std::uint64_t i = 0; i < 100; ++i) EXPECT_EQ(store.read(i).ids, document_number(order[i], 5000).ids);
  const auto before = contents(scratch / "store");
  write_store(scratch / "store", 100, 300, 1, 3);  // a finished part run again changes nothing
  EXPECT_TRUE(contents(scratch / "store") == before);
}

TEST(TokenStore, TwoWritersOfOnePartAreRefused) {
  const ScratchFolder scratch;
  TokenStoreWriter first(scratch / "store", info_with(10), 100, 0, 2);
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "another process", [&] { TokenStoreWriter(scratch / "store", info_with(10), 100, 0, 2); }));
  const TokenStoreWriter other_part(scratch / "store", info_with(10), 100, 1, 2);
}

TEST(TokenStore, RefusesToGoOnWithOtherSettings) {
  const ScratchFolder scratch;
  write_store(scratch / "store", 10, 100);
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "tokens_per_shard: was 100, now 200", [&] { write_store(scratch / "store", 10, 200); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "parts: was 1, now 2", [&] { write_store(scratch / "store", 10, 100, 1, 2); }));
  { TokenStoreWriter begun(scratch / "begun", info_with(10)); }
  StoreInfo other = info_with(10);
  other.sources[0].licence = "MIT";
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "sources[0].licence: was \"CC-BY-SA-3.0\", now \"MIT\"", [&] { TokenStoreWriter(scratch / "begun", other); }));
  std::filesystem::create_directories(scratch / "mine");
  overwrite(scratch / "mine/thesis.tex", "precious");
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "thesis.tex", [&] { TokenStoreWriter(scratch / "mine", info_with(10)); }));
}

TEST(TokenStore, RefusesImpossibleDocuments) {
  const ScratchFolder scratch;
  TokenStoreWriter writer(scratch / "store", info_with(10));
  EXPECT_TRUE(fails_with(ErrorKind::kBug, "token id 10", [&] { writer.append({.ids = {1, 10}, .mask = {0, 1}}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kBug, "first token", [&] { writer.append({.ids = {1, 2}, .mask = {1, 1}}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kBug, "mask values", [&] { writer.append({.ids = {1, 2}, .mask = {0}}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kBug, "source 2 of 2", [&] { writer.append({.ids = {1}, .mask = {0}, .source = 2}); }));
  TokenStoreWriter empty(scratch / "empty", info_with(10));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "no document", [&] { empty.finish(); }));
}

TEST(TokenStore, SurvivesAKillAtEverySystemCall) {
  const ScratchFolder scratch;
  const auto write = [&] { write_store(scratch / "store", 40, 500); };  // two shards
  write();
  const auto wanted = contents(scratch / "store");
  ASSERT_EQ(wanted.size(), 3u);
  int kills = 0;
  for (bool killed = true; killed; ++kills) {
    std::filesystem::remove_all(scratch / "store");
    killed = killed_at(kills, write);
    if (killed && !std::filesystem::exists(scratch / "store/index.json")) {
      EXPECT_TRUE(fails_with(ErrorKind::kData, "", [&] { TokenStore(scratch / "store"); }));
    }
    if (killed) write();  // goes on; once the index stands, nothing is left to do but to clean up
    ASSERT_TRUE(contents(scratch / "store") == wanted) << "killed at call " << kills;
  }
  EXPECT_GT(kills, 60);
}

TEST(TokenStore, EveryFlippedByteIsDetected) {
  const ScratchFolder scratch;
  write_store(scratch / "store", 20, 200);
  int flips = 0;
  for (const auto& [name, bytes] : contents(scratch / "store")) {
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      // In place: writing whole files again makes the file system flush each of them.
      std::fstream file(scratch / "store" / name, std::ios::binary | std::ios::in | std::ios::out);
      const auto put = [&](int letter) { file.seekp(static_cast<std::streamoff>(i)).put(static_cast<char>(letter)).flush(); };
      put(bytes[i] ^ (1 << (i % 8)));
      ASSERT_TRUE(fails_with(ErrorKind::kData, "", [&] { TokenStore(scratch / "store"); })) << name << " byte " << i;
      put(bytes[i]);
      ++flips;
    }
  }
  EXPECT_GT(flips, 5000);
  EXPECT_EQ(TokenStore(scratch / "store").num_documents(), 20u);
}

TEST(TokenStore, RefusesTruncatedAndMissingShards) {
  const ScratchFolder scratch;
  write_store(scratch / "store", 20, 1000);
  const std::string name = "tokens-00000-000000.h5", bytes = read_file(scratch / "store" / name);
  overwrite(scratch / "store" / name, bytes.substr(0, bytes.size() - 1));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "bytes, " + std::to_string(bytes.size()) + " expected", [&] { TokenStore(scratch / "store"); }));
  std::filesystem::rename(scratch / "store" / name, scratch / "elsewhere.h5");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "missing or not a regular file", [&] { TokenStore(scratch / "store"); }));
  std::filesystem::create_symlink(scratch / "elsewhere.h5", scratch / "store" / name);
  EXPECT_TRUE(fails_with(ErrorKind::kData, "missing or not a regular file", [&] { TokenStore(scratch / "store"); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "no such folder", [&] { TokenStore(scratch / "nothing"); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "no index.json", [&] { TokenStore(scratch.path()); }));
}

TEST(TokenStore, RefusesAHostileIndex) {
  const ScratchFolder scratch;
  const auto refused = [&](const std::string& words, const std::function<void(Json&)>& edit) {
    std::filesystem::remove_all(scratch / "store");
    write_store(scratch / "store", 20, 200);
    edit_index(scratch / "store", edit);
    return fails_with(ErrorKind::kData, words, [&] { TokenStore(scratch / "store"); });
  };
  EXPECT_TRUE(refused("is not the name of a shard", [](Json& index) { index["shards"][0]["file"] = "../../etc/passwd"; }));
  EXPECT_TRUE(refused("use a newer alambic", [](Json& index) { index["version"] = 2; }));
  EXPECT_TRUE(refused("not the index of a token store", [](Json& index) { index["format"] = "other"; }));
  EXPECT_TRUE(refused("impossible counts", [](Json& index) { index["shards"][0]["totals"]["tokens"] = 1ull << 60; }));
  EXPECT_TRUE(refused("another length", [](Json& index) { index["shards"][0]["totals"]["tokens"] = 1ull << 20; }));
  EXPECT_TRUE(refused("in a vocabulary of 7", [](Json& index) { index["vocabulary_size"] = 7; }));
  EXPECT_TRUE(refused("another type", [](Json& index) { index["vocabulary_size"] = 70000; }));
  EXPECT_TRUE(refused("not the sums", [](Json& index) { index["totals"]["words"] = 1; }));
  EXPECT_TRUE(refused("\"sources\" must be a list", [](Json& index) { index["sources"] = Json::array(); }));
  EXPECT_TRUE(refused("must be a list that is not empty", [](Json& index) { index["shards"] = Json::array(); }));
  // The index lies about the largest id: found when the ids are decoded.
  std::filesystem::remove_all(scratch / "store");
  write_store(scratch / "store", 20, 100000);
  edit_index(scratch / "store", [](Json& index) { index["shards"][0]["max_id"] = 4000; });
  const TokenStore store(scratch / "store");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "which the index states", [&] { store.read(0); }));
}

// A shard with a fitting hash whose HDF5 is not what alambic writes. `make` gets the path and the honest shard.
TEST(TokenStore, RefusesHostileShards) {
  const ScratchFolder scratch;
  const std::string name = "tokens-00000-000000.h5";
  const auto refused = [&](const std::string& words, const std::function<void(const std::filesystem::path&)>& change) {
    std::filesystem::remove_all(scratch / "store");
    write_store(scratch / "store", 20, 100000);
    {
      const std::lock_guard guard(hdf5_mutex());
      change(scratch / "store" / name);
    }
    admit_shard(scratch / "store", name);
    return fails_with(ErrorKind::kData, words, [&] { TokenStore(scratch / "store").read(0); });
  };
  const auto reopened = [](const std::filesystem::path& path, const std::function<void(hid_t)>& change) {
    const Hdf5Handle file(H5Fopen(path.c_str(), H5F_ACC_RDWR, H5P_DEFAULT), H5Fclose, "open");
    change(file);
  };
  const auto replaced = [&](const std::filesystem::path& path, const std::string& column, const std::function<void(hid_t)>& make) {
    reopened(path, [&](hid_t file) {
      ASSERT_GE(H5Ldelete(file, column.c_str(), H5P_DEFAULT), 0);
      make(file);
    });
  };
  const auto made = [](hid_t file, const char* column, hid_t type, hsize_t length, hid_t creation) {
    const Hdf5Handle space(H5Screate_simple(1, &length, nullptr), H5Sclose, "space");
    const Hdf5Handle data(H5Dcreate2(file, column, type, space, H5P_DEFAULT, creation, H5P_DEFAULT), H5Dclose, "data set");
  };
  constexpr auto nothing = [](const std::filesystem::path&) {};
  EXPECT_FALSE(refused("", nothing));  // the honest shard opens
  EXPECT_TRUE(refused("HDF5's signature", [](const auto& path) { overwrite(path, std::string(4096, 'x')); }));
  EXPECT_TRUE(refused("ends within the superblock", [](const auto& path) { overwrite(path, std::string(20, 'x')); }));
  EXPECT_TRUE(refused("superblock version 0", [](const auto& path) { Hdf5Handle(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT), H5Fclose, "create"); }));
  EXPECT_TRUE(refused("superblock extension", [](const auto& path) {
    const Hdf5Handle creation(H5Pcreate(H5P_FILE_CREATE), H5Pclose, "creation");
    H5Pset_file_space_strategy(creation, H5F_FSPACE_STRATEGY_PAGE, true, 1);
    const Hdf5Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose, "access");
    H5Pset_libver_bounds(access, H5F_LIBVER_V110, H5F_LIBVER_V110);
    Hdf5Handle(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, creation, access), H5Fclose, "create");
  }));
  EXPECT_TRUE(refused("is a link to elsewhere", [&](const auto& path) {
    replaced(path, "ids", [](hid_t file) { H5Lcreate_external("/etc/passwd", "/ids", file, "ids", H5P_DEFAULT, H5P_DEFAULT); });
  }));
  EXPECT_TRUE(refused("is a link to elsewhere", [&](const auto& path) { replaced(path, "ids", [](hid_t file) { H5Lcreate_soft("/mask", file, "ids", H5P_DEFAULT, H5P_DEFAULT); }); }));
  EXPECT_TRUE(refused("other members", [&](const auto& path) { reopened(path, [](hid_t file) { H5Lcreate_soft("/mask", file, "more", H5P_DEFAULT, H5P_DEFAULT); }); }));
  EXPECT_TRUE(refused("HDF5 cannot open \"ids\"", [&](const auto& path) {
    replaced(path, "ids", [](hid_t file) { Hdf5Handle(H5Gcreate2(file, "ids", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT), H5Gclose, "group"); });
  }));
  EXPECT_TRUE(refused("another type", [&](const auto& path) { replaced(path, "mask", [&](hid_t file) { made(file, "mask", H5T_STD_I64BE, 50, H5P_DEFAULT); }); }));
  EXPECT_TRUE(refused("another length", [&](const auto& path) { replaced(path, "source", [&](hid_t file) { made(file, "source", H5T_STD_U16LE, 1ull << 60, H5P_DEFAULT); }); }));
  EXPECT_TRUE(refused("not stored in chunks", [&](const auto& path) { replaced(path, "source", [&](hid_t file) { made(file, "source", H5T_STD_U16LE, 20, H5P_DEFAULT); }); }));
  EXPECT_TRUE(refused("another chunk size", [&](const auto& path) {
    const Hdf5Handle creation(H5Pcreate(H5P_DATASET_CREATE), H5Pclose, "creation");
    const hsize_t chunk = 10;
    H5Pset_chunk(creation, 1, &chunk);
    replaced(path, "source", [&](hid_t file) { made(file, "source", H5T_STD_U16LE, 20, creation); });
  }));
  EXPECT_TRUE(refused("other filters", [&](const auto& path) {
    const Hdf5Handle creation(H5Pcreate(H5P_DATASET_CREATE), H5Pclose, "creation");
    const hsize_t chunk = 20;
    H5Pset_chunk(creation, 1, &chunk);
    H5Pset_deflate(creation, 9);
    replaced(path, "source", [&](hid_t file) { made(file, "source", H5T_STD_U16LE, 20, creation); });
  }));
  EXPECT_TRUE(refused("not stored in chunks", [&](const auto& path) {  // a virtual data set that maps another file
    const Hdf5Handle creation(H5Pcreate(H5P_DATASET_CREATE), H5Pclose, "creation");
    const hsize_t length = 20;
    const Hdf5Handle space(H5Screate_simple(1, &length, nullptr), H5Sclose, "space");
    H5Pset_virtual(creation, space, "/tmp/other.h5", "source", space);
    replaced(path, "source", [&](hid_t file) { made(file, "source", H5T_STD_U16LE, 20, creation); });
  }));
  EXPECT_TRUE(refused("not stored in chunks", [&](const auto& path) {  // raw bytes of another file
    const Hdf5Handle creation(H5Pcreate(H5P_DATASET_CREATE), H5Pclose, "creation");
    H5Pset_external(creation, "/etc/passwd", 0, 40);
    replaced(path, "source", [&](hid_t file) { made(file, "source", H5T_STD_U16LE, 20, creation); });
  }));
  EXPECT_TRUE(refused("must begin at 0 and rise", [&](const auto& path) {
    replaced(path, "offsets", [](hid_t file) { write_column(file, "offsets", H5T_STD_U64LE, 21, 16384, std::vector<std::uint64_t>(21, 5).data()); });
  }));
  EXPECT_TRUE(refused("\"offsets\" end at 20", [&](const auto& path) {
    replaced(path, "offsets", [](hid_t file) {
      std::vector<std::uint64_t> offsets(21);
      for (std::size_t i = 0; i < 21; ++i) offsets[i] = i;
      write_column(file, "offsets", H5T_STD_U64LE, 21, 16384, offsets.data());
    });
  }));
  EXPECT_TRUE(refused("has source 9 of 2", [&](const auto& path) {
    replaced(path, "source", [](hid_t file) { write_column(file, "source", H5T_STD_U16LE, 20, 16384, std::vector<std::uint16_t>(20, 9).data()); });
  }));
  EXPECT_TRUE(refused("trains its first token", [&](const auto& path) {
    replaced(path, "mask", [&](hid_t file) {
      std::uint64_t tokens = 0;
      for (std::uint64_t i = 0; i < 20; ++i) tokens += document_number(i, 5000).ids.size();
      write_column(file, "mask", H5T_STD_U8LE, (tokens + 7) / 8, 16384, std::vector<std::uint8_t>(tokens, 255).data());
    });
  }));
}

}  // namespace
}  // namespace alambic::data
