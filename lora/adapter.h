// SPDX-License-Identifier: Apache-2.0
#pragma once
// Which modules get an adapter or are trained whole; attaching them; the list of everything that trains.
//
// Every trained tensor is an f32 leaf (a master), also where the decoder computes in bf16: an update of 1e-6 of a weight
// would vanish in bf16's 8 bits. Products with a weight that is trained whole are f32 too (models::Linear computes in the
// weight's type), so a decoder after train_everything() computes in f32; one that computes in bf16 can have its embedding,
// head and norms trained whole, and no other Linear, as the types would mix inside a layer. Frozen tensors keep the type
// they were loaded in, and are never copied.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "models/decoder.h"

namespace alambic {
class FieldVisitor;
}

namespace alambic::lora {

struct LoraConfig {
  std::int64_t rank = 16;
  double alpha = 32;
  double dropout = 0;
  /// Module names or path suffixes ("q_proj", "mlp.down_proj"), or one regular expression over whole paths prefixed
  /// "regex:", or "all-linear" (all Linears but the head), as PEFT matches them.
  std::vector<std::string> targets = {"all-linear"};
  std::vector<std::string> exclude = {};                  // of the targets: names, suffixes, or one "regex:..."
  std::map<std::string, std::int64_t> rank_pattern = {};  // regex of a path's end -> rank; the first in sorted order wins
  std::map<std::string, double> alpha_pattern = {};
  bool rslora = false, dora = false;
  std::string init = "kaiming";  // kaiming, gaussian, false, pissa, pissa_niter_N, olora (lora/initialise.h)
  /// Merge-and-restart (arXiv:2307.05695): every so many steps the adapters are merged into the base in memory and begin anew, so
  /// that the sum of the updates may have any rank. 0: never. And the steps in which the learning rate then rises again from 0.
  std::int64_t restart_every = 0, restart_warmup_steps = 10;
  /// Trained and saved whole, without an adapter: "embed_tokens", "lm_head", or any module. With a tied head each of the
  /// two becomes its own copy, as PEFT does it, unless ensure_weight_tying.
  std::vector<std::string> modules_to_save = {};
  /// Where the head is tied and one of the two is in modules_to_save: train one tensor and keep the tie.
  bool ensure_weight_tying = false;
  /// Tokens whose rows of the embedding are trained while the rest of it is frozen (PEFT's trainable_token_indices): ids
  /// ("49152") and ranges of them ("49152..49200"). A run's config may also name tokens by their text, which
  /// train::with_token_ids turns into ids. A tied head follows the embedding.
  std::vector<std::string> trainable_tokens = {};
  /// Where the head is not tied: train these tokens' rows of the head too, apart.
  bool trainable_tokens_head = false;

  void visit(FieldVisitor& fields);
};

/// What to do with a target or a pattern that matches nothing: refuse it (a person's config), or say so and go on as PEFT
/// does (an adapter that was made elsewhere). When nothing at all matches it is always refused.
enum class Unmatched { kRefused, kWarned };

/// What a config makes of a decoder, before anything is allocated.
struct PlannedAdapter {
  std::string path;
  models::Linear* linear;
  std::int64_t rank;
  double alpha;
};
struct AdapterPlan {
  std::vector<PlannedAdapter> adapters;            // in the order of decoder.linears()
  std::vector<models::NamedTensor> trained_whole;  // by published name; the head too when it is trained apart from a tied embedding
  std::vector<std::int64_t> token_ids;             // rows of the embedding that train
  bool token_head = false;                         // and of the head, which is not tied
  bool keep_tie = false;                           // ensure_weight_tying does apply: the head is the trained embedding
};

/// The ids that trainable_tokens names, in its order. Error(kUsage): no id or range of ids, outside the vocabulary, twice.
std::vector<std::int64_t> token_ids_of(const std::vector<std::string>& entries, std::int64_t vocabulary_size);
/// Whether an entry of trainable_tokens is an id or a range of ids, and not a token's text.
bool names_ids(const std::string& entry);

/// Weights that the config trains whole and that are kept as stored (lora/stored_weight.h) become dense, for their trained copies to begin with.
void make_trained_dense(models::Decoder& decoder, const LoraConfig& config);

/// Error(kUsage) that lists all problems: targets that match nothing with the nearest module names, values out of range.
AdapterPlan plan_adapters(models::Decoder& decoder, const LoraConfig& config, Unmatched unmatched = Unmatched::kRefused);

/// Adds adapters of zeros, which wait for their first values (initialise() or those of a file). modules_to_save become trained
/// f32 copies. The rest is frozen.
void attach_empty(models::Decoder& decoder, const LoraConfig& config, Unmatched unmatched = Unmatched::kRefused);
/// The same, then initialise() (lora/initialise.h): every draw is a function of (seed, module path), so order does not matter.
void attach(models::Decoder& decoder, const LoraConfig& config, std::uint64_t seed, Unmatched unmatched = Unmatched::kRefused);

/// PiSSA and OLoRA adapters as ordinary ones of twice the rank, relative to the base as it was before they took a part of it:
///   W_residual + scale B A = W + scale (B A - B0 A0) = W + scale [B | -B0] [A ; A0]
/// as PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) makes them. Another config comes back as it is.
LoraConfig relative_to_base(const LoraConfig& config);
struct Factors;
Factors relative_to_base(const at::Tensor& a_RI, const at::Tensor& b_OR, const Factors& initial);

/// Makes all base tensors train (full fine-tune): f32 copies; a tied head stays tied.
void train_everything(models::Decoder& decoder);

/// Everything that trains, with the name it is saved under: PEFT's keys for adapters and modules_to_save
/// ("base_model.model.<path>.lora_A.weight", "...embed_tokens.token_adapter.trainable_tokens_delta"), the published name for base tensors of a full fine-tune.
/// Each tensor once. Write into a tensor in place (copy_): others may hold the same tensor (a tied head).
std::vector<models::NamedTensor> trainable(models::Decoder& decoder);

/// The same as (key, shape) for a plan that is not attached yet, sorted by key; a head tied to a trained embedding is
/// listed under its own key too, as PEFT saves it.
std::vector<std::pair<std::string, std::vector<std::int64_t>>> expected_keys(models::Decoder& decoder, const AdapterPlan& plan, bool dora);

/// PEFT's prefix of every key in an adapter file.
inline constexpr std::string_view kPeftPrefix = "base_model.model.";

}  // namespace alambic::lora
