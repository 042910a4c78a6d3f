// SPDX-License-Identifier: Apache-2.0
#include "data/text_reader.h"

#include <fcntl.h>
#include <glob.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <set>

#include "core/error.h"
#include "data/parquet_rows.h"

namespace alambic::data {
namespace fs = std::filesystem;
namespace {

constexpr std::size_t kBlockBytes = 1 << 17;

std::string lower(std::string text) {
  for (char& letter : text)
    if (letter >= 'A' && letter <= 'Z') letter = static_cast<char>(letter - 'A' + 'a');
  return text;
}

void add_folder(const fs::path& folder, std::set<fs::path>& found) {
  for (auto entry = fs::recursive_directory_iterator(folder); entry != fs::recursive_directory_iterator(); ++entry) {
    const bool hidden = entry->path().filename().string().starts_with(".");
    if (hidden && entry->is_directory()) entry.disable_recursion_pending();
    if (!hidden && entry->is_regular_file() && file_kind(entry->path())) found.insert(entry->path());
  }
}

std::vector<fs::path> matches(const std::string& pattern) {
  glob_t found{};
  const int code = ::glob(pattern.c_str(), 0, nullptr, &found);
  std::vector<fs::path> paths(found.gl_pathv, found.gl_pathv + (code == 0 ? found.gl_pathc : 0));
  ::globfree(&found);
  return paths;
}

}  // namespace

std::optional<FileKind> file_kind(const fs::path& path) {
  std::string name = lower(path.filename().string());
  for (const std::string_view ending : {".gz", ".zst"})
    if (name.ends_with(ending)) {
      name.resize(name.size() - ending.size());
      break;
    }
  for (const std::string_view ending : {".txt", ".text"})
    if (name.ends_with(ending)) return FileKind::kText;
  for (const std::string_view ending : {".md", ".markdown"})
    if (name.ends_with(ending)) return FileKind::kMarkdown;
  for (const std::string_view ending : {".jsonl", ".ndjson", ".json"})
    if (name.ends_with(ending)) return FileKind::kJsonLines;
  if (name.ends_with(".parquet")) return name.size() == path.filename().string().size() ? std::optional(FileKind::kParquet) : std::nullopt;
  return std::nullopt;
}

std::vector<fs::path> find_text_files(const std::vector<std::string>& paths) {
  std::vector<fs::path> files;
  std::set<fs::path> seen;
  const auto add = [&](const fs::path& file) {
    if (seen.insert(file.lexically_normal()).second) files.push_back(file);
  };
  const Remedy endings{"use .txt, .md, .jsonl (each also with .gz or .zst behind) or .parquet"};
  for (const std::string& path : paths) {
    const bool exists = fs::exists(path);
    const std::vector<fs::path> named = exists ? std::vector<fs::path>{path} : matches(path);
    if (named.empty())
      fail(ErrorKind::kUsage, path, ": no such file or folder, and no file fits it as a pattern", Remedy{"check the path; patterns know *, ? and [a-z]"});
    for (const fs::path& name : named) {
      if (fs::is_directory(name)) {
        std::set<fs::path> below;
        add_folder(name, below);
        if (below.empty()) fail(ErrorKind::kUsage, name.string(), ": no file of a known ending in this folder", endings);
        for (const fs::path& file : below) add(file);
        continue;
      }
      if (!file_kind(name)) fail(ErrorKind::kData, name.string(), ": a file of unknown ending", endings);
      add(name);
    }
  }
  return files;
}

// ---- bytes ----

struct ByteReader::State {
  fs::path path;
  int descriptor = -1;
  std::vector<char> block = std::vector<char>(kBlockBytes);  // as on disk
  std::size_t begin = 0, end = 0;
  enum class Archive { kNone, kGzip, kZstd } archive = Archive::kNone;
  z_stream gzip{};
  ZSTD_DStream* zstd = nullptr;
  bool inside = false;  // of a gzip member or zstd frame

