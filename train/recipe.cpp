// SPDX-License-Identifier: Apache-2.0
#include "train/recipe.h"

#include "checkpoints/hf_folder.h"
#include "core/error.h"
#include "core/log.h"
#include "lora/initialise.h"
#include "models/decoder.h"
#include "train/cross_entropy.h"
#include "train/inputs.h"
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

Recipe text_recipe(const TrainConfig& config) {
  return {.loss = [config](models::Decoder& decoder, const Inputs&, std::vector<models::NamedTensor>&) -> LossSum {
    return [config, &decoder](const data::Batch& batch, std::uint64_t dropout_seed) {
      const at::Tensor hidden_TD = decoder.hidden_TD(input_of(batch, dropout_seed, config.neftune_alpha));
      return cross_entropy_sum(hidden_TD, decoder.head, batch.targets_T, batch.keep_T, dropout_seed, config.loss);
    };
  }};
}

TrainReport run_recipe(const TrainConfig& given, bool resume, const std::function<bool()>& stop_requested, const Recipe& recipe) {
  check(given);
  const TrainConfig config = with_token_ids(given);
  use_threads(config);
  const RunFolder held(config.output);
  require_new_or_resumed(config, resume);
  const Inputs inputs = open_inputs(config, recipe);
  if (std::optional<TrainReport> finished = finished_run(config, inputs)) return *finished;
  for (const std::string& warning : inputs.warnings) log_warning(warning);
  models::Decoder decoder = checkpoints::load_decoder(config.model, compute_type_of(config), quantization_of(config));
  if (recipe.see_base) recipe.see_base(decoder);
  make_trainable(decoder, config);
  prepare_blocks(decoder, config, recipe.not_fused);
  std::vector<models::NamedTensor> trained = lora::trainable(decoder);
  const LossSum loss_sum = recipe.loss(decoder, inputs, trained);
  const std::unique_ptr<Optimizer> optimizer = make_optimizer(trained, config.optimizer);
  require_disk(config, *optimizer, inputs.model.num_parameters());
  data::BatchStream batches(stream_config(config), static_cast<std::uint32_t>(inputs.model.vocabulary_size));
  const auto ranks = parallel::single();
  const Sampler sampler(config, decoder);

  const LoopParts parts{
      .batches = batches,
      .optimizer = *optimizer,
      .ranks = *ranks,
      .loss_sum = loss_sum,
      .evaluate = [&] { return evaluate_all(config, decoder, inputs); },
      .sample = [&](std::int64_t) { return sampler.samples(); },
      .base_state = [&] { return base_state(decoder, config.lora); },
      .restore_base = [&](const NamedTensors& state) { restore_base(decoder, config.lora, state); },
      .restart = [&](std::int64_t number) { lora::merge_and_restart(decoder, config.lora, config.seed, number); },
      .write_result = [&](const std::filesystem::path& folder) { write_result(config, decoder, inputs, folder); },
      .stop_requested = stop_requested,
      .run = config.output,
      .identity = identity_of(config, inputs),
      .total_steps = total_steps(config, batches, inputs),
      .chosen_by = chosen_by(config),
      .figures = recipe.figures,
      .verb = recipe.verb,
  };
  const std::optional<Progress> resumed = restore(config, inputs, parts);
  if (!resumed && config.method == "lora") lora::initialise(decoder, config.lora, config.seed);
  const std::int64_t beside = parameters_beside(*optimizer);
  log_info("training ", optimizer->num_parameters() - beside, " of ", inputs.model.num_parameters(), " parameters", beside > 0 ? " and " + std::to_string(beside) + " beside them" : "", " for ", parts.total_steps, " steps, ",
           toString(compute_type_of(config)), config.quantize_base == "none" ? "" : " on a base in " + lora::name_of(quantization_of(config)), ", into ", config.output.string());
  const Progress progress = run(config, parts, resumed);
  return finish(config, inputs, progress);
}

}  // namespace alambic::train
