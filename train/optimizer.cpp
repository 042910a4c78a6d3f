// SPDX-License-Identifier: Apache-2.0
#include "train/optimizer.h"

#include <ATen/Parallel.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <limits>
#include <map>

#include "core/error.h"
#include "core/vector_loops.h"
#include "train/adafactor.h"
#include "train/adamw.h"
#include "train/adamw8bit.h"
#include "train/muon.h"
#include "train/shared_optimizer.h"

namespace alambic::train {
namespace {

struct SumOfSquares {
  [[gnu::always_inline]] static void run(const float* values, std::int64_t count, double* sum) {
    double lanes[8] = {};
    std::int64_t i = 0;
    for (; i + 8 <= count; i += 8)
      for (int lane = 0; lane < 8; ++lane) lanes[lane] += static_cast<double>(values[i + lane]) * static_cast<double>(values[i + lane]);
    for (; i < count; ++i) lanes[0] += static_cast<double>(values[i]) * static_cast<double>(values[i]);
    *sum = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  }
};

struct Scaled {
  [[gnu::always_inline]] static void run(float* values, std::int64_t count, float scale) {
    for (std::int64_t i = 0; i < count; ++i) values[i] *= scale;
  }
};

/// A run of one tensor's elements.
struct Piece {
  float* values;
  std::int64_t count;
};

std::vector<Piece> pieces_of(std::span<at::Tensor> tensors) {
  std::vector<Piece> pieces;
  for (at::Tensor& tensor : tensors) {
    if (tensor.scalar_type() != at::kFloat || !tensor.is_contiguous() || !tensor.is_cpu())
      fail(ErrorKind::kBug, "a gradient must be contiguous f32 in the processor's memory, got ", toString(tensor.scalar_type()), " ", tensor.sizes());
    float* const values = tensor.mutable_data_ptr<float>();
    for (std::int64_t i = 0; i < tensor.numel(); i += kPieceOfNorm) pieces.push_back({values + i, std::min(kPieceOfNorm, tensor.numel() - i)});
  }
  return pieces;
}

template <class Act>
void for_each_piece(const std::vector<Piece>& pieces, const Act& act) {
  at::parallel_for(0, static_cast<std::int64_t>(pieces.size()), /*grain_size=*/4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) act(static_cast<std::size_t>(i));
  });
}

std::string lower_case(std::string_view name) {
  std::string lower(name);
  std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char letter) { return static_cast<char>(std::tolower(letter)); });
  return lower;
}

// 1 where nothing is scaled. 1e-6 as in torch.nn.utils.clip_grad_norm_.
float scale_to(double max_norm, double norm) {
  return max_norm > 0 && std::isfinite(norm) && norm > max_norm - 1e-6 ? static_cast<float>(max_norm / (norm + 1e-6)) : 1.0f;
}

}  // namespace

at::Tensor sum_of_squares_by_operators(std::span<at::Tensor> gradients) {
  const at::NoGradGuard no_grad;
  return at::stack(at::_foreach_norm(at::TensorList(gradients.data(), gradients.size()), 2, at::kDouble)).square().sum();
}

double clip_to_norm_by_operators(std::span<at::Tensor> gradients, double max_norm) {
  const at::NoGradGuard no_grad;
  const double square = sum_of_squares_by_operators(gradients).item<double>(), norm = norm_of({&square, 1});
  scale_to_norm(gradients, norm, max_norm);
  return norm;
}

std::vector<double> squares_of_by_operators(std::span<at::Tensor> tensors) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> norms;  // summed in f64 without a copy in it
  const auto add = [&](const at::Tensor& rows) { norms.push_back(at::linalg_vector_norm(rows, 2, at::IntArrayRef{1}, false, at::kDouble)); };
  for (const at::Tensor& tensor : tensors) {
    const at::Tensor flat = tensor.view(-1);
    const std::int64_t pieces = flat.numel() / kPieceOfNorm, whole = pieces * kPieceOfNorm;
    if (pieces > 0) add(flat.narrow(0, 0, whole).view({pieces, kPieceOfNorm}));
    if (whole < flat.numel()) add(flat.narrow(0, whole, flat.numel() - whole).unsqueeze(0));
  }
  if (norms.empty()) return {};
  const at::Tensor squares = at::cat(norms).square().cpu();
  return {squares.const_data_ptr<double>(), squares.const_data_ptr<double>() + squares.numel()};
}

std::vector<double> squares_of(std::span<at::Tensor> tensors) {
  if (!tensors.empty() && !tensors.front().is_cpu()) return squares_of_by_operators(tensors);
  const std::vector<Piece> pieces = pieces_of(tensors);
  std::vector<double> sums(pieces.size());
  for_each_piece(pieces, [&](std::size_t i) { run_vectorised<SumOfSquares>(static_cast<const float*>(pieces[i].values), pieces[i].count, &sums[i]); });
  return sums;
}

