// SPDX-License-Identifier: Apache-2.0
#include "data/batch_stream.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <sstream>
#include <thread>

#include "core/error.h"
#include "core/random.h"
#include "data/mixture.h"
#include "data/packer.h"

namespace alambic::data {

namespace {

constexpr std::int64_t kStateFormat = 1;  // raise it whenever the same state would give other rows
constexpr std::int64_t kLongestRow = 1 << 24, kMostRows = 1 << 20;
constexpr std::size_t kStepsAhead = 2;
constexpr int kMostUntrainedBatches = 64;
constexpr int kWindowsCounted = 64;

class StoreCorpus final : public Corpus {
 public:
  explicit StoreCorpus(const TokenStore& store) : store_(store) {}
  std::string name() const override { return store_.folder().string(); }
  std::string hash() const override { return store_.hash(); }
  std::uint64_t num_documents() const override { return store_.num_documents(); }
  std::uint64_t num_trained_tokens() const override { return store_.totals().trained_tokens; }
  std::uint32_t length(std::uint64_t document) const override { return store_.length(document); }
  Document read(std::uint64_t document) const override { return store_.read(document); }

 private:
  const TokenStore& store_;
};

void check_size(const char* key, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value < low || value > high) fail(ErrorKind::kUsage, key, ": ", value, " is not between ", low, " and ", high);
}

void check_rank(int rank, int num_ranks) {
  if (num_ranks < 1 || rank < 0 || rank >= num_ranks) fail(ErrorKind::kBug, "rank ", rank, " of ", num_ranks);
}

void check_corpus(const Corpus& corpus) {
  if (corpus.num_documents() == 0)
    fail(ErrorKind::kData, corpus.name(), ": the store holds no document", Remedy{"prepare it from text that is not empty"});
  if (corpus.num_trained_tokens() == 0)
    fail(ErrorKind::kData, corpus.name(), ": the loss mask of every token is 0, so nothing can be learnt from this store",
         Remedy{"prepare it again and look at the loss mask that prepare shows"});
}

// Reads documents, keeping the last one: pieces of one document often stand one behind the other.
class Reader {
 public:
  explicit Reader(const Corpus& corpus) : corpus_(corpus) {}
  const Document& operator()(std::uint64_t number) {
    if (number_ == number) return document_;
    number_.reset();
    document_ = corpus_.read(number);
    if (document_.ids.size() != corpus_.length(number) || document_.mask.size() != document_.ids.size())
      fail(ErrorKind::kData, corpus_.name(), ": document ", number, " has ", document_.ids.size(), " ids and ", document_.mask.size(),
           " mask values, but its length is ", corpus_.length(number));
    number_ = number;
    return document_;
  }

 private:
  const Corpus& corpus_;
  std::optional<std::uint64_t> number_;
  Document document_;
};

struct StoreRow {
  std::uint32_t store = 0;
  Row row;
};

// Calls on_piece(piece, document) for each piece, in order.
template <class OnPiece>
Batch read_batch(const std::vector<StoreRow>& rows, std::vector<Reader>& readers, const OnPiece& on_piece) {
  std::int64_t num_tokens = 0;
  for (const StoreRow& row : rows)
    for (const Piece& piece : row.row) num_tokens += piece.length;
  Batch batch;
  batch.tokens_T = at::empty({num_tokens}, at::kLong);
  batch.positions_T = at::empty({num_tokens}, at::kLong);
  batch.targets_T = at::empty({num_tokens}, at::kLong);
  batch.keep_T = at::empty({num_tokens}, at::kBool);
  auto* token = batch.tokens_T.mutable_data_ptr<std::int64_t>();
  auto* position = batch.positions_T.mutable_data_ptr<std::int64_t>();
  auto* target = batch.targets_T.mutable_data_ptr<std::int64_t>();
  auto* keep = batch.keep_T.mutable_data_ptr<bool>();
  for (const StoreRow& row : rows) {
    for (const Piece& piece : row.row) {
      const Document& document = readers[row.store](piece.document);
      for (std::uint32_t i = 0; i < piece.length; ++i) {
        const std::size_t t = piece.first_token + i;
        const bool has_next = i + 1 < piece.length;
        *token++ = document.ids[t];
        *position++ = i;
        *target++ = has_next ? document.ids[t + 1] : 0;
        *keep = has_next && document.mask[t + 1] != 0;
        batch.num_kept += *keep++ ? 1 : 0;
      }
      batch.document_lengths.push_back(piece.length);
      batch.origins.push_back({.store = row.store, .document = piece.document, .first_token = piece.first_token, .source = document.source});
      on_piece(piece, document);
    }
  }
  return batch;
}

struct StorePosition {
  std::uint64_t epoch = 0;
  std::uint64_t first = 0;  // position in the epoch's order at which the current window begins
  std::uint64_t row = 0;    // rows of that window that were drawn
};

struct Position {
  std::vector<StorePosition> stores;
  std::vector<std::uint64_t> rows;  // drawn so far, a store
  StreamCounts counts;
  double epochs = 0;  // of the leading store
};

// The sequence of rows, by lengths alone; every rank walks all of it.
class Walk {
 public:
  Walk(const StreamConfig& config, const std::vector<std::unique_ptr<Corpus>>& corpora, Schedule schedule)
      : packing_{.row_length = config.row_length, .pack = config.pack, .split_long = config.split_long},
        seed_(config.seed), corpora_(corpora), schedule_(std::move(schedule)), windows_(corpora.size()) {
    position_.stores.resize(corpora.size());
    const std::vector<std::uint64_t>& weights = schedule_.weights();
    lead_ = static_cast<std::size_t>(std::max_element(weights.begin(), weights.end()) - weights.begin());
  }

