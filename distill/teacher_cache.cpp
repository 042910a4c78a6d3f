// SPDX-License-Identifier: Apache-2.0
#include "distill/teacher_cache.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <list>
#include <map>
#include <mutex>

#include "core/error.h"
#include "core/files.h"
#include "data/hdf5.h"
#include "data/sealed_json.h"

namespace alambic::distill {
namespace {

using data::Hdf5Handle;
using data::hdf5_mutex;
using data::padded;
using data::require_count;

constexpr std::int64_t kVersion = 1;
constexpr const char* kFormat = "alambic teacher cache";
constexpr const char* kAgain = "copy the cache again, or make it again with alambic distill --cache";
constexpr const char* kShardForm = "shard-#####-of-#####.json";
constexpr const char* kFileForm = "signal-#####-of-#####-######.h5";
constexpr std::uint64_t kMostShards = 99'999;
constexpr std::uint64_t kMostFiles = 1'000'000;
constexpr std::uint64_t kMostFileBytes = 1ull << 40;
constexpr std::uint64_t kIndexChunk = 16'384, kSignalChunk = 65'536;  // values; 64 KiB are unpacked in about 0.3 ms
constexpr std::uint64_t kPadding = 8;                                // zero bytes behind the signals: unpack() loads 64 bits at once
constexpr std::size_t kMostOpenFiles = 32;
constexpr std::uint64_t kLargestRatio = 1032;                        // deflate packs no better (data/hdf5.cpp)

enum Column : std::size_t { kFirstPiece, kFirstRow, kOffsets, kSignal, kNumColumns };
const std::vector<std::string> kColumnNames = {"first_piece", "first_row", "offsets", "signal"};

// H5T_STD_U32LE is a variable of the library, set when it is first used.
hid_t column_type(std::size_t column) {
  switch (column) {
    case kOffsets: return H5T_STD_U64LE;
    case kSignal: return H5T_STD_U8LE;
    default: return H5T_STD_U32LE;
  }
}
std::uint64_t column_chunk(std::size_t column) { return column == kSignal ? kSignalChunk : kIndexChunk; }

struct FileEntry {
  std::string file, sha256;
  std::uint64_t file_bytes = 0;
  CacheTotals totals;

