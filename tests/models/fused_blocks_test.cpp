// SPDX-License-Identifier: Apache-2.0
// The fused blocks against transformers (every family's golden) and against the ATen path: values, every gradient, every
// memory policy, packed documents of odd lengths, adapters with and without dropout, partly trained decoders.
#include "models/fused_blocks.h"

#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/sin.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include "core/random.h"
#include "models/rope.h"
#include "tests/closeness.h"
#include "tests/counted_products.h"
#include "tests/forked_ranks.h"
#include "tests/models/tiny_model.h"
#include "tests/support.h"

namespace alambic::models {
namespace {

using testing::decoder_of;
using testing::Golden;
using testing::input_of;
using testing::is_close_to_scale;

// Uneven values in about +-size that depend on `seed` alone.
at::Tensor uneven(std::vector<std::int64_t> sizes, double seed, double size = 0.3) {
  std::int64_t count = 1;
  for (const std::int64_t each : sizes) count *= each;
  return (at::sin(at::arange(count, at::kDouble) * 1.7 + seed) * size).reshape(sizes).to(at::kFloat);
}

// Adapters of rank 3 (2 on every third projection) on the projections that `adapted` chooses.
void attach(Decoder& decoder, double dropout, const std::function<bool(const NamedLinear&)>& adapted = [](const NamedLinear&) { return true; }) {
  std::uint64_t id = 0;
  for (const NamedTensor& named : decoder.tensors()) named.tensor->requires_grad_(false);
  for (const NamedLinear& linear : decoder.linears()) {
    if (linear.layer < 0) continue;
    ++id;
    if (!adapted(linear)) continue;
    const std::int64_t rank = id % 3 == 0 ? 2 : 3;
    const auto seed = static_cast<double>(id);
    linear.linear->adapter = Adapter{.a_RI = uneven({rank, linear.linear->weight_OI.size(1)}, seed).requires_grad_(true),
                                     .b_OR = uneven({linear.linear->weight_OI.size(0), rank}, seed + 0.5).requires_grad_(true),
                                     .magnitude_O = {}, .scale = 0.7, .dropout = dropout, .id = id};
  }
}

Input packed_input(const Decoder& decoder, const std::vector<std::int64_t>& lengths, std::uint64_t dropout_seed) {
  Input input;
  std::vector<at::Tensor> positions;
  std::int64_t tokens = 0;
  for (const std::int64_t length : lengths) positions.push_back(at::arange(length, at::kLong)), tokens += length;
  input.positions_T = at::cat(positions);
  input.tokens_T = at::arange(tokens, at::kLong) * 7919 % decoder.config.vocabulary_size;
  input.document_lengths = lengths;
  input.dropout_seed = dropout_seed;
  return input;
}

std::vector<std::pair<std::string, at::Tensor*>> trained(Decoder& decoder) {
  std::vector<std::pair<std::string, at::Tensor*>> list;
  for (const NamedTensor& named : decoder.tensors())
    if (named.tensor->requires_grad()) list.emplace_back(named.name, named.tensor);
  for (const NamedLinear& linear : decoder.linears())
    if (linear.linear->adapter) list.emplace_back(linear.path + ".A", &linear.linear->adapter->a_RI), list.emplace_back(linear.path + ".B", &linear.linear->adapter->b_OR);
  return list;
}

// A value of the hidden states that makes each of them matter, backwards through them.
at::Tensor run(Decoder& decoder, const Input& input, std::vector<at::Tensor>* gradients = nullptr) {
  const at::Tensor hidden_TD = decoder.hidden_TD(input);
  if (gradients == nullptr) return hidden_TD.detach();
  for (const auto& [name, tensor] : trained(decoder)) tensor->mutable_grad().reset();
  (hidden_TD.to(at::kFloat) * uneven(hidden_TD.sizes().vec(), 2, 1)).sum().backward();
  gradients->clear();
  for (const auto& [name, tensor] : trained(decoder)) gradients->push_back(tensor->grad().defined() ? tensor->grad().clone() : at::Tensor());
  return hidden_TD.detach();
}

// The decoder's mathematics in f64, as plainly as it can be written: the reference whose gradients finite differences give.
at::Tensor plain_hidden_TD(Decoder& decoder, const Input& input) {
  const ModelConfig& config = decoder.config;
  const Family& family = *config.family;
  const auto wide = [](const at::Tensor& tensor) { return tensor.detach().to(at::kDouble); };
  const auto project = [&](const Linear& linear, const at::Tensor& x) {
    at::Tensor y = at::matmul(x, wide(linear.weight_OI).t());
    if (linear.adapter) {
      const Adapter& adapter = *linear.adapter;
      // The mask is a function of seed and place alone.
      const at::Tensor z = input.dropout_seed == 0 ? x : x * wide(with_dropout(at::ones(x.sizes(), at::kFloat), adapter.dropout, derive_seed(input.dropout_seed, "adapter", {adapter.id})));
      y = y + at::matmul(at::matmul(z, wide(adapter.a_RI).t()), wide(adapter.b_OR).t()) * adapter.scale;
    }
    return linear.bias_O.defined() ? y + wide(linear.bias_O) : y;
  };
  const auto norm = [&](const at::Tensor& x, const at::Tensor& weight) {
    return x / (x.square().mean(-1, true) + config.norm_epsilon).sqrt() * (wide(weight) + family.norm_weight_offset);
  };
  const auto rotate = [&](const at::Tensor& x_THS, const Rope& rope) {
    const RotaryTable table = rotary_table(rope, input.positions_T, input.document_lengths);
    const at::Tensor c = wide(table.cos_T1F), s = wide(table.sin_T1F);
    const std::int64_t pairs = c.size(2), rest = x_THS.size(2) - 2 * pairs;
    const at::Tensor a = x_THS.narrow(2, 0, pairs), b = x_THS.narrow(2, pairs, pairs);
    return at::cat({a * c - b * s, b * c + a * s, x_THS.narrow(2, 2 * pairs, rest)}, 2);
  };
  at::Tensor h = wide(decoder.embedding_VD).index_select(0, input.tokens_T);
  if (family.scale_embedding) h = h * std::sqrt(static_cast<double>(config.hidden_size));
  for (std::size_t layer = 0; layer < decoder.blocks.size(); ++layer) {
    const Block& block = decoder.blocks[layer];
    const LayerConfig& kind = config.layers[layer];
    const auto has = [&](Slot slot) { return block.norms.contains(slot); };
    const at::Tensor n = norm(h, block.norms.at(Slot::kAttentionNorm));
    const std::int64_t S = config.head_size, queries = config.num_heads * S, keys = config.num_kv_heads * S;
    at::Tensor q, k, v;
    if (family.has(Slot::kQueryKeyValue)) {
      const at::Tensor all = project(block.linears.at(Slot::kQueryKeyValue), n);
      q = all.narrow(1, 0, queries), k = all.narrow(1, queries, keys), v = all.narrow(1, queries + keys, keys);
    } else {
      q = project(block.linears.at(Slot::kQuery), n), k = project(block.linears.at(Slot::kKey), n), v = project(block.linears.at(Slot::kValue), n);
    }
    q = q.unflatten(1, {-1, S}), k = k.unflatten(1, {-1, S}), v = v.unflatten(1, {-1, S});
    if (has(Slot::kQueryNorm)) q = norm(q, block.norms.at(Slot::kQueryNorm));
    if (has(Slot::kKeyNorm)) k = norm(k, block.norms.at(Slot::kKeyNorm));
    if (kind.use_rope) q = rotate(q, kind.local_rope ? config.local_rope : config.rope), k = rotate(k, kind.local_rope ? config.local_rope : config.rope);
    std::vector<at::Tensor> documents;
    std::int64_t first = 0;
    for (const std::int64_t length : input.document_lengths) {
      const at::Tensor distance = at::arange(length).unsqueeze(1) - at::arange(length).unsqueeze(0);
      at::Tensor unseen = distance < 0;
      if (kind.window > 0) unseen = unseen.logical_or(distance >= kind.window);
      std::vector<at::Tensor> heads;
      for (std::int64_t head = 0; head < config.num_heads; ++head) {
        const auto part = [&](const at::Tensor& x, std::int64_t number) { return x.select(1, number).narrow(0, first, length); };
        const std::int64_t shared = head / (config.num_heads / config.num_kv_heads);
        at::Tensor scores = at::matmul(part(q, head), part(k, shared).t()) * config.attention_scale;
        if (config.attention_soft_cap > 0) scores = at::tanh(scores / config.attention_soft_cap) * config.attention_soft_cap;
        heads.push_back(at::matmul(at::softmax(scores.masked_fill(unseen, -INFINITY), 1), part(v, shared)));
      }
      documents.push_back(at::cat(heads, 1));
      first += length;
    }
    at::Tensor y = project(block.linears.at(Slot::kOutput), at::cat(documents));
    h = h + (has(Slot::kAfterAttentionNorm) ? norm(y, block.norms.at(Slot::kAfterAttentionNorm)) : y);
    const at::Tensor m = norm(h, block.norms.at(Slot::kMlpNorm));
    at::Tensor gate, up;
    if (family.has(Slot::kGateUp)) {
      const at::Tensor both = project(block.linears.at(Slot::kGateUp), m);
      gate = both.narrow(1, 0, config.intermediate_size), up = both.narrow(1, config.intermediate_size, config.intermediate_size);
    } else {
      gate = project(block.linears.at(Slot::kGate), m), up = project(block.linears.at(Slot::kUp), m);
    }
    y = project(block.linears.at(Slot::kDown), (config.gelu_tanh ? at::gelu(gate, "tanh") : at::silu(gate)) * up);
    h = h + (has(Slot::kAfterMlpNorm) ? norm(y, block.norms.at(Slot::kAfterMlpNorm)) : y);
  }
  return norm(h, decoder.final_norm_D);
}

constexpr Keep kPolicies[] = {Keep::kAll, Keep::kNoMlp, Keep::kInputs};

class FusedFamily : public ::testing::TestWithParam<std::string> {
 protected:
  FusedFamily() : golden_("families/" + GetParam() + ".safetensors") {}

