// SPDX-License-Identifier: Apache-2.0
#pragma once
// Everything a training run is told: one YAML, read strictly by core/config.h. Each struct names its fields once, in
// visit() (train_config.cpp); the help text there is the reference.
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "core/config.h"
#include "data/batch_stream.h"
#include "lora/adapter.h"
#include "lora/quantize.h"
#include "train/cross_entropy.h"

namespace alambic::train {

struct MixtureItem {
  std::filesystem::path store;
  double weight = 1;
  void visit(FieldVisitor& fields);
};

struct DataConfig {
  std::vector<MixtureItem> mixture;
  std::int64_t row_length = 512, rows_per_batch = 1, batches_per_step = 8;
  bool pack = true, split_long = false;
  void visit(FieldVisitor& fields);
};

struct EvaluationItem {
  std::string name;
  std::filesystem::path store;
  void visit(FieldVisitor& fields);
};

struct EvaluationConfig {
  std::vector<EvaluationItem> stores;
  std::int64_t every = 0;          // steps; 0: at the start and at the end only
  std::int64_t max_tokens = 50'000;  // of each store; 0: all of it
  std::string choose_best_by;      // name of a store; "": the first one
  void visit(FieldVisitor& fields);
};

struct OptimizerConfig {
  std::string kind = "adamw";      // adamw, adamw8bit, adafactor, muon
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8, weight_decay = 0.0;
  double max_grad_norm = 1.0;      // 0: no clipping
  double lora_plus_ratio = 1, embedding_lr_ratio = 1;  // of the schedule's learning rate
  bool adafactor_scale_parameter = false;
  double muon_momentum = 0.95;
  std::string muon_rate = "match_rms_adamw";  // match_rms_adamw, original, spectral_unclamped
  void visit(FieldVisitor& fields);
};

struct ScheduleConfig {
  std::string shape = "cosine";    // cosine, linear, constant, wsd
  double learning_rate = 2e-4;     // the peak
  std::int64_t warmup_steps = -1;  // -1: from warmup_share
  double warmup_share = 0.03;      // of all steps
  double final_share = 0.0;        // the last learning rate over the peak (cosine, linear, wsd)
  double decay_share = 0.2;        // wsd: share of all steps spent falling
  void visit(FieldVisitor& fields);
};

struct LimitsConfig {              // the first limit that is reached ends the run; 0: not a limit
  std::int64_t max_steps = 0, max_tokens = 0;
  double max_epochs = 0;
  std::int64_t patience = 0;       // evaluations without improvement before an early stop
  double min_delta = 0;            // what patience takes for improvement, in nats a token
  void visit(FieldVisitor& fields);
};

struct SamplesConfig {
  std::vector<std::string> prompts;
  std::int64_t every = 0;          // steps; 0: at the start and at the end only
  std::int64_t max_new_tokens = 48;
  bool chat = false;               // prompts go through the chat template as a user's message
  void visit(FieldVisitor& fields);
};

struct RanksConfig {
  double timeout = 600, connect_timeout = 300;  // seconds
  bool shard = false;
  std::int64_t shard_group = 0;  // ranks; 0: all
  std::int64_t context = 1;                     // ranks that share each row
  void visit(FieldVisitor& fields);
};

struct CheckpointConfig {
  std::int64_t every = 100;        // steps
  std::int64_t keep = 2;           // newest ones; the best one is kept besides
  void visit(FieldVisitor& fields);
};

struct TrainConfig {
  std::filesystem::path model, output;
  std::string method = "lora";     // lora, full
  lora::LoraConfig lora;
  std::string quantize_base = "none";  // none, nf4, int8
  bool nf4_double_quant = true;
  DataConfig data;
  EvaluationConfig evaluation;
  LossConfig loss;
  OptimizerConfig optimizer;
  ScheduleConfig schedule;
  LimitsConfig limits;
  SamplesConfig samples;
  CheckpointConfig checkpoint;
  RanksConfig ranks;
  bool deterministic = false;         // gradients of micro-batches are added in a fixed tree
  double neftune_alpha = 0;           // 0: no noise on embeddings
  std::string device = "auto";        // auto, cpu, cuda: train/device.h
  std::string compute_type = "auto";  // auto, f32, bf16
  std::string memory = "auto";        // auto, store, mlp, block: models::Keep
  std::int64_t threads = 0;           // 0: all processors
  std::uint64_t seed = 0;
  std::int64_t log_every = 10;        // steps between progress lines
  void visit(FieldVisitor& fields);
};

/// What field ranges cannot say: contradictions between fields. Error(kUsage) listing all of them at once.
void check(const TrainConfig& config);

/// The config with the texts of lora.trainable_tokens as ids, by the model's tokenizer. Error(kUsage): a text that is no token.
TrainConfig with_token_ids(const TrainConfig& config);

/// Whether adapters are merged and begun anew on the way (lora.restart_every): the result then is a folder of weights.
bool restarts(const TrainConfig& config);
/// Name of the result in the run folder: "adapter" (a PEFT folder) or "weights" (a model folder).
std::string result_name(const TrainConfig& config);

data::StreamConfig stream_config(const TrainConfig& config);
at::ScalarType compute_type_of(const TrainConfig& config);  // of device: auto as this build and machine decide it
lora::BaseQuantization quantization_of(const TrainConfig& config);

}  // namespace alambic::train
