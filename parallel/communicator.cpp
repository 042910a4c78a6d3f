// SPDX-License-Identifier: Apache-2.0
#include "parallel/communicator.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <map>

namespace alambic::parallel {
namespace {

class Done : public Gather {
 public:
  void wait() override {}
};

class Single : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  void start_sum(std::span<at::Tensor>, std::string_view) override {}
  void start_reduce_scatter(std::span<const std::vector<at::Tensor>> parts, std::span<at::Tensor> own, std::string_view) override {
    for (std::size_t i = 0; i < own.size(); ++i) own[i].copy_(parts[0][i]);
  }
  void finish_sums(std::string_view) override {}
  at::Tensor all_gather(const at::Tensor& own, std::string_view) override { return own.unsqueeze(0); }
  std::unique_ptr<Gather> start_gather(const at::Tensor& all, const at::Tensor& own, int, std::string_view) override {
    all[0].copy_(own);
    return std::make_unique<Done>();
  }
  std::unique_ptr<Gather> start_exchange(const at::Tensor& receive, int, const at::Tensor& send, int, std::string_view) override {
    at::Tensor(receive).copy_(send);
    return std::make_unique<Done>();
  }
  void broadcast_in_place(std::span<at::Tensor>, int, std::string_view) override {}
  void barrier(std::string_view) override {}
  void at_step(std::int64_t) override {}
  void check() override {}
  double seconds_in_calls() const override { return 0; }
  void tell_failure(std::string_view) noexcept override {}
};

at::Tensor bytes_of(const std::string& text, std::size_t size) {
  at::Tensor bytes = at::zeros({static_cast<std::int64_t>(size)}, at::kByte);
  std::memcpy(bytes.mutable_data_ptr<std::uint8_t>(), text.data(), text.size());
  return bytes;
}

/// Leaves of a JSON value by path: "data.mixture[0].weight".
void flatten(const std::string& path, const Json& value, std::map<std::string, std::string>& leaves) {
  if (value.is_object() && !value.empty())
    for (const auto& [key, member] : value.items()) flatten(path.empty() ? key : path + "." + key, member, leaves);
  else if (value.is_array() && !value.empty())
    for (std::size_t i = 0; i < value.size(); ++i) flatten(path + "[" + std::to_string(i) + "]", value[i], leaves);
  else
    leaves[path] = to_line(value);
}

}  // namespace

std::unique_ptr<Communicator> single() { return std::make_unique<Single>(); }

at::Tensor tree_sum(std::span<const at::Tensor> parts) {
  return tree_walk<at::Tensor>(0, 1, static_cast<std::int64_t>(parts.size()), [&](std::int64_t i) { return parts[static_cast<std::size_t>(i)]; },
                               [](const at::Tensor& a, const at::Tensor& b) { return at::add(a, b); });
}

std::vector<std::string> gather_text(Communicator& ranks, const std::string& own, std::string_view what) {
  if (ranks.size() == 1) return {own};
  const at::Tensor length = at::empty({1}, at::kLong).fill_(static_cast<std::int64_t>(own.size()));
  const at::Tensor lengths = ranks.all_gather(length, what);
  const std::int64_t longest = lengths.max().item<std::int64_t>();
  if (longest == 0) return std::vector<std::string>(static_cast<std::size_t>(ranks.size()));
  const at::Tensor all = ranks.all_gather(bytes_of(own, static_cast<std::size_t>(longest)), what);
  std::vector<std::string> texts;
  for (std::int64_t i = 0; i < ranks.size(); ++i)
    texts.emplace_back(reinterpret_cast<const char*>(all[i].const_data_ptr<std::uint8_t>()), static_cast<std::size_t>(lengths[i][0].item<std::int64_t>()));
  return texts;
}

std::string broadcast_text(Communicator& ranks, const std::string& text, int root, std::string_view what) {
  if (ranks.size() == 1) return text;
  at::Tensor length = at::empty({1}, at::kLong).fill_(static_cast<std::int64_t>(text.size()));
  ranks.broadcast_in_place({&length, 1}, root, what);
  const auto size = static_cast<std::size_t>(length.item<std::int64_t>());
  if (size == 0) return "";
  at::Tensor bytes = ranks.rank() == root ? bytes_of(text, size) : bytes_of("", size);
  ranks.broadcast_in_place({&bytes, 1}, root, what);
  return {reinterpret_cast<const char*>(bytes.const_data_ptr<std::uint8_t>()), size};
}

bool any(Communicator& ranks, bool own, std::string_view what) {
  if (ranks.size() == 1) return own;
  at::Tensor votes = at::zeros({1}, at::kDouble).fill_(own ? 1.0 : 0.0);
  ranks.sum_in_place({&votes, 1}, what);
  return votes.item<double>() > 0;
}

void require_agreement(Communicator& ranks, const Json& facts, std::string_view what) {
  if (ranks.size() == 1) return;
  const std::vector<std::string> texts = gather_text(ranks, to_line(facts), what);
  std::map<std::string, std::string> first;
  flatten("", parse_json(texts[0], "rank 0"), first);
  std::string differences;
  for (std::size_t rank = 1; rank < texts.size(); ++rank) {
    if (texts[rank] == texts[0]) continue;
    std::map<std::string, std::string> other, all = first;
    flatten("", parse_json(texts[rank], "rank " + std::to_string(rank)), other);
    all.insert(other.begin(), other.end());
    for (const auto& [path, value] : all) {
      const auto value_in = [&](const std::map<std::string, std::string>& leaves) {
        const auto found = leaves.find(path);
        return found == leaves.end() ? std::string("absent") : found->second;
      };
      if (value_in(first) != value_in(other))
        differences += "\n  " + path + ": " + value_in(first) + " on rank 0, " + value_in(other) + " on rank " + std::to_string(rank);
    }
  }
  if (differences.empty()) return;
  fail(ErrorKind::kPeer, "the ranks disagree (", what, "):", differences,
       Remedy{"start every rank with the same program, config, base and data"});
}

}  // namespace alambic::parallel