  // Both paths on the same weights; every policy gives the same bits.
  void compare(const std::function<void(Decoder&)>& prepare, const Input& input, at::ScalarType type, double value_tolerance, double gradient_tolerance) {
    Decoder plain = decoder_of(golden_, type), fused = decoder_of(golden_, type);
    prepare(plain);
    prepare(fused);
    ASSERT_EQ(use_fused_blocks(fused), "");
    std::vector<at::Tensor> expected, first, gradients;
    const at::Tensor expected_TD = run(plain, input, &expected);
    for (const Keep keep : kPolicies) {
      fused.keep = keep;
      const at::Tensor hidden_TD = run(fused, input, &gradients);
      if (keep == Keep::kAll) {
        EXPECT_TRUE(is_close_to_scale(hidden_TD, expected_TD, value_tolerance));
        first = gradients;
      }
      const auto list = trained(fused);
      ASSERT_EQ(list.size(), expected.size());
      for (std::size_t i = 0; i < list.size(); ++i) {
        if (!expected[i].defined() || expected[i].abs().max().item<double>() == 0) continue;  // a head that hidden states do not meet
        ASSERT_TRUE(gradients[i].defined()) << list[i].first;
        EXPECT_TRUE(is_close_to_scale(gradients[i], expected[i], gradient_tolerance)) << list[i].first;
        EXPECT_TRUE(at::equal(gradients[i], first[i])) << list[i].first << " differs with another memory policy";
      }
    }
    const at::NoGradGuard constant;
    EXPECT_TRUE(at::equal(run(fused, input), run(fused, input)));
  }

