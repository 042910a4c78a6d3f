// SPDX-License-Identifier: Apache-2.0
// NF4 and int8 weights against bitsandbytes: tests/oracle/nf4_oracle.py.
#include "lora/nf4.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cstring>
#include <set>

#include "core/error.h"
#include "core/json.h"
#include "core/random.h"
#include "lora/int8.h"
#include "lora/quantize.h"
#include "tests/golden.h"
#include "tests/support.h"

namespace alambic::lora {
namespace {

using testing::fails_with;
using testing::Golden;

// The same type, shape and bits; says where not.
::testing::AssertionResult same_bits(const at::Tensor& actual, const at::Tensor& expected) {
  if (!actual.defined() || actual.scalar_type() != expected.scalar_type() || actual.numel() != expected.numel())
    return ::testing::AssertionFailure() << "another type or size";
  const at::Tensor a = actual.contiguous(), e = expected.contiguous();
  const std::size_t width = a.element_size(), count = static_cast<std::size_t>(a.numel());
  const auto* const x = static_cast<const std::byte*>(a.const_data_ptr());
  const auto* const y = static_cast<const std::byte*>(e.const_data_ptr());
  for (std::size_t i = 0; i < count; ++i)
    if (std::memcmp(x + i * width, y + i * width, width) != 0)
      return ::testing::AssertionFailure() << "element " << i << " of " << count << ": " << a.flatten()[static_cast<std::int64_t>(i)].item<double>() << ", expected "
                                           << e.flatten()[static_cast<std::int64_t>(i)].item<double>();
  return ::testing::AssertionSuccess();
}

at::Tensor dense(const models::FrozenWeight& weight, at::ScalarType type) {
  const at::Tensor out = at::full({weight.outputs(), weight.inputs()}, 9, at::kFloat).to(type);
  weight.dense_into(out);
  return out;
}

// Returns how many tensors of theirs were compared with.
std::size_t compare(const checkpoints::SafetensorsFile& theirs, const std::string& name) {
  SCOPED_TRACE(name);
  std::size_t compared = 0;
  const auto equal = [&](const at::Tensor& ours, const std::string& key) {
    if (!theirs.entries().contains(name + key)) return;
    EXPECT_TRUE(same_bits(ours, theirs.tensor(name + key))) << name << key;
    ++compared;
  };
  const at::Tensor weight = theirs.tensor(name + ".weight");
  for (const std::string kind : {".double.", ".single."}) {
    const Nf4Parts parts = quantize_nf4(weight, kind == ".double.");
    equal(parts.packed, kind + "packed");
    equal(parts.absmax, kind + "absmax");
    if (kind == ".double.") {
      equal(parts.nested_absmax, kind + "nested_absmax");
      equal(parts.nested_map, kind + "nested_map");
      equal(at::full({}, parts.offset, at::kFloat), kind + "offset");
    }
    const Nf4Weight made(weight.size(0), weight.size(1), parts);
    equal(dense(made, at::kFloat), kind + "dense_f32");
    equal(dense(made, at::kBFloat16), kind + "dense_bf16");
  }
  const Int8Weight made(quantize_int8(weight));
  equal(made.parts().codes_OI, ".int8.codes");
  equal(made.parts().scale_O, ".int8.scale");
  equal(dense(made, at::kFloat), ".int8.dense");
  return compared;
}

std::set<std::string> cases_of(const checkpoints::SafetensorsFile& file) {
  std::set<std::string> names;
  for (const auto& [key, entry] : file.entries()) names.insert(key.substr(0, key.find('.')));
  return names;
}

TEST(Nf4, EveryBitEqualsBitsandbytes) {
  const Golden golden("nf4.safetensors");
  SCOPED_TRACE(golden.provenance());
  const std::set<std::string> names = cases_of(golden.file());
  EXPECT_EQ(names.size(), 14u);
  std::size_t compared = 0;
  for (const std::string& name : names) compared += compare(golden.file(), name);
  EXPECT_EQ(compared + names.size(), golden.file().entries().size()) << "a tensor of the golden was not looked at";
}

TEST(Nf4, EqualsBitsandbytesOnWhateverTheOracleSends) {
  const char* const input = std::getenv("ALAMBIC_ORACLE_INPUT");
  if (input == nullptr) GTEST_SKIP() << "tests/oracle/nf4_oracle.py sends the weights";
  const checkpoints::SafetensorsFile sent(require<std::string>(read_json_file(input), "path", input));
  std::size_t compared = 0;
  for (const std::string& name : cases_of(sent)) compared += compare(sent, name);
  EXPECT_EQ(compared + cases_of(sent).size(), sent.entries().size());
}

at::Tensor uneven(at::IntArrayRef shape) {
  at::Tensor made = at::empty(shape, at::kFloat);
  for (std::int64_t i = 0; i < made.numel(); ++i) made.data_ptr<float>()[i] = static_cast<float>(mix64(static_cast<std::uint64_t>(i)) >> 40) / 8388608.0f - 1.0f;
  return made;
}

TEST(Nf4, EveryLoopOfTheProcessorGivesTheSameBits) {
  constexpr std::int64_t kSize = 1000;
  const Nf4Parts parts = quantize_nf4(uneven({1, kSize}), false);
  const auto* const packed = parts.packed.const_data_ptr<std::uint8_t>();
  at::Tensor scales = parts.absmax.clone();
  // Where rounding to bf16 is delicate: halves of both kinds, the smallest and the largest numbers.
  const float delicate[] = {1.0f, 1.00390625f, 1.01171875f, 1e-39f, 3e38f, -1.25f, 0.0f};
  std::memcpy(scales.mutable_data_ptr<float>(), delicate, sizeof delicate);
  const auto by = [&]<class Out>(Nf4Loop loop, std::int64_t begin, std::int64_t end, Out) {
    std::vector<Out> out(static_cast<std::size_t>(end - begin));
    dequantize_nf4(loop, packed, scales.const_data_ptr<float>() + begin / kNf4Block, begin, end, out.data());
    return out;
  };
  const auto bits = [](const auto& values) { return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(values[0])); };
  for (const Nf4Loop loop : nf4_loops())
    for (const std::int64_t begin : {0, 1, 63, 64, 100})
      for (const std::int64_t end : {128, 129, 191, 1000}) {
        EXPECT_EQ(bits(by(loop, begin, end, 0.0f)), bits(by(Nf4Loop::kPlain, begin, end, 0.0f))) << static_cast<int>(loop) << " " << begin << " " << end;
        EXPECT_EQ(bits(by(loop, begin, end, std::uint16_t{0})), bits(by(Nf4Loop::kPlain, begin, end, std::uint16_t{0}))) << static_cast<int>(loop) << " " << begin << " " << end;
      }
}

// A kernel on a GPU does nothing but this for each element (lora/nf4_math.h).
TEST(Nf4, TheSharedArithmeticOfOneElementIsWhatTheLoopsGive) {
  const at::Tensor weight_OI = uneven({37, 500});
  const Nf4Parts parts = quantize_nf4(weight_OI, true);
  const Nf4Weight made(37, 500, parts);
  const at::Tensor wide = dense(made, at::kFloat), narrow = dense(made, at::kBFloat16);
  for (std::int64_t i = 0; i < weight_OI.numel(); ++i) {
    const float value = nf4_element(made.view(), i);
    ASSERT_EQ(value, wide.const_data_ptr<float>()[i]) << i;
    ASSERT_EQ(bf16_bits(value), narrow.const_data_ptr<at::BFloat16>()[i].x) << i;
  }
}

TEST(Nf4, RoundsToBf16AsLibtorchDoes) {
  for (std::uint32_t high = 0; high < 0x10000; ++high)
    for (const std::uint32_t low : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      const std::uint32_t word = high << 16 | low;
      float value = 0;
      std::memcpy(&value, &word, sizeof value);
      if (std::isnan(value)) EXPECT_TRUE(std::isnan(static_cast<float>(at::BFloat16(bf16_bits(value), at::BFloat16::from_bits()))));
      else ASSERT_EQ(bf16_bits(value), at::BFloat16(value).x) << word;
    }
}

class Formats : public ::testing::TestWithParam<const char*> {
 protected:
  std::shared_ptr<const models::FrozenWeight> quantised(const at::Tensor& weight_OI) const { return quantize(weight_OI, quantization_of_name(GetParam(), "test")); }
};
INSTANTIATE_TEST_SUITE_P(All, Formats, ::testing::Values("nf4", "nf4-single", "int8"), [](const auto& test) {
  return std::string(test.param) == "nf4-single" ? "nf4_single" : std::string(test.param);
});

TEST_P(Formats, RowsMayLieApartAndThreadsChangeNothing) {
  for (const std::int64_t inputs : {1, 63, 64, 200}) {
    const auto made = quantised(uneven({301, inputs}));
    for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
      const at::Tensor together = dense(*made, type), apart = at::full({303, inputs + 9}, 7, at::kFloat).to(type);
      made->dense_into(apart.narrow(0, 1, 301).narrow(1, 5, inputs));
      EXPECT_TRUE(apart.narrow(0, 1, 301).narrow(1, 5, inputs).equal(together));
      EXPECT_TRUE(apart.narrow(1, 0, 5).eq(7).all().item<bool>());
      EXPECT_TRUE(apart.narrow(1, 5 + inputs, 4).eq(7).all().item<bool>());
      EXPECT_TRUE(apart.narrow(0, 0, 1).eq(7).all().item<bool>() && apart.narrow(0, 302, 1).eq(7).all().item<bool>());
      const int threads = at::get_num_threads();
      at::set_num_threads(threads == 1 ? 3 : 1);
      EXPECT_TRUE(same_bits(dense(*made, type), together));
      at::set_num_threads(threads);
    }
  }
}

