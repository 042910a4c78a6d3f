// SPDX-License-Identifier: Apache-2.0
#include "data/token_store.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <list>
#include <mutex>
#include <numeric>
#include <unordered_map>

#include "core/error.h"
#include "core/files.h"
#include "data/hdf5.h"
#include "data/sealed_json.h"

namespace alambic::data {
namespace {

constexpr std::int64_t kVersion = 1;
constexpr const char* kFormat = "alambic token store";
constexpr std::uint64_t kChunkValues = 16384;  // of every column; 32 KiB of 16-bit ids, decoded in about 0.1 ms
constexpr std::uint64_t kMaxShardBytes = 1ull << 40;
constexpr std::size_t kCacheBytes = 64ull << 20;
constexpr std::size_t kMaxOpenShards = 32;
constexpr std::uint64_t kDocumentsPerStart = 64;

enum Column : std::size_t { kIds, kMask, kOffsets, kSource, kNumBytes, kNumWords, kNumColumns };
const std::vector<std::string> kColumnNames = {"ids", "mask", "offsets", "source", "num_bytes", "num_words"};

bool short_ids(std::uint32_t vocabulary_size) { return vocabulary_size <= 65536; }

// H5T_STD_U16LE is a variable of the library, set when it is first used.
hid_t column_type(std::size_t column, std::uint32_t vocabulary_size) {
  switch (column) {
    case kIds: return short_ids(vocabulary_size) ? H5T_STD_U16LE : H5T_STD_U32LE;
    case kMask: return H5T_STD_U8LE;
    case kSource: return H5T_STD_U16LE;
    default: return H5T_STD_U64LE;
  }
}

std::size_t column_width(std::size_t column, std::uint32_t vocabulary_size) {
  constexpr std::array<std::size_t, kNumColumns> widths = {0, 1, 8, 2, 8, 8};
  return column == kIds ? (short_ids(vocabulary_size) ? 2 : 4) : widths[column];
}

struct ShardEntry {
  std::string file, sha256;
  std::uint64_t file_bytes = 0;
  StoreTotals totals;
  std::uint32_t min_id = 0, max_id = 0;
  std::uint64_t position = 0;  // only in the index of a part

