// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/gguf.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <cstring>
#include <unordered_map>

#include "checkpoints/gguf_header.h"
#include "core/error.h"
#include "core/files.h"

namespace alambic::checkpoints {

struct GgufFile::State {
  std::filesystem::path path;
  MappedFile file;
  GgufHeader header;
  std::vector<GgufTensor> tensors;
  std::unordered_map<std::string, std::size_t> position;

  explicit State(const std::filesystem::path& from) : path(from), file(from), header(parse_gguf_header(file.text(), path.string())) {
    for (const GgufEntry& entry : header.entries) {
      position.emplace(entry.name, tensors.size());
      tensors.push_back({entry.name, std::string(entry.type->name), entry.shape});
    }
  }
};

GgufFile::GgufFile(const std::filesystem::path& path) : state_(std::make_shared<const State>(path)) {}

const Json& GgufFile::metadata() const { return state_->header.metadata; }
const std::vector<GgufTensor>& GgufFile::tensors() const { return state_->tensors; }
bool GgufFile::contains(const std::string& name) const { return state_->position.contains(name); }

at::Tensor GgufFile::tensor(const std::string& name) const {
  const auto found = state_->position.find(name);
  if (found == state_->position.end()) fail(ErrorKind::kData, state_->path.string(), ": holds no tensor \"", name, "\"");
  const GgufEntry& entry = state_->header.entries[found->second];
  const std::byte* const bytes = state_->file.bytes().data() + entry.begin;
  if (entry.type->dequantise) {
    at::Tensor values = at::empty(entry.shape, at::kFloat);
    float* const out = values.mutable_data_ptr<float>();
    const GgufType& type = *entry.type;
    constexpr std::int64_t kValuesPerTask = 1 << 15;
    at::parallel_for(0, values.numel() / type.block_size, kValuesPerTask / type.block_size, [&](std::int64_t begin, std::int64_t end) {
      type.dequantise(bytes + begin * type.block_bytes, end - begin, out + begin * type.block_size);
    });
    state_->file.release(entry.begin, entry.end);
    return values;
  }
  const at::ScalarType type = entry.type->name == "F32" ? at::kFloat : entry.type->name == "F16" ? at::kHalf : at::kBFloat16;
  if (reinterpret_cast<std::uintptr_t>(bytes) % c10::elementSize(type) != 0) {
    at::Tensor copy = at::empty(entry.shape, type);
    std::memcpy(copy.data_ptr(), bytes, entry.end - entry.begin);
    return copy;
  }
  return at::from_blob(const_cast<std::byte*>(bytes), entry.shape, [state = state_](void*) {}, at::TensorOptions(type));
}

}  // namespace alambic::checkpoints
