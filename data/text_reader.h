// SPDX-License-Identifier: Apache-2.0
#pragma once
// Files of text, one record after the other: plain text and Markdown, JSON lines and Parquet rows, bare or as .gz or .zst.
// What is read is streamed; a record is at most 64 MiB.
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace alambic::data {

inline constexpr std::size_t kMaxRecordBytes = 64ull << 20;

enum class FileKind { kText, kMarkdown, kJsonLines, kParquet };

/// From the file's ending (.txt .text .md .markdown .jsonl .ndjson .json .parquet; .gz or .zst behind it); nullopt for others.
std::optional<FileKind> file_kind(const std::filesystem::path& path);

/// Files, folders (searched below, files of known endings only, hidden ones left out) and globs, each sorted by name,
/// in the order given, without repeats. Error(kUsage) for a path or pattern that matches nothing; kData for a file of unknown ending.
std::vector<std::filesystem::path> find_text_files(const std::vector<std::string>& paths);

/// Bytes of a file, decompressed by its first bytes (gzip of several members, zstd of several frames).
/// Error(kData) when an archive is damaged or ends early.
class ByteReader {
 public:
  explicit ByteReader(const std::filesystem::path& path);
  ~ByteReader();
  ByteReader(ByteReader&&) noexcept;
  std::size_t read(char* into, std::size_t num_bytes);  // 0 at the end

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Lines without their end ("\n" or "\r\n"); a byte-order mark at the start of the file is dropped.
class LineReader {
 public:
  explicit LineReader(const std::filesystem::path& path);
  /// False at the end. Error(kData) "file:line: ..." for a line over kMaxRecordBytes.
  bool next(std::string& line);
  std::uint64_t line_number() const { return line_number_; }  // of the last line given, from 1

 private:
  std::filesystem::path path_;
  ByteReader bytes_;
  std::string buffer_;
  std::size_t begin_ = 0;
  bool at_end_ = false;
  std::uint64_t line_number_ = 0;
};

/// One record: the text of a document, or a JSON object still as text.
struct Record {
  std::string text;
  std::uint64_t line = 0;    // of the file, from 1; in Parquet the row
  bool last_of_file = true;  // plain text: false when the file goes on in the next document
};

/// Records of one file. Plain text: the whole file, or documents of about document_bytes cut at blank lines (at line ends
/// when a paragraph is longer). Line ends become "\n", the last line gets one; nothing else is changed. Blank lines between JSON
/// records are skipped.
/// Error(kData) "file:line: ..." for text that is not UTF-8.
class RecordReader {
 public:
  RecordReader(const std::filesystem::path& path, std::uint64_t document_bytes);
  ~RecordReader();
  std::optional<Record> next();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Offset of the first byte that is not well-formed UTF-8 (surrogates and overlong forms are not), or npos.
std::size_t invalid_utf8(std::string_view text);

/// Words as runs between Unicode white space.
std::uint64_t count_words(std::string_view text);

}  // namespace alambic::data
