// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/safetensors.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>

#include "checkpoints/safetensors_header.h"
#include "core/error.h"
#include "core/files.h"

namespace alambic::checkpoints {
namespace {

// In the order of kDtypes.
constexpr at::ScalarType kTypes[] = {at::kLong, at::kDouble, at::kFloat, at::kInt,  at::kBFloat16,
                                     at::kHalf, at::kShort,  at::kChar,  at::kByte, at::kBool};
static_assert(std::size(kTypes) == std::size(kDtypes));

std::size_t position_of(std::string_view dtype) {
  for (std::size_t i = 0; i < std::size(kDtypes); ++i)
    if (kDtypes[i].name == dtype) return i;
  fail(ErrorKind::kBug, "the dtype ", dtype, " passed the header check");
}

std::size_t position_of(at::ScalarType type) {
  for (std::size_t i = 0; i < std::size(kTypes); ++i)
    if (kTypes[i] == type) return i;
  fail(ErrorKind::kBug, "tensors of type ", toString(type), " are not written to safetensors files");
}

// Word types hold the bits of a floating value; all exponent bits set means infinity or NaN.
template <class Word>
std::int64_t first_with_exponent(const void* data, std::int64_t count, Word exponent) {
  const Word* const words = static_cast<const Word*>(data);
  std::atomic<std::int64_t> first{count};
  at::parallel_for(0, count, 1 << 16, [&](std::int64_t begin, std::int64_t end) {
    constexpr std::int64_t kRun = 4096;  // few enough to stop early, many enough for a vector loop without branches
    for (std::int64_t from = begin; from < end; from += kRun) {
      const std::int64_t to = std::min(end, from + kRun);
      unsigned bad = 0;
      for (std::int64_t i = from; i < to; ++i) bad |= static_cast<unsigned>((words[i] & exponent) == exponent);
      if (!bad) continue;
      std::int64_t here = from;
      while ((words[here] & exponent) != exponent) ++here;
      std::int64_t seen = first.load();
      while (here < seen && !first.compare_exchange_weak(seen, here)) {
      }
      return;
    }
  });
  return first == count ? -1 : first.load();
}

}  // namespace

struct SafetensorsFile::State {
  std::filesystem::path path;
  MappedFile file;
  std::map<std::string, TensorEntry> entries;
  std::map<std::string, std::string> metadata;
  const std::byte* data = nullptr;

  explicit State(const std::filesystem::path& from) : path(from), file(from) {
    SafetensorsHeader header = parse_safetensors_header(file.text(), path.string());
    for (auto& [name, entry] : header.entries)
      entries.emplace(name, TensorEntry{kTypes[position_of(entry.dtype)], std::move(entry.shape), entry.begin, entry.end});
    metadata = std::move(header.metadata);
    data = file.bytes().data() + header.data_begin;
  }
};

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : state_(std::make_shared<const State>(path)) {}

const std::map<std::string, TensorEntry>& SafetensorsFile::entries() const { return state_->entries; }
const std::map<std::string, std::string>& SafetensorsFile::metadata() const { return state_->metadata; }
const std::filesystem::path& SafetensorsFile::path() const { return state_->path; }

at::Tensor SafetensorsFile::tensor(const std::string& name) const {
  const auto found = state_->entries.find(name);
  if (found == state_->entries.end()) fail(ErrorKind::kData, state_->path.string(), ": holds no tensor \"", name, "\"");
  const TensorEntry& entry = found->second;
  return slice(name, 0, static_cast<std::int64_t>((entry.end - entry.begin) / c10::elementSize(entry.type))).view(entry.shape);
}

at::Tensor SafetensorsFile::slice(const std::string& name, std::int64_t first, std::int64_t count) const {
  const TensorEntry& entry = state_->entries.at(name);
  const std::size_t size = c10::elementSize(entry.type), length = static_cast<std::size_t>(count) * size;
  const std::byte* const bytes = state_->data + entry.begin + static_cast<std::size_t>(first) * size;
  const auto options = at::TensorOptions(entry.type);
  if (count == 0) return at::empty({0}, options);
  if (reinterpret_cast<std::uintptr_t>(bytes) % size != 0) {
    at::Tensor copy = at::empty({count}, options);
    std::memcpy(copy.data_ptr(), bytes, length);
    return copy;
  }
  return at::from_blob(const_cast<std::byte*>(bytes), {count}, [state = state_](void*) {}, options);
}

at::Tensor SafetensorsFile::tensor_as(const std::string& name, at::ScalarType type) const {
  const at::Tensor stored = tensor(name);
  if (stored.scalar_type() == type) return stored;
  at::Tensor converted = stored.to(type);
  release(name);
  return converted;
}

void SafetensorsFile::release(const std::string& name) const {
  const TensorEntry& entry = state_->entries.at(name);
  const std::size_t data_begin = static_cast<std::size_t>(state_->data - state_->file.bytes().data());
  state_->file.release(data_begin + entry.begin, data_begin + entry.end);
}

std::vector<std::size_t> order_in_file(const std::vector<TensorToWrite>& tensors) {
  std::vector<std::size_t> order(tensors.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    const std::size_t type_a = position_of(tensors[a].type), type_b = position_of(tensors[b].type);
    return type_a != type_b ? type_a < type_b : tensors[a].name < tensors[b].name;
  });
  return order;
}

