// SPDX-License-Identifier: Apache-2.0
#include "data/text_reader.h"

#include <gtest/gtest.h>
#include <zlib.h>
#include <zstd.h>

#include <fstream>

#include "core/files.h"
#include "tests/support.h"

namespace alambic::data {
namespace {

using testing::fails_with;
using testing::ScratchFolder;

void write(const std::filesystem::path& path, const std::string& bytes) {
  std::filesystem::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << bytes;
}

std::string gzipped(const std::string& text) {
  z_stream stream{};
  deflateInit2(&stream, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY);
  std::string out(text.size() + 1000, '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  deflate(&stream, Z_FINISH);
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}

std::string zstandard(const std::string& text) {
  std::string out(ZSTD_compressBound(text.size()), '\0');
  ZSTD_CCtx* context = ZSTD_createCCtx();
  ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 1);  // as the zstd program does
  out.resize(ZSTD_compress2(context, out.data(), out.size(), text.data(), text.size()));
  ZSTD_freeCCtx(context);
  return out;
}

std::vector<Record> records_of(const std::filesystem::path& path, std::uint64_t document_bytes = 0) {
  std::vector<Record> records;
  RecordReader reader(path, document_bytes);
  while (std::optional<Record> record = reader.next()) records.push_back(std::move(*record));
  return records;
}

std::string many_lines() {
  std::string text;
  for (int i = 0; i < 60000; ++i) text += "{\"text\": \"line number " + std::to_string(i * 7919) + "\"}\n";
  return text;
}

TEST(TextReader, ReadsJsonLinesBareAndCompressed) {
  const ScratchFolder scratch;
  const std::string text = many_lines(), half = text.substr(0, text.size() / 2), rest = text.substr(half.size());
  write(scratch / "a.jsonl", text);
  write(scratch / "b.jsonl.gz", gzipped(half) + gzipped(rest));      // two members
  write(scratch / "c.jsonl.zst", zstandard(half) + zstandard(rest));  // two frames
  // What pzstd writes: each frame behind a skippable one, which holds the frame's size.
  const std::string skippable("\x50\x2a\x4d\x18\x04\x00\x00\x00size", 12);
  write(scratch / "d.jsonl.zst", skippable + zstandard(half) + skippable + zstandard(rest));
  for (const char* name : {"a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.jsonl.zst"}) {
    const auto records = records_of(scratch / name);
    ASSERT_EQ(records.size(), 60000u) << name;
    for (std::size_t i = 0; i < records.size(); ++i) {
      ASSERT_EQ(records[i].text, "{\"text\": \"line number " + std::to_string(i * 7919) + "\"}");
      ASSERT_EQ(records[i].line, i + 1);
    }
  }
}

TEST(TextReader, DetectsEveryTruncationOfAnArchive) {
  const ScratchFolder scratch;
  const std::string text = "{\"text\": \"one\"}\n{\"text\": \"two\"}\n";
  for (const auto& [name, bytes] : {std::pair<std::string, std::string>{"a.jsonl.gz", gzipped(text)}, {"a.jsonl.zst", zstandard(text)}}) {
    for (std::size_t length = 5; length < bytes.size(); ++length) {
      write(scratch / name, bytes.substr(0, length));
      EXPECT_TRUE(fails_with(ErrorKind::kData, "archive ends early", [&] { records_of(scratch / name); })) << name << " " << length;
    }
    std::string damaged = bytes;
    damaged[bytes.size() / 2] = static_cast<char>(damaged[bytes.size() / 2] ^ 0x55);
    damaged[bytes.size() / 2 + 1] = static_cast<char>(damaged[bytes.size() / 2 + 1] ^ 0x55);
    write(scratch / name, damaged);
    EXPECT_TRUE(fails_with(ErrorKind::kData, "archive", [&] { records_of(scratch / name); })) << name;
  }
}

TEST(TextReader, DropsByteOrderMarksAndCarriageReturns) {
  const ScratchFolder scratch;
  write(scratch / "a.txt", "\xef\xbb\xbfone\r\ntwo\rthree\r\nlast");
  ASSERT_EQ(records_of(scratch / "a.txt").size(), 1u);
  EXPECT_EQ(records_of(scratch / "a.txt")[0].text, "one\ntwo\rthree\nlast\n");
  write(scratch / "b.jsonl", "\xef\xbb\xbf{\"text\": 1}\r\n\r\n  \n{\"text\": 2}");
  const auto records = records_of(scratch / "b.jsonl");
  ASSERT_EQ(records.size(), 2u);
  EXPECT_EQ(records[0].text, "{\"text\": 1}");
  EXPECT_EQ(records[1].line, 4u);
  write(scratch / "d.txt", "a lone one at the end\r");
  EXPECT_EQ(records_of(scratch / "d.txt").at(0).text, "a lone one at the end\r\n");
  write(scratch / "c.txt", "");
  EXPECT_TRUE(records_of(scratch / "c.txt").empty());
}

TEST(TextReader, CutsLongTextAtBlankLines) {
  const ScratchFolder scratch;
  std::string text;
  for (int i = 0; i < 50; ++i) text += "Paragraph " + std::to_string(i) + "\nof two lines.\n\n";
  write(scratch / "book.md", text);
  const auto records = records_of(scratch / "book.md", 100);
  ASSERT_GT(records.size(), 10u);
  std::string joined;
  for (std::size_t i = 0; i < records.size(); ++i) {
    joined += records[i].text;
    EXPECT_EQ(records[i].last_of_file, i + 1 == records.size());
    EXPECT_TRUE(records[i].text.starts_with("Paragraph ") && records[i].text.ends_with(".\n\n")) << records[i].text;
  }
  EXPECT_EQ(joined, text);
  EXPECT_EQ(records_of(scratch / "book.md").size(), 1u);
  // No blank line anywhere: at line ends, at twice the size.
  std::string lines;
  for (int i = 0; i < 100; ++i) lines += "ten bytes\n";
  write(scratch / "list.txt", lines);
  for (const Record& record : records_of(scratch / "list.txt", 100)) EXPECT_EQ(record.text.size(), 200u);
}

TEST(TextReader, NamesTheByteThatIsNotUtf8) {
  const ScratchFolder scratch;
  write(scratch / "a.txt", "fine\nna\xefve\n");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "a.txt:2: byte 3 of the line (0xef) is not UTF-8", [&] { records_of(scratch / "a.txt"); }));
  EXPECT_EQ(invalid_utf8("plain ascii of some length \xc3\xa9 \xf0\x9f\x91\x8b"), std::string::npos);
  for (const char* bad : {"\x80", "\xc0\xaf", "\xc1\x81", "\xe0\x80\x80", "\xed\xa0\x80", "\xf0\x80\x80\x80", "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xff", "\xc3", "\xe2\x82", "\xf0\x9f\x91"})
    EXPECT_EQ(invalid_utf8(std::string("12345678abc") + bad), 11u);
}