TEST_P(Formats, ThreadsDoNotChangeWhatIsKept) {
  const int threads = at::get_num_threads();
  for (const std::int64_t rows : {33000, 41003, 52001}) {  // as many scales: libtorch sums more than 32,768 on several threads
    const at::Tensor weight_OI = uneven({rows, 64}) * uneven({rows, 1});
    at::set_num_threads(2);
    const auto two = quantised(weight_OI);
    EXPECT_EQ(at::get_num_threads(), 2);
    at::set_num_threads(1);
    EXPECT_TRUE(same_bits(dense(*quantised(weight_OI), at::kFloat), dense(*two, at::kFloat))) << rows;
  }
  at::set_num_threads(threads);
}

TEST_P(Formats, KeepsLittleAndStaysNear) {
  const at::Tensor weight_OI = uneven({64, 512});
  const auto made = quantised(weight_OI);
  const double bits = 8.0 * static_cast<double>(made->num_bytes()) / static_cast<double>(weight_OI.numel());
  const std::string name = GetParam();
  EXPECT_NEAR(bits, name == "nf4" ? 4.127 : name == "nf4-single" ? 4.5 : 8.0625, 0.005);  // arXiv:2305.14314, section 3: 0.127 and 0.5 bits for the scales
  const double error = (dense(*made, at::kFloat) - weight_OI).norm().item<double>() / weight_OI.norm().item<double>();
  EXPECT_LT(error, name == "int8" ? 0.005 : 0.11);
  EXPECT_GT(error, name == "int8" ? 0.003 : 0.08);
}