  ~State() {
    if (descriptor >= 0) ::close(descriptor);
    if (archive == Archive::kGzip) inflateEnd(&gzip);
    ZSTD_freeDStream(zstd);
  }
  [[noreturn]] void damaged(const char* what) const {
    fail(ErrorKind::kData, path.string(), ": ", what, Remedy{"fetch or compress the file again"});
  }
  bool refill() {  // false at the end of the file
    for (;;) {
      const ssize_t got = ::read(descriptor, block.data(), block.size());
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) fail(ErrorKind::kData, path.string(), ": cannot be read: ", std::strerror(errno));
      begin = 0;
      end = static_cast<std::size_t>(got);
      return got > 0;
    }
  }
  std::size_t read_gzip(char* into, std::size_t num_bytes);
  std::size_t read_zstd(char* into, std::size_t num_bytes);
};

ByteReader::ByteReader(const fs::path& path) : state_(std::make_unique<State>()) {
  State& state = *state_;
  state.path = path;
  state.descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (state.descriptor < 0) fail(ErrorKind::kData, path.string(), ": cannot be read: ", std::strerror(errno));
  state.refill();
  const auto starts_with = [&](std::string_view magic) { return state.end >= magic.size() && std::memcmp(state.block.data(), magic.data(), magic.size()) == 0; };
  if (starts_with("\x1f\x8b")) {
    if (inflateInit2(&state.gzip, 15 + 16) != Z_OK) fail(ErrorKind::kResource, "zlib cannot begin: out of memory");
    state.archive = State::Archive::kGzip;
  } else if (starts_with("\x28\xb5\x2f\xfd") || (state.end >= 4 && (state.block[0] & 0xF0) == 0x50 && std::memcmp(&state.block[1], "\x2a\x4d\x18", 3) == 0)) {
    // The second form is a skippable frame (RFC 8878, 3.1.2), with which pzstd begins its files.
    state.zstd = ZSTD_createDStream();
    // A frame may ask for a window of 2 GB of memory; 128 MiB is what zstd itself allows unless told otherwise.
    ZSTD_DCtx_setParameter(state.zstd, ZSTD_d_windowLogMax, 27);
    state.archive = State::Archive::kZstd;
  }
}
ByteReader::~ByteReader() = default;
ByteReader::ByteReader(ByteReader&&) noexcept = default;

std::size_t ByteReader::State::read_gzip(char* into, std::size_t num_bytes) {
  gzip.next_out = reinterpret_cast<Bytef*>(into);
  gzip.avail_out = static_cast<uInt>(num_bytes);
  while (gzip.avail_out == num_bytes) {
    if (begin == end && !refill()) {
      if (inside) damaged("the gzip archive ends early");
      return 0;
    }
    gzip.next_in = reinterpret_cast<Bytef*>(block.data() + begin);
    gzip.avail_in = static_cast<uInt>(end - begin);
    inside = true;
    const int code = inflate(&gzip, Z_NO_FLUSH);
    begin = end - gzip.avail_in;
    if (code == Z_STREAM_END) {  // another member may follow
      inside = false;
      inflateReset(&gzip);
    } else if (code != Z_OK && code != Z_BUF_ERROR) {
      damaged("the gzip archive is damaged");
    }
  }
  return num_bytes - gzip.avail_out;
}

std::size_t ByteReader::State::read_zstd(char* into, std::size_t num_bytes) {
  ZSTD_outBuffer out{into, num_bytes, 0};
  while (out.pos == 0) {
    if (begin == end && !refill()) {
      if (inside) damaged("the zstd archive ends early");
      return 0;
    }
    ZSTD_inBuffer in{block.data(), end, begin};
    const std::size_t hint = ZSTD_decompressStream(zstd, &out, &in);
    begin = in.pos;
    if (ZSTD_isError(hint)) fail(ErrorKind::kData, path.string(), ": the zstd archive is damaged: ", ZSTD_getErrorName(hint), Remedy{"fetch or compress the file again"});
    inside = hint != 0;
  }
  return out.pos;
}

