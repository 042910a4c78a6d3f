// SPDX-License-Identifier: Apache-2.0
#include "distill/write_cache.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <thread>

#include "checkpoints/hf_folder.h"
#include "checkpoints/licence.h"
#include "core/error.h"
#include "core/files.h"
#include "core/log.h"
#include "core/random.h"
#include "data/token_store.h"
#include "data/tokenizer.h"
#include "distill/signal_rows.h"
#include "models/fused_blocks.h"
#include "train/cross_entropy.h"
#include "train/inputs.h"
#include "train/memory.h"
#include "train/run_log.h"

namespace alambic::distill {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kSecondsBetweenNotes = 20;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

struct ShardOf {
  std::uint32_t shard = 0, num_shards = 1;
};

// "i/n", counted from 0.
ShardOf shard_of(const std::string& text) {
  ShardOf result;
  const char* const end = text.data() + text.size();
  const auto first = std::from_chars(text.data(), end, result.shard);
  const bool slash = first.ec == std::errc() && first.ptr != end && *first.ptr == '/';
  const auto second = slash ? std::from_chars(first.ptr + 1, end, result.num_shards) : first;
  if (!slash || second.ec != std::errc() || second.ptr != end || result.num_shards == 0 || result.shard >= result.num_shards)
    fail(ErrorKind::kUsage, "shard: \"", text, "\" is not i/n with i from 0 to n - 1", Remedy{"write 0/1 for all, or 0/2 and 1/2 for halves"});
  return result;
}

at::ScalarType compute_type_of(const CacheConfig& config) {
  if (config.compute_type == "auto") return models::fastest_compute_type();
  return config.compute_type == "bf16" ? at::kBFloat16 : at::kFloat;
}

// Two tokenizers may be written differently and still give each id the same token.
void require_same_tokens(const data::Tokenizer& teacher, const CacheConfig& config, const data::StoreInfo& store, const std::string& where) {
  const data::Tokenizer own = data::Tokenizer::from_file(config.tokenizer);
  if (own.hash() != store.tokenizer_hash)
    fail(ErrorKind::kData, "tokenizer: ", config.tokenizer.string(), " (", own.hash(), ") is not that of ", where, " (", store.tokenizer_hash, ")", Remedy{"name the tokenizer that the store was prepared with"});
  for (std::uint32_t id = 0; id < store.vocabulary_size; ++id) {
    const auto wanted = own.token_of(id), found = teacher.token_of(id);
    if (wanted != found)
      fail(ErrorKind::kData, config.model.string(), ": its id ", id, " is \"", found.value_or("(none)"), "\", that of ", where, " is \"", wanted.value_or("(none)"), "\": another vocabulary",
           Remedy{"take a teacher with the vocabulary of the student"});
  }
}

std::vector<data::TokenStore> open_stores(const CacheConfig& config, const models::ModelConfig& model) {
  std::optional<data::Tokenizer> tokenizer;
  if (std::filesystem::exists(config.model / "tokenizer.json")) tokenizer = data::Tokenizer::from_file(config.model);
  else log_warning(config.model.string(), ": no tokenizer.json, so it cannot be checked that the stores were made for this teacher");
  std::vector<data::TokenStore> stores;
  for (const CacheStoreItem& item : config.stores) {
    data::TokenStore store(item.store);
    const std::string where = item.store.string();
    const data::StoreInfo& info = store.info();
    if (!stores.empty() && info.tokenizer_hash != stores[0].info().tokenizer_hash)
      fail(ErrorKind::kData, where, ": was made with another tokenizer than ", stores[0].folder().string(), Remedy{"write a cache for each"});
    for (const data::TokenStore& other : stores)
      if (other.hash() == store.hash()) fail(ErrorKind::kUsage, "stores: ", where, " is the same store as ", other.folder().string(), Remedy{"name each store once"});
    if (info.vocabulary_size > model.vocabulary_size)
      fail(ErrorKind::kData, where, ": its tokenizer has ", info.vocabulary_size, " tokens, the teacher only ", model.vocabulary_size, Remedy{"prepare the text with the tokenizer of this teacher"});
    if (tokenizer && tokenizer->hash() != info.tokenizer_hash) {
      if (config.tokenizer.empty())
        fail(ErrorKind::kData, where, ": was made with another tokenizer (", info.tokenizer_hash, ") than the teacher's (", tokenizer->hash(), "); equal sizes do not make equal ids",
             Remedy{"take a teacher with the vocabulary of the student; where only the tokenizer's file differs, name the store's in `tokenizer`"});
      require_same_tokens(*tokenizer, config, info, where);
    }
    stores.push_back(std::move(store));
  }
  return stores;
}

CacheHeader header_of(const CacheConfig& config, const models::ModelConfig& model, const std::vector<data::TokenStore>& stores) {
  const bool sampled = config.kind == "sampled";
  CacheHeader header;
  std::filesystem::path folder = std::filesystem::absolute(config.model).lexically_normal();
  if (!folder.has_filename()) folder = folder.parent_path();
  header.teacher = {.name = folder.filename().string(),
                    .hash = checkpoints::base_hash(config.model),
                    .family = std::string(model.family->model_type),
                    .licence = checkpoints::licence_of_model(config.model).spdx,
                    .compute_type = toString(compute_type_of(config)),
                    .parameters = model.num_parameters()};
  for (const data::TokenStore& store : stores) {
    header.stores.push_back({.hash = store.hash(), .documents = store.num_documents()});
    header.form.vocabulary_size = std::max(header.form.vocabulary_size, store.info().vocabulary_size);
  }
  header.tokenizer_hash = stores[0].info().tokenizer_hash;
  header.form.kind = !sampled ? SignalKind::kTopK : config.proposal_exponent == 1 ? SignalKind::kSampled : SignalKind::kWeighted;
  header.form.slots = sampled ? config.draws : config.k;
  header.temperature = config.temperature;
  header.proposal_exponent = sampled ? config.proposal_exponent : 1;
  header.seed = sampled ? config.seed : 0;
  header.row_length = config.row_length;
  header.split_long = config.split_long;
  header.rows_per_batch = config.rows_per_batch;
  header.rows_per_file = static_cast<std::uint64_t>(config.rows_per_file);
  return header;
}

// A stretch of a document in one of the teacher's passes, as data/packer.h cuts them.
struct Piece {
  std::size_t document = 0;  // of the group
  std::uint32_t first_token = 0, length = 0;
};

std::vector<Piece> pieces_of(std::size_t document, std::uint32_t length, const CacheHeader& header) {
  std::vector<Piece> pieces;
  const auto row = static_cast<std::uint32_t>(header.row_length);
  if (length < 2) return pieces;
  if (!header.split_long) return {{.document = document, .first_token = 0, .length = std::min(length, row)}};
  for (std::uint64_t first = 0; first + 1 < length; first += row - 1)
    pieces.push_back({.document = document, .first_token = static_cast<std::uint32_t>(first), .length = static_cast<std::uint32_t>(std::min<std::uint64_t>(row, length - first))});
  return pieces;
}

// The teacher's answers to the documents of one group, in passes of whole pieces.
class Teacher {
 public:
  Teacher(const models::Decoder& decoder, const CacheHeader& header)
      : decoder_(decoder), settings_{.form = header.form, .temperature = header.temperature, .proposal_exponent = header.proposal_exponent}, header_(header) {}