  std::uint64_t column_length(std::size_t column) const {
    switch (column) {
      case kFirstPiece: return totals.documents + 1;
      case kSignal: return totals.bytes + kPadding;
      default: return totals.pieces + 1;
    }
  }
};

const char* name_of(SignalKind kind) {
  switch (kind) {
    case SignalKind::kTopK: return "top_k";
    case SignalKind::kSampled: return "sampled";
    case SignalKind::kWeighted: return "weighted";
  }
  fail(ErrorKind::kBug, "a kind of signal without a name");
}

SignalKind kind_named(const std::string& name, const std::string& source) {
  for (const SignalKind kind : {SignalKind::kTopK, SignalKind::kSampled, SignalKind::kWeighted})
    if (name == name_of(kind)) return kind;
  fail(ErrorKind::kData, source, ": \"kind\" is \"", name.substr(0, 40), "\", expected top_k, sampled or weighted");
}

void add(CacheTotals& to, const CacheTotals& more) {
  to.documents += more.documents;
  to.pieces += more.pieces;
  to.rows += more.rows;
  to.bytes += more.bytes;
}

Json to_json(const CacheTotals& totals) { return {{"documents", totals.documents}, {"pieces", totals.pieces}, {"rows", totals.rows}, {"bytes", totals.bytes}}; }

CacheTotals totals_from_json(const Json& json, const std::string& source) {
  return {.documents = require_count(json, "documents", source), .pieces = require_count(json, "pieces", source), .rows = require_count(json, "rows", source), .bytes = require_count(json, "bytes", source)};
}

// Of all groups of `documents`, those of one shard; only the last group of all may be short.
std::uint64_t documents_of_shard(std::uint64_t documents, std::uint32_t shard, std::uint32_t num_shards) {
  const std::uint64_t groups = (documents + kGroupDocuments - 1) / kGroupDocuments;
  if (groups <= shard) return 0;
  const std::uint64_t own = (groups - shard + num_shards - 1) / num_shards;
  const bool has_last = (groups - 1) % num_shards == shard;
  return own * kGroupDocuments - (has_last ? groups * kGroupDocuments - documents : 0);
}

// ---- shard-IIIII-of-NNNNN.json ----

CacheHeader header_from_json(const Json& json, const std::string& source) {
  CacheHeader header;
  const Json teacher = require<Json>(json, "teacher", source);
  header.teacher = {.name = require<std::string>(teacher, "name", source),
                    .hash = require<std::string>(teacher, "sha256", source),
                    .family = require<std::string>(teacher, "family", source),
                    .licence = require<std::string>(teacher, "licence", source),
                    .compute_type = require<std::string>(teacher, "compute_type", source),
                    .parameters = require<std::int64_t>(teacher, "parameters", source)};
  const Json stores = require<Json>(json, "stores", source);
  if (!stores.is_array() || stores.empty()) fail(ErrorKind::kData, source, ": \"stores\" must be a list that is not empty");
  for (const Json& store : stores) header.stores.push_back({.hash = require<std::string>(store, "sha256", source), .documents = require_count(store, "documents", source)});
  header.tokenizer_hash = require<std::string>(json, "tokenizer_hash", source);
  const std::uint64_t vocabulary = require_count(json, "vocabulary_size", source);
  header.form = {.kind = kind_named(require<std::string>(json, "kind", source), source),
                 .slots = require<std::int64_t>(json, "slots", source),
                 .vocabulary_size = static_cast<std::uint32_t>(std::min<std::uint64_t>(vocabulary, UINT32_MAX))};
  header.temperature = require<double>(json, "temperature", source);
  header.proposal_exponent = require<double>(json, "proposal_exponent", source);
  const Json seed = require<Json>(json, "seed", source);
  if (!seed.is_number_unsigned()) fail(ErrorKind::kData, source, ": \"seed\" must be a whole number of at least 0");
  header.seed = seed.get<std::uint64_t>();
  header.row_length = require<std::int64_t>(json, "row_length", source);
  header.split_long = require<bool>(json, "split_long", source);
  header.rows_per_batch = require<std::int64_t>(json, "rows_per_batch", source);
  header.rows_per_file = require_count(json, "rows_per_file", source);
  if (header.row_length < 2 || header.row_length > INT32_MAX) fail(ErrorKind::kData, source, ": \"row_length\" is ", header.row_length);
  std::uint64_t documents = 0;
  for (const CachedStore& store : header.stores)
    if (store.documents > (1ull << 62) || (documents += store.documents) > (1ull << 62)) fail(ErrorKind::kData, source, ": impossible: ", store.documents, " documents in a store");
  try {
    check(header.form);
  } catch (const Error& error) {
    fail(ErrorKind::kData, source, ": ", error.what());
  }
  return header;
}

Json entry_to_json(const FileEntry& entry) {
  return {{"file", entry.file}, {"sha256", entry.sha256}, {"file_bytes", entry.file_bytes}, {"totals", to_json(entry.totals)}};
}

FileEntry entry_from_json(const Json& json, const SignalForm& form, const std::string& source) {
  FileEntry entry;
  entry.file = require<std::string>(json, "file", source);
  if (!data::has_form(entry.file, kFileForm)) fail(ErrorKind::kData, source, ": \"", entry.file, "\" is not the name of a cache's file");
  const std::string where = source + ": " + entry.file;
  entry.sha256 = require<std::string>(json, "sha256", where);
  entry.file_bytes = require_count(json, "file_bytes", where);
  entry.totals = totals_from_json(require<Json>(json, "totals", where), where);
  const CacheTotals& totals = entry.totals;
  const bool fits = entry.file_bytes <= kMostFileBytes && totals.documents > 0 && totals.documents <= UINT32_MAX && totals.pieces <= UINT32_MAX && totals.rows <= UINT32_MAX &&
                    std::max({totals.documents, totals.pieces, totals.rows / 64, totals.bytes}) <= entry.file_bytes * kLargestRatio;
  // Each piece ends with a byte that may have only one bit of its own.
  if (!fits || totals.bytes > form.most_bytes(totals.rows) + totals.pieces)
    fail(ErrorKind::kData, where, ": impossible counts: ", totals.documents, " documents, ", totals.pieces, " pieces, ", totals.rows, " rows and ", totals.bytes, " bytes of signal in ", entry.file_bytes, " bytes");
  return entry;
}

Json read_shard(const fs::path& path, std::string* hash = nullptr) {
  return data::read_sealed(path, {.name = kFormat, .version = kVersion, .what = "the list of a teacher cache's shard", .remedy = kAgain}, hash);
}

std::string shard_name(std::uint32_t shard, std::uint32_t num_shards) { return padded(shard, 5) + "-of-" + padded(num_shards, 5); }

Json common_header(const CacheHeader& header, std::uint32_t num_shards) {
  Json json = {{"format", kFormat}, {"version", kVersion}};
  json.update(distill::to_json(header));
  json["shards"] = num_shards;
  return json;
}

}  // namespace

std::uint64_t CacheHeader::num_documents() const {
  std::uint64_t sum = 0;
  for (const CachedStore& store : stores) sum += store.documents;
  return sum;
}

Json to_json(const CacheHeader& header) {
  Json stores = Json::array();
  for (const CachedStore& store : header.stores) stores.push_back({{"sha256", store.hash}, {"documents", store.documents}});
  const CacheTeacher& teacher = header.teacher;
  return {{"teacher", {{"name", teacher.name}, {"sha256", teacher.hash}, {"family", teacher.family}, {"licence", teacher.licence}, {"compute_type", teacher.compute_type}, {"parameters", teacher.parameters}}},
          {"stores", stores},
          {"tokenizer_hash", header.tokenizer_hash},
          {"vocabulary_size", header.form.vocabulary_size},
          {"kind", name_of(header.form.kind)},
          {"slots", header.form.slots},
          {"temperature", header.temperature},
          {"proposal_exponent", header.proposal_exponent},
          {"seed", header.seed},
          {"row_length", header.row_length},
          {"split_long", header.split_long},
          {"rows_per_batch", header.rows_per_batch},
          {"group_documents", kGroupDocuments},
          {"rows_per_file", header.rows_per_file}};
}

// ---- writing ----

struct TeacherCacheWriter::State {
  fs::path folder;
  CacheHeader header;
  Json json;  // common_header()
  std::uint32_t shard = 0, num_shards = 1;
  std::uint64_t num_documents = 0;
  std::unique_ptr<FolderLock> lock;
  std::vector<FileEntry> committed;
  bool published = false;

