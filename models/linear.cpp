// SPDX-License-Identifier: Apache-2.0
#include "models/linear.h"

#include <ATen/Parallel.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/norm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/tanh.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/random.h"
#include "models/device.h"
#include "models/product.h"
#include "models/token_rows.h"

namespace alambic::models {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class T>
void drop(const T* from, T* to, std::int64_t count, std::uint32_t threshold, float scale, std::uint64_t seed) {
  at::parallel_for(0, (count + 3) / 4, 1 << 13, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t four = begin; four < end; ++four) {
      const std::uint64_t bits = mix64(seed + static_cast<std::uint64_t>(four));
      const std::int64_t last = std::min<std::int64_t>(count, 4 * four + 4);
      for (std::int64_t i = 4 * four; i < last; ++i) {
        const bool keep = ((bits >> (16 * (i & 3))) & 0xffff) >= threshold;
        to[i] = static_cast<T>(keep ? static_cast<float>(from[i]) * scale : 0.0f);
      }
    }
  });
}

// Places among the arguments of forward() after the context, which are the places of their gradients.
enum Argument : std::size_t { kX, kWeight, kBias, kA, kB, kMagnitude, kNumArguments = 10 };

using Maybe = std::optional<at::Tensor>;
Maybe if_defined(const at::Tensor& tensor) { return tensor.defined() ? Maybe(tensor) : std::nullopt; }

// Keeps a quantised weight alive for the backward pass.
struct KeptWeight : torch::CustomClassHolder {
  explicit KeptWeight(std::shared_ptr<const FrozenWeight> kept) : weight(std::move(kept)) {}
  std::shared_ptr<const FrozenWeight> weight;
};
struct Quantized {
  std::shared_ptr<const FrozenWeight> weight;
  at::ScalarType type;
};

// This thread's memory for a matrix; it holds until the thread asks again.
at::Tensor in_buffer(std::int64_t rows, std::int64_t columns, at::ScalarType type, at::Device device) {
  thread_local at::Tensor buffer;  // of bytes
  const std::int64_t num_bytes = rows * columns * static_cast<std::int64_t>(c10::elementSize(type));
  if (!buffer.defined() || buffer.numel() < num_bytes || buffer.device() != device) {
    buffer = at::Tensor();  // before the larger one is there
    buffer = at::empty({num_bytes}, at::TensorOptions(at::kByte).device(device));
  }
  return buffer.narrow(0, 0, num_bytes).view(type).view({rows, columns});
}

// x W^T with some rows of W dense at a time, 32 MiB of f32 unless they are long: a head needs no more memory than any other layer, and oneDNN's copy of
// what it multiplies by is as small. Each output is the same sum. Parts are of about
// one size and begin at round rows, as libraries take other kernels for what is left over.
at::Tensor product_in_parts(const at::Tensor& x_TI, const at::Tensor& stored_OI) {
  constexpr std::int64_t kElements = 8 << 20, kFewestRows = 1024, kRound = 64;
  const std::int64_t outputs = stored_OI.size(0), inputs = stored_OI.size(1), most = std::max(kFewestRows, kElements / inputs), parts = (outputs + most - 1) / most;
  const at::Tensor y_TO = at::empty({x_TI.size(0), outputs}, x_TI.options());
  for (std::int64_t i = 0; i < parts; ++i) {
    const auto begin_of = [&](std::int64_t part) { return part == parts ? outputs : outputs * part / parts / kRound * kRound; };
    const std::int64_t first = begin_of(i), count = begin_of(i + 1) - first;
    const at::Tensor part_CI = in_buffer(count, inputs, x_TI.scalar_type(), x_TI.device());
    part_CI.copy_(stored_OI.narrow(0, first, count));
    const at::Tensor y_TC = product(x_TI, part_CI.t());
    if (parts == 1) return y_TC;
    y_TO.narrow(1, first, count).copy_(y_TC);
  }
  return y_TO;
}