  /// Called with (store, document, first token of a piece, its signal) in the order of the pieces. `documents` hold numbers and texts.
  struct Asked {
    std::size_t store = 0;
    std::uint64_t number = 0;  // in that store
    data::Document text;
  };

  std::vector<std::vector<PieceSignal>> signals(const std::vector<Asked>& documents, const std::function<void()>& before_pass) {
    std::vector<Piece> pieces;
    for (std::size_t i = 0; i < documents.size(); ++i) {
      const std::vector<Piece> more = pieces_of(i, static_cast<std::uint32_t>(documents[i].text.ids.size()), header_);
      pieces.insert(pieces.end(), more.begin(), more.end());
    }
    std::vector<std::vector<PieceSignal>> result(documents.size());
    const std::int64_t most_tokens = header_.row_length * header_.rows_per_batch;
    for (std::size_t begin = 0; begin < pieces.size();) {
      std::size_t end = begin;
      std::int64_t tokens = 0;
      for (; end < pieces.size() && (end == begin || tokens + pieces[end].length <= most_tokens); ++end) tokens += pieces[end].length;
      before_pass();
      pass(documents, std::span(pieces).subspan(begin, end - begin), tokens, result);
      begin = end;
    }
    return result;
  }

  std::uint64_t num_tokens() const { return num_tokens_; }