  Golden golden_;
};
INSTANTIATE_TEST_SUITE_P(Families, FusedFamily, ::testing::ValuesIn(testing::family_goldens()), [](const auto& test) { return test.param; });

TEST_P(FusedFamily, LogitsAndEveryGradientEqualTransformers) {
  SCOPED_TRACE(golden_.provenance());
  for (const Keep keep : kPolicies) {
    Decoder decoder = decoder_of(golden_);
    for (const NamedTensor& named : decoder.tensors()) named.tensor->requires_grad_(true);
    ASSERT_EQ(use_fused_blocks(decoder), "");
    decoder.keep = keep;
    const at::Tensor logits_TV = decoder.logits_TV(decoder.hidden_TD(input_of(golden_)));
    EXPECT_TRUE(is_close_to_scale(logits_TV, golden_["logits"], 1e-5));
    (at::cross_entropy_loss(logits_TV, golden_["targets"], {}, 0) * golden_["weights"]).sum().backward();
    for (const NamedTensor& named : decoder.tensors()) EXPECT_TRUE(is_close_to_scale(named.tensor->grad(), golden_["grad." + named.name], 1e-5)) << named.name;
  }
}

const std::vector<std::int64_t> kOddLengths = {70, 1, 33, 5, 131, 64};

TEST_P(FusedFamily, AdaptersEqualTheAtenPath) {
  compare([](Decoder& decoder) { attach(decoder, 0); }, packed_input(decoder_of(golden_), kOddLengths, 0), at::kFloat, 1e-5, 2e-5);
}

TEST_P(FusedFamily, GradientsAreTheFiniteDifferencesOfTheFormulaInDouble) {
  for (const double dropout : {0.0, 0.25}) {
    Decoder decoder = decoder_of(golden_);
    attach(decoder, dropout);
    for (const NamedTensor& named : decoder.tensors()) named.tensor->requires_grad_(true);
    ASSERT_EQ(use_fused_blocks(decoder), "");
    const Input input = packed_input(decoder, {13, 1, 6}, dropout > 0 ? 77 : 0);
    std::vector<at::Tensor> gradients, again;
    const at::Tensor hidden_TD = run(decoder, input, &gradients);
    const auto list = trained(decoder);
    for (const Keep keep : {Keep::kNoMlp, Keep::kInputs}) {
      decoder.keep = keep;
      run(decoder, input, &again);
      for (std::size_t i = 0; i < list.size(); ++i) EXPECT_TRUE(!gradients[i].defined() || at::equal(again[i], gradients[i])) << list[i].first << " differs with memory policy " << static_cast<int>(keep);
    }
    const at::NoGradGuard constant;
    EXPECT_TRUE(is_close_to_scale(hidden_TD, plain_hidden_TD(decoder, input), 1e-5));
    const at::Tensor weights_TD = uneven(hidden_TD.sizes().vec(), 2, 1).to(at::kDouble);
    for (std::size_t i = 0; i < list.size(); ++i) {
      if (!gradients[i].defined()) continue;  // a head that hidden states do not meet
      at::Tensor& tensor = *list[i].second;
      const at::Tensor before = tensor.detach().clone(), direction = uneven(before.sizes().vec(), 3 + static_cast<double>(i), 1);
      // The step is exact in f32, so that the formula sees just this step; the formula itself is f64.
      const auto value = [&](double step) {
        tensor.detach().copy_(before + direction * step);
        const at::Tensor moved = (tensor.detach() - before).to(at::kDouble);
        return std::pair{(plain_hidden_TD(decoder, input) * weights_TD).sum().item<double>(), moved};
      };
      const auto [above, up] = value(1e-3);
      const auto [below, down] = value(-1e-3);
      tensor.detach().copy_(before);
      const at::Tensor wide = gradients[i].to(at::kDouble);
      const double expected = (wide * (up - down)).sum().item<double>(), scale = wide.norm().item<double>() * (up - down).norm().item<double>();
      EXPECT_NEAR(above - below, expected, 2e-3 * scale + 1e-9) << list[i].first << ", dropout " << dropout;
    }
  }
}

TEST_P(FusedFamily, AdaptersWithDropoutEqualTheAtenPath) {
  compare([](Decoder& decoder) { attach(decoder, 0.25); }, packed_input(decoder_of(golden_), kOddLengths, 77), at::kFloat, 1e-5, 2e-5);
}

TEST_P(FusedFamily, EveryPolicyGivesTheSameBits) {
  const auto gradients_of = [&](Decoder& decoder, Keep keep, std::uint64_t seed) {
    decoder.keep = keep;
    std::vector<at::Tensor> gradients;
    gradients.push_back(run(decoder, packed_input(decoder, kOddLengths, seed), &gradients));
    return gradients;
  };
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16})
    for (const bool trains_all : {false, true}) {
      if (trains_all && type == at::kBFloat16) continue;  // a weight that trains is its own f32 master
      Decoder decoder = decoder_of(golden_, type);
      if (!trains_all) attach(decoder, 0.25);
      for (const NamedTensor& named : decoder.tensors())
        if (trains_all) named.tensor->requires_grad_(true);
      ASSERT_EQ(use_fused_blocks(decoder), "");
      const std::vector<at::Tensor> stored = gradients_of(decoder, Keep::kAll, 77);
      std::size_t idle = 0;  // an untied head, which hidden states do not meet
      for (const at::Tensor& each : stored) idle += !each.defined() || each.abs().max().item<double>() == 0;
      EXPECT_EQ(idle, trains_all && !decoder.head_tied ? 1u : 0u);
      for (const Keep keep : {Keep::kNoMlp, Keep::kInputs}) {
        const std::vector<at::Tensor> again = gradients_of(decoder, keep, 77);
        ASSERT_EQ(again.size(), stored.size());
        for (std::size_t i = 0; i < stored.size(); ++i) EXPECT_TRUE(stored[i].defined() == again[i].defined() && (!stored[i].defined() || at::equal(stored[i], again[i]))) << toString(type) << " " << i;
      }
      if (!trains_all) {
        EXPECT_FALSE(at::equal(stored.back(), gradients_of(decoder, Keep::kAll, 78).back())) << "no dropout";
      }
    }
}

