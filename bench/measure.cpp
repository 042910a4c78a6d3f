// SPDX-License-Identifier: Apache-2.0
// Our side of scripts/bench.sh: one measurement a process, so that peak memory means something. Prints one JSON object.
//   alambic_bench gemm f32|bf16                       GFLOP/s of a 1024 x 1024 x 1024 product
//   alambic_bench store FOLDER                        makes the token store that the next two read, where it is absent
//   alambic_bench stream FOLDER                       tokens/s of packed batches
//   alambic_bench resume FOLDER                       seconds from opening to the first batch, behind half an epoch
//   alambic_bench resume-simulated                    the same at sample 10^12 of a corpus that is a function
//   alambic_bench teacher-cache FOLDER sampled|top_k  MB/s and tokens/s of a cache written without a teacher, and read by batches
//   alambic_bench load MODEL f32|bf16                 seconds to weights in memory
//   alambic_bench step MODEL f32|bf16 [KEY=VALUE...]  tokens/s of training steps; keys: see StepCase
//   alambic_bench documents FOLDER MODEL [KEY=VALUE...]  makes a token store of eight such steps' documents, for `train` and `plan`
//   alambic_bench collectives BYTES REPEATS           seconds of each call between ranks
// Threads: OMP_NUM_THREADS. step and collectives run on the ranks that a launcher started (docs/ranks.md); each prints what it measured.
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <optional>
#include <span>

#include "bench/collectives.h"
#include "checkpoints/hf_folder.h"
#include "core/error.h"
#include "core/json.h"
#include "core/random.h"
#include "data/batch_stream.h"
#include "data/token_store.h"
#include "data/tokenizer.h"
#include "distill/imitation.h"
#include "distill/signal_rows.h"
#include "distill/teacher.h"
#include "distill/teacher_cache.h"
#include "lora/adapter.h"
#include "lora/quantize.h"
#include "models/allocation.h"
#include "models/fused_blocks.h"
#include "models/product.h"
#include "models/sharded_blocks.h"
#include "parallel/communicator.h"
#include "parallel/connect.h"
#include "train/cross_entropy.h"
#include "train/gradient_sums.h"
#include "train/memory.h"
#include "train/plan.h"
#include "train/step.h"

