// SPDX-License-Identifier: Apache-2.0
// Whole training runs on GPUs, compared with the processor's and, over NCCL, with those of one GPU. Exit code 77 without a GPU: ctest then
// reports it as skipped. tests/device/device_test.cpp makes the same comparisons on machines without one, on a device that is pretended.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <functional>

#include "checkpoints/safetensors.h"
#include "core/files.h"
#include "core/log.h"
#include "parallel/nccl.h"
#include "tests/closeness.h"
#include "tests/forked_ranks.h"
#include "tests/support.h"
#include "tests/train/tiny_run.h"
#include "train/finetune.h"

namespace alambic::train {
namespace {

using testing::fails_with;
using testing::is_close_to_scale;
using testing::ScratchFolder;

int num_gpus = 0;  // counted by a child: CUDA does not survive a fork

const auto never = [] { return false; };

std::vector<Json> steps_of(const std::filesystem::path& run) {
  std::ifstream lines(run / "metrics.jsonl");
  std::vector<Json> steps;
  for (std::string line; std::getline(lines, line);)
    if (const Json json = parse_json(line, "metrics"); json["kind"] == "train") steps.push_back(json);
  return steps;
}

/// Runs `act` in a process of its own; what it throws is what it said.
void in_child(const std::vector<std::pair<std::string, std::string>>& environment, const std::function<void()>& act, std::vector<pid_t>* to_wait_for = nullptr) {
  const pid_t process = ::fork();
  if (process == 0) {
    for (const auto& [name, value] : environment) ::setenv(name.c_str(), value.c_str(), 1);
    ::signal(SIGPIPE, SIG_IGN);
    ::alarm(200);
    set_log_sink([](LogLevel, std::string_view) {});
    try {
      act();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
      std::fflush(stderr);
      ::_exit(1);
    }
    ::_exit(0);
  }
  if (to_wait_for != nullptr) return to_wait_for->push_back(process);
  int status = 0;
  ::waitpid(process, &status, 0);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
}

struct Method {
  const char* name;
  std::function<void(TrainConfig&)> set;
  double tolerance;  // of losses and, times 10 and relative to its largest element, of each trained tensor
};
void PrintTo(const Method& method, std::ostream* out) { *out << method.name; }

// After twelve steps in f32 two orders of sums differ by some 1e-5 of a loss; in bf16 a rounding is 2^-9, and steps carry it on.
const Method kMethods[] = {
    {"Lora", [](TrainConfig&) {}, 1e-4},
    {"LoraDeterministic", [](TrainConfig& config) { config.deterministic = true; }, 1e-4},
    {"LoraSmoothed", [](TrainConfig& config) { config.loss = {.label_smoothing = 0.1, .z_loss = 1e-3}; }, 1e-4},
    {"LoraBf16", [](TrainConfig& config) { config.compute_type = "bf16"; }, 2e-1},
    {"Nf4", [](TrainConfig& config) { config.quantize_base = "nf4"; }, 1e-4},
    {"Nf4Bf16", [](TrainConfig& config) { config.quantize_base = "nf4", config.compute_type = "bf16"; }, 2e-1},
    {"Int8", [](TrainConfig& config) { config.quantize_base = "int8"; }, 1e-4},
    {"Dora", [](TrainConfig& config) { config.lora.dora = true; }, 1e-4},
    {"Pissa", [](TrainConfig& config) { config.lora.init = "pissa"; }, 5e-4},
    {"TokenRows", [](TrainConfig& config) { config.lora.trainable_tokens = {"3..9"}; }, 1e-4},
    {"Adafactor", [](TrainConfig& config) { config.optimizer.kind = "adafactor"; }, 5e-4},
    {"Full", [](TrainConfig& config) { config.method = "full", config.schedule.learning_rate = 1e-3; }, 5e-4},
    {"FullMuon", [](TrainConfig& config) { config.method = "full", config.optimizer.kind = "muon", config.schedule.learning_rate = 1e-3; }, 5e-2},
};

TrainConfig config_of(const ScratchFolder& folder, const std::string& run, const Method& method, const std::string& device) {
  TrainConfig config = testing::tiny_config(folder.path(), run);
  config.lora.dropout = 0;  // a GPU draws other masks
  config.limits.max_steps = 12;
  config.data.batches_per_step = 4;
  config.optimizer.max_grad_norm = 0.5;
  config.device = device;
  method.set(config);
  return config;
}

void expect_like(const std::filesystem::path& run, const std::filesystem::path& expected, double tolerance) {
  const std::vector<Json> got = steps_of(run), wanted = steps_of(expected);
  ASSERT_EQ(got.size(), wanted.size());
  ASSERT_GT(got.size(), 0u);
  for (std::size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i]["loss"].get<double>(), wanted[i]["loss"].get<double>(), tolerance) << "step " << i + 1;
  const checkpoints::SafetensorsFile state(run / "checkpoint-12/state.safetensors"), wanted_state(expected / "checkpoint-12/state.safetensors");
  for (const auto& [name, entry] : wanted_state.entries())
    if (name.starts_with("weights.")) {
      EXPECT_TRUE(is_close_to_scale(state.tensor(name), wanted_state.tensor(name), 10 * tolerance)) << name;
    }
}

class OnAGpu : public ::testing::TestWithParam<Method> {};
INSTANTIATE_TEST_SUITE_P(Methods, OnAGpu, ::testing::ValuesIn(kMethods), [](const auto& test) { return std::string(test.param.name); });

TEST_P(OnAGpu, LearnsWhatTheProcessorLearns) {
  const ScratchFolder folder;
  const TrainConfig here = config_of(folder, "here", GetParam(), "cpu"), there = config_of(folder, "there", GetParam(), "cuda");
  in_child({}, [&] { finetune(here, false, never); });
  in_child({}, [&] { finetune(there, false, never); });
  expect_like(there.output, here.output, GetParam().tolerance);
}

TEST_P(OnAGpu, WithDeterministicItResumesToTheSameBits) {
  const ScratchFolder folder;
  const auto config = [&](const std::string& run) {
    TrainConfig made = config_of(folder, run, GetParam(), "cuda");
    made.deterministic = true, made.lora.dropout = 0.1;
    return made;
  };
  const TrainConfig whole = config("whole"), parts = config("parts");
  in_child({}, [&] { finetune(whole, false, never); });
  in_child({}, [&] {
    if (!fails_with(ErrorKind::kStopped, "stopped on request", [&] { finetune(parts, false, [asked = 0]() mutable { return ++asked >= 27; }); })) throw std::runtime_error("it was not stopped");
    finetune(parts, true, never);
  });
  for (const char* file : {"metrics.jsonl", "checkpoint-12/state.safetensors"}) EXPECT_EQ(sha256_of_file(parts.output / file), sha256_of_file(whole.output / file)) << file;
}

/// By two ranks, each with a GPU of its own.
void finetune_by_two(const TrainConfig& config) {
  std::string port;
  {
    const testing::Port free;
    port = std::to_string(free.number);
    ::close(free.socket);
  }
  std::vector<pid_t> ranks;
  for (const char* rank : {"0", "1"})
    in_child({{"RANK", rank}, {"LOCAL_RANK", rank}, {"WORLD_SIZE", "2"}, {"LOCAL_WORLD_SIZE", "2"}, {"MASTER_ADDR", "127.0.0.1"}, {"MASTER_PORT", port}}, [&] { finetune(config, false, never); }, &ranks);
  for (const pid_t process : ranks) {
    int status = 0;
    ::waitpid(process, &status, 0);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
  }
}

TEST_P(OnAGpu, TwoGpusLearnWhatOneLearns) {
  if (num_gpus < 2) GTEST_SKIP() << "2 GPUs are needed, there are " << num_gpus;
  const ScratchFolder folder;
  const TrainConfig one = config_of(folder, "one", GetParam(), "cuda"), two = config_of(folder, "two", GetParam(), "cuda");
  in_child({}, [&] { finetune(one, false, never); });
  finetune_by_two(two);
  if (one.deterministic) {  // the same tree of sums
    for (const char* file : {"metrics.jsonl", "checkpoint-12/state.safetensors"}) EXPECT_EQ(sha256_of_file(two.output / file), sha256_of_file(one.output / file)) << file;
  } else {
    expect_like(two.output, one.output, GetParam().tolerance);
  }
}

TEST_P(OnAGpu, TwoGpusThatShareLearnTheBitsOfTwoThatHoldAll) {
  if (num_gpus < 2) GTEST_SKIP() << "2 GPUs are needed, there are " << num_gpus;
  const ScratchFolder folder;
  TrainConfig whole = config_of(folder, "whole", GetParam(), "cuda"), shared = config_of(folder, "shared", GetParam(), "cuda");
  if (whole.lora.init == "pissa" || whole.optimizer.kind != "adamw") GTEST_SKIP() << "what it changes cannot be shared";
  whole.deterministic = shared.deterministic = shared.ranks.shard = true;
  finetune_by_two(whole);
  finetune_by_two(shared);
  // The last bit of a norm of shared gradients may be another, and so all that is clipped by it.
  if (whole.method == "full") return expect_like(shared.output, whole.output, GetParam().tolerance);
  for (const char* file : {"metrics.jsonl", "checkpoint-12/state.safetensors"}) EXPECT_EQ(sha256_of_file(shared.output / file), sha256_of_file(whole.output / file)) << file;
}

TEST(Device, MoreRanksThanGpusAreRefusedWithBothNumbers) {
  const ScratchFolder folder;
  const TrainConfig config = config_of(folder, "run", kMethods[0], "cuda");
  in_child({{"RANK", "0"}, {"WORLD_SIZE", "1"}, {"LOCAL_RANK", "0"}, {"LOCAL_WORLD_SIZE", "1000"}, {"MASTER_ADDR", "127.0.0.1"}, {"MASTER_PORT", "29555"}}, [&] {
    if (!fails_with(ErrorKind::kResource, "1000 ranks on this machine, but " + std::to_string(num_gpus) + " GPU", [&] { finetune(config, false, never); })) throw std::runtime_error("another end");
  });
}

}  // namespace
}  // namespace alambic::train

int main(int argc, char** argv) {
  using namespace alambic;
  int ends[2];
  if (::pipe(ends) != 0) return 1;
  if (::fork() == 0) {
    const parallel::Gpus found = parallel::gpus();
    for (const std::string& gpu : found.seen) std::printf("%s\n", gpu.c_str());
    if (found.seen.empty()) std::printf("skipped: there is no GPU: %s\n", found.why_none.c_str());
    std::fflush(stdout);
    const auto count = static_cast<int>(found.seen.size());
    ::_exit(::write(ends[1], &count, sizeof count) == sizeof count ? 0 : 1);
  }
  ::wait(nullptr);
  ::close(ends[1]);
  if (::read(ends[0], &train::num_gpus, sizeof train::num_gpus) != sizeof train::num_gpus) return 1;
  if (train::num_gpus == 0) return 77;
  at::set_num_threads(1);  // so that comparing starts no threads, which a later fork would not survive
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