// Products of whole matrices that the backward pass makes when the adapters of one group train: those that bring the gradient to it, and none below.
TEST_P(FusedFamily, NothingIsMultipliedBelowWhatTrains) {
  for (const auto& [slots, expected] : std::vector<std::pair<std::vector<Slot>, int>>{
           {{Slot::kDown}, 0}, {{Slot::kGate, Slot::kUp, Slot::kGateUp}, 1}, {{Slot::kOutput}, 2}, {{Slot::kQuery, Slot::kKey, Slot::kValue, Slot::kQueryKeyValue}, 3}}) {
    Decoder decoder = decoder_of(golden_);
    const auto last = static_cast<std::int64_t>(decoder.blocks.size()) - 1;
    attach(decoder, 0, [&, &chosen = slots](const NamedLinear& linear) { return linear.layer == last && std::find(chosen.begin(), chosen.end(), linear.slot) != chosen.end(); });
    ASSERT_EQ(use_fused_blocks(decoder), "");
    const at::Tensor hidden_TD = decoder.hidden_TD(packed_input(decoder, {64}, 0));
    EXPECT_EQ(testing::products_of([&] { hidden_TD.sum().backward(); }), expected) << "slot " << static_cast<int>(slots[0]);
  }
}

// Both bf16 paths round some ten values a layer, at other places; neither may be further from f32 than the other.
TEST_P(FusedFamily, Bf16IsAsNearToF32AsTheAtenPath) {
  const Input input = packed_input(decoder_of(golden_), kOddLengths, 0);
  const auto gradients_of = [&](at::ScalarType type, bool fused, at::Tensor& hidden_TD) {
    Decoder decoder = decoder_of(golden_, type);
    attach(decoder, 0);
    if (fused) {
      EXPECT_EQ(use_fused_blocks(decoder), "");
    }
    std::vector<at::Tensor> gradients;
    hidden_TD = run(decoder, input, &gradients).to(at::kFloat);
    return gradients;
  };
  at::Tensor exact_TD, plain_TD, fused_TD;
  const std::vector<at::Tensor> exact = gradients_of(at::kFloat, false, exact_TD), plain = gradients_of(at::kBFloat16, false, plain_TD), fused = gradients_of(at::kBFloat16, true, fused_TD);
  const auto error = [](const at::Tensor& actual, const at::Tensor& expected) { return ((actual - expected).norm() / expected.norm()).item<double>(); };
  EXPECT_LT(error(fused_TD, exact_TD), 1.3 * error(plain_TD, exact_TD));
  EXPECT_LT(error(plain_TD, exact_TD), 0.05);
  double fused_error = 0, plain_error = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    fused_error += error(fused[i], exact[i]) / static_cast<double>(exact.size());
    plain_error += error(plain[i], exact[i]) / static_cast<double>(exact.size());
  }
  EXPECT_LT(fused_error, 1.3 * plain_error);
  EXPECT_GT(fused_error, 1e-4) << "suspiciously equal: was bf16 used?";
}

