// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/safetensors.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <limits>

#include "checkpoints/safetensors_header.h"
#include "core/files.h"
#include "tests/golden.h"
#include "tests/support.h"

namespace alambic::checkpoints {
namespace {

using testing::fails_with;
using testing::ScratchFolder;

std::string file_of(const std::string& header, std::size_t data_bytes, std::int64_t length = -1) {
  const std::uint64_t announced = length < 0 ? header.size() : static_cast<std::uint64_t>(length);
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &announced, 8);
  return bytes + header + std::string(data_bytes, '\0');
}

struct BadFile {
  const char* name;
  const char* words;
  std::string bytes;
};
void PrintTo(const BadFile& bad, std::ostream* out) { *out << bad.name; }

class SafetensorsBadFiles : public ::testing::TestWithParam<BadFile> {};

TEST_P(SafetensorsBadFiles, IsRefusedByName) {
  EXPECT_TRUE(fails_with(ErrorKind::kData, GetParam().words, [&] { parse_safetensors_header(GetParam().bytes, "x.safetensors"); }));
}

std::string many_dimensions() {
  std::string shape = "[1";
  for (int i = 0; i < 100000; ++i) shape += ",1";
  return R"({"t":{"dtype":"F32","shape":)" + shape + R"(],"data_offsets":[0,4]}})";
}

INSTANTIATE_TEST_SUITE_P(
    Named, SafetensorsBadFiles,
    ::testing::Values(
        BadFile{"empty", "too few", ""},
        BadFile{"seven_bytes", "too few", std::string(7, '\0')},
        BadFile{"length_0", "does not start with '{'", file_of("", 0)},
        BadFile{"length_past_end", "has only 10 bytes", file_of("{}", 0, 1000)},
        BadFile{"length_2_to_63", "the format allows 100000000", file_of("{}", 0, std::numeric_limits<std::int64_t>::max())},
        BadFile{"length_over_100_million", "the format allows 100000000", file_of("{}", 0, 100000001)},
        BadFile{"leading_space", "does not start with '{'", file_of(" {}", 0)},
        BadFile{"not_json", "not valid JSON", file_of("{not json}", 0)},
        BadFile{"text_after_json", "not valid JSON", file_of("{}x", 0)},
        BadFile{"bad_utf8", "not valid JSON", file_of("{\"\xff\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]}}", 1)},
        BadFile{"name_twice", "\"t\" is given twice", file_of(R"({"t":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"t":{"dtype":"U8","shape":[],"data_offsets":[1,2]}})", 2)},
        BadFile{"key_twice", "\"dtype\" is given twice", file_of(R"({"t":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}})", 1)},
        BadFile{"metadata_of_numbers", "\"a\" must be a string", file_of(R"({"__metadata__":{"a":1}})", 0)},
        BadFile{"metadata_list", "object of strings", file_of(R"({"__metadata__":[]})", 0)},
        BadFile{"no_dtype", "\"dtype\" is missing", file_of(R"({"t":{"shape":[],"data_offsets":[0,1]}})", 1)},
        BadFile{"unknown_dtype", "dtype I5", file_of(R"({"t":{"dtype":"I5","shape":[],"data_offsets":[0,1]}})", 1)},
        BadFile{"dtype_not_read", "dtype F8_E4M3", file_of(R"({"t":{"dtype":"F8_E4M3","shape":[],"data_offsets":[0,1]}})", 1)},
        BadFile{"entry_is_a_number", "JSON object", file_of(R"({"t":1})", 0)},
        BadFile{"negative_size", "shape must hold whole numbers", file_of(R"({"t":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4)},
        BadFile{"fractional_size", "shape must hold whole numbers", file_of(R"({"t":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}})", 4)},
        BadFile{"size_2_to_64", "shape must hold whole numbers", file_of(R"({"t":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4]}})", 4)},
        BadFile{"product_wraps_to_0", "overflows", file_of(R"({"t":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0)},
        BadFile{"bytes_wrap", "overflows", file_of(R"({"t":{"dtype":"F64","shape":[2305843009213693952],"data_offsets":[0,0]}})", 0)},
        BadFile{"zero_hides_overflow", "overflows", file_of(R"({"t":{"dtype":"F32","shape":[0,4294967296,4294967296],"data_offsets":[0,0]}})", 0)},
        BadFile{"100001_dimensions", "at most 64", file_of(many_dimensions(), 4)},
        BadFile{"one_offset", "[begin, end]", file_of(R"({"t":{"dtype":"U8","shape":[],"data_offsets":[0]}})", 1)},
        BadFile{"negative_offset", "data_offsets must hold", file_of(R"({"t":{"dtype":"U8","shape":[],"data_offsets":[-1,0]}})", 1)},
        BadFile{"reversed_offsets", "do not span", file_of(R"({"t":{"dtype":"U8","shape":[],"data_offsets":[1,0]}})", 1)},
        BadFile{"span_too_short", "do not span the 8 bytes", file_of(R"({"t":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4)},
        BadFile{"hole_at_the_start", "begins at byte 1", file_of(R"({"t":{"dtype":"U8","shape":[],"data_offsets":[1,2]}})", 2)},
        BadFile{"hole", "\"b\" begins at byte 2", file_of(R"({"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[],"data_offsets":[2,3]}})", 3)},
        BadFile{"overlap", "\"b\" begins at byte 0", file_of(R"({"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})", 2)},
        BadFile{"data_cut_short", "4 bytes of data, the file has 3", file_of(R"({"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 3)},
        BadFile{"bytes_after_the_end", "4 bytes of data, the file has 5", file_of(R"({"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 5)},
        BadFile{"nested_100000_deep", "nested deeper", file_of("{\"a\":" + std::string(100000, '[') + std::string(100000, ']') + "}", 0)}),
    [](const ::testing::TestParamInfo<BadFile>& bad) { return std::string(bad.param.name); });

TEST(SafetensorsHeader, SurvivesEveryCutAndEveryFlippedBit) {
  const std::string good = file_of(R"({"__metadata__":{"a":"b"},"t":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"u":{"dtype":"U8","shape":[],"data_offsets":[8,9]}})", 9);
  EXPECT_EQ(parse_safetensors_header(good, "x").entries.size(), 2u);
  for (std::size_t length = 0; length < good.size(); ++length)
    EXPECT_TRUE(fails_with(ErrorKind::kData, "", [&] { parse_safetensors_header(std::string_view(good).substr(0, length), "x"); })) << length;
  for (std::size_t bit = 0; bit < 8 * (good.size() - 9); ++bit) {
    std::string damaged = good;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    try {
      parse_safetensors_header(damaged, "x");
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kData) << bit;
    }
  }
}

std::vector<std::pair<std::string, at::Tensor>> one_of_each_type() {
  const at::Tensor numbers = at::arange(6, at::kFloat).reshape({2, 3});
  return {{"f32", numbers},       {"f64", numbers.to(at::kDouble)}, {"bf16", numbers.to(at::kBFloat16)}, {"f16", numbers.to(at::kHalf)},
          {"i64", numbers.to(at::kLong)}, {"i32", numbers.to(at::kInt)}, {"i16", numbers.to(at::kShort)}, {"i8", numbers.to(at::kChar)},
          {"u8", numbers.to(at::kByte)},  {"bool", numbers > 2},         {"scalar", at::full({}, 7.0, at::kFloat)}, {"none", at::empty({0, 3}, at::kFloat)}};
}

TEST(Safetensors, RoundTripsEveryType) {
  const ScratchFolder folder;
  const auto tensors = one_of_each_type();
  const std::string hash = write_safetensors(folder / "x.safetensors", tensors, {{"format", "pt"}, {"story", "h\xc3\xa9 \"quoted\""}});
  EXPECT_EQ(hash, sha256_of_file(folder / "x.safetensors"));
  const SafetensorsFile file(folder / "x.safetensors");
  EXPECT_EQ(file.entries().size(), tensors.size());
  EXPECT_EQ(file.metadata().at("story"), "h\xc3\xa9 \"quoted\"");
  for (const auto& [name, tensor] : tensors) {
    EXPECT_EQ(file.tensor(name).scalar_type(), tensor.scalar_type()) << name;
    EXPECT_EQ(file.tensor(name).sizes(), tensor.sizes()) << name;
    EXPECT_TRUE(at::equal(file.tensor(name), tensor)) << name;
  }
  EXPECT_TRUE(fails_with(ErrorKind::kData, "no tensor \"f33\"", [&] { file.tensor("f33"); }));
}

TEST(Safetensors, WritesTheBytesOfTheReferenceImplementation) {  // tests/oracle/safetensors_oracle.py
  const ScratchFolder folder;
  const testing::Golden golden("safetensors_reference.safetensors");
  SCOPED_TRACE(golden.provenance());
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto& [name, entry] : golden.file().entries()) tensors.emplace_back(name, golden[name]);
  ASSERT_EQ(tensors.size(), 12u);
  EXPECT_TRUE(at::equal(golden["f32"], at::arange(6, at::kFloat).reshape({2, 3})));
  EXPECT_TRUE(at::equal(golden["bool"], golden["f32"] > 2));
  write_safetensors(folder / "x.safetensors", tensors, {{"format", "pt"}});
  // The golden's own metadata names its maker; what follows it must be the same bytes, up to the padding.
  const auto after_metadata = [](const std::string& bytes) { return bytes.substr(bytes.find("}", 8) + 1); };
  const std::string ours = after_metadata(read_file(folder / "x.safetensors")), theirs = after_metadata(read_file(golden.file().path()));
  EXPECT_EQ(ours.substr(0, ours.find("}}")), theirs.substr(0, theirs.find("}}")));
  std::uint64_t data = 0;
  for (const auto& [name, entry] : golden.file().entries()) data += entry.end - entry.begin;
  EXPECT_EQ(ours.substr(ours.size() - data), theirs.substr(theirs.size() - data));
}

TEST(Safetensors, ATensorOutlivesItsFileAndMayBeWrittenWithoutChangingIt) {
  const ScratchFolder folder;
  write_safetensors(folder / "x.safetensors", {{"t", at::arange(100000, at::kFloat)}});
  const std::string before = sha256_of_file(folder / "x.safetensors");
  at::Tensor kept = SafetensorsFile(folder / "x.safetensors").tensor("t");
  EXPECT_EQ(kept[99999].item<float>(), 99999);
  kept.zero_();
  EXPECT_EQ(kept[99999].item<float>(), 0);
  EXPECT_EQ(sha256_of_file(folder / "x.safetensors"), before);
  EXPECT_EQ(SafetensorsFile(folder / "x.safetensors").tensor("t")[99999].item<float>(), 99999);
}

TEST(Safetensors, WritingOntoAMappedFileKeepsTheMapping) {  // safetensors #762: an all-zero file, silently
  const ScratchFolder folder;
  write_safetensors(folder / "x.safetensors", {{"t", at::arange(5000, at::kFloat)}});
  const SafetensorsFile old(folder / "x.safetensors");
  const at::Tensor mapped = old.tensor("t");
  write_safetensors(folder / "x.safetensors", {{"t", mapped + 1}});
  EXPECT_TRUE(at::equal(mapped, at::arange(5000, at::kFloat)));
  EXPECT_TRUE(at::equal(SafetensorsFile(folder / "x.safetensors").tensor("t"), at::arange(5000, at::kFloat) + 1));
}

TEST(Safetensors, ReadsTensorsAtAddressesTheirTypeCannotHave) {
  const ScratchFolder folder;
  std::string bytes = file_of(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}})", 0);
  const float values[] = {1.5f, -2.5f};
  bytes += '\x07';
  bytes.append(reinterpret_cast<const char*>(values), 8);
  write_file(folder / "x.safetensors", bytes);
  const at::Tensor tensor = SafetensorsFile(folder / "x.safetensors").tensor("b");
  EXPECT_EQ(tensor[0].item<float>(), 1.5);
  EXPECT_EQ(tensor[1].item<float>(), -2.5);
}

TEST(Safetensors, ConvertsAndGivesPagesBack) {
  const ScratchFolder folder;
  const at::Tensor values = at::randn({300, 1000});
  write_safetensors(folder / "x.safetensors", {{"a", values}, {"b", values + 1}});
  const SafetensorsFile file(folder / "x.safetensors");
  EXPECT_TRUE(at::equal(file.tensor_as("a", at::kBFloat16), values.to(at::kBFloat16)));
  EXPECT_TRUE(at::equal(file.tensor_as("a", at::kFloat), values));
  EXPECT_TRUE(at::equal(file.tensor_as("b", at::kDouble), (values + 1).to(at::kDouble)));
  EXPECT_TRUE(at::equal(file.tensor("b"), values + 1));
}

TEST(Safetensors, NeverWritesValuesThatAreNotFinite) {
  const ScratchFolder folder;
  for (const at::ScalarType type : {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16})
    for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()}) {
      at::Tensor tensor = at::zeros({3, 100000}, type);
      EXPECT_EQ(first_non_finite(tensor), -1);
      tensor[2][5] = bad;
      tensor[1][77777] = bad;
      EXPECT_EQ(first_non_finite(tensor), 177777);
      EXPECT_TRUE(fails_with(ErrorKind::kNumerics, "\"t\" is not finite at element 177777", [&] { write_safetensors(folder / "x.safetensors", {{"t", tensor}}); }));
    }
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));  // not even a temporary file stays
}

TEST(Safetensors, RefusesMisuse) {
  const ScratchFolder folder;
  const at::Tensor t = at::zeros({2});
  EXPECT_TRUE(fails_with(ErrorKind::kBug, "written twice", [&] { write_safetensors(folder / "x", {{"t", t}, {"t", t}}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kBug, "__metadata__", [&] { write_safetensors(folder / "x", {{"__metadata__", t}}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kBug, "undefined", [&] { write_safetensors(folder / "x", {{"t", at::Tensor()}}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kBug, "announced as", [&] { write_safetensors(folder / "x", {TensorToWrite{"t", at::kFloat, {3}}}, [&](std::size_t) { return t; }); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "cannot be read", [&] { SafetensorsFile(folder / "absent"); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "not a regular file", [&] { SafetensorsFile(folder.path()); }));
  EXPECT_TRUE(fails_with(ErrorKind::kResource, "cannot be created", [&] { write_safetensors(folder / "absent/x", {{"t", t}}); }));
}

}  // namespace
}  // namespace alambic::checkpoints
