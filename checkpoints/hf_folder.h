// SPDX-License-Identifier: Apache-2.0
#pragma once
// A Hugging Face model folder: config.json, safetensors (one file or shards with an index), tokenizer files.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lora/quantize.h"
#include "models/decoder.h"

namespace alambic::parallel {
class Communicator;
}

namespace alambic::checkpoints {

struct TensorToWrite;  // checkpoints/safetensors.h

/// The regular file `name` of a folder that somebody else made; an empty path when there is none. A symbolic link may lead
/// to a file of the same folder or, in the Hub's cache layout (<repo>/snapshots/<revision>/ -> <repo>/blobs/), to a blob;
/// any other link is Error(kData), because a published folder must not pull in what lies elsewhere on the machine.
std::filesystem::path file_of_folder(const std::filesystem::path& folder, const std::string& name);

/// All tensors of a folder by name, mapped. model.safetensors, or the shards of model.safetensors.index.json. Error(kData)
/// lists every disagreement of index and shards: a name that is no bare file name, a missing or an unlisted shard, a
/// tensor that is not in the shard named, a tensor that the index does not name. Pickled weights are never opened.
class FolderTensors {
 public:
  explicit FolderTensors(const std::filesystem::path& folder);
  ~FolderTensors();
  std::vector<std::string> names() const;                               // sorted
  at::ScalarType type(const std::string& name) const;                   // as stored
  std::vector<std::int64_t> shape(const std::string& name) const;
  bool contains(const std::string& name) const;
  at::Tensor tensor(const std::string& name) const;                     // SafetensorsFile::tensor
  at::Tensor slice(const std::string& name, std::int64_t first, std::int64_t count) const;  // SafetensorsFile::slice
  at::Tensor tensor_as(const std::string& name, at::ScalarType type) const;  // SafetensorsFile::tensor_as
  void release(const std::string& name) const;                          // SafetensorsFile::release
  std::uint64_t num_bytes() const;                                      // of all weight files
  /// SHA-256 over the sorted (file name, SHA-256 of the file) pairs of config.json and the weight files: the identity of a
  /// base model, wherever its folder lies.
  std::string hash() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Loads config and weights: norms in f32, all else in `compute_type`, converted once. Tensors stored in the wanted type
/// stay views of the mapping (loading then reads a page when it is first used); they may be trained in place.
/// Error(kData) lists every missing, unclaimed or misshapen tensor with the nearest names; weights that are not finite are
/// refused. A head that config.json calls tied but that is stored with other values is kept as its own tensor, with a
/// warning, and config.tied_head and config.source then say so.
/// The blocks' linear layers are quantised as asked, one after the other, so that the dense model is never in memory; those of
/// a folder that bitsandbytes quantised are taken as they are (Error(kUsage): something else is asked for).
/// kAsStored: what of linear layers, embedding and head is stored in bf16 or f16 stays so, a view of the mapping, where the run computes in f32
/// (lora/stored_weight.h).
/// sharing: each of several ranks loads its part of these layers and no more of them (Decoder::shards), in the narrower of the type of the
/// file and that of the run; the ranks outlive the decoder, and all of them call this.
enum class Linears { kDense, kAsStored };
/// Every `group` ranks that follow each other share a model; a divisor of their number. 1: none does.
struct Sharing {
  parallel::Communicator& ranks;
  int group;
  std::size_t part() const;  // of this rank in its group
};
models::Decoder load_decoder(const std::filesystem::path& folder, at::ScalarType compute_type, const lora::BaseQuantization& quantization = {}, Linears linears = Linears::kDense,
                             const std::optional<Sharing>& sharing = std::nullopt);

/// FolderTensors::hash of `folder`, computed by reading the files once.
std::string base_hash(const std::filesystem::path& folder);

/// Writes tensors in the order given into shards of at most max_shard_bytes (more only where one tensor is larger):
/// model.safetensors alone, or model-0000i-of-0000n.safetensors with model.safetensors.index.json. make(i) is called once
/// for each, and what it returns is converted to `type`; one tensor at a time is in memory. Returns (file name, SHA-256).
std::vector<std::pair<std::string, std::string>> write_weights(
    const std::filesystem::path& folder, const std::vector<std::pair<std::string, std::vector<std::int64_t>>>& names_and_shapes,
    at::ScalarType type, const std::function<at::Tensor(std::size_t)>& make, std::uint64_t max_shard_bytes = 5'000'000'000);

/// The same, each tensor in a type of its own, which make(i) returns.
std::vector<std::pair<std::string, std::string>> write_weights(const std::filesystem::path& folder, const std::vector<TensorToWrite>& tensors,
                                                               const std::function<at::Tensor(std::size_t)>& make,
                                                               std::uint64_t max_shard_bytes = 5'000'000'000);

/// What config.json calls a weight type: "float32", "bfloat16", "float16".
std::string config_name_of(at::ScalarType weights);

/// Makes the config.json of a derived folder say what its weights now are: their type, and whether the head is the embedding.
void describe_weights(const std::filesystem::path& folder, at::ScalarType weights, bool head_tied);

/// Copies what a derived folder carries over unchanged: config.json, generation_config.json, tokenizer files, chat
/// templates, and the texts LICENSE*, NOTICE*, USE_POLICY* and the like; never README.md or weights. Returns the names.
std::vector<std::string> copy_companions(const std::filesystem::path& from, const std::filesystem::path& to);

}  // namespace alambic::checkpoints