TEST(TextReader, RefusesEndlessLines) {
  const ScratchFolder scratch;
  std::string line(kMaxRecordBytes + 1000, 'x');
  write(scratch / "a.jsonl.gz", gzipped("{}\n" + line));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "a.jsonl.gz:2: a line of more than 64 MiB", [&] { records_of(scratch / "a.jsonl.gz"); }));
}

TEST(TextReader, RefusesArraysWithARemedy) {
  const ScratchFolder scratch;
  write(scratch / "a.json", "[{\"text\": \"a\"}]");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "jq -c", [&] { records_of(scratch / "a.json"); }));
}

TEST(TextReader, FindsFilesFoldersAndGlobs) {
  const ScratchFolder scratch;
  for (const char* name : {"x/b.txt", "x/a.md", "x/deep/c.jsonl.gz", "x/image.png", "x/.hidden/d.txt", "y1.txt", "y2.txt"}) write(scratch / name, "text");
  const std::string root = scratch.path().string();
  const auto names = [&](const std::vector<std::string>& paths) {
    std::string all;
    for (const auto& file : find_text_files(paths)) all += std::filesystem::relative(file, scratch.path()).string() + " ";
    return all;
  };
  EXPECT_EQ(names({root + "/x"}), "x/a.md x/b.txt x/deep/c.jsonl.gz ");
  EXPECT_EQ(names({root + "/y?.txt", root + "/x/b.txt", root + "/./y1.txt"}), "y1.txt y2.txt x/b.txt ");
  EXPECT_EQ(names({root + "/x", root + "/x/deep"}), "x/a.md x/b.txt x/deep/c.jsonl.gz ");
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "no such file", [&] { find_text_files({root + "/z*"}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "unknown ending", [&] { find_text_files({root + "/x/image.png"}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "no file of a known ending", [&] {
    std::filesystem::create_directories(root + "/empty");
    find_text_files({root + "/empty"});
  }));
}

TEST(TextReader, CountsWordsBetweenUnicodeSpaces) {
  EXPECT_EQ(count_words(""), 0u);
  EXPECT_EQ(count_words("  one\ttwo\n three "), 3u);
  EXPECT_EQ(count_words("a\xc2\xa0" "b\xe3\x80\x80" "c\xe2\x80\xa8" "d\xc2\x85" "e"), 5u);
  EXPECT_EQ(count_words("\xe6\x97\xa5\xe6\x9c\xac \xc3\xa9t\xc3\xa9"), 2u);
}

}  // namespace
}  // namespace alambic::data