double norm_of(std::span<const double> squares) {
  double square = 0;
  for (const double sum : squares) square += sum;
  // f32 moments cannot hold what is larger, whatever is trained with it.
  if (square > static_cast<double>(std::numeric_limits<float>::max())) square = std::numeric_limits<double>::infinity();
  return std::sqrt(square);
}

void scale_to_norm(std::span<at::Tensor> gradients, double norm, double max_norm) {
  const float scale = scale_to(max_norm, norm);
  if (scale == 1 || gradients.empty()) return;
  if (!gradients.front().is_cpu()) return at::_foreach_mul_(at::TensorList(gradients.data(), gradients.size()), scale);
  const std::vector<Piece> pieces = pieces_of(gradients);
  for_each_piece(pieces, [&](std::size_t i) { run_vectorised<Scaled>(pieces[i].values, pieces[i].count, scale); });
}

double clip_to_norm(std::span<at::Tensor> gradients, double max_norm) {
  if (!gradients.empty() && !gradients.front().is_cpu()) return clip_to_norm_by_operators(gradients, max_norm);
  const double norm = norm_of(squares_of(gradients));
  scale_to_norm(gradients, norm, max_norm);
  return norm;
}

bool decays(std::string_view name) {
  const std::string lower = lower_case(name);
  for (const std::string_view word : {"bias", "layernorm", "rmsnorm"})
    if (lower.find(word) != std::string::npos) return false;
  for (std::size_t begin = 0; begin <= lower.size();) {
    const std::size_t end = std::min(lower.find('.', begin), lower.size());
    const std::string_view part = std::string_view(lower).substr(begin, end - begin);
    if (part == "norm" || part.ends_with("_norm")) return false;
    begin = end + 1;
  }
  return true;
}

bool is_in_block(std::string_view name) { return name.find(".layers.") != std::string_view::npos; }

bool is_embedding_or_head(std::string_view name) {
  if (name.ends_with(".trainable_tokens_delta")) return true;  // rows of them, as lora::trainable() names them
  for (const std::string_view module : {"embed_tokens.weight", "lm_head.weight"})
    if (name == module || (name.ends_with(module) && name[name.size() - module.size() - 1] == '.')) return true;
  return false;
}

std::vector<Trained> with_rates(const std::vector<models::NamedTensor>& trainable, const OptimizerConfig& config) {
  if (trainable.empty()) fail(ErrorKind::kUsage, "nothing trains: no adapter is attached and no weight is trained");
  bool has_b = false, has_embedding = false;
  std::vector<Trained> trained;
  for (const models::NamedTensor& named : trainable) {
    const bool is_b = named.name.find("lora_B") != std::string::npos, is_embedding = is_embedding_or_head(named.name);
    has_b |= is_b;
    has_embedding |= is_embedding;
    double rate = 1;
    if (is_b || named.tensor->dim() == 1) rate = config.lora_plus_ratio;
    if (is_embedding) rate = config.embedding_lr_ratio;
    trained.push_back({named.name, *named.tensor, rate, decays(named.name) ? config.weight_decay : 0});
  }
  if (config.lora_plus_ratio != 1 && !has_b)
    fail(ErrorKind::kUsage, "optimizer.lora_plus_ratio: ", config.lora_plus_ratio, ", but no adapter's B trains", Remedy{"leave it out, or train adapters (method: lora)"});
  if (config.embedding_lr_ratio != 1 && !has_embedding)
    fail(ErrorKind::kUsage, "optimizer.embedding_lr_ratio: ", config.embedding_lr_ratio, ", but neither the embedding nor the head trains",
         Remedy{"leave it out, add embed_tokens or lm_head to lora.modules_to_save, or name lora.trainable_tokens"});
  return trained;
}

Optimizer::Optimizer(std::vector<Trained> trained) : trained_(std::move(trained)) {
  for (const Trained& one : trained_)
    if (one.tensor.scalar_type() != at::kFloat || !one.tensor.requires_grad() || !one.tensor.is_leaf() || !one.tensor.is_contiguous())
      fail(ErrorKind::kBug, one.name, ": a trained tensor must be a contiguous f32 leaf that requires gradients");
}

std::span<at::Tensor> Optimizer::gradients() {
  gradients_.clear();
  for (std::size_t i = 0; i < trained_.size(); ++i) gradients_.push_back(gradient(i));
  return gradients_;
}

