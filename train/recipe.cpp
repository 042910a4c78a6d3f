// SPDX-License-Identifier: Apache-2.0
#include "train/recipe.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

#include <memory>

#include "checkpoints/hf_folder.h"
#include "checkpoints/manifest.h"
#include "core/error.h"
#include "core/files.h"
#include "core/log.h"
#include "core/random.h"
#include "lora/initialise.h"
#include "models/decoder.h"
#include "models/device.h"
#include "models/sharded_blocks.h"
#include "parallel/connect.h"
#include "train/cross_entropy.h"
#include "train/device.h"
#include "train/inputs.h"
#include "train/known_gradients.h"
#include "train/loop.h"
#include "train/memory.h"
#include "train/run_folder.h"
#include "train/sampler.h"

namespace alambic::train {

Inputs open_inputs(const TrainConfig& config, const Recipe& recipe) {
  Inputs inputs = open_inputs(config);
  if (recipe.open) recipe.open(inputs);
  return inputs;
}

namespace {

/// This rank's part of the sum over a batch whose tokens all members of decoder.context share. It always has a backward pass, in which the
/// others need this rank.
at::Tensor shared_text_loss(const TrainConfig& config, models::Decoder& decoder, const data::Batch& batch, std::uint64_t dropout_seed) {
  const models::SharedRow row(decoder.context, batch.document_lengths);
  const models::Input input{.tokens_T = row.own(batch.tokens_T), .positions_T = row.own(row.positions_T()), .document_lengths = row.document_lengths(), .dropout_seed = dropout_seed,
                            .neftune_alpha = config.neftune_alpha, .shared = &row};
  const at::Tensor hidden_TD = decoder.hidden_TD(input);
  // Rows of the head are numbered by each rank, so that masks of an adapter there are its own.
  const std::uint64_t head_seed = derive_seed(dropout_seed, "context", {static_cast<std::uint64_t>(decoder.context.member)}) | 1;
  const at::Tensor sum = cross_entropy_sum(hidden_TD, decoder.head, row.own(batch.targets_T), row.own(batch.keep_T), head_seed, config.loss);
  if (sum.requires_grad() || !hidden_TD.requires_grad()) return sum;
  return with_known_gradients(sum, {hidden_TD}, {at::zeros_like(hidden_TD.detach())});
}

}  // namespace

Recipe text_recipe(const TrainConfig& config) {
  return {.shares_rows = true, .loss = [config](models::Decoder& decoder, const Inputs&, std::vector<models::NamedTensor>&) -> LossSum {
    return [config, &decoder](const data::Batch& batch, std::uint64_t dropout_seed) {
      if (decoder.context.size > 1) return shared_text_loss(config, decoder, batch, dropout_seed);
      const at::Tensor hidden_TD = decoder.hidden_TD(input_of(batch, dropout_seed, config.neftune_alpha));
      return cross_entropy_sum(hidden_TD, decoder.head, batch.targets_T, batch.keep_T, dropout_seed, config.loss);
    };
  }};
}

namespace {

/// Ranks other than 0 keep their notes to themselves, as they would say the same; warnings and errors are their own.
class NotesOfRank0 {
 public:
  explicit NotesOfRank0(const parallel::Communicator& ranks) {
    if (ranks.rank() == 0) return;
    former_ = std::make_shared<LogSink>();
    *former_ = set_log_sink([former = former_](LogLevel level, std::string_view line) {
      if (level == LogLevel::kWarning && *former) (*former)(level, line);
    });
  }
  ~NotesOfRank0() {
    if (former_) set_log_sink(*former_);
  }
  NotesOfRank0(const NotesOfRank0&) = delete;
  NotesOfRank0& operator=(const NotesOfRank0&) = delete;