struct AdaptedLinear : torch::autograd::Function<AdaptedLinear> {
  // a and b are there with an adapter, magnitude with DoRA; either weight or quantized. z is dropout(x), u is z A^T.
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x_TI, const Maybe& weight, const Maybe& bias, const Maybe& a,
                            const Maybe& b, const Maybe& magnitude, const Quantized& quantized, double scale, double dropout, std::uint64_t seed) {
    const at::Tensor stored_OI = weight || magnitude ? at::Tensor() : quantized.weight->stored_OI();  // DoRA needs the norms of whole rows
    const at::Tensor weight_OI = weight ? *weight : stored_OI.defined() ? at::Tensor() : dense_in_buffer(*quantized.weight, quantized.type);
    const at::Tensor bias_O = bias.value_or(at::Tensor()), a_RI = a.value_or(at::Tensor()), b_OR = b.value_or(at::Tensor());
    const at::Tensor magnitude_O = magnitude.value_or(at::Tensor());
    const at::ScalarType type = weight ? weight->scalar_type() : quantized.type;
    const auto times_weight = [&](const at::Tensor& z_TI) { return stored_OI.defined() ? product_in_parts(z_TI, stored_OI) : product(z_TI, weight_OI.t()); };
    const at::Tensor xc_TI = x_TI.to(type);
    at::Tensor y_TO, u_TR, before_magnitude_TO, ratio_O;
    if (!a_RI.defined()) {
      y_TO = times_weight(xc_TI);
      if (bias_O.defined()) y_TO.add_(bias_O);
    } else {
      const at::Tensor z_TI = dropout > 0 ? with_dropout(xc_TI, dropout, seed) : xc_TI;
      u_TR = product(z_TI, a_RI.to(type).t());
      const at::Tensor bt_RO = b_OR.to(type).t();
      if (!magnitude_O.defined()) {
        y_TO = times_weight(xc_TI);
        if (bias_O.defined()) y_TO.add_(bias_O);
        y_TO.addmm_(u_TR, bt_RO, 1, scale);
      } else {
        Adapter adapter{.a_RI = a_RI, .b_OR = b_OR, .magnitude_O = magnitude_O, .scale = scale};
        ratio_O = magnitude_O / adapted_row_norms(weight_OI, adapter);
        const at::Tensor base_TO = product(z_TI, weight_OI.t());
        before_magnitude_TO = at::addmm(base_TO, u_TR, bt_RO, 1, scale);
        y_TO = before_magnitude_TO * ratio_O.to(type);
        if (dropout > 0) y_TO.add_(product(xc_TI, weight_OI.t())).sub_(base_TO);
        if (bias_O.defined()) y_TO.add_(bias_O);
      }
    }
    // x is kept as it entered the product (converted, where it was converted), and only where a gradient will ask for it.
    const bool keeps_x = (weight && weight->requires_grad()) || (a_RI.defined() && a_RI.requires_grad());
    const bool trains_magnitude = magnitude_O.defined() && magnitude_O.requires_grad();
    context->save_for_backward({keeps_x ? xc_TI : at::Tensor(), weight.value_or(at::Tensor()), a_RI, b_OR, u_TR,
                                trains_magnitude ? before_magnitude_TO : at::Tensor(), magnitude_O, ratio_O});
    if (!weight) context->saved_data["quantized"] = c10::IValue::make_capsule(c10::make_intrusive<KeptWeight>(quantized.weight));
    context->saved_data["type"] = static_cast<std::int64_t>(type);
    context->saved_data["scale"] = scale;
    context->saved_data["dropout"] = dropout;
    context->saved_data["seed"] = static_cast<std::int64_t>(seed);
    context->saved_data["x_type"] = static_cast<std::int64_t>(x_TI.scalar_type());
    if (bias_O.defined()) context->saved_data["bias_type"] = static_cast<std::int64_t>(bias_O.scalar_type());
    return y_TO;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const at::Tensor &xc_TI = saved[0], &a_RI = saved[2], &b_OR = saved[3], &u_TR = saved[4];
    const at::Tensor &before_magnitude_TO = saved[5], &magnitude_O = saved[6], &ratio_O = saved[7];
    const double scale = context->saved_data["scale"].toDouble(), dropout = context->saved_data["dropout"].toDouble();
    const auto seed = static_cast<std::uint64_t>(context->saved_data["seed"].toInt());
    const auto x_type = static_cast<at::ScalarType>(context->saved_data["x_type"].toInt());
    const auto type = static_cast<at::ScalarType>(context->saved_data["type"].toInt());
    const bool is_quantized = !saved[1].defined();
    // Autograd numbers only the tensors that are there.
    std::size_t edge = 0;
    const auto is_needed = [&](bool is_there) { return is_there && context->needs_input_grad(edge++); };
    const auto bias_type = context->saved_data.find("bias_type");
    const bool needs_x = is_needed(true), needs_weight = is_needed(!is_quantized), needs_bias = is_needed(bias_type != context->saved_data.end());
    const bool needs_a = is_needed(a_RI.defined()), needs_b = is_needed(b_OR.defined()), needs_magnitude = is_needed(magnitude_O.defined());

    at::Tensor weight_OI = saved[1];
    if (is_quantized && (needs_x || needs_magnitude))
      weight_OI = dense_in_buffer(*static_cast<const KeptWeight&>(*context->saved_data["quantized"].toCapsule()).weight, type);
    const at::Tensor g_TO = gradients[0].to(type);
    variable_list result(kNumArguments);
    if (needs_bias) result[kBias] = at::sum(g_TO, 0, false, at::kFloat).to(static_cast<at::ScalarType>(bias_type->second.toInt()));

    // gm: the gradient as it reaches x W^T + scale u B^T, that is, past DoRA's magnitude.
    const at::Tensor gm_TO = ratio_O.defined() ? g_TO * ratio_O.to(type) : g_TO;
    if (needs_magnitude)
      // d y / d m = (x W^T + ...) / n, and 1 / n = ratio / m; n is made again rather than divided out, as m may be 0.
      result[kMagnitude] = at::sum(g_TO * before_magnitude_TO, 0, false, at::kFloat) /
                           adapted_row_norms(weight_OI, {.a_RI = a_RI, .b_OR = b_OR, .magnitude_O = magnitude_O, .scale = scale});

    at::Tensor v_TR;  // the gradient of u
    if (a_RI.defined() && (needs_x || needs_a)) v_TR = product(gm_TO, b_OR.to(type)).mul_(scale);
    if (needs_b) result[kB] = product(gm_TO.t(), u_TR).to(at::kFloat).mul_(scale);
    if (needs_a) {
      const at::Tensor z_TI = dropout > 0 ? with_dropout(xc_TI, dropout, seed) : xc_TI;
      result[kA] = product(v_TR.t(), z_TI).to(at::kFloat);
    }
    if (needs_weight) {
      if (ratio_O.defined() && dropout > 0) {
        result[kWeight] = product(g_TO.t(), xc_TI).addmm_((gm_TO - g_TO).t(), with_dropout(xc_TI, dropout, seed));
      } else {
        result[kWeight] = product(gm_TO.t(), xc_TI);
      }
    }
    if (needs_x) {
      at::Tensor dx_TI;
      if (!a_RI.defined()) {
        dx_TI = product(g_TO, weight_OI);
      } else if (dropout == 0) {
        dx_TI = product(gm_TO, weight_OI).addmm_(v_TR, a_RI.to(type));
      } else {
        at::Tensor dz_TI = product(v_TR, a_RI.to(type));
        if (ratio_O.defined()) dz_TI.addmm_(gm_TO - g_TO, weight_OI);
        dx_TI = product(g_TO, weight_OI).add_(with_dropout(dz_TI, dropout, seed));
      }
      result[kX] = dx_TI.to(x_type);
    }
    return result;
  }
};

}  // namespace