 private:
  void pass(const std::vector<Asked>& documents, std::span<const Piece> pieces, std::int64_t num_tokens, std::vector<std::vector<PieceSignal>>& result) {
    models::Input input{.tokens_T = at::empty({num_tokens}, at::kLong), .positions_T = at::empty({num_tokens}, at::kLong), .document_lengths = {}};
    auto* token = input.tokens_T.mutable_data_ptr<std::int64_t>();
    auto* position = input.positions_T.mutable_data_ptr<std::int64_t>();
    std::vector<std::int64_t> kept;
    std::vector<std::uint64_t> seeds, rows_of_piece;
    std::int64_t t = 0;
    for (const Piece& piece : pieces) {
      const Asked& document = documents[piece.document];
      rows_of_piece.push_back(0);
      for (std::uint32_t i = 0; i < piece.length; ++i, ++t) {
        const std::size_t next = piece.first_token + i + 1;
        *token++ = document.text.ids[next - 1];
        *position++ = i;
        if (i + 1 == piece.length || document.text.mask[next] == 0) continue;
        kept.push_back(t);
        seeds.push_back(derive_seed(header_.seed, "teacher draws", {store_number(document.store), document.number, next}));
        ++rows_of_piece.back();
      }
      input.document_lengths.push_back(piece.length);
    }
    num_tokens_ += static_cast<std::uint64_t>(num_tokens);
    const auto num_kept = static_cast<std::int64_t>(kept.size()), slots = header_.form.slots;
    ids_.resize(static_cast<std::size_t>(num_kept * slots)), codes_.resize(ids_.size()), tails_.resize(kept.size());
    if (num_kept > 0) {
      const at::Tensor hidden_TD = decoder_.hidden_TD(input), index_K = at::empty({num_kept}, at::kLong);
      std::copy(kept.begin(), kept.end(), index_K.mutable_data_ptr<std::int64_t>());
      train::head_loss_sum(hidden_TD, decoder_.head, index_K, /*dropout_seed=*/0, [&](at::Tensor& logits_KV, std::int64_t first, bool) {
        const std::int64_t bad = signal_of_rows(settings_, logits_KV, seeds.data() + first, ids_.data() + first * slots, codes_.data() + first * slots, tails_.data() + first);
        if (bad >= 0) fail_at(documents, pieces, rows_of_piece, static_cast<std::uint64_t>(first + bad));
        return 0.0;
      });
    }
    std::int64_t row = 0;
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      PieceSignal signal{.rows = rows_of_piece[i], .bytes = {}};
      const auto rows = static_cast<std::int64_t>(signal.rows);
      pack(header_.form, rows, ids_.data() + row * slots, codes_.data() + row * slots, tails_.data() + row, signal.bytes);
      row += rows;
      result[pieces[i].document].push_back(std::move(signal));
    }
  }

  [[noreturn]] void fail_at(const std::vector<Asked>& documents, std::span<const Piece> pieces, const std::vector<std::uint64_t>& rows_of_piece, std::uint64_t row) const {
    std::size_t i = 0;
    while (row >= rows_of_piece[i]) row -= rows_of_piece[i++];
    const Asked& document = documents[pieces[i].document];
    fail(ErrorKind::kNumerics, "document ", document.number, " of store ", document.store, ": the teacher's logits are not finite", Remedy{"try compute_type: f32; else the teacher's weights are broken"});
  }

