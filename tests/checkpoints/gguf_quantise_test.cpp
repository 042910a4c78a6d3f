// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/gguf_quantise.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <limits>

#include "tests/golden.h"
#include "tests/support.h"

namespace alambic::checkpoints {
namespace {

using ::alambic::testing::fails_with;
using ::alambic::testing::Golden;

const GgufType& type_named(std::string_view name) {
  for (const GgufType& type : gguf_types())
    if (type.name == name) return type;
  throw std::runtime_error("no type " + std::string(name));
}

std::vector<std::byte> quantised(const GgufType& type, const at::Tensor& values, const at::Tensor& importance = {}) {
  std::vector<std::byte> bytes(static_cast<std::size_t>(gguf_bytes(type, values.numel())));
  quantise(type, values, importance, "here", bytes.data());
  return bytes;
}

// Every byte, so that a failure names the type, row, and place in the block.
void expect_same(const std::vector<std::byte>& actual, const at::Tensor& expected, const GgufType& type, const std::string& what) {
  ASSERT_EQ(static_cast<std::int64_t>(actual.size()), expected.numel()) << what;
  const auto* bytes = expected.const_data_ptr<std::uint8_t>();
  const std::int64_t row_bytes = expected.size(1);
  for (std::int64_t i = 0; i < expected.numel(); ++i)
    ASSERT_EQ(static_cast<int>(actual[static_cast<std::size_t>(i)]), static_cast<int>(bytes[i]))
        << what << ": row " << i / row_bytes << ", block " << i % row_bytes / type.block_bytes << ", byte " << i % row_bytes % type.block_bytes;
}

TEST(GgufQuantise, GivesTheBytesOfGgml) {
  const Golden golden("gguf_quantise.safetensors");
  SCOPED_TRACE(golden.provenance());
  int compared = 0;
  for (const std::string part : {"long", "short"}) {
    const at::Tensor values = golden[part + ".values"], importance = golden[part + ".importance"];
    for (const GgufType& type : gguf_types()) {
      const std::string name = part + "." + std::string(type.name);
      if (!golden.file().entries().contains(name)) continue;
      expect_same(quantised(type, values), golden[name], type, name);
      ++compared;
      if (!golden.file().entries().contains(name + ".weighted")) continue;
      expect_same(quantised(type, values, importance), golden[name + ".weighted"], type, name + ".weighted");
      ++compared;
    }
  }
  EXPECT_EQ(compared, 10 + 7 + 7 + 4);
}

TEST(GgufQuantise, EveryTypeWrittenIsReadBackNearly) {
  const at::Tensor values = at::randn({64, 512});
  int written = 0;
  for (const GgufType& type : gguf_types()) {
    if (!can_quantise(type)) {
      EXPECT_TRUE(type.name == "Q2_K" || type.name == "Q3_K") << type.name;
      continue;
    }
    ++written;
    if (type.dequantise == nullptr) continue;
    const std::vector<std::byte> bytes = quantised(type, values);
    at::Tensor back = at::empty_like(values);
    type.dequantise(bytes.data(), values.numel() / type.block_size, back.mutable_data_ptr<float>());
    const double error = (back - values).square().mean().item<double>();
    const double bits = 8.0 * static_cast<double>(type.block_bytes) / static_cast<double>(type.block_size);
    EXPECT_LT(error, 4 * std::pow(4.0, -bits + 0.5)) << type.name;
    EXPECT_GT(error, 0) << type.name;
  }
  EXPECT_EQ(written, 11);
}

TEST(GgufQuantise, ImportanceLowersTheWeightedError) {
  const at::Tensor values = at::randn({32, 512});
  const at::Tensor importance = at::randn({512}).pow(4);
  for (const char* name : {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"}) {
    const GgufType& type = type_named(name);
    const auto error = [&](const std::vector<std::byte>& bytes) {
      at::Tensor back = at::empty_like(values);
      type.dequantise(bytes.data(), values.numel() / type.block_size, back.mutable_data_ptr<float>());
      return ((back - values).square() * importance).mean().item<double>();
    };
    EXPECT_LT(error(quantised(type, values, importance)), 0.97 * error(quantised(type, values))) << name;
  }
}

TEST(GgufQuantise, OtherTypesAndThreadsGiveTheSameBytes) {
  const at::Tensor values = at::randn({300, 256}).to(at::kBFloat16);
  for (const GgufType& type : gguf_types())
    if (can_quantise(type)) {
      const std::vector<std::byte> whole = quantised(type, values);
      EXPECT_EQ(whole, quantised(type, values.to(at::kFloat))) << type.name;
      const std::vector<std::byte> first = quantised(type, values.narrow(0, 0, 1));
      EXPECT_TRUE(std::equal(first.begin(), first.end(), whole.begin())) << type.name;
    }
}

TEST(GgufQuantise, RefusesWhatNoBlockCanHold) {
  for (const GgufType& type : gguf_types()) {
    if (!can_quantise(type)) continue;
    for (const float value : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
      at::Tensor values = at::ones({200, 256});
      values.mutable_data_ptr<float>()[150 * 256 + 17] = value;
      EXPECT_TRUE(fails_with(ErrorKind::kData, "here: the value in row 150, column 17 is not finite", [&] { quantised(type, values); })) << type.name;
    }
    at::Tensor large = at::ones({3, 256});
    large.mutable_data_ptr<float>()[2 * 256 + 33] = 3e38f;
    large.mutable_data_ptr<float>()[2 * 256 + 34] = -3e38f;
    const auto expect_refused = [&](const char* words, const at::Tensor& values) {
      EXPECT_TRUE(fails_with(ErrorKind::kData, words, [&] { quantised(type, values); })) << type.name;
    };
    if (type.name != "F32" && type.name != "BF16") expect_refused("too large for", large);
    if (type.block_size > 1) expect_refused("rows of 40 values are not a multiple of", at::ones({2, 40}));
  }
  at::Tensor importance = at::ones({256});
  importance.mutable_data_ptr<float>()[9] = std::numeric_limits<float>::infinity();
  EXPECT_TRUE(fails_with(ErrorKind::kData, "importance of column 9 is not finite", [&] { quantised(type_named("Q4_K"), at::ones({1, 256}), importance); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "has 32 columns for it, the tensor has 256", [&] { quantised(type_named("Q4_K"), at::ones({1, 256}), at::ones({32})); }));
}

}  // namespace
}  // namespace alambic::checkpoints