TEST_P(FusedFamily, PartlyTrainedDecodersEqualTheAtenPath) {
  const Input input = packed_input(decoder_of(golden_), {9, 40}, 0);
  const auto last = static_cast<std::int64_t>(decoder_of(golden_).blocks.size()) - 1;
  const auto is_in = [](Slot slot, std::initializer_list<Slot> slots) { return std::find(slots.begin(), slots.end(), slot) != slots.end(); };
  compare([&](Decoder& decoder) { attach(decoder, 0, [&](const NamedLinear& linear) { return linear.layer == last; }); }, input, at::kFloat, 1e-5, 2e-5);
  compare([&](Decoder& decoder) { attach(decoder, 0, [&](const NamedLinear& linear) { return linear.slot == Slot::kDown; }); }, input, at::kFloat, 1e-5, 2e-5);
  compare([&](Decoder& decoder) { attach(decoder, 0, [&](const NamedLinear& linear) { return is_in(linear.slot, {Slot::kQuery, Slot::kValue, Slot::kQueryKeyValue}); }); }, input,
          at::kFloat, 1e-5, 2e-5);
  compare(
      [&](Decoder& decoder) {
        attach(decoder, 0, [&](const NamedLinear& linear) { return linear.slot == Slot::kOutput; });
        decoder.embedding_VD.requires_grad_(true);
        for (Block& block : decoder.blocks)
          for (auto& [slot, norm] : block.norms) norm.requires_grad_(true);
      },
      input, at::kFloat, 1e-5, 2e-5);
}