  std::uint64_t store_number(std::size_t store) const {
    std::uint64_t number = 0;
    const std::string& hash = header_.stores[store].hash;
    std::from_chars(hash.data(), hash.data() + std::min<std::size_t>(16, hash.size()), number, 16);
    return number;
  }

  const models::Decoder& decoder_;
  const RowSettings settings_;
  const CacheHeader& header_;
  std::uint64_t num_tokens_ = 0;
  std::vector<std::int32_t> ids_;
  std::vector<std::uint32_t> codes_;
  std::vector<float> tails_;
};

// Whether every shard has been published; the reader checks all the rest.
bool all_published(const std::filesystem::path& folder, std::uint32_t num_shards) {
  std::uint32_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) count += entry.path().filename().string().starts_with("shard-");
  return count == num_shards;
}

}  // namespace

void CacheStoreItem::visit(FieldVisitor& fields) { fields.field("store", store, {.help = "folder that alambic prepare made", .required = true}); }

void CacheConfig::visit(FieldVisitor& fields) {
  fields.field("model", model, {.help = "the teacher: a Hugging Face model folder", .required = true});
  fields.field("output", output, {.help = "folder of the cache", .required = true});
  fields.list("stores", stores, {.help = "token stores whose trained tokens get the teacher's signal", .required = true});
  fields.field("kind", kind, {.help = "sampled: ids drawn from the teacher's softmax, unbiased (arXiv:2503.16870); top_k: the likeliest ids and the mass of the others", .choices = {"sampled", "top_k"}});
  fields.field("k", k, {.help = "ids a token with kind: top_k; takes 4 k + 4 bytes", .low = 1, .high = 4096});
  fields.field("draws", draws, {.help = "draws a token with kind: sampled", .low = 1, .high = 4096});
  fields.field("temperature", temperature, {.help = "of the teacher's softmax; training must use the same", .low = 0.01, .high = 100});
  fields.field("proposal_exponent", proposal_exponent, {.help = "sampled: draws from p to this power, with weights that correct for it; below 1 rare ids are drawn more often", .low = 0.25, .high = 1.25});
  fields.field("row_length", row_length, {.help = "the teacher's context, and the row_length that training must use", .unit = "tokens", .low = 2, .high = 1 << 24});
  fields.field("split_long", split_long, {.help = "longer documents become pieces (true) or lose their end (false), as in training"});
  fields.field("rows_per_batch", rows_per_batch, {.help = "row_lengths of tokens in one pass of the teacher", .low = 1, .high = 1 << 20});
  fields.field("shard", shard, {.help = "i/n: which of n parts this process writes, from 0; run all n to complete the cache"});
  fields.field("rows_per_file", rows_per_file, {.help = "trained tokens after which a file is closed; at most so many are lost when the process is killed", .low = 1, .high = 1 << 30});
  fields.field("compute_type", compute_type, {.help = "auto: bf16 where the processor multiplies it natively, else f32", .choices = {"auto", "f32", "bf16"}});
  fields.field("tokenizer", tokenizer, {.help = "the stores' tokenizer, where the teacher's gives each id the same token but is written otherwise"});
  fields.field("threads", threads, {.help = "0: all processors", .low = 0, .high = 1024});
  fields.field("seed", seed, {.help = "of the draws"});
}

namespace {

// A config that has been checked against what it names.
struct Opened {
  ShardOf part;
  models::ModelConfig model;
  std::vector<data::TokenStore> stores;
  CacheHeader header;
  std::vector<std::uint64_t> first_document;  // of each store, numbered through
  std::uint64_t num_documents = 0;

  explicit Opened(const CacheConfig& config) : part(shard_of(config.shard)) {
    if (config.stores.empty()) fail(ErrorKind::kUsage, "stores: is empty, so there is nothing for the teacher to read");
    if (config.kind == "top_k" && config.proposal_exponent != 1) fail(ErrorKind::kUsage, "proposal_exponent: only kind: sampled draws from another distribution");
    at::set_num_threads(config.threads > 0 ? static_cast<int>(config.threads) : static_cast<int>(std::max(1u, std::thread::hardware_concurrency())));
    model = models::read_model_config(config.model);
    stores = open_stores(config, model);
    header = header_of(config, model, stores);
    for (const data::TokenStore& store : stores) first_document.push_back(std::exchange(num_documents, num_documents + store.num_documents()));
  }