std::size_t ByteReader::read(char* into, std::size_t num_bytes) {
  State& state = *state_;
  num_bytes = std::min(num_bytes, std::size_t{1} << 30);
  if (state.archive == State::Archive::kGzip) return state.read_gzip(into, num_bytes);
  if (state.archive == State::Archive::kZstd) return state.read_zstd(into, num_bytes);
  if (state.begin == state.end && !state.refill()) return 0;
  const std::size_t here = std::min(num_bytes, state.end - state.begin);
  std::memcpy(into, state.block.data() + state.begin, here);
  state.begin += here;
  return here;
}

// ---- lines ----

LineReader::LineReader(const fs::path& path) : path_(path), bytes_(path) {}

bool LineReader::next(std::string& line) {
  std::size_t searched = begin_;
  for (;;) {
    const std::size_t found = buffer_.find('\n', searched);
    if (found != std::string::npos || (at_end_ && begin_ < buffer_.size())) {
      const std::size_t stop = found == std::string::npos ? buffer_.size() : found;
      line.assign(buffer_, begin_, stop - begin_);
      begin_ = found == std::string::npos ? stop : stop + 1;
      ++line_number_;
      if (found != std::string::npos && line.ends_with('\r')) line.pop_back();
      if (line_number_ == 1 && line.starts_with("\xef\xbb\xbf")) line.erase(0, 3);
      return true;
    }
    if (at_end_) return false;
    if (buffer_.size() - begin_ > kMaxRecordBytes)
      fail(ErrorKind::kData, path_.string(), ":", line_number_ + 1, ": a line of more than ", kMaxRecordBytes >> 20, " MiB", Remedy{"cut the record into smaller ones"});
    buffer_.erase(0, begin_);
    begin_ = 0;
    searched = buffer_.size();
    buffer_.resize(searched + kBlockBytes);
    const std::size_t got = bytes_.read(buffer_.data() + searched, kBlockBytes);
    buffer_.resize(searched + got);
    at_end_ = got == 0;
  }
}

// ---- records ----

struct RecordReader::State {
  fs::path path;
  FileKind kind;
  std::uint64_t document_bytes = 0;
  std::optional<LineReader> lines;
  std::optional<ParquetRows> rows;
  std::uint64_t row = 0;
  std::string waiting;  // plain text: the line read ahead
  bool has_waiting = false;

  std::optional<Record> next_text();
  std::optional<Record> next_json();
};

RecordReader::RecordReader(const fs::path& path, std::uint64_t document_bytes) : state_(std::make_unique<State>()) {
  const std::optional<FileKind> kind = file_kind(path);
  if (!kind) fail(ErrorKind::kData, path.string(), ": a file of unknown ending");
  state_->path = path;
  state_->kind = *kind;
  state_->document_bytes = document_bytes;
  if (*kind == FileKind::kParquet) state_->rows.emplace(path);
  else state_->lines.emplace(path);
}
RecordReader::~RecordReader() = default;

std::optional<Record> RecordReader::State::next_text() {
  // A cut falls behind the blank lines that follow a paragraph, as soon as the document has its size; within a paragraph
  // of twice that size it falls at a line's end.
  Record record;
  const auto read_ahead = [&] { has_waiting = lines->next(waiting); };
  if (!has_waiting) read_ahead();
  if (!has_waiting) return std::nullopt;
  record.line = lines->line_number();
  bool after_blank = false;
  while (has_waiting) {
    const bool blank = waiting.find_first_not_of(" \t") == std::string::npos;
    const bool full = document_bytes > 0 && record.text.size() >= document_bytes;
    if (full && !blank && (after_blank || record.text.size() >= 2 * document_bytes)) break;
    if (const std::size_t at = invalid_utf8(waiting); at != std::string::npos)
      fail(ErrorKind::kData, path.string(), ":", lines->line_number(), ": byte ", at + 1, " of the line (0x", "0123456789abcdef"[static_cast<unsigned char>(waiting[at]) >> 4],
           "0123456789abcdef"[waiting[at] & 15], ") is not UTF-8", Remedy{"convert the file, for instance with iconv -t UTF-8"});
    record.text += waiting;
    record.text += '\n';
    if (record.text.size() > kMaxRecordBytes)
      fail(ErrorKind::kData, path.string(), ": more than ", kMaxRecordBytes >> 20, " MiB in one document", Remedy{"set document_bytes, so that long text is cut at blank lines"});
    after_blank = blank;
    read_ahead();
  }
  record.last_of_file = !has_waiting;
  return record;
}

