// SPDX-License-Identifier: Apache-2.0
#include "train/cross_entropy.h"

#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "core/config.h"
#include "core/error.h"
#include "core/random.h"
#include "models/bf16_tiles.h"
#include "models/head_product.h"
#include "models/product.h"
#include "models/row_kernels.h"
#include "train/known_gradients.h"

namespace alambic::train {
namespace {

using torch::autograd::variable_list;

struct Rows {
  at::Tensor index_K, targets_K;
};

Rows kept_rows(const at::Tensor& hidden_TD, const models::Linear& head, const at::Tensor& targets_T, const at::Tensor& keep_T) {
  const std::int64_t num_tokens = hidden_TD.size(0), vocabulary = head.outputs();
  if (hidden_TD.dim() != 2 || hidden_TD.size(1) != head.inputs() || targets_T.sizes() != at::IntArrayRef{num_tokens} ||
      keep_T.sizes() != at::IntArrayRef{num_tokens})
    fail(ErrorKind::kBug, "cross entropy: hidden ", hidden_TD.sizes(), ", head ", head.outputs(), " x ", head.inputs(), ", targets ", targets_T.sizes(),
         ", keep ", keep_T.sizes(), " do not agree");
  const at::Tensor index_K = keep_T.nonzero().squeeze(1);
  const at::Tensor targets_K = targets_T.index_select(0, index_K);
  if (targets_K.numel() > 0 && (targets_K.min().item<std::int64_t>() < 0 || targets_K.max().item<std::int64_t>() >= vocabulary))
    fail(ErrorKind::kData, "a token to predict has id ", targets_K.max().item<std::int64_t>(), ", outside the model's ", vocabulary, " tokens",
         Remedy{"prepare the data with the tokenizer of this model"});
  return {index_K.to(hidden_TD.device()), targets_K.to(hidden_TD.device())};
}

// Rows of logits one at a time through f on all threads.
void for_rows(at::Tensor& logits_KV, const at::Tensor& targets_K, double* nats, const LossConfig& loss, bool differentiable) {
  const std::int64_t vocabulary = logits_KV.size(1);
  const std::int64_t* const targets = targets_K.const_data_ptr<std::int64_t>();
  const auto run = [&](auto* logits) {
    at::parallel_for(0, logits_KV.size(0), 4, [&](std::int64_t begin, std::int64_t end) {
      models::kernels::cross_entropy_rows(logits + begin * vocabulary, targets + begin, loss.label_smoothing, loss.z_loss, differentiable, nats + begin, end - begin, vocabulary);
    });
  };
  if (logits_KV.scalar_type() == at::kFloat) run(logits_KV.mutable_data_ptr<float>());
  else run(logits_KV.mutable_data_ptr<at::BFloat16>());
}

// W as the tiles read it: as the run holds it, or in the 16 bits of its file. Undefined: it is kept in another way.
at::Tensor weight_for_tiles(const models::Linear& head) { return head.quantized ? head.quantized->stored_OI() : head.weight_OI; }

// Whether the tiled path computes this loss: it makes no gradient of the head itself, nor what smoothing does behind a soft cap.
bool takes_tiles(const models::Linear& head, const LossConfig& loss) {
  const at::Tensor weight_VD = weight_for_tiles(head);
  if (!head.device().is_cpu() || !weight_VD.defined() || weight_VD.requires_grad() || head.adapter || head.bias_O.defined() || head.token_rows_ND.defined()) return false;
  if (head.soft_cap > 0 && loss.label_smoothing > 0) return false;
  if (head.compute_type() == at::kFloat) return true;
  return head.compute_type() == at::kBFloat16 && weight_VD.scalar_type() == at::kBFloat16 && models::has_bf16_tiles() && !models::has_bf16_matrix_unit();
}

// Nats of the kept rows, and their gradient in the rows of d_hidden_TD where that is defined.
std::vector<double> tiled_nats(const at::Tensor& hidden_TD, const models::Linear& head, const Rows& kept, const LossConfig& loss, at::Tensor& d_hidden_TD) {
  const at::NoGradGuard no_grad;
  const bool all = kept.index_K.numel() == hidden_TD.size(0);
  const at::ScalarType type = head.compute_type();
  const at::Tensor h_KD = all ? hidden_TD.detach().to(type).contiguous() : hidden_TD.detach().index_select(0, kept.index_K).to(type), targets_K = kept.targets_K.contiguous();
  at::Tensor d_KD = d_hidden_TD.defined() ? at::empty(h_KD.sizes(), at::kFloat) : at::Tensor();
  std::vector<double> nats(static_cast<std::size_t>(h_KD.size(0)));
  const auto tiled = type == at::kFloat ? models::tiled_cross_entropy : models::tiled_cross_entropy_bf16;
  tiled(h_KD, weight_for_tiles(head).detach(), targets_K.const_data_ptr<std::int64_t>(), loss.label_smoothing, loss.z_loss, nats.data(), d_KD, head.soft_cap);
  if (d_KD.defined() && all) d_hidden_TD = d_KD.to(hidden_TD.scalar_type());
  else if (d_KD.defined()) d_hidden_TD.index_copy_(0, kept.index_K, d_KD.to(hidden_TD.scalar_type()));
  return nats;
}

// sum_VD += the transpose of d_KV times h_KD, some rows at a time: in one piece there would be a second matrix as large as the head, and a
// turned copy of the logits.
void add_gradient_of_head(at::Tensor& sum_VD, const at::Tensor& d_KV, const at::Tensor& h_KD) {
  constexpr std::int64_t kRows = 4096;
  const bool is_first = !sum_VD.defined();
  if (is_first) sum_VD = at::empty({d_KV.size(1), h_KD.size(1)}, d_KV.options().dtype(at::kFloat));
  for (std::int64_t begin = 0; begin < d_KV.size(1); begin += kRows) {
    const std::int64_t count = std::min(kRows, d_KV.size(1) - begin);
    const at::Tensor part = models::product(d_KV.narrow(1, begin, count).t(), h_KD);
    at::Tensor rows = sum_VD.narrow(0, begin, count);
    is_first ? rows.copy_(part) : rows.add_(part);
  }
}

}  // namespace

void LossConfig::visit(FieldVisitor& fields) {
  fields.field("label_smoothing", label_smoothing, {.help = "share of each target that is spread over the whole vocabulary", .low = 0, .high = 0.999});
  fields.field("z_loss", z_loss, {.help = "weight of the squared log of the softmax's divisor, which keeps logits small (arXiv:2204.02311)", .low = 0, .high = 1});
}

namespace {
constexpr std::int64_t kRowRound = 32;
}

std::int64_t num_rows_in_chunk(std::int64_t vocabulary_size) { return std::clamp<std::int64_t>((16 << 20) / vocabulary_size / kRowRound * kRowRound, kRowRound, 512); }

std::uint64_t head_bytes(const models::Linear& head, std::int64_t rows) {
  // By operators, the loss makes two of f32 besides.
  const std::int64_t vocabulary = head.outputs(), copies = (head.adapter || head.token_rows_ND.defined() ? 2 : 1) + (head.device().is_cpu() ? 0 : head.compute_type() == at::kFloat ? 1 : 4);
  // A chunk of capped logits has their slopes besides; smoothing, which is not known here, would take it in place of tiles.
  const std::int64_t capped = head.soft_cap == 0 ? 0 : head.compute_type() == at::kFloat ? 1 : 5;
  if (takes_tiles(head, {}) && capped == 0) return models::tiled_cross_entropy_bytes(weight_for_tiles(head), head.compute_type(), at::get_num_threads());
  return static_cast<std::uint64_t>((copies + capped) * std::min(num_rows_in_chunk(vocabulary), rows) * vocabulary) * c10::elementSize(head.compute_type());
}

namespace {

// As head_loss_sum(), whatever the rows' loss does with its sum: what value() gives behind the last rows is the loss.
using ActOnRows = std::function<void(at::Tensor& logits_KV, std::int64_t first, bool differentiable)>;
at::Tensor through_head(const at::Tensor& hidden_TD, const models::Linear& head, const at::Tensor& index_K, std::uint64_t dropout_seed, const ActOnRows& row_loss, const std::function<at::Tensor()>& value);

}  // namespace

at::Tensor cross_entropy_sum(const at::Tensor& hidden_TD, const models::Linear& head, const at::Tensor& targets_T,
                             const at::Tensor& keep_T, std::uint64_t dropout_seed, const LossConfig& loss) {
  const Rows kept = kept_rows(hidden_TD, head, targets_T, keep_T);
  if (takes_tiles(head, loss) && kept.index_K.numel() > 0) {
    const bool differentiable = at::GradMode::is_enabled() && hidden_TD.requires_grad();
    at::Tensor d_hidden_TD = differentiable ? at::zeros_like(hidden_TD.detach()) : at::Tensor();
    const std::vector<double> nats = tiled_nats(hidden_TD, head, kept, loss, d_hidden_TD);
    const at::Tensor value = at::scalar_tensor(std::accumulate(nats.begin(), nats.end(), 0.0), at::kDouble);
    return differentiable ? with_known_gradients(value, {hidden_TD}, {d_hidden_TD}) : value;
  }
  const at::Tensor targets = kept.targets_K.contiguous();
  if (!hidden_TD.is_cpu()) {
    at::Tensor nats = at::zeros({}, hidden_TD.options().dtype(at::kDouble));
    const auto add = [&](at::Tensor& logits_KV, std::int64_t first, bool differentiable) {
      nats.add_(cross_entropy_rows_by_operators(logits_KV, targets.narrow(0, first, logits_KV.size(0)), loss, differentiable).sum());
    };
    return through_head(hidden_TD, head, kept.index_K, dropout_seed, add, [&] { return nats; });
  }
  return head_loss_sum(hidden_TD, head, kept.index_K, dropout_seed, [&](at::Tensor& logits_KV, std::int64_t first, bool differentiable) {
    std::vector<double> nats(static_cast<std::size_t>(logits_KV.size(0)));
    for_rows(logits_KV, targets.narrow(0, first, logits_KV.size(0)), nats.data(), loss, differentiable);
    return std::accumulate(nats.begin(), nats.end(), 0.0);
  });
}

at::Tensor head_loss_sum(const at::Tensor& hidden_TD, const models::Linear& head, const at::Tensor& index_K, std::uint64_t dropout_seed, const RowLoss& row_loss) {
  double nats = 0;
  const auto add = [&](at::Tensor& logits_KV, std::int64_t first, bool differentiable) { nats += row_loss(logits_KV, first, differentiable); };
  return through_head(hidden_TD, head, index_K, dropout_seed, add, [&] { return at::scalar_tensor(nats, at::kDouble); });
}

at::Tensor cross_entropy_rows_by_operators(at::Tensor& logits_KV, const at::Tensor& targets_K, const LossConfig& loss, bool differentiable) {
  const at::NoGradGuard no_grad;
  const double smoothing = loss.label_smoothing, each = smoothing / static_cast<double>(logits_KV.size(1));
  const at::Tensor target_K1 = targets_K.unsqueeze(1), wide_KV = logits_KV.to(at::kFloat), log_sum_K1 = at::logsumexp(wide_KV, {1}, true).to(at::kDouble);
  at::Tensor nats_K1 = log_sum_K1 - (1 - smoothing) * wide_KV.gather(1, target_K1).to(at::kDouble);
  if (smoothing > 0) nats_K1.sub_(wide_KV.sum({1}, true, at::kDouble), each);
  if (loss.z_loss > 0) nats_K1.add_(log_sum_K1.square(), loss.z_loss);
  if (differentiable) {  // d / d logit_i = p_i (1 + 2 z log_sum) - target_i
    at::Tensor gradient_KV = at::softmax(wide_KV, 1);
    if (loss.z_loss > 0) gradient_KV.mul_((1 + 2 * loss.z_loss * log_sum_K1).to(at::kFloat));
    if (smoothing > 0) gradient_KV.sub_(each);
    gradient_KV.scatter_(1, target_K1, gradient_KV.gather(1, target_K1).sub_(1 - smoothing));
    logits_KV.copy_(gradient_KV);
  }
  return nats_K1.squeeze(1);
}

namespace {

at::Tensor through_head(const at::Tensor& hidden_TD, const models::Linear& head, const at::Tensor& index_K, std::uint64_t dropout_seed, const ActOnRows& row_loss, const std::function<at::Tensor()>& value) {
  const std::int64_t num_kept = index_K.numel(), rows = num_rows_in_chunk(head.outputs());
  if (num_kept == 0) return value();

  // Everything that may want a gradient; the hidden states come first.
  variable_list inputs = {hidden_TD};
  const auto add_trained = [&](const at::Tensor& tensor) {
    if (tensor.defined() && tensor.requires_grad()) inputs.push_back(tensor);
  };
  add_trained(head.weight_OI);
  add_trained(head.bias_O);
  add_trained(head.token_rows_ND);
  if (head.adapter) add_trained(head.adapter->a_RI), add_trained(head.adapter->b_OR), add_trained(head.adapter->magnitude_O);
  const bool differentiable = at::GradMode::is_enabled() && (inputs.size() > 1 || hidden_TD.requires_grad());
  variable_list gradients(inputs.size());
  const at::Tensor hidden = hidden_TD.detach();
  const bool wants_hidden = differentiable && hidden_TD.requires_grad();
  if (wants_hidden) gradients[0] = at::zeros_like(hidden);
  const auto add_to = [&](at::Tensor& sum, const at::Tensor& part) {
    if (sum.defined()) sum.add_(part);
    else sum = part.to(at::kFloat);
  };
  const bool plain = !head.adapter && !head.bias_O.defined() && !head.token_rows_ND.defined();
  for (std::int64_t begin = 0; begin < num_kept; begin += rows) {
    const std::int64_t count = std::min(rows, num_kept - begin);
    const at::Tensor index = index_K.narrow(0, begin, count), h_KD = hidden.index_select(0, index).to(head.compute_type());
    const std::uint64_t seed = dropout_seed == 0 ? 0 : derive_seed(dropout_seed, "head", {static_cast<std::uint64_t>(begin)}) | 1;
    if (plain) {
      const at::NoGradGuard no_grad;
      // Rows of zeros to a round number: oneDNN keeps memory as large as the head for each shape that it has seen.
      const std::int64_t rounded = std::min(rows, (count + kRowRound - 1) / kRowRound * kRowRound);
      const at::Tensor rounded_KD = rounded == count ? h_KD : at::cat({h_KD, at::zeros({rounded - count, h_KD.size(1)}, h_KD.options())});
      const at::Tensor all_KV = head.quantized ? head.uncapped(rounded_KD, 0) : models::product(rounded_KD, head.weight_OI.detach().t());
      at::Tensor logits_KV = all_KV.narrow(0, 0, count), slope_KV;
      if (head.soft_cap > 0) slope_KV = models::soft_cap_in_place(logits_KV, head.soft_cap, differentiable);
      row_loss(logits_KV, begin, differentiable);
      if (!differentiable) continue;
      if (slope_KV.defined()) logits_KV.mul_(slope_KV);
      const at::Tensor weight_VD = head.quantized ? models::dense_in_buffer(*head.quantized, head.compute_type()) : head.weight_OI.detach();
      if (wants_hidden) gradients[0].index_copy_(0, index, models::product(all_KV, weight_VD).narrow(0, 0, count).to(hidden.scalar_type()));
      if (inputs.size() > 1) add_gradient_of_head(gradients[1], all_KV, rounded_KD);
    } else {  // an adapter, a bias or trained rows on the head: the Linear's own backward, on this chunk alone
      const at::AutoGradMode grad(differentiable);
      const at::Tensor leaf_KD = h_KD.detach().requires_grad_(wants_hidden), logits = head(leaf_KD, seed);
      at::Tensor d_logits_KV = logits.detach().clone();  // the loss overwrites it, and autograd still needs what it saved
      row_loss(d_logits_KV, begin, differentiable);
      if (!differentiable) continue;
      variable_list wanted(inputs.begin() + 1, inputs.end());
      if (wants_hidden) wanted.push_back(leaf_KD);
      const variable_list found = torch::autograd::grad({logits}, wanted, {d_logits_KV});
      const at::NoGradGuard no_grad;
      if (wants_hidden) gradients[0].index_copy_(0, index, found.back().to(hidden.scalar_type()));
      for (std::size_t i = 1; i < inputs.size(); ++i) add_to(gradients[i], found[i - 1]);
    }
  }
  return differentiable ? with_known_gradients(value(), inputs, std::move(gradients)) : value();
}

}  // namespace

at::Tensor cross_entropy_of_kept(const at::Tensor& hidden_TD, const models::Linear& head, const at::Tensor& targets_T,
                                 const at::Tensor& keep_T) {
  const at::NoGradGuard no_grad;
  const Rows kept = kept_rows(hidden_TD, head, targets_T, keep_T);
  at::Tensor nats_K = at::empty({kept.index_K.numel()}, at::kDouble);
  if (takes_tiles(head, {}) && kept.index_K.numel() > 0) {
    at::Tensor no_gradient;
    const std::vector<double> nats = tiled_nats(hidden_TD, head, kept, {}, no_gradient);
    std::copy(nats.begin(), nats.end(), nats_K.mutable_data_ptr<double>());
    return nats_K.to(at::kFloat);
  }
  const at::Tensor targets = kept.targets_K.contiguous();
  if (!hidden_TD.is_cpu()) {
    std::vector<at::Tensor> nats;
    const auto keep = [&](at::Tensor& logits_KV, std::int64_t first, bool) { nats.push_back(cross_entropy_rows_by_operators(logits_KV, targets.narrow(0, first, logits_KV.size(0)), {}, false)); };
    through_head(hidden_TD, head, kept.index_K, 0, keep, [] { return at::Tensor(); });
    return nats.empty() ? at::empty({0}, at::kFloat) : at::cat(nats).to(at::kFloat).cpu();
  }
  head_loss_sum(hidden_TD, head, kept.index_K, 0, [&](at::Tensor& logits_KV, std::int64_t first, bool) {
    for_rows(logits_KV, targets.narrow(0, first, logits_KV.size(0)), nats_K.mutable_data_ptr<double>() + first, {}, false);
    return 0.0;
  });
  return nats_K.to(at::kFloat);
}

}  // namespace alambic::train