  // The file being filled.
  std::vector<std::uint32_t> first_piece = {0}, first_row = {0};
  std::vector<std::uint64_t> offsets = {0};
  std::vector<std::uint8_t> signal;

  std::string name() const { return shard_name(shard, num_shards); }
  fs::path work() const { return folder / (".shard-" + name()); }
  fs::path progress() const { return work() / "progress.json"; }
  fs::path list() const { return folder / ("shard-" + name() + ".json"); }

  std::uint64_t pending_documents() const { return first_piece.size() - 1; }
  CacheTotals committed_totals() const {
    CacheTotals totals;
    for (const FileEntry& entry : committed) add(totals, entry.totals);
    return totals;
  }
  void open();
  void read_files(const Json& from, const std::string& source, bool verify);
  Json shard_json() const;
  void write_hdf5(const fs::path& path) const;
  void commit();
  void publish();
};

void TeacherCacheWriter::State::read_files(const Json& from, const std::string& source, bool verify) {
  const Json files = require<Json>(from, "files", source);
  if (!files.is_array()) fail(ErrorKind::kData, source, ": \"files\" must be a list");
  for (const Json& each : files) {
    FileEntry entry = entry_from_json(each, header.form, source);
    if (verify && sha256_of_file(folder / entry.file) != entry.sha256)
      fail(ErrorKind::kData, (folder / entry.file).string(), ": damaged since it was written: its SHA-256 differs", Remedy{"remove the output folder and write the cache again"});
    committed.push_back(std::move(entry));
  }
}

void TeacherCacheWriter::State::open() {
  if (fs::exists(folder) && !fs::is_directory(folder)) fail(ErrorKind::kUsage, folder.string(), ": is not a folder", Remedy{"choose another output folder"});
  if (fs::is_directory(folder)) {
    for (const auto& entry : fs::directory_iterator(folder)) {
      const std::string file = entry.path().filename().string();
      const bool list_of_shard = data::has_form(file, kShardForm);
      if (!list_of_shard && !data::has_form(file, kFileForm) && !file.starts_with(".shard-"))
        fail(ErrorKind::kUsage, folder.string(), ": holds other files (", file, ")", Remedy{"choose an empty or new output folder"});
      if (list_of_shard) data::require_same_header(read_shard(entry.path()), json, folder, "a teacher cache");
    }
  }
  std::error_code problem;
  if (!fs::exists(list())) {
    fs::create_directories(work(), problem);
    if (problem) fail(ErrorKind::kResource, work().string(), ": cannot be created: ", problem.message(), Remedy{"choose an output folder that can be written"});
    lock = std::make_unique<FolderLock>(work());
  }
  if (fs::exists(list())) {
    read_files(read_shard(list()), list().string(), false);
    published = true;
    lock.reset();
    fs::remove_all(work(), problem);
  } else if (fs::exists(progress())) {
    const Json index = read_shard(progress());
    data::require_same_header(index, json, folder, "a teacher cache");
    read_files(index, progress().string(), true);
  } else {
    write_file(progress(), data::sealed(shard_json()));  // from here on other settings are refused
  }
}

Json TeacherCacheWriter::State::shard_json() const {
  Json result = json;
  result["shard"] = shard;
  result["totals"] = to_json(committed_totals());
  result["files"] = Json::array();
  for (const FileEntry& entry : committed) result["files"].push_back(entry_to_json(entry));
  return result;
}

void TeacherCacheWriter::State::write_hdf5(const fs::path& path) const {
  std::vector<std::uint8_t> padded_signal = signal;
  padded_signal.resize(signal.size() + kPadding);
  const std::lock_guard guard(hdf5_mutex());
  Hdf5Handle file = data::create_hdf5(path);
  data::write_attribute(file, "format", std::string(kFormat));
  data::write_attribute(file, "version", static_cast<std::uint64_t>(kVersion));
  data::write_attribute(file, "header", to_line(json));
  data::write_attribute(file, "shard", shard);
  data::write_attribute(file, "first_document", committed_totals().documents);
  const std::array<const void*, kNumColumns> values = {first_piece.data(), first_row.data(), offsets.data(), padded_signal.data()};
  const std::array<std::size_t, kNumColumns> lengths = {first_piece.size(), first_row.size(), offsets.size(), padded_signal.size()};
  for (std::size_t column = 0; column < kNumColumns; ++column) data::write_column(file, kColumnNames[column], column_type(column), lengths[column], column_chunk(column), values[column]);
  if (file.close() < 0) fail(ErrorKind::kResource, path.string(), ": HDF5 could not finish the file", Remedy{"check the free space and the health of the disk"});
}

void TeacherCacheWriter::State::commit() {
  if (pending_documents() == 0) return;
  if (committed.size() >= kMostFiles) fail(ErrorKind::kUsage, folder.string(), ": more than ", kMostFiles, " files in a shard", Remedy{"raise rows_per_file"});
  const fs::path temporary = work() / "file.tmp";
  write_hdf5(temporary);
  fsync_file(temporary);
  FileEntry entry;
  entry.file = "signal-" + name() + "-" + padded(committed.size(), 6) + ".h5";
  entry.sha256 = sha256_of_file(temporary);
  entry.file_bytes = fs::file_size(temporary);
  entry.totals = {.documents = pending_documents(), .pieces = offsets.size() - 1, .rows = first_row.back(), .bytes = offsets.back()};
  // A file that is in place but not in the list (killed in between) is written again.
  std::error_code problem;
  fs::rename(temporary, folder / entry.file, problem);
  if (problem) fail(ErrorKind::kResource, (folder / entry.file).string(), ": cannot be renamed into place: ", problem.message());
  fsync_folder(folder);
  committed.push_back(std::move(entry));
  write_file(progress(), data::sealed(shard_json()));
  first_piece = {0}, first_row = {0}, offsets = {0};
  signal.clear();
}

void TeacherCacheWriter::State::publish() {
  const fs::path temporary = work() / "list.json";
  write_file(temporary, data::sealed(shard_json()));
  std::error_code problem;
  fs::rename(temporary, list(), problem);
  if (problem) fail(ErrorKind::kResource, list().string(), ": cannot be renamed into place: ", problem.message());
  fsync_folder(folder);
  published = true;
  lock.reset();
  fs::remove_all(work(), problem);  // what is left is removed by the next writer that looks
}

TeacherCacheWriter::TeacherCacheWriter(const fs::path& folder, const CacheHeader& header, std::uint32_t shard, std::uint32_t num_shards) : state_(std::make_unique<State>()) {
  if (num_shards == 0 || num_shards > kMostShards || shard >= num_shards) fail(ErrorKind::kUsage, "shard: ", shard, "/", num_shards, ": must be i/n with i from 0 to n - 1 and n up to ", kMostShards);
  check(header.form);
  if (header.rows_per_file == 0) fail(ErrorKind::kUsage, "rows_per_file must be at least 1");
  state_->folder = folder;
  state_->header = header;
  state_->json = common_header(header, num_shards);
  state_->shard = shard;
  state_->num_shards = num_shards;
  state_->num_documents = documents_of_shard(header.num_documents(), shard, num_shards);
  state_->open();
}

TeacherCacheWriter::~TeacherCacheWriter() = default;

std::uint64_t TeacherCacheWriter::num_documents() const { return state_->num_documents; }
std::uint64_t TeacherCacheWriter::committed_documents() const { return totals().documents; }
bool TeacherCacheWriter::complete() const { return state_->published; }
CacheTotals TeacherCacheWriter::totals() const { return state_->committed_totals(); }

std::uint64_t TeacherCacheWriter::file_bytes() const {
  std::uint64_t bytes = 0;
  for (const FileEntry& entry : state_->committed) bytes += entry.file_bytes;
  return bytes;
}

void TeacherCacheWriter::append(const std::vector<PieceSignal>& pieces) {
  State& state = *state_;
  if (state.published || committed_documents() + state.pending_documents() >= state.num_documents) fail(ErrorKind::kBug, "more documents than shard ", state.name(), " of a teacher cache has");
  for (const PieceSignal& piece : pieces) {
    if (state.first_row.back() + piece.rows > UINT32_MAX || state.offsets.size() >= UINT32_MAX)
      fail(ErrorKind::kUsage, "a file of a teacher cache holds at most ", UINT32_MAX, " rows", Remedy{"lower rows_per_file"});
    state.signal.insert(state.signal.end(), piece.bytes.begin(), piece.bytes.end());
    state.first_row.push_back(state.first_row.back() + static_cast<std::uint32_t>(piece.rows));
    state.offsets.push_back(state.signal.size());
  }
  state.first_piece.push_back(static_cast<std::uint32_t>(state.offsets.size() - 1));
}

void TeacherCacheWriter::end_group() {
  State& state = *state_;
  if ((committed_documents() + state.pending_documents()) % kGroupDocuments != 0 && committed_documents() + state.pending_documents() != state.num_documents)
    fail(ErrorKind::kBug, "a group of a teacher cache has ", kGroupDocuments, " documents");
  if (state.first_row.back() >= state.header.rows_per_file) state.commit();
}

void TeacherCacheWriter::commit() { state_->commit(); }

void TeacherCacheWriter::finish() {
  State& state = *state_;
  if (state.published) return;
  state.commit();
  if (committed_documents() != state.num_documents) fail(ErrorKind::kBug, "shard ", state.name(), " of a teacher cache ends with ", committed_documents(), " of ", state.num_documents, " documents");
  state.publish();
}

// ---- reading ----

namespace {

struct OpenFile {
  Hdf5Handle file;
  std::array<Hdf5Handle, kNumColumns> columns;
};

struct CacheFile {
  FileEntry entry;
  std::uint64_t first_document = 0;  // of its shard
  std::vector<std::uint32_t> first_piece, first_row;
  std::vector<std::uint64_t> offsets;
};

struct Shard {
  std::vector<std::size_t> files;  // in order
};

}  // namespace

struct TeacherCache::State {
  fs::path folder;
  std::string hash;
  CacheHeader header;
  CacheTotals totals;
  std::uint64_t file_bytes = 0;
  std::vector<CacheFile> files;
  std::vector<Shard> shards;
  std::vector<std::uint64_t> first_document;  // of each store, numbered through
  std::vector<std::size_t> stores;            // of a batch's store: the header's