  StoreRow next() {
    const std::size_t store = schedule_.next();
    StorePosition& at = position_.stores[store];
    StreamCounts& counts = position_.counts;
    for (std::uint64_t passed = 0; window(store).rows.empty(); finish_window(store)) {
      passed += window(store).num_documents;
      if (passed >= 2 * corpora_[store]->num_documents())
        fail(ErrorKind::kData, corpora_[store]->name(), ": no document has 2 tokens or more, so there is nothing to predict");
    }
    StoreRow drawn{.store = static_cast<std::uint32_t>(store), .row = std::move(windows_[store]->rows[at.row])};
    ++counts.rows;
    counts.documents += drawn.row.size();
    for (const Piece& piece : drawn.row) {
      counts.tokens += piece.length;
      counts.truncated_documents += piece.cut > 0 ? 1 : 0;
      counts.truncated_tokens += piece.cut;
    }
    if (++at.row == windows_[store]->rows.size()) finish_window(store);
    return drawn;
  }

  Position position() {
    position_.rows = schedule_.counts();
    const StorePosition& at = position_.stores[lead_];
    double documents = static_cast<double>(at.first);
    if (at.row > 0) {
      const Window& current = window(lead_);
      documents += static_cast<double>(current.num_documents) * static_cast<double>(at.row) / static_cast<double>(current.rows.size());
    }
    position_.epochs = static_cast<double>(at.epoch) + documents / static_cast<double>(corpora_[lead_]->num_documents());
    return position_;
  }

  void restore(const Position& position) {
    schedule_.restore(position.rows);
    windows_.assign(corpora_.size(), std::nullopt);
    position_ = position;
    for (std::size_t store = 0; store < corpora_.size(); ++store) {
      const StorePosition& at = position.stores[store];
      if (at.first >= corpora_[store]->num_documents() || (at.row > 0 && at.row >= window(store).rows.size()))
        fail(ErrorKind::kData, "data position: row ", at.row, " of the window at document ", at.first, " of ",
             corpora_[store]->num_documents(), " does not exist in ", corpora_[store]->name());
    }
  }

  /// Rows in the leading store's first epoch; whole when it has few windows.
  double rows_of_an_epoch() const {
    const std::uint64_t num_documents = corpora_[lead_]->num_documents();
    std::uint64_t documents = 0, rows = 0;
    for (int i = 0; i < kWindowsCounted && documents < num_documents; ++i) {
      const Window window = make(lead_, {.epoch = 0, .first = documents});
      documents += window.num_documents;
      rows += window.rows.size();
    }
    return static_cast<double>(rows) * (static_cast<double>(num_documents) / static_cast<double>(documents));
  }
  double lead_share() const {
    return static_cast<double>(schedule_.weights()[lead_]) / static_cast<double>(schedule_.sum_of_weights());
  }
  const StreamCounts& counts() const { return position_.counts; }