namespace alambic::bench {
namespace {

class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// Gigabytes (10^9) of a line of /proc/self/status: VmHWM is the most that was resident, VmRSS what is now.
double resident(const std::string& key) {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;)
    if (double kibibytes = 0; word == key + ":" && status >> kibibytes) return kibibytes * 1024 / 1e9;
  fail(ErrorKind::kResource, "/proc/self/status has no ", key);
}

at::ScalarType type_named(const std::string& name) {
  if (name == "f32") return at::kFloat;
  if (name == "bf16") return at::kBFloat16;
  fail(ErrorKind::kUsage, name, ": f32 or bf16 was expected");
}

// The best of several, since a peak is what the machine can do: other processes only take from it.
double median_of(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return (values[(values.size() - 1) / 2] + values[values.size() / 2]) / 2;
}

// What the machine does in products of 1024 x 1024 x 1024: "value" is the median of the faster library over about a second, which a step of seconds could
// reach; "best" the luckiest single product; "mm" the median of at::mm, which the peers call.
Json gemm(at::ScalarType type) {
  const at::Tensor a = at::randn({1024, 1024}).to(type), b = at::randn({1024, 1024}).to(type);
  std::vector<double> rates[2];
  const Stopwatch all;
  for (int i = 0; i < 20 || all.seconds() < 1.5; ++i) {
    const Stopwatch watch;
    const at::Tensor c = i % 2 == 0 ? at::mm(a, b) : models::product(a, b);
    if (i >= 4) rates[i % 2].push_back(2.0 * 1024 * 1024 * 1024 / watch.seconds() / 1e9);
  }
  const double mm = median_of(rates[0]), product = median_of(rates[1]);
  double best = 0;
  for (const std::vector<double>& each : rates) best = std::max(best, *std::max_element(each.begin(), each.end()));
  return {{"value", std::max(mm, product)}, {"unit", "GFLOP/s"}, {"best", best}, {"mm", mm}};
}

// A number in (0, 1) that depends on `index` alone.
double uniform(std::uint64_t index) { return (static_cast<double>(mix64(index) >> 11) + 0.5) / 9007199254740992.0; }

// Log-normal with a median of 300 tokens: chats and short articles.
std::uint32_t length_of(std::uint64_t document) {
  const double normal = std::sqrt(-2 * std::log(uniform(2 * document))) * std::cos(6.283185307179586 * uniform(2 * document + 1));
  return static_cast<std::uint32_t>(std::clamp(300 * std::exp(normal), 2.0, 20'000.0));
}

data::Document document_of(std::uint64_t number) {
  data::Document document;
  document.ids.resize(length_of(number));
  document.mask.assign(document.ids.size(), 1);
  document.mask[0] = 0;
  // Zipf-like ids, so that compression has about as much to do as with text.
  for (std::size_t i = 0; i < document.ids.size(); ++i) document.ids[i] = static_cast<std::uint32_t>(std::pow(49'151.0, uniform(mix64(number) + i))) - 1;
  document.num_bytes = 4 * document.ids.size();
  document.num_words = document.ids.size();
  return document;
}

Json make_store(const std::filesystem::path& folder, std::uint64_t num_documents) {
  if (!std::filesystem::exists(folder / "index.json")) {
    data::TokenStoreWriter writer(folder, {.tokenizer_hash = std::string(64, '0'), .vocabulary_size = 49'152,
                                           .sources = {{.name = "bench", .origin = "bench/measure.cpp", .licence = "CC0-1.0", .language = "en"}}});
    for (std::uint64_t i = writer.committed_documents(); i < num_documents; ++i) writer.append(document_of(i));
    writer.finish();
  }
  const data::TokenStore store(folder);
  return {{"value", static_cast<double>(store.totals().tokens)}, {"unit", "tokens"}};
}

data::StreamConfig stream_config(const std::filesystem::path& folder) {
  return {.mixture = {{.store = folder, .weight = 1}}, .row_length = 1024, .rows_per_batch = 4, .batches_per_step = 2, .seed = 1};
}

Json stream(const std::filesystem::path& folder) {
  data::BatchStream batches(stream_config(folder), 49'152);
  for (int i = 0; i < 10; ++i) batches.next_step();
  const data::StreamCounts before = batches.counts();
  const Stopwatch watch;
  for (int i = 0; i < 600; ++i) batches.next_step();
  const double seconds = watch.seconds();
  const data::StreamCounts counts = batches.counts();
  const auto tokens = static_cast<double>(counts.tokens - before.tokens);
  return {{"value", tokens / seconds}, {"unit", "tokens/s"}, {"fill", tokens / (1024.0 * static_cast<double>(counts.rows - before.rows))},
          {"truncated_share", static_cast<double>(counts.truncated_tokens) / static_cast<double>(counts.tokens + counts.truncated_tokens)},
          {"peak_memory_gb", resident("VmHWM")}};
}

Json resume(const std::filesystem::path& folder) {
  Json state;
  {
    data::BatchStream batches(stream_config(folder), 49'152);
    while (batches.epochs() < 0.5) batches.next_step();
    state = batches.state();
  }
  const Stopwatch watch;
  data::BatchStream batches(stream_config(folder), 49'152);
  batches.restore(state);
  batches.next_step();
  return {{"value", watch.seconds()}, {"unit", "s"}, {"sample", state["counts"]["documents"]}};
}

// Signals that a teacher could have given, of ids as likely as in document_of(): sorted and packed before the clock runs.
std::vector<distill::PieceSignal> signal_of(const distill::SignalForm& form, std::int64_t rows, std::uint64_t seed) {
  std::vector<std::int32_t> ids;
  std::vector<std::uint32_t> codes;
  std::vector<float> tails(static_cast<std::size_t>(rows), 0.01f);
  const auto slots = static_cast<std::size_t>(form.slots);
  for (std::size_t row = 0; row < static_cast<std::size_t>(rows); ++row) {
    std::vector<std::int32_t> drawn(slots);
    for (std::size_t n = 0; n < slots; ++n) drawn[n] = static_cast<std::int32_t>(std::pow(49'151.0, uniform(seed + row * slots + n))) - 1;
    if (form.kind == distill::SignalKind::kTopK) {
      for (std::size_t n = 0; n < slots; ++n) ids.push_back(drawn[n]), codes.push_back(distill::narrow(0.5f / static_cast<float>(1 + n * (1 + row % 7)), form.mantissa_bits()));
      continue;
    }
    std::sort(drawn.begin(), drawn.end());
    const std::size_t end = ids.size() + slots;
    for (std::size_t n = 0; n < slots; ++n) {
      if (n > 0 && drawn[n] == drawn[n - 1]) ++codes.back();
      else ids.push_back(drawn[n]), codes.push_back(1);
    }
    ids.resize(end, -1), codes.resize(end);
  }
  distill::PieceSignal piece{.rows = static_cast<std::uint64_t>(rows), .bytes = {}};
  distill::pack(form, rows, ids.data(), codes.data(), tails.data(), piece.bytes);
  return {piece};
}

Json teacher_cache(const std::filesystem::path& folder, const std::string& kind) {
  const std::filesystem::path store_folder = folder / "store", cache_folder = folder / kind;
  make_store(store_folder, 2'000);
  const data::StreamConfig stream = stream_config(store_folder);
  const data::TokenStore store(store_folder);
  distill::CacheHeader header;
  header.teacher.name = "bench";
  header.stores = {{.hash = store.hash(), .documents = store.num_documents()}};
  header.tokenizer_hash = store.info().tokenizer_hash;
  header.form = {.kind = kind == "top_k" ? distill::SignalKind::kTopK : distill::SignalKind::kSampled, .slots = kind == "top_k" ? 64 : 12, .vocabulary_size = 49'152};
  header.row_length = stream.row_length;
  header.rows_per_file = 131'072;
  std::vector<std::vector<distill::PieceSignal>> signals;
  for (std::uint64_t i = 0; i < store.num_documents(); ++i) signals.push_back(signal_of(header.form, std::min<std::int64_t>(store.length(i), stream.row_length) - 1, mix64(i)));
  std::filesystem::remove_all(cache_folder);
  const Stopwatch writing;
  distill::TeacherCacheWriter writer(cache_folder, header);
  for (std::uint64_t i = 0; i < store.num_documents(); ++i) {
    writer.append(signals[i]);
    if (i % distill::kGroupDocuments == distill::kGroupDocuments - 1) writer.end_group();
  }
  writer.finish();
  const double write_seconds = writing.seconds();
  signals.clear();

  const Stopwatch opening;
  distill::TeacherCache cache(cache_folder);
  const double open_seconds = opening.seconds();
  cache.use_for({.store_hashes = {store.hash()}, .row_length = stream.row_length});
  data::BatchStream batches(stream, 49'152);
  double read_seconds = 0, rows = 0;
  while (batches.epochs() < 1)
    for (const data::Batch& batch : batches.next_step()) {
      const Stopwatch watch;
      const distill::SparseSignal signal = cache.signal(batch);
      read_seconds += watch.seconds();
      rows += static_cast<double>(signal.tail_K.numel());
    }
  const auto bytes = static_cast<double>(cache.totals().bytes), cached = static_cast<double>(cache.totals().rows);
  return {{"value", rows / read_seconds}, {"unit", "tokens/s"}, {"read_mb_per_second", bytes / cached * rows / read_seconds / 1e6}, {"write_mb_per_second", bytes / write_seconds / 1e6},
          {"write_tokens_per_second", cached / write_seconds}, {"open_seconds", open_seconds}, {"rows", cached}, {"packed_bytes_a_token", bytes / cached},
          {"bytes_a_token", static_cast<double>(cache.file_bytes()) / cached}, {"peak_memory_gb", resident("VmHWM")}};
}

class SimulatedCorpus final : public data::Corpus {
 public:
  std::string name() const override { return "simulated"; }
  std::string hash() const override { return "simulated"; }
  std::uint64_t num_documents() const override { return 2'000'000'000'000; }
  std::uint64_t num_trained_tokens() const override { return num_documents(); }
  std::uint32_t length(std::uint64_t document) const override { return length_of(document); }
  data::Document read(std::uint64_t document) const override { return document_of(document); }
};

Json resume_simulated() {
  constexpr std::uint64_t kSample = 1'000'000'000'000;
  const auto open = [] {
    std::vector<std::unique_ptr<data::Corpus>> corpora;
    corpora.push_back(std::make_unique<SimulatedCorpus>());
    return std::make_unique<data::BatchStream>(stream_config(""), std::move(corpora));
  };
  Json state = open()->state();
  state["stores"][0]["first"] = state["counts"]["documents"] = kSample;
  const Stopwatch watch;
  const auto batches = open();
  batches->restore(state);
  const std::vector<data::Batch> step = batches->next_step();
  if (step.at(0).first_sample != kSample) fail(ErrorKind::kBug, "the stream is not at sample ", kSample);
  return {{"value", watch.seconds()}, {"unit", "s"}, {"sample", kSample}};
}

Json load(const std::filesystem::path& model, at::ScalarType type) {
  const double before = resident("VmRSS");
  const Stopwatch watch;
  models::Decoder decoder = checkpoints::load_decoder(model, type);
  double sum = 0;  // mapped pages count as loaded once they were read
  for (const models::NamedTensor& tensor : decoder.tensors()) sum += tensor.tensor->flatten().slice(0, 0, std::nullopt, 1024).sum().item<double>();
  const double seconds = watch.seconds();
  if (!std::isfinite(sum)) fail(ErrorKind::kData, model.string(), ": a weight is not finite");
  return {{"value", seconds}, {"unit", "s"}, {"peak_memory_gb", resident("VmHWM")}, {"libraries_gb", before}};
}

// Multiplications and additions that a step must do: of each weight 2 a token forward and 2 backward, 6 where it trains (an
// adapter, or all); the head only for rows with a label; attention's two products forward and five backward below the diagonal.
double flops_of_a_step(models::Decoder& decoder, const data::Batch& batch) {
  const auto tokens = static_cast<double>(batch.tokens_T.numel()), kept = static_cast<double>(batch.num_kept);
  double flops = 0;
  for (const models::NamedLinear& linear : decoder.linears()) {
    const double rows = linear.layer < 0 ? kept : tokens;
    flops += rows * (linear.linear->weight_OI.defined() && linear.linear->weight_OI.requires_grad() ? 6 : 4) * static_cast<double>(linear.linear->outputs() * linear.linear->inputs());
    if (const auto& adapter = linear.linear->adapter) flops += rows * 6 * static_cast<double>(adapter->a_RI.numel() + adapter->b_OR.numel());
  }
  for (const std::int64_t length : batch.document_lengths)
    flops += 7 * static_cast<double>(length) * static_cast<double>(length + 1) * static_cast<double>(decoder.config.num_layers * decoder.config.num_heads * decoder.config.head_size);
  return flops;
}

// What a step is made of: "rows=4 length=512 documents=512 labels=1 method=lora optimizer=adamw memory=store steps=3 batches=1 shard=0", any of them; batches are
// the micro-batches of all ranks, which share them, and with shard=1 the base, or gradients and moments, too (ranks.shard). With teacher=copy
// the loss is the forward KL to the same model loaded once more, with teacher=base to the student's own base, with teacher=sampled to 12
// draws a token of that base, packed as a cache holds them and unpacked in every step.
struct StepCase {
  std::int64_t rows = 4, length = 512, documents = 0, steps = 3, batches = 1, shard = 0;
  double labels = 1;
  std::string method = "lora", memory = "store", quantize = "none", optimizer = "adamw", teacher = "none", objective = "forward_kl";
};
StepCase step_case(std::span<const std::string> words) {
  StepCase wanted;
  for (const std::string& word : words) {
    const std::size_t equals = word.find('=');
    const std::string key = word.substr(0, equals), value = equals == word.npos ? "" : word.substr(equals + 1);
    if (key == "rows") wanted.rows = std::stoll(value);
    else if (key == "length") wanted.length = std::stoll(value);
    else if (key == "documents") wanted.documents = std::stoll(value);
    else if (key == "steps") wanted.steps = std::stoll(value);
    else if (key == "batches") wanted.batches = std::stoll(value);
    else if (key == "shard") wanted.shard = std::stoll(value);
    else if (key == "labels") wanted.labels = std::stod(value);
    else if (key == "method") wanted.method = value;
    else if (key == "memory") wanted.memory = value;
    else if (key == "quantize") wanted.quantize = value;
    else if (key == "optimizer") wanted.optimizer = value;
    else if (key == "teacher") wanted.teacher = value;
    else if (key == "objective") wanted.objective = value;
    else fail(ErrorKind::kUsage, "step: unknown key ", key);
  }
  if (wanted.documents == 0) wanted.documents = wanted.length;
  return wanted;
}

// The ids that bench/peers/train_step.py uses: documents of equal length; the first 1 - labels of each is a prompt without labels.
data::Batch batch_of(const StepCase& wanted, std::int64_t vocabulary) {
  const std::int64_t num_tokens = wanted.rows * wanted.length;
  data::Batch batch{.tokens_T = at::empty({num_tokens}, at::kLong), .positions_T = at::empty({num_tokens}, at::kLong),
                    .targets_T = at::full({num_tokens}, 0, at::kLong), .keep_T = at::ones({num_tokens}, at::kBool),
                    .document_lengths = std::vector<std::int64_t>(static_cast<std::size_t>(num_tokens / wanted.documents), wanted.documents), .origins = {},
                    .num_kept = 0, .first_sample = 0};
  auto* tokens = batch.tokens_T.mutable_data_ptr<std::int64_t>();
  auto* positions = batch.positions_T.mutable_data_ptr<std::int64_t>();
  auto* targets = batch.targets_T.mutable_data_ptr<std::int64_t>();
  auto* keep = batch.keep_T.mutable_data_ptr<bool>();
  const auto prompt = static_cast<std::int64_t>(static_cast<double>(wanted.documents) * (1 - wanted.labels));
  for (std::int64_t i = 0; i < num_tokens; ++i) {
    tokens[i] = (i * 7919 + (i % 31) * 104'729 + 17) % vocabulary;
    positions[i] = i % wanted.documents;
    keep[i] = positions[i] + 1 < wanted.documents && positions[i] + 1 >= prompt;
    batch.num_kept += keep[i];
    if (positions[i] > 0) targets[i - 1] = tokens[i];
  }
  return batch;
}

Json make_documents(const std::filesystem::path& folder, const std::filesystem::path& model, StepCase wanted) {
  wanted.rows *= 8;
  const data::Tokenizer tokenizer = data::Tokenizer::from_file(model);
  data::TokenStoreWriter writer(folder, {.tokenizer_hash = tokenizer.hash(), .vocabulary_size = tokenizer.vocabulary_size(),
                                         .sources = {{.name = "bench", .origin = "bench/measure.cpp", .licence = "CC0-1.0", .language = "en"}}});
  const data::Batch batch = batch_of(wanted, tokenizer.vocabulary_size());
  const auto* token = batch.tokens_T.const_data_ptr<std::int64_t>();
  const auto* keep = batch.keep_T.const_data_ptr<bool>();
  for (const std::int64_t length : batch.document_lengths) {
    data::Document document{.ids = {token, token + length}, .mask = {0}, .num_words = static_cast<std::uint64_t>(length)};
    for (std::int64_t i = 0; i + 1 < length; ++i) document.mask.push_back(keep[i]);
    document.num_bytes = static_cast<std::uint64_t>(4 * std::count(document.mask.begin(), document.mask.end(), 1));
    writer.append(document);
    token += length, keep += length;
  }
  return {{"value", static_cast<double>(writer.finish().tokens)}, {"unit", "tokens"}};
}

// What a cache holds of a batch: `form`'s rows of the kept tokens' distributions.
std::vector<std::uint8_t> packed_signal(const distill::SignalForm& form, const models::Decoder& teacher, const data::Batch& batch) {
  const at::NoGradGuard constant;
  const at::Tensor index_K = batch.keep_T.nonzero().squeeze(1), hidden_TD = teacher.hidden_TD(train::input_of(batch, 0));
  std::vector<std::uint8_t> bytes;
  std::vector<std::int32_t> ids(static_cast<std::size_t>(batch.num_kept * form.slots), -1);
  std::vector<std::uint32_t> codes(ids.size());
  std::vector<float> tails(static_cast<std::size_t>(batch.num_kept));
  std::vector<std::uint64_t> seeds(tails.size());
  for (std::size_t i = 0; i < seeds.size(); ++i) seeds[i] = mix64(i);
  train::head_loss_sum(hidden_TD, teacher.head, index_K, /*dropout_seed=*/0, [&](at::Tensor& logits_KV, std::int64_t first, bool) {
    if (distill::signal_of_rows({.form = form}, logits_KV, seeds.data() + first, ids.data() + first * form.slots, codes.data() + first * form.slots, tails.data() + first) >= 0)
      fail(ErrorKind::kData, "the teacher's logits are not finite");
    return 0.0;
  });
  distill::pack(form, batch.num_kept, ids.data(), codes.data(), tails.data(), bytes);
  bytes.resize(bytes.size() + 8);  // unpack() may read behind the end
  return bytes;
}

std::unique_ptr<parallel::Communicator> connect_ranks() { return parallel::connect(parallel::launch_environment(), {.timeout_seconds = 300}); }

Json step(const std::filesystem::path& model, at::ScalarType type, const StepCase& wanted) {
  use_tensor_heaps();
  train::TrainConfig config;
  config.method = wanted.method;
  config.memory = wanted.memory;
  const std::unique_ptr<parallel::Communicator> ranks = connect_ranks();
  const bool shares = wanted.shard != 0 && ranks->size() > 1;
  std::optional<checkpoints::Sharing> base_sharing;
  if (shares && wanted.method == "lora") base_sharing.emplace(*ranks, ranks->size());
  models::Decoder decoder = checkpoints::load_decoder(model, type, {.format = wanted.quantize}, checkpoints::Linears::kDense, base_sharing);
  const models::Decoder outside = wanted.teacher == "base" || wanted.teacher == "sampled" ? distill::outside_of_linears(decoder) : models::Decoder();
  if (wanted.method == "lora") lora::attach(decoder, {.rank = 16, .alpha = 32}, /*seed=*/1);
  else lora::train_everything(decoder);
  config.data.row_length = wanted.length;
  config.data.rows_per_batch = wanted.rows;
  train::prepare_blocks(decoder, config);
  const std::unique_ptr<train::Optimizer> optimizer = train::make_optimizer(lora::trainable(decoder), {.kind = wanted.optimizer}, shares && wanted.method == "full" ? ranks.get() : nullptr);
  if (wanted.batches % ranks->size() != 0) fail(ErrorKind::kUsage, "step: ", wanted.batches, " batches among ", ranks->size(), " ranks");
  const data::Batch batch = batch_of(wanted, decoder.config.vocabulary_size);
  const std::vector<data::Batch> own_batches(static_cast<std::size_t>(wanted.batches / ranks->size()), batch);
  const auto num_tokens = static_cast<double>(batch.tokens_T.numel() * wanted.batches);
  train::MemoryEstimate estimate = train::estimate_memory(decoder, static_cast<std::uint64_t>(optimizer->state_bytes()), batch.tokens_T.numel());
  config.data.batches_per_step = wanted.batches;
  config.ranks.shard = shares;
  if (!decoder.shards) estimate = train::shared_by(estimate, decoder, config, ranks->size());
  if (wanted.teacher != "none") {  // adapters that change something, and the peer's: else the first loss is 0
    const at::NoGradGuard constant;
    for (const models::NamedTensor& tensor : lora::trainable(decoder)) {
      const at::Tensor i = at::arange(tensor.tensor->numel(), at::kLong);
      tensor.tensor->copy_((((i * 7919 + (i % 31) * 104'729 + 17) % 1000).to(at::kFloat) / 1000 - 0.5).mul(0.1).view_as(*tensor.tensor));
    }
  }
  models::Decoder teacher;
  if (wanted.teacher == "copy") {
    teacher = checkpoints::load_decoder(model, type, {.format = wanted.quantize}, checkpoints::Linears::kAsStored);
    models::make_head_dense(teacher);
    models::use_fused_blocks(teacher);
  } else if (wanted.teacher == "base") {
    teacher = distill::base_of(decoder, outside).value();
  }
  const distill::SignalForm form{.kind = distill::SignalKind::kSampled, .slots = 12, .vocabulary_size = static_cast<std::uint32_t>(decoder.config.vocabulary_size)};
  const std::vector<std::uint8_t> packed = wanted.teacher == "sampled" ? packed_signal(form, distill::base_of(decoder, outside).value(), batch) : std::vector<std::uint8_t>();
  const distill::Mix mix{.cross_entropy = 0, .divergence = 1, .text = {}, .imitation = {.objective = wanted.objective}, .shared_vocabulary = decoder.config.vocabulary_size};
  distill::Nats nats;
  const train::LossSum loss_sum = [&](const data::Batch& own, std::uint64_t seed) {
    const auto imitate = [&](const distill::TeacherRows& rows) {
      return distill::imitation_sum(decoder.hidden_TD(train::input_of(own, seed)), decoder.head, own.targets_T, own.keep_T, seed, mix, {&rows, 1}, nats);
    };
    if (wanted.teacher == "sampled") {
      const distill::SparseSignal signal{.ids_KN = at::empty({own.num_kept, form.slots}, at::kInt), .probabilities_KN = at::empty({own.num_kept, form.slots}, at::kFloat),
                                         .tail_K = at::empty({own.num_kept}, at::kFloat)};
      const std::string problem = distill::unpack(form, own.num_kept, std::span(packed).first(packed.size() - 8), signal.ids_KN.mutable_data_ptr<std::int32_t>(),
                                                  signal.probabilities_KN.mutable_data_ptr<float>(), signal.tail_K.mutable_data_ptr<float>());
      if (!problem.empty()) fail(ErrorKind::kBug, problem);
      return imitate({.signal = &signal, .sampled = true});
    }
    if (wanted.teacher != "none") {
      at::Tensor taught_KD;
      {
        const at::NoGradGuard constant;
        taught_KD = teacher.hidden_TD(train::input_of(own, 0)).index_select(0, own.keep_T.nonzero().squeeze(1));
      }
      return imitate({.head = &teacher.head, .hidden_KD = taught_KD});
    }
    return train::cross_entropy_sum(decoder.hidden_TD(train::input_of(own, seed)), decoder.head, own.targets_T, own.keep_T, seed);
  };
  double gradient_bytes = 0;
  for (const models::NamedTensor& tensor : lora::trainable(decoder)) gradient_bytes += static_cast<double>(tensor.tensor->nbytes());
  std::vector<double> losses, seconds, in_calls;
  for (int i = 0; i < 1 + wanted.steps; ++i) {  // the first one makes the optimiser's state
    const Stopwatch watch;
    const double before = ranks->seconds_in_calls();
    losses.push_back(train::step(own_batches, loss_sum, *optimizer, 2e-4, 1.0, /*dropout_seed=*/1, *ranks, {}, train::Order::kAsTheyCome, {}, /*context=*/1, decoder.shards.get()).nats_per_token);
    if (i > 0) seconds.push_back(watch.seconds()), in_calls.push_back(ranks->seconds_in_calls() - before);
  }
  const double peak = resident("VmHWM"), own = peak - resident("RssFile");  // without pages of files, which ranks of a machine share
  const double planned = train::probe_seconds(loss_sum, batch, *optimizer);  // behind the peak: all gradients at once may be more than a step holds
  if (decoder.shards) decoder.shards->end_common_pass();
  std::vector<double> sums_alone;  // the same gradients' sizes while nobody computes
  for (int i = 0; i < 4; ++i) {
    ranks->barrier("before a sum alone");
    const double before = ranks->seconds_in_calls();
    train::GradientSums(*optimizer, *ranks, /*in_backward=*/false).finish();
    if (i > 0) sums_alone.push_back(ranks->seconds_in_calls() - before);
  }
  const double median = median_of(seconds);
  return {{"value", num_tokens / median}, {"unit", "tokens/s"}, {"peak_memory_gb", peak}, {"own_memory_gb", own}, {"estimated_memory_gb", static_cast<double>(estimate.total()) / 1e9},
          {"flops_of_a_step", flops_of_a_step(decoder, batch) * static_cast<double>(wanted.batches)}, {"seconds", median}, {"planned_seconds", planned * static_cast<double>(own_batches.size())},
          {"gradient_bytes", gradient_bytes}, {"seconds_in_calls", median_of(in_calls)}, {"seconds_of_sums_alone", median_of(sums_alone)}, {"losses", losses}};
}

Json collectives(std::int64_t bytes, int repeats) {
  use_tensor_heaps();
  return measure_collectives(*connect_ranks(), bytes, repeats);
}

Json measure(const std::vector<std::string>& words) {
  const auto is = [&](const char* name, std::size_t count) { return words.size() == count + 1 && words[0] == name; };
  if (is("gemm", 1)) return gemm(type_named(words[1]));
  if (is("store", 1)) return make_store(words[1], 60'000);
  if (is("stream", 1)) return stream(words[1]);
  if (is("resume", 1)) return resume(words[1]);
  if (is("resume-simulated", 0)) return resume_simulated();
  if (is("teacher-cache", 2)) return teacher_cache(words[1], words[2]);
  if (is("load", 2)) return load(words[1], type_named(words[2]));
  if (is("collectives", 2)) return collectives(std::stoll(words[1]), std::stoi(words[2]));
  if (words.size() >= 3 && words[0] == "documents") return make_documents(words[1], words[2], step_case(std::span(words).subspan(3)));
  if (words.size() >= 3 && words[0] == "step") return step(words[1], type_named(words[2]), step_case(std::span(words).subspan(3)));
  fail(ErrorKind::kUsage, "unknown measurement or a wrong number of arguments", Remedy{"the top of bench/measure.cpp lists them"});
}

}  // namespace
}  // namespace alambic::bench

int main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_IGN);  // of a connection to a rank that is gone
  try {
    std::cout << alambic::to_line(alambic::bench::measure({argv + 1, argv + argc})) << std::endl;
    return 0;
  } catch (const alambic::Error& error) {
    std::cerr << "alambic_bench: " << error.what() << "\n" << error.remedy() << "\n";
    return alambic::exit_code(error.kind());
  } catch (const std::exception& error) {
    std::cerr << "alambic_bench: " << error.what() << "\n";
    return 70;
  }
}
