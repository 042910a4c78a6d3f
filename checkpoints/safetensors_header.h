// SPDX-License-Identifier: Apache-2.0
#pragma once
// The header of a safetensors file, checked by every rule of the format's own reader (safetensors/src/tensor.rs).
// Free of libtorch, so that it can be fuzzed by itself.
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace alambic::checkpoints {

/// One tensor as the header describes it; begin and end count from the first byte after the header.
struct HeaderEntry {
  std::string dtype;                // "F32", ...
  std::vector<std::int64_t> shape;  // [] is a scalar
  std::uint64_t begin = 0, end = 0;
};

struct SafetensorsHeader {
  std::map<std::string, HeaderEntry> entries;
  std::map<std::string, std::string> metadata;
  std::uint64_t data_begin = 0;  // offset of the data section in the file
};

/// Element types read and written here, in the order in which the format's writer places them in a file (widest first).
struct DtypeName {
  std::string_view name;
  std::uint64_t num_bytes;
};
inline constexpr DtypeName kDtypes[] = {{"I64", 8}, {"F64", 8}, {"F32", 4}, {"I32", 4}, {"BF16", 2},
                                        {"F16", 2}, {"I16", 2}, {"I8", 1},  {"U8", 1},  {"BOOL", 1}};

/// file: all bytes of the file. Error(kData) naming `source` and the tensor at the first rule broken: header length (at
/// most 100,000,000) and start, UTF-8, duplicate keys, metadata of strings, known dtype, shape product without overflow,
/// offsets contiguous from 0, each span as long as its shape and dtype say, file neither shorter nor longer.
SafetensorsHeader parse_safetensors_header(std::string_view file, std::string_view source);

/// The file's first bytes (length and JSON, padded with spaces to a multiple of 8) for tensors in the order given; name and entry.
std::string make_safetensors_header(const std::vector<std::pair<std::string, HeaderEntry>>& tensors,
                                    const std::map<std::string, std::string>& metadata);

}  // namespace alambic::checkpoints