  std::uint64_t column_length(std::size_t column) const {
    switch (column) {
      case kIds: return totals.tokens;
      case kMask: return (totals.tokens + 7) / 8;
      case kOffsets: return totals.documents + 1;
      default: return totals.documents;
    }
  }
};

// ---- index.json and part.json ----

Json totals_to_json(const StoreTotals& totals) {
  return {{"documents", totals.documents}, {"tokens", totals.tokens}, {"trained_tokens", totals.trained_tokens}, {"bytes", totals.bytes}, {"words", totals.words}};
}

StoreTotals totals_from_json(const Json& json, const std::string& source) {
  return {.documents = require_count(json, "documents", source),
          .tokens = require_count(json, "tokens", source),
          .trained_tokens = require_count(json, "trained_tokens", source),
          .bytes = require_count(json, "bytes", source),
          .words = require_count(json, "words", source)};
}

void add(StoreTotals& to, const StoreTotals& more) {
  to.documents += more.documents;
  to.tokens += more.tokens;
  to.trained_tokens += more.trained_tokens;
  to.bytes += more.bytes;
  to.words += more.words;
}

Json header_of(const StoreInfo& info, std::uint64_t tokens_per_shard, std::uint32_t num_parts, const Json& recipe) {
  Json sources = Json::array();
  for (const SourceInfo& source : info.sources)
    sources.push_back({{"name", source.name}, {"origin", source.origin}, {"licence", source.licence}, {"language", source.language}});
  return {{"format", kFormat},
          {"version", kVersion},
          {"tokenizer_hash", info.tokenizer_hash},
          {"vocabulary_size", info.vocabulary_size},
          {"sources", sources},
          {"tokens_per_shard", tokens_per_shard},
          {"parts", num_parts},
          {"recipe", recipe}};
}

StoreInfo info_from_json(const Json& index, const std::string& source) {
  StoreInfo info;
  info.tokenizer_hash = require<std::string>(index, "tokenizer_hash", source);
  const std::uint64_t size = require_count(index, "vocabulary_size", source);
  if (size == 0 || size > UINT32_MAX) fail(ErrorKind::kData, source, ": \"vocabulary_size\" is ", size, ", expected 1 to 4294967295");
  info.vocabulary_size = static_cast<std::uint32_t>(size);
  const Json sources = require<Json>(index, "sources", source);
  if (!sources.is_array() || sources.empty() || sources.size() > 65536) fail(ErrorKind::kData, source, ": \"sources\" must be a list of 1 to 65536 entries");
  for (const Json& entry : sources)
    info.sources.push_back({.name = require<std::string>(entry, "name", source),
                            .origin = require<std::string>(entry, "origin", source),
                            .licence = require<std::string>(entry, "licence", source),
                            .language = require<std::string>(entry, "language", source)});
  return info;
}

Json entry_to_json(const ShardEntry& entry) {
  return {{"file", entry.file}, {"sha256", entry.sha256}, {"file_bytes", entry.file_bytes}, {"totals", totals_to_json(entry.totals)}, {"min_id", entry.min_id}, {"max_id", entry.max_id}};
}

bool is_shard_name(const std::string& name) { return has_form(name, "tokens-#####-######.h5"); }

ShardEntry entry_from_json(const Json& json, std::uint32_t vocabulary_size, const std::string& source) {
  ShardEntry entry;
  entry.file = require<std::string>(json, "file", source);
  if (!is_shard_name(entry.file)) fail(ErrorKind::kData, source, ": \"", entry.file, "\" is not the name of a shard");
  const std::string where = source + ": shard " + entry.file;
  entry.sha256 = require<std::string>(json, "sha256", where);
  entry.file_bytes = require_count(json, "file_bytes", where);
  entry.totals = totals_from_json(require<Json>(json, "totals", where), where);
  const std::uint64_t low = require_count(json, "min_id", where), high = require_count(json, "max_id", where);
  if (low > high || high >= vocabulary_size) fail(ErrorKind::kData, where, ": ids from ", low, " to ", high, " in a vocabulary of ", vocabulary_size);
  entry.min_id = static_cast<std::uint32_t>(low);
  entry.max_id = static_cast<std::uint32_t>(high);
  const StoreTotals& totals = entry.totals;
  if (totals.documents == 0 || totals.documents > totals.tokens || totals.trained_tokens > totals.tokens - totals.documents || entry.file_bytes > kMaxShardBytes ||
      totals.tokens > entry.file_bytes * 4096)
    fail(ErrorKind::kData, where, ": impossible counts: ", totals.documents, " documents, ", totals.tokens, " tokens in ", entry.file_bytes, " bytes");
  return entry;
}

Json read_index(const fs::path& path, std::string* hash = nullptr) {
  return read_sealed(path, {.name = kFormat, .version = kVersion, .what = "the index of a token store", .remedy = "copy the store again, or make it again with alambic prepare"}, hash);
}

void require_same(const Json& index, const Json& header, const fs::path& folder) { require_same_header(index, header, folder, "a token store"); }

fs::path part_folder(const fs::path& folder, std::uint32_t part) { return folder / (".part-" + padded(part, 5)); }

}  // namespace

// ---- writing ----

struct TokenStoreWriter::State {
  fs::path folder;
  StoreInfo info;
  std::uint64_t tokens_per_shard = 0;
  std::uint32_t part = 0, num_parts = 1;
  Json header;
  std::unique_ptr<FolderLock> lock;
  std::vector<ShardEntry> committed;
  bool part_complete = false, store_complete = false;

  // The shard being filled.
  std::vector<std::uint32_t> ids;
  std::vector<std::uint8_t> mask;  // bit i % 8 of byte i / 8
  std::vector<std::uint64_t> offsets = {0}, num_bytes, num_words;
  std::vector<std::uint16_t> source;
  StoreTotals filled;
  std::uint64_t position = 0;

