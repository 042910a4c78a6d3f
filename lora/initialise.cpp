// SPDX-License-Identifier: Apache-2.0
#include "lora/initialise.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/diag.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/randn.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "core/error.h"
#include "core/random.h"
#include "lora/adapter.h"
#include "lora/merge.h"

namespace alambic::lora {
namespace {

constexpr std::int64_t kMostIterations = 1000;
constexpr std::string_view kIterated = "pissa_niter_";

at::Generator generator_of(std::uint64_t seed) { return at::make_generator<at::CPUGeneratorImpl>(seed); }

struct Svd {
  at::Tensor u_OR, s_R, v_IR;
};

/// torch.svd_lowrank(weight, q=R, niter=iterations): Halko, Martinsson and Tropp, algorithms 4.4 and 5.1.
Svd svd_lowrank(const at::Tensor& weight_OI, const at::Tensor& start_NR, std::int64_t iterations) {
  const bool wide = weight_OI.size(0) < weight_OI.size(1);
  const at::Tensor tall = wide ? weight_OI.t() : weight_OI;
  const auto orthonormal = [](const at::Tensor& x) { return std::get<0>(at::linalg_qr(x)); };
  at::Tensor basis = orthonormal(at::mm(tall, start_NR));
  for (std::int64_t i = 0; i < iterations; ++i) basis = orthonormal(at::mm(tall, orthonormal(at::mm(tall.t(), basis))));
  const auto [u, s, vt] = at::linalg_svd(at::mm(basis.t(), tall), /*full_matrices=*/false);
  const at::Tensor left = at::mm(basis, u), right = vt.t();
  return wide ? Svd{right, s, left} : Svd{left, s, right};
}

Factors factors_of(const Svd& svd, double scale) {
  const at::Tensor root_RR = at::diag((svd.s_R / scale).sqrt());
  return {.a_RI = at::mm(root_RR, svd.v_IR.t()).contiguous(), .b_OR = at::mm(svd.u_OR, root_RR).contiguous()};
}

}  // namespace

Init parse_init(const std::string& name) {
  const std::pair<const char*, InitKind> kinds[] = {{"kaiming", InitKind::kKaiming}, {"gaussian", InitKind::kGaussian}, {"false", InitKind::kRandom},
                                                    {"pissa", InitKind::kPissa},     {"olora", InitKind::kOlora}};
  for (const auto& [known, kind] : kinds)
    if (name == known) return {.kind = kind};
  if (name.starts_with(kIterated)) {
    Init init{.kind = InitKind::kPissa};
    const char* const begin = name.data() + kIterated.size();
    const char* const end = name.data() + name.size();
    const auto [stop, problem] = std::from_chars(begin, end, init.iterations);
    if (problem == std::errc() && stop == end && begin != end && *begin != '-' && init.iterations <= kMostIterations) return init;
    fail(ErrorKind::kUsage, "lora.init: \"", name, "\": behind pissa_niter_ a number of iterations from 0 to ", kMostIterations, " must stand, such as pissa_niter_16");
  }
  const std::string nearest = nearest_name(name, {"kaiming", "gaussian", "false", "pissa", "pissa_niter_16", "olora"});
  fail(ErrorKind::kUsage, "lora.init: \"", name, "\" must be kaiming, gaussian, false, pissa, pissa_niter_N or olora", nearest.empty() ? "" : "; did you mean \"" + nearest + "\"?");
}

Factors pissa_factors(const at::Tensor& weight_OI, std::int64_t rank, double scale) {
  const at::NoGradGuard no_gradients;
  const auto [u, s, vt] = at::linalg_svd(weight_OI.to(at::kFloat), /*full_matrices=*/false);
  return factors_of({u.narrow(1, 0, rank), s.narrow(0, 0, rank), vt.narrow(0, 0, rank).t()}, scale);
}

Factors pissa_factors(const at::Tensor& weight_OI, const at::Tensor& start_NR, double scale, std::int64_t iterations) {
  const at::NoGradGuard no_gradients;
  return factors_of(svd_lowrank(weight_OI.to(at::kFloat), start_NR, iterations), scale);
}

Factors olora_factors(const at::Tensor& weight_OI, std::int64_t rank) {
  const at::NoGradGuard no_gradients;
  const auto [q, r] = at::linalg_qr(weight_OI.to(at::kFloat));
  return {.a_RI = r.narrow(0, 0, rank).contiguous(), .b_OR = q.narrow(1, 0, rank).contiguous()};
}

at::Tensor residual_weight(const at::Tensor& weight_OI, const Factors& factors, double scale) {
  const at::NoGradGuard no_gradients;
  return (weight_OI.to(at::kFloat) - at::mm(factors.b_OR * scale, factors.a_RI)).to(weight_OI.scalar_type());
}

void initialise(models::Decoder& decoder, const LoraConfig& config, std::uint64_t seed, std::int64_t restart) {
  const at::NoGradGuard no_gradients;
  const Init init = parse_init(config.init);
  for (const models::NamedLinear& linear : decoder.linears()) {
    if (!linear.linear->adapter) continue;
    models::Adapter& adapter = *linear.linear->adapter;
    const auto weight_OI = [&] { return linear.linear->dense_OI(linear.linear->compute_type()); };  // as it is now
    const std::int64_t rank = adapter.a_RI.size(0), inputs = adapter.a_RI.size(1);
    // The restart is part of the purpose only after the first start, so that a run without restarts draws what it always drew.
    const auto seed_for = [&](const std::string& purpose) {
      return restart == 0 ? derive_seed(seed, purpose + linear.path) : derive_seed(seed, purpose + linear.path, {static_cast<std::uint64_t>(restart)});
    };
    // Drawn and decomposed by a processor, so that an adapter begins with the same bits wherever it trains.
    const auto uniform = [&](at::Tensor& tensor, std::int64_t fan_in, const std::string& purpose) {
      // Kaiming-uniform with a = sqrt(5): the bound is sqrt(2 / (1 + 5)) * sqrt(3 / fan_in) = 1 / sqrt(fan_in).
      const double bound = 1 / std::sqrt(static_cast<double>(fan_in));
      tensor.copy_(at::empty(tensor.sizes(), at::kFloat).uniform_(-bound, bound, generator_of(seed_for(purpose))));
    };
    if (init.changes_base()) {
      const auto start_NR = [&] { return at::randn({std::min(linear.linear->outputs(), inputs), rank}, generator_of(seed_for("pissa ")), at::kFloat); };
      const Factors factors = init.kind == InitKind::kOlora ? olora_factors(weight_OI().cpu(), rank)
                              : init.iterations < 0         ? pissa_factors(weight_OI().cpu(), rank, adapter.scale)
                                                            : pissa_factors(weight_OI().cpu(), start_NR(), adapter.scale, init.iterations);
      adapter.a_RI.copy_(factors.a_RI);
      adapter.b_OR.copy_(factors.b_OR);
      take_out_of_base(*linear.linear, factors);
    } else {
      if (init.kind == InitKind::kGaussian) adapter.a_RI.copy_(at::empty(adapter.a_RI.sizes(), at::kFloat).normal_(0, 1 / static_cast<double>(rank), generator_of(seed_for("lora_A "))));
      else uniform(adapter.a_RI, inputs, "lora_A ");
      if (init.kind == InitKind::kRandom) uniform(adapter.b_OR, rank, "lora_B ");
      else adapter.b_OR.zero_();
    }
    if (!adapter.magnitude_O.defined()) continue;
    if (init.changes_base() || init.kind == InitKind::kRandom) adapter.magnitude_O.copy_(models::adapted_row_norms(weight_OI(), adapter));
    else adapter.magnitude_O.copy_(at::linalg_vector_norm(weight_OI().to(at::kFloat), 2, at::IntArrayRef{1}));
  }
}

void merge_and_restart(models::Decoder& decoder, const LoraConfig& config, std::uint64_t seed, std::int64_t restart) {
  for (const models::NamedLinear& named : decoder.linears()) {
    models::Linear& linear = *named.linear;
    if (!linear.adapter) continue;
    if (linear.weight_OI.scalar_type() != at::kFloat || linear.adapter->magnitude_O.defined() || linear.adapter->initial_a_RI.defined())
      fail(ErrorKind::kBug, named.path, ": an adapter that cannot be merged and begun anew exactly");
    const at::NoGradGuard no_gradients;
    const at::Tensor merged_OI = merged_weight(linear.weight_OI, *linear.adapter);
    // In place, as other tensors may share the memory (models/fused_blocks.h); but a head that was tied parts from the embedding.
    if (named.layer >= 0) linear.weight_OI.copy_(merged_OI);
    else linear.weight_OI = merged_OI, decoder.head_tied = false;
  }
  initialise(decoder, config, seed, restart);
}

void take_out_of_base(models::Linear& linear, const Factors& given) {
  const at::NoGradGuard no_gradients;
  const Factors factors{.a_RI = given.a_RI.to(linear.device()), .b_OR = given.b_OR.to(linear.device())};
  models::Adapter& adapter = linear.adapter.value();
  // In place: other tensors may share the memory (models/fused_blocks.h).
  linear.weight_OI.copy_(residual_weight(linear.weight_OI, factors, adapter.scale));
  adapter.initial_a_RI = factors.a_RI;
  adapter.initial_b_OR = factors.b_OR;
}

}  // namespace alambic::lora
