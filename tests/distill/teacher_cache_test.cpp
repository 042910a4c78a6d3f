// SPDX-License-Identifier: Apache-2.0
#include "distill/teacher_cache.h"

#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <thread>

#include "core/files.h"
#include "core/random.h"
#include "data/batch_stream.h"
#include "data/hdf5.h"
#include "data/sealed_json.h"
#include "tests/killed_at.h"
#include "tests/support.h"
#include "tests/train/tiny_run.h"

namespace alambic::distill {
namespace {

using data::Hdf5Handle;
using testing::fails_with;
using testing::killed_at;
using testing::ScratchFolder;

constexpr std::uint64_t kDocuments = 200;  // four groups, the last one short
constexpr std::uint32_t kVocabulary = 5000;
constexpr std::int64_t kRowLength = 16;

struct Settings {
  SignalKind kind = SignalKind::kSampled;
  bool split_long = true;
  std::uint64_t rows_per_file = 600;
};

CacheHeader header_with(const std::string& store_hash, const Settings& settings) {
  return {.teacher = {.name = "teacher", .hash = std::string(64, 'a'), .family = "llama", .licence = "Apache-2.0", .compute_type = "f32", .parameters = 1000},
          .stores = {{.hash = std::string(64, 'e'), .documents = 10}, {.hash = store_hash, .documents = kDocuments}},
          .tokenizer_hash = "tiny",
          .form = {.kind = settings.kind, .slots = settings.kind == SignalKind::kTopK ? 5 : 12, .vocabulary_size = kVocabulary},
          .temperature = 1,
          .proposal_exponent = settings.kind == SignalKind::kWeighted ? 0.8 : 1,
          .seed = (1ull << 63) + 7,
          .row_length = kRowLength,
          .split_long = settings.split_long,
          .rows_per_batch = 1,
          .rows_per_file = settings.rows_per_file};
}

// What the teacher says of the token at `position` of a document: a function, so that every reader can be told.
struct Answer {
  std::vector<std::int32_t> ids;
  std::vector<std::uint32_t> codes;
  float tail = 0;
};

Answer answer_of(const SignalForm& form, std::uint64_t document, std::uint64_t position) {
  Answer answer{.ids = std::vector<std::int32_t>(static_cast<std::size_t>(form.slots), -1), .codes = std::vector<std::uint32_t>(static_cast<std::size_t>(form.slots))};
  const std::uint64_t key = mix64(document * 100'003 + position);
  if (form.kind == SignalKind::kTopK) {
    for (std::size_t n = 0; n < answer.ids.size(); ++n) {
      answer.ids[n] = static_cast<std::int32_t>(mix64(key + n) % kVocabulary);
      answer.codes[n] = narrow(0.5f / static_cast<float>(n + 1 + key % 7), form.mantissa_bits());
    }
    answer.tail = static_cast<float>(key % 1000) / 1000;
    return answer;
  }
  const std::size_t entries = 1 + key % 12;
  std::uint32_t left = static_cast<std::uint32_t>(12 - entries);
  for (std::size_t n = 0; n < entries; ++n) {
    answer.ids[n] = static_cast<std::int32_t>(400 * n + mix64(key + n) % 400);
    const auto more = static_cast<std::uint32_t>(n + 1 == entries ? left : mix64(key ^ n) % (left + 1));
    left -= more;
    answer.codes[n] = form.kind == SignalKind::kSampled ? 1 + more : static_cast<std::uint32_t>(mix64(key + n) % 249);
  }
  return answer;
}

std::vector<PieceSignal> pieces_of(const CacheHeader& header, std::uint64_t number, const data::Document& document) {
  std::vector<PieceSignal> pieces;
  const std::size_t length = document.ids.size(), row = static_cast<std::size_t>(header.row_length);
  for (std::size_t first = 0; first + 1 < length; first += row - 1) {
    PieceSignal piece;
    std::vector<std::int32_t> ids;
    std::vector<std::uint32_t> codes;
    std::vector<float> tails;
    for (std::size_t t = first + 1; t < std::min(length, first + row); ++t) {
      if (document.mask[t] == 0) continue;
      const Answer answer = answer_of(header.form, number, t);
      ids.insert(ids.end(), answer.ids.begin(), answer.ids.end());
      codes.insert(codes.end(), answer.codes.begin(), answer.codes.end());
      tails.push_back(answer.tail);
      ++piece.rows;
    }
    pack(header.form, static_cast<std::int64_t>(piece.rows), ids.data(), codes.data(), tails.data(), piece.bytes);
    pieces.push_back(std::move(piece));
    if (!header.split_long) break;
  }
  return pieces;
}

// Documents of the first store are never trained on: it stands there so that numbers through all stores differ from those in one.
void write_shard(const fs::path& folder, const std::vector<data::Document>& documents, const CacheHeader& header, std::uint32_t shard = 0, std::uint32_t num_shards = 1) {
  TeacherCacheWriter writer(folder, header, shard, num_shards);
  if (writer.complete()) return;
  const std::uint64_t all = header.num_documents();
  for (std::uint64_t local = writer.committed_documents(); local < writer.num_documents(); ++local) {
    const std::uint64_t group = local / kGroupDocuments * num_shards + shard, number = group * kGroupDocuments + local % kGroupDocuments;
    ASSERT_LT(number, all);
    const std::uint64_t first = header.stores[0].documents;
    writer.append(number < first ? std::vector<PieceSignal>() : pieces_of(header, number - first, documents[number - first]));
    if (local % kGroupDocuments == kGroupDocuments - 1 || local + 1 == writer.num_documents()) writer.end_group();
  }
  writer.finish();
}

struct Made {
  explicit Made(const fs::path& folder) : store_folder(folder) {
    testing::write_store(folder, kDocuments, 3, kVocabulary);
    const data::TokenStore store(folder);
    hash = store.hash();
    for (std::uint64_t i = 0; i < kDocuments; ++i) documents.push_back(store.read(i));
  }
  fs::path store_folder;
  std::string hash;
  std::vector<data::Document> documents;
};

CacheUse use_of(const CacheHeader& header) {
  return {.store_hashes = {header.stores[1].hash}, .tokenizer_hash = header.tokenizer_hash, .vocabulary_size = kVocabulary, .row_length = header.row_length, .split_long = header.split_long,
          .teacher_hash = header.teacher.hash, .temperature = 1.0};
}

// Compares with answer_of() through the trainer's own stream of batches; returns the number of rows.
std::uint64_t check_batches(const TeacherCache& cache, const Made& made, int steps) {
  const CacheHeader& header = cache.header();
  data::BatchStream stream({.mixture = {{.store = made.store_folder}}, .row_length = header.row_length, .rows_per_batch = 3, .batches_per_step = 1, .split_long = header.split_long, .seed = 4}, kVocabulary);
  std::uint64_t rows = 0;
  for (int step = 0; step < steps; ++step) {
    const data::Batch batch = stream.next_step().at(0);
    const SparseSignal signal = cache.signal(batch);
    EXPECT_EQ(signal.ids_KN.size(0), batch.num_kept);
    const auto* ids = signal.ids_KN.const_data_ptr<std::int32_t>();
    const auto* probabilities = signal.probabilities_KN.const_data_ptr<float>();
    const auto* tails = signal.tail_K.const_data_ptr<float>();
    std::int64_t t = 0;
    for (std::size_t i = 0; i < batch.origins.size(); ++i) {
      for (std::int64_t within = 0; within < batch.document_lengths[i]; ++within, ++t) {
        if (!batch.keep_T[t].item<bool>()) continue;
        const Answer wanted = answer_of(header.form, batch.origins[i].document, batch.origins[i].first_token + static_cast<std::uint64_t>(within) + 1);
        for (std::size_t n = 0; n < wanted.ids.size(); ++n) {
          const float p = wanted.ids[n] < 0                            ? 0.0f
                          : header.form.kind == SignalKind::kSampled ? static_cast<float>(wanted.codes[n]) / 12
                          : header.form.kind == SignalKind::kTopK    ? widen(wanted.codes[n], header.form.mantissa_bits())
                                                                     : widen(wanted.codes[n], kWeightMantissaBits) * kLargestWeight;
          EXPECT_EQ(ids[n], wanted.ids[n]);
          EXPECT_FLOAT_EQ(probabilities[n], p);
        }
        EXPECT_EQ(*tails++, wanted.tail);
        ids += header.form.slots, probabilities += header.form.slots;
        ++rows;
      }
    }
    if (::testing::Test::HasFailure()) return rows;
  }
  return rows;
}

std::map<std::string, std::string> contents(const fs::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(folder))
    if (entry.is_regular_file()) files[fs::relative(entry.path(), folder)] = read_file(entry.path());
  return files;
}

void overwrite(const fs::path& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

// Changes a shard's list and gives it a fitting seal again, as an attacker would.
void edit_list(const fs::path& path, const std::function<void(Json&)>& edit) {
  Json list = read_json_file(path);
  edit(list);
  list.erase("index_sha256");
  overwrite(path, data::sealed(list));
}

TEST(TeacherCache, GivesTheRowsOfEachBatch) {
  const ScratchFolder scratch;
  const Made made(scratch / "store");
  int number = 0;
  for (const SignalKind kind : {SignalKind::kSampled, SignalKind::kTopK, SignalKind::kWeighted}) {
    for (const bool split_long : {true, false}) {
      const fs::path folder = scratch / ("cache" + std::to_string(++number));
      const CacheHeader header = header_with(made.hash, {.kind = kind, .split_long = split_long});
      write_shard(folder, made.documents, header);
      TeacherCache cache(folder);
      EXPECT_EQ(to_json(cache.header()), to_json(header));
      EXPECT_EQ(cache.header().seed, header.seed);
      cache.use_for(use_of(header));
      EXPECT_GT(check_batches(cache, made, 200), 2000u);
      std::uint64_t rows = 0;
      for (const data::Document& document : made.documents)
        for (std::size_t t = 1; t < (split_long ? document.ids.size() : std::min<std::size_t>(document.ids.size(), kRowLength)); ++t) rows += document.mask[t];
      EXPECT_EQ(cache.totals().rows, rows);
      EXPECT_EQ(cache.totals().documents, kDocuments + 10);
      EXPECT_TRUE(fs::exists(folder / "signal-00000-of-00001-000001.h5"));
    }
  }
}

TEST(TeacherCache, ShardsHoldTheSame) {
  const ScratchFolder scratch;
  const Made made(scratch / "store");
  const CacheHeader header = header_with(made.hash, {});
  for (const std::uint32_t shard : {2u, 0u}) write_shard(scratch / "cache", made.documents, header, shard, 3);
  EXPECT_TRUE(fails_with(ErrorKind::kData, "1 of 3 shards are missing: 1", [&] { TeacherCache(scratch / "cache"); }));
  EXPECT_TRUE(is_teacher_cache(scratch / "cache"));
  EXPECT_FALSE(is_teacher_cache(scratch / "store"));
  write_shard(scratch / "cache", made.documents, header, 1, 3);
  TeacherCache cache(scratch / "cache");
  cache.use_for(use_of(header));
  EXPECT_EQ(cache.num_shards(), 3u);
  EXPECT_GT(check_batches(cache, made, 200), 2000u);
  const auto before = contents(scratch / "cache");
  write_shard(scratch / "cache", made.documents, header, 1, 3);  // a finished shard run again changes nothing
  EXPECT_TRUE(contents(scratch / "cache") == before);
  // More shards than groups: some hold nothing.
  for (std::uint32_t shard = 0; shard < 6; ++shard) write_shard(scratch / "many", made.documents, header, shard, 6);
  TeacherCache many(scratch / "many");
  many.use_for(use_of(header));
  EXPECT_GT(check_batches(many, made, 100), 1000u);
}

TEST(TeacherCache, ReadsFromSeveralThreads) {
  const ScratchFolder scratch;
  const Made made(scratch / "store");
  const CacheHeader header = header_with(made.hash, {.rows_per_file = 50});
  write_shard(scratch / "cache", made.documents, header);
  TeacherCache cache(scratch / "cache");
  cache.use_for(use_of(header));
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) threads.emplace_back([&] { EXPECT_NO_THROW(check_batches(cache, made, 60)); });
  for (std::thread& thread : threads) thread.join();
}

TEST(TeacherCache, SurvivesAKillAtEverySystemCall) {
  const ScratchFolder scratch;
  const Made made(scratch / "store");
  const CacheHeader header = header_with(made.hash, {.rows_per_file = 1200});
  const auto write = [&] { write_shard(scratch / "cache", made.documents, header); };
  write();
  const auto wanted = contents(scratch / "cache");
  ASSERT_EQ(wanted.size(), 3u);  // two files and the list
  int kills = 0;
  for (bool killed = true; killed; ++kills) {
    fs::remove_all(scratch / "cache");
    killed = killed_at(kills, write);
    if (killed && !fs::exists(scratch / "cache/shard-00000-of-00001.json")) {
      EXPECT_TRUE(fails_with(ErrorKind::kData, "", [&] { TeacherCache(scratch / "cache"); }));
    }
    if (killed) write();  // goes on
    ASSERT_TRUE(contents(scratch / "cache") == wanted) << "killed at call " << kills;
  }
  EXPECT_GT(kills, 40);
}

TEST(TeacherCache, EveryFlippedByteIsDetected) {
  const ScratchFolder scratch;
  const Made made(scratch / "store");
  write_shard(scratch / "cache", made.documents, header_with(made.hash, {.rows_per_file = 1 << 20}));
  std::size_t flips = 0;
  for (const auto& [name, bytes] : contents(scratch / "cache")) {
    for (std::size_t i = 0; i < bytes.size(); i += 1 + bytes.size() / 4000) {
      std::fstream file(scratch / "cache" / name, std::ios::binary | std::ios::in | std::ios::out);
      const auto put = [&](int letter) { file.seekp(static_cast<std::streamoff>(i)).put(static_cast<char>(letter)).flush(); };
      put(bytes[i] ^ (1 << (i % 8)));
      ASSERT_TRUE(fails_with(ErrorKind::kData, "", [&] { TeacherCache(scratch / "cache"); })) << name << " byte " << i;
      put(bytes[i]);
      ++flips;
    }
  }
  EXPECT_GT(flips, 4000u);
  EXPECT_EQ(TeacherCache(scratch / "cache").totals().documents, kDocuments + 10);
}

TEST(TeacherCache, RefusesShardsThatDoNotBelongTogether) {
  const ScratchFolder scratch;
  const Made made(scratch / "store");
  const CacheHeader header = header_with(made.hash, {});
  CacheHeader other = header;
  other.teacher.hash.assign(64, 'b');
  for (const std::uint32_t shard : {0u, 1u}) write_shard(scratch / "cache", made.documents, header, shard, 2), write_shard(scratch / "other", made.documents, other, shard, 2);
  const auto refused = [&](const std::string& words, const std::function<void(const fs::path&)>& change) {
    fs::remove_all(scratch / "copy");
    fs::copy(scratch / "cache", scratch / "copy");
    change(scratch / "copy");
    return fails_with(ErrorKind::kData, words, [&] { TeacherCache(scratch / "copy"); });
  };
  const auto from = [](const fs::path& source, const fs::path& target) { fs::copy_file(source, target, fs::copy_options::overwrite_existing); };
  EXPECT_FALSE(refused("", [](const fs::path&) {}));
  EXPECT_TRUE(refused("1 of 2 shards are missing: 0", [](const fs::path& copy) { fs::remove(copy / "shard-00000-of-00002.json"); }));
  EXPECT_TRUE(refused("a shard twice", [&](const fs::path& copy) { from(copy / "shard-00000-of-00002.json", copy / "shard-00001-of-00002.json"); }));
  EXPECT_TRUE(refused("is of another cache than the other shards: teacher.sha256: was \"aaaaaaaa",
                      [&](const fs::path& copy) { from(scratch / "other/shard-00001-of-00002.json", copy / "shard-00001-of-00002.json"); }));
  EXPECT_TRUE(refused("damaged: SHA-256", [&](const fs::path& copy) { from(scratch / "other/signal-00001-of-00002-000000.h5", copy / "signal-00001-of-00002-000000.h5"); }));
  EXPECT_TRUE(refused("in 2 and of one in 3 parts", [&](const fs::path& copy) {
    write_shard(scratch / "three", made.documents, header, 0, 3);
    from(scratch / "three/shard-00000-of-00003.json", copy / "shard-00000-of-00003.json");
  }));
  const std::string name = "signal-00000-of-00002-000000.h5", bytes = read_file(scratch / "cache" / name);
  EXPECT_TRUE(refused("bytes, " + std::to_string(bytes.size()) + " expected", [&](const fs::path& copy) { overwrite(copy / name, bytes.substr(0, bytes.size() - 1)); }));
  EXPECT_TRUE(refused("missing or not a regular file", [&](const fs::path& copy) { fs::remove(copy / name); }));
  EXPECT_TRUE(refused("missing or not a regular file", [&](const fs::path& copy) {
    fs::remove(copy / name);
    fs::create_symlink(scratch / "cache" / name, copy / name);
  }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "no such folder", [&] { TeacherCache(scratch / "nothing"); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "not a teacher cache", [&] { TeacherCache(scratch / "store"); }));
}

TEST(TeacherCache, RefusesAHostileList) {
  const ScratchFolder scratch;
  const Made made(scratch / "store");
  write_shard(scratch / "cache", made.documents, header_with(made.hash, {}));
  const auto refused = [&](const std::string& words, const std::function<void(Json&)>& edit) {
    fs::remove_all(scratch / "copy");
    fs::copy(scratch / "cache", scratch / "copy");
    edit_list(scratch / "copy/shard-00000-of-00001.json", edit);
    return fails_with(ErrorKind::kData, words, [&] { TeacherCache(scratch / "copy"); });
  };
  EXPECT_FALSE(refused("", [](Json&) {}));
  EXPECT_TRUE(refused("is not the name of a cache's file", [](Json& list) { list["files"][0]["file"] = "../../etc/passwd"; }));
  EXPECT_TRUE(refused("where signal-00000-of-00001-000001.h5 must be", [](Json& list) { list["files"][1] = list["files"][0]; }));
  EXPECT_TRUE(refused("use a newer alambic", [](Json& list) { list["version"] = 2; }));
  EXPECT_TRUE(refused("not the list of a teacher cache's shard", [](Json& list) { list["format"] = "other"; }));
  EXPECT_TRUE(refused("impossible counts", [](Json& list) { list["files"][0]["totals"]["rows"] = 1ull << 60; }));
  EXPECT_TRUE(refused("impossible counts", [](Json& list) { list["files"][0]["totals"]["bytes"] = 1ull << 60; }));
  EXPECT_TRUE(refused("another length", [](Json& list) { list["files"][0]["totals"]["pieces"] = 1ull << 20; }));
  EXPECT_TRUE(refused("must begin at 0, never fall, and end at", [](Json& list) { list["files"][0]["totals"]["rows"] = list["files"][0]["totals"]["rows"].get<int>() + 1; }));
  EXPECT_TRUE(refused("\"totals\" are not the sums", [](Json& list) { list["totals"]["rows"] = 1; }));
  EXPECT_TRUE(refused("but this shard has", [](Json& list) { list["stores"][0]["documents"] = 11; }));
  EXPECT_TRUE(refused("impossible", [](Json& list) { list["stores"][0]["documents"] = INT64_MAX; }));
  EXPECT_TRUE(refused("\"kind\" is \"other\"", [](Json& list) { list["kind"] = "other"; }));
  EXPECT_TRUE(refused("draws: 0 is not between", [](Json& list) { list["slots"] = 0; }));
  EXPECT_TRUE(refused("draws: 1099511627776 is not between", [](Json& list) { list["slots"] = 1ull << 40; }));
  EXPECT_TRUE(refused("cannot be cached", [](Json& list) { list["vocabulary_size"] = 1ull << 40; }));
  EXPECT_TRUE(refused("\"row_length\" is 1", [](Json& list) { list["row_length"] = 1; }));
  EXPECT_TRUE(refused("group_documents: was 1, now 64", [](Json& list) { list["group_documents"] = 1; }));
  EXPECT_TRUE(refused("says that it is shard 7 of 1", [](Json& list) { list["shard"] = 7; }));
  EXPECT_TRUE(refused("name", [](Json& list) { list["teacher"] = 7; }));
  // A smaller vocabulary than the ids need: other widths, seen when rows are read.
  fs::remove_all(scratch / "copy");
  fs::copy(scratch / "cache", scratch / "copy");
  edit_list(scratch / "copy/shard-00000-of-00001.json", [](Json& list) { list["vocabulary_size"] = 4097; });
  const TeacherCache cache(scratch / "copy");
  data::BatchStream stream({.mixture = {{.store = scratch / "store"}}, .row_length = kRowLength, .split_long = true}, kVocabulary);
  EXPECT_TRUE(fails_with(ErrorKind::kData, "the cache is damaged: row", [&] {
    for (int i = 0; i < 50; ++i) {
      data::Batch batch = stream.next_step().at(0);
      for (data::Origin& origin : batch.origins) origin.store = 1;
      cache.signal(batch);
    }
  }));
}

// A file with a fitting hash whose HDF5 is not what alambic writes.
TEST(TeacherCache, RefusesHostileFiles) {
  const ScratchFolder scratch;
  const Made made(scratch / "store");
  write_shard(scratch / "cache", made.documents, header_with(made.hash, {.rows_per_file = 1 << 20}));
  const std::string name = "signal-00000-of-00001-000000.h5";
  const auto refused = [&](const std::string& words, const std::function<void(hid_t)>& change) {
    fs::remove_all(scratch / "copy");
    fs::copy(scratch / "cache", scratch / "copy");
    {
      const std::lock_guard guard(data::hdf5_mutex());
      const Hdf5Handle file(H5Fopen((scratch / "copy" / name).c_str(), H5F_ACC_RDWR, H5P_DEFAULT), H5Fclose, "open");
      change(file);
    }
    edit_list(scratch / "copy/shard-00000-of-00001.json", [&](Json& list) {
      list["files"][0]["sha256"] = sha256_of_file(scratch / "copy" / name);
      list["files"][0]["file_bytes"] = fs::file_size(scratch / "copy" / name);
    });
    return fails_with(ErrorKind::kData, words, [&] { TeacherCache(scratch / "copy"); });
  };
  const auto replaced = [](const char* column, hid_t type, std::uint64_t count, std::uint64_t chunk, const void* values) {
    return [=](hid_t file) {
      ASSERT_GE(H5Ldelete(file, column, H5P_DEFAULT), 0);
      data::write_column(file, column, type, count, chunk, values);
    };
  };
  const TeacherCache honest(scratch / "cache");
  const std::uint64_t pieces = honest.totals().pieces, documents = honest.totals().documents, bytes = honest.totals().bytes;
  EXPECT_FALSE(refused("", [](hid_t) {}));
  EXPECT_TRUE(refused("is a link to elsewhere", [](hid_t file) {
    H5Ldelete(file, "signal", H5P_DEFAULT);
    H5Lcreate_external("/etc/passwd", "/signal", file, "signal", H5P_DEFAULT, H5P_DEFAULT);
  }));
  EXPECT_TRUE(refused("other members", [](hid_t file) { H5Lcreate_soft("/signal", file, "more", H5P_DEFAULT, H5P_DEFAULT); }));
  const std::vector<std::uint8_t> zeros(bytes + 8);
  EXPECT_TRUE(refused("another length", replaced("signal", H5T_STD_U8LE, bytes, 65'536, zeros.data())));
  EXPECT_TRUE(refused("another chunk size", replaced("signal", H5T_STD_U8LE, bytes + 8, 100, zeros.data())));
  EXPECT_TRUE(refused("another type", [&](hid_t file) { replaced("offsets", H5T_STD_U32LE, pieces + 1, 16'384, std::vector<std::uint32_t>(pieces + 1).data())(file); }));
  const auto rising = [](std::uint64_t count, std::uint64_t last) {
    std::vector<std::uint32_t> values(count, static_cast<std::uint32_t>(last));
    values[0] = 0;
    return values;
  };
  EXPECT_TRUE(refused("\"first_piece\" must begin at 0", [&](hid_t file) {
    std::vector<std::uint32_t> values = rising(documents + 1, pieces);
    values[5] = 0, values[4] = 1;
    replaced("first_piece", H5T_STD_U32LE, documents + 1, 16'384, values.data())(file);
  }));
  EXPECT_TRUE(refused("\"first_row\" must begin at 0", [&](hid_t file) { replaced("first_row", H5T_STD_U32LE, pieces + 1, 16'384, rising(pieces + 1, 1).data())(file); }));
  EXPECT_TRUE(refused("has more bytes than its", [&](hid_t file) {
    std::vector<std::uint64_t> values(pieces + 1, bytes);
    values[0] = 0;
    replaced("offsets", H5T_STD_U64LE, pieces + 1, 16'384, values.data())(file);
  }));
}

TEST(TeacherCache, RefusesAnotherUse) {
  const ScratchFolder scratch;
  const Made made(scratch / "store");
  const CacheHeader header = header_with(made.hash, {});
  write_shard(scratch / "cache", made.documents, header);
  TeacherCache cache(scratch / "cache");
  const auto refused = [&](ErrorKind kind, const std::string& words, const std::function<void(CacheUse&)>& change) {
    CacheUse use = use_of(header);
    change(use);
    return fails_with(kind, words, [&] { cache.use_for(use); });
  };
  EXPECT_FALSE(refused(ErrorKind::kData, "", [](CacheUse&) {}));
  EXPECT_TRUE(refused(ErrorKind::kData, "is of another teacher: teacher with SHA-256 aaa", [](CacheUse& use) { use.teacher_hash.assign(64, 'c'); }));
  EXPECT_TRUE(refused(ErrorKind::kData, "another tokenizer (tiny)", [](CacheUse& use) { use.tokenizer_hash = "other"; }));
  EXPECT_TRUE(refused(ErrorKind::kData, "its tokenizer has 5000 tokens, the student only 4999", [](CacheUse& use) { use.vocabulary_size = 4999; }));
  EXPECT_FALSE(refused(ErrorKind::kData, "", [](CacheUse& use) { use.vocabulary_size = 5120; }));  // padding
  EXPECT_TRUE(refused(ErrorKind::kData, "has no signal for token store 1 of the mixture", [](CacheUse& use) { use.store_hashes.emplace_back(64, 'f'); }));
  EXPECT_TRUE(refused(ErrorKind::kUsage, "by row_length 16 and split_long true, the config says 32", [](CacheUse& use) { use.row_length = 32; }));
  EXPECT_TRUE(refused(ErrorKind::kUsage, "the config says 16 and false", [](CacheUse& use) { use.split_long = false; }));
  EXPECT_TRUE(refused(ErrorKind::kUsage, "temperature is 1, the config says 2", [](CacheUse& use) { use.temperature = 2; }));
  EXPECT_FALSE(refused(ErrorKind::kUsage, "", [](CacheUse& use) { use.teacher_hash.clear(), use.tokenizer_hash.clear(), use.temperature.reset(), use.vocabulary_size = 0; }));

  // Batches that were cut otherwise, though the config said nothing of it.
  data::BatchStream other({.mixture = {{.store = scratch / "store"}}, .row_length = 20, .split_long = true}, kVocabulary);
  const auto read = [&] {
    for (int i = 0; i < 20; ++i) cache.signal(other.next_step().at(0));
  };
  EXPECT_TRUE(fails_with(ErrorKind::kData, "train with the row_length and split_long of the cache", read));
  data::Batch beyond = other.next_step().at(0);
  beyond.origins[0].document = kDocuments;
  EXPECT_TRUE(fails_with(ErrorKind::kData, "the cache's store has only 200", [&] { cache.signal(beyond); }));
}

TEST(TeacherCache, RefusesToGoOnWithOtherSettings) {
  const ScratchFolder scratch;
  const Made made(scratch / "store");
  const CacheHeader header = header_with(made.hash, {});
  const TeacherCacheWriter first(scratch / "cache", header, 0, 2);
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "another process", [&] { TeacherCacheWriter(scratch / "cache", header, 0, 2); }));
  write_shard(scratch / "cache", made.documents, header, 1, 2);
  CacheHeader other = header;
  other.seed = 8;
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "seed: was 9223372036854775815, now 8", [&] { TeacherCacheWriter(scratch / "cache", other, 1, 2); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "shards: was 2, now 3", [&] { TeacherCacheWriter(scratch / "cache", header, 0, 3); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "shard: 2/2", [&] { TeacherCacheWriter(scratch / "new", header, 2, 2); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "holds other files (", [&] { TeacherCacheWriter(scratch / "store", header); }));
  { const TeacherCacheWriter begun(scratch / "begun", header); }
  EXPECT_TRUE(fails_with(ErrorKind::kData, "unfinished teacher cache", [&] { TeacherCache(scratch / "begun"); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "seed: was", [&] { TeacherCacheWriter(scratch / "begun", other); }));
}

}  // namespace
}  // namespace alambic::distill
