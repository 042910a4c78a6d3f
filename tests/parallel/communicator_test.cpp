// SPDX-License-Identifier: Apache-2.0
// Each test is a process whose children are the ranks; they meet on loopback.
#include "parallel/communicator.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <thread>

#include "parallel/connect.h"
#include "parallel/watch.h"
#include "tests/forked_ranks.h"
#include "tests/support.h"

namespace alambic::parallel {
namespace {

using testing::End;
using testing::expect_all_fine;
using testing::expect_lost;
using testing::kPatient;
using testing::Port;
using testing::run_ranks;

class OnRanks : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Sizes, OnRanks, ::testing::Values(1, 2, 3, 4), ::testing::PrintToStringParamName());

TEST_P(OnRanks, SumsOfWholeNumbersAreExact) {
  expect_all_fine(run_ranks(GetParam(), kPatient, [](Communicator& ranks) -> std::string {
    const auto of_rank = [](const at::Tensor& base, int rank) { return base * (rank + 1) + rank; };
    // Odd sizes, an empty one, one longer than two buckets.
    std::vector<at::Tensor> bases, tensors;
    for (const std::int64_t size : {1, 7, 0, 1023, 5'000'001}) bases.push_back(at::arange(size, at::kFloat).remainder(1000));
    for (const at::Tensor& base : bases) tensors.push_back(of_rank(base, ranks.rank()));
    tensors.push_back(at::full({3, 5}, static_cast<double>(ranks.rank()), at::kFloat));
    ranks.sum_in_place(tensors, "whole numbers");
    for (std::size_t i = 0; i < bases.size(); ++i) {
      at::Tensor sum = at::zeros_like(bases[i]);
      for (int rank = 0; rank < ranks.size(); ++rank) sum += of_rank(bases[i], rank);
      if (!tensors[i].equal(sum)) return "sum of tensor " + std::to_string(i);
    }
    if (!tensors.back().equal(at::full({3, 5}, ranks.size() * (ranks.size() - 1) / 2.0, at::kFloat))) return "sum of the last tensor";
    at::Tensor count = at::full({1}, 1.0, at::kDouble);
    ranks.sum_in_place({&count, 1}, "f64");
    return count.item<double>() == ranks.size() ? "" : "sum of f64";
  }));
}

TEST_P(OnRanks, SumsFollowTheTree) {
  expect_all_fine(run_ranks(GetParam(), kPatient, [](Communicator& ranks) -> std::string {
    // Numbers of very different size: another order gives other bits.
    std::vector<at::Tensor> parts;
    for (int rank = 0; rank < ranks.size(); ++rank) {
      const at::Tensor x = at::arange(3'000'017, at::kFloat);
      parts.push_back((x * (1.1 + rank)).sin() * (x * (0.7 + rank)).cos().mul(20).exp());
    }
    at::Tensor own = parts[static_cast<std::size_t>(ranks.rank())].clone();
    ranks.sum_in_place({&own, 1}, "tree");
    if (!own.equal(tree_sum(parts))) return "not the tree's bits";
    if (ranks.size() > 2 && own.equal(parts[0] + parts[1] + parts[2] + (ranks.size() == 3 ? at::zeros({1}) : parts[3]))) return "the order does not show, so this test sees nothing";
    return "";
  }));
}

TEST_P(OnRanks, ScatteredSumsArePartsOfThoseInPlace) {
  expect_all_fine(run_ranks(GetParam(), kPatient, [](Communicator& ranks) -> std::string {
    const auto size = static_cast<std::size_t>(ranks.size()), self = static_cast<std::size_t>(ranks.rank());
    const at::Tensor given = (at::arange(4'000'000, at::kFloat) * (1.1 + ranks.rank())).sin().mul(20).exp();
    at::Tensor whole = given.clone(), other = given.narrow(0, 0, 3'000'000).clone();
    ranks.sum_in_place({&whole, 1}, "whole");
    // Uneven parts of several tensors: of more than one bucket, of one element, of none.
    const auto part_of = [&](std::size_t rank, std::size_t i) -> std::int64_t { return (rank + i) % 3 == 0 ? 0 : i == 1 ? 1 : static_cast<std::int64_t>(300'001 + 250'000 * rank); };
    std::vector<std::pair<at::Tensor, at::Tensor>> sums_and_wanted;
    for (int turn = 0; turn < 3; ++turn) {
      std::vector<std::vector<at::Tensor>> parts(size);
      std::vector<at::Tensor> own;
      std::int64_t begin = turn;
      for (std::size_t i = 0; i < 3; ++i)
        for (std::size_t rank = 0; rank < size; begin += part_of(rank, i), ++rank) {
          if (part_of(rank, i) == 0 && i == 2) continue;  // an empty tensor, or none at all
          parts[rank].push_back(given.narrow(0, begin, part_of(rank, i)).clone());
          if (rank != self) continue;
          own.push_back(at::full({part_of(rank, i)}, -1, at::kFloat));
          sums_and_wanted.emplace_back(own.back(), whole.narrow(0, begin, part_of(rank, i)));
        }
      ranks.start_reduce_scatter(parts, own, "parts");
      for (std::vector<at::Tensor>& part : parts)
        for (at::Tensor& tensor : part) tensor.fill_(1e30);  // they are read already
      if (turn == 1) ranks.start_sum({&other, 1}, "a sum between");
    }
    ranks.start_reduce_scatter(std::vector<std::vector<at::Tensor>>(size), {}, "nothing");
    ranks.finish_sums("parts");
    for (std::size_t i = 0; i < sums_and_wanted.size(); ++i)
      if (!sums_and_wanted[i].first.equal(sums_and_wanted[i].second)) return "part " + std::to_string(i);
    return other.equal(whole.narrow(0, 0, 3'000'000)) ? "" : "the sum between";
  }));
}

TEST_P(OnRanks, GatherBroadcastAndTexts) {
  expect_all_fine(run_ranks(GetParam(), kPatient, [](Communicator& ranks) -> std::string {
    for (const at::ScalarType type : {at::kFloat, at::kDouble, at::kLong, at::kByte, at::kBFloat16}) {
      const at::Tensor all = ranks.all_gather(at::full({3, 2}, ranks.rank() + 1, type), "gather");
      for (int rank = 0; rank < ranks.size(); ++rank)
        if (!all[rank].equal(at::full({3, 2}, rank + 1, type))) return "all_gather";
      std::vector<at::Tensor> tensors;
      for (int i = 0; i < 40; ++i) tensors.push_back(at::full({i}, ranks.rank() + i, type));
      const int root = ranks.size() - 1;
      ranks.broadcast_in_place(tensors, root, "broadcast");
      for (int i = 0; i < 40; ++i)
        if (!tensors[static_cast<std::size_t>(i)].equal(at::full({i}, root + i, type))) return "broadcast";
    }
    const std::vector<std::string> texts = gather_text(ranks, std::string(static_cast<std::size_t>(ranks.rank()) * 3, 'x'), "texts");
    for (int rank = 0; rank < ranks.size(); ++rank)
      if (texts[static_cast<std::size_t>(rank)].size() != static_cast<std::size_t>(rank) * 3) return "gather_text";
    if (broadcast_text(ranks, ranks.rank() == 0 ? "said by 0" : "", 0, "text") != "said by 0") return "broadcast_text";
    if (!broadcast_text(ranks, "", 0, "no text").empty()) return "empty broadcast_text";
    if (any(ranks, false, "nobody")) return "any of none";
    if (!any(ranks, ranks.rank() == ranks.size() - 1, "the last")) return "any";
    require_agreement(ranks, {{"a", 1}, {"b", {{"c", "d"}}}}, "facts");
    ranks.barrier("barrier");
    return "";
  }));
}

TEST_P(OnRanks, GathersUnderWayAreWaitedForInAnyOrder) {
  expect_all_fine(run_ranks(GetParam(), kPatient, [](Communicator& ranks) -> std::string {
    constexpr int kGathers = 3;
    std::vector<at::Tensor> own, all;
    std::vector<std::unique_ptr<Gather>> gathers;
    for (int i = 0; i < kGathers; ++i) {
      own.push_back(at::full({300'000 * i}, 10 * i + ranks.rank(), at::kByte));  // the first is empty
      all.push_back(at::empty({ranks.size(), 300'000 * i}, at::kByte));
      gathers.push_back(ranks.start_all_gather(all.back(), own.back(), "gather " + std::to_string(i)));
    }
    at::Tensor sum = at::full({1000}, 1.0, at::kFloat);
    ranks.sum_in_place({&sum, 1}, "a sum between");
    if (!sum.equal(at::full({1000}, ranks.size(), at::kFloat))) return "the sum between";
    for (int i = kGathers; i-- > 0;) {
      gathers[static_cast<std::size_t>(i)]->wait();
      gathers[static_cast<std::size_t>(i)]->wait();
      for (int rank = 0; rank < ranks.size(); ++rank)
        if (!all[static_cast<std::size_t>(i)][rank].equal(at::full({300'000 * i}, 10 * i + rank, at::kByte))) return "gather " + std::to_string(i);
    }
    return "";
  }));
}

TEST_P(OnRanks, SumsUnderWayHaveTheBitsOfSumsInPlace) {
  expect_all_fine(run_ranks(GetParam(), kPatient, [](Communicator& ranks) -> std::string {
    std::vector<at::Tensor> in_place, under_way;
    for (const std::int64_t size : {3'000'000, 1, 0, 70'000, 5'000'000, 17})
      in_place.push_back((at::arange(size, at::kFloat) * (1.1 + ranks.rank())).sin().mul(20).exp()), under_way.push_back(in_place.back().clone());
    ranks.sum_in_place(in_place, "in place");
    for (std::size_t i = 0; i < under_way.size(); ++i) {
      ranks.start_sum({&under_way[i], 1}, "under way " + std::to_string(i));
      if (i == 3 && !ranks.all_gather(at::full({2}, ranks.rank(), at::kLong), "between")[ranks.size() - 1].equal(at::full({2}, ranks.size() - 1, at::kLong))) return "a gather between";
    }
    ranks.finish_sums("under way");
    ranks.finish_sums("nothing under way");
    for (std::size_t i = 0; i < under_way.size(); ++i)
      if (!under_way[i].equal(in_place[i])) return "sum " + std::to_string(i);
    return (ranks.seconds_in_calls() > 0) == (ranks.size() > 1) ? "" : "no time was spent in calls";
  }));
}

TEST_P(OnRanks, ExchangesHaveSizesOfTheirOwn) {
  expect_all_fine(run_ranks(GetParam(), kPatient, [](Communicator& ranks) -> std::string {
    // Rank r sends to rank r + turn; how much, only the two of them know. Some send nothing, some hear nothing.
    const int size = ranks.size();
    const auto amount = [](int from, int turn) -> std::int64_t { return (from + turn) % 3 == 0 ? 0 : 100'001 * from + turn; };
    std::vector<at::Tensor> received;
    std::vector<std::unique_ptr<Gather>> exchanges;
    for (int turn = 0; turn < size; ++turn) {
      const int to = (ranks.rank() + turn) % size, from = (ranks.rank() - turn + size) % size;
      received.push_back(at::full({amount(from, turn)}, -1, at::kFloat));
      exchanges.push_back(ranks.start_exchange(received.back(), from, at::full({amount(ranks.rank(), turn)}, 10 * ranks.rank() + turn, at::kFloat), to, "exchange " + std::to_string(turn)));
    }
    at::Tensor sum = at::full({1000}, 1.0, at::kFloat);
    ranks.sum_in_place({&sum, 1}, "a sum between");
    for (int turn = size; turn-- > 0;) {
      const int from = (ranks.rank() - turn + size) % size;
      exchanges[static_cast<std::size_t>(turn)]->wait();
      if (!received[static_cast<std::size_t>(turn)].equal(at::full({amount(from, turn)}, 10 * from + turn, at::kFloat))) return "exchange " + std::to_string(turn);
    }
    return sum.equal(at::full({1000}, size, at::kFloat)) ? "" : "the sum between";
  }));
}

TEST(TreeSum, EveryNthPartIsASubtree) {
  std::vector<at::Tensor> parts;
  for (int i = 0; i < 12; ++i) parts.push_back(at::randn({1000}) * std::pow(10.0, i % 5));
  const at::Tensor whole = tree_sum(parts);
  for (const std::size_t ranks : {1u, 2u, 4u}) {
    std::vector<at::Tensor> of_rank;
    for (std::size_t rank = 0; rank < ranks; ++rank) {
      std::vector<at::Tensor> own;
      for (std::size_t i = rank; i < parts.size(); i += ranks) own.push_back(parts[i]);
      of_rank.push_back(tree_sum(own));
    }
    EXPECT_TRUE(tree_sum(of_rank).equal(whole)) << ranks;
  }
}

TEST(Ranks, ThatDisagreeNameWhatDiffers) {
  const auto ends = run_ranks(3, kPatient, [](Communicator& ranks) {
    require_agreement(ranks, {{"config", {{"seed", ranks.rank() == 2 ? 6 : 5}, {"rank", 4}}}, {"base", "abc"}}, "before the first step");
    return "";
  });
  expect_lost(ends, 99, 10, {"the ranks disagree (before the first step)", "config.seed: 5 on rank 0, 6 on rank 2"});
  for (const End& end : ends) EXPECT_EQ(end.said.find("config.rank"), std::string::npos) << end.said;
}

class LostRank : public ::testing::TestWithParam<std::size_t> {};
INSTANTIATE_TEST_SUITE_P(Which, LostRank, ::testing::Values(0, 1, 2), ::testing::PrintToStringParamName());

TEST_P(LostRank, ThatDiedIsNamed) {
  const auto ends = run_ranks(3, kPatient, [](Communicator& ranks) {
    ranks.at_step(41);
    ranks.barrier("first");
    if (ranks.rank() == static_cast<int>(GetParam())) ::kill(::getpid(), SIGKILL);
    ranks.at_step(42);
    at::Tensor values = at::zeros({1000});
    ranks.sum_in_place({&values, 1}, "gradients");
    ranks.barrier("second");
    return "";
  });
  expect_lost(ends, GetParam(), 10, {"rank " + std::to_string(GetParam()) + " died in step 41, first", "in step 42, gradients"});
}

TEST_P(LostRank, ThatDiedBeforeItsPartOfAGatherIsNamed) {
  const auto ends = run_ranks(3, kPatient, [](Communicator& ranks) {
    ranks.at_step(4);
    ranks.barrier("first");
    if (ranks.rank() == static_cast<int>(GetParam())) ::kill(::getpid(), SIGKILL);
    const at::Tensor all = at::empty({3, 1 << 20}, at::kByte), next = at::empty({3, 1 << 20}, at::kByte), own = at::zeros({1 << 20}, at::kByte);
    const auto gather = ranks.start_all_gather(all, own, "block 7"), another = ranks.start_all_gather(next, own, "block 8");
    gather->wait();
    return "";
  });
  expect_lost(ends, GetParam(), 10, {"rank " + std::to_string(GetParam()) + " died in step 4, first", "in step 4, block"});
}

TEST_P(LostRank, ThatDiedBetweenTwoSumsIsNamed) {
  const auto ends = run_ranks(3, kPatient, [](Communicator& ranks) {
    ranks.at_step(4);
    std::vector<at::Tensor> values;
    for (int i = 0; i < 6; ++i) {
      if (i == 2 && ranks.rank() == static_cast<int>(GetParam())) ::kill(::getpid(), SIGKILL);
      values.push_back(at::zeros({1 << 20}));
      ranks.start_sum({&values.back(), 1}, "gradients " + std::to_string(i));
    }
    ranks.finish_sums("all gradients");
    return "";
  });
  expect_lost(ends, GetParam(), 10, {"rank " + std::to_string(GetParam()) + " died in step 4, gradients 1", "in step 4, "});
}

TEST_P(LostRank, ThatDiedBetweenTwoScatteredSumsIsNamed) {
  const auto ends = run_ranks(3, kPatient, [](Communicator& ranks) {
    ranks.at_step(4);
    const std::vector<std::vector<at::Tensor>> parts(3, {at::zeros({1 << 20})});
    std::vector<at::Tensor> own(6);
    for (std::size_t i = 0; i < own.size(); ++i) {
      if (i == 2 && ranks.rank() == static_cast<int>(GetParam())) ::kill(::getpid(), SIGKILL);
      own[i] = at::zeros({1 << 20});
      ranks.start_reduce_scatter(parts, {&own[i], 1}, "gradients " + std::to_string(i));
    }
    ranks.finish_sums("all gradients");
    return "";
  });
  expect_lost(ends, GetParam(), 10, {"rank " + std::to_string(GetParam()) + " died in step 4, gradients 1", "in step 4, "});
}

TEST_P(LostRank, ThatHangsBeforeItsPartOfASumIsNamed) {
  const auto ends = run_ranks(3, {.timeout_seconds = 3, .connect_timeout_seconds = 60}, [](Communicator& ranks) {
    ranks.barrier("first");
    if (ranks.rank() == static_cast<int>(GetParam())) ::raise(SIGSTOP);
    at::Tensor own = at::zeros({1 << 20});
    ranks.start_reduce_scatter(std::vector<std::vector<at::Tensor>>(3, {at::zeros({1 << 20})}), {&own, 1}, "gradients");
    ranks.finish_sums("all gradients");
    return "";
  });
  expect_lost(ends, GetParam(), 3 + 10, {"rank " + std::to_string(GetParam()) + " hangs in step 0, first", "in step 0, all gradients"});
}

TEST_P(LostRank, ThatHangsBeforeItsPartOfAGatherIsNamed) {
  const auto ends = run_ranks(3, {.timeout_seconds = 3, .connect_timeout_seconds = 60}, [](Communicator& ranks) {
    ranks.barrier("first");
    if (ranks.rank() == static_cast<int>(GetParam())) ::raise(SIGSTOP);
    const at::Tensor all = at::empty({3, 1 << 20}, at::kByte), own = at::zeros({1 << 20}, at::kByte);
    ranks.start_all_gather(all, own, "block 7")->wait();
    return "";
  });
  expect_lost(ends, GetParam(), 3 + 10, {"rank " + std::to_string(GetParam()) + " hangs in step 0, first", "in step 0, block 7"});
}

TEST_P(LostRank, ThatDiedWhileOthersComputeIsSaidInALastWord) {
  const auto ends = run_ranks(3, kPatient, [](Communicator& ranks) {
    ranks.at_step(7);
    ranks.barrier("first");
    if (ranks.rank() == static_cast<int>(GetParam())) ::kill(::getpid(), SIGKILL);
    std::this_thread::sleep_for(std::chrono::seconds(40));  // a long forward pass
    return "";
  });
  expect_lost(ends, GetParam(), 10, {"last word", "rank " + std::to_string(GetParam()) + " died in step 7, first", "computing"});
}

TEST_P(LostRank, ThatHangsIsNamedAfterTheTimeout) {
  const auto ends = run_ranks(3, {.timeout_seconds = 3, .connect_timeout_seconds = 60}, [](Communicator& ranks) {
    ranks.at_step(5);
    ranks.barrier("first");
    if (ranks.rank() == static_cast<int>(GetParam())) ::raise(SIGSTOP);
    ranks.at_step(6);
    at::Tensor values = at::zeros({1000});
    ranks.sum_in_place({&values, 1}, "gradients");
    return "";
  });
  expect_lost(ends, GetParam(), 3 + 10, {"rank " + std::to_string(GetParam()) + " hangs in step 5, first", "in step 6, gradients"});
}

TEST_P(LostRank, ThatIsBusyWithSomethingElseForTooLongIsNamed) {
  const auto ends = run_ranks(3, {.timeout_seconds = 2, .connect_timeout_seconds = 60}, [](Communicator& ranks) {
    ranks.at_step(5);
    ranks.barrier("first");
    if (ranks.rank() == static_cast<int>(GetParam())) std::this_thread::sleep_for(std::chrono::seconds(30));
    ranks.barrier("second");
    return "";
  });
  expect_lost(ends, GetParam(), 2 + 10, {"rank " + std::to_string(GetParam()) + " is late in step 5, first", "in step 5, second"});
}

TEST_P(LostRank, ThatFailsTellsWhy) {
  const auto ends = run_ranks(3, kPatient, [](Communicator& ranks) -> std::string {
    ranks.at_step(3);
    ranks.barrier("first");
    if (ranks.rank() == static_cast<int>(GetParam())) {
      ranks.tell_failure("shard 4: chunk 2 is damaged");
      fail(ErrorKind::kData, "shard 4: chunk 2 is damaged");
    }
    ranks.barrier("second");
    return "";
  });
  expect_lost(ends, GetParam(), 10, {"rank " + std::to_string(GetParam()) + " failed in step 3, first: shard 4: chunk 2 is damaged"});
  EXPECT_EQ(WEXITSTATUS(ends[GetParam()].status), 3);
}

TEST(Ranks, ThatMakeAnotherCallAreNamed) {
  const auto ends = run_ranks(3, kPatient, [](Communicator& ranks) {
    ranks.barrier("first");
    ranks.at_step(9);
    ranks.barrier(ranks.rank() == 1 ? "evaluation" : "gradients");
    std::this_thread::sleep_for(std::chrono::seconds(1));
    ranks.barrier("third");
    return "";
  });
  expect_lost(ends, 99, 10, {"rank 1 disagrees: it is in step 9, evaluation, while rank 0 is in step 9, gradients"});
}

TEST(Ranks, OneThatDoesNotComeIsNamedWithTheVariables) {
  const Port port;
  const LaunchEnvironment environment{.launcher = "variables", .rank = 0, .size = 3, .host = "127.0.0.1", .port = port.number, .store_socket = port.socket, .variables = "WORLD_SIZE=3 MASTER_PORT=" + std::to_string(port.number)};
  EXPECT_TRUE(testing::fails_with(ErrorKind::kPeer, "rank 1 of 3 has not come within 1 s (variables: WORLD_SIZE=3 MASTER_PORT=" + std::to_string(port.number), [&] { connect(environment, {.connect_timeout_seconds = 1}); }));
}

TEST(Ranks, APortThatIsTakenIsNamed) {
  const Port taken;
  const LaunchEnvironment environment{.launcher = "variables", .rank = 0, .size = 2, .host = "127.0.0.1", .port = taken.number, .variables = "MASTER_ADDR=127.0.0.1"};
  EXPECT_TRUE(testing::fails_with(ErrorKind::kPeer, "cannot serve the meeting of the ranks at 127.0.0.1:" + std::to_string(taken.number) + " (MASTER_ADDR=127.0.0.1)", [&] { connect(environment, {.connect_timeout_seconds = 2}); }));
}

TEST(Ranks, AHostThatIsNoneIsNamed) {
  const LaunchEnvironment environment{.launcher = "variables", .rank = 1, .size = 2, .host = "no.such.host.invalid", .port = 29999, .variables = "MASTER_ADDR=no.such.host.invalid"};
  EXPECT_TRUE(testing::fails_with(ErrorKind::kPeer, "cannot reach the meeting of the ranks at no.such.host.invalid:29999", [&] { connect(environment, {.connect_timeout_seconds = 2}); }));
}

}  // namespace
}  // namespace alambic::parallel