at::Tensor with_dropout(const at::Tensor& x_TI, double probability, std::uint64_t seed) {
  if (!(probability >= 0 && probability < 1)) fail(ErrorKind::kUsage, "dropout must be at least 0 and below 1, got ", probability);
  if (!x_TI.is_cpu()) return dropout_by_operators(x_TI, probability, seed);
  const at::Tensor from_TI = x_TI.detach().contiguous();
  at::Tensor to_TI = at::empty_like(from_TI);
  const auto threshold = static_cast<std::uint32_t>(std::lround(probability * 65536));
  const auto scale = static_cast<float>(1 / (1 - probability));
  if (from_TI.scalar_type() == at::kBFloat16)
    drop(from_TI.const_data_ptr<at::BFloat16>(), to_TI.mutable_data_ptr<at::BFloat16>(), from_TI.numel(), threshold, scale, seed);
  else
    drop(from_TI.const_data_ptr<float>(), to_TI.mutable_data_ptr<float>(), from_TI.numel(), threshold, scale, seed);
  return to_TI;
}

at::Tensor dropout_by_operators(const at::Tensor& x_TI, double probability, std::uint64_t seed) {
  const at::NoGradGuard no_grad;
  const at::Tensor kept_TI = at::empty_like(x_TI.detach(), at::MemoryFormat::Contiguous).bernoulli_(1 - probability, generator_on(x_TI.device(), seed));
  return kept_TI.mul_(x_TI).mul_(1 / (1 - probability));  // 0 or x first, so that only the last product is rounded
}