 private:
  std::shared_ptr<LogSink> former_;
};

/// What must be the same on all ranks before anything is computed: the program, the config (but for paths, which may differ from machine to
/// machine, and what only concerns one's own speed), the base, the data.
Json facts_of(const TrainConfig& config, const Inputs& inputs, bool resume) {
  Json identity = identity_of(config, inputs)["run"], base = identity["base_sha256"], data = Json::object();
  identity.erase("base_sha256");
  for (const char* use : {"data", "evaluation"}) {
    Json& stores = identity[use][std::string_view(use) == "data" ? "mixture" : "stores"];
    for (Json& store : stores) data[use].push_back(store["sha256"]), store.erase("sha256");
  }
  const Json whole = resolved_config(config);
  for (const char* key : {"checkpoint", "samples", "ranks", "log_every", "deterministic"}) identity[key] = whole[key];
  identity["device"] = config.device;
  identity["resume"] = resume;
  return {{"code", {{"version", checkpoints::alambic_version()}, {"program", sha256_of_file("/proc/self/exe")}}}, {"config", identity}, {"base", base}, {"data", data}};
}

/// All ranks continue where rank 0 does: it alone has read the checkpoint. Returns its progress.
std::optional<Progress> share_start(const LoopParts& parts, std::optional<Progress> progress, at::Device device) {
  parallel::Communicator& ranks = parts.ranks;
  if (ranks.size() == 1) return progress;
  Json base = Json::array();
  if (progress)
    for (const auto& [name, tensor] : parts.base_state()) base.push_back({name, tensor.sizes().vec(), static_cast<int>(tensor.scalar_type())});
  const std::string text = broadcast_text(ranks, progress ? to_line({{"progress", to_json(*progress)}, {"base", base}}) : "", 0, "where to go on");
  if (text.empty()) return std::nullopt;
  const Json start = parse_json(text, "rank 0");
  const at::NoGradGuard no_grad;
  NamedTensors base_tensors;
  if (progress) base_tensors = parts.base_state();
  else
    for (const Json& entry : start["base"]) base_tensors.emplace_back(entry[0].get<std::string>(), at::empty(entry[1].get<std::vector<std::int64_t>>(), at::TensorOptions(static_cast<at::ScalarType>(entry[2].get<int>())).device(device)));
  std::vector<at::Tensor> tensors;
  for (const auto& [name, tensor] : base_tensors) tensors.push_back(tensor);
  ranks.broadcast_in_place(tensors, 0, "the checkpoint's base");
  if (!progress) {
    parts.restore_base(base_tensors);
    progress = progress_from_json(start["progress"], "rank 0");
    parts.batches.restore(progress->data);
  }
  parts.optimizer.share(progress->optimizer_steps, ranks);
  return progress;
}

/// How ranks share the blocks; nothing where they do not.
std::optional<checkpoints::Sharing> sharing_of(const TrainConfig& config, parallel::Communicator& ranks) {
  if (!config.ranks.shard || config.method != "lora" || ranks.size() == 1) return std::nullopt;
  const auto group = static_cast<int>(config.ranks.shard_group);
  return checkpoints::Sharing{ranks, group > 0 ? group : ranks.size()};
}

/// From now on `context` ranks compute each row together. Which of them keeps what between the passes is the same on all ranks, since attention
/// that is computed again speaks to the others again.
void share_rows(models::Decoder& decoder, parallel::Communicator& ranks, int context) {
  const at::Tensor own = at::empty({1}, at::kLong).fill_(static_cast<std::int64_t>(decoder.keep));
  decoder.keep = static_cast<models::Keep>(ranks.all_gather(own, "memory policy").max().item<std::int64_t>());
  decoder.context = {.ranks = &ranks, .size = context, .member = ranks.rank() % context};
}

TrainReport run_ranks(const TrainConfig& config, bool resume, const std::function<bool()>& stop_requested, const Recipe& recipe, parallel::Communicator& ranks, const parallel::LaunchEnvironment& environment) {
  const at::Device device = recipe.device ? *recipe.device : device_of(config, environment);
  const OnDevice on_device(device, config.deterministic);
  const NotesOfRank0 notes(ranks);
  const bool is_first = ranks.rank() == 0;
  std::optional<RunFolder> held;  // rank 0 alone reads and writes it
  if (is_first) {
    held.emplace(config.output);
    require_new_or_resumed(config, resume);
  }
  const Inputs inputs = open_inputs(config, recipe);
  if (ranks.size() > 1) require_agreement(ranks, facts_of(config, inputs, resume), "before the first step");
  std::optional<TrainReport> finished;
  if (is_first) finished = finished_run(config, inputs);
  if (any(ranks, finished.has_value(), "whether the run is finished")) return finished.value_or(TrainReport{.was_finished = true});
  if (is_first)
    for (const std::string& warning : inputs.warnings) log_warning(warning);
  const std::uint64_t available = available_to_rank(device, environment.local_size);  // before the weights, which the estimate has, take their part
  models::Decoder decoder = checkpoints::load_decoder(config.model, compute_type_of(config), quantization_of(config), checkpoints::Linears::kDense, sharing_of(config, ranks));
  if (!device.is_cpu()) models::move_to(decoder, device);
  if (recipe.see_base) recipe.see_base(decoder);
  make_trainable(decoder, config);
  prepare_blocks(decoder, config, recipe.not_fused, ranks.size(), available);
  const auto context = static_cast<int>(config.ranks.context);
  if (context > 1) share_rows(decoder, ranks, context);
  std::vector<models::NamedTensor> trained = lora::trainable(decoder);
  const LossSum loss_sum = recipe.loss(decoder, inputs, trained);
  const std::unique_ptr<Optimizer> optimizer = make_optimizer(trained, config.optimizer, config.ranks.shard && config.method == "full" ? &ranks : nullptr, static_cast<int>(config.ranks.shard_group));
  if (is_first) require_disk(config, *optimizer, inputs.model.num_parameters());
  data::BatchStream batches(stream_config(config), static_cast<std::uint32_t>(inputs.model.vocabulary_size), ranks.rank() / context, ranks.size() / context);
  const Sampler sampler(config, decoder);
  Json identity = identity_of(config, inputs);
  if (ranks.size() > 1 && !config.deterministic) identity["machine"]["ranks"] = ranks.size();
  if (context > 1) identity["machine"]["context"] = context;

  const LoopParts parts{
      .batches = batches,
      .optimizer = *optimizer,
      .ranks = ranks,
      .loss_sum = loss_sum,
      .evaluate = [&] { return evaluate_all(config, decoder, inputs, ranks); },
      .sample = [&](std::int64_t) { return sampler.samples(); },
      .base_state = [&] { return base_state(decoder, config.lora); },
      .restore_base = [&](const NamedTensors& state) { restore_base(decoder, config.lora, state); },
      .restart = [&](std::int64_t number) { lora::merge_and_restart(decoder, config.lora, config.seed, number); },
      .write_result = [&](const std::filesystem::path& folder) { write_result(config, decoder, inputs, folder); },
      .stop_requested = stop_requested,
      .run = config.output,
      .identity = identity,
      .total_steps = total_steps(config, batches, inputs),
      .chosen_by = chosen_by(config),
      .figures = recipe.figures,
      .verb = recipe.verb,
      .shards = decoder.shards.get(),
  };
  const std::optional<Progress> resumed = share_start(parts, is_first ? restore(config, inputs, parts) : std::nullopt, device);
  if (!resumed && config.method == "lora") lora::initialise(decoder, config.lora, config.seed);
  if (decoder.shards) decoder.shards->end_common_pass();  // DoRA's start looked at the blocks
  if (config.ranks.shard && ranks.size() == 1) log_info("ranks.shard: one rank alone keeps everything");
  const std::int64_t beside = parameters_beside(*optimizer);
  log_info("training ", optimizer->num_parameters() - beside, " of ", inputs.model.num_parameters(), " parameters", beside > 0 ? " and " + std::to_string(beside) + " beside them" : "", " for ", parts.total_steps, " steps, ",
           toString(compute_type_of(config)), !device.is_cuda() ? "" : " on " + parallel::gpus().seen[static_cast<std::size_t>(device.index())], config.quantize_base == "none" ? "" : " on a base in " + lora::name_of(quantization_of(config)),
           ranks.size() == 1 ? "" : ", by " + std::to_string(ranks.size()) + " ranks" + (context == 1 ? "" : ", " + std::to_string(context) + " to a row"), ", into ", config.output.string());
  const Progress progress = run(config, parts, resumed);
  TrainReport report = is_first ? finish(config, inputs, progress) : TrainReport{.steps = progress.step};
  ranks.barrier("end of the run");
  return report;
}

}  // namespace

void require_sharing(const TrainConfig& config, const Recipe& recipe, int num_ranks) {
  if (config.deterministic) require_tree(num_ranks);
  if (const std::int64_t group = config.ranks.shard_group; group > 0 && num_ranks > 1 && num_ranks % group != 0)
    fail(ErrorKind::kUsage, "ranks.shard_group: ", num_ranks, " ranks are no whole number of groups of ", group, Remedy{"use a divisor of the number of ranks, or 0 for one group of all"});
  const std::int64_t context = config.ranks.context;
  if (context > 1 && !recipe.shares_rows) fail(ErrorKind::kUsage, "ranks.context: ", recipe.verb, " computes each row on one rank", Remedy{"use ranks.context: 1; its ranks share micro-batches"});
  if (num_ranks % context != 0)
    fail(ErrorKind::kUsage, "ranks.context: ", context, " ranks are to share each row, but ", num_ranks, num_ranks == 1 ? " rank was started" : " ranks were started",
         Remedy{"start a multiple of ranks.context (alambic launch -n N), or set a ranks.context that divides " + std::to_string(num_ranks)});
  if (const std::int64_t groups = num_ranks / context; config.data.batches_per_step % groups != 0)
    fail(ErrorKind::kUsage, "data.batches_per_step: ", config.data.batches_per_step, " micro-batches cannot be shared evenly by ", groups, context == 1 ? " ranks" : " groups of " + std::to_string(context) + " ranks (ranks.context)",
         Remedy{"make it a multiple of " + std::to_string(groups)});
}

TrainReport run_recipe(const TrainConfig& given, bool resume, const std::function<bool()>& stop_requested, const Recipe& recipe) {
  check(given);
  const TrainConfig config = with_device(with_token_ids(given));
  use_threads(config);
  const parallel::LaunchEnvironment environment = parallel::launch_environment();
  require_sharing(config, recipe, environment.size);  // before they meet
  const auto ranks = parallel::connect(environment, {.timeout_seconds = config.ranks.timeout, .connect_timeout_seconds = config.ranks.connect_timeout});
  try {
    TrainReport report = run_ranks(config, resume, stop_requested, recipe, *ranks, environment);
    report.rank = ranks->rank();
    return report;
  } catch (const Error& error) {
    // What all ranks come to together needs no telling: a wish to stop, losses that are not finite, a lost rank.
    if (error.kind() != ErrorKind::kStopped && error.kind() != ErrorKind::kPeer) ranks->tell_failure(error.what());
    throw;
  } catch (const std::exception& error) {
    ranks->tell_failure(error.what());
    throw;
  }
}

}  // namespace alambic::train
