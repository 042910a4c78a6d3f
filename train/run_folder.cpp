// SPDX-License-Identifier: Apache-2.0
#include "train/run_folder.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>

#include "checkpoints/hf_folder.h"
#include "checkpoints/peft_folder.h"
#include "checkpoints/run_state.h"
#include "core/error.h"
#include "core/log.h"
#include "lora/initialise.h"
#include "lora/merge.h"
#include "models/token_rows.h"
#include "train/evaluate.h"

namespace alambic::train {
namespace {

constexpr const char* kReport = "report.json";

std::filesystem::path result_folder(const TrainConfig& config) { return config.output / result_name(config); }

const std::filesystem::path& made(const std::filesystem::path& folder) {
  std::error_code failed;
  std::filesystem::create_directories(folder, failed);
  if (failed) fail(ErrorKind::kUsage, "output: ", folder.string(), ": cannot be made: ", failed.message(), Remedy{"choose a folder that can be written"});
  return folder;
}

/// Copies a folder of plain files, each fsynced.
void copy_files(const std::filesystem::path& from, const std::filesystem::path& to) {
  for (const std::filesystem::directory_entry& entry : std::filesystem::directory_iterator(from)) {
    std::filesystem::copy_file(entry.path(), to / entry.path().filename());
    fsync_file(to / entry.path().filename());
  }
}

/// A full fine-tune's weights as a Hugging Face folder: the f32 masters themselves, so that a merge into a narrower type
/// rounds once and its proof sees what the rounding costs.
void write_full_weights(const TrainConfig& config, const models::ModelConfig& base, const checkpoints::RunState& state, const std::filesystem::path& folder) {
  constexpr std::string_view kWeights = "weights.";
  std::vector<std::pair<std::string, std::vector<std::int64_t>>> names;
  std::vector<at::Tensor> tensors;
  for (const auto& [name, tensor] : state.tensors)
    if (name.starts_with(kWeights) && !is_beside_model(name)) names.emplace_back(name.substr(kWeights.size()), tensor.sizes().vec()), tensors.push_back(tensor);
  std::string before;  // what was written goes, as what trained is still in memory
  checkpoints::write_weights(folder, names, at::kFloat, [&](std::size_t i) {
    if (!before.empty()) state.file->release(before);
    before = std::string(kWeights) + names[i].first;
    return tensors[i];
  });
  checkpoints::copy_companions(config.model, folder);
  checkpoints::describe_weights(folder, at::kFloat, base.tied_head && names.size() == models::expected_shapes(base).size());
}

/// The tensors of a checkpoint apart: what trains and its moments, and what the base had become.
std::pair<NamedTensors, NamedTensors> parted(const checkpoints::RunState& state) {
  std::pair<NamedTensors, NamedTensors> parts;
  for (const auto& [name, tensor] : state.tensors) (is_base_state(name) ? parts.second : parts.first).emplace_back(name, tensor);
  return parts;
}

/// The weights of a checkpoint of a run with restarts, its adapters merged, as a Hugging Face folder in f32.
void write_restarted_weights(const TrainConfig& config, const checkpoints::RunState& state, const std::filesystem::path& folder) {
  models::Decoder decoder = checkpoints::load_decoder(config.model, at::kFloat);
  make_trainable(decoder, config);
  auto [trained, base] = parted(state);
  std::erase_if(trained, [](const auto& named) { return is_beside_model(named.first); });
  restore_base(decoder, config.lora, base);
  make_optimizer(lora::trainable(decoder), config.optimizer)->restore(trained, 0);
  std::vector<std::pair<std::string, std::vector<std::int64_t>>> names;
  std::vector<std::function<at::Tensor()>> makers;
  const auto add = [&](const std::string& name, const at::Tensor& tensor, std::function<at::Tensor()> make) {
    names.emplace_back(name, tensor.sizes().vec());
    makers.push_back(std::move(make));
  };
  std::map<const at::Tensor*, models::Linear*> adapted;
  for (const models::NamedLinear& linear : decoder.linears())
    if (linear.linear->adapter) adapted[&linear.linear->weight_OI] = linear.linear;
  if (decoder.head.adapter) decoder.head_tied = false;
  for (const models::NamedTensor& named : decoder.tensors()) {
    const at::Tensor& tensor = *named.tensor;
    const models::Linear* const linear = adapted.contains(named.tensor) ? adapted[named.tensor] : nullptr;
    if (linear != nullptr) add(named.name, tensor, [linear] { return lora::merged_weight(linear->weight_OI, *linear->adapter); });
    else if (named.tensor == &decoder.embedding_VD && decoder.token_rows_ND.defined())
      add(named.name, tensor, [&] { return models::with_token_rows(decoder.embedding_VD, decoder.token_rows_ND, decoder.token_row_ids); });
    else if (named.tensor == &decoder.head.weight_OI && decoder.head.token_rows_ND.defined())
      add(named.name, tensor, [&] { return models::with_token_rows(decoder.head.weight_OI, decoder.head.token_rows_ND, decoder.head.token_row_ids); });
    else add(named.name, tensor, [&tensor] { return tensor.detach(); });
  }
  checkpoints::write_weights(folder, names, at::kFloat, [&](std::size_t i) { return makers[i](); });
  checkpoints::copy_companions(config.model, folder);
  checkpoints::describe_weights(folder, at::kFloat, decoder.head_tied);
}

/// Error(kUsage) listing what differs between the run that wrote `checkpoint` and this one.
void require_same_run(const std::filesystem::path& run, const std::filesystem::path& checkpoint, const Json& then, const Json& now) {
  std::string changed;
  for (const std::string& line : checkpoints::differences(require<Json>(then, "run", (checkpoint / "identity.json").string()), now["run"])) changed += "\n  " + line;
  if (!changed.empty())
    fail(ErrorKind::kUsage, run.string(), ": this run was started with other settings or data:", changed,
         Remedy{"go on with what the run was started with, or start a new one in another output folder"});
}

}  // namespace

RunFolder::RunFolder(const std::filesystem::path& folder) : lock_(made(folder)) {}

void require_new_or_resumed(const TrainConfig& config, bool resume) {
  if (resume) return;
  for (const std::filesystem::directory_entry& entry : std::filesystem::directory_iterator(config.output))
    if (entry.path().filename() != ".lock")
      fail(ErrorKind::kUsage, "output: ", config.output.string(), std::filesystem::exists(config.output / kReport) ? " holds a finished run" : " is not empty",
           Remedy{"go on with what is there by --resume, or choose another folder"});
}

std::optional<TrainReport> finished_run(const TrainConfig& config, const Inputs& inputs) {
  const std::filesystem::path path = config.output / kReport;
  if (!std::filesystem::exists(path)) return std::nullopt;
  const std::optional<std::filesystem::path> newest = checkpoints::newest_checkpoint(config.output);
  if (!newest)
    fail(ErrorKind::kData, config.output.string(), ": holds a finished run without its checkpoints, so it cannot be told whether that is this run",
         Remedy{"use its result as it is, or choose another output folder"});
  require_same_run(config.output, *newest, read_json_file(*newest / "identity.json"), identity_of(config, inputs));
  TrainReport report{.result = result_folder(config), .was_finished = true, .json = read_json_file(path)};
  report.steps = require<std::int64_t>(report.json, "steps", path.string());
  report.chosen_step = require<std::int64_t>(report.json, "chosen_step", path.string());
  log_info(config.output.string(), ": this run is finished (", report.steps, " steps); the result is in ", report.result.string());
  return report;
}

void use_threads(const TrainConfig& config) {
  if (config.threads > 0) at::set_num_threads(static_cast<int>(config.threads));
}

void make_trainable(models::Decoder& decoder, const TrainConfig& config) {
  if (config.method == "lora") lora::attach_empty(decoder, config.lora);
  else lora::train_everything(decoder);
}

std::int64_t parameters_beside(const Optimizer& optimizer) {
  std::int64_t count = 0;
  for (const Trained& one : optimizer.trained())
    if (is_beside_model(one.name)) count += one.tensor.numel();
  return count;
}

std::uint64_t checkpoint_bytes(const TrainConfig& config, const Optimizer& optimizer, std::int64_t num_parameters) {
  // The weights, and the PEFT folder or what a full fine-tune writes at the end. Where a part of the base was taken out that part
  // is kept too, and the PEFT folder has twice the rank. With restarts the weights that were merged into are kept as well, at
  // most all of the model.
  const std::int64_t copies = config.method == "lora" && lora::parse_init(config.lora.init).changes_base() ? 4 : 2, base = restarts(config) ? num_parameters : 0;
  return static_cast<std::uint64_t>(static_cast<std::int64_t>(sizeof(float)) * (copies * optimizer.num_parameters() + base) + optimizer.state_bytes()) + (1 << 20);
}

void require_disk(const TrainConfig& config, const Optimizer& optimizer, std::int64_t num_parameters) {
  // The kept ones, the best one, and the one being written.
  const std::uint64_t needed = checkpoint_bytes(config, optimizer, num_parameters) * static_cast<std::uint64_t>(config.checkpoint.keep + 2), free = free_bytes(config.output);
  if (free < needed)
    fail(ErrorKind::kResource, config.output.string(), ": ", free >> 20, " MiB are free, checkpoints need ", needed >> 20, " MiB",
         Remedy{"free space, choose another output, or lower checkpoint.keep"});
}

std::int64_t total_steps(const TrainConfig& config, const data::BatchStream& batches, const Inputs& inputs) {
  const LimitsConfig& limits = config.limits;
  std::int64_t steps = limits.max_steps > 0 ? limits.max_steps : std::numeric_limits<std::int64_t>::max();
  if (limits.max_epochs > 0) steps = std::min(steps, batches.steps_for_epochs(limits.max_epochs));
  if (limits.max_tokens > 0) {
    constexpr std::int64_t kProbe = 4;
    data::BatchStream probe(stream_config(config), static_cast<std::uint32_t>(inputs.model.vocabulary_size));
    for (std::int64_t i = 0; i < kProbe; ++i) probe.next_step();
    const double tokens_per_step = static_cast<double>(probe.counts().tokens) / kProbe;
    steps = std::min(steps, static_cast<std::int64_t>(std::ceil(static_cast<double>(limits.max_tokens) / tokens_per_step)));
  }
  return std::max<std::int64_t>(steps, 1);
}

std::string chosen_by(const TrainConfig& config) {
  if (!config.evaluation.choose_best_by.empty() || config.evaluation.stores.empty()) return config.evaluation.choose_best_by;
  return config.evaluation.stores.front().name;
}

Json evaluate_all(const TrainConfig& config, const models::Decoder& decoder, const Inputs& inputs, parallel::Communicator& ranks) {
  if (inputs.held_out.empty()) return nullptr;
  Json all = Json::object();
  for (const auto& [name, store] : inputs.held_out)
    all[name] = to_json(evaluate(decoder, store, config.data.row_length, config.data.rows_per_batch, static_cast<std::uint64_t>(config.evaluation.max_tokens), ranks));
  return all;
}

std::optional<Progress> restore(const TrainConfig& config, const Inputs& inputs, const LoopParts& parts) {
  const std::optional<std::filesystem::path> newest = checkpoints::newest_checkpoint(config.output);
  const auto note_config = [&] { write_file(config.output / "config.json", resolved_config_of(config, inputs).dump(2) + "\n"); };
  if (!newest) {
    note_config();
    return std::nullopt;
  }
  const checkpoints::RunState state = checkpoints::load_checkpoint(*newest);
  const std::string source = (*newest / "identity.json").string();
  require_same_run(config.output, *newest, state.identity, parts.identity);
  for (const std::string& line : checkpoints::differences(require<Json>(state.identity, "machine", source), parts.identity["machine"]))
    log_warning("resuming on another machine or thread count, so the last bits of sums may differ: ", line);
  Progress progress = progress_from_json(state.progress, (*newest / "progress.json").string());
  const auto [trained, base] = parted(state);
  parts.restore_base(base);
  parts.optimizer.restore(trained, progress.optimizer_steps);
  parts.batches.restore(progress.data);
  note_config();
  log_info("resuming from ", newest->filename().string());
  return progress;
}

void write_result(const TrainConfig& config, models::Decoder& decoder, const Inputs& inputs, const std::filesystem::path& folder) {
  if (result_name(config) == "adapter") checkpoints::write_adapter(decoder, config.lora, config.model.string(), folder / "adapter", inputs.base_hash, quantization_of(config));
}

TrainReport finish(const TrainConfig& config, const Inputs& inputs, const Progress& progress) {
  const bool evaluated = progress.best_step >= 0;
  TrainReport report{.result = result_folder(config), .steps = progress.step, .chosen_step = evaluated ? progress.best_step : progress.step};
  const std::filesystem::path chosen = config.output / ("checkpoint-" + std::to_string(report.chosen_step)), temporary = config.output / ".tmp-result";
  if (const std::string damage = checkpoints::damage_of(chosen); !damage.empty())
    fail(ErrorKind::kData, "the chosen checkpoint is damaged: ", damage, Remedy{"train again; the disk may be failing"});
  std::filesystem::remove_all(temporary);
  std::filesystem::remove_all(report.result);  // of an earlier end of this run that was cut short before its report
  std::filesystem::create_directory(temporary);
  if (result_name(config) == "adapter") copy_files(chosen / "adapter", temporary);
  else if (restarts(config)) write_restarted_weights(config, checkpoints::load_checkpoint(chosen), temporary);
  else write_full_weights(config, inputs.model, checkpoints::load_checkpoint(chosen), temporary);
  commit_folder(temporary, report.result);

  Json evaluation = Json::array();
  for (const auto& [name, store] : inputs.held_out)
    evaluation.push_back({{"name", name}, {"chosen_by", name == chosen_by(config)}, {"before", progress.before[name]}, {"after", progress.best[name]}});
  report.json = {{"format", 1},
                 {"method", config.method},
                 {"result", report.result.filename().string()},
                 {"ended", progress.ended},
                 {"steps", progress.step},
                 {"chosen_step", report.chosen_step},
                 {"tokens", progress.tokens},
                 {"kept_tokens", progress.kept_tokens},
                 {"bad_steps", progress.bad_steps},
                 {"restarts", progress.restarts},
                 {"base", {{"folder", config.model.string()}, {"sha256", inputs.base_hash}, {"family", inputs.model.family->model_type}, {"parameters", inputs.model.num_parameters()}}},
                 {"evaluation", evaluation},
                 {"data", describe_data(config, inputs)},
                 {"licence", licence_verdict(config, inputs)},
                 {"config", resolved_config_of(config, inputs)}};
  if (!inputs.contributors.empty()) report.json["teachers"] = describe_contributors(inputs);
  write_file(config.output / kReport, report.json.dump(2) + "\n");
  log_info("finished after ", report.steps, " steps; step ", report.chosen_step, " is in ", report.result.string());
  return report;
}

}  // namespace alambic::train