// On 2 and 4 ranks: hidden states of each one's tokens, and gradients that add up to those of one rank, with the same masks and noise.
TEST_P(FusedFamily, ASharedRowGivesWhatOneRankGives) {
  for (const int size : {2, 4})
    testing::expect_all_fine(testing::run_ranks(size, testing::kPatient, [&](parallel::Communicator& ranks) -> std::string {
      at::set_num_threads(1);
      for (const bool full : {false, true}) {
        Decoder decoder = decoder_of(golden_);
        attach(decoder, full ? 0 : 0.25);
        if (full)
          for (const NamedTensor& named : decoder.tensors()) named.tensor->requires_grad_(true);
        if (const std::string why = use_fused_blocks(decoder); !why.empty()) return why;
        Input whole = packed_input(decoder, {3, 370, 1, 90, 33}, 77);
        whole.neftune_alpha = 5;
        std::vector<at::Tensor> expected;
        const at::Tensor hidden_TD = run(decoder, whole, &expected), weights_TD = uneven(hidden_TD.sizes().vec(), 2, 1);

        const SharedRow row({.ranks = &ranks, .size = size, .member = ranks.rank()}, whole.document_lengths);
        Input own = whole;
        own.tokens_T = row.own(whole.tokens_T), own.positions_T = row.own(row.positions_T()), own.document_lengths = row.document_lengths(), own.shared = &row;
        std::vector<at::Tensor> first;
        for (const Keep keep : kPolicies) {
          decoder.keep = keep;
          for (const auto& [name, tensor] : trained(decoder)) tensor->mutable_grad().reset();
          const at::Tensor own_TD = decoder.hidden_TD(own);
          // Padding is no one's: its states are not looked at, and have no gradient.
          const at::Tensor real_T1 = row.own(at::ones({hidden_TD.size(0), 1}, at::kFloat));
          if (const auto close = testing::is_close(own_TD * real_T1, row.own(hidden_TD), {.absolute = 1e-5 * hidden_TD.abs().max().item<double>()}); !close)
            return std::string("hidden states: ") + close.message();
          (own_TD.to(at::kFloat) * row.own(weights_TD)).sum().backward();
          std::vector<at::Tensor> gradients;
          for (const auto& [name, tensor] : trained(decoder)) gradients.push_back(tensor->grad().defined() ? tensor->grad().contiguous() : at::zeros_like(tensor->detach()));
          ranks.sum_in_place(gradients, "gradients");
          const auto names = trained(decoder);
          for (std::size_t i = 0; i < names.size(); ++i) {
            if (!expected[i].defined()) continue;
            if (const auto close = is_close_to_scale(gradients[i], expected[i], 2e-5); !close) return names[i].first + ": " + close.message();
            if (!first.empty() && !first[i].equal(gradients[i])) return names[i].first + " differs with another memory policy";
          }
          if (first.empty()) first = gradients;
        }
        const at::NoGradGuard constant;
        if (!decoder.hidden_TD(own).equal(decoder.hidden_TD(own))) return "other bits the second time";
      }
      return "";
    }));
}