  std::mutex mutex;
  std::list<std::pair<std::size_t, OpenFile>> open_files;  // least recently used last

  ~State() {
    const std::lock_guard guard(hdf5_mutex());
    open_files.clear();
  }
  OpenFile& open_file(std::size_t index);  // with both mutexes held
  void read_shard_list(const fs::path& path, std::uint32_t shard, const Json& index);
  void read_index(CacheFile& file, std::size_t index);
};

OpenFile& TeacherCache::State::open_file(std::size_t index) {
  for (auto found = open_files.begin(); found != open_files.end(); ++found) {
    if (found->first != index) continue;
    open_files.splice(open_files.begin(), open_files, found);
    return open_files.front().second;
  }
  if (open_files.size() >= kMostOpenFiles) open_files.pop_back();
  const FileEntry& entry = files[index].entry;
  const fs::path path = folder / entry.file;
  OpenFile opened{.file = data::open_hdf5(path, kColumnNames), .columns = {}};
  for (std::size_t column = 0; column < kNumColumns; ++column)
    opened.columns[column] = data::open_column(opened.file, path, kColumnNames[column], column_type(column), entry.column_length(column), column_chunk(column));
  open_files.emplace_front(index, std::move(opened));
  return open_files.front().second;
}

void TeacherCache::State::read_index(CacheFile& file, std::size_t index) {
  const std::string where = (folder / file.entry.file).string();
  {
    const std::lock_guard guard(hdf5_mutex());
    const OpenFile& opened = open_file(index);  // checks lengths against the bytes there are, before anything is allocated
    const auto read = [&](std::size_t column, auto& values) {
      values.resize(file.entry.column_length(column));
      data::read_column(opened.columns[column], where, kColumnNames[column], 0, values.size(), values.data());
    };
    read(kFirstPiece, file.first_piece);
    read(kFirstRow, file.first_row);
    read(kOffsets, file.offsets);
  }
  const auto check = [&](std::size_t column, const auto& values, std::uint64_t last) {
    if (values.front() != 0 || !std::is_sorted(values.begin(), values.end()) || values.back() != last)
      fail(ErrorKind::kData, where, ": \"", kColumnNames[column], "\" must begin at 0, never fall, and end at ", last, Remedy{kAgain});
  };
  check(kFirstPiece, file.first_piece, file.entry.totals.pieces);
  check(kFirstRow, file.first_row, file.entry.totals.rows);
  check(kOffsets, file.offsets, file.entry.totals.bytes);
  for (std::size_t piece = 0; piece + 1 < file.offsets.size(); ++piece)
    if (file.offsets[piece + 1] - file.offsets[piece] > header.form.most_bytes(file.first_row[piece + 1] - file.first_row[piece]))
      fail(ErrorKind::kData, where, ": piece ", piece, " has more bytes than its ", file.first_row[piece + 1] - file.first_row[piece], " rows can have", Remedy{kAgain});
}

void TeacherCache::State::read_shard_list(const fs::path& path, std::uint32_t shard, const Json& index) {
  const std::string where = path.string();
  const Json list = require<Json>(index, "files", where);
  if (!list.is_array() || list.size() > kMostFiles) fail(ErrorKind::kData, where, ": \"files\" must be a list");
  CacheTotals sum;
  for (const Json& json : list) {
    CacheFile file{.entry = entry_from_json(json, header.form, where), .first_document = sum.documents, .first_piece = {}, .first_row = {}, .offsets = {}};
    const std::string expected = "signal-" + shard_name(shard, static_cast<std::uint32_t>(shards.size())) + "-" + padded(shards[shard].files.size(), 6) + ".h5";
    if (file.entry.file != expected) fail(ErrorKind::kData, where, ": names ", file.entry.file, " where ", expected, " must be");
    const fs::path file_path = folder / file.entry.file;
    if (!fs::is_regular_file(fs::symlink_status(file_path))) fail(ErrorKind::kData, file_path.string(), ": the file is missing or not a regular file", Remedy{kAgain});
    if (const std::uint64_t size = fs::file_size(file_path); size != file.entry.file_bytes)
      fail(ErrorKind::kData, file_path.string(), ": ", size, " bytes, ", file.entry.file_bytes, " expected", Remedy{kAgain});
    if (const std::string found = sha256_of_file(file_path); found != file.entry.sha256)
      fail(ErrorKind::kData, file_path.string(), ": damaged: SHA-256 is ", found, ", expected ", file.entry.sha256, Remedy{kAgain});
    add(sum, file.entry.totals);
    file_bytes += file.entry.file_bytes;
    shards[shard].files.push_back(files.size());
    files.push_back(std::move(file));
    read_index(files.back(), files.size() - 1);
  }
  if (to_json(sum) != to_json(totals_from_json(require<Json>(index, "totals", where), where))) fail(ErrorKind::kData, where, ": \"totals\" are not the sums of its files");
  const std::uint64_t wanted = documents_of_shard(header.num_documents(), shard, static_cast<std::uint32_t>(shards.size()));
  if (sum.documents != wanted) fail(ErrorKind::kData, where, ": holds ", sum.documents, " documents, but this shard has ", wanted);
  add(totals, sum);
}

TeacherCache::TeacherCache(const fs::path& folder) : state_(std::make_unique<State>()) {
  State& state = *state_;
  state.folder = folder;
  if (!fs::is_directory(folder)) fail(ErrorKind::kData, folder.string(), ": no such folder", Remedy{"write the cache with alambic distill --cache"});
  std::map<std::string, Json> lists;  // by file name
  std::string hashes;
  bool begun = false;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    begun |= name.starts_with(".shard-");
    if (data::has_form(name, kShardForm)) lists.emplace(name, Json());
  }
  if (lists.empty() && begun) fail(ErrorKind::kData, folder.string(), ": unfinished teacher cache: no shard of it is complete", Remedy{"run the same alambic distill --cache again; it goes on where it was"});
  if (lists.empty()) fail(ErrorKind::kData, folder.string(), ": not a teacher cache: it has no shard-IIIII-of-NNNNN.json", Remedy{"write one with alambic distill --cache"});
  std::uint64_t num_shards = 0;
  const Json* first = nullptr;
  for (auto& [name, json] : lists) {
    const fs::path path = folder / name;
    std::string hash;
    json = read_shard(path, &hash);
    hashes += hash;
    const std::uint64_t shards = require_count(json, "shards", path.string()), shard = require_count(json, "shard", path.string());
    if (shards == 0 || shards > kMostShards || shard >= shards) fail(ErrorKind::kData, path.string(), ": says that it is shard ", shard, " of ", shards);
    if (name != "shard-" + shard_name(static_cast<std::uint32_t>(shard), static_cast<std::uint32_t>(shards)) + ".json")
      fail(ErrorKind::kData, path.string(), ": is shard ", shard, " of ", shards, " under the name of another: a shard twice", Remedy{"copy each shard under its own name"});
    if (!first) {
      first = &json, num_shards = shards;
      state.header = header_from_json(json, path.string());
      continue;
    }
    if (shards != num_shards)
      fail(ErrorKind::kData, folder.string(), ": holds shards of a cache in ", num_shards, " and of one in ", shards, " parts", Remedy{"keep the shards of one cache only"});
    const Json header = common_header(state.header, static_cast<std::uint32_t>(num_shards));
    for (const auto& [key, value] : header.items())
      if (json.value(key, Json()) != value)
        fail(ErrorKind::kData, path.string(), ": is of another cache than the other shards: ", data::first_difference({{key, value}}, {{key, json.value(key, Json())}}), Remedy{"keep the shards of one cache only"});
  }
  const Json own = common_header(state.header, static_cast<std::uint32_t>(num_shards));
  for (const auto& [key, value] : own.items())
    if (first->value(key, Json()) != value)
      fail(ErrorKind::kData, folder.string(), ": ", data::first_difference({{key, first->value(key, Json())}}, {{key, value}}), ": not as this version of alambic writes it");
  if (lists.size() < num_shards) {
    std::string missing;
    std::uint64_t count = 0;
    for (std::uint32_t shard = 0; shard < num_shards; ++shard)
      if (!lists.contains("shard-" + shard_name(shard, static_cast<std::uint32_t>(num_shards)) + ".json") && ++count <= 8) missing += (missing.empty() ? "" : ", ") + std::to_string(shard);
    fail(ErrorKind::kData, folder.string(), ": ", count, " of ", num_shards, " shards are missing: ", missing, count > 8 ? ", ..." : "",
         Remedy{begun ? "run alambic distill --cache again for these; it goes on where it was" : "copy them here, or write them with alambic distill --cache"});
  }
  state.hash = sha256_of(hashes);
  state.shards.resize(num_shards);
  std::uint32_t shard = 0;
  for (const auto& [name, json] : lists) state.read_shard_list(folder / name, shard++, json);
  std::uint64_t documents = 0;
  for (std::size_t i = 0; i < state.header.stores.size(); ++i) {
    state.first_document.push_back(documents);
    documents += state.header.stores[i].documents;
    state.stores.push_back(i);
  }
}

