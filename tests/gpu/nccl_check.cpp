// SPDX-License-Identifier: Apache-2.0
// Ranks over NCCL, each on a GPU of its own: the same sums, bit for bit, as ranks over Gloo and as one rank. Exit code 77 where there are not
// two GPUs: ctest then reports it as skipped.
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mse_loss.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAFunctions.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstdio>

#include "parallel/nccl.h"
#include "tests/forked_ranks.h"

namespace alambic::parallel {
namespace {

using testing::End, testing::expect_all_fine, testing::expect_lost, testing::kPatient;

int num_gpus = 0;  // counted by a child: CUDA does not survive a fork

at::Device gpu_of(const Communicator& ranks) { return at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(ranks.rank())); }

/// As testing::run_ranks(), each rank with its own GPU as the current one.
std::vector<End> on_gpus(int size, const Patience& patience, const std::function<std::string(Communicator&)>& act) {
  return testing::run_ranks(size, patience, [&](Communicator& ranks) {
    c10::cuda::set_device(static_cast<c10::DeviceIndex>(ranks.rank()));
    return act(ranks);
  });
}

class OnGpus : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (GetParam() > num_gpus) GTEST_SKIP() << GetParam() << " GPUs are needed, there are " << num_gpus;
  }
};
INSTANTIATE_TEST_SUITE_P(Sizes, OnGpus, ::testing::Values(2, 3, 4, 8), ::testing::PrintToStringParamName());

TEST_P(OnGpus, SumsOfWholeNumbersAreExact) {
  expect_all_fine(on_gpus(GetParam(), kPatient, [](Communicator& ranks) -> std::string {
    const auto of_rank = [](const at::Tensor& base, int rank) { return base * (rank + 1) + rank; };
    std::vector<at::Tensor> bases, tensors;
    for (const std::int64_t size : {1, 7, 0, 1023, 5'000'001}) bases.push_back(at::arange(size, at::TensorOptions(at::kFloat).device(gpu_of(ranks))).remainder(1000));
    for (const at::Tensor& base : bases) tensors.push_back(of_rank(base, ranks.rank()));
    ranks.sum_in_place(tensors, "whole numbers");
    for (std::size_t i = 0; i < bases.size(); ++i) {
      at::Tensor sum = at::zeros_like(bases[i]);
      for (int rank = 0; rank < ranks.size(); ++rank) sum += of_rank(bases[i], rank);
      if (!tensors[i].equal(sum)) return "sum of tensor " + std::to_string(i);
    }
    at::Tensor count = at::full({1}, 1.0, at::TensorOptions(at::kDouble).device(gpu_of(ranks)));
    ranks.sum_in_place({&count, 1}, "f64");
    return count.item<double>() == ranks.size() ? "" : "sum of f64";
  }));
}

TEST_P(OnGpus, SumsHaveTheBitsOfGloo) {
  expect_all_fine(on_gpus(GetParam(), kPatient, [](Communicator& ranks) -> std::string {
    // Numbers of very different size: another order gives other bits.
    std::vector<at::Tensor> parts;
    for (int rank = 0; rank < ranks.size(); ++rank) {
      const at::Tensor x = at::arange(3'000'017, at::kFloat);
      parts.push_back((x * (1.1 + rank)).sin() * (x * (0.7 + rank)).cos().mul(20).exp());
    }
    const at::Tensor own = parts[static_cast<std::size_t>(ranks.rank())];
    at::Tensor on_processor = own.clone(), on_gpu = own.to(gpu_of(ranks));
    ranks.sum_in_place({&on_processor, 1}, "over Gloo");
    ranks.sum_in_place({&on_gpu, 1}, "over NCCL");
    if (!on_processor.equal(tree_sum(parts))) return "Gloo: not the tree's bits";
    if (!on_gpu.cpu().equal(on_processor)) return "NCCL: not the tree's bits";
    std::vector<std::vector<at::Tensor>> rows;
    for (int rank = 0; rank < ranks.size(); ++rank) rows.push_back({own.narrow(0, 1000 * rank, 999).to(gpu_of(ranks))});
    at::Tensor share = at::empty({999}, rows[0][0].options());
    ranks.start_reduce_scatter(rows, {&share, 1}, "share");
    ranks.finish_sums("share");
    return share.cpu().equal(on_processor.narrow(0, 1000 * ranks.rank(), 999)) ? "" : "reduce_scatter";
  }));
}