at::Tensor& Optimizer::gradient(std::size_t i) {
  at::Tensor& gradient = trained_[i].tensor.mutable_grad();
  if (!gradient.defined()) gradient = at::zeros_like(trained_[i].tensor.detach());
  else if (!gradient.is_contiguous()) gradient = gradient.contiguous();
  return gradient;
}

void Optimizer::step(double learning_rate) {
  const at::NoGradGuard no_grad;
  sums();
  update(learning_rate, ++num_steps_);
  forget_gradients();
}

void Optimizer::forget_gradients() {
  gradients_.clear();
  for (const Trained& one : trained_) one.tensor.mutable_grad().reset();
}

void Optimizer::reset() {
  forget_gradients();
  // Zeros are how every rule begins, 8-bit ones too: their scales are then 0.
  for (const auto& [name, moment] : moments()) moment.zero_();
  num_steps_ = 0;
}

NamedState Optimizer::state() const {
  NamedState state;
  for (const Trained& one : trained_) state.emplace_back("weights." + one.name, one.tensor.detach());
  for (auto& moment : moments()) state.push_back(std::move(moment));
  return state;
}

void Optimizer::restore(const NamedState& state, std::int64_t num_steps) {
  std::map<std::string, at::Tensor> given(state.begin(), state.end());
  std::string problems;
  std::vector<std::pair<at::Tensor, at::Tensor>> copies;
  for (auto& [name, own] : this->state()) {
    const auto found = given.find(name);
    if (found == given.end()) {
      problems += " missing " + name + ";";
      continue;
    }
    if (found->second.sizes() != own.sizes() || found->second.scalar_type() != own.scalar_type()) problems += " another shape or type of " + name + ";";
    copies.emplace_back(own, found->second);
    given.erase(found);
  }
  for (const auto& [name, unknown] : given) problems += " unknown " + name + ";";
  if (!problems.empty()) fail(ErrorKind::kData, "the checkpoint does not fit what trains:", problems);
  const at::NoGradGuard no_grad;
  for (auto& [own, value] : copies) own.copy_(value);
  num_steps_ = num_steps;
}

std::int64_t Optimizer::num_parameters() const {
  std::int64_t count = 0;
  for (const Trained& one : trained_) count += one.tensor.numel();
  return count;
}

std::int64_t Optimizer::state_bytes() const {
  std::int64_t bytes = 0;
  for (const auto& [name, moment] : moments()) bytes += static_cast<std::int64_t>(moment.nbytes());
  return bytes;
}

void Optimizer::start_sum(std::span<const std::size_t> tensors, parallel::Communicator& ranks) {
  std::vector<at::Tensor> of_tensors;
  for (const std::size_t i : tensors) of_tensors.push_back(gradient(i));
  ranks.start_sum(of_tensors, "gradients");
}

double Optimizer::clip(double max_norm, parallel::Communicator&) { return clip_to_norm(sums(), max_norm); }

void Optimizer::share(std::int64_t num_steps, parallel::Communicator& ranks) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> tensors;
  for (const auto& [name, tensor] : state()) tensors.push_back(tensor);
  ranks.broadcast_in_place(tensors, 0, "the checkpoint's weights");
  num_steps_ = num_steps;
}

at::Tensor Optimizer::gather_moment(std::size_t i) { fail(ErrorKind::kBug, "moment ", i, " of an optimiser that shares none"); }

std::unique_ptr<Optimizer> make_optimizer(const std::vector<models::NamedTensor>& trainable, const OptimizerConfig& config, parallel::Communicator* shared_by, int group) {
  std::vector<Trained> trained = with_rates(trainable, config);
  if (shared_by != nullptr && shared_by->size() > 1) return std::make_unique<SharedOptimizer>(std::move(trained), config, *shared_by, group > 0 ? group : shared_by->size());
  return make_rule(std::move(trained), config);
}

std::unique_ptr<Optimizer> make_rule(std::vector<Trained> trained, const OptimizerConfig& config) {
  if (const at::Device device = trained.front().tensor.device(); config.kind == "adamw8bit" && !device.is_cpu())
    fail(ErrorKind::kUsage, "optimizer.kind: adamw8bit computes on processors alone, and what trains is on ", device.str(), Remedy{"use adamw, adafactor or muon, or set device: cpu"});
  if (config.kind == "adamw") return std::make_unique<AdamW>(std::move(trained), config);
  if (config.kind == "adamw8bit") return std::make_unique<AdamW8bit>(std::move(trained), config);
  if (config.kind == "adafactor") return std::make_unique<Adafactor>(std::move(trained), config);
  if (config.kind == "muon") return std::make_unique<Muon>(std::move(trained), config);
  fail(ErrorKind::kUsage, "optimizer.kind: \"", config.kind, "\" is unknown", Remedy{"use adamw, adamw8bit, adafactor or muon"});
}

}  // namespace alambic::train