TeacherCache::~TeacherCache() = default;
TeacherCache::TeacherCache(TeacherCache&&) noexcept = default;
TeacherCache& TeacherCache::operator=(TeacherCache&&) noexcept = default;

const CacheHeader& TeacherCache::header() const { return state_->header; }
const CacheTotals& TeacherCache::totals() const { return state_->totals; }
std::uint32_t TeacherCache::num_shards() const { return static_cast<std::uint32_t>(state_->shards.size()); }
std::uint64_t TeacherCache::file_bytes() const { return state_->file_bytes; }
const std::string& TeacherCache::hash() const { return state_->hash; }

void TeacherCache::use_for(const CacheUse& use) {
  State& state = *state_;
  const CacheHeader& header = state.header;
  const std::string where = state.folder.string();
  if (!use.teacher_hash.empty() && use.teacher_hash != header.teacher.hash)
    fail(ErrorKind::kData, where, ": is of another teacher: ", header.teacher.name, " with SHA-256 ", header.teacher.hash, ", the config's teacher has ", use.teacher_hash,
         Remedy{"name the teacher that the cache was made with, or write a cache of this one"});
  if (!use.tokenizer_hash.empty() && use.tokenizer_hash != header.tokenizer_hash)
    fail(ErrorKind::kData, where, ": its ids are those of another tokenizer (", header.tokenizer_hash, ") than the student's (", use.tokenizer_hash, ")",
         Remedy{"distil between models of one tokenizer, or without a cache"});
  if (use.vocabulary_size > 0 && use.vocabulary_size < static_cast<std::int64_t>(header.form.vocabulary_size))
    fail(ErrorKind::kData, where, ": its tokenizer has ", header.form.vocabulary_size, " tokens, the student only ", use.vocabulary_size, Remedy{"distil between models of one tokenizer"});
  if (use.row_length != header.row_length || use.split_long != header.split_long)
    fail(ErrorKind::kUsage, where, ": the teacher saw documents by row_length ", header.row_length, " and split_long ", header.split_long ? "true" : "false", ", the config says ", use.row_length,
         " and ", use.split_long ? "true" : "false", Remedy{"set data.row_length and data.split_long as the cache has them, or write another cache"});
  if (use.temperature && *use.temperature != header.temperature)
    fail(ErrorKind::kUsage, where, ": the teacher's temperature is ", header.temperature, ", the config says ", *use.temperature, Remedy{"set the temperature of the cache, or write another cache"});
  std::vector<std::size_t> stores;
  for (std::size_t i = 0; i < use.store_hashes.size(); ++i) {
    const auto found = std::find_if(header.stores.begin(), header.stores.end(), [&](const CachedStore& store) { return store.hash == use.store_hashes[i]; });
    if (found == header.stores.end())
      fail(ErrorKind::kData, where, ": has no signal for token store ", i, " of the mixture (SHA-256 ", use.store_hashes[i], ")", Remedy{"write a cache of the stores that are trained on"});
    stores.push_back(static_cast<std::size_t>(found - header.stores.begin()));
  }
  state.stores = std::move(stores);
}

