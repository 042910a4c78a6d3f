// SPDX-License-Identifier: Apache-2.0
#include "data/batch_stream.h"

#include <ATen/ops/equal.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <numeric>
#include <set>
#include <tuple>

#include "core/random.h"
#include "tests/support.h"

namespace alambic::data {
namespace {

// A corpus of any size that is a function of its seed: lengths 2 .. 80 or as given, ids and masks by hashing.
class Simulated final : public Corpus {
 public:
  Simulated(std::uint64_t seed, std::uint64_t num_documents, std::uint32_t longest = 80) : seed_(seed), num_documents_(num_documents), longest_(longest) {}
  std::string name() const override { return "simulated-" + std::to_string(seed_); }
  std::string hash() const override { return "hash-" + std::to_string(seed_); }
  std::uint64_t num_documents() const override { return num_documents_; }
  std::uint64_t num_trained_tokens() const override { return trained ? num_documents_ : 0; }
  std::uint32_t length(std::uint64_t document) const override {
    if (fixed_length > 0) return fixed_length;
    if (short_every > 0 && document % short_every == 0) return 1;
    return 2 + static_cast<std::uint32_t>(mix64(seed_ ^ mix64(document)) % (longest_ - 1));
  }
  Document read(std::uint64_t document) const override {
    if (document == broken_document) fail(ErrorKind::kData, "shard-7.h5: chunk 3 is damaged");
    Document result;
    for (std::uint32_t i = 0; i < length(document); ++i) {
      const std::uint64_t value = mix64(mix64(document) + i);
      result.ids.push_back(static_cast<std::uint32_t>(value % 1000));
      result.mask.push_back(all_masked ? 0 : i == 0 ? 0 : (value >> 32) % 4 != 0);
    }
    result.source = static_cast<std::uint16_t>(document % 3);
    result.num_bytes = static_cast<std::uint64_t>(std::accumulate(result.mask.begin(), result.mask.end(), 0)) * 4;
    return result;
  }

  bool trained = true, all_masked = false;
  std::uint32_t fixed_length = 0, short_every = 0;
  std::uint64_t broken_document = ~0ull;

