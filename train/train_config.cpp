// SPDX-License-Identifier: Apache-2.0
#include "train/train_config.h"

#include <optional>
#include <set>

#include "core/error.h"
#include "data/tokenizer.h"
#include "lora/initialise.h"
#include "models/decoder.h"
#include "train/device.h"

namespace alambic::train {

void MixtureItem::visit(FieldVisitor& fields) {
  fields.field("store", store, {.help = "token store made by prepare", .required = true});
  fields.field("weight", weight, {.help = "share of rows drawn from this store, relative to the others", .low = 1e-9, .high = 1e9});
}

void DataConfig::visit(FieldVisitor& fields) {
  fields.list("mixture", mixture, {.help = "the token stores to learn from", .required = true});
  fields.field("row_length", row_length, {.help = "most tokens in a row", .unit = "tokens", .low = 2, .high = 1 << 20});
  fields.field("rows_per_batch", rows_per_batch, {.help = "rows of a micro-batch: what is in memory at once", .low = 1, .high = 4096});
  fields.field("batches_per_step", batches_per_step, {.help = "micro-batches of one optimiser step, over all ranks", .low = 1, .high = 65536});
  fields.field("pack", pack, {.help = "several documents a row, without attention across them; false: one document a row"});
  fields.field("split_long", split_long, {.help = "documents longer than a row: true splits them into rows (plain text); false cuts, counts and reports them (chats)"});
}

void EvaluationItem::visit(FieldVisitor& fields) {
  fields.field("name", name, {.help = "how figures of this store are called", .required = true});
  fields.field("store", store, {.help = "token store with held-out text", .required = true});
}

void EvaluationConfig::visit(FieldVisitor& fields) {
  fields.list("stores", stores, {.help = "held-out token stores; evaluated before the first step, every n steps and at the end"});
  fields.field("every", every, {.help = "steps between evaluations; 0: at the start and at the end only", .unit = "steps", .low = 0, .high = 1e12});
  fields.field("max_tokens", max_tokens, {.help = "tokens read of each store, rounded up to whole documents; 0: all", .unit = "tokens", .low = 0, .high = 1e15});
  fields.field("choose_best_by", choose_best_by, {.help = "name of the store whose loss decides which checkpoint is best; empty: the first"});
}

void OptimizerConfig::visit(FieldVisitor& fields) {
  fields.field("kind", kind, {.help = "adamw; adamw8bit: block-wise 8-bit moments, 2 bytes a trained parameter instead of 8; adafactor: a matrix remembers row and column means only; "
                                      "muon: orthogonal updates for the matrices of a full fine-tune, AdamW for the rest",
                              .choices = {"adamw", "adamw8bit", "adafactor", "muon"}});
  fields.field("beta1", beta1, {.help = "AdamW: decay of the mean of gradients", .low = 0, .high = 0.999999});
  fields.field("beta2", beta2, {.help = "AdamW: decay of the mean of squared gradients", .low = 0, .high = 0.9999999});
  fields.field("epsilon", epsilon, {.help = "AdamW: added to the denominator", .low = 1e-16, .high = 1});
  fields.field("weight_decay", weight_decay, {.help = "decoupled decay of all trained tensors but biases and norms", .low = 0, .high = 1});
  fields.field("max_grad_norm", max_grad_norm, {.help = "gradients are scaled down to this norm; 0: never", .low = 0, .high = 1e6});
  fields.field("lora_plus_ratio", lora_plus_ratio, {.help = "LoRA+: learning rate of B (and of one-dimensional tensors) over that of A; 4 to 16 is usual", .low = 1e-3, .high = 1e3});
  fields.field("embedding_lr_ratio", embedding_lr_ratio, {.help = "learning rate of a trained embedding and head, or of their lora.trainable_tokens, over that of the rest", .low = 0, .high = 1e3});
  fields.field("adafactor_scale_parameter", adafactor_scale_parameter, {.help = "Adafactor: learning rates are relative to each tensor's root mean square"});
  fields.field("muon_momentum", muon_momentum, {.help = "Muon: decay of the mean of gradients", .low = 0, .high = 0.999999});
  fields.field("muon_rate", muon_rate, {.help = "Muon: how a matrix's shape scales the learning rate; match_rms_adamw takes the rates that AdamW takes",
                                        .choices = {"match_rms_adamw", "original", "spectral_unclamped"}});
}

void ScheduleConfig::visit(FieldVisitor& fields) {
  fields.field("shape", shape, {.help = "learning rate after the warm-up", .choices = {"cosine", "linear", "constant", "wsd"}});
  fields.field("learning_rate", learning_rate, {.help = "highest learning rate", .low = 0, .high = 1});
  fields.field("warmup_steps", warmup_steps, {.help = "steps of linear warm-up from 0; -1: from warmup_share", .unit = "steps", .low = -1, .high = 1e12});
  fields.field("warmup_share", warmup_share, {.help = "share of all steps spent warming up, where warmup_steps is -1", .low = 0, .high = 1});
  fields.field("final_share", final_share, {.help = "last learning rate over the highest (cosine, linear, wsd)", .low = 0, .high = 1});
  fields.field("decay_share", decay_share, {.help = "wsd: share of all steps spent falling at the end", .low = 0, .high = 1});
}

void LimitsConfig::visit(FieldVisitor& fields) {
  fields.field("max_steps", max_steps, {.help = "optimiser steps; 0: no limit", .unit = "steps", .low = 0, .high = 1e12});
  fields.field("max_epochs", max_epochs, {.help = "passes over the store of the largest weight, the first of equals; 0: no limit", .low = 0, .high = 1e6});
  fields.field("max_tokens", max_tokens, {.help = "tokens read, rounded up to a whole step; 0: no limit", .unit = "tokens", .low = 0, .high = 1e16});
  fields.field("patience", patience, {.help = "evaluations without improvement before the run stops early; 0: never", .low = 0, .high = 1e6});
  fields.field("min_delta", min_delta, {.help = "smallest fall of the best loss that patience takes for improvement", .unit = "nats a token", .low = 0, .high = 100});
}

void SamplesConfig::visit(FieldVisitor& fields) {
  fields.field("prompts", prompts, {.help = "fixed prompts whose continuations are logged from step 0 on"});
  fields.field("every", every, {.help = "steps between samples; 0: at the start and at the end only", .unit = "steps", .low = 0, .high = 1e12});
  fields.field("max_new_tokens", max_new_tokens, {.help = "length of a sample", .unit = "tokens", .low = 1, .high = 65536});
  fields.field("chat", chat, {.help = "send prompts through the chat template as a user's message"});
}

void CheckpointConfig::visit(FieldVisitor& fields) {
  fields.field("every", every, {.help = "steps between checkpoints", .unit = "steps", .low = 1, .high = 1e12});
  fields.field("keep", keep, {.help = "newest checkpoints kept; the best one is kept besides", .low = 1, .high = 1e6});
}

void RanksConfig::visit(FieldVisitor& fields) {
  fields.field("timeout", timeout, {.help = "a rank that keeps the others waiting for longer is lost, and all end with exit code 7; longer than the longest save and sample take", .unit = "seconds", .low = 1, .high = 1e6});
  fields.field("shard", shard, {.help = "each rank keeps its part: of the blocks' frozen weights, gathered just before use (method: lora), or of gradients and moments (method: full); less memory, the same bits"});
  fields.field("shard_group", shard_group, {.help = "with shard, each group of so many ranks that follow each other shares for itself: those of one machine; 0: all ranks are one group", .unit = "ranks", .low = 0, .high = 1e6});
  fields.field("connect_timeout", connect_timeout, {.help = "for all ranks to come together at the start", .unit = "seconds", .low = 1, .high = 1e6});
  fields.field("context", context, {.help = "consecutive ranks that share each row, for rows that are too long for one: each has its part of the tokens, and keys and values go round", .low = 1, .high = 1024});
}

void TrainConfig::visit(FieldVisitor& fields) {
  fields.field("model", model, {.help = "Hugging Face folder of the base model", .required = true});
  fields.field("output", output, {.help = "run folder: checkpoints, metrics, the finished adapter", .required = true});
  fields.field("method", method, {.help = "train low-rank adapters or all weights", .choices = {"lora", "full"}});
  fields.group("lora", "low-rank adapters (method: lora)", lora);
  fields.field("quantize_base", quantize_base,
               {.help = "keep the blocks' frozen linear layers narrow (method: lora): NF4 (4.13 bits a weight, bitsandbytes' bits) or 8 bits; merging is onto the values trained on",
                .choices = {"none", "nf4", "int8"}});
  fields.field("nf4_double_quant", nf4_double_quant, {.help = "quantize_base: nf4: keep its scales in 8 bits; false: in f32, 4.5 bits a weight"});
  fields.group("data", "what is learnt from", data);
  fields.group("evaluation", "held-out text", evaluation);
  fields.group("loss", "cross-entropy", loss);
  fields.group("optimizer", "how gradients change what trains", optimizer);
  fields.group("schedule", "learning rate over time", schedule);
  fields.group("limits", "when the run ends", limits);
  fields.group("samples", "fixed prompts", samples);
  fields.group("checkpoint", "what is kept on disk", checkpoint);
  fields.group("ranks", "several processes on one run (docs/ranks.md)", ranks);
  fields.field("deterministic", deterministic, {.help = "add the gradients of a step's micro-batches in a fixed binary tree, so that 1, 2, 4, ... ranks of equal threads give the same bits; needs memory for some more gradients"});
  fields.field("neftune_alpha", neftune_alpha, {.help = "NEFTune: uniform noise of alpha / sqrt(document tokens x hidden size) on embeddings while training; 5 to 15 is usual, 0: none", .low = 0, .high = 1e3});
  fields.field("device", device, {.help = "where the run computes. auto: cuda where this build has CUDA and the machine a GPU, else cpu; several ranks use a GPU each. distill computes on cpu", .choices = {"auto", "cpu", "cuda"}});
  fields.field("compute_type", compute_type, {.help = "auto: bf16 on a GPU and where the processor multiplies it natively, else f32", .choices = {"auto", "f32", "bf16"}});
  fields.field("memory", memory, {.help = "kept of the forward pass: store all, all but the mlp's, each block's input alone; the rest is computed again with the same bits. auto: the most that fits", .choices = {"auto", "store", "mlp", "block"}});
  fields.field("threads", threads, {.help = "processor threads; 0: all. The same number gives the same bits", .low = 0, .high = 4096});
  fields.field("seed", seed, {.help = "of the adapter's start, the data order and dropout"});
  fields.field("log_every", log_every, {.help = "steps between progress lines", .unit = "steps", .low = 1, .high = 1e9});
}

void check(const TrainConfig& config) {
  std::string problems;
  const auto problem = [&](const std::string& line) { problems += (problems.empty() ? "" : "\n") + line; };
  const LimitsConfig& limits = config.limits;
  if (limits.max_steps == 0 && limits.max_epochs == 0 && limits.max_tokens == 0)
    problem("limits: none of max_steps, max_epochs, max_tokens is set, so the run would never end");
  if (config.data.mixture.empty()) problem("data.mixture: no token store to learn from");
  if (const std::int64_t context = config.ranks.context, least = 2 * models::kChunkRound * context; context > 1) {
    if (config.data.row_length * config.data.rows_per_batch < least)
      problem("ranks.context: " + std::to_string(context) + " ranks cannot share the " + std::to_string(config.data.row_length * config.data.rows_per_batch) + " tokens of a micro-batch; data.row_length x data.rows_per_batch must be at least " +
              std::to_string(least) + ", or ranks.context smaller");
    if (config.lora.dora && config.method == "lora") problem("ranks.context: rows are shared by the fused blocks alone, which do not compute DoRA; use lora.dora: false or ranks.context: 1");
  }
  std::set<std::string> names;
  for (const EvaluationItem& item : config.evaluation.stores)
    if (!names.insert(item.name).second) problem("evaluation.stores: two are called \"" + item.name + "\"");
  const std::string& best = config.evaluation.choose_best_by;
  if (!best.empty() && !names.contains(best)) {
    const std::string nearest = nearest_name(best, {names.begin(), names.end()});
    problem("evaluation.choose_best_by: no evaluation store is called \"" + best + "\"" + (nearest.empty() ? "" : "; did you mean \"" + nearest + "\"?"));
  }
  if (limits.patience > 0 && (names.empty() || config.evaluation.every == 0))
    problem("limits.patience: an early stop needs evaluation.stores and evaluation.every");
  if (config.schedule.shape == "wsd" && config.schedule.warmup_steps < 0 && config.schedule.warmup_share + config.schedule.decay_share > 1)
    problem("schedule: warmup_share + decay_share is more than 1");
  if (config.method == "full" && config.compute_type == "bf16")
    problem("compute_type: a full fine-tune trains the weights themselves, which are kept in f32; use auto or f32");
  const OptimizerConfig& optimizer = config.optimizer;
  const OptimizerConfig defaults;
  if (optimizer.kind == "muon" && config.method == "lora")
    problem("optimizer.kind: muon needs method: full; orthogonal updates of an adapter's A and B do not make an orthogonal update of the weight");
  if (optimizer.lora_plus_ratio != 1 && config.method != "lora") problem("optimizer.lora_plus_ratio: is about adapters; method is " + config.method);
  if (optimizer.kind == "adafactor" && (optimizer.beta1 != defaults.beta1 || optimizer.beta2 != defaults.beta2 || optimizer.epsilon != defaults.epsilon))
    problem("optimizer: adafactor does not read beta1, beta2 and epsilon");
  if (optimizer.kind != "adafactor" && optimizer.adafactor_scale_parameter) problem("optimizer.adafactor_scale_parameter: only kind: adafactor reads it");
  if (optimizer.kind != "muon" && (optimizer.muon_momentum != defaults.muon_momentum || optimizer.muon_rate != defaults.muon_rate))
    problem("optimizer: only kind: muon reads muon_momentum and muon_rate");
  if (config.method == "full" && config.quantize_base != "none")
    problem("quantize_base: a full fine-tune trains the weights themselves, which then cannot be quantised; use method: lora, or none");
  if (restarts(config)) {
    const lora::LoraConfig& adapter = config.lora;
    if (config.compute_type == "bf16") problem("lora.restart_every: merging into a bf16 base would round what was learnt away; use compute_type f32 or auto");
    if (config.quantize_base != "none") problem("lora.restart_every: adapters are merged into the base, which cannot be done to a quantised one; use quantize_base: none");
    if (adapter.dora) problem("lora.restart_every: DoRA's magnitudes are not begun anew; use plain LoRA");
    if (adapter.init != "kaiming" && adapter.init != "gaussian") problem("lora.restart_every: an adapter begun anew must change nothing at first; lora.init must be kaiming or gaussian");
    if (adapter.restart_warmup_steps >= adapter.restart_every) problem("lora.restart_warmup_steps: must be less than lora.restart_every");
  }
  if (config.ranks.shard_group > 0 && !config.ranks.shard) problem("ranks.shard_group: is read only with ranks.shard: true");
  if (config.ranks.shard) {
    if (config.method == "full" && (config.optimizer.kind == "adafactor" || config.optimizer.kind == "muon"))
      problem("optimizer.kind: " + config.optimizer.kind + " looks at whole matrices, of which ranks that share moments have parts; use adamw or adamw8bit, or ranks.shard: false");
    if (restarts(config)) problem("lora.restart_every: adapters are merged into the base, which cannot be done to one that ranks share; use ranks.shard: false");
    if (config.method == "lora" && lora::parse_init(config.lora.init).changes_base()) problem("lora.init: " + config.lora.init + " changes the base, which cannot be done to one that ranks share; use kaiming, or ranks.shard: false");
  }
  if (!problems.empty()) fail(ErrorKind::kUsage, problems);
}

bool restarts(const TrainConfig& config) { return config.method == "lora" && config.lora.restart_every > 0; }

std::string result_name(const TrainConfig& config) { return config.method == "lora" && !restarts(config) ? "adapter" : "weights"; }

TrainConfig with_token_ids(const TrainConfig& config) {
  TrainConfig resolved = config;
  std::optional<data::Tokenizer> tokenizer;
  std::string problems;
  for (std::string& entry : resolved.lora.trainable_tokens) {
    if (lora::names_ids(entry)) continue;
    if (!tokenizer) tokenizer = data::Tokenizer::from_file(config.model);
    const std::optional<std::uint32_t> id = tokenizer->id_of(entry);
    if (id) entry = std::to_string(*id);
    else problems += (problems.empty() ? "" : "\n") + ("lora.trainable_tokens: the tokenizer of " + config.model.string() + " has no token " + to_line(Json(entry)));
  }
  if (!problems.empty()) fail(ErrorKind::kUsage, problems, Remedy{"alambic extend adds tokens to a model"});
  return resolved;
}

data::StreamConfig stream_config(const TrainConfig& config) {
  data::StreamConfig stream{.mixture = {}, .row_length = config.data.row_length, .rows_per_batch = config.data.rows_per_batch,
                            .batches_per_step = config.data.batches_per_step, .pack = config.data.pack,
                            .split_long = config.data.split_long, .seed = config.seed};
  for (const MixtureItem& item : config.data.mixture) stream.mixture.push_back({item.store, item.weight});
  return stream;
}

lora::BaseQuantization quantization_of(const TrainConfig& config) { return {.format = config.quantize_base, .double_quant = config.nf4_double_quant}; }

at::ScalarType compute_type_of(const TrainConfig& config) {
  if (config.compute_type == "bf16") return at::kBFloat16;
  // Trained base weights are their own f32 masters; so is a base that adapters are merged into.
  if (config.compute_type == "f32" || config.method == "full" || restarts(config)) return at::kFloat;
  return is_on_gpu(config) ? at::kBFloat16 : models::fastest_compute_type();
}

}  // namespace alambic::train
