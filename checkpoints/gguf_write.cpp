// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/gguf_write.h"

#include <bit>
#include <cstring>
#include <future>
#include <memory>
#include <set>

#include "core/error.h"
#include "core/files.h"

namespace alambic::checkpoints {
namespace {

constexpr std::uint64_t kAlignment = 32;            // what readers take where general.alignment is absent
constexpr std::size_t kLongestTensorName = 63;      // ggml keeps 64 bytes, a zero at the end
constexpr std::size_t kLongestKey = 65535;
constexpr std::size_t kHighestRank = 4;

std::uint64_t aligned(std::uint64_t offset) { return (offset + kAlignment - 1) / kAlignment * kAlignment; }

std::uint64_t bytes_of(const GgufTensorToWrite& tensor) {
  std::int64_t count = 1;
  for (const std::int64_t size : tensor.shape) count *= size;
  return static_cast<std::uint64_t>(count / tensor.type->block_size * tensor.type->block_bytes);
}

class Head {
 public:
  template <class T>
  void number(T value) {
    static_assert(std::endian::native == std::endian::little && std::is_arithmetic_v<T>);
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void text(const std::string& value) {
    number<std::uint64_t>(value.size());
    bytes_ += value;
  }
  void value(const GgufValue& given) {
    std::visit([this](const auto& held) { typed(held); }, given);
  }
  std::string take() { return std::move(bytes_); }
  void pad() { bytes_.resize(aligned(bytes_.size()), '\0'); }

 private:
  enum Type : std::uint32_t { kU32 = 4, kI32 = 5, kF32 = 6, kBool = 7, kString = 8, kArray = 9 };
  void typed(std::uint32_t held) { number<std::uint32_t>(kU32), number(held); }
  void typed(std::int32_t held) { number<std::uint32_t>(kI32), number(held); }
  void typed(float held) { number<std::uint32_t>(kF32), number(held); }
  void typed(bool held) { number<std::uint32_t>(kBool), number<std::uint8_t>(held ? 1 : 0); }
  void typed(const std::string& held) { number<std::uint32_t>(kString), text(held); }
  void typed(const std::vector<std::int32_t>& held) { array(kI32, held, [this](std::int32_t one) { number(one); }); }
  void typed(const std::vector<float>& held) { array(kF32, held, [this](float one) { number(one); }); }
  void typed(const std::vector<std::string>& held) { array(kString, held, [this](const std::string& one) { text(one); }); }
  template <class T, class Write>
  void array(Type type, const std::vector<T>& held, const Write& write) {
    number<std::uint32_t>(kArray), number<std::uint32_t>(type), number<std::uint64_t>(held.size());
    for (const T& one : held) write(one);
  }

  std::string bytes_;
};

std::string head_of(const GgufKeys& keys, const std::vector<GgufTensorToWrite>& tensors) {
  Head head;
  head.number<std::uint32_t>(0x46554747u);  // "GGUF"
  head.number<std::uint32_t>(3);
  head.number<std::uint64_t>(tensors.size());
  head.number<std::uint64_t>(keys.size());
  std::set<std::string> seen;
  for (const auto& [key, value] : keys) {
    if (key.empty() || key.size() > kLongestKey || !seen.insert(key).second) fail(ErrorKind::kBug, "the metadata key \"", key, "\" is empty, too long or given twice");
    head.text(key);
    head.value(value);
  }
  seen.clear();
  std::uint64_t offset = 0;
  for (const GgufTensorToWrite& tensor : tensors) {
    if (tensor.name.empty() || tensor.name.size() > kLongestTensorName || !seen.insert(tensor.name).second)
      fail(ErrorKind::kBug, "the tensor name \"", tensor.name, "\" is empty, too long or given twice");
    if (tensor.shape.empty() || tensor.shape.size() > kHighestRank || tensor.shape.back() % tensor.type->block_size != 0)
      fail(ErrorKind::kBug, "tensor \"", tensor.name, "\": its shape does not go with ", tensor.type->name);
    head.text(tensor.name);
    head.number(static_cast<std::uint32_t>(tensor.shape.size()));
    for (auto size = tensor.shape.rbegin(); size != tensor.shape.rend(); ++size) head.number(static_cast<std::uint64_t>(*size));
    head.number(tensor.type->id);
    head.number(offset);
    offset = aligned(offset + bytes_of(tensor));
  }
  head.pad();
  return head.take();
}

}  // namespace

std::uint64_t gguf_file_bytes(const GgufKeys& keys, const std::vector<GgufTensorToWrite>& tensors) {
  std::uint64_t total = head_of(keys, tensors).size();
  for (const GgufTensorToWrite& tensor : tensors) total += aligned(bytes_of(tensor));
  return total;
}

std::string write_gguf(const std::filesystem::path& path, const GgufKeys& keys, const std::vector<GgufTensorToWrite>& tensors,
                       const std::function<void(std::size_t, std::byte*)>& make) {
  if (fs::exists(fs::symlink_status(path))) fail(ErrorKind::kUsage, path.string(), ": exists already and is never overwritten", Remedy{"choose another name, or remove it"});
  const std::string head = head_of(keys, tensors);
  const std::uint64_t needed = gguf_file_bytes(keys, tensors);
  if (const std::uint64_t free = free_bytes(path.has_parent_path() ? path.parent_path() : fs::path(".")); free < needed)
    fail(ErrorKind::kResource, path.string(), ": ", needed, " bytes are needed, ", free, " are free", Remedy{"free some space or choose another output folder"});

  // The calling thread makes the tensors, so that its pool of threads stays the same one; another one writes and hashes.
  AtomicFile file(path);
  file.write(head);
  std::unique_ptr<std::byte[]> made, written;
  std::future<void> writing;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::uint64_t size = bytes_of(tensors[i]), padded = aligned(size);
    made.reset(new std::byte[padded]);
    std::memset(made.get() + size, 0, padded - size);
    make(i, made.get());
    if (writing.valid()) writing.get();
    written = std::move(made);
    writing = std::async(std::launch::async, [&file, bytes = written.get(), padded] { file.write(bytes, padded); });
  }
  if (writing.valid()) writing.get();
  if (file.num_bytes() != needed) fail(ErrorKind::kBug, path.string(), ": ", file.num_bytes(), " bytes were written and not ", needed);
  return file.commit();
}

}  // namespace alambic::checkpoints
