// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/gguf_header.h"

#include <array>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstring>
#include <unordered_set>

namespace alambic::checkpoints {
namespace {

// Limits far above what published models need, so that a hostile file cannot make us hold much more than its own size.
constexpr std::uint64_t kLongestKey = 65535;          // the format's own limit
constexpr std::uint64_t kLongestTensorName = 64;      // the format's own limit
constexpr std::uint32_t kHighestRank = 4;             // the format's own limit
constexpr std::uint64_t kMostArrayBytes = 64 << 20;    // in memory, of all arrays together, besides the size of the file
constexpr std::uint64_t kMostTensors = 1 << 16;        // the largest models have a few thousand
constexpr std::uint64_t kMostKeys = 1 << 14;           // and a few hundred keys
constexpr std::uint64_t kLargestAlignment = 1 << 20;
constexpr std::uint64_t kDefaultAlignment = 32;

enum ValueType : std::uint32_t { kU8, kI8, kU16, kI16, kU32, kI32, kF32, kBool, kString, kArray, kU64, kI64, kF64 };

std::uint64_t smallest_size(std::uint32_t type) {
  switch (type) {
    case kU8: case kI8: case kBool: return 1;
    case kU16: case kI16: return 2;
    case kU32: case kI32: case kF32: return 4;
    case kU64: case kI64: case kF64: case kString: return 8;  // a string has at least its length
    default: return 0;  // not a type that may stand in an array
  }
}

bool is_utf8(std::string_view text) {
  for (std::size_t i = 0; i < text.size();) {
    const auto byte = [&](std::size_t k) -> unsigned { return k < text.size() ? static_cast<unsigned char>(text[k]) : 0u; };
    const unsigned first = byte(i);
    if (first < 0x80) {
      ++i;
      continue;
    }
    const std::size_t length = first >= 0xc2 && first <= 0xdf ? 2 : (first & 0xf0) == 0xe0 ? 3 : first >= 0xf0 && first <= 0xf4 ? 4 : 0;
    if (length == 0) return false;
    for (std::size_t k = 1; k < length; ++k)
      if ((byte(i + k) & 0xc0) != 0x80) return false;
    const unsigned second = byte(i + 1);
    // Overlong forms, surrogates, and code points past U+10FFFF.
    if ((first == 0xe0 && second < 0xa0) || (first == 0xed && second > 0x9f) || (first == 0xf0 && second < 0x90) || (first == 0xf4 && second > 0x8f)) return false;
    i += length;
  }
  return true;
}

double shortest_decimal(float value) {
  if (!std::isfinite(value)) return static_cast<double>(value);
  std::array<char, 32> text{};
  const auto written = std::to_chars(text.data(), text.data() + text.size(), value);
  double number = 0;
  std::from_chars(text.data(), written.ptr, number);
  return number;
}

class Reader {
 public:
  Reader(std::string_view file, std::string_view source) : file_(file), source_(source) {}

  std::uint64_t position() const { return position_; }
  std::uint64_t remaining() const { return file_.size() - position_; }

  template <class T>
  T number(std::string_view what) {
    if (remaining() < sizeof(T)) fail_short(what);
    T value;
    std::memcpy(&value, file_.data() + position_, sizeof(T));
    position_ += sizeof(T);
    return value;
  }

  std::string_view bytes(std::string_view what, std::uint64_t longest) {
    const std::uint64_t length = number<std::uint64_t>(what);
    if (length > longest) fail(ErrorKind::kData, source_, ": ", what, " is said to be ", length, " bytes long; at most ", longest, " are allowed");
    if (length > remaining()) fail_short(what);
    const std::string_view text = file_.substr(position_, length);
    position_ += length;
    return text;
  }

  std::string text(std::string_view what, std::uint64_t longest) {
    const std::string_view found = bytes(what, longest);
    if (!is_utf8(found)) fail(ErrorKind::kData, source_, ": ", what, " is not valid UTF-8");
    return std::string(found);
  }

  Json value(std::uint32_t type, const std::string& key) {
    switch (type) {
      case kU8: return number<std::uint8_t>(key);
      case kI8: return number<std::int8_t>(key);
      case kU16: return number<std::uint16_t>(key);
      case kI16: return number<std::int16_t>(key);
      case kU32: return number<std::uint32_t>(key);
      case kI32: return number<std::int32_t>(key);
      case kU64: return number<std::uint64_t>(key);
      case kI64: return number<std::int64_t>(key);
      case kF32: return shortest_decimal(number<float>(key));
      case kF64: return number<double>(key);
      case kString: return text(key, file_.size());
      case kBool: {
        const std::uint8_t found = number<std::uint8_t>(key);
        if (found > 1) fail(ErrorKind::kData, source_, ": ", key, " is a boolean of value ", static_cast<int>(found));
        return found == 1;
      }
      case kArray: return array(key);
      default: fail(ErrorKind::kData, source_, ": ", key, " has the unknown value type ", type);
    }
  }