std::optional<Record> RecordReader::State::next_json() {
  Record record;
  if (rows) {
    std::optional<std::string> line = rows->next_line();
    if (!line) return std::nullopt;
    record.text = std::move(*line);
    record.line = ++row;
    if (record.text.size() > kMaxRecordBytes)
      fail(ErrorKind::kData, path.string(), ": row ", row, ": more than ", kMaxRecordBytes >> 20, " MiB", Remedy{"cut the record into smaller ones"});
    return record;
  }
  while (lines->next(record.text)) {
    if (record.text.find_first_not_of(" \t\r") == std::string::npos) continue;
    record.line = lines->line_number();
    if (record.line == 1 && record.text[record.text.find_first_not_of(" \t")] == '[')
      fail(ErrorKind::kData, path.string(), ":1: a JSON array, not one object a line", Remedy{"convert it, for instance with jq -c '.[]' FILE > FILE.jsonl"});
    return record;
  }
  return std::nullopt;
}

std::optional<Record> RecordReader::next() {
  return state_->kind == FileKind::kText || state_->kind == FileKind::kMarkdown ? state_->next_text() : state_->next_json();
}

// ---- text ----

std::size_t invalid_utf8(std::string_view text) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(text.data());
  const std::size_t size = text.size();
  const auto continues = [&](std::size_t at) { return at < size && (bytes[at] & 0xC0) == 0x80; };
  for (std::size_t i = 0; i < size;) {
    if (i + 8 <= size) {
      std::uint64_t eight = 0;
      std::memcpy(&eight, bytes + i, 8);
      if ((eight & 0x8080808080808080ull) == 0) {
        i += 8;
        continue;
      }
    }
    const unsigned first = bytes[i];
    if (first < 0x80) {
      ++i;
    } else if (first >= 0xC2 && first <= 0xDF) {
      if (!continues(i + 1)) return i;
      i += 2;
    } else if (first >= 0xE0 && first <= 0xEF) {
      if (!continues(i + 1) || !continues(i + 2)) return i;
      if ((first == 0xE0 && bytes[i + 1] < 0xA0) || (first == 0xED && bytes[i + 1] > 0x9F)) return i;
      i += 3;
    } else if (first >= 0xF0 && first <= 0xF4) {
      if (!continues(i + 1) || !continues(i + 2) || !continues(i + 3)) return i;
      if ((first == 0xF0 && bytes[i + 1] < 0x90) || (first == 0xF4 && bytes[i + 1] > 0x8F)) return i;
      i += 4;
    } else {
      return i;
    }
  }
  return std::string_view::npos;
}

std::uint64_t count_words(std::string_view text) {
  // White space of Unicode 15 (property White_Space), in UTF-8.
  std::uint64_t words = 0;
  bool inside = false;
  for (std::size_t i = 0; i < text.size();) {
    const auto first = static_cast<unsigned char>(text[i]);
    std::size_t width = 1;
    bool space = first == ' ' || (first >= 9 && first <= 13);
    if (first == 0xC2 && i + 1 < text.size()) {
      const auto second = static_cast<unsigned char>(text[i + 1]);
      width = 2;
      space = second == 0x85 || second == 0xA0;
    } else if ((first == 0xE1 || first == 0xE2 || first == 0xE3) && i + 2 < text.size()) {
      const unsigned code = (first & 15u) << 12 | (static_cast<unsigned char>(text[i + 1]) & 63u) << 6 | (static_cast<unsigned char>(text[i + 2]) & 63u);
      width = 3;
      space = code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 || code == 0x2029 || code == 0x202F || code == 0x205F || code == 0x3000;
    }
    words += !space && !inside;
    inside = !space;
    i += width;
  }
  return words;
}

}  // namespace alambic::data