TEST_P(Formats, RefusesAnOutputThatDoesNotFit) {
  const auto made = quantised(uneven({4, 8}));
  for (const at::Tensor& out : {at::zeros({8, 4}), at::zeros({4, 8}, at::kDouble), at::zeros({8, 4}).t(), at::zeros({32})})
    EXPECT_TRUE(fails_with(ErrorKind::kBug, "cannot be written into", [&] { made->dense_into(out); }));
}

TEST(Int8, ARowOfZerosIsZerosAgain) {
  const at::Tensor weight_OI = uneven({3, 70});
  weight_OI[1].zero_();
  const at::Tensor out = dense(Int8Weight(quantize_int8(weight_OI)), at::kFloat);
  EXPECT_TRUE(out[1].eq(0).all().item<bool>());
  EXPECT_FALSE(out[2].eq(0).all().item<bool>());
}

TEST(Int8, TheSmallestRowsStayInRange) {
  const at::Tensor weight_OI = uneven({1, 64}) * 1e-38;
  EXPECT_LE(quantize_int8(weight_OI).codes_OI.to(at::kInt).abs().max().item<int>(), 127);
}

TEST(Quantization, NamesAreReadBack) {
  for (const char* name : {"none", "nf4", "nf4-single", "int8"}) EXPECT_EQ(name_of(quantization_of_name(name, "here")), name);
  EXPECT_TRUE(fails_with(ErrorKind::kData, "here: the base is quantised as \"fp4\"", [] { quantization_of_name("fp4", "here"); }));
}

}  // namespace
}  // namespace alambic::lora
