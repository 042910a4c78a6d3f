// SPDX-License-Identifier: Apache-2.0
// Each test is a process whose children are the ranks; they meet on loopback.
#include "parallel/communicator.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <thread>

#include "parallel/connect.h"
#include "parallel/watch.h"
#include "tests/support.h"

namespace alambic::parallel {
namespace {

struct Port {
  int socket = ::socket(AF_INET, SOCK_STREAM, 0);
  std::uint16_t number = 0;
  Port() {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    EXPECT_EQ(::bind(socket, reinterpret_cast<sockaddr*>(&address), size), 0);
    EXPECT_EQ(::listen(socket, 64), 0);
    EXPECT_EQ(::getsockname(socket, reinterpret_cast<sockaddr*>(&address), &size), 0);
    number = ntohs(address.sin_port);
  }
};

struct End {
  int status = 0;           // of waitpid(); -1: it hung and was killed
  std::string said;         // what the rank returned, or its Error
  double seconds = 0;       // from the start
};

/// Runs `act` on `size` ranks. What it returns, or "exit code N: message" of its Error, is what the rank said.
std::vector<End> run_ranks(int size, const Patience& patience, const std::function<std::string(Communicator&)>& act) {
  const Port port;
  std::vector<pid_t> processes;
  std::vector<int> pipes;
  const auto began = std::chrono::steady_clock::now();
  for (int rank = 0; rank < size; ++rank) {
    int ends[2];
    EXPECT_EQ(::pipe(ends), 0);
    const pid_t process = ::fork();
    if (process == 0) {
      ::alarm(100);
      ::signal(SIGPIPE, SIG_IGN);  // as main does: Gloo writes to connections that are gone
      set_last_word([write_end = ends[1]](const Error& error) {
        const std::string said = std::string("last word: ") + error.what();
        static_cast<void>(!::write(write_end, said.data(), said.size()));
        ::_exit(exit_code(error.kind()));
      });
      std::string said;
      int code = 0;
      try {
        const auto ranks = connect({.launcher = "test", .rank = rank, .size = size, .host = "127.0.0.1", .port = port.number, .store_socket = rank == 0 ? port.socket : -1, .variables = "MASTER_PORT=" + std::to_string(port.number)}, patience);
        said = act(*ranks);
        ranks->barrier("end");
      } catch (const Error& error) {
        code = exit_code(error.kind());
        said = error.what();
      } catch (const std::exception& error) {
        code = 99;
        said = error.what();
      }
      static_cast<void>(!::write(ends[1], said.data(), said.size()));
      ::_exit(code);
    }
    ::close(ends[1]);
    processes.push_back(process);
    pipes.push_back(ends[0]);
  }
  ::close(port.socket);
  std::vector<End> result(static_cast<std::size_t>(size));
  std::vector<bool> ended(static_cast<std::size_t>(size), false), stopped = ended;
  const auto seconds = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count(); };
  while (std::count(ended.begin(), ended.end(), true) < size && seconds() < 60) {
    for (std::size_t rank = 0; rank < processes.size(); ++rank) {
      if (ended[rank]) continue;
      int status = 0;
      const pid_t changed = ::waitpid(processes[rank], &status, WNOHANG | WUNTRACED);
      if (changed == processes[rank] && !WIFSTOPPED(status)) ended[rank] = true, result[rank].status = status, result[rank].seconds = seconds();
      // A rank that is stopped is let die once all others have ended.
      stopped[rank] = stopped[rank] || (changed == processes[rank] && WIFSTOPPED(status));
      if (stopped[rank] && !ended[rank] && std::count(ended.begin(), ended.end(), true) == size - 1) ::kill(processes[rank], SIGKILL);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  for (std::size_t rank = 0; rank < processes.size(); ++rank) {
    if (!ended[rank]) ::kill(processes[rank], SIGKILL), ::waitpid(processes[rank], nullptr, 0), result[rank].status = -1;
    char buffer[1 << 14];
    for (ssize_t got; (got = ::read(pipes[rank], buffer, sizeof buffer)) > 0;) result[rank].said.append(buffer, static_cast<std::size_t>(got));
    ::close(pipes[rank]);
  }
  return result;
}

constexpr Patience kPatient{.timeout_seconds = 60, .connect_timeout_seconds = 60};

void expect_all_fine(const std::vector<End>& ends) {
  for (std::size_t rank = 0; rank < ends.size(); ++rank) {
    EXPECT_TRUE(WIFEXITED(ends[rank].status) && WEXITSTATUS(ends[rank].status) == 0) << "rank " << rank << ": status " << ends[rank].status;
    EXPECT_EQ(ends[rank].said, "") << "rank " << rank;
  }
}

/// Of every rank but `lost`: exit code 7 within so many seconds, and all of the words.
void expect_lost(const std::vector<End>& ends, std::size_t lost, double seconds, const std::vector<std::string>& words) {
  for (std::size_t rank = 0; rank < ends.size(); ++rank) {
    if (rank == lost) continue;
    SCOPED_TRACE("rank " + std::to_string(rank) + ": " + ends[rank].said);
    EXPECT_TRUE(WIFEXITED(ends[rank].status) && WEXITSTATUS(ends[rank].status) == 7) << ends[rank].status;
    EXPECT_LT(ends[rank].seconds, seconds);
    for (const std::string& word : words) EXPECT_NE(ends[rank].said.find(word), std::string::npos) << word;
  }
}

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
    // reduce_scatter gives each rank its share of the same sum.
    std::vector<at::Tensor> rows;
    for (int rank = 0; rank < ranks.size(); ++rank) rows.push_back(parts[static_cast<std::size_t>(ranks.rank())].narrow(0, 1000 * rank, 999));
    const at::Tensor share = ranks.reduce_scatter(at::stack(rows), "share");
    return share.equal(own.narrow(0, 1000 * ranks.rank(), 999)) ? "" : "reduce_scatter";
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