 private:
  Window make(std::size_t store, const StorePosition& at) const {
    const Corpus& corpus = *corpora_[store];
    const KeyedPermutation order(corpus.num_documents(), derive_seed(seed_, "document order", {store, at.epoch}));
    const auto document_at = [&](std::uint64_t position) {
      const std::uint64_t document = order(position);
      return Sized{.document = document, .length = corpus.length(document)};
    };
    Window window = make_window(document_at, at.first, corpus.num_documents(), packing_);
    if (packing_.pack) shuffle_rows(window.rows, derive_seed(seed_, "row order", {store, at.epoch, at.first}));
    return window;
  }

  const Window& window(std::size_t store) {
    if (!windows_[store]) windows_[store] = make(store, position_.stores[store]);
    return *windows_[store];
  }

  void finish_window(std::size_t store) {
    StorePosition& at = position_.stores[store];
    position_.counts.skipped_documents += windows_[store]->num_skipped;
    at.first += windows_[store]->num_documents;
    at.row = 0;
    if (at.first == corpora_[store]->num_documents()) ++at.epoch, at.first = 0;
    windows_[store].reset();
  }

  Packing packing_;
  std::uint64_t seed_;
  const std::vector<std::unique_ptr<Corpus>>& corpora_;
  Schedule schedule_;
  std::vector<std::optional<Window>> windows_;
  Position position_;
  std::size_t lead_ = 0;
};

std::uint64_t natural(const Json& object, const char* key) {
  const auto found = object.find(key);
  if (found == object.end() || !found->is_number_integer() || (!found->is_number_unsigned() && found->get<std::int64_t>() < 0))
    fail(ErrorKind::kData, "data position: \"", key, "\" is ", found == object.end() ? "absent" : to_line(*found), ", not a count");
  return found->get<std::uint64_t>();
}

const Json& member(const Json& object, const char* key) {
  if (!object.is_object() || !object.contains(key)) fail(ErrorKind::kData, "data position: \"", key, "\" is absent");
  return object.at(key);
}

}  // namespace

struct BatchStream::State {
  struct Step {
    std::vector<Batch> batches;
    Position after;
  };

  StreamConfig config;
  int rank, num_ranks;
  std::vector<TokenStore> stores;  // empty where the corpora were given
  std::vector<std::unique_ptr<Corpus>> corpora;
  std::vector<Reader> readers;
  std::vector<std::uint64_t> weights;
  std::optional<Walk> walk;        // belongs to the thread while that runs
  int num_untrained_batches = 0;   // one behind the other, on this rank
  Position position;               // after the last step handed out

  std::mutex mutex;
  std::condition_variable_any changed;
  std::deque<Step> ready;          // at most kStepsAhead
  std::exception_ptr error;        // why the thread ended
  std::jthread thread;             // last: joined before anything it uses goes away

  State(const StreamConfig& stream_config, int own_rank, int ranks) : config(stream_config), rank(own_rank), num_ranks(ranks) {
    check_rank(rank, num_ranks);
    check_size("data.row_length", config.row_length, 2, kLongestRow);
    check_size("data.rows_per_batch", config.rows_per_batch, 1, kMostRows);
    check_size("data.batches_per_step", config.batches_per_step, 1, kMostRows);
    if (config.batches_per_step % num_ranks != 0)
      fail(ErrorKind::kUsage, "data.batches_per_step: ", config.batches_per_step, " micro-batches cannot be shared evenly by ", num_ranks, " ranks",
           Remedy{"make it a multiple of the number of ranks"});
  }

  void start() {
    std::vector<double> wished;
    for (const MixtureEntry& entry : config.mixture) wished.push_back(entry.weight);
    weights = integer_weights(wished);
    if (corpora.size() != weights.size()) fail(ErrorKind::kBug, corpora.size(), " corpora for ", weights.size(), " mixture entries");
    for (const auto& corpus : corpora) {
      check_corpus(*corpus);
      readers.emplace_back(*corpus);
    }
    walk.emplace(config, corpora, Schedule(weights));
    position = walk->position();
  }

