// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/gguf.h"

#include <ATen/ops/allclose.h>
#include <gtest/gtest.h>

#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>

#include "checkpoints/gguf_blocks.h"
#include "checkpoints/gguf_header.h"
#include "checkpoints/safetensors.h"
#include "core/files.h"
#include "tests/checkpoints/gguf_maker.h"
#include "tests/golden.h"
#include "tests/support.h"

namespace alambic::checkpoints {
namespace {

using testing::fails_with;
using testing::Golden;
using testing::kArray;
using testing::kBool;
using testing::kF32;
using testing::kString;
using testing::kU32;
using testing::kU64;
using testing::ScratchFolder;
using Maker = testing::GgufMaker;

GgufHeader parse(const Maker& file) { return parse_gguf_header(file.bytes(), "x.gguf"); }

TEST(GgufHeader, ReadsEveryKindOfValue) {
  Maker file;
  file.head(1, 7);
  file.key("a.u32", kU32).add<std::uint32_t>(7);
  file.key("a.f32", kF32).add<float>(1e-5f);
  file.key("a.bool", kBool).add<std::uint8_t>(1);
  file.key("a.text", kString).text("h\xc3\xa9");
  file.key("a.u64", kU64).add<std::uint64_t>(1ull << 63);
  file.key("a.texts", kArray).add<std::uint32_t>(kString).add<std::uint64_t>(2).text("x").text("");
  file.key("general.alignment", kU32).add<std::uint32_t>(64);
  file.tensor("t", {3, 2}, 0, 0).pad(64);
  const std::uint64_t data_begin = file.bytes().size();
  file.zeros(24);
  const GgufHeader header = parse(file);
  EXPECT_EQ(to_line(header.metadata),
            R"({"a.u32":7,"a.f32":1e-05,"a.bool":true,"a.text":"hé","a.u64":9223372036854775808,"a.texts":["x",""],"general.alignment":64})");
  ASSERT_EQ(header.entries.size(), 1u);
  EXPECT_EQ(header.entries[0].shape, (std::vector<std::int64_t>{2, 3}));
  EXPECT_EQ(header.entries[0].begin, data_begin);
  EXPECT_EQ(header.entries[0].end, data_begin + 24);
}

struct BadFile {
  const char* name;
  const char* words;
  std::function<void(Maker&)> make;
};

void PrintTo(const BadFile& bad, std::ostream* out) { *out << bad.name; }

class GgufBadFiles : public ::testing::TestWithParam<BadFile> {};

TEST_P(GgufBadFiles, IsRefusedAtOnce) {
  Maker file;
  GetParam().make(file);
  const auto start = std::chrono::steady_clock::now();
  EXPECT_TRUE(fails_with(ErrorKind::kData, GetParam().words, [&] { parse(file); }));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(1));
}

constexpr std::uint64_t kHuge = 1ull << 62;

INSTANTIATE_TEST_SUITE_P(
    Named, GgufBadFiles,
    ::testing::Values(
        BadFile{"empty", "not a GGUF file", [](Maker&) {}},
        BadFile{"bad_magic", "not a GGUF file", [](Maker& f) { f.add<std::uint32_t>(0x46554748).add<std::uint32_t>(3).zeros(64); }},
        BadFile{"only_magic", "ends inside the version", [](Maker& f) { f.add<std::uint32_t>(0x46554747); }},
        BadFile{"version_1", "GGUF version 1", [](Maker& f) { f.head(0, 0, 1); }},
        BadFile{"version_99", "GGUF version 99", [](Maker& f) { f.head(0, 0, 99); }},
        BadFile{"big_endian", "big-endian", [](Maker& f) { f.head(0, 0, 0x03000000); }},
        BadFile{"no_counts", "ends inside the number of tensors", [](Maker& f) { f.add<std::uint32_t>(0x46554747).add<std::uint32_t>(3); }},
        BadFile{"too_many_keys", "metadata keys are announced", [](Maker& f) { f.head(0, kHuge); }},
        BadFile{"negative_keys", "metadata keys are announced", [](Maker& f) { f.head(0, ~0ull); }},
        BadFile{"too_many_tensors", "tensors are announced", [](Maker& f) { f.head(kHuge, 0); }},
        BadFile{"more_keys_than_bytes", "metadata keys are announced", [](Maker& f) { f.head(0, 3).zeros(20); }},
        BadFile{"bomb_of_43_bytes", "ends inside k", [](Maker& f) { f.head(0, 1).text("k").add<std::uint32_t>(kArray).add<std::uint32_t>(0).add<std::uint16_t>(0xffff); }},
        BadFile{"array_of_2_to_62_bytes", "ends inside k", [](Maker& f) { f.head(0, 1).key("k", kArray).add<std::uint32_t>(0).add<std::uint64_t>(kHuge); }},
        BadFile{"array_of_2_to_62_texts", "ends inside k", [](Maker& f) { f.head(0, 1).key("k", kArray).add<std::uint32_t>(kString).add<std::uint64_t>(kHuge); }},
        BadFile{"array_of_arrays", "value type 9", [](Maker& f) { f.head(0, 1).key("k", kArray).add<std::uint32_t>(kArray).add<std::uint64_t>(1).zeros(32); }},
        BadFile{"array_of_unknown_type", "value type 13", [](Maker& f) { f.head(0, 1).key("k", kArray).add<std::uint32_t>(13).add<std::uint64_t>(1).zeros(32); }},
        BadFile{"array_of_empty_strings", "all arrays together", [](Maker& f) { f.head(0, 1).key("k", kArray).add<std::uint32_t>(kString).add<std::uint64_t>(2 << 20).zeros(16 << 20); }},
        BadFile{"array_beyond_all_need", "all arrays together", [](Maker& f) { f.head(0, 1).key("k", kArray).add<std::uint32_t>(0).add<std::uint64_t>(5 << 20).zeros(5 << 20); }},
        BadFile{"key_too_long", "at most 65535", [](Maker& f) { f.head(0, 1).add<std::uint64_t>(kHuge).zeros(64); }},
        BadFile{"key_past_end", "ends inside the name of metadata key 0", [](Maker& f) { f.head(0, 1).add<std::uint64_t>(1000).zeros(64); }},
        BadFile{"key_empty", "has no name", [](Maker& f) { f.head(0, 1).key("", kU32).add<std::uint32_t>(0); }},
        BadFile{"key_not_utf8", "not valid UTF-8", [](Maker& f) { f.head(0, 1).key("\xff\xfe", kU32).add<std::uint32_t>(0); }},
        BadFile{"key_twice", "given twice", [](Maker& f) { f.head(0, 2).key("k", kU32).add<std::uint32_t>(0).key("k", kU32).add<std::uint32_t>(0); }},
        BadFile{"value_type_unknown", "unknown value type 99", [](Maker& f) { f.head(0, 1).key("k", 99).zeros(16); }},
        BadFile{"value_missing", "ends inside k", [](Maker& f) { f.head(0, 1).key("k", kU64).add<std::uint32_t>(0); }},
        BadFile{"text_past_end", "ends inside k", [](Maker& f) { f.head(0, 1).key("k", kString).add<std::uint64_t>(30).zeros(20); }},
        BadFile{"text_of_2_to_62_bytes", "bytes long", [](Maker& f) { f.head(0, 1).key("k", kString).add<std::uint64_t>(kHuge); }},
        BadFile{"text_overlong_utf8", "not valid UTF-8", [](Maker& f) { f.head(0, 1).key("k", kString).text("\xc0\xaf"); }},
        BadFile{"boolean_of_2", "boolean of value 2", [](Maker& f) { f.head(0, 1).key("k", kBool).add<std::uint8_t>(2); }},
        BadFile{"alignment_13", "power of two", [](Maker& f) { f.head(0, 1).key("general.alignment", kU32).add<std::uint32_t>(13); }},
        BadFile{"alignment_0", "power of two", [](Maker& f) { f.head(0, 1).key("general.alignment", kU32).add<std::uint32_t>(0); }},
        BadFile{"alignment_2_to_31", "power of two", [](Maker& f) { f.head(0, 1).key("general.alignment", kU32).add<std::uint32_t>(1u << 31); }},
        BadFile{"alignment_of_other_type", "32-bit unsigned", [](Maker& f) { f.head(0, 1).key("general.alignment", kU64).add<std::uint64_t>(32); }},
        BadFile{"tensor_name_too_long", "at most 64", [](Maker& f) { f.head(1, 0).tensor(std::string(65, 'n'), {1}, 0, 0).pad().zeros(4); }},
        BadFile{"tensor_name_empty", "has no name", [](Maker& f) { f.head(1, 0).tensor("", {1}, 0, 0).pad().zeros(4); }},
        BadFile{"tensor_name_twice", "given twice", [](Maker& f) { f.head(2, 0).tensor("t", {8}, 0, 0).tensor("t", {8}, 0, 32).pad().zeros(64); }},
        BadFile{"no_dimensions", "0 dimensions", [](Maker& f) { f.head(1, 0).tensor("t", {}, 0, 0).pad().zeros(64); }},
        BadFile{"five_dimensions", "5 dimensions", [](Maker& f) { f.head(1, 0).tensor("t", {1, 1, 1, 1, 1}, 0, 0).pad().zeros(4); }},
        BadFile{"2_to_32_dimensions", "4294967295 dimensions", [](Maker& f) { f.head(1, 0).text("t").add<std::uint32_t>(~0u).zeros(64); }},
        BadFile{"empty_dimension", "of size 0", [](Maker& f) { f.head(1, 0).tensor("t", {0}, 0, 0).pad().zeros(4); }},
        BadFile{"negative_dimension", "overflow", [](Maker& f) { f.head(1, 0).tensor("t", {~0ull}, 0, 0).pad().zeros(4); }},
        BadFile{"product_wraps_to_0", "overflow", [](Maker& f) { f.head(1, 0).tensor("t", {1ull << 32, 1ull << 32}, 0, 0).pad().zeros(4); }},
        BadFile{"bytes_wrap", "overflow", [](Maker& f) { f.head(1, 0).tensor("t", {(1ull << 62) + 1}, 0, 0).pad().zeros(4); }},
        BadFile{"one_dimension_of_2_to_42_plus_1", "past the end of the file", [](Maker& f) { f.head(1, 0).tensor("t", {(1ull << 42) + 1}, 0, 0).pad().zeros(4); }},
        BadFile{"type_removed", "Q4_2 (removed) (4)", [](Maker& f) { f.head(1, 0).tensor("t", {32}, 4, 0).pad().zeros(64); }},
        BadFile{"type_not_implemented", "IQ2_XXS (16)", [](Maker& f) { f.head(1, 0).tensor("t", {256}, 16, 0).pad().zeros(128); }},
        BadFile{"type_unknown", "? (4000000000)", [](Maker& f) { f.head(1, 0).tensor("t", {32}, 4000000000u, 0).pad().zeros(64); }},
        BadFile{"half_a_block", "not a multiple of the 32", [](Maker& f) { f.head(1, 0).tensor("t", {16}, 2, 0).pad().zeros(32); }},
        BadFile{"offset_not_0", "begins at byte 32 of the data, expected 0", [](Maker& f) { f.head(1, 0).tensor("t", {1}, 0, 32).pad().zeros(64); }},
        BadFile{"offset_2_to_62", "expected 0", [](Maker& f) { f.head(1, 0).tensor("t", {1}, 0, kHuge).pad().zeros(64); }},
        BadFile{"tensors_overlap", "expected 32", [](Maker& f) { f.head(2, 0).tensor("a", {8}, 0, 0).tensor("b", {8}, 0, 0).pad().zeros(64); }},
        BadFile{"hole_between_tensors", "expected 32", [](Maker& f) { f.head(2, 0).tensor("a", {8}, 0, 0).tensor("b", {8}, 0, 64).pad().zeros(96); }},
        BadFile{"data_cut_short", "past the end of the file", [](Maker& f) { f.head(1, 0).tensor("t", {8}, 0, 0).pad().zeros(31); }},
        BadFile{"no_data", "past the end of the file", [](Maker& f) { f.head(1, 0).tensor("t", {8}, 0, 0); }},
        BadFile{"bytes_after_the_end", "follow the last tensor", [](Maker& f) { f.head(1, 0).tensor("t", {8}, 0, 0).pad().zeros(32 + 33); }}),
    [](const ::testing::TestParamInfo<BadFile>& bad) { return std::string(bad.param.name); });

// Every cut of a small good file, and every flipped bit of its head: an error, or a file that is read; never a crash.
TEST(GgufHeader, SurvivesEveryCutAndEveryFlippedBit) {
  Maker file;
  file.head(2, 3);
  file.key("a.text", kString).text("abc");
  file.key("a.list", kArray).add<std::uint32_t>(kF32).add<std::uint64_t>(2).add<float>(1).add<float>(2);
  file.key("general.alignment", kU32).add<std::uint32_t>(32);
  file.tensor("a", {32}, 2, 0).tensor("b", {2, 2}, 0, 32).pad();
  const std::size_t head = file.bytes().size();
  file.zeros(32 + 16);
  EXPECT_EQ(parse(file).entries.size(), 2u);
  for (std::size_t length = 0; length < file.bytes().size(); ++length)
    EXPECT_TRUE(fails_with(ErrorKind::kData, "", [&] { parse_gguf_header(std::string_view(file.bytes()).substr(0, length), "x"); })) << length;
  int read = 0;
  for (std::size_t bit = 0; bit < 8 * head; ++bit) {
    std::string damaged = file.bytes();
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    try {
      parse_gguf_header(damaged, "x");
      ++read;
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kData);
    }
  }
  EXPECT_GT(read, 0);  // a changed letter or number is another good file: the format has no checksum
}

