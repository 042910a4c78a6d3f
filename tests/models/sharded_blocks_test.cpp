// SPDX-License-Identifier: Apache-2.0
#include "models/sharded_blocks.h"

#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include "tests/forked_ranks.h"

namespace alambic::models {
namespace {

using parallel::Communicator;

constexpr std::int64_t kBlocks = 5;

std::int64_t length_of(std::int64_t layer) { return layer == 3 ? 64 : 100'032; }

std::shared_ptr<ShardedBlocks> blocks_of(Communicator& ranks) {
  std::vector<at::Tensor> own;
  for (std::int64_t layer = 0; layer < kBlocks; ++layer) own.push_back(at::full({length_of(layer)}, 10 * layer + ranks.rank(), at::kByte));
  return std::make_shared<ShardedBlocks>(ranks, ranks.size(), std::move(own));
}

std::string wrong_with(ShardedBlocks& blocks, Communicator& ranks, std::int64_t layer) {
  const at::Tensor block = blocks.block(layer);
  for (int rank = 0; rank < ranks.size(); ++rank)
    if (!block[rank].equal(at::full({length_of(layer)}, 10 * layer + rank, at::kByte))) return "block " + std::to_string(layer) + " of rank " + std::to_string(rank) + "; ";
  return "";
}

class OnRanks : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Sizes, OnRanks, ::testing::Values(1, 2, 3, 4), ::testing::PrintToStringParamName());

// Each rank leaves other parts of its passes out, as one does whose text is masked, whose loss is not finite or that has no batch left.
TEST_P(OnRanks, HaveEveryBlockWhateverTheOthersLeaveOut) {
  testing::expect_all_fine(testing::run_ranks(GetParam(), testing::kPatient, [](Communicator& ranks) {
    const std::shared_ptr<ShardedBlocks> blocks = blocks_of(ranks);
    std::string wrong;
    for (int pass = 0; pass < 12; ++pass) {
      const int turn = (pass + ranks.rank()) % 4;
      const bool backward = pass % 5 != 0;
      for (std::int64_t layer = 0; layer < kBlocks && turn != 1; ++layer) {
        wrong += wrong_with(*blocks, ranks, layer);
        if (layer == 2) wrong += wrong_with(*blocks, ranks, layer);  // several weights of one block
      }
      // Down to the lowest that trains; the others' may be lower.
      for (std::int64_t layer = kBlocks; backward && turn > 1 && layer-- > 3 - turn;) wrong += wrong_with(*blocks, ranks, layer);
      blocks->end_pass(backward);
      at::Tensor other = at::full({3}, 1.0, at::kFloat);
      ranks.sum_in_place({&other, 1}, "a sum between passes");
    }
    // Generation passes forwards many times, on all ranks alike.
    for (int token = 0; token < 3; ++token)
      for (std::int64_t layer = 0; layer < kBlocks; ++layer) wrong += wrong_with(*blocks, ranks, layer);
    blocks->end_common_pass();
    return wrong;
  }));
}

// As on two machines: each group has a model of its own, and their parts never mix.
TEST(ShardedBlocks, AreSharedByEachGroupForItself) {
  testing::expect_all_fine(testing::run_ranks(6, testing::kPatient, [](Communicator& ranks) {
    std::string wrong;
    for (const int group : {1, 2, 3, 6}) {
      const int number = ranks.rank() / group, part = ranks.rank() % group;
      const auto value = [](int of_group, int of_part, std::int64_t layer) { return 100 * of_group + 10 * layer + of_part; };
      std::vector<at::Tensor> own;
      for (std::int64_t layer = 0; layer < kBlocks; ++layer) own.push_back(at::full({length_of(layer)}, value(number, part, layer) % 251, at::kByte));
      ShardedBlocks blocks(ranks, group, std::move(own));
      for (int pass = 0; pass < 3; ++pass) {
        for (std::int64_t layer = 0; layer < kBlocks && (pass + ranks.rank()) % 3 != 1; ++layer) {
          const at::Tensor block = blocks.block(layer);
          if (block.size(0) != group) wrong += "parts of other groups; ";
          for (int each = 0; each < group; ++each)
            if (!block[each].equal(at::full({length_of(layer)}, value(number, each, layer) % 251, at::kByte))) wrong += "block " + std::to_string(layer) + " of part " + std::to_string(each) + " in groups of " + std::to_string(group) + "; ";
        }
        blocks.end_pass(true);
      }
    }
    return wrong;
  }));
}

TEST(ShardedBlocks, ADeadRankOfAnotherGroupEndsAll) {
  const auto ends = testing::run_ranks(4, testing::kPatient, [](Communicator& ranks) {
    ranks.at_step(3);
    std::vector<at::Tensor> own;
    for (std::int64_t layer = 0; layer < kBlocks; ++layer) own.push_back(at::full({length_of(layer)}, ranks.rank(), at::kByte));
    ShardedBlocks blocks(ranks, 2, std::move(own));
    for (int pass = 0; pass < 1000; ++pass) {
      if (pass == 5 && ranks.rank() == 3) ::kill(::getpid(), SIGKILL);
      blocks.end_pass(true);
      ranks.check();
    }
    ranks.barrier("passes");
    return "";
  });
  testing::expect_lost(ends, 3, 15, {"rank 3 died in step 3, weights of block"});
}

TEST(ShardedBlocks, KeepOnePartAndTwoBuffers) {
  testing::expect_all_fine(testing::run_ranks(4, testing::kPatient, [](Communicator& ranks) -> std::string {
    const std::shared_ptr<ShardedBlocks> blocks = blocks_of(ranks);
    if (blocks->own_bytes() != 4 * 100'032 + 64) return std::to_string(blocks->own_bytes());
    return blocks->buffer_bytes() == 2 * 4 * 100'032 ? "" : std::to_string(blocks->buffer_bytes());
  }));
}

TEST(ShardedBlocks, ARankThatDiesBetweenTwoBlocksEndsTheOthers) {
  const auto ends = testing::run_ranks(3, testing::kPatient, [](Communicator& ranks) {
    ranks.at_step(8);
    const std::shared_ptr<ShardedBlocks> blocks = blocks_of(ranks);
    for (std::int64_t layer = 0; layer < kBlocks; ++layer) {
      if (layer == 2 && ranks.rank() == 1) ::kill(::getpid(), SIGKILL);
      blocks->block(layer);
    }
    blocks->end_pass(true);
    return "";
  });
  testing::expect_lost(ends, 1, 10, {"rank 1 died in step 8, weights of block 2", "in step 8, weights of block"});
}

// A part that sockets cannot hold: what the others have of it when the rank dies is a piece.
TEST(ShardedBlocks, ARankThatDiesInTheMiddleOfAGatherEndsTheOthers) {
  const auto ends = testing::run_ranks(3, testing::kPatient, [](Communicator& ranks) {
    ranks.at_step(5);
    const std::int64_t bytes = 16 << 20;
    std::vector<at::Tensor> own;
    for (int layer = 0; layer < 2; ++layer) own.push_back(at::full({bytes}, ranks.rank(), at::kByte));
    ShardedBlocks blocks(ranks, ranks.size(), std::move(own));
    ranks.barrier("all are here");
    if (ranks.rank() == 2) {
      const at::Tensor all = at::full({3, bytes}, 0, at::kByte);
      const auto gather = ranks.start_all_gather(all, at::full({bytes}, 2, at::kByte), "weights of block 0");
      ::kill(::getpid(), SIGKILL);
    }
    blocks.block(0);
    return "";
  });
  testing::expect_lost(ends, 2, 15, {"rank 2 died in step 5, weights of block 0; this is rank ", ", in step 5, weights of block 0"});
}

TEST(ShardedBlocks, ARankThatGoesAnotherWayIsNamed) {
  const auto ends = testing::run_ranks(2, testing::kPatient, [](Communicator& ranks) {
    const std::shared_ptr<ShardedBlocks> blocks = blocks_of(ranks);
    for (int again = 0; again < 100; ++again) {
      for (std::int64_t layer = 0; layer < kBlocks; ++layer) blocks->block(layer);
      if (ranks.rank() == 1) blocks->end_pass(true);  // rank 0 goes on with a pass forwards
    }
    return "";
  });
  testing::expect_lost(ends, 99, 10, {"rank 1 disagrees: it is in step 0, weights of block"});
}

}  // namespace
}  // namespace alambic::models