  Step make_step() {
    Step step;
    for (std::int64_t i = 0; i < config.batches_per_step; ++i) {
      const std::uint64_t first_sample = walk->counts().documents;
      std::vector<StoreRow> rows;
      for (std::int64_t row = 0; row < config.rows_per_batch; ++row) rows.push_back(walk->next());
      if (i % num_ranks != rank) continue;
      step.batches.push_back(read_batch(rows, readers, [](const Piece&, const Document&) {}));
      step.batches.back().first_sample = first_sample;
      num_untrained_batches = step.batches.back().num_kept > 0 ? 0 : num_untrained_batches + 1;
      if (num_untrained_batches == kMostUntrainedBatches)
        fail(ErrorKind::kData, "the last ", kMostUntrainedBatches, " batches held no token to learn from (", walk->counts().truncated_documents,
             " of ", walk->counts().documents, " documents were cut at data.row_length ", config.row_length, ")",
             Remedy{"raise data.row_length, or look at the loss mask that prepare shows"});
    }
    step.after = walk->position();
    return step;
  }

  void prefetch(const std::stop_token& stop) {
    try {
      while (true) {
        {
          std::unique_lock lock(mutex);
          changed.wait(lock, stop, [&] { return ready.size() < kStepsAhead; });
        }
        if (stop.stop_requested()) return;
        Step step = make_step();
        const std::lock_guard lock(mutex);
        ready.push_back(std::move(step));
        changed.notify_all();
      }
    } catch (...) {
      const std::lock_guard lock(mutex);
      error = std::current_exception();
      changed.notify_all();
    }
  }

  void end_thread() {
    if (!thread.joinable()) return;
    thread.request_stop();
    thread.join();
  }

  std::uint64_t rows_per_step() const { return static_cast<std::uint64_t>(config.rows_per_batch * config.batches_per_step); }
};

BatchStream::BatchStream(const StreamConfig& config, std::uint32_t vocabulary_size, int rank, int num_ranks)
    : state_(std::make_unique<State>(config, rank, num_ranks)) {
  std::vector<TokenStore>& stores = state_->stores;
  stores.reserve(config.mixture.size());  // the corpora refer to its elements
  for (const MixtureEntry& entry : config.mixture) {
    const StoreInfo& info = stores.emplace_back(entry.store).info();
    if (info.vocabulary_size > vocabulary_size)
      fail(ErrorKind::kUsage, entry.store.string(), ": made with ", info.vocabulary_size, " token ids, but the model has ", vocabulary_size,
           Remedy{"prepare the store with the model's own tokenizer"});
    if (info.tokenizer_hash != stores.front().info().tokenizer_hash)
      fail(ErrorKind::kUsage, entry.store.string(), ": tokenizer ", info.tokenizer_hash, " differs from tokenizer ",
           stores.front().info().tokenizer_hash, " of ", stores.front().folder().string(), Remedy{"prepare all stores with the same tokenizer"});
    state_->corpora.push_back(std::make_unique<StoreCorpus>(stores.back()));
  }
  state_->start();
}

BatchStream::BatchStream(const StreamConfig& config, std::vector<std::unique_ptr<Corpus>> corpora, int rank, int num_ranks)
    : state_(std::make_unique<State>(config, rank, num_ranks)) {
  state_->corpora = std::move(corpora);
  state_->start();
}

BatchStream::~BatchStream() = default;

std::vector<Batch> BatchStream::next_step() {
  State& state = *state_;
  if (!state.thread.joinable()) state.thread = std::jthread([&state](const std::stop_token& stop) { state.prefetch(stop); });
  std::unique_lock lock(state.mutex);
  state.changed.wait(lock, [&] { return !state.ready.empty() || state.error; });
  if (state.ready.empty()) std::rethrow_exception(state.error);
  State::Step step = std::move(state.ready.front());
  state.ready.pop_front();
  state.changed.notify_all();
  state.position = std::move(step.after);
  return std::move(step.batches);
}

Json BatchStream::state() const {
  const State& state = *state_;
  const StreamCounts& counts = state.position.counts;
  Json stores = Json::array();
  for (std::size_t i = 0; i < state.corpora.size(); ++i) {
    const StorePosition& at = state.position.stores[i];
    stores.push_back({{"store", state.corpora[i]->name()}, {"hash", state.corpora[i]->hash()}, {"documents", state.corpora[i]->num_documents()},
                      {"weight", state.weights[i]}, {"epoch", at.epoch}, {"first", at.first}, {"row", at.row}, {"rows", state.position.rows[i]}});
  }
  return {{"format", kStateFormat},
          {"seed", state.config.seed},
          {"row_length", state.config.row_length},
          {"pack", state.config.pack},
          {"split_long", state.config.split_long},
          {"rows_per_step", state.rows_per_step()},
          {"stores", std::move(stores)},
          {"counts", {{"rows", counts.rows}, {"documents", counts.documents}, {"tokens", counts.tokens},
                      {"truncated_documents", counts.truncated_documents}, {"truncated_tokens", counts.truncated_tokens},
                      {"skipped_documents", counts.skipped_documents}}}};
}