std::string write_safetensors(const std::filesystem::path& path, const std::vector<TensorToWrite>& tensors,
                              const std::function<at::Tensor(std::size_t)>& make, const std::map<std::string, std::string>& metadata) {
  const std::vector<std::size_t> order = order_in_file(tensors);
  std::vector<std::pair<std::string, HeaderEntry>> entries;
  std::uint64_t offset = 0;
  for (const std::size_t i : order) {
    const DtypeName& dtype = kDtypes[position_of(tensors[i].type)];
    std::uint64_t num_bytes = dtype.num_bytes;
    for (const std::int64_t size : tensors[i].shape) num_bytes *= static_cast<std::uint64_t>(size);
    entries.emplace_back(tensors[i].name, HeaderEntry{std::string(dtype.name), tensors[i].shape, offset, offset + num_bytes});
    offset += num_bytes;
  }
  for (std::size_t i = 1; i < entries.size(); ++i)
    if (entries[i].first == entries[i - 1].first) fail(ErrorKind::kBug, path.string(), ": the tensor \"", entries[i].first, "\" is written twice");

  AtomicFile file(path);
  file.write(make_safetensors_header(entries, metadata));
  for (const std::size_t i : order) {
    const at::Tensor tensor = make(i).detach().cpu().contiguous();
    if (tensor.scalar_type() != tensors[i].type || tensor.sizes() != at::IntArrayRef(tensors[i].shape))
      fail(ErrorKind::kBug, path.string(), ": tensor \"", tensors[i].name, "\" is ", toString(tensor.scalar_type()), " ", tensor.sizes(),
           ", announced as ", toString(tensors[i].type), " ", at::IntArrayRef(tensors[i].shape));
    if (const std::int64_t bad = first_non_finite(tensor); bad >= 0)
      fail(ErrorKind::kNumerics, path.string(), ": tensor \"", tensors[i].name, "\" is not finite at element ", bad, "; nothing was written",
           Remedy{"weights with NaN or infinity are never saved: look at the loss before this step"});
    file.write(tensor.const_data_ptr(), tensor.nbytes());
  }
  return file.commit();
}

std::string write_safetensors(const std::filesystem::path& path, const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                              const std::map<std::string, std::string>& metadata) {
  std::vector<TensorToWrite> announced;
  for (const auto& [name, tensor] : tensors) {
    if (!tensor.defined()) fail(ErrorKind::kBug, path.string(), ": the tensor \"", name, "\" is undefined");
    announced.push_back({name, tensor.scalar_type(), tensor.sizes().vec()});
  }
  return write_safetensors(path, announced, [&](std::size_t i) { return tensors[i].second; }, metadata);
}

std::int64_t first_non_finite(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return first_with_exponent<std::uint32_t>(tensor.const_data_ptr(), tensor.numel(), 0x7f800000u);
    case at::kBFloat16: return first_with_exponent<std::uint16_t>(tensor.const_data_ptr(), tensor.numel(), std::uint16_t{0x7f80});
    case at::kHalf: return first_with_exponent<std::uint16_t>(tensor.const_data_ptr(), tensor.numel(), std::uint16_t{0x7c00});
    case at::kDouble: return first_with_exponent<std::uint64_t>(tensor.const_data_ptr(), tensor.numel(), 0x7ff0000000000000ull);
    default: return -1;
  }
}

}  // namespace alambic::checkpoints
