// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/safetensors_header.h"

#include <algorithm>
#include <cstring>

#include "core/json.h"

namespace alambic::checkpoints {
namespace {

constexpr std::uint64_t kLengthBytes = 8;
constexpr std::uint64_t kLongestHeader = 100'000'000;  // MAX_HEADER_SIZE of the reference implementation
constexpr std::size_t kHighestRank = 64;               // the most that tensor operations here can hold
const std::string kMetadataKey = "__metadata__";

std::uint64_t bytes_per_element(const std::string& dtype, std::string_view source, const std::string& tensor) {
  std::string known;
  for (const DtypeName& candidate : kDtypes) {
    if (candidate.name == dtype) return candidate.num_bytes;
    known += (known.empty() ? "" : ", ") + std::string(candidate.name);
  }
  fail(ErrorKind::kData, source, ": tensor \"", tensor, "\" has dtype ", dtype, ", which is not read here",
       Remedy{"convert the tensor to one of " + known});
}

std::uint64_t unsigned_number(const Json& value, std::string_view source, const std::string& tensor, const char* what) {
  if (!value.is_number_unsigned() || value.get<std::uint64_t>() > INT64_MAX)
    fail(ErrorKind::kData, source, ": tensor \"", tensor, "\": ", what, " must hold whole numbers from 0 to 2^63 - 1, got ", to_line(value));
  return value.get<std::uint64_t>();
}

HeaderEntry read_entry(const Json& value, std::string_view source, const std::string& tensor) {
  const std::string where = std::string(source) + ": tensor \"" + tensor + "\"";
  HeaderEntry entry;
  entry.dtype = require<std::string>(value, "dtype", where);
  const std::uint64_t width = bytes_per_element(entry.dtype, source, tensor);

  const Json shape = require<Json>(value, "shape", where);
  if (!shape.is_array() || shape.size() > kHighestRank) fail(ErrorKind::kData, where, ": shape must be an array of at most ", kHighestRank, " numbers");
  std::uint64_t num_bytes = width;
  // The product of the non-zero sizes must fit as well: strides are computed from it even where a size is 0.
  std::uint64_t stride = width;
  for (const Json& size_json : shape) {
    const std::uint64_t size = unsigned_number(size_json, source, tensor, "shape");
    entry.shape.push_back(static_cast<std::int64_t>(size));
    if (__builtin_mul_overflow(stride, std::max<std::uint64_t>(size, 1), &stride) || stride > INT64_MAX)
      fail(ErrorKind::kData, where, ": the product of the shape ", to_line(shape), " overflows");
    num_bytes *= size;
  }

  const Json offsets = require<Json>(value, "data_offsets", where);
  if (!offsets.is_array() || offsets.size() != 2) fail(ErrorKind::kData, where, ": data_offsets must be [begin, end], got ", to_line(offsets));
  entry.begin = unsigned_number(offsets[0], source, tensor, "data_offsets");
  entry.end = unsigned_number(offsets[1], source, tensor, "data_offsets");
  if (entry.end < entry.begin || entry.end - entry.begin != num_bytes)
    fail(ErrorKind::kData, where, ": data_offsets ", to_line(offsets), " do not span the ", num_bytes, " bytes of shape ", to_line(shape), " in ", entry.dtype);
  return entry;
}

}  // namespace

SafetensorsHeader parse_safetensors_header(std::string_view file, std::string_view source) {
  if (file.size() < kLengthBytes) fail(ErrorKind::kData, source, ": ", file.size(), " bytes are too few for a safetensors file");
  std::uint64_t length = 0;
  std::memcpy(&length, file.data(), kLengthBytes);  // little endian, as this machine is
  if (length > kLongestHeader) fail(ErrorKind::kData, source, ": a header of ", length, " bytes is announced; the format allows ", kLongestHeader);
  if (length > file.size() - kLengthBytes)
    fail(ErrorKind::kData, source, ": a header of ", length, " bytes is announced, but the file has only ", file.size(), " bytes",
         Remedy{"the file was cut short: copy or download it again"});
  const std::string_view text = file.substr(kLengthBytes, length);
  if (text.empty() || text.front() != '{') fail(ErrorKind::kData, source, ": the header does not start with '{', so this is not a safetensors file");

  const Json json = parse_json(text, source);
  SafetensorsHeader header;
  header.data_begin = kLengthBytes + length;
  for (const auto& [name, value] : json.items()) {
    if (name != kMetadataKey) {
      header.entries.emplace(name, read_entry(value, source, name));
      continue;
    }
    if (!value.is_object()) fail(ErrorKind::kData, source, ": __metadata__ must be an object of strings");
    for (const auto& [key, text_value] : value.items()) {
      if (!text_value.is_string()) fail(ErrorKind::kData, source, ": __metadata__ \"", key, "\" must be a string");
      header.metadata.emplace(key, text_value.get<std::string>());
    }
  }

  std::vector<std::pair<const std::string*, const HeaderEntry*>> in_file_order;
  for (const auto& [name, entry] : header.entries) in_file_order.emplace_back(&name, &entry);
  std::sort(in_file_order.begin(), in_file_order.end(), [](const auto& a, const auto& b) {
    return std::pair(a.second->begin, a.second->end) < std::pair(b.second->begin, b.second->end);
  });
  std::uint64_t expected = 0;
  for (const auto& [name, entry] : in_file_order) {
    if (entry->begin != expected)
      fail(ErrorKind::kData, source, ": tensor \"", *name, "\" begins at byte ", entry->begin, " of the data, but the tensor before it ends at ", expected);
    expected = entry->end;
  }
  const std::uint64_t present = file.size() - header.data_begin;
  if (expected != present)
    fail(ErrorKind::kData, source, ": the header describes ", expected, " bytes of data, the file has ", present,
         Remedy{expected > present ? "the file was cut short: copy or download it again" : "bytes after the last tensor are not allowed by the format"});
  return header;
}

std::string make_safetensors_header(const std::vector<std::pair<std::string, HeaderEntry>>& tensors,
                                    const std::map<std::string, std::string>& metadata) {
  // Built as text: an ordered object would search all earlier names at each insertion.
  std::string text = "{";
  const auto separate = [&text] {
    if (text.size() > 1) text += ',';
  };
  if (!metadata.empty()) {
    Json object = Json::object();
    for (const auto& [key, value] : metadata) object[key] = value;
    text += to_line(Json(kMetadataKey)) + ":" + to_line(object);
  }
  for (const auto& [name, entry] : tensors) {
    if (name == kMetadataKey) fail(ErrorKind::kBug, "a tensor may not be called ", kMetadataKey);
    separate();
    text += to_line(Json(name)) + ":{\"dtype\":\"" + entry.dtype + "\",\"shape\":" + to_line(Json(entry.shape)) + ",\"data_offsets\":[" +
            std::to_string(entry.begin) + "," + std::to_string(entry.end) + "]}";
  }
  text += '}';
  text.append((8 - text.size() % 8) % 8, ' ');
  if (text.size() > kLongestHeader) fail(ErrorKind::kBug, "a safetensors header of ", text.size(), " bytes is longer than the format allows");
  const std::uint64_t length = text.size();
  std::string header(kLengthBytes, '\0');
  std::memcpy(header.data(), &length, kLengthBytes);
  return header + text;
}

}  // namespace alambic::checkpoints
