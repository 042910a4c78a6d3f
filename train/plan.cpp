// SPDX-License-Identifier: Apache-2.0
#include "train/plan.h"

#include <unistd.h>

#include <chrono>

#include "checkpoints/hf_folder.h"
#include "core/error.h"
#include "core/files.h"
#include "models/device.h"
#include "train/cross_entropy.h"
#include "train/device.h"
#include "train/inputs.h"
#include "train/memory.h"
#include "train/run_folder.h"
#include "train/run_log.h"
#include "train/sampler.h"

namespace alambic::train {
namespace {

double seconds_since(std::chrono::steady_clock::time_point began) { return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count(); }

/// What train would say of the output folder; nothing is made. Error(kUsage) where it cannot be.
std::string note_on_output(const std::filesystem::path& output) {
  std::filesystem::path there = std::filesystem::absolute(output).lexically_normal();
  while (!std::filesystem::exists(there)) there = there.parent_path();
  if (!std::filesystem::is_directory(there) || ::access(there.c_str(), W_OK | X_OK) != 0)
    fail(ErrorKind::kUsage, "output: ", output.string(), ": cannot be made, as ", there.string(), " is no folder that can be written", Remedy{"choose another folder"});
  if (!std::filesystem::exists(output)) return "";
  for (const std::filesystem::directory_entry& entry : std::filesystem::directory_iterator(output))
    if (entry.path().filename() != ".lock")
      return "output: " + output.string() + (std::filesystem::exists(output / "report.json") ? " holds a finished run" : " is not empty") +
             ": train needs --resume, which goes on with it if its settings are these, or another folder";
  return "";
}

std::string base_format(models::Decoder& decoder) {
  for (const models::NamedLinear& named : decoder.linears())
    if (named.linear->quantized) return std::string(named.linear->quantized->format());
  return "none";
}

}  // namespace

double probe_seconds(const LossSum& loss_sum, const data::Batch& batch, Optimizer& optimizer) {
  double seconds = 0;
  for (int round = 0; round < 2; ++round) {
    const auto began = std::chrono::steady_clock::now();
    loss_sum(batch, kProbeSeed).backward();
    wait_for(optimizer.trained().front().tensor);
    seconds = seconds_since(began);
    optimizer.forget_gradients();
  }
  return seconds;
}

Json plan(const TrainConfig& config, bool probe, int num_ranks) { return plan(config, probe, text_recipe(config), num_ranks); }

Json plan(const TrainConfig& given, bool probe, const Recipe& recipe, int num_ranks) {
  const TrainConfig config = with_device(with_token_ids(given));
  require_sharing(config, recipe, num_ranks);
  const std::int64_t context = config.ranks.context;
  use_threads(config);
  const at::Device device = device_of(config, {});
  const OnDevice on_device(device, config.deterministic);
  const std::uint64_t available = available_to_rank(device, num_ranks);  // as alambic launch starts them: all on this machine
  const Inputs inputs = open_inputs(config, recipe);
  const std::string note = note_on_output(config.output);
  models::Decoder decoder = checkpoints::load_decoder(config.model, compute_type_of(config), quantization_of(config));
  if (!device.is_cpu()) models::move_to(decoder, device);
  if (recipe.see_base) recipe.see_base(decoder);
  make_trainable(decoder, config);
  const std::string not_fused = prepare_blocks(decoder, config, recipe.not_fused, num_ranks, available);
  std::vector<models::NamedTensor> trained_tensors = lora::trainable(decoder);
  const LossSum loss_sum = recipe.loss(decoder, inputs, trained_tensors);
  const std::unique_ptr<Optimizer> optimizer = make_optimizer(trained_tensors, config.optimizer);
  data::BatchStream batches(stream_config(config), static_cast<std::uint32_t>(inputs.model.vocabulary_size), 0, static_cast<int>(num_ranks / context));
  const Sampler sampler(config, decoder);
  require_disk(config, *optimizer, inputs.model.num_parameters());

  const std::int64_t steps = total_steps(config, batches, inputs);
  const std::vector<data::Batch> first_step = batches.next_step();
  const auto step_tokens = static_cast<double>(batches.counts().tokens);
  Json warnings = inputs.warnings;
  if (!note.empty()) warnings.push_back(note);

  const auto parameters = static_cast<std::uint64_t>(inputs.model.num_parameters()), trained = static_cast<std::uint64_t>(optimizer->num_parameters() - parameters_beside(*optimizer));
  const MemoryEstimate memory = shared_by(estimate_memory(decoder, static_cast<std::uint64_t>(optimizer->state_bytes()), config.data.row_length * config.data.rows_per_batch / context), decoder, config, num_ranks);
  const std::uint64_t besides = recipe.memory ? recipe.memory() : 0, total = memory.total() + besides;
  if (available > 0 && total > available)
    warnings.push_back("memory: about " + std::to_string(total >> 20) + " MiB are needed, " + std::to_string(available >> 20) +
                       " MiB are available; lower data.row_length, data.rows_per_batch or lora.rank, or set memory: block");

  Json time = nullptr;
  if (probe) {
    // Each rank is thought to compute as this process does, one after the other of its micro-batches.
    const double seconds = probe_seconds(loss_sum, first_step.front(), *optimizer), rate = static_cast<double>(first_step.front().tokens_T.numel()) / seconds * num_ranks;
    time = {{"tokens_per_second", rate}, {"seconds", static_cast<double>(steps) * step_tokens / rate}, {"measured", true},
            {"note", num_ranks == 1 ? "steps only; evaluations, samples and checkpoints come on top" : "steps only, by ranks of which each computes as fast as this process; what they send, evaluations, samples and checkpoints come on top"}, {"probe_peak_memory", process_memory().peak}};
  }
  const std::uint64_t checkpoint = checkpoint_bytes(config, *optimizer, inputs.model.num_parameters());
  Json result = {{"steps", steps},
          {"tokens_per_step", step_tokens},
          {"tokens", step_tokens * static_cast<double>(steps)},
          {"model", {{"folder", config.model.string()}, {"family", inputs.model.family->model_type}, {"parameters", parameters}, {"trained_parameters", trained},
                     {"compute_type", toString(compute_type_of(config))}, {"device", config.device}, {"quantization", base_format(decoder)}, {"sha256", inputs.base_hash}, {"tokenizer_sha256", inputs.tokenizer_hash}}},
          {"data", describe_data(config, inputs)},
          {"memory", {{"weights", memory.weights}, {"trained", memory.trained}, {"optimizer", memory.optimizer}, {"activations", memory.activations}, {"head", memory.head},
                      {"library", memory.library}, {"total", total}, {"available", available}}},
          {"blocks", {{"path", decoder.fused ? "fused" : "ATen operators, as " + not_fused}, {"memory", !decoder.fused ? "store" : name_of(decoder.keep)}}},
          {"time", time},
          {"disk", {{"checkpoint", checkpoint}, {"total", checkpoint * static_cast<std::uint64_t>(config.checkpoint.keep + 2)}, {"free", free_bytes(config.output)}}},
          {"licence", licence_verdict(config, inputs)},
          {"warnings", warnings}};
  if (num_ranks > 1) {
    double gradients = 0;
    for (const Trained& one : optimizer->trained()) gradients += static_cast<double>(one.tensor.nbytes());
    // A sum is an all-to-all and a gather. Ranks that share moments gather weights in their group instead, and sums of their part from other groups; a
    // shared block is gathered for each pass.
    const double others = (num_ranks - 1.0) / num_ranks, group = static_cast<double>(config.ranks.shard_group > 0 ? config.ranks.shard_group : num_ranks), of_group = (group - 1) / group;
    const bool shares = config.ranks.shard;
    const double gathered_gradients = shares && config.method == "full" ? gradients * (of_group + (num_ranks / group - 1) / num_ranks) : gradients * others;
    const double gathered = shares && config.method == "lora" ? 2 * static_cast<double>(bytes_of_blocks(decoder)) * of_group * static_cast<double>(first_step.size()) : 0;
    result["ranks"] = {{"size", num_ranks}, {"micro_batches_each", first_step.size()}, {"gradient_bytes", static_cast<std::uint64_t>(gradients)}, {"bytes_received_a_step", static_cast<std::uint64_t>(gradients * others + gathered_gradients + gathered)}};
  }
  if (!inputs.contributors.empty()) result["memory"]["teachers"] = besides, result["teachers"] = describe_contributors(inputs);
  return result;
}

}  // namespace alambic::train