TEST_P(OnGpus, GatherAndBroadcast) {
  expect_all_fine(on_gpus(GetParam(), kPatient, [](Communicator& ranks) -> std::string {
    for (const at::ScalarType type : {at::kFloat, at::kDouble, at::kLong, at::kByte, at::kBFloat16}) {
      const auto options = at::TensorOptions(type).device(gpu_of(ranks));
      const auto is_right = [&](const at::Tensor& all) {
        for (int rank = 0; rank < ranks.size(); ++rank)
          if (!all[rank].equal(at::full({3, 2}, rank + 1, options))) return false;
        return true;
      };
      const at::Tensor own = at::full({3, 2}, ranks.rank() + 1, options);
      if (!is_right(ranks.all_gather(own, "gather"))) return "all_gather";
      // Under way while others are called.
      const at::Tensor all = at::empty({ranks.size(), 3, 2}, options);
      const auto gather = ranks.start_all_gather(all, own, "gather ahead");
      at::Tensor ones = at::full({1000}, 1.0, at::TensorOptions(at::kFloat).device(gpu_of(ranks)));
      ranks.sum_in_place({&ones, 1}, "between");
      gather->wait();
      if (!is_right(all) || ones.max().item<float>() != static_cast<float>(ranks.size())) return "start_all_gather";
      const int next = (ranks.rank() + 1) % ranks.size(), former = (ranks.rank() + ranks.size() - 1) % ranks.size();
      const at::Tensor heard = at::empty({3, 2}, options);
      ranks.start_exchange(heard, former, own, next, "to the next")->wait();
      if (!heard.equal(at::full({3, 2}, former + 1, options))) return "start_exchange";
      std::vector<at::Tensor> tensors;
      for (int i = 0; i < 40; ++i) tensors.push_back(at::full({i}, ranks.rank() + i, options));
      const int root = ranks.size() - 1;
      ranks.broadcast_in_place(tensors, root, "broadcast");
      for (int i = 0; i < 40; ++i)
        if (!tensors[static_cast<std::size_t>(i)].equal(at::full({i}, root + i, options))) return "broadcast";
    }
    ranks.barrier("barrier");
    return "";
  }));
}

/// Twenty steps of gradient descent by micro-batches 0 .. 7, of which each rank has every size-th; the tree's sums. Returns the weights.
at::Tensor trained(Communicator& ranks, const at::Device& device) {
  const auto wave = [&](std::int64_t rows, std::int64_t columns, double phase) {
    return (at::arange(rows * columns, at::kFloat) * 0.37 + phase).sin().view({rows, columns}).to(device);
  };
  at::Tensor first = wave(64, 32, 0.1).requires_grad_(true), second = wave(8, 64, 0.2).requires_grad_(true);
  for (int step = 0; step < 20; ++step) {
    ranks.at_step(step);
    using Pair = std::vector<at::Tensor>;
    const auto leaf = [&](std::int64_t own) {
      const double batch = static_cast<double>(8 * step + own * ranks.size() + ranks.rank());
      const at::Tensor loss = at::mse_loss(at::linear(at::linear(wave(16, 32, batch), first).tanh(), second), wave(16, 8, batch + 0.5));
      loss.backward();
      Pair gradients = {first.grad().clone(), second.grad().clone()};
      first.mutable_grad().reset(), second.mutable_grad().reset();
      return gradients;
    };
    const auto join = [](const Pair& a, const Pair& b) { return Pair{at::add(a[0], b[0]), at::add(a[1], b[1])}; };
    Pair sum = tree_walk<Pair>(0, 1, 8 / ranks.size(), leaf, join);
    ranks.sum_in_place(sum, "gradients");
    first = at::sub(first.detach(), sum[0], 0.01).requires_grad_(true), second = at::sub(second.detach(), sum[1], 0.01).requires_grad_(true);
  }
  return at::stack({first.detach().sum(), second.detach().sum(), first.detach().abs().max(), second.detach().abs().max()}).cpu();
}

