// SPDX-License-Identifier: Apache-2.0
#include "distill/write_cache.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <map>

#include "checkpoints/hf_folder.h"
#include "core/files.h"
#include "core/log.h"
#include "data/batch_stream.h"
#include "data/tokenizer.h"
#include "tests/support.h"
#include "tests/train/tiny_run.h"

namespace alambic::distill {
namespace {

using testing::fails_with;
using testing::kTinyVocabulary;
using testing::ScratchFolder;

const auto never = [] { return false; };

struct Interrupted {};

struct CapturedLog {
  std::string text;
  LogSink former = set_log_sink([this](LogLevel, std::string_view line) { text += std::string(line) + "\n"; });
  ~CapturedLog() { set_log_sink(former); }
};

// Two stores of 300 and 90 documents, seven groups.
CacheConfig tiny_cache(const fs::path& folder, const std::string& name) {
  if (!fs::exists(folder / "one")) testing::write_store(folder / "one", 300, 1), testing::write_store(folder / "two", 90, 2);
  CacheConfig config;
  config.model = testing::golden_path("peft/llama_tied");
  config.output = folder / name;
  config.stores = {{.store = folder / "one"}, {.store = folder / "two"}};
  config.row_length = 16;
  config.split_long = true;
  config.compute_type = "f32";
  config.threads = 1;
  config.seed = 9;
  config.rows_per_file = 1000;
  return config;
}

CacheUse use_of(const CacheConfig& config) {
  CacheUse use{.vocabulary_size = kTinyVocabulary, .row_length = config.row_length, .split_long = config.split_long, .teacher_hash = checkpoints::base_hash(config.model), .temperature = config.temperature};
  for (const CacheStoreItem& item : config.stores) use.store_hashes.push_back(data::TokenStore(item.store).hash());
  return use;
}

data::StreamConfig stream_config(const CacheConfig& config) {
  data::StreamConfig stream{.mixture = {}, .row_length = config.row_length, .rows_per_batch = 3, .batches_per_step = 1, .split_long = config.split_long, .seed = 3};
  for (const CacheStoreItem& item : config.stores) stream.mixture.push_back({.store = item.store, .weight = 1});
  return stream;
}

std::map<std::string, std::string> contents(const fs::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(folder))
    if (entry.is_regular_file()) files[fs::relative(entry.path(), folder)] = read_file(entry.path());
  return files;
}

// The signals of 40 batches, to compare caches with.
std::vector<SparseSignal> signals_of(const CacheConfig& config) {
  TeacherCache cache(config.output);
  cache.use_for(use_of(config));
  data::BatchStream stream(stream_config(config), kTinyVocabulary);
  std::vector<SparseSignal> signals;
  for (int i = 0; i < 40; ++i) signals.push_back(cache.signal(stream.next_step().at(0)));
  return signals;
}

bool same(const std::vector<SparseSignal>& a, const std::vector<SparseSignal>& b) {
  for (std::size_t i = 0; i < a.size(); ++i)
    if (!a[i].ids_KN.equal(b.at(i).ids_KN) || !a[i].probabilities_KN.equal(b[i].probabilities_KN) || !a[i].tail_K.equal(b[i].tail_K)) return false;
  return a.size() == b.size();
}

// The teacher's softmax for each kept row of a batch, each piece of a document by itself, by the ATen path.
at::Tensor softmax_of(const models::Decoder& decoder, const data::Batch& batch, double temperature) {
  const at::NoGradGuard no_grad;
  at::Tensor all_KV = at::empty({batch.num_kept, decoder.config.vocabulary_size}, at::kDouble);
  std::int64_t first = 0, row = 0;
  for (const std::int64_t length : batch.document_lengths) {
    const at::Tensor logits_TV =
        decoder.logits_TV(decoder.hidden_TD({.tokens_T = batch.tokens_T.narrow(0, first, length), .positions_T = batch.positions_T.narrow(0, first, length), .document_lengths = {length}}));
    const at::Tensor p_TV = at::softmax(logits_TV.to(at::kDouble) / temperature, -1);
    for (std::int64_t t = 0; t < length; ++t)
      if (batch.keep_T[first + t].item<bool>()) all_KV[row++] = p_TV[t];
    first += length;
  }
  EXPECT_EQ(row, batch.num_kept);
  return all_KV;
}

TEST(WriteCache, TopKIsTheTeachersWhateverTheRowsAreMadeOf) {
  for (const bool split_long : {true, false}) {
    const ScratchFolder scratch;
    CacheConfig config = tiny_cache(scratch.path(), "cache");
    config.kind = "top_k";
    config.k = 8;
    config.split_long = split_long;
    config.temperature = 1.5;
    const CacheReport report = write_cache(config, never);
    EXPECT_TRUE(report.complete);
    TeacherCache cache(config.output);
    EXPECT_EQ(cache.totals().rows, report.totals.rows);
    EXPECT_EQ(cache.header().teacher.name, "llama_tied");
    cache.use_for(use_of(config));
    const models::Decoder decoder = checkpoints::load_decoder(config.model, at::kFloat);
    data::BatchStream stream(stream_config(config), kTinyVocabulary);
    for (int i = 0; i < 60; ++i) {
      const data::Batch batch = stream.next_step().at(0);
      const SparseSignal signal = cache.signal(batch);
      const at::Tensor p_KV = softmax_of(decoder, batch, 1.5);
      ASSERT_EQ(signal.ids_KN.sizes(), (at::IntArrayRef{batch.num_kept, 8}));
      const at::Tensor own_KN = p_KV.gather(1, signal.ids_KN.to(at::kLong));
      EXPECT_LT((own_KN - signal.probabilities_KN).abs().max().item<double>(), 1e-6);
      EXPECT_LT((std::get<0>(p_KV.topk(8)) - own_KN).abs().max().item<double>(), 1e-6);
      EXPECT_LT((1 - own_KN.sum(1) - signal.tail_K).abs().max().item<double>(), 2e-6);
    }
  }
}

TEST(WriteCache, SampledIsAnEstimateOfTheTeacherWithinItsStandardError) {
  for (const double exponent : {1.0, 0.8}) {
    const ScratchFolder scratch;
    CacheConfig config = tiny_cache(scratch.path(), "cache");
    config.proposal_exponent = exponent;
    write_cache(config, never);
    TeacherCache cache(config.output);
    cache.use_for(use_of(config));
    const models::Decoder decoder = checkpoints::load_decoder(config.model, at::kFloat);
    data::BatchStream stream(stream_config(config), kTinyVocabulary);
    // Of each id: the sum over all rows of (weight - p), whose variance is known: sum over rows of (p^2 / q - p^2) / draws.
    at::Tensor difference_V = at::zeros({kTinyVocabulary}, at::kDouble), variance_V = at::zeros({kTinyVocabulary}, at::kDouble);
    for (int i = 0; i < 150; ++i) {
      const data::Batch batch = stream.next_step().at(0);
      const SparseSignal signal = cache.signal(batch);
      const at::Tensor p_KV = softmax_of(decoder, batch, 1);
      at::Tensor powers_KV = p_KV.pow(exponent);
      const at::Tensor q_KV = powers_KV / powers_KV.sum(1, true);
      const at::Tensor used_KN = signal.ids_KN.ge(0).to(at::kDouble), weights_KN = signal.probabilities_KN.to(at::kDouble) * used_KN;
      at::Tensor w_KV = at::zeros_like(p_KV).scatter_add(1, signal.ids_KN.clamp(0).to(at::kLong), weights_KN);
      if (exponent == 1) { EXPECT_LT((w_KV.sum(1) - 1).abs().max().item<double>(), 1e-6); }
      EXPECT_EQ(signal.tail_K.abs().max().item<double>(), 0);
      difference_V += (w_KV - p_KV).sum(0);
      variance_V += ((p_KV * p_KV / q_KV - p_KV * p_KV) / 12).sum(0);
    }
    const at::Tensor z_V = difference_V / variance_V.sqrt();
    EXPECT_LT(z_V.abs().max().item<double>(), 4.5) << exponent;
    EXPECT_NEAR(z_V.square().mean().item<double>(), 1, 5 * std::sqrt(2.0 / kTinyVocabulary)) << exponent;
  }
}

TEST(WriteCache, ShardsAndStopsChangeNoSignal) {
  const ScratchFolder scratch;
  const CacheConfig whole = tiny_cache(scratch.path(), "whole");
  write_cache(whole, never);
  const std::vector<SparseSignal> wanted = signals_of(whole);

  CacheConfig parts = tiny_cache(scratch.path(), "parts");
  for (const char* shard : {"1/3", "2/3", "0/3"}) {
    parts.shard = shard;
    EXPECT_EQ(write_cache(parts, never).complete, std::string(shard) == "0/3");
  }
  EXPECT_TRUE(same(signals_of(parts), wanted));

  // Stopped in the middle of a group: what was whole is committed, the rest is read again.
  CacheConfig stopped = tiny_cache(scratch.path(), "stopped");
  int asked = 0;
  EXPECT_TRUE(fails_with(ErrorKind::kStopped, "128 of 390 documents of shard 0/1 in the cache", [&] {
    const int passes_of_two_groups = 2 * 64 * 16 / 64;  // no fewer than so many
    write_cache(stopped, [&] { return ++asked > passes_of_two_groups + 30; });
  })) << asked;
  EXPECT_TRUE(fails_with(ErrorKind::kData, "unfinished teacher cache", [&] { TeacherCache(stopped.output); }));
  write_cache(stopped, never);
  EXPECT_TRUE(same(signals_of(stopped), wanted));

  // A second run of what is complete does nothing.
  const auto before = contents(whole.output);
  const CacheReport again = write_cache(whole, never);
  EXPECT_TRUE(again.was_complete);
  EXPECT_EQ(again.tokens, 0u);
  EXPECT_TRUE(contents(whole.output) == before);

  CacheConfig other = tiny_cache(scratch.path(), "other");
  other.threads = 2;
  other.seed = 10;
  write_cache(other, never);
  EXPECT_FALSE(same(signals_of(other), wanted));
}

TEST(WriteCache, DeathAtAnyPassLeadsToTheSameBytes) {
  const ScratchFolder scratch;
  CacheConfig whole = tiny_cache(scratch.path(), "whole"), parts = tiny_cache(scratch.path(), "parts");
  whole.rows_per_file = parts.rows_per_file = 1;  // a file for each group
  whole.stores.pop_back(), parts.stores.pop_back();
  int passes = 0;
  write_cache(whole, [&] { return ++passes, false; });
  const auto wanted = contents(whole.output);
  for (int at = 1; at <= passes; at += 7) {
    fs::remove_all(parts.output);
    int asked = 0;
    const auto dies = [&]() -> bool {
      if (++asked == at) throw Interrupted();
      return false;
    };
    EXPECT_THROW(write_cache(parts, dies), Interrupted);
    EXPECT_TRUE(fails_with(ErrorKind::kData, "unfinished", [&] { TeacherCache(parts.output); }));
    int more = 0;
    write_cache(parts, [&] { return ++more, false; });
    ASSERT_TRUE(contents(parts.output) == wanted) << "died before pass " << at;
    if (at > passes / 2) { EXPECT_LT(more, passes); }  // what was committed is not computed again
  }
}

TEST(WriteCache, ReportsSpeedAndSize) {
  const ScratchFolder scratch;
  const CapturedLog log;
  const CacheReport report = write_cache(tiny_cache(scratch.path(), "cache"), never);
  EXPECT_GT(report.json["tokens_per_second"].get<double>(), 0);
  EXPECT_GT(report.json["bytes_per_row"].get<double>(), 0);
  std::uint64_t tokens = 0;
  for (const char* name : {"one", "two"}) {
    const data::TokenStore store(scratch / name);
    for (std::uint64_t i = 0; i < store.num_documents(); ++i) tokens += store.length(i) + (store.length(i) - 2) / 15;  // pieces overlap by one token
  }
  EXPECT_EQ(report.tokens, tokens);
  EXPECT_NE(log.text.find("trained tokens in"), std::string::npos) << log.text;
  EXPECT_NE(log.text.find("cannot be checked that the stores were made for this teacher"), std::string::npos);
}

TEST(WriteCache, RefusesWhatCannotBeRight) {
  const ScratchFolder scratch;
  const CacheConfig config = tiny_cache(scratch.path(), "cache");
  const auto refused = [&](ErrorKind kind, const std::string& words, const std::function<void(CacheConfig&)>& change) {
    CacheConfig changed = config;
    change(changed);
    return fails_with(kind, words, [&] { write_cache(changed, never); });
  };
  for (const char* shard : {"", "1", "1/", "/2", "2/2", "0/0", "-1/2", "0/2x", "a/b", "0 /2"})
    EXPECT_TRUE(refused(ErrorKind::kUsage, "is not i/n", [&](CacheConfig& changed) { changed.shard = shard; })) << shard;
  EXPECT_TRUE(refused(ErrorKind::kUsage, "stores: is empty", [](CacheConfig& changed) { changed.stores.clear(); }));
  EXPECT_TRUE(refused(ErrorKind::kUsage, "is the same store as", [](CacheConfig& changed) { changed.stores[1] = changed.stores[0]; }));
  EXPECT_TRUE(refused(ErrorKind::kUsage, "k: 49 is not between 1 and 48", [](CacheConfig& changed) { changed.kind = "top_k", changed.k = 49; }));
  EXPECT_TRUE(refused(ErrorKind::kUsage, "only kind: sampled", [](CacheConfig& changed) { changed.kind = "top_k", changed.proposal_exponent = 0.5; }));
  EXPECT_TRUE(refused(ErrorKind::kUsage, "holds other files", [&](CacheConfig& changed) { changed.output = scratch / "one"; }));
  testing::write_store(scratch / "larger", 10, 4, 100);
  EXPECT_TRUE(refused(ErrorKind::kData, "its tokenizer has 100 tokens, the teacher only 48", [&](CacheConfig& changed) { changed.stores = {{.store = scratch / "larger"}}; }));
  EXPECT_FALSE(fs::exists(config.output));

  // A teacher whose weights are numbers and whose logits are not.
  const checkpoints::FolderTensors tensors(config.model);
  std::vector<std::pair<std::string, std::vector<std::int64_t>>> names;
  for (const std::string& name : tensors.names()) names.emplace_back(name, tensors.shape(name));
  fs::create_directories(scratch / "broken");
  fs::copy_file(config.model / "config.json", scratch / "broken/config.json");
  checkpoints::write_weights(scratch / "broken", names, at::kFloat, [&](std::size_t i) {
    const bool large = names[i].first == "model.norm.weight" || names[i].first == "model.embed_tokens.weight";
    return tensors.tensor_as(names[i].first, at::kFloat) * (names[i].first == "model.norm.weight" ? 1e38 : large ? 1e3 : 1);
  });
  EXPECT_TRUE(refused(ErrorKind::kNumerics, "document 0 of store 0: the teacher's logits are not finite", [&](CacheConfig& changed) { changed.model = scratch / "broken", changed.output = scratch / "unused"; }));

  EXPECT_TRUE(refused(ErrorKind::kUsage, "seed: was 9, now 10", [&](CacheConfig& changed) {
    write_cache(changed, never);
    changed.seed = 10;
  }));
}

// The same number of tokens does not make the same tokens; a tokenizer that is only written otherwise does.
TEST(WriteCache, ComparesVocabulariesIdById) {
  const ScratchFolder scratch;
  const fs::path golden = testing::golden_path("prepare/model");
  const std::string text = read_file(golden / "tokenizer.json");
  Json swapped = parse_json(text, "tokenizer.json"), rewritten = swapped;
  Json& vocabulary = swapped["model"]["vocab"];
  std::string one, two;
  for (const auto& [name, id] : vocabulary.items()) {
    if (id == 40) one = name;
    if (id == 41) two = name;
  }
  ASSERT_FALSE(one.empty() || two.empty());
  std::swap(vocabulary[one], vocabulary[two]);
  rewritten["post_processor"] = nullptr;
  CacheConfig config = tiny_cache(scratch.path(), "cache");
  const auto model_with = [&](const std::string& name, const std::string& tokenizer) {
    fs::copy(config.model, scratch / name);
    std::ofstream(scratch / name / "tokenizer.json") << tokenizer;
    return scratch / name;
  };
  const fs::path own = model_with("own", text), other = model_with("swapped", swapped.dump()), written = model_with("rewritten", rewritten.dump());
  const data::Tokenizer tokenizer = data::Tokenizer::from_file(own);
  ASSERT_EQ(data::Tokenizer::from_file(other).vocabulary_size(), tokenizer.vocabulary_size());
  ASSERT_NE(data::Tokenizer::from_file(written).hash(), tokenizer.hash());
  {
    data::TokenStoreWriter writer(scratch / "store", {.tokenizer_hash = tokenizer.hash(), .vocabulary_size = kTinyVocabulary, .sources = {{.name = "text", .origin = "", .licence = "CC0-1.0", .language = ""}}});
    writer.append({.ids = {1, 2, 3, 4}, .mask = {0, 1, 1, 1}});
    writer.finish();
  }
  config.stores = {{.store = scratch / "store"}};
  config.model = other;
  EXPECT_TRUE(fails_with(ErrorKind::kData, "equal sizes do not make equal ids", [&] { write_cache(config, never); }));
  config.tokenizer = own;
  EXPECT_TRUE(fails_with(ErrorKind::kData, "its id 40 is \"" + two + "\"", [&] { write_cache(config, never); }));
  config.model = written;
  EXPECT_EQ(write_cache(config, never).totals.rows, 3u);
  fs::remove_all(config.output);
  config.model = own;
  config.tokenizer.clear();
  EXPECT_EQ(write_cache(config, never).totals.rows, 3u);
  config.model = written;
  config.tokenizer = other;
  EXPECT_TRUE(fails_with(ErrorKind::kData, "name the tokenizer that the store was prepared with", [&] { write_cache(config, never); }));
}

// For tests/oracle/teacher_cache_oracle.py: the config is a JSON object of the config's keys, with the shards in turns.
TEST(TeacherCacheOracle, WritesWhatItIsTold) {
  const char* input = std::getenv("ALAMBIC_ORACLE_INPUT");
  if (!input) GTEST_SKIP() << "run by tests/oracle/teacher_cache_oracle.py";
  for (const Json& config : read_json_file(input)) {
    std::vector<std::string> overrides;
    for (const auto& [key, value] : config.items()) overrides.push_back(key + "=" + value.dump());
    EXPECT_GT(write_cache(read_config<CacheConfig>("", overrides), never).totals.rows, 0u);
  }
}

}  // namespace
}  // namespace alambic::distill