  fs::path index_path() const { return folder / "index.json"; }
  fs::path part_index_path() const { return part_folder(folder, part) / "part.json"; }

  void open();
  void write_part_index() const;
  void commit_shard();
  void write_hdf5(const fs::path& path) const;
  void publish() const;
  void remove_part_folders() const;
};

void TokenStoreWriter::State::open() {
  if (fs::exists(folder) && !fs::is_directory(folder)) fail(ErrorKind::kUsage, folder.string(), ": is not a folder", Remedy{"choose another output folder"});
  if (fs::is_directory(folder)) {
    for (const auto& entry : fs::directory_iterator(folder)) {
      const std::string name = entry.path().filename().string();
      if (name != "index.json" && !is_shard_name(name) && !name.starts_with(".part-"))
        fail(ErrorKind::kUsage, folder.string(), ": holds other files (", name, ")", Remedy{"choose an empty or new output folder"});
    }
  }
  std::error_code problem;
  fs::create_directories(part_folder(folder, part), problem);
  if (problem) fail(ErrorKind::kResource, part_folder(folder, part).string(), ": cannot be created: ", problem.message(), Remedy{"choose an output folder that can be written"});
  if (!fs::exists(index_path())) lock = std::make_unique<FolderLock>(part_folder(folder, part));
  // Looked at again under the lock: the last of several parts may have published in between.
  if (fs::exists(index_path())) {
    lock.reset();
    const Json index = read_index(index_path());
    require_same(index, header, folder);
    remove_part_folders();
    const std::string mine = "tokens-" + padded(part, 5) + "-";
    for (const Json& json : require<Json>(index, "shards", index_path().string())) {
      ShardEntry entry = entry_from_json(json, info.vocabulary_size, index_path().string());
      if (entry.file.starts_with(mine)) committed.push_back(std::move(entry));
    }
    part_complete = store_complete = true;
  } else if (fs::exists(part_index_path())) {
    const std::string where = part_index_path().string();
    const Json index = read_index(part_index_path());
    require_same(index, header, folder);
    for (const Json& json : require<Json>(index, "shards", where)) {
      ShardEntry entry = entry_from_json(json, info.vocabulary_size, where);
      entry.position = require_count(json, "position", where);
      if (sha256_of_file(folder / entry.file) != entry.sha256)
        fail(ErrorKind::kData, (folder / entry.file).string(), ": damaged since it was written: its SHA-256 differs", Remedy{"remove the output folder and prepare again"});
      committed.push_back(std::move(entry));
    }
    part_complete = require<bool>(index, "complete", where);
  } else {
    write_part_index();  // from here on another recipe is refused
  }
}

void TokenStoreWriter::State::write_part_index() const {
  Json index = header;
  index["part"] = part;
  index["complete"] = part_complete;
  index["shards"] = Json::array();
  for (const ShardEntry& entry : committed) {
    Json json = entry_to_json(entry);
    json["position"] = entry.position;
    index["shards"].push_back(std::move(json));
  }
  write_file(part_index_path(), sealed(index));
}

void TokenStoreWriter::State::write_hdf5(const fs::path& path) const {
  const std::lock_guard guard(hdf5_mutex());
  Hdf5Handle file = create_hdf5(path);
  for (const std::string key : {"format", "tokenizer_hash"}) write_attribute(file, key, header.at(key).get<std::string>());
  write_attribute(file, "sources", to_line(header.at("sources")));
  write_attribute(file, "version", static_cast<std::uint64_t>(kVersion));
  write_attribute(file, "vocabulary_size", info.vocabulary_size);
  write_attribute(file, "documents", filled.documents);
  write_attribute(file, "tokens", filled.tokens);
  write_attribute(file, "trained_tokens", filled.trained_tokens);
  write_attribute(file, "bytes", filled.bytes);
  write_attribute(file, "words", filled.words);

  const std::vector<std::uint16_t> narrow = short_ids(info.vocabulary_size) ? std::vector<std::uint16_t>(ids.begin(), ids.end()) : std::vector<std::uint16_t>();
  const std::array<const void*, kNumColumns> values = {narrow.empty() ? static_cast<const void*>(ids.data()) : narrow.data(), mask.data(), offsets.data(), source.data(), num_bytes.data(), num_words.data()};
  const std::array<std::size_t, kNumColumns> lengths = {ids.size(), mask.size(), offsets.size(), source.size(), num_bytes.size(), num_words.size()};
  for (std::size_t column = 0; column < kNumColumns; ++column)
    write_column(file, kColumnNames[column], column_type(column, info.vocabulary_size), lengths[column], kChunkValues, values[column]);
  if (file.close() < 0) fail(ErrorKind::kResource, path.string(), ": HDF5 could not finish the file", Remedy{"check the free space and the health of the disk"});
}

void TokenStoreWriter::State::commit_shard() {
  if (filled.documents == 0) return;
  const fs::path temporary = part_folder(folder, part) / "shard.tmp";
  write_hdf5(temporary);
  fsync_file(temporary);
  ShardEntry entry;
  entry.file = "tokens-" + padded(part, 5) + "-" + padded(committed.size(), 6) + ".h5";
  entry.sha256 = sha256_of_file(temporary);
  entry.file_bytes = fs::file_size(temporary);
  entry.totals = filled;
  const auto [low, high] = std::minmax_element(ids.begin(), ids.end());
  entry.min_id = *low;
  entry.max_id = *high;
  entry.position = position;
  // A shard that is in place but not in the index (killed in between) is written again with the same bytes.
  std::error_code problem;
  fs::rename(temporary, folder / entry.file, problem);
  if (problem) fail(ErrorKind::kResource, (folder / entry.file).string(), ": cannot be renamed into place: ", problem.message());
  fsync_folder(folder);
  committed.push_back(std::move(entry));
  write_part_index();

  ids.clear(), mask.clear(), num_bytes.clear(), num_words.clear(), source.clear();
  offsets = {0};
  filled = {};
}

// Writes index.json once all parts are complete. Two parts that finish together write the same bytes, so no lock is needed.
void TokenStoreWriter::State::publish() const {
  Json index = header;
  StoreTotals totals;
  Json shards = Json::array();
  try {
    for (std::uint32_t other = 0; other < num_parts; ++other) {
      const fs::path path = part_folder(folder, other) / "part.json";
      if (!fs::exists(path)) return;  // not begun, or published by another process already
      const Json part_index = read_index(path);
      require_same(part_index, header, folder);
      if (!require<bool>(part_index, "complete", path.string())) return;
      for (const Json& json : require<Json>(part_index, "shards", path.string())) {
        const ShardEntry entry = entry_from_json(json, info.vocabulary_size, path.string());
        add(totals, entry.totals);
        shards.push_back(entry_to_json(entry));
      }
    }
  } catch (const Error&) {
    if (fs::exists(index_path())) return;  // the other process has published and is removing what we were reading
    throw;
  }
  if (totals.documents == 0) fail(ErrorKind::kData, folder.string(), ": no document was written: a token store may not be empty");
  index["totals"] = totals_to_json(totals);
  index["shards"] = std::move(shards);
  const fs::path temporary = part_folder(folder, part) / "index.json";
  write_file(temporary, sealed(index));
  std::error_code problem;
  fs::rename(temporary, index_path(), problem);
  if (problem && !fs::exists(index_path())) fail(ErrorKind::kResource, index_path().string(), ": cannot be renamed into place: ", problem.message());
  fsync_folder(folder);
  remove_part_folders();
}

void TokenStoreWriter::State::remove_part_folders() const {
  for (std::uint32_t other = 0; other < num_parts; ++other) {
    std::error_code ignored;  // what a killed process leaves is removed by the next writer that looks
    fs::remove_all(part_folder(folder, other), ignored);
  }
}

TokenStoreWriter::TokenStoreWriter(const fs::path& folder, StoreInfo info, std::uint64_t tokens_per_shard, std::uint32_t part, std::uint32_t num_parts, Json recipe)
    : state_(std::make_unique<State>()) {
  if (info.vocabulary_size == 0 || info.sources.empty() || info.sources.size() > 65536) fail(ErrorKind::kBug, "a token store needs a vocabulary and 1 to 65536 sources");
  if (tokens_per_shard == 0) fail(ErrorKind::kUsage, "tokens_per_shard must be at least 1");
  if (num_parts == 0 || part >= num_parts || num_parts > 99999) fail(ErrorKind::kUsage, "part ", part, " of ", num_parts, " parts: must be 0 to 99998 and below their number");
  state_->folder = folder;
  state_->header = header_of(info, tokens_per_shard, num_parts, recipe);
  state_->info = std::move(info);
  state_->tokens_per_shard = tokens_per_shard;
  state_->part = part;
  state_->num_parts = num_parts;
  state_->open();
}

TokenStoreWriter::~TokenStoreWriter() = default;

std::uint64_t TokenStoreWriter::committed_documents() const {
  std::uint64_t documents = 0;
  for (const ShardEntry& entry : state_->committed) documents += entry.totals.documents;
  return documents;
}

std::optional<std::uint64_t> TokenStoreWriter::committed_position() const {
  if (state_->committed.empty()) return std::nullopt;
  return state_->committed.back().position;
}

bool TokenStoreWriter::complete() const { return state_->part_complete; }

void TokenStoreWriter::append(const Document& document, std::uint64_t position) {
  State& state = *state_;
  if (state.part_complete) fail(ErrorKind::kBug, "append to a part of a token store that is complete");
  const std::size_t length = document.ids.size();
  if (length == 0 || length > UINT32_MAX || document.mask.size() != length) fail(ErrorKind::kBug, "a document of ", length, " ids and ", document.mask.size(), " mask values");
  if (document.source >= state.info.sources.size()) fail(ErrorKind::kBug, "source ", document.source, " of ", state.info.sources.size());
  if (document.mask[0] != 0) fail(ErrorKind::kBug, "the first token of a document has nothing before it and cannot be trained");
  std::uint64_t trained = 0;
  const std::size_t begin = state.ids.size();
  state.mask.resize((begin + length + 7) / 8);
  for (std::size_t i = 0; i < length; ++i) {
    if (document.ids[i] >= state.info.vocabulary_size) fail(ErrorKind::kBug, "token id ", document.ids[i], " in a vocabulary of ", state.info.vocabulary_size);
    const std::uint8_t bit = document.mask[i] != 0;
    trained += bit;
    state.mask[(begin + i) / 8] = static_cast<std::uint8_t>(state.mask[(begin + i) / 8] | bit << ((begin + i) % 8));
  }
  state.ids.insert(state.ids.end(), document.ids.begin(), document.ids.end());
  state.offsets.push_back(state.ids.size());
  state.source.push_back(document.source);
  state.num_bytes.push_back(document.num_bytes);
  state.num_words.push_back(document.num_words);
  add(state.filled, {.documents = 1, .tokens = length, .trained_tokens = trained, .bytes = document.num_bytes, .words = document.num_words});
  state.position = position;
  if (state.filled.tokens >= state.tokens_per_shard) state.commit_shard();
}

StoreTotals TokenStoreWriter::finish() {
  State& state = *state_;
  if (!state.part_complete) {
    state.commit_shard();
    state.part_complete = true;
    state.write_part_index();
  }
  if (!state.store_complete) state.publish();
  StoreTotals totals;
  for (const ShardEntry& entry : state.committed) add(totals, entry.totals);
  return totals;
}

// ---- reading ----

namespace {

using Chunk = std::vector<unsigned char>;

struct OpenShard {
  Hdf5Handle file;
  std::array<Hdf5Handle, kNumColumns> columns;
};

struct Shard {
  ShardEntry entry;
  std::uint64_t first_document = 0;
  std::vector<std::uint64_t> starts;  // first token of each kDocumentsPerStart-th document
};

}  // namespace

struct TokenStore::State {
  fs::path folder;
  std::string hash;
  StoreInfo info;
  StoreTotals totals;
  Json recipe;
  std::vector<Shard> shards;
  std::vector<std::uint32_t> lengths;

