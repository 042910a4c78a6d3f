// SPDX-License-Identifier: Apache-2.0
#include "parallel/launch_environment.h"

#include <gtest/gtest.h>

#include <map>

#include "tests/support.h"

namespace alambic::parallel {
namespace {

using Variables = std::map<std::string, std::string>;

LaunchEnvironment environment_of(const Variables& variables) {
  return launch_environment([&](const std::string& name) -> std::optional<std::string> {
    const auto found = variables.find(name);
    return found == variables.end() ? std::nullopt : std::optional(found->second);
  });
}

Variables with(Variables base, const Variables& more) {
  for (const auto& [name, value] : more) base[name] = value;
  return base;
}
Variables without(Variables base, const std::string& name) {
  base.erase(name);
  return base;
}

const Variables kLaunch = {{"ALAMBIC_RANK", "0"}, {"ALAMBIC_SIZE", "2"}, {"ALAMBIC_PORT", "41000"}, {"ALAMBIC_STORE_SOCKET", "4"}, {"ALAMBIC_ATTEMPT", "3"}};
const Variables kTorchrun = {{"TORCHELASTIC_RUN_ID", "none"}, {"RANK", "5"}, {"WORLD_SIZE", "8"}, {"LOCAL_RANK", "1"}, {"MASTER_ADDR", "node3"}, {"MASTER_PORT", "29500"},
                             {"TORCHELASTIC_USE_AGENT_STORE", "True"}, {"TORCHELASTIC_RESTART_COUNT", "2"}};
const Variables kMpirun = {{"OMPI_COMM_WORLD_RANK", "1"}, {"OMPI_COMM_WORLD_SIZE", "2"}, {"OMPI_COMM_WORLD_LOCAL_RANK", "1"}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}, {"OMPI_MCA_ess_base_jobid", "1834942465"}};
const Variables kSrun = {{"SLURM_STEP_NUM_TASKS", "4"}, {"SLURM_PROCID", "3"}, {"SLURM_LOCALID", "1"}, {"SLURM_JOB_ID", "77"}, {"SLURM_STEP_ID", "0"}, {"SLURM_STEP_NUM_NODES", "2"},
                         {"SLURM_STEP_NODELIST", "gpu[007-008]"}, {"SLURM_NTASKS", "4"}};
const Variables kPlain = {{"RANK", "1"}, {"WORLD_SIZE", "3"}, {"MASTER_ADDR", "10.0.0.1"}, {"MASTER_PORT", "5000"}};

TEST(LaunchEnvironment, EachLauncherIsRead) {
  struct Case {
    Variables variables;
    std::string launcher;
    int rank, size, local_rank;
    std::string host;
    int port;
    bool agent_has_store;
    std::string attempt;
  };
  const std::vector<Case> cases = {
      {{}, "none", 0, 1, 0, "", 0, false, "0"},
      {kLaunch, "alambic launch", 0, 2, 0, "127.0.0.1", 41000, false, "3"},
      {kTorchrun, "torchrun", 5, 8, 1, "node3", 29500, true, "2"},
      {with(kTorchrun, {{"TORCHELASTIC_USE_AGENT_STORE", "False"}}), "torchrun", 5, 8, 1, "node3", 29500, false, "2"},
      {kMpirun, "mpirun", 1, 2, 1, "127.0.0.1", -1, false, "0"},
      {with(kMpirun, {{"OMPI_COMM_WORLD_LOCAL_SIZE", "1"}, {"MASTER_ADDR", "first"}, {"MASTER_PORT", "4000"}}), "mpirun", 1, 2, 1, "first", 4000, false, "0"},
      {kSrun, "srun", 3, 4, 1, "gpu007", -1, false, "0"},
      {with(kSrun, {{"SLURM_STEP_NUM_NODES", "1"}, {"SLURM_RESTART_COUNT", "1"}}), "srun", 3, 4, 1, "127.0.0.1", -1, false, "1"},
      {with(kSrun, {{"MASTER_ADDR", "10.1.1.1"}, {"MASTER_PORT", "7777"}}), "srun", 3, 4, 1, "10.1.1.1", 7777, false, "0"},
      {with(kSrun, {{"SLURM_STEP_NUM_TASKS", "1"}, {"SLURM_PROCID", "0"}, {"SLURM_LOCALID", "0"}, {"SLURM_STEP_NUM_NODES", "1"}}), "srun", 0, 1, 0, "127.0.0.1", -1, false, "0"},
      {kPlain, "variables", 1, 3, 0, "10.0.0.1", 5000, false, "0"},
      {{{"RANK", "0"}, {"WORLD_SIZE", "1"}}, "variables", 0, 1, 0, "", 0, false, "0"},
      // The innermost counts: torchrun started by srun, mpirun inside of a Slurm job, launch inside of both.
      {with(kSrun, kTorchrun), "torchrun", 5, 8, 1, "node3", 29500, true, "2"},
      {with(kSrun, kMpirun), "mpirun", 1, 2, 1, "127.0.0.1", -1, false, "0"},
      {with(with(kSrun, kTorchrun), kLaunch), "alambic launch", 0, 2, 0, "127.0.0.1", 41000, false, "3"},
      // The same said twice is no conflict.
      {with(kSrun, {{"RANK", "3"}, {"WORLD_SIZE", "4"}}), "srun", 3, 4, 1, "gpu007", -1, false, "0"},
      // A batch script is one process, though Slurm tells it how many tasks the job may have.
      {{{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "4"}, {"SLURM_JOB_ID", "77"}}, "none", 0, 1, 0, "", 0, false, "0"},
      // What is set to nothing is not set.
      {{{"RANK", ""}, {"WORLD_SIZE", ""}}, "none", 0, 1, 0, "", 0, false, "0"},
  };
  for (std::size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE("case " + std::to_string(i));
    const Case& wanted = cases[i];
    const LaunchEnvironment read = environment_of(wanted.variables);
    EXPECT_EQ(read.launcher, wanted.launcher);
    EXPECT_EQ(read.rank, wanted.rank);
    EXPECT_EQ(read.size, wanted.size);
    EXPECT_EQ(read.local_rank, wanted.local_rank);
    EXPECT_EQ(read.host, wanted.host);
    if (wanted.port >= 0) EXPECT_EQ(read.port, wanted.port);
    else EXPECT_TRUE(read.port >= 20000 && read.port < 30000) << read.port;  // below the ports that the kernel gives away
    EXPECT_EQ(read.agent_has_store, wanted.agent_has_store);
    EXPECT_EQ(read.attempt, wanted.attempt);
  }
  EXPECT_EQ(environment_of(kLaunch).store_socket, 4);
  // Who shares a machine's memory.
  EXPECT_EQ(environment_of({}).local_size, 1);
  EXPECT_EQ(environment_of(kLaunch).local_size, 2);
  EXPECT_EQ(environment_of(with(kTorchrun, {{"LOCAL_WORLD_SIZE", "4"}})).local_size, 4);
  EXPECT_EQ(environment_of(kMpirun).local_size, 2);
  EXPECT_EQ(environment_of(with(kSrun, {{"SLURM_STEP_NUM_TASKS", "5"}})).local_size, 3);
  EXPECT_EQ(environment_of(kPlain).local_size, 1);
  EXPECT_NE(environment_of(kSrun).port, environment_of(with(kSrun, {{"SLURM_STEP_ID", "1"}})).port);  // two steps of one job at once
  EXPECT_NE(environment_of(kPlain).variables.find("MASTER_ADDR=10.0.0.1 MASTER_PORT=5000"), std::string::npos);
}

TEST(LaunchEnvironment, ContradictionsNameTheVariables) {
  const std::vector<std::pair<Variables, std::string>> cases = {
      {without(kPlain, "WORLD_SIZE"), "WORLD_SIZE is not set, but RANK is: RANK=1"},
      {without(kPlain, "RANK"), "RANK is not set, but WORLD_SIZE is"},
      {without(kPlain, "MASTER_ADDR"), "MASTER_ADDR is not set"},
      {without(kPlain, "MASTER_PORT"), "MASTER_PORT is not set"},
      {with(kPlain, {{"RANK", "3"}}), "RANK=3 is not below WORLD_SIZE=3"},
      {with(kPlain, {{"RANK", "-1"}}), "RANK=-1 is no whole number"},
      {with(kPlain, {{"RANK", "one"}}), "RANK=one is no whole number"},
      {with(kPlain, {{"RANK", "1 "}}), "RANK=1  is no whole number"},
      {with(kPlain, {{"WORLD_SIZE", "0"}}), "WORLD_SIZE=0 is no whole number"},
      {with(kPlain, {{"MASTER_PORT", "70000"}}), "MASTER_PORT=70000 is no whole number"},
      {with(kSrun, {{"RANK", "0"}}), "RANK=0, but SLURM_PROCID=3"},
      {with(kSrun, {{"WORLD_SIZE", "2"}}), "WORLD_SIZE=2, but SLURM_STEP_NUM_TASKS=4"},
      {with(kMpirun, {{"RANK", "0"}, {"WORLD_SIZE", "2"}}), "RANK=0, but OMPI_COMM_WORLD_RANK=1"},
      {with(kMpirun, {{"OMPI_COMM_WORLD_LOCAL_SIZE", "1"}}), "MASTER_ADDR is not set: mpirun does not tell"},
      {without(kMpirun, "OMPI_MCA_ess_base_jobid"), "MASTER_PORT is not set"},
      {without(kMpirun, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE is not set"},
      {without(kSrun, "SLURM_PROCID"), "SLURM_PROCID is not set"},
      {without(kSrun, "SLURM_STEP_NODELIST"), "SLURM_STEP_NODELIST is not set"},
      {without(kTorchrun, "LOCAL_RANK"), "LOCAL_RANK is not set"},
      {without(kTorchrun, "MASTER_ADDR"), "MASTER_ADDR is not set"},
      {without(kLaunch, "ALAMBIC_PORT"), "ALAMBIC_PORT is not set"},
  };
  for (const auto& [variables, words] : cases) EXPECT_TRUE(testing::fails_with(ErrorKind::kPeer, words, [&] { environment_of(variables); })) << words;
}

TEST(LaunchEnvironment, FirstHostOfASlurmList) {
  for (const auto& [list, first] : std::map<std::string, std::string>{{"a", "a"}, {"a,b", "a"}, {"n[01-04]", "n01"}, {"n[3,7-9],x", "n3"}, {"n[5]", "n5"}, {"rack-1-n[10-12]", "rack-1-n10"}})
    EXPECT_EQ(first_host(list), first) << list;
}

}  // namespace
}  // namespace alambic::parallel