  std::size_t store_of(std::uint64_t number) const {
    return static_cast<std::size_t>(std::upper_bound(first_document.begin(), first_document.end(), number) - first_document.begin() - 1);
  }
  bool is_of_shard(std::uint64_t number) const { return number / kGroupDocuments % part.num_shards == part.shard; }
  Teacher::Asked document(std::uint64_t number) const {
    const std::size_t store = store_of(number);
    return {.store = store, .number = number - first_document[store], .text = stores[store].read(number - first_document[store])};
  }
};

models::Decoder load_teacher(const CacheConfig& config) {
  models::Decoder decoder = checkpoints::load_decoder(config.model, compute_type_of(config));
  if (const std::string reason = models::use_fused_blocks(decoder); !reason.empty()) log_info("blocks: ATen operators, as ", reason);
  return decoder;
}

}  // namespace

Json plan_cache(const CacheConfig& config, bool probe) {
  const at::NoGradGuard no_grad;
  const Opened opened(config);
  const CacheHeader& header = opened.header;
  std::uint64_t documents = 0, tokens = 0;
  for (std::uint64_t number = 0; number < opened.num_documents; ++number) {
    if (!opened.is_of_shard(number)) continue;
    ++documents;
    const std::size_t store = opened.store_of(number);
    for (const Piece& piece : pieces_of(0, opened.stores[store].length(number - opened.first_document[store]), header)) tokens += piece.length;
  }
  const std::uint64_t disk = header.form.most_bytes(tokens), free = free_bytes(config.output);
  Json data = Json::array(), warnings = Json::array();
  for (const data::TokenStore& store : opened.stores) data.push_back(train::describe_store("read by the teacher", store.folder(), store));
  if (disk > free) warnings.push_back("disk: up to " + std::to_string(disk >> 20) + " MiB are needed, " + std::to_string(free >> 20) + " MiB are free at " + config.output.string());

  models::Decoder decoder = load_teacher(config);
  Json time = nullptr;
  if (probe && documents > 0) {
    Teacher teacher(decoder, header);
    std::vector<Teacher::Asked> asked;
    std::uint64_t some = 0;
    for (std::uint64_t number = 0; number < opened.num_documents && some < static_cast<std::uint64_t>(header.row_length * header.rows_per_batch); ++number) {
      if (!opened.is_of_shard(number)) continue;
      asked.push_back(opened.document(number));
      some += std::min<std::uint64_t>(asked.back().text.ids.size(), static_cast<std::uint64_t>(header.row_length));
    }
    teacher.signals(asked, [] {});  // the first pass makes kernels and memory ready
    const std::uint64_t before = teacher.num_tokens();
    const Clock::time_point start = Clock::now();
    teacher.signals(asked, [] {});
    const double rate = static_cast<double>(teacher.num_tokens() - before) / seconds_since(start);
    time = {{"tokens_per_second", rate}, {"seconds", rate > 0 ? Json(static_cast<double>(tokens) / rate) : Json(nullptr)}, {"measured", true}, {"note", "the teacher's passes, and drawing from them"},
            {"probe_peak_memory", train::process_memory().peak}};
  }
  const train::MemoryEstimate memory = train::estimate_reading_memory(decoder, header.row_length * header.rows_per_batch);
  const std::uint64_t available = train::available_memory();
  if (available > 0 && memory.total() > available)
    warnings.push_back("memory: about " + std::to_string(memory.total() >> 20) + " MiB are needed, " + std::to_string(available >> 20) + " MiB are available; lower rows_per_batch");
  return {{"documents", documents},
          {"tokens", tokens},
          {"bytes_per_token_at_most", tokens > 0 ? Json(static_cast<double>(disk) / static_cast<double>(tokens)) : Json(nullptr)},
          {"model", {{"folder", config.model.string()}, {"family", header.teacher.family}, {"parameters", header.teacher.parameters}, {"compute_type", header.teacher.compute_type}, {"sha256", header.teacher.hash}}},
          {"data", data},
          {"memory", {{"weights", memory.weights}, {"activations", memory.activations}, {"head", memory.head}, {"library", memory.library}, {"total", memory.total()}, {"available", available}}},
          {"time", time},
          {"disk", {{"total", disk}, {"free", free}}},
          {"teacher_licence", header.teacher.licence},
          {"warnings", warnings}};
}