void BatchStream::restore(const Json& saved) {
  State& state = *state_;
  const Json own = this->state();
  std::vector<std::string> differences;
  const auto compare = [&](const std::string& what, const Json& then, const Json& now, const char* key) {
    const Json& was = member(then, key);
    if (was != now.at(key)) differences.push_back(what + key + " was " + to_line(was) + " and is " + to_line(now.at(key)));
  };
  for (const char* key : {"format", "seed", "row_length", "pack", "split_long", "rows_per_step"}) compare("data.", saved, own, key);
  const Json& stores = member(saved, "stores");
  if (!stores.is_array()) fail(ErrorKind::kData, "data position: \"stores\" is no list");
  if (stores.size() != state.corpora.size()) {
    differences.push_back("data.mixture had " + std::to_string(stores.size()) + " stores and has " + std::to_string(state.corpora.size()));
  } else {
    for (std::size_t i = 0; i < stores.size(); ++i)
      for (const char* key : {"hash", "documents", "weight"})
        compare("data.mixture[" + std::to_string(i) + "] (" + state.corpora[i]->name() + "): ", stores[i], own["stores"][i], key);
  }
  if (!differences.empty()) {
    std::ostringstream all;
    for (std::size_t i = 0; i < differences.size(); ++i) all << (i == 0 ? "" : "; ") << differences[i];
    fail(ErrorKind::kUsage, "the data changed since the position was saved: ", all.str(),
         Remedy{"put the old data and settings back, or start a new run"});
  }

  Position position;
  for (const Json& store : stores) {
    position.stores.push_back({.epoch = natural(store, "epoch"), .first = natural(store, "first"), .row = natural(store, "row")});
    position.rows.push_back(natural(store, "rows"));
  }
  const Json& counts = member(saved, "counts");
  position.counts = {.rows = natural(counts, "rows"), .documents = natural(counts, "documents"), .tokens = natural(counts, "tokens"),
                     .truncated_documents = natural(counts, "truncated_documents"), .truncated_tokens = natural(counts, "truncated_tokens"),
                     .skipped_documents = natural(counts, "skipped_documents")};
  state.end_thread();
  state.ready.clear();
  state.error = nullptr;
  state.num_untrained_batches = 0;
  state.walk->restore(position);
  state.position = state.walk->position();
}

StreamCounts BatchStream::counts() const { return state_->position.counts; }

double BatchStream::epochs() const { return state_->position.epochs; }

std::int64_t BatchStream::steps_for_epochs(double epochs) const {
  if (!(epochs > 0 && epochs <= 1e6)) fail(ErrorKind::kUsage, "epochs: ", epochs, " is not between 0 and 1000000");
  const Walk& walk = *state_->walk;
  const double steps = epochs * walk.rows_of_an_epoch() / (walk.lead_share() * static_cast<double>(state_->rows_per_step()));
  // The quotient of whole numbers may come out a rounding error above a whole number of steps.
  return std::max<std::int64_t>(1, static_cast<std::int64_t>(std::ceil(steps * (1 - 1e-12))));
}

struct EvaluationBatches::State {
  std::optional<StoreCorpus> own;  // where a TokenStore was given
  const Corpus& corpus;
  Packing packing;
  std::size_t rows_per_batch;
  std::uint64_t rank, num_ranks;
  std::vector<std::uint64_t> documents;  // chosen, in order
  std::vector<Reader> readers;           // one
  std::uint64_t first = 0;               // of `documents`: where the window after this one begins
  std::deque<Row> rows;                  // left of the current window
  std::uint64_t num_batches = 0;         // made or passed over

