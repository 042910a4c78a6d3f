// SPDX-License-Identifier: Apache-2.0
#include "models/allocation.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <string>
#include <thread>

#include "core/random.h"

namespace alambic {
namespace {

constexpr std::int64_t kMega = 1 << 20;
at::Tensor bytes(std::int64_t count) { return at::empty({count}, at::kByte); }

TEST(TensorHeaps, AFreedPlaceServesTheNextTensorOfItsSize) {
  use_tensor_heaps();
  at::Tensor first = bytes(kMega);
  const at::Tensor behind = bytes(kMega);
  const void* const place = first.const_data_ptr();
  first.reset();
  EXPECT_EQ(bytes(kMega).const_data_ptr(), place);
}

TEST(TensorHeaps, FreeNeighboursBecomeOnePlace) {
  use_tensor_heaps();
  at::Tensor first = bytes(kMega), second = bytes(kMega), third = bytes(kMega);
  const at::Tensor behind = bytes(kMega);
  const void* const place = first.const_data_ptr();
  second.reset();
  first.reset();
  third.reset();
  EXPECT_EQ(bytes(3 * kMega).const_data_ptr(), place);
}

TEST(TensorHeaps, TheBestFittingPlaceIsTaken) {
  use_tensor_heaps();
  // Larger than any place that other tests have left, so that the larger one lies first.
  at::Tensor large = bytes(64 * kMega);
  const at::Tensor between = bytes(kMega);
  at::Tensor small = bytes(32 * kMega);
  ASSERT_LT(large.const_data_ptr(), small.const_data_ptr());
  const at::Tensor behind = bytes(kMega);
  const void* const place = small.const_data_ptr();
  large.reset();
  small.reset();
  EXPECT_EQ(bytes(32 * kMega).const_data_ptr(), place);
}

TEST(TensorHeaps, HugePagesAreAskedFor) {
  if (std::ifstream("/sys/kernel/mm/transparent_hugepage/enabled").fail()) GTEST_SKIP() << "the kernel has no huge pages";
  use_tensor_heaps();
  const at::Tensor tensor = bytes(kMega);
  const auto address = reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr());
  // Of each mapping: first-end in hexadecimal and more, then lines of "Key: value", of which VmFlags has hg where they are asked for.
  std::ifstream mappings("/proc/self/smaps");
  std::string line;
  bool is_here = false;
  while (std::getline(mappings, line)) {
    unsigned long long first = 0, end = 0;
    if (std::sscanf(line.c_str(), "%llx-%llx ", &first, &end) == 2) is_here = first <= address && address < end;
    if (is_here && line.starts_with("VmFlags:")) {
      EXPECT_NE(line.find(" hg"), std::string::npos) << line;
      return;
    }
  }
  FAIL() << "no mapping holds the tensor";
}

TEST(TensorHeaps, KeptTensorsDoNotLieAmongOthers) {
  use_tensor_heaps();
  at::Tensor hole = bytes(kMega);
  const at::Tensor behind = bytes(kMega);
  const void* const place = hole.const_data_ptr();
  hole.reset();
  {
    const KeptTensors own;
    at::Tensor kept = bytes(kMega);
    EXPECT_NE(kept.const_data_ptr(), place);
    const KeptTensors inactive(false);
    EXPECT_EQ(bytes(kMega).const_data_ptr(), place);
  }
  EXPECT_EQ(bytes(kMega).const_data_ptr(), place);
}

TEST(TensorHeaps, WhatWaitsForTheOptimiserTakesRoomOfBothHeapsAndNoNewOfTheFirst) {
  use_tensor_heaps();
  const auto kept = [](std::int64_t count) {
    const KeptTensors own;
    return bytes(count);
  };
  const auto waiting = [](std::int64_t count) {
    const TensorsUntilTheOptimiser own;
    return bytes(count);
  };
  // Larger than any place that other tests have left.
  at::Tensor logits = bytes(96 * kMega), activation = kept(80 * kMega);
  const at::Tensor behind = bytes(kMega), behind_kept = kept(kMega);
  const void *const of_logits = logits.const_data_ptr(), *const of_activation = activation.const_data_ptr();
  logits.reset(), activation.reset();
  const at::Tensor first = waiting(80 * kMega), second = waiting(80 * kMega), third = waiting(80 * kMega);
  EXPECT_EQ(first.const_data_ptr(), of_activation);
  EXPECT_EQ(static_cast<const char*>(second.const_data_ptr()), static_cast<const char*>(of_logits) + 16 * kMega);
  const at::Tensor next = bytes(80 * kMega), next_kept = kept(80 * kMega);  // where their heaps go on
  EXPECT_GT(next.const_data_ptr(), behind.const_data_ptr());
  EXPECT_EQ(static_cast<const char*>(next_kept.const_data_ptr()), static_cast<const char*>(third.const_data_ptr()) + 80 * kMega);
}

// A backward pass frees the highest block first. What its gradients leave of a block's room must serve the next block's, too: 96 of 128, then 160 of 32 + 128.
TEST(TensorHeaps, WhatWaitsForTheOptimiserClosesUpWhereBlocksAreFreedFromTheHighestDown) {
  use_tensor_heaps();
  const auto waiting = [](std::int64_t count) {
    const TensorsUntilTheOptimiser own;
    return bytes(count);
  };
  std::vector<at::Tensor> blocks;
  {
    const KeptTensors own;
    for (int i = 0; i < 2; ++i) blocks.push_back(bytes(128 * kMega));
  }
  const auto* const lowest = static_cast<const char*>(blocks[0].const_data_ptr());
  ASSERT_EQ(static_cast<const char*>(blocks[1].const_data_ptr()), lowest + 128 * kMega);
  blocks.pop_back();
  const at::Tensor of_last = waiting(96 * kMega);
  EXPECT_EQ(static_cast<const char*>(of_last.const_data_ptr()), lowest + 160 * kMega);
  blocks.pop_back();
  const at::Tensor of_first = waiting(160 * kMega);
  EXPECT_EQ(static_cast<const char*>(of_first.const_data_ptr()), lowest);
}

TEST(TensorHeaps, ManyThreadsGetPlacesOfTheirOwn) {
  use_tensor_heaps();
  std::atomic<int> wrong = 0;
  const auto work = [&](std::uint8_t mine) {
    std::vector<at::Tensor> held;
    for (std::uint64_t i = 0; i < 400; ++i) {
      const std::uint64_t draw = mix64(mine * 1000 + i);
      const KeptTensors kept(draw % 3 == 0);
      held.push_back(at::full({static_cast<std::int64_t>(1 + draw % (64 << 10))}, mine, at::kByte));
      if (held.size() < 20) continue;
      const at::Tensor old = held[draw % held.size()];
      wrong += old.ne(mine).any().item<bool>();
      held.erase(held.begin() + static_cast<std::ptrdiff_t>(draw % held.size()));
    }
    for (const at::Tensor& tensor : held) wrong += tensor.ne(mine).any().item<bool>();
  };
  {
    std::vector<std::jthread> threads;
    for (std::uint8_t i = 1; i <= 4; ++i) threads.emplace_back(work, i);
  }
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace alambic
