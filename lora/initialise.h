// SPDX-License-Identifier: Apache-2.0
#pragma once
// How an adapter starts (lora.init, PEFT's init_lora_weights): the first A and B, and what is taken out of the frozen base for them.
// Letters: I = inputs, O = outputs, R = rank.
//
//   kaiming        A uniform(+-1/sqrt(I)), B zero: PEFT's default (true)
//   gaussian       A normal of deviation 1/R, B zero
//   false          A uniform(+-1/sqrt(I)), B uniform(+-1/sqrt(R)): PEFT's false; the adapter changes the model from the start
//   pissa          principal singular vectors of W (arXiv:2404.02948):  B = U sqrt(S/scale), A = sqrt(S/scale) V^T of the R largest
//   pissa_niter_N  the same by a random projection and N subspace iterations (arXiv:0909.4061), for large weights
//   olora          W = Q T by QR (arXiv:2406.01775):  B = Q's first R columns, A = T's first R rows
//
// The last three take scale B A out of the frozen W, so that the model is unchanged at the start. What was taken out is kept in
// Adapter::initial_*: W + scale (B A - initial B initial A) is what was trained, relative to the base that was published.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

#include "models/decoder.h"

namespace alambic::lora {

struct LoraConfig;

struct Factors {
  at::Tensor a_RI, b_OR;  // f32
};

enum class InitKind { kKaiming, kGaussian, kRandom, kPissa, kOlora };
struct Init {
  InitKind kind = InitKind::kKaiming;
  std::int64_t iterations = -1;  // pissa: of the subspace; -1: the whole singular value decomposition
  bool changes_base() const { return kind == InitKind::kPissa || kind == InitKind::kOlora; }
};

/// Of lora.init's text. Error(kUsage) with the nearest name.
Init parse_init(const std::string& name);

/// PiSSA's first A and B of a weight (any floating type; computed in f32), by the operations PEFT calls, so equal to PEFT's where
/// the same LAPACK is below. rank <= min(O, I).
Factors pissa_factors(const at::Tensor& weight_OI, std::int64_t rank, double scale);
/// The same by iterations of the subspace that a random projection finds. start_NR: f32 and normal, N = min(O, I); R is the rank.
Factors pissa_factors(const at::Tensor& weight_OI, const at::Tensor& start_NR, double scale, std::int64_t iterations);
/// OLoRA's.
Factors olora_factors(const at::Tensor& weight_OI, std::int64_t rank);

/// W - scale B A, computed in f32 and rounded to W's type.
at::Tensor residual_weight(const at::Tensor& weight_OI, const Factors& factors, double scale);

/// Replaces the frozen weight by its residual and notes in the adapter what was taken out.
void take_out_of_base(models::Linear& linear, const Factors& factors);

/// Adds scale B A of every adapter to its weight, which is f32, and begins the adapters anew: the model computes what it computed.
/// A head that was tied parts from its embedding where it has an adapter. No DoRA. restart: 1 is the first.
void merge_and_restart(models::Decoder& decoder, const LoraConfig& config, std::uint64_t seed, std::int64_t restart);

/// Writes the first A, B and DoRA magnitude of every adapter in place, as config.init says; every draw is a function of (seed,
/// module path, restart) alone. Replaces the weights of pissa and olora by their residuals, and keeps what was taken out.
/// restart: how often the adapters have been merged and begun anew (lora.restart_every).
void initialise(models::Decoder& decoder, const LoraConfig& config, std::uint64_t seed, std::int64_t restart = 0);

}  // namespace alambic::lora