  State(std::optional<StoreCorpus> own_corpus, const Corpus* given, std::int64_t row_length, std::int64_t batch_rows, std::uint64_t max_tokens,
        int own_rank, int ranks)
      : own(std::move(own_corpus)), corpus(given ? *given : *own), packing{.row_length = row_length, .pack = true, .split_long = true},
        rows_per_batch(static_cast<std::size_t>(batch_rows)), rank(static_cast<std::uint64_t>(own_rank)), num_ranks(static_cast<std::uint64_t>(ranks)) {
    check_rank(own_rank, ranks);
    check_size("row_length", row_length, 2, kLongestRow);
    check_size("rows_per_batch", batch_rows, 1, kMostRows);
    check_corpus(corpus);
    readers.emplace_back(corpus);
    for (std::uint64_t document = 0; document < corpus.num_documents(); ++document)
      if (corpus.length(document) >= 2) documents.push_back(document);
    if (documents.empty()) fail(ErrorKind::kData, corpus.name(), ": no document has 2 tokens or more, so there is nothing to predict");
    if (max_tokens > 0) choose(max_tokens);
  }

  // Keeps the middles of `count` equal stretches of the list, with a count whose documents have at most max_tokens.
  void choose(std::uint64_t max_tokens) {
    const std::uint64_t all = documents.size();
    const auto kept = [&](std::uint64_t count, std::uint64_t i) {  // floor((2 i + 1) all / (2 count)) without overflow
      return documents[static_cast<std::size_t>(static_cast<unsigned __int128>(2 * i + 1) * all / (2 * count))];
    };
    std::uint64_t count = all;
    while (count > 1) {
      std::uint64_t tokens = 0;
      for (std::uint64_t i = 0; i < count; ++i) tokens += corpus.length(kept(count, i));
      if (tokens <= max_tokens) break;
      // Lowered in proportion first, then by one: the sum does not fall evenly.
      count = std::min(count - 1, static_cast<std::uint64_t>(static_cast<double>(count) * static_cast<double>(max_tokens) / static_cast<double>(tokens)));
      count = std::max<std::uint64_t>(count, 1);
    }
    std::vector<std::uint64_t> chosen;
    for (std::uint64_t i = 0; i < count; ++i) chosen.push_back(kept(count, i));
    documents = std::move(chosen);
  }

  // The next rows, fewer than rows_per_batch only at the end.
  std::vector<StoreRow> next_rows() {
    std::vector<StoreRow> batch;
    while (batch.size() < rows_per_batch) {
      if (rows.empty()) {
        if (first == documents.size()) break;
        const auto document_at = [&](std::uint64_t position) {
          const std::uint64_t document = documents[static_cast<std::size_t>(position)];
          return Sized{.document = document, .length = corpus.length(document)};
        };
        Window window = make_window(document_at, first, documents.size(), packing);
        first += window.num_documents;
        rows.assign(std::make_move_iterator(window.rows.begin()), std::make_move_iterator(window.rows.end()));
      }
      batch.push_back({.store = 0, .row = std::move(rows.front())});
      rows.pop_front();
    }
    return batch;
  }
};

EvaluationBatches::EvaluationBatches(const TokenStore& store, std::int64_t row_length, std::int64_t rows_per_batch, std::uint64_t max_tokens,
                                     int rank, int num_ranks)
    : state_(std::make_unique<State>(StoreCorpus(store), nullptr, row_length, rows_per_batch, max_tokens, rank, num_ranks)) {}

EvaluationBatches::EvaluationBatches(const Corpus& corpus, std::int64_t row_length, std::int64_t rows_per_batch, std::uint64_t max_tokens,
                                     int rank, int num_ranks)
    : state_(std::make_unique<State>(std::nullopt, &corpus, row_length, rows_per_batch, max_tokens, rank, num_ranks)) {}

EvaluationBatches::~EvaluationBatches() = default;

std::optional<EvaluationBatch> EvaluationBatches::next() {
  State& state = *state_;
  while (true) {
    const std::vector<StoreRow> rows = state.next_rows();
    if (rows.empty()) return std::nullopt;
    if (state.num_batches++ % state.num_ranks != state.rank) continue;
    EvaluationBatch result;
    result.batch = read_batch(rows, state.readers, [&](const Piece& piece, const Document& document) {
      result.document_source.push_back(document.source);
      result.document_bytes.push_back(piece.first_token == 0 ? document.num_bytes : 0);
    });
    return result;
  }
}

std::uint64_t EvaluationBatches::num_documents() const { return state_->documents.size(); }

}  // namespace alambic::data
