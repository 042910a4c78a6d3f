// SPDX-License-Identifier: Apache-2.0
#include "train/memory.h"

#include <algorithm>
#include <fstream>

#include "core/error.h"
#include "core/log.h"
#include "models/fused_blocks.h"
#include "models/sharded_blocks.h"
#include "parallel/nccl.h"
#include "train/gradient_sums.h"

namespace alambic::train {
namespace {

constexpr std::pair<const char*, models::Keep> kPolicies[] = {{"store", models::Keep::kAll}, {"mlp", models::Keep::kNoMlp}, {"block", models::Keep::kInputs}};
constexpr double kShareOfAvailable = 0.85;  // the estimate may be some percent low, and the machine does other things

// Bytes a token that a forward and backward pass takes besides what is kept, while the widest block is at work.
double work_per_token(const models::Decoder& decoder) {
  const models::ModelConfig& config = decoder.config;
  const auto element = static_cast<double>(c10::elementSize(decoder.compute_type()));
  const auto D = static_cast<double>(config.hidden_size), F = static_cast<double>(config.intermediate_size);
  const double queries = static_cast<double>(config.num_heads * config.head_size), keys = static_cast<double>(config.num_kv_heads * config.head_size);
  const double residual = 4 * D * 2 + element * D;  // the gradient of the residual, and what a norm makes
  const double mlp = element * (2 * D + F + (decoder.keep == models::Keep::kAll ? 0 : 2 * F));
  const double again = decoder.keep == models::Keep::kInputs ? 4 * D + element * (2 * queries + 2 * keys) : 0;
  const double attention = 4 * (3 * queries + 5 * keys) + element * (2 * queries + 2 * keys + D);
  return residual + again + std::max(mlp, attention);
}

// As the ATen path keeps them: inputs and outputs of every product, of norms, of attention and of the gate.
double aten_bytes_per_token(const models::Decoder& decoder) {
  const models::ModelConfig& config = decoder.config;
  const std::int64_t query = config.num_heads * config.head_size, key = config.num_kv_heads * config.head_size;
  return static_cast<double>(config.num_layers * (6 * config.hidden_size + 4 * query + 4 * key + 4 * config.intermediate_size)) * static_cast<double>(c10::elementSize(decoder.compute_type()));
}

}  // namespace

const char* name_of(models::Keep keep) {
  for (const auto& [name, each] : kPolicies)
    if (each == keep) return name;
  fail(ErrorKind::kBug, "a memory policy without a name");
}

std::uint64_t available_memory() {
  std::ifstream lines("/proc/meminfo");
  std::string key, unit;
  for (std::uint64_t kibibytes = 0; lines >> key >> kibibytes >> unit;)
    if (key == "MemAvailable:") return kibibytes * 1024;
  return 0;
}

std::uint64_t available_to_rank(at::Device device, int local_ranks) {
  return device.is_cuda() ? parallel::gpus().memory.at(static_cast<std::size_t>(device.index())) : available_memory() / static_cast<std::uint64_t>(local_ranks);
}

MemoryEstimate estimate_memory(models::Decoder& decoder, std::uint64_t optimizer_bytes, std::int64_t batch_tokens) {
  const models::ModelConfig& model = decoder.config;
  MemoryEstimate estimate{.optimizer = optimizer_bytes, .library = 200 << 20};
  for (const models::NamedTensor& tensor : decoder.tensors()) {
    estimate.weights += tensor.tensor->nbytes();
    if (tensor.tensor->requires_grad()) estimate.trained += tensor.tensor->nbytes();
  }
  std::uint64_t dense = 0;
  for (const models::NamedLinear& linear : decoder.linears())
    if (linear.linear->quantized) {
      estimate.weights += linear.linear->quantized->num_bytes();
      // Made dense in one buffer: two of the largest where gate and up are one product.
      dense = std::max(dense, 2 * static_cast<std::uint64_t>(linear.linear->outputs() * linear.linear->inputs()) * c10::elementSize(linear.linear->compute_type()));
    }
  estimate.weights += dense + (decoder.shards ? decoder.shards->buffer_bytes() : 0);
  const auto tokens = static_cast<double>(batch_tokens);
  if (decoder.fused) {
    // Gradients of the base come as what was kept for them goes: of the two only the larger counts, and `trained` has one already.
    const double kept = tokens * models::kept_bytes_per_token(decoder), gradients = static_cast<double>(estimate.trained);
    estimate.activations = static_cast<std::uint64_t>(tokens * work_per_token(decoder) + std::max(0.0, kept - gradients));
  } else {
    estimate.activations = static_cast<std::uint64_t>(tokens * aten_bytes_per_token(decoder));
  }
  for (const models::NamedLinear& linear : decoder.linears())
    if (linear.linear->adapter) estimate.trained += 2 * (linear.linear->adapter->a_RI.nbytes() + linear.linear->adapter->b_OR.nbytes());
  estimate.head = head_bytes(decoder.head, batch_tokens) + static_cast<std::uint64_t>(tokens * 3 * static_cast<double>(model.hidden_size)) * c10::elementSize(decoder.compute_type());
  return estimate;
}

std::uint64_t bytes_of_blocks(models::Decoder& decoder) {
  std::uint64_t bytes = 0;
  for (const models::NamedLinear& named : decoder.linears())
    if (named.layer >= 0) bytes += named.linear->quantized ? named.linear->quantized->num_bytes() : named.linear->weight_OI.nbytes();
  return bytes;
}

MemoryEstimate shared_by(const MemoryEstimate& whole, models::Decoder& decoder, const TrainConfig& config, int num_ranks) {
  MemoryEstimate of_rank = whole;
  if (!config.ranks.shard || num_ranks == 1) return of_rank;
  const auto group = static_cast<std::uint64_t>(config.ranks.shard_group > 0 ? config.ranks.shard_group : num_ranks);
  if (config.method == "full") {
    of_rank.optimizer /= group;
    // Sums of earlier micro-batches stay whole until the last one's backward pass frees them.
    if (config.data.batches_per_step * config.ranks.context > num_ranks) return of_rank;
    std::uint64_t in_blocks = 0;
    for (const models::NamedTensor& tensor : decoder.tensors())
      if (tensor.tensor->requires_grad() && is_in_block(tensor.name)) in_blocks += tensor.tensor->nbytes();
    // Besides its part of the sums: what is not of a block leaves when the pass has ended; a block's gradients wait for their bucket; two buckets
    // are under way, each as it is sent and as it comes.
    const std::uint64_t part = whole.trained / group, waiting = in_blocks / decoder.blocks.size() + 5 * static_cast<std::uint64_t>(kGradientBucketBytes);
    of_rank.trained = part + (whole.trained - in_blocks) + std::min(waiting, in_blocks);
    if (decoder.fused) {
      const double kept = static_cast<double>(config.data.row_length * config.data.rows_per_batch / config.ranks.context) * models::kept_bytes_per_token(decoder);
      of_rank.activations += static_cast<std::uint64_t>(std::max(0.0, kept - static_cast<double>(part)) - std::max(0.0, kept - static_cast<double>(whole.trained)));
    }
    return of_rank;
  }
  const std::uint64_t blocks = bytes_of_blocks(decoder), two_blocks = 2 * blocks / decoder.blocks.size();
  std::uint64_t dense = 0;  // as where a base is quantised, whose buffer is counted already
  for (const models::NamedLinear& named : decoder.linears())
    if (named.layer >= 0 && !named.linear->quantized) dense = std::max(dense, 2 * static_cast<std::uint64_t>(named.linear->weight_OI.nbytes()));
  of_rank.weights = whole.weights - blocks + blocks / group + two_blocks + dense;
  return of_rank;
}

MemoryEstimate estimate_reading_memory(models::Decoder& decoder, std::int64_t batch_tokens) {
  MemoryEstimate estimate = estimate_memory(decoder, 0, batch_tokens);
  estimate.activations = static_cast<std::uint64_t>(static_cast<double>(batch_tokens) * work_per_token(decoder));
  return estimate;
}

std::string prepare_blocks(models::Decoder& decoder, const TrainConfig& config, const std::string& not_fused, int num_ranks, std::uint64_t available) {
  const std::string reason = not_fused.empty() ? models::use_fused_blocks(decoder) : not_fused;
  if (!reason.empty()) {
    if (config.memory == "mlp" || config.memory == "block")
      fail(ErrorKind::kUsage, "memory: ", config.memory, " needs the fused blocks, which cannot be used: ", reason, Remedy{"use memory: auto"});
    if (config.ranks.context > 1)
      fail(ErrorKind::kUsage, "ranks.context: rows are shared by the fused blocks alone, which cannot be used: ", reason, Remedy{"use ranks.context: 1"});
    log_info("blocks: ATen operators, as ", reason);
    return reason;
  }
  std::uint64_t trained = 0;
  for (const models::NamedTensor& tensor : lora::trainable(decoder)) trained += tensor.tensor->nbytes();
  const std::uint64_t optimizer_bytes = 2 * trained;
  const auto needed = [&] {
    const MemoryEstimate estimate = estimate_memory(decoder, optimizer_bytes, config.data.row_length * config.data.rows_per_batch / config.ranks.context);
    return static_cast<double>((decoder.shards ? estimate : shared_by(estimate, decoder, config, num_ranks)).total());
  };
  for (const auto& [name, keep] : kPolicies) {
    decoder.keep = keep;
    if (config.memory == name) break;
    if (config.memory != "auto") continue;
    if (available == 0) break;
    if (needed() < kShareOfAvailable * static_cast<double>(available)) break;
  }
  log_info("blocks: fused, memory: ", name_of(decoder.keep));
  return "";
}

}  // namespace alambic::train