 private:
  Json array(const std::string& key) {
    const std::uint32_t type = number<std::uint32_t>(key);
    const std::uint64_t count = number<std::uint64_t>(key);
    const std::uint64_t size = smallest_size(type);
    if (size == 0) fail(ErrorKind::kData, source_, ": ", key, " is an array of the value type ", type, ", which arrays may not hold here");
    if (count > remaining() / size) fail_short(key);
    // A string takes its object and the allocator's rounding besides its bytes, which count with the file.
    constexpr std::uint64_t kStringBytes = sizeof(Json) + sizeof(std::string) + 16;
    array_bytes_ += count * (type == kString ? kStringBytes : sizeof(Json));
    if (array_bytes_ > kMostArrayBytes + file_.size())
      fail(ErrorKind::kData, source_, ": ", key, " has ", count, " elements; all arrays together would take more than the ", (kMostArrayBytes + file_.size()) >> 20, " MiB of memory they may");
    Json::array_t elements;
    elements.reserve(count);
    for (std::uint64_t i = 0; i < count; ++i) {
      // Tokens of byte-level vocabularies may be no valid UTF-8; they are kept as they are, and the tokenizer judges them.
      if (type == kString) elements.emplace_back(std::string(bytes(key, file_.size())));
      else elements.push_back(value(type, key));
    }
    return elements;
  }

  [[noreturn]] void fail_short(std::string_view what) const {
    fail(ErrorKind::kData, source_, ": the file ends inside ", what, " (at byte ", position_, " of ", file_.size(), ")",
         Remedy{"the file was cut short or its counts are wrong: copy or download it again"});
  }