SparseSignal TeacherCache::signal(const data::Batch& batch) const {
  State& state = *state_;
  const CacheHeader& header = state.header;
  const std::int64_t slots = header.form.slots;
  SparseSignal result{.ids_KN = at::empty({batch.num_kept, slots}, at::kInt), .probabilities_KN = at::empty({batch.num_kept, slots}, at::kFloat), .tail_K = at::empty({batch.num_kept}, at::kFloat)};
  auto* ids = result.ids_KN.mutable_data_ptr<std::int32_t>();
  auto* probabilities = result.probabilities_KN.mutable_data_ptr<float>();
  auto* tails = result.tail_K.mutable_data_ptr<float>();
  const bool* keep = batch.keep_T.const_data_ptr<bool>();
  const auto num_shards = static_cast<std::uint64_t>(state.shards.size()), step = static_cast<std::uint64_t>(header.row_length - 1);
  std::vector<std::uint8_t> bytes;
  std::int64_t kept_before = 0;
  for (std::size_t i = 0; i < batch.origins.size(); ++i) {
    const data::Origin& origin = batch.origins[i];
    std::int64_t rows = 0;
    for (std::int64_t t = 0; t < batch.document_lengths[i]; ++t) rows += *keep++;
    const auto where = [&] { return state.folder.string() + ": document " + std::to_string(origin.document) + " of store " + std::to_string(origin.store); };
    if (origin.store >= state.stores.size()) fail(ErrorKind::kBug, "store ", origin.store, " of a mixture of ", state.stores.size());
    const std::size_t store = state.stores[origin.store];
    if (origin.document >= header.stores[store].documents) fail(ErrorKind::kData, where(), ": the cache's store has only ", header.stores[store].documents);
    const std::uint64_t number = state.first_document[store] + origin.document, group = number / kGroupDocuments;
    const std::uint64_t local = group / num_shards * kGroupDocuments + number % kGroupDocuments;
    const Shard& shard = state.shards[group % num_shards];
    const auto behind = std::upper_bound(shard.files.begin(), shard.files.end(), local, [&](std::uint64_t document, std::size_t file) { return document < state.files[file].first_document; });
    const std::size_t index = *std::prev(behind);
    const CacheFile& file = state.files[index];
    const std::uint64_t place = local - file.first_document, piece = file.first_piece[place] + origin.first_token / step;
    if (origin.first_token % step != 0 || piece >= file.first_piece[place + 1])
      fail(ErrorKind::kData, where(), ": the cache has no piece that begins at token ", origin.first_token, Remedy{"train with the row_length and split_long of the cache"});
    if (const std::uint64_t cached = file.first_row[piece + 1] - file.first_row[piece]; cached != static_cast<std::uint64_t>(rows))
      fail(ErrorKind::kData, where(), ": the cache has ", cached, " rows for the piece from token ", origin.first_token, " on, the batch ", rows, Remedy{"train with the row_length and split_long of the cache"});
    if (kept_before + rows > batch.num_kept) fail(ErrorKind::kBug, "a batch with more kept rows than the ", batch.num_kept, " it counts");
    if (rows == 0) continue;
    const std::uint64_t begin = file.offsets[piece], size = file.offsets[piece + 1] - begin;
    bytes.resize(size + kPadding);
    {
      const std::lock_guard guard(state.mutex);
      const std::lock_guard hdf5_guard(hdf5_mutex());
      data::read_column(state.open_file(index).columns[kSignal], state.folder / file.entry.file, kColumnNames[kSignal], begin, bytes.size(), bytes.data());
    }
    const std::string problem = unpack(header.form, rows, std::span(bytes).first(size), ids + kept_before * slots, probabilities + kept_before * slots, tails + kept_before);
    if (!problem.empty()) fail(ErrorKind::kData, where(), ": the cache is damaged: ", problem, Remedy{kAgain});
    kept_before += rows;
  }
  if (kept_before != batch.num_kept) fail(ErrorKind::kBug, "a batch of ", batch.num_kept, " kept rows whose documents have ", kept_before);
  return result;
}

bool is_teacher_cache(const fs::path& folder) {
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (data::has_form(name, kShardForm) || name.starts_with(".shard-")) return true;
  }
  return false;
}

}  // namespace alambic::distill