TEST(GgufBlocks, AreTheBitsOfTheGgufPackage) {
  const Golden golden("gguf_blocks.safetensors");
  SCOPED_TRACE(golden.provenance());
  int num_types = 0;
  for (const GgufType& type : gguf_types()) {
    if (!type.dequantise) continue;
    ++num_types;
    const std::string name(type.name);
    const at::Tensor blocks = golden[name + ".blocks"], expected = golden[name + ".bits"];
    ASSERT_EQ(blocks.size(1), type.block_bytes) << name;
    std::vector<float> values(static_cast<std::size_t>(expected.numel()));
    type.dequantise(static_cast<const std::byte*>(blocks.const_data_ptr()), blocks.size(0), values.data());
    const std::int32_t* bits = expected.const_data_ptr<std::int32_t>();
    for (std::size_t i = 0; i < values.size(); ++i) {
      const std::int32_t actual = std::isnan(values[i]) ? 0x7fc00000 : std::bit_cast<std::int32_t>(values[i]);
      ASSERT_EQ(actual, bits[i]) << name << ", block " << i / static_cast<std::size_t>(type.block_size) << ", value " << i % static_cast<std::size_t>(type.block_size);
    }
  }
  EXPECT_EQ(num_types, 10);
}

TEST(GgufFile, GivesTensorsInTheirStoredTypeOrDequantised) {
  const ScratchFolder folder;
  Maker file;
  file.head(3, 0).tensor("f", {3}, 0, 0).tensor("h", {2}, 30, 32).tensor("q", {32, 2}, 8, 64).pad();
  for (const float value : {1.f, 2.f, 3.f}) file.add(value);
  file.pad().add<std::uint16_t>(0x3f80).add<std::uint16_t>(0xbf80).pad();
  for (int row = 0; row < 2; ++row) {
    file.add<std::uint16_t>(0x3c00);  // scale 1
    for (int i = 0; i < 32; ++i) file.add(static_cast<std::int8_t>(row == 0 ? i : -i));
  }
  write_file(folder / "x.gguf", file.bytes());
  at::Tensor kept;
  {
    const GgufFile gguf(folder / "x.gguf");
    kept = gguf.tensor("f");
    EXPECT_EQ(gguf.tensor("h").scalar_type(), at::kBFloat16);
    EXPECT_EQ(gguf.tensor("h")[1].item<float>(), -1);
    const at::Tensor q = gguf.tensor("q");
    EXPECT_EQ(q.sizes(), (std::vector<std::int64_t>{2, 32}));
    EXPECT_EQ(q[0][31].item<float>(), 31);
    EXPECT_EQ(q[1][31].item<float>(), -31);
    EXPECT_TRUE(fails_with(ErrorKind::kData, "no tensor \"missing\"", [&] { gguf.tensor("missing"); }));
  }
  EXPECT_EQ(kept[2].item<float>(), 3);  // the mapping outlives the file object
}

}  // namespace
}  // namespace alambic::checkpoints
