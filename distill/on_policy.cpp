// SPDX-License-Identifier: Apache-2.0
#include "distill/on_policy.h"

#include <ATen/ops/tensor.h>

#include <algorithm>
#include <vector>

#include "core/config.h"
#include "core/random.h"
#include "models/generate.h"

namespace alambic::distill {
namespace {

std::vector<std::int64_t> ids_of(const at::Tensor& tokens, std::int64_t count) {
  const std::int64_t* const ids = tokens.const_data_ptr<std::int64_t>();
  return {ids, ids + count};
}

// Tokens of the document that the student goes on from; 0 where nothing of it is learnt.
std::int64_t prompt_length(const at::Tensor& keep, std::int64_t prompt_tokens) {
  const bool* const kept = keep.const_data_ptr<bool>();
  const std::int64_t length = keep.numel(), first = std::find(kept, kept + length, true) - kept;
  if (first == length) return 0;
  return first == 0 ? std::min(prompt_tokens, length - 1) : first + 1;
}

}  // namespace

void OnPolicyConfig::visit(FieldVisitor& fields) {
  fields.field("lambda", lambda, {.help = "share of micro-batches in which the student itself writes on from the prompts; 0: none. The teachers judge each token; cross-entropy has no part in them", .low = 0, .high = 1});
  fields.field("max_new_tokens", max_new_tokens, {.help = "most that the student writes in a document, within data.row_length", .unit = "tokens", .low = 1, .high = 1 << 20});
  fields.field("temperature", temperature, {.help = "of the student's draws; 0: the likeliest tokens", .low = 0, .high = 100});
  fields.field("top_p", top_p, {.help = "draw among the likeliest tokens that together reach this probability; 1: among all", .low = 0, .high = 1});
  fields.field("prompt_tokens", prompt_tokens, {.help = "first tokens of a document without a prompt that the student goes on from", .unit = "tokens", .low = 1, .high = 1 << 20});
}

bool is_on_policy(const OnPolicyConfig& config, std::uint64_t dropout_seed) {
  return static_cast<double>(derive_seed(dropout_seed, "on-policy") >> 11) * 0x1p-53 < config.lambda;
}

std::optional<data::Batch> on_policy_batch(const OnPolicyConfig& config, const models::Decoder& student, const data::Batch& corpus, std::uint64_t dropout_seed, std::int64_t row_length,
                                           std::int64_t max_tokens, const std::function<bool(const data::Origin&)>& is_taught) {
  std::vector<models::Prompt> prompts;
  std::vector<data::Origin> origins;
  std::int64_t first = 0, room = max_tokens;
  for (std::size_t document = 0; document < corpus.document_lengths.size(); ++document) {
    const std::int64_t length = corpus.document_lengths[document];
    const at::Tensor tokens = corpus.tokens_T.narrow(0, first, length), keep = corpus.keep_T.narrow(0, first, length);
    first += length;
    const std::int64_t prompt = prompt_length(keep, config.prompt_tokens), new_tokens = std::min(config.max_new_tokens, row_length - prompt);
    if (prompt == 0 || new_tokens < 1 || prompt + new_tokens > room || !is_taught(corpus.origins[document])) continue;
    room -= prompt + new_tokens;
    prompts.push_back({.ids = ids_of(tokens, prompt), .seed = derive_seed(dropout_seed, "on-policy document", {document}), .max_new_tokens = new_tokens});
    origins.push_back(corpus.origins[document]);
  }
  if (prompts.empty()) return std::nullopt;
  const models::Sampling sampling{.temperature = config.temperature, .top_p = config.top_p};
  const std::vector<models::Continuation> drawn = models::generate_many(student, prompts, sampling, student.config.eos_ids);

  data::Batch batch{.tokens_T = {}, .positions_T = {}, .targets_T = {}, .keep_T = {}, .document_lengths = {}, .origins = origins, .num_kept = 0, .first_sample = corpus.first_sample};
  std::vector<std::int64_t> tokens, positions, targets, kept;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    std::vector<std::int64_t> ids = prompts[i].ids;
    ids.insert(ids.end(), drawn[i].ids.begin(), drawn[i].ids.end());
    const auto length = static_cast<std::int64_t>(ids.size()), first_drawn = static_cast<std::int64_t>(prompts[i].ids.size());
    for (std::int64_t t = 0; t < length; ++t) {
      const bool has_next = t + 1 < length;
      tokens.push_back(ids[static_cast<std::size_t>(t)]), positions.push_back(t);
      targets.push_back(has_next ? ids[static_cast<std::size_t>(t + 1)] : 0), kept.push_back(has_next && t + 1 >= first_drawn);
    }
    batch.document_lengths.push_back(length);
    batch.num_kept += length - first_drawn;
  }
  const auto tensor = [](const std::vector<std::int64_t>& values) { return at::tensor(values, at::kLong); };
  batch.tokens_T = tensor(tokens), batch.positions_T = tensor(positions), batch.targets_T = tensor(targets), batch.keep_T = tensor(kept).to(at::kBool);
  return batch;
}

}  // namespace alambic::distill
