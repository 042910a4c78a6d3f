// SPDX-License-Identifier: Apache-2.0
#pragma once
// What turns gradients into changed weights, whichever rule does it: AdamW in f32 or with 8-bit moments, Adafactor, Muon.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "checkpoints/safetensors.h"
#include "models/decoder.h"
#include "parallel/communicator.h"
#include "train/train_config.h"

namespace alambic::train {

/// Scales the gradients (f32, contiguous) down to the norm max_norm if theirs is larger, as torch.nn.utils.clip_grad_norm_
/// does; 0: never. Returns the norm before clipping; infinite where its square is more than f32 holds, as torch's is. Where it is
/// not finite nothing is scaled. Sums are f64 over pieces of fixed size, so they do not depend on the number of threads.
double clip_to_norm(std::span<at::Tensor> gradients, double max_norm);
/// Its parts, for gradients of which ranks have some each. The squares of every kPieceOfNorm elements of a tensor (the last has fewer), tensor
/// by tensor; the norm of them all; and the scaling.
inline constexpr std::int64_t kPieceOfNorm = 1 << 14;  // long enough to be worth a thread's while, short enough that all threads get some
std::vector<double> squares_of(std::span<at::Tensor> tensors);
std::vector<double> squares_of_by_operators(std::span<at::Tensor> tensors);
double norm_of(std::span<const double> squares);
void scale_to_norm(std::span<at::Tensor> gradients, double norm, double max_norm);
/// What it does elsewhere than in a processor's memory.
double clip_to_norm_by_operators(std::span<at::Tensor> gradients, double max_norm);
/// Its first half: the sum of squares, an f64 scalar where the gradients are.
at::Tensor sum_of_squares_by_operators(std::span<at::Tensor> gradients);

/// Whether weight decay pulls on a tensor of this name. As in transformers' Trainer: on all but biases and norms, so
/// adapters' A and B and embeddings decay.
bool decays(std::string_view name);

/// Whether this is the embedding or the head itself, trained whole (not an adapter on it).
bool is_embedding_or_head(std::string_view name);

/// Whether this belongs to one of the decoder's blocks.
bool is_in_block(std::string_view name);

/// A trained tensor and how it is to be treated.
struct Trained {
  std::string name;
  at::Tensor tensor;        // f32 leaf that requires gradients; shared with the model, not a copy
  double rate = 1;          // times the schedule's learning rate
  double weight_decay = 0;
};

/// Rates: lora_plus_ratio for B and for one-dimensional tensors, as PEFT's create_loraplus_optimizer groups them (LoRA+,
/// arXiv:2402.12354); embedding_lr_ratio for a trained embedding and head, or trained rows of them; 1 for the rest.
/// Error(kUsage) when nothing trains, and when a ratio concerns nothing that trains.
std::vector<Trained> with_rates(const std::vector<models::NamedTensor>& trainable, const OptimizerConfig& config);

using NamedState = std::vector<std::pair<std::string, at::Tensor>>;

class Optimizer {
 public:
  virtual ~Optimizer() = default;
  Optimizer(const Optimizer&) = delete;
  Optimizer& operator=(const Optimizer&) = delete;

  /// One for each tensor, in order, contiguous; a tensor that took no part has zeros. They alias the tensors' own gradients.
  std::span<at::Tensor> gradients();
  at::Tensor& gradient(std::size_t i);  // one of them
  void step(double learning_rate);  // and forgets the gradients
  virtual void forget_gradients();
  void reset();  // moments and number of steps, as if nothing had been learnt yet

  /// Tensors and moments by name, for a checkpoint: "weights.<name>" and what moments() lists. Views, not copies.
  virtual NamedState state() const;
  std::int64_t num_steps() const { return num_steps_; }
  /// Copies weights and moments back. Error(kData) listing names, shapes or types that do not fit; then nothing is changed.
  virtual void restore(const NamedState& state, std::int64_t num_steps);
  std::int64_t num_parameters() const;
  virtual std::int64_t state_bytes() const;  // of the moments, as a checkpoint has them

  /// Collective: begins the sum over ranks of the gradients of these tensors, by number; ranks.finish_sums() ends it.
  virtual void start_sum(std::span<const std::size_t> tensors, parallel::Communicator& ranks);
  /// What such sums become and a step applies: gradients(), or this rank's parts of them (train/shared_optimizer.h).
  virtual std::span<at::Tensor> sums() { return gradients(); }
  /// Collective: clips the sums (clip_to_norm) and returns their norm.
  virtual double clip(double max_norm, parallel::Communicator& ranks);
  /// Collective: all ranks get weights and moments as rank 0 has them, which alone was restored.
  virtual void share(std::int64_t num_steps, parallel::Communicator& ranks);
  /// Moments of a checkpoint of which each rank keeps a part (train/shared_optimizer.h), and one of them, whole; collective.
  virtual std::vector<checkpoints::TensorToWrite> shared_moments() const { return {}; }
  virtual at::Tensor gather_moment(std::size_t i);

  const std::vector<Trained>& trained() const { return trained_; }

  /// Changes the tensors by sums(), which are there. `step` counts from 1.
  virtual void update(double learning_rate, std::int64_t step) = 0;
  /// What the rule remembers from step to step, "<what>.<name>".
  virtual NamedState moments() const = 0;

 protected:
  explicit Optimizer(std::vector<Trained> trained);

 private:
  std::vector<Trained> trained_;
  std::vector<at::Tensor> gradients_;
  std::int64_t num_steps_ = 0;
};

/// trainable: names and f32 leaf tensors that require gradients; the tensors are shared, not copied. shared_by: ranks that each keep a part
/// of summed gradients and moments, or each group of them for itself (0: all are one); they outlive it.
std::unique_ptr<Optimizer> make_optimizer(const std::vector<models::NamedTensor>& trainable, const OptimizerConfig& config, parallel::Communicator* shared_by = nullptr, int group = 0);
std::unique_ptr<Optimizer> make_rule(std::vector<Trained> trained, const OptimizerConfig& config);

}  // namespace alambic::train
