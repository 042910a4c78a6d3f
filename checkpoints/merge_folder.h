// SPDX-License-Identifier: Apache-2.0
#pragma once
// Base + adapter (or the weights of a full fine-tune) -> a Hugging Face folder that is published only when it proves itself:
// every tensor of the adapter was used exactly once, the tie of head and embedding follows from the data, and the written
// folder, loaded again, gives the logits of base + adapter on a probe batch. The rename at the end publishes; before it,
// nothing is to be seen under the output's name.
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "core/json.h"

namespace alambic {
class FieldVisitor;
}

namespace alambic::checkpoints {

struct MergeConfig {
  std::filesystem::path base;     // model folder
  std::filesystem::path adapter;  // a PEFT folder, or a full fine-tune's folder with model.safetensors under the base's names
  std::filesystem::path output;
  std::string name;               // of the model in its card; "": the output folder's
  std::string base_name;          // of the base in the card ("org/model"); "": its card's title or its folder's name
  std::string weights = "auto";   // f32, bf16, f16; auto: as the base is stored (f32 where it mixes types)
  std::int64_t max_shard_megabytes = 5000;  // of 10^6 bytes
  std::string probe_text;         // a text of the probe batch besides the fixed ids; "": a sentence of our own
  double max_kl = -1;             // nats a token, of base + adapter against what was written; -1: by type, see default_limits
  double max_difference = -1;     // of a logit, as a share of the largest logit; -1: by type
  std::filesystem::path run;      // run folder whose report is cited; "": the adapter's parent, where that is a run
  void visit(FieldVisitor& fields);
};

/// What the written folder may differ from base + adapter. f32: only the order of additions differs. bf16 and f16 round each
/// weight once (2^-9, 2^-12 relative); beyond these limits rounding must also keep the tune: what was written must be nearer
/// to base + adapter than the base alone is.
struct MergeLimits {
  double max_kl, max_difference;
};
MergeLimits default_limits(at::ScalarType weights);

struct MergeReport {
  std::filesystem::path output;
  bool already_done = false;      // the same merge was there, whole; nothing was written
  std::string relation;           // merge or finetune
  std::string weights;            // f32, bf16, f16
  std::string base_format = "none";  // nf4, nf4-single, int8: the base was quantised so while it was trained on
  std::int64_t num_tensors = 0, num_changed = 0, num_adapter_tensors = 0;
  std::uint64_t num_bytes = 0;    // of the weights written
  double seconds = 0;             // reading, merging and writing them
  bool head_tied = false;
  std::int64_t probe_tokens = 0;
  double largest_difference = 0;  // of a logit, absolute
  double largest_logit = 0;
  double kl = 0;                  // mean over probe tokens, nats: base + adapter || written
  double kl_of_base = 0;          // base + adapter || base: how much the adapter changes
  std::vector<std::string> warnings;  // licences and else; also logged and in the card
  double megabytes_per_second() const { return seconds > 0 ? static_cast<double>(num_bytes) / 1e6 / seconds : 0; }
  Json json() const;
};

/// An adapter that was trained on a quantised base is merged, in f32, onto the de-quantised values it was trained on: those of
/// the folder where that is quantised, else the base is quantised in the same way again (adapter_quantization). All weights
/// written are dense.
/// Streams tensor by tensor: base and output are mapped files, of which the proof widens one layer, or a part of the head, at a time. What must be in
/// memory is the adapter (in f32 what it trains whole), logits of the probe, and at most two tensors (one being written, the next being made), where something is added to
/// them in f32 before and after it and in the type written; all weights in f32 too where the adapter needs them (linears_for). Error(kUsage): the output exists and is not this very merge; contradictory config. Error(kData): the
/// adapter does not fit the base, or an input is damaged. Error(kResource): not enough disk. Error(kNumerics): the proof
/// failed; then, as after every error, nothing is left behind.
MergeReport merge_folder(const MergeConfig& config);

}  // namespace alambic::checkpoints
