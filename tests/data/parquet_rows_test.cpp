// SPDX-License-Identifier: Apache-2.0
#include "data/parquet_rows.h"

#include <gtest/gtest.h>

#include "core/files.h"
#include "core/json.h"
#include "tests/golden.h"
#include "tests/support.h"

namespace alambic::data {
namespace {

using ::alambic::testing::fails_with;
using ::alambic::testing::golden_path;
using ::alambic::testing::ScratchFolder;

std::vector<Json> rows_of(const std::filesystem::path& path) {
  ParquetRows rows(path);
  std::vector<Json> out;
  while (const auto line = rows.next_line()) out.push_back(parse_json(*line, path.string()));
  EXPECT_EQ(out.size(), rows.num_rows());
  return out;
}

// Files of pyarrow, from tests/oracle/parquet_rows_oracle.py: lists, structs, maps, bytes, and each compression.
class ParquetCodec : public ::testing::TestWithParam<const char*> {};

TEST_P(ParquetCodec, RowsAreThoseOfPyarrow) {
  const auto rows = rows_of(golden_path("parquet/" + std::string(GetParam()) + ".parquet"));
  std::istringstream lines(read_file(golden_path("parquet/rows.jsonl")));
  std::string line;
  std::size_t count = 0;
  for (; std::getline(lines, line); ++count) {
    ASSERT_LT(count, rows.size());
    EXPECT_EQ(to_line(rows[count]), to_line(parse_json(line, "rows.jsonl")));  // the order of keys counts too
  }
  EXPECT_EQ(count, 7u);
  EXPECT_EQ(count, rows.size());
}

INSTANTIATE_TEST_SUITE_P(All, ParquetCodec, ::testing::Values("none", "snappy", "gzip", "zstd", "lz4", "brotli"));

TEST(ParquetRows, OtherTypesAreText) {
  const auto rows = rows_of(golden_path("parquet/types.parquet"));
  ASSERT_EQ(rows.size(), 1u);
  EXPECT_EQ(rows[0]["day"], "2026-01-31");
  EXPECT_EQ(rows[0]["time"].get<std::string>().substr(0, 19), "2026-01-31 12:30:01");
  EXPECT_EQ(rows[0]["money"], "12.50");
  EXPECT_EQ(rows[0]["u"], 18446744073709551615ull);
  EXPECT_TRUE(rows[0]["nan"].is_null());
}

TEST(ParquetRowsDamage, IsAnErrorThatNamesTheFile) {
  const ScratchFolder scratch;
  EXPECT_TRUE(fails_with(ErrorKind::kData, "nowhere.parquet", [&] { ParquetRows(scratch / "nowhere.parquet"); }));
  write_file(scratch / "text.parquet", "this is no Parquet file");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "text.parquet: not a Parquet file", [&] { ParquetRows(scratch / "text.parquet"); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "not a Parquet file", [&] { ParquetRows(scratch.path()); }));
}

// Whatever is cut off or flipped, the process lives and says which file: rows may only be lost with an error.
TEST(ParquetRowsDamage, CutAndFlippedFilesNeverEndTheProcess) {
  const ScratchFolder scratch;
  const std::string whole = read_file(golden_path("parquet/snappy.parquet"));
  std::size_t refused = 0, read = 0;
  const auto attempt = [&](const std::string& bytes) {
    write_file(scratch / "damaged.parquet", bytes);
    try {
      ParquetRows rows(scratch / "damaged.parquet");
      while (rows.next_line()) {
      }
      ++read;
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kData);
      EXPECT_NE(std::string(error.what()).find("damaged.parquet"), std::string::npos);
      ++refused;
    }
  };
  for (std::size_t size = 0; size < whole.size(); size += 97) attempt(whole.substr(0, size));
  EXPECT_EQ(read, 0u) << "a file that is cut off was read to its end";
  for (std::size_t at = 0; at < whole.size(); at += 23) {
    std::string bytes = whole;
    bytes[at] = static_cast<char>(bytes[at] ^ 0x55);
    attempt(bytes);
  }
  EXPECT_GT(refused, 50u);
}

}  // namespace
}  // namespace alambic::data
