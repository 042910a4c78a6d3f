// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace alambic::testing {

// Types of metadata values.
inline constexpr std::uint32_t kU32 = 4, kF32 = 6, kBool = 7, kString = 8, kArray = 9, kU64 = 10;

// Writes a GGUF file part by part, so that each part can be wrong.
class GgufMaker {
 public:
  template <class T>
  GgufMaker& add(T value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
    return *this;
  }
  GgufMaker& text(std::string_view value) {
    add<std::uint64_t>(value.size());
    bytes_ += value;
    return *this;
  }
  GgufMaker& head(std::uint64_t num_tensors, std::uint64_t num_keys, std::uint32_t version = 3) {
    bytes_ += "GGUF";
    return add<std::uint32_t>(version).add<std::uint64_t>(num_tensors).add<std::uint64_t>(num_keys);
  }
  GgufMaker& key(std::string_view name, std::uint32_t type) { return text(name).add<std::uint32_t>(type); }
  GgufMaker& tensor(std::string_view name, const std::vector<std::uint64_t>& fastest_first, std::uint32_t type, std::uint64_t offset) {
    text(name).add<std::uint32_t>(static_cast<std::uint32_t>(fastest_first.size()));
    for (const std::uint64_t size : fastest_first) add(size);
    return add(type).add(offset);
  }
  GgufMaker& pad(std::size_t alignment = 32) {
    bytes_.resize((bytes_.size() + alignment - 1) / alignment * alignment);
    return *this;
  }
  GgufMaker& zeros(std::size_t count) {
    bytes_.append(count, '\0');
    return *this;
  }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

}  // namespace alambic::testing