  // Decoded chunks and open shards, least recently used last.
  std::mutex mutex;
  std::list<std::pair<std::uint64_t, std::shared_ptr<const Chunk>>> chunks;
  std::unordered_map<std::uint64_t, decltype(chunks)::iterator> chunk_of;
  std::size_t chunk_bytes = 0;
  std::list<std::pair<std::size_t, OpenShard>> open_shards;

  ~State() {
    const std::lock_guard guard(hdf5_mutex());
    open_shards.clear();
  }

  OpenShard& open_shard(std::size_t index);  // with both mutexes held
  std::shared_ptr<const Chunk> chunk(std::size_t shard, std::size_t column, std::uint64_t number);
  void read(std::size_t shard, std::size_t column, std::uint64_t begin, std::uint64_t count, unsigned char* into);
  void read_offsets(Shard& shard, std::size_t index);
};

OpenShard& TokenStore::State::open_shard(std::size_t index) {
  for (auto found = open_shards.begin(); found != open_shards.end(); ++found) {
    if (found->first != index) continue;
    open_shards.splice(open_shards.begin(), open_shards, found);
    return open_shards.front().second;
  }
  if (open_shards.size() >= kMaxOpenShards) open_shards.pop_back();
  const ShardEntry& entry = shards[index].entry;
  const fs::path path = folder / entry.file;
  OpenShard opened{.file = open_hdf5(path, kColumnNames), .columns = {}};
  for (std::size_t column = 0; column < kNumColumns; ++column)
    opened.columns[column] = open_column(opened.file, path, kColumnNames[column], column_type(column, info.vocabulary_size), entry.column_length(column), kChunkValues);
  open_shards.emplace_front(index, std::move(opened));
  return open_shards.front().second;
}

std::shared_ptr<const Chunk> TokenStore::State::chunk(std::size_t shard, std::size_t column, std::uint64_t number) {
  const std::uint64_t key = (static_cast<std::uint64_t>(shard) * kNumColumns + column) << 32 | number;
  const std::lock_guard guard(mutex);
  if (const auto found = chunk_of.find(key); found != chunk_of.end()) {
    chunks.splice(chunks.begin(), chunks, found->second);
    return found->second->second;
  }
  const ShardEntry& entry = shards[shard].entry;
  const std::uint64_t begin = number * kChunkValues, count = std::min(kChunkValues, entry.column_length(column) - begin);
  auto values = std::make_shared<Chunk>(count * column_width(column, info.vocabulary_size));
  {
    const std::lock_guard hdf5_guard(hdf5_mutex());
    read_column(open_shard(shard).columns[column], folder / entry.file, kColumnNames[column], begin, count, values->data());
  }
  if (column == kIds) {
    const auto check = [&](const auto* ids) {
      for (std::uint64_t i = 0; i < count; ++i)
        if (ids[i] < entry.min_id || ids[i] > entry.max_id)
          fail(ErrorKind::kData, (folder / entry.file).string(), ": token ", begin + i, " has id ", ids[i], ", outside of ", entry.min_id, " to ", entry.max_id, " which the index states");
    };
    if (short_ids(info.vocabulary_size)) check(reinterpret_cast<const std::uint16_t*>(values->data()));
    else check(reinterpret_cast<const std::uint32_t*>(values->data()));
  }
  chunk_bytes += values->size();
  chunks.emplace_front(key, values);
  chunk_of[key] = chunks.begin();
  while (chunk_bytes > kCacheBytes && chunks.size() > 1) {
    chunk_bytes -= chunks.back().second->size();
    chunk_of.erase(chunks.back().first);
    chunks.pop_back();
  }
  return values;
}

void TokenStore::State::read(std::size_t shard, std::size_t column, std::uint64_t begin, std::uint64_t count, unsigned char* into) {
  const std::size_t width = column_width(column, info.vocabulary_size);
  while (count > 0) {
    const std::shared_ptr<const Chunk> values = chunk(shard, column, begin / kChunkValues);
    const std::uint64_t within = begin % kChunkValues, here = std::min(count, values->size() / width - within);
    std::memcpy(into, values->data() + within * width, here * width);
    into += here * width;
    begin += here;
    count -= here;
  }
}

void TokenStore::State::read_offsets(Shard& shard, std::size_t index) {
  const std::string where = (folder / shard.entry.file).string();
  const std::uint64_t count = shard.entry.column_length(kOffsets);
  std::vector<std::uint64_t> offsets(std::min(count, kChunkValues));
  std::uint64_t last = 0;
  for (std::uint64_t begin = 0; begin < count; begin += kChunkValues) {
    const std::uint64_t here = std::min(kChunkValues, count - begin);
    {
      const std::lock_guard guard(hdf5_mutex());
      read_column(open_shard(index).columns[kOffsets], where, kColumnNames[kOffsets], begin, here, offsets.data());
    }
    for (std::uint64_t i = 0; i < here; ++i) {
      const std::uint64_t number = begin + i;
      if (number == 0 ? offsets[i] != 0 : offsets[i] <= last || offsets[i] - last > UINT32_MAX)
        fail(ErrorKind::kData, where, ": \"offsets\" ", number, " is ", offsets[i], " after ", last, ": they must begin at 0 and rise");
      if (number > 0) lengths.push_back(static_cast<std::uint32_t>(offsets[i] - last));
      if (number % kDocumentsPerStart == 0) shard.starts.push_back(offsets[i]);
      last = offsets[i];
    }
  }
  if (last != shard.entry.totals.tokens) fail(ErrorKind::kData, where, ": \"offsets\" end at ", last, " of ", shard.entry.totals.tokens, " tokens");
}

TokenStore::TokenStore(const fs::path& folder) : state_(std::make_unique<State>()) {
  State& state = *state_;
  state.folder = folder;
  if (!fs::is_directory(folder)) fail(ErrorKind::kData, folder.string(), ": no such folder", Remedy{"make the token store with alambic prepare"});
  const fs::path index_path = folder / "index.json";
  const std::string where = index_path.string();
  if (!fs::exists(index_path)) {
    bool begun = false;
    for (const auto& entry : fs::directory_iterator(folder)) begun |= entry.path().filename().string().starts_with(".part-");
    if (begun) fail(ErrorKind::kData, folder.string(), ": unfinished token store: not every part is complete", Remedy{"run the same alambic prepare again; it goes on where it was"});
    fail(ErrorKind::kData, folder.string(), ": not a token store: it has no index.json", Remedy{"make one with alambic prepare"});
  }
  const Json index = read_index(index_path, &state.hash);
  state.info = info_from_json(index, where);
  state.recipe = require<Json>(index, "recipe", where);
  state.totals = totals_from_json(require<Json>(index, "totals", where), where);
  const Json shards = require<Json>(index, "shards", where);
  if (!shards.is_array() || shards.empty()) fail(ErrorKind::kData, where, ": \"shards\" must be a list that is not empty");
  StoreTotals totals;
  for (const Json& json : shards) {
    Shard shard{.entry = entry_from_json(json, state.info.vocabulary_size, where), .first_document = totals.documents, .starts = {}};
    const fs::path path = folder / shard.entry.file;
    if (!fs::is_regular_file(fs::symlink_status(path))) fail(ErrorKind::kData, path.string(), ": the shard is missing or not a regular file", Remedy{"copy the store again"});
    if (const std::uint64_t size = fs::file_size(path); size != shard.entry.file_bytes)
      fail(ErrorKind::kData, path.string(), ": ", size, " bytes, ", shard.entry.file_bytes, " expected", Remedy{"copy the store again"});
    if (const std::string found = sha256_of_file(path); found != shard.entry.sha256)
      fail(ErrorKind::kData, path.string(), ": damaged: SHA-256 is ", found, ", expected ", shard.entry.sha256, Remedy{"copy the store again, or make it again with alambic prepare"});
    add(totals, shard.entry.totals);
    state.shards.push_back(std::move(shard));
    state.read_offsets(state.shards.back(), state.shards.size() - 1);
  }
  if (totals_to_json(totals) != totals_to_json(state.totals)) fail(ErrorKind::kData, where, ": \"totals\" are not the sums of the shards");
}

TokenStore::~TokenStore() = default;
TokenStore::TokenStore(TokenStore&&) noexcept = default;
TokenStore& TokenStore::operator=(TokenStore&&) noexcept = default;

const StoreInfo& TokenStore::info() const { return state_->info; }
const StoreTotals& TokenStore::totals() const { return state_->totals; }
const fs::path& TokenStore::folder() const { return state_->folder; }
const std::string& TokenStore::hash() const { return state_->hash; }
const Json& TokenStore::recipe() const { return state_->recipe; }
std::uint64_t TokenStore::num_documents() const { return state_->lengths.size(); }

std::uint32_t TokenStore::length(std::uint64_t document) const {
  if (document >= state_->lengths.size()) fail(ErrorKind::kBug, "document ", document, " of ", state_->lengths.size());
  return state_->lengths[document];
}

Document TokenStore::read(std::uint64_t document) const {
  State& state = *state_;
  const std::uint64_t num_tokens = length(document);
  const auto behind = std::upper_bound(state.shards.begin(), state.shards.end(), document, [](std::uint64_t number, const Shard& shard) { return number < shard.first_document; });
  const Shard& shard = *std::prev(behind);
  const auto index = static_cast<std::size_t>(std::prev(behind) - state.shards.begin());
  const std::uint64_t row = document - shard.first_document;
  std::uint64_t begin = shard.starts[row / kDocumentsPerStart];
  for (std::uint64_t i = document - row % kDocumentsPerStart; i < document; ++i) begin += state.lengths[i];

  Document result;
  result.ids.resize(num_tokens);
  if (short_ids(state.info.vocabulary_size)) {
    std::vector<std::uint16_t> narrow(num_tokens);
    state.read(index, kIds, begin, num_tokens, reinterpret_cast<unsigned char*>(narrow.data()));
    std::copy(narrow.begin(), narrow.end(), result.ids.begin());
  } else {
    state.read(index, kIds, begin, num_tokens, reinterpret_cast<unsigned char*>(result.ids.data()));
  }
  const std::uint64_t first_byte = begin / 8, num_mask_bytes = (begin + num_tokens + 7) / 8 - first_byte;
  std::vector<unsigned char> bits(num_mask_bytes);
  state.read(index, kMask, first_byte, num_mask_bytes, bits.data());
  result.mask.resize(num_tokens);
  for (std::uint64_t i = 0; i < num_tokens; ++i) {
    const std::uint64_t bit = begin + i - first_byte * 8;
    result.mask[i] = bits[bit / 8] >> (bit % 8) & 1;
  }
  const std::string where = (state.folder / shard.entry.file).string();
  if (result.mask[0] != 0) fail(ErrorKind::kData, where, ": document ", row, " trains its first token, which nothing precedes");
  state.read(index, kSource, row, 1, reinterpret_cast<unsigned char*>(&result.source));
  state.read(index, kNumBytes, row, 1, reinterpret_cast<unsigned char*>(&result.num_bytes));
  state.read(index, kNumWords, row, 1, reinterpret_cast<unsigned char*>(&result.num_words));
  if (result.source >= state.info.sources.size()) fail(ErrorKind::kData, where, ": document ", row, " has source ", result.source, " of ", state.info.sources.size());
  return result;
}

}  // namespace alambic::data