at::Tensor adapted_row_norms(const at::Tensor& weight_OI, const Adapter& adapter) {
  const at::NoGradGuard constant;
  return at::norm(at::addmm(weight_OI.to(at::kFloat), adapter.b_OR, adapter.a_RI, 1, adapter.scale), 2, {1});
}

at::Tensor dense_in_buffer(const FrozenWeight& weight, at::ScalarType type) {
  const at::Tensor dense_OI = in_buffer(weight.outputs(), weight.inputs(), type, weight.device());
  weight.dense_into(dense_OI);
  return dense_OI;
}

std::int64_t Linear::outputs() const { return quantized ? quantized->outputs() : weight_OI.size(0); }
std::int64_t Linear::inputs() const { return quantized ? quantized->inputs() : weight_OI.size(1); }
at::ScalarType Linear::compute_type() const { return quantized ? quantized_compute : weight_OI.scalar_type(); }

at::Device Linear::device() const { return quantized ? quantized->device() : weight_OI.device(); }

at::Tensor Linear::dense_OI(at::ScalarType type) const {
  if (!quantized) return weight_OI.to(type);
  const at::Tensor made_OI = at::empty({outputs(), inputs()}, at::TensorOptions(type).device(device()));
  quantized->dense_into(made_OI);
  return made_OI;
}

at::Tensor soft_cap_in_place(at::Tensor& y_TO, double cap, bool wants_slope) {
  at::Tensor share_TO = y_TO.scalar_type() == at::kFloat ? y_TO : y_TO.to(at::kFloat);  // of the cap
  share_TO.div_(cap).tanh_();
  const at::Tensor slope_TO = wants_slope ? share_TO.square().neg_().add_(1).to(y_TO.scalar_type()) : at::Tensor();
  share_TO.mul_(cap);
  if (!share_TO.is_same(y_TO)) y_TO.copy_(share_TO);
  return slope_TO;
}

at::Tensor Linear::operator()(const at::Tensor& x_TI, std::uint64_t dropout_seed) const {
  at::Tensor y_TO = uncapped(x_TI, dropout_seed);
  if (soft_cap == 0) return y_TO;
  if (y_TO.requires_grad()) return (at::tanh(y_TO.to(at::kFloat) / soft_cap) * soft_cap).to(y_TO.scalar_type());
  soft_cap_in_place(y_TO, soft_cap, /*wants_slope=*/false);
  return y_TO;
}

at::Tensor Linear::uncapped(const at::Tensor& x_TI, std::uint64_t dropout_seed) const {
  if (input_squares_I.defined()) at::Tensor(input_squares_I).add_(x_TI.detach().to(at::kFloat).square().sum(0, false, at::kDouble));
  const Maybe bias = if_defined(bias_O), weight = quantized ? Maybe() : Maybe(weight_OI);
  if (token_rows_ND.defined()) {
    const Linear plain{.weight_OI = weight_OI, .bias_O = bias_O, .adapter = adapter, .quantized = quantized, .quantized_compute = quantized_compute};
    return with_token_columns(plain(x_TI, dropout_seed), x_TI, token_rows_ND, token_row_ids, bias_O);
  }
  const Quantized frozen{.weight = quantized, .type = quantized_compute};
  if (!adapter) return AdaptedLinear::apply(x_TI, weight, bias, Maybe(), Maybe(), Maybe(), frozen, 1.0, 0.0, std::uint64_t{0});
  const double dropout = dropout_seed == 0 ? 0 : adapter->dropout;
  const std::uint64_t seed = dropout > 0 ? derive_seed(dropout_seed, "adapter", {adapter->id}) : 0;
  return AdaptedLinear::apply(x_TI, weight, bias, Maybe(adapter->a_RI), Maybe(adapter->b_OR), if_defined(adapter->magnitude_O), frozen,
                              adapter->scale, dropout, seed);
}

}  // namespace alambic::models