TEST_P(FusedFamily, NothingOfThePassDependsOnTheNumberOfThreads) {
  Decoder decoder = decoder_of(golden_);
  attach(decoder, 0.1);
  ASSERT_EQ(use_fused_blocks(decoder), "");
  const Input input = packed_input(decoder, {1200, 3, 90}, 5);
  std::vector<at::Tensor> one, two;
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const at::Tensor hidden_one = run(decoder, input, &one);
  at::set_num_threads(2);
  const at::Tensor hidden_two = run(decoder, input, &two);
  at::set_num_threads(threads);
  // Products are cut by threads inside oneDNN; everything else is not.
  EXPECT_TRUE(is_close_to_scale(hidden_two, hidden_one, 1e-6));
  for (std::size_t i = 0; i < one.size(); ++i) EXPECT_TRUE(is_close_to_scale(two[i], one[i], 1e-5));
}

TEST(FusedBlocks, KeepWhatTheyAreSaidToKeep) {
  const Golden golden("families/llama.safetensors");
  Decoder decoder = decoder_of(golden);
  attach(decoder, 0);
  ASSERT_EQ(use_fused_blocks(decoder), "");
  const double all = kept_bytes_per_token(decoder);
  decoder.keep = Keep::kNoMlp;
  const double no_mlp = kept_bytes_per_token(decoder);
  decoder.keep = Keep::kInputs;
  const double inputs = kept_bytes_per_token(decoder);
  EXPECT_GT(all, no_mlp);
  EXPECT_GT(no_mlp, inputs);
  // x of each layer, f32, and the rank of the down projection's adapter.
  const auto layers = static_cast<double>(decoder.blocks.size()), hidden = static_cast<double>(decoder.config.hidden_size);
  EXPECT_GE(inputs, layers * hidden * 4);
  EXPECT_LE(inputs, layers * (hidden + 3) * 4);
}

TEST(FusedBlocks, SayWhyNot) {
  const Golden golden("families/llama.safetensors");
  Decoder decoder = decoder_of(golden);
  attach(decoder, 0);
  Adapter& adapter = *decoder.linears()[3].linear->adapter;
  adapter.magnitude_O = uneven({adapter.b_OR.size(0)}, 1);
  const std::string reason = use_fused_blocks(decoder);
  EXPECT_NE(reason.find(decoder.linears()[3].path + " has a DoRA adapter"), std::string::npos) << reason;
  EXPECT_FALSE(decoder.fused);
}

TEST(FusedBlocks, ATrainedWeightIsStillALeafThatTrains) {
  const Golden golden("families/llama.safetensors");
  Decoder decoder = decoder_of(golden);
  for (const NamedTensor& named : decoder.tensors()) named.tensor->requires_grad_(true);
  const at::Tensor before = decoder.blocks[0].linears.at(Slot::kKey).weight_OI.detach().clone();
  ASSERT_EQ(use_fused_blocks(decoder), "");
  const at::Tensor& weight_OI = decoder.blocks[0].linears.at(Slot::kKey).weight_OI;
  EXPECT_TRUE(weight_OI.is_leaf());
  EXPECT_TRUE(weight_OI.requires_grad());
  EXPECT_TRUE(at::equal(weight_OI.detach(), before));
  const Input input = packed_input(decoder, {12}, 0);
  const at::Tensor hidden = run(decoder, input);
  {
    const at::NoGradGuard constant;
    weight_OI.mul_(1.5);
  }
  EXPECT_FALSE(at::equal(run(decoder, input), hidden)) << "a changed weight was not seen";
}

}  // namespace
}  // namespace alambic::models