  std::string_view file_;
  std::string_view source_;
  std::uint64_t position_ = 0;
  std::uint64_t array_bytes_ = 0;
};

GgufEntry read_entry(Reader& reader, std::uint64_t number, std::string_view source) {
  GgufEntry entry;
  entry.name = reader.text("the name of tensor " + std::to_string(number), kLongestTensorName);
  const std::string where = "tensor \"" + entry.name + "\"";
  if (entry.name.empty()) fail(ErrorKind::kData, source, ": tensor ", number, " has no name");
  const std::uint32_t rank = reader.number<std::uint32_t>(where);
  if (rank < 1 || rank > kHighestRank) fail(ErrorKind::kData, source, ": ", where, " has ", rank, " dimensions; 1 to ", kHighestRank, " are allowed");
  std::uint64_t count = 1;
  for (std::uint32_t axis = 0; axis < rank; ++axis) {
    const std::uint64_t size = reader.number<std::uint64_t>(where);
    if (size < 1 || size > INT64_MAX || __builtin_mul_overflow(count, size, &count) || count > INT64_MAX / 8)
      fail(ErrorKind::kData, source, ": ", where, ": dimension ", axis, " of size ", size, " is empty or makes the tensor overflow");
    entry.shape.insert(entry.shape.begin(), static_cast<std::int64_t>(size));
  }
  const std::uint32_t type = reader.number<std::uint32_t>(where);
  entry.type = find_gguf_type(type);
  if (!entry.type) {
    std::string known;
    for (const GgufType& readable : gguf_types()) known += (known.empty() ? "" : ", ") + std::string(readable.name);
    fail(ErrorKind::kData, source, ": ", where, " has the type ", gguf_type_name(type), " (", type, "), which is not read here",
         Remedy{"use a file of one of the types " + known});
  }
  if (entry.shape.back() % entry.type->block_size != 0)
    fail(ErrorKind::kData, source, ": ", where, " has rows of ", entry.shape.back(), " values, not a multiple of the ", entry.type->block_size, " in a block of ", entry.type->name);
  entry.begin = reader.number<std::uint64_t>(where);  // relative to the data section until that is known
  entry.end = static_cast<std::uint64_t>(static_cast<std::int64_t>(count) / entry.type->block_size * entry.type->block_bytes);  // length, likewise
  return entry;
}

}  // namespace

GgufHeader parse_gguf_header(std::string_view file, std::string_view source) {
  static_assert(std::endian::native == std::endian::little);
  if (!file.starts_with("GGUF")) fail(ErrorKind::kData, source, ": does not start with \"GGUF\", so this is not a GGUF file");
  Reader reader(file, source);
  reader.number<std::uint32_t>("the magic number");
  GgufHeader header;
  header.version = reader.number<std::uint32_t>("the version");
  if (header.version == 0x02000000u || header.version == 0x03000000u)
    fail(ErrorKind::kData, source, ": a big-endian GGUF file; only little-endian ones are read here");
  if (header.version != 2 && header.version != 3) fail(ErrorKind::kData, source, ": GGUF version ", header.version, "; versions 2 and 3 are read here");
  const std::uint64_t num_tensors = reader.number<std::uint64_t>("the number of tensors");
  const std::uint64_t num_keys = reader.number<std::uint64_t>("the number of metadata keys");
  constexpr std::uint64_t kSmallestKey = 8 + 4 + 1, kSmallestTensor = 8 + 1 + 4 + 8 + 4 + 8;
  if (num_keys > kMostKeys || num_keys > reader.remaining() / kSmallestKey)
    fail(ErrorKind::kData, source, ": ", num_keys, " metadata keys are announced, more than a file of ", file.size(), " bytes can hold or than are allowed (", kMostKeys, ")");
  if (num_tensors > kMostTensors || num_tensors > reader.remaining() / kSmallestTensor)
    fail(ErrorKind::kData, source, ": ", num_tensors, " tensors are announced, more than a file of ", file.size(), " bytes can hold or than are allowed (", kMostTensors, ")");

  std::unordered_set<std::string> seen;
  std::uint64_t alignment = kDefaultAlignment;
  for (std::uint64_t i = 0; i < num_keys; ++i) {
    const std::string key = reader.text("the name of metadata key " + std::to_string(i), kLongestKey);
    if (key.empty()) fail(ErrorKind::kData, source, ": metadata key ", i, " has no name");
    if (!seen.insert(key).second) fail(ErrorKind::kData, source, ": the metadata key \"", key, "\" is given twice");
    const std::uint32_t type = reader.number<std::uint32_t>(key);
    Json value = reader.value(type, key);
    if (key == "general.alignment") {
      if (type != kU32) fail(ErrorKind::kData, source, ": general.alignment must be a 32-bit unsigned number");
      alignment = value.get<std::uint64_t>();
      if (!std::has_single_bit(alignment) || alignment > kLargestAlignment)
        fail(ErrorKind::kData, source, ": general.alignment is ", alignment, "; it must be a power of two up to ", kLargestAlignment);
    }
    // The key is known to be new, so it is appended without the linear search of ordered_json::operator[].
    header.metadata.get_ref<Json::object_t&>().std::vector<std::pair<const std::string, Json>>::emplace_back(key, std::move(value));
  }

  seen.clear();
  for (std::uint64_t i = 0; i < num_tensors; ++i) {
    header.entries.push_back(read_entry(reader, i, source));
    if (!seen.insert(header.entries.back().name).second) fail(ErrorKind::kData, source, ": the tensor \"", header.entries.back().name, "\" is given twice");
  }

  const auto aligned = [alignment](std::uint64_t offset) { return (offset + alignment - 1) / alignment * alignment; };
  const std::uint64_t data_begin = aligned(reader.position());
  std::uint64_t expected = 0, last_end = reader.position();
  for (GgufEntry& entry : header.entries) {
    const std::uint64_t length = entry.end;
    if (entry.begin != expected)
      fail(ErrorKind::kData, source, ": tensor \"", entry.name, "\" begins at byte ", entry.begin, " of the data, expected ", expected,
           " (right after the tensor before it, aligned to ", alignment, ")");
    if (data_begin > file.size() || entry.begin > file.size() - data_begin || length > file.size() - data_begin - entry.begin)
      fail(ErrorKind::kData, source, ": tensor \"", entry.name, "\" ends past the end of the file (", file.size(), " bytes)",
           Remedy{"the file was cut short: copy or download it again"});
    entry.begin += data_begin;
    entry.end = last_end = entry.begin + length;
    expected = aligned(expected + length);
  }
  if (file.size() > aligned(last_end))
    fail(ErrorKind::kData, source, ": ", file.size() - last_end, " bytes follow the last tensor", Remedy{"the file is damaged or several files were joined: copy or download it again"});
  return header;
}

}  // namespace alambic::checkpoints