CacheReport write_cache(const CacheConfig& config, const std::function<bool()>& stop_requested) {
  const at::NoGradGuard no_grad;
  const Opened opened(config);
  const ShardOf& part = opened.part;
  const CacheHeader& header = opened.header;
  TeacherCacheWriter writer(config.output, header, part.shard, part.num_shards);

  CacheReport report;
  report.was_complete = writer.complete();
  if (!writer.complete()) {
    const models::Decoder decoder = load_teacher(config);
    Teacher teacher(decoder, header);
    std::uint64_t local = writer.committed_documents();
    log_info("teacher ", header.teacher.name, ": ", writer.num_documents() - local, " of ", writer.num_documents(), " documents of shard ", config.shard, " to read, into ", config.output.string());
    const Clock::time_point start = Clock::now();
    double noted = 0;
    const auto stop_where_asked = [&] {
      if (!stop_requested()) return;
      writer.commit();  // whole groups; the one at work has not been appended
      fail(ErrorKind::kStopped, "stopped with ", writer.committed_documents(), " of ", writer.num_documents(), " documents of shard ", config.shard, " in the cache",
           Remedy{"run the same command again; it goes on where it was"});
    };
    while (local < writer.num_documents()) {
      const std::uint64_t group = local / kGroupDocuments * part.num_shards + part.shard;
      std::vector<Teacher::Asked> documents;
      for (std::uint64_t number = group * kGroupDocuments; number < std::min(opened.num_documents, (group + 1) * kGroupDocuments); ++number) documents.push_back(opened.document(number));
      for (const std::vector<PieceSignal>& pieces : teacher.signals(documents, stop_where_asked)) writer.append(pieces);
      writer.end_group();
      local += documents.size();
      report.tokens = teacher.num_tokens();
      report.seconds = seconds_since(start);
      if (report.seconds - noted < kSecondsBetweenNotes) continue;
      noted = report.seconds;
      log_info(local, " of ", writer.num_documents(), " documents, ", static_cast<std::int64_t>(static_cast<double>(report.tokens) / report.seconds), " tokens/s");
    }
    writer.finish();
    report.seconds = seconds_since(start);
  }
  report.totals = writer.totals();
  report.file_bytes = writer.file_bytes();
  report.complete = all_published(config.output, part.num_shards);
  const auto ratio = [](double value, double divisor) { return divisor > 0 ? Json(value / divisor) : Json(nullptr); };
  report.json = {{"output", config.output.string()},
                 {"shard", config.shard},
                 {"complete", report.complete},
                 {"documents", report.totals.documents},
                 {"rows", report.totals.rows},
                 {"file_bytes", report.file_bytes},
                 {"bytes_per_row", ratio(static_cast<double>(report.file_bytes), static_cast<double>(report.totals.rows))},
                 {"tokens", report.tokens},
                 {"seconds", report.seconds},
                 {"tokens_per_second", ratio(static_cast<double>(report.tokens), report.seconds)},
                 {"header", to_json(header)}};
  log_info(report.was_complete ? "complete already: " : "", report.totals.rows, " trained tokens in ", report.file_bytes, " bytes (", to_line(report.json["bytes_per_row"]), " a token), ",
           to_line(report.json["tokens_per_second"]), " tokens/s", report.complete ? "" : "; other shards are still missing");
  return report;
}

}  // namespace alambic::distill