 private:
  std::uint64_t seed_, num_documents_;
  std::uint32_t longest_;
};

std::vector<std::unique_ptr<Corpus>> corpora(const std::vector<std::uint64_t>& sizes) {
  std::vector<std::unique_ptr<Corpus>> result;
  for (std::size_t i = 0; i < sizes.size(); ++i) result.push_back(std::make_unique<Simulated>(i + 1, sizes[i]));
  return result;
}

std::vector<std::unique_ptr<Corpus>> one(std::uint64_t size, const std::function<void(Simulated&)>& change) {
  auto corpus = std::make_unique<Simulated>(1, size);
  change(*corpus);
  std::vector<std::unique_ptr<Corpus>> result;
  result.push_back(std::move(corpus));
  return result;
}

StreamConfig small_config(std::size_t num_stores = 2) {
  StreamConfig config{.mixture = {}, .row_length = 64, .rows_per_batch = 2, .batches_per_step = 4, .seed = 5};
  for (std::size_t i = 0; i < num_stores; ++i) config.mixture.push_back({.store = "", .weight = i == 0 ? 0.7 : 0.3});
  return config;
}

using Steps = std::vector<std::vector<Batch>>;

Steps take(BatchStream& stream, int num_steps) {
  Steps steps;
  for (int i = 0; i < num_steps; ++i) steps.push_back(stream.next_step());
  return steps;
}

::testing::AssertionResult same(const Batch& a, const Batch& b) {
  if (a.origins != b.origins) return ::testing::AssertionFailure() << "other documents";
  if (a.document_lengths != b.document_lengths || a.num_kept != b.num_kept || a.first_sample != b.first_sample)
    return ::testing::AssertionFailure() << "other lengths, kept tokens or sample number";
  if (!at::equal(a.tokens_T, b.tokens_T) || !at::equal(a.positions_T, b.positions_T) || !at::equal(a.targets_T, b.targets_T) ||
      !at::equal(a.keep_T, b.keep_T))
    return ::testing::AssertionFailure() << "other values";
  return ::testing::AssertionSuccess();
}

void expect_same(const Steps& a, const Steps& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    ASSERT_EQ(a[i].size(), b[i].size());
    for (std::size_t j = 0; j < a[i].size(); ++j) ASSERT_TRUE(same(a[i][j], b[i][j])) << "step " << i << ", batch " << j;
  }
}

Steps joined(Steps a, const Steps& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// What a checkpoint does to a state.
Json saved(const BatchStream& stream) { return parse_json(to_line(stream.state()), "state"); }

TEST(BatchStream, ABatchSaysWhatItsDocumentsSay) {
  const Simulated corpus(1, 500);
  BatchStream stream(small_config(1), corpora({500}));
  for (const std::vector<Batch>& step : take(stream, 20)) {
    ASSERT_EQ(step.size(), 4u);
    for (const Batch& batch : step) {
      std::int64_t t = 0, kept = 0;
      ASSERT_EQ(batch.origins.size(), batch.document_lengths.size());
      for (std::size_t d = 0; d < batch.origins.size(); ++d) {
        const Document document = corpus.read(batch.origins[d].document);
        const std::int64_t length = batch.document_lengths[d];
        ASSERT_EQ(length, std::min<std::int64_t>(64, static_cast<std::int64_t>(document.ids.size())));
        for (std::int64_t i = 0; i < length; ++i, ++t) {
          const auto at = static_cast<std::size_t>(i);
          ASSERT_EQ(batch.tokens_T[t].item<std::int64_t>(), document.ids[at]);
          ASSERT_EQ(batch.positions_T[t].item<std::int64_t>(), i);
          const bool keep = batch.keep_T[t].item<bool>();
          ASSERT_EQ(keep, i + 1 < length && document.mask[at + 1] == 1) << "token " << i << " of " << length;
          if (keep) { ASSERT_EQ(batch.targets_T[t].item<std::int64_t>(), document.ids[at + 1]); }
          kept += keep ? 1 : 0;
        }
      }
      EXPECT_EQ(t, batch.tokens_T.size(0));
      EXPECT_LE(t, 2 * 64);
      EXPECT_EQ(kept, batch.num_kept);
    }
  }
}

TEST(BatchStream, EachEpochHoldsEachDocumentOnceInAnotherOrder) {
  BatchStream stream(small_config(1), corpora({10'000}));
  std::vector<std::vector<std::uint64_t>> orders;  // an epoch's documents, as they came
  std::vector<std::uint64_t> current;
  StreamCounts counted;
  while (orders.size() < 3) {
    for (const Batch& batch : stream.next_step()) {
      EXPECT_EQ(batch.first_sample, counted.documents);
      for (const Origin& origin : batch.origins) {
        current.push_back(origin.document);
        if (current.size() == 10'000) orders.push_back(std::exchange(current, {}));
      }
      counted.documents += batch.origins.size();
      counted.tokens += static_cast<std::uint64_t>(batch.tokens_T.size(0));
    }
  }
  for (std::vector<std::uint64_t> order : orders) {
    EXPECT_FALSE(std::is_sorted(order.begin(), order.end()));
    std::sort(order.begin(), order.end());
    for (std::uint64_t i = 0; i < order.size(); ++i) ASSERT_EQ(order[i], i);
  }
  EXPECT_NE(orders[0], orders[1]);
  EXPECT_NE(orders[1], orders[2]);
  EXPECT_EQ(stream.counts().documents, counted.documents);
  EXPECT_EQ(stream.counts().tokens, counted.tokens);
  EXPECT_GT(stream.counts().truncated_documents, 0u);  // lengths up to 80 in rows of 64
  EXPECT_NEAR(stream.epochs(), 3.0, 0.01);
}

TEST(BatchStream, CountsWhatItCuts) {
  StreamConfig config = small_config(1);
  config.pack = false;
  BatchStream cut(config, one(8, [](Simulated& corpus) { corpus.fixed_length = 100; }));
  take(cut, 1);
  EXPECT_EQ(cut.counts(), (StreamCounts{.rows = 8, .documents = 8, .tokens = 8 * 64, .truncated_documents = 8, .truncated_tokens = 8 * 36}));
  config.split_long = true;
  BatchStream split(config, one(8, [](Simulated& corpus) { corpus.fixed_length = 100; }));
  take(split, 2);
  EXPECT_EQ(split.counts(), (StreamCounts{.rows = 16, .documents = 16, .tokens = 8 * 101}));
  EXPECT_DOUBLE_EQ(split.epochs(), 1.0);
}

TEST(BatchStream, PassesOverSingleTokensAndCountsThem) {
  BatchStream stream(small_config(1), one(9000, [](Simulated& corpus) { corpus.short_every = 10; }));
  std::set<std::uint64_t> seen;
  while (stream.epochs() < 1)
    for (const Batch& batch : stream.next_step())
      for (const Origin& origin : batch.origins) seen.insert(origin.document);
  EXPECT_EQ(seen.size(), 8100u);
  for (const std::uint64_t document : seen) EXPECT_NE(document % 10, 0u);
  EXPECT_EQ(stream.counts().skipped_documents, 900u);
}

TEST(BatchStream, TenStepsAndTenMoreAreTwentySteps) {
  for (const bool pack : {true, false}) {
    for (const bool split_long : {false, true}) {
      StreamConfig config = small_config(2);
      config.pack = pack;
      config.split_long = split_long;
      // 90 documents: 20 steps of 8 rows pass the ends of several epochs of the first store; 5000: they end inside a window.
      for (const std::uint64_t size : {90ull, 5000ull}) {
        BatchStream whole(config, corpora({size, 40}));
        const Steps twenty = take(whole, 20);
        for (const int first : {1, 7, 10, 13}) {
          BatchStream before(config, corpora({size, 40}));
          Steps parts = take(before, first);
          const Json at_first = saved(before);
          take(before, 2);  // whatever came after the save must not matter
          BatchStream middle(config, corpora({size, 40}));
          middle.restore(at_first);
          EXPECT_EQ(saved(middle), at_first);
          parts = joined(parts, take(middle, 4));
          BatchStream after(config, corpora({size, 40}));
          after.restore(saved(middle));
          parts = joined(parts, take(after, 16 - first));
          expect_same(parts, twenty);
          EXPECT_EQ(saved(after), saved(whole));
          EXPECT_EQ(after.counts(), whole.counts());
          EXPECT_DOUBLE_EQ(after.epochs(), whole.epochs());
        }
        // Going back in the same object is the same as starting there.
        const Json end = saved(whole);
        const Steps further = take(whole, 3);
        whole.restore(end);
        expect_same(take(whole, 3), further);
      }
    }
  }
}

TEST(BatchStream, RanksShareOneSequence) {
  BatchStream alone(small_config(), corpora({300, 100}));
  const Steps all = take(alone, 12);
  for (const int num_ranks : {2, 4}) {
    for (int rank = 0; rank < num_ranks; ++rank) {
      BatchStream stream(small_config(), corpora({300, 100}), rank, num_ranks);
      Steps steps = take(stream, 6);
      BatchStream resumed(small_config(), corpora({300, 100}), rank, num_ranks);
      resumed.restore(saved(stream));
      steps = joined(steps, take(resumed, 6));
      for (std::size_t step = 0; step < 12; ++step) {
        ASSERT_EQ(steps[step].size(), 4u / static_cast<unsigned>(num_ranks));
        for (std::size_t i = 0; i < steps[step].size(); ++i)
          ASSERT_TRUE(same(steps[step][i], all[step][i * static_cast<unsigned>(num_ranks) + static_cast<unsigned>(rank)]));
      }
      EXPECT_EQ(saved(resumed), saved(alone));  // the position says nothing of the ranks
    }
  }
}

TEST(BatchStream, AStateOfOneRankGoesOnWithFour) {
  BatchStream alone(small_config(), corpora({300, 100}));
  take(alone, 5);
  const Json state = saved(alone);
  const Steps further = take(alone, 1);
  for (int rank = 0; rank < 4; ++rank) {
    BatchStream stream(small_config(), corpora({300, 100}), rank, 4);
    stream.restore(state);
    EXPECT_TRUE(same(stream.next_step().at(0), further[0][static_cast<std::size_t>(rank)]));
  }
}

TEST(BatchStream, RegroupingAStepKeepsItsRows) {
  BatchStream two_by_four(small_config(), corpora({300, 100}));
  take(two_by_four, 3);
  StreamConfig config = small_config();
  config.rows_per_batch = 4, config.batches_per_step = 2;
  BatchStream four_by_two(config, corpora({300, 100}));
  four_by_two.restore(saved(two_by_four));
  const auto origins = [](const std::vector<Batch>& step) {
    std::vector<Origin> all;
    for (const Batch& batch : step) all.insert(all.end(), batch.origins.begin(), batch.origins.end());
    return all;
  };
  EXPECT_EQ(origins(four_by_two.next_step()), origins(two_by_four.next_step()));
}

TEST(BatchStream, AWeightIsAShareOfTokens) {
  // The first store's documents are ten times longer; drawn by documents it would get most of the tokens.
  std::vector<std::unique_ptr<Corpus>> stores;
  stores.push_back(std::make_unique<Simulated>(1, 100'000, 60));
  stores.push_back(std::make_unique<Simulated>(2, 100'000, 6));
  StreamConfig config = small_config();
  config.row_length = 256;
  config.mixture[0].weight = 1, config.mixture[1].weight = 3;
  BatchStream stream(config, std::move(stores));
  std::map<std::uint32_t, double> tokens;
  for (const std::vector<Batch>& step : take(stream, 100))
    for (const Batch& batch : step)
      for (std::size_t i = 0; i < batch.origins.size(); ++i) tokens[batch.origins[i].store] += static_cast<double>(batch.document_lengths[i]);
  EXPECT_NEAR(tokens[1] / (tokens[0] + tokens[1]), 0.75, 0.01);
}

TEST(BatchStream, ResumesAtSampleTenToTheTwelveAtOnce) {
  constexpr std::uint64_t kTrillion = 1'000'000'000'000;
  const auto far_state = [](std::uint64_t first, std::uint64_t rows) {
    BatchStream stream(small_config(2), corpora({2 * kTrillion, 1000}));
    Json state = saved(stream);
    state["stores"][0]["first"] = first;
    state["stores"][0]["rows"] = 7 * rows;
    state["stores"][1]["rows"] = 3 * rows;
    state["stores"][1]["epoch"] = 123'456'789;
    state["counts"]["rows"] = 10 * rows;
    state["counts"]["documents"] = first;
    return state;
  };
  const auto start = std::chrono::steady_clock::now();
  BatchStream stream(small_config(2), corpora({2 * kTrillion, 1000}));
  stream.restore(far_state(kTrillion, kTrillion / 10));
  std::vector<Batch> step = stream.next_step();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::cout << "constructed, restored and first step after " << seconds << " s\n";
  EXPECT_LT(seconds, 1.0);
  EXPECT_EQ(step[0].first_sample, kTrillion);

  // The first store's documents there are those that the permutation puts there: computed here on its own.
  const KeyedPermutation order(2 * kTrillion, derive_seed(5, "document order", {0, 0}));
  std::set<std::uint64_t> expected, seen;
  for (std::uint64_t i = 0; i < 4096; ++i) expected.insert(order(kTrillion + i));
  for (int i = 0; i < 20; ++i) {
    for (const Batch& batch : step)
      for (const Origin& origin : batch.origins)
        if (origin.store == 0) { EXPECT_TRUE(expected.count(origin.document) == 1 && seen.insert(origin.document).second); }
    step = stream.next_step();
  }
  EXPECT_GT(seen.size(), 100u);

  // Reached by walking from 50 steps earlier, or by a state in the middle, the position is the same.
  BatchStream walked(small_config(2), corpora({2 * kTrillion, 1000}));
  walked.restore(far_state(kTrillion, kTrillion / 10));
  take(walked, 50);
  BatchStream skipped(small_config(2), corpora({2 * kTrillion, 1000}));
  skipped.restore(saved(walked));
  expect_same(take(skipped, 5), take(walked, 5));
}

TEST(BatchStream, CountsEpochsOnTheLeadingStore) {
  StreamConfig config = small_config(2);
  config.pack = false;  // rows are documents, so everything can be counted by hand
  BatchStream stream(config, corpora({140, 1'000'000}));
  // One epoch is 140 rows of the store that gets 0.7 of the rows: 200 rows, 25 steps of 8.
  EXPECT_EQ(stream.steps_for_epochs(1), 25);
  EXPECT_EQ(stream.steps_for_epochs(2), 50);
  EXPECT_EQ(stream.steps_for_epochs(0.01), 1);
  take(stream, 25);
  EXPECT_DOUBLE_EQ(stream.epochs(), 1.0);
  take(stream, 25);
  EXPECT_DOUBLE_EQ(stream.epochs(), 2.0);
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, "epochs: 0", [&] { stream.steps_for_epochs(0); }));

  BatchStream packed(small_config(2), corpora({100'000, 10}));
  const std::int64_t steps = packed.steps_for_epochs(1);
  take(packed, static_cast<int>(steps));
  EXPECT_GE(packed.epochs(), 1.0);
  EXPECT_LT(packed.epochs(), 1.001);
}

TEST(BatchStream, RefusesAStateOfOtherData) {
  BatchStream stream(small_config(), corpora({300, 100}));
  take(stream, 2);
  const Json state = saved(stream);
  const auto refuse = [&](const std::string& words, const std::function<void(StreamConfig&)>& change, const std::vector<std::uint64_t>& sizes = {300, 100}) {
    StreamConfig config = small_config(sizes.size());
    change(config);
    BatchStream other(config, corpora(sizes));
    EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, words, [&] { other.restore(state); }));
  };
  refuse("data.seed was 5 and is 6", [](StreamConfig& config) { config.seed = 6; });
  refuse("data.row_length was 64 and is 65", [](StreamConfig& config) { config.row_length = 65; });
  refuse("data.pack was true and is false", [](StreamConfig& config) { config.pack = false; });
  refuse("data.split_long was false and is true", [](StreamConfig& config) { config.split_long = true; });
  refuse("data.rows_per_step was 8 and is 4", [](StreamConfig& config) { config.batches_per_step = 2; });
  refuse("data.mixture[1] (simulated-2): weight was 3 and is 2", [](StreamConfig& config) { config.mixture[1].weight = 0.2; });
  refuse("documents was 100 and is 101", [](StreamConfig&) {}, {300, 101});
  refuse("data.mixture had 2 stores and has 3", [](StreamConfig&) {}, {300, 100, 5});
  refuse("data.seed was 5 and is 6; data.row_length was 64 and is 32", [](StreamConfig& config) { config.seed = 6, config.row_length = 32; });

  Json other_hash = state;
  other_hash["stores"][0]["hash"] = "hash-9";
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, "hash was \"hash-9\" and is \"hash-1\"", [&] { stream.restore(other_hash); }));
}

TEST(BatchStream, RefusesADamagedState) {
  BatchStream stream(small_config(), corpora({300, 100}));
  const Json good = saved(stream);
  const auto refuse = [&](const std::string& words, const std::function<void(Json&)>& damage) {
    Json state = good;
    damage(state);
    EXPECT_TRUE(testing::fails_with(ErrorKind::kData, words, [&] { stream.restore(state); }));
  };
  refuse("\"seed\" is absent", [](Json& state) { state.erase("seed"); });
  refuse("\"format\" is absent", [](Json& state) { state = Json::array(); });
  refuse("\"stores\" is no list", [](Json& state) { state["stores"] = 3; });
  refuse("\"first\" is -1, not a count", [](Json& state) { state["stores"][0]["first"] = -1; });
  refuse("\"rows\" is absent", [](Json& state) { state["stores"][1].erase("rows"); });
  refuse("window at document 300 of 300", [](Json& state) { state["stores"][0]["first"] = 300; });
  refuse("row 100000 of the window", [](Json& state) { state["stores"][0]["row"] = 100'000; });
  refuse("no schedule of these weights", [](Json& state) { state["stores"][0]["rows"] = 9; });
  refuse("\"tokens\" is 1.5, not a count", [](Json& state) { state["counts"]["tokens"] = 1.5; });
  stream.restore(good);  // still usable
  EXPECT_EQ(take(stream, 1).size(), 1u);
}

TEST(BatchStream, RefusesWhatCannotBeDone) {
  const auto refuse = [](ErrorKind kind, const std::string& words, const std::function<void(StreamConfig&)>& change, int num_ranks = 1) {
    StreamConfig config = small_config(1);
    change(config);
    EXPECT_TRUE(testing::fails_with(kind, words, [&] { BatchStream(config, corpora(std::vector<std::uint64_t>(config.mixture.size(), 10)), 0, num_ranks); }));
  };
  refuse(ErrorKind::kUsage, "data.row_length: 1 is not between", [](StreamConfig& config) { config.row_length = 1; });
  refuse(ErrorKind::kUsage, "data.rows_per_batch: 0", [](StreamConfig& config) { config.rows_per_batch = 0; });
  refuse(ErrorKind::kUsage, "data.batches_per_step: -1", [](StreamConfig& config) { config.batches_per_step = -1; });
  refuse(ErrorKind::kUsage, "4 micro-batches cannot be shared evenly by 3 ranks", [](StreamConfig&) {}, 3);
  refuse(ErrorKind::kUsage, "data.mixture is empty", [](StreamConfig& config) { config.mixture.clear(); });
  refuse(ErrorKind::kUsage, "data.mixture[0].weight", [](StreamConfig& config) { config.mixture[0].weight = 0; });
  EXPECT_TRUE(testing::fails_with(ErrorKind::kData, "simulated-1: the store holds no document", [] { BatchStream(small_config(1), corpora({0})); }));
  EXPECT_TRUE(testing::fails_with(ErrorKind::kData, "the loss mask of every token is 0",
                                  [] { BatchStream(small_config(1), one(10, [](Simulated& corpus) { corpus.trained = false; })); }));
  EXPECT_TRUE(testing::fails_with(ErrorKind::kData, "no-such-store", [] {
    StreamConfig config = small_config(1);
    config.mixture[0].store = "no-such-store";
    BatchStream(config, 1000);
  }));
}

TEST(BatchStream, IsNeverEndlessWithoutATrainableToken) {
  BatchStream short_ones(small_config(1), one(10, [](Simulated& corpus) { corpus.fixed_length = 1; }));
  EXPECT_TRUE(testing::fails_with(ErrorKind::kData, "no document has 2 tokens or more", [&] { short_ones.next_step(); }));
  BatchStream masked(small_config(1), one(10, [](Simulated& corpus) { corpus.all_masked = true; }));
  EXPECT_TRUE(testing::fails_with(ErrorKind::kData, "the last 64 batches held no token to learn from", [&] { take(masked, 100); }));
}

TEST(BatchStream, AReaderErrorSurfacesInNextStep) {
  BatchStream stream(small_config(1), one(1000, [](Simulated& corpus) { corpus.broken_document = 123; }));
  EXPECT_TRUE(testing::fails_with(ErrorKind::kData, "shard-7.h5: chunk 3 is damaged", [&] { take(stream, 1000); }));
  EXPECT_TRUE(testing::fails_with(ErrorKind::kData, "shard-7.h5: chunk 3 is damaged", [&] { stream.next_step(); }));
  const Json state = saved(stream);
  BatchStream repaired(small_config(1), corpora({1000}));
  repaired.restore(state);  // the position before the step that failed
  take(repaired, 5);
}

TEST(BatchStream, MayBeLeftWhileItReadsAhead) {
  for (int i = 0; i < 50; ++i) {
    BatchStream stream(small_config(), corpora({300, 100}));
    if (i % 3 != 0) stream.next_step();
  }
}

// A store on disk whose document i has 3 + i % 20 tokens: i, i + 1, ...
void write_store(const std::filesystem::path& folder, std::uint64_t num_documents, std::uint32_t vocabulary_size, const std::string& tokenizer_hash) {
  StoreInfo info{.tokenizer_hash = tokenizer_hash, .vocabulary_size = vocabulary_size, .sources = {{.name = "made", .origin = "here", .licence = "CC0-1.0", .language = "en"}}};
  TokenStoreWriter writer(folder, info, 1000);
  for (std::uint64_t i = 0; i < num_documents; ++i) {
    Document document;
    document.num_bytes = 2 * (2 + i % 20);
    for (std::uint32_t t = 0; t < 3 + i % 20; ++t) {
      document.ids.push_back(static_cast<std::uint32_t>((i + t) % vocabulary_size));
      document.mask.push_back(t == 0 ? 0 : 1);
    }
    writer.append(document);
  }
  writer.finish();
}

const std::string kHash(64, 'a'), kOtherHash(64, 'b');

TEST(BatchStream, ReadsTokenStores) {
  const testing::ScratchFolder scratch;
  write_store(scratch / "first", 400, 500, kHash);
  write_store(scratch / "second", 50, 300, kHash);
  StreamConfig config = small_config(2);
  config.mixture[0].store = scratch / "first", config.mixture[1].store = scratch / "second";
  BatchStream stream(config, 500);
  const TokenStore first(scratch / "first"), second(scratch / "second");
  std::uint64_t kept = 0, documents = 0;
  for (const std::vector<Batch>& step : take(stream, 10)) {
    for (const Batch& batch : step) {
      std::int64_t t = 0;
      for (std::size_t d = 0; d < batch.origins.size(); ++d, ++documents) {
        const Document document = (batch.origins[d].store == 0 ? first : second).read(batch.origins[d].document);
        ASSERT_EQ(static_cast<std::size_t>(batch.document_lengths[d]), document.ids.size());
        for (const std::uint32_t id : document.ids) ASSERT_EQ(batch.tokens_T[t++].item<std::int64_t>(), id);
      }
      kept += static_cast<std::uint64_t>(batch.num_kept);
    }
  }
  EXPECT_EQ(stream.counts().documents, documents);
  EXPECT_EQ(kept, stream.counts().tokens - documents);  // all but each document's first token is predicted
  const Json state = saved(stream);
  BatchStream resumed(config, 500);
  resumed.restore(state);
  expect_same(take(resumed, 5), take(stream, 5));

  EvaluationBatches evaluation(second, 64, 2);
  std::uint64_t bytes = 0;
  while (const auto batch = evaluation.next()) bytes = std::accumulate(batch->document_bytes.begin(), batch->document_bytes.end(), bytes);
  EXPECT_EQ(bytes, second.totals().bytes);

  // The same folder with other text in it is other data.
  std::filesystem::remove_all(scratch / "second");
  write_store(scratch / "second", 50, 299, kHash);
  BatchStream changed(config, 500);
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, "second): hash was", [&] { changed.restore(state); }));
}

TEST(BatchStream, RefusesStoresOfAnotherTokenizer) {
  const testing::ScratchFolder scratch;
  write_store(scratch / "first", 20, 500, kHash);
  write_store(scratch / "second", 20, 500, kOtherHash);
  StreamConfig config = small_config(2);
  config.mixture[0].store = scratch / "first", config.mixture[1].store = scratch / "second";
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, "second: tokenizer " + kOtherHash + " differs", [&] { BatchStream(config, 500); }));
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, "first: made with 500 token ids, but the model has 499", [&] { BatchStream(config, 499); }));
}

// Documents and bytes of an evaluation, and how often each token was predicted.
struct Evaluated {
  std::map<std::uint64_t, std::vector<int>> predicted;
  std::map<std::uint64_t, std::uint64_t> bytes;
  std::uint64_t tokens = 0, batches = 0;
};

Evaluated evaluate(EvaluationBatches& batches, const Simulated& corpus) {
  Evaluated result;
  while (const std::optional<EvaluationBatch> next = batches.next()) {
    const Batch& batch = next->batch;
    ++result.batches;
    EXPECT_EQ(next->document_source.size(), batch.document_lengths.size());
    EXPECT_EQ(next->document_bytes.size(), batch.document_lengths.size());
    std::int64_t t = 0;
    for (std::size_t d = 0; d < batch.origins.size(); ++d) {
      const Origin& origin = batch.origins[d];
      EXPECT_EQ(next->document_source[d], origin.document % 3);
      auto& predicted = result.predicted[origin.document];
      predicted.resize(corpus.length(origin.document));
      result.bytes[origin.document] += next->document_bytes[d];
      const Document document = corpus.read(origin.document);
      for (std::int64_t i = 0; i < batch.document_lengths[d]; ++i, ++t) {
        const std::size_t in_document = origin.first_token + static_cast<std::size_t>(i);
        EXPECT_EQ(batch.tokens_T[t].item<std::int64_t>(), document.ids.at(in_document));
        EXPECT_EQ(batch.positions_T[t].item<std::int64_t>(), i);  // restart in each piece
        if (!batch.keep_T[t].item<bool>()) continue;
        EXPECT_EQ(batch.targets_T[t].item<std::int64_t>(), document.ids.at(in_document + 1));
        ++predicted.at(in_document + 1);
      }
    }
    EXPECT_LE(t, 2 * 16);
    result.tokens += static_cast<std::uint64_t>(t);
  }
  return result;
}

TEST(EvaluationBatches, PredictEachTrainedTokenOnce) {
  const Simulated corpus(1, 300);  // up to 80 tokens, in rows of 16
  EvaluationBatches batches(corpus, 16, 2);
  EXPECT_EQ(batches.num_documents(), 300u);
  const Evaluated result = evaluate(batches, corpus);
  ASSERT_EQ(result.predicted.size(), 300u);
  for (const auto& [number, predicted] : result.predicted) {
    const Document document = corpus.read(number);
    for (std::size_t i = 0; i < predicted.size(); ++i) ASSERT_EQ(predicted[i], document.mask[i]) << "token " << i << " of document " << number;
    ASSERT_EQ(result.bytes.at(number), document.num_bytes);
  }
}

TEST(EvaluationBatches, ACapTakesWholeDocumentsFromAllOver) {
  const Simulated corpus(1, 3000);
  std::uint64_t all = 0;
  for (std::uint64_t i = 0; i < 3000; ++i) all += corpus.length(i);
  EvaluationBatches batches(corpus, 16, 2, all / 10), again(corpus, 16, 2, all / 10);
  const Evaluated result = evaluate(batches, corpus), same = evaluate(again, corpus);
  EXPECT_EQ(result.predicted, same.predicted);
  std::uint64_t tokens = 0;
  std::vector<int> tenths(10, 0);
  for (const auto& [number, predicted] : result.predicted) {
    tokens += predicted.size();
    ++tenths[number / 300];
  }
  EXPECT_LE(tokens, all / 10);
  EXPECT_GT(tokens, all / 11);
  for (const int tenth : tenths) EXPECT_NEAR(tenth, static_cast<double>(batches.num_documents()) / 10, 1.01);
  EvaluationBatches least(corpus, 16, 2, 1);
  EXPECT_EQ(least.num_documents(), 1u);
  EvaluationBatches everything(corpus, 16, 2, all);
  EXPECT_EQ(everything.num_documents(), 3000u);
}

TEST(EvaluationBatches, RanksShareThem) {
  const Simulated corpus(1, 300);
  EvaluationBatches alone(corpus, 16, 2), first(corpus, 16, 2, 0, 0, 2), second(corpus, 16, 2, 0, 1, 2);
  std::uint64_t number = 0;
  while (const std::optional<EvaluationBatch> next = alone.next()) {
    const std::optional<EvaluationBatch> own = (number++ % 2 == 0 ? first : second).next();
    ASSERT_TRUE(own.has_value());
    ASSERT_TRUE(same(next->batch, own->batch));
  }
  EXPECT_FALSE(first.next().has_value());
  EXPECT_FALSE(second.next().has_value());
}

TEST(EvaluationBatches, RefuseAStoreWithoutATrainedToken) {
  Simulated corpus(1, 10);
  corpus.fixed_length = 1;
  EXPECT_TRUE(testing::fails_with(ErrorKind::kData, "nothing to predict", [&] { EvaluationBatches(corpus, 16, 2); }));
  corpus.trained = false;
  EXPECT_TRUE(testing::fails_with(ErrorKind::kData, "the loss mask of every token is 0", [&] { EvaluationBatches(corpus, 16, 2); }));
  EXPECT_TRUE(testing::fails_with(ErrorKind::kUsage, "row_length: 1", [] { EvaluationBatches(Simulated(1, 10), 1, 2); }));
}

}  // namespace
}  // namespace alambic::data