TEST_P(OnGpus, TrainingHasTheBitsOfOneGpu) {
  if (8 % GetParam() != 0) GTEST_SKIP() << "8 micro-batches among " << GetParam();
  expect_all_fine(on_gpus(GetParam(), kPatient, [](Communicator& ranks) -> std::string {
    const at::Tensor together = trained(ranks, gpu_of(ranks));
    const auto alone = single();
    if (!together.equal(trained(*alone, gpu_of(ranks)))) return "other weights than one GPU's";
    return together.isfinite().all().item<bool>() ? "" : "not finite, so equal to nothing";
  }));
}

class LostOnGpus : public ::testing::TestWithParam<std::size_t> {
 protected:
  void SetUp() override {
    if (num_gpus < 2) GTEST_SKIP() << "2 GPUs are needed, there are " << num_gpus;
  }
};
INSTANTIATE_TEST_SUITE_P(Which, LostOnGpus, ::testing::Values(0, 1), ::testing::PrintToStringParamName());

TEST_P(LostOnGpus, ARankThatDiedIsNamed) {
  const auto ends = on_gpus(2, kPatient, [](Communicator& ranks) {
    at::Tensor values = at::zeros({1'000'000}, at::TensorOptions(at::kFloat).device(gpu_of(ranks)));
    ranks.sum_in_place({&values, 1}, "first");
    if (ranks.rank() == static_cast<int>(GetParam())) ::kill(::getpid(), SIGKILL);
    ranks.at_step(42);
    ranks.sum_in_place({&values, 1}, "gradients");
    return "";
  });
  // Starting CUDA and NCCL is within these seconds.
  expect_lost(ends, GetParam(), 40, {"rank " + std::to_string(GetParam()) + " died in step 0, first", "in step 42, gradients"});
}

TEST_P(LostOnGpus, ARankThatHangsIsNamedAfterTheTimeout) {
  const auto ends = on_gpus(2, {.timeout_seconds = 3, .connect_timeout_seconds = 60}, [](Communicator& ranks) {
    at::Tensor values = at::zeros({1'000'000}, at::TensorOptions(at::kFloat).device(gpu_of(ranks)));
    ranks.sum_in_place({&values, 1}, "first");
    if (ranks.rank() == static_cast<int>(GetParam())) ::raise(SIGSTOP);
    ranks.at_step(6);
    ranks.sum_in_place({&values, 1}, "gradients");
    return "";
  });
  expect_lost(ends, GetParam(), 40, {"rank " + std::to_string(GetParam()) + " hangs in step 0, first", "in step 6, gradients"});
}

}  // namespace
}  // namespace alambic::parallel

int main(int argc, char** argv) {
  using namespace alambic::parallel;
  int ends[2];
  if (::pipe(ends) != 0) return 1;
  if (::fork() == 0) {
    const NcclVersion nccl = nccl_version();
    const Gpus found = gpus();
    std::printf("NCCL %s (built with %s), %zu GPUs%s%s\n", nccl.running.c_str(), nccl.built.c_str(), found.seen.size(), found.why_none.empty() ? "" : ": ", found.why_none.c_str());
    std::fflush(stdout);
    const auto count = static_cast<int>(found.seen.size());
    ::_exit(::write(ends[1], &count, sizeof count) == sizeof count ? 0 : 1);
  }
  ::wait(nullptr);
  ::close(ends[1]);
  if (::read(ends[0], &num_gpus, sizeof num_gpus) != sizeof num_gpus) return 1;
  if (num_gpus < 2) {
    std::printf("skipped: ranks over NCCL need two GPUs\n");
    return 77;
  }
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
