// SPDX-License-Identifier: Apache-2.0
#pragma once
// A Hugging Face model folder: config.json, safetensors (one file or shards with an index), tokenizer files.
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "models/decoder.h"

namespace alambic::checkpoints {

/// All tensors of a folder by name, mapped. Checks index and shards (names are bare file names inside the folder).
class FolderTensors {
 public:
  explicit FolderTensors(const std::filesystem::path& folder);
  ~FolderTensors();
  std::vector<std::string> names() const;
  at::Tensor tensor(const std::string& name) const;  // a view of the mapping
  /// SHA-256 over the sorted (file name, file hash) pairs of config and weights: the identity of a base model.
  std::string hash() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Loads config and weights in `compute_type` (norms f32). Error(kData) lists every missing, unclaimed or misshapen
/// tensor, with the nearest names; non-finite weights are refused.
models::Decoder load_decoder(const std::filesystem::path& folder, at::ScalarType compute_type);

/// Identity of the base in `folder`; cached beside nothing, computed by reading the files once.
std::string base_hash(const std::filesystem::path& folder);

/// Writes tensors shard by shard (at most max_shard_bytes each) with model.safetensors[.index.json]. tensors are made one
/// at a time by `make(i)`, so that one shard at most is in memory. Returns (file name, SHA-256) pairs.
std::vector<std::pair<std::string, std::string>> write_weights(
    const std::filesystem::path& folder, const std::vector<std::pair<std::string, std::vector<std::int64_t>>>& names_and_shapes,
    at::ScalarType type, const std::function<at::Tensor(std::size_t)>& make, std::uint64_t max_shard_bytes = 5ull << 30);

/// config, tokenizer, template, generation config, LICENSE and NOTICE texts that a derived folder carries over unchanged.
std::vector<std::string> copy_companions(const std::filesystem::path& from, const std::filesystem::path& to);

}  // namespace alambic::checkpoints
