// SPDX-License-Identifier: Apache-2.0
#include "parallel/launch_environment.h"

#include <charconv>
#include <cstdlib>
#include <limits>

#include "core/error.h"

namespace alambic::parallel {
namespace {

constexpr int kMostRanks = 1 << 20;

/// Reads variables and remembers what it saw.
class Variables {
 public:
  explicit Variables(const std::function<std::optional<std::string>(const std::string&)>& value) : value_(value) {}

  std::optional<std::string> text(const std::string& name) {
    std::optional<std::string> value = value_(name);
    if (value && value->empty()) value.reset();
    if (value && seen_.find(" " + name + "=") == std::string::npos) seen_ += " " + name + "=" + *value;
    return value;
  }
  bool has(const std::string& name) {
    const std::optional<std::string> value = value_(name);
    return value && !value->empty();
  }
  std::optional<std::int64_t> whole(const std::string& name, std::int64_t low, std::int64_t high) {
    const std::optional<std::string> value = text(name);
    if (!value) return std::nullopt;
    std::int64_t number = 0;
    const auto parsed = std::from_chars(value->data(), value->data() + value->size(), number);
    if (parsed.ec != std::errc() || parsed.ptr != value->data() + value->size() || number < low || number > high)
      fail(ErrorKind::kPeer, name, "=", *value, " is no whole number from ", low, " to ", high, remedy());
    return number;
  }
  std::string needed_text(const std::string& name, const std::string& beside) {
    const std::optional<std::string> value = text(name);
    text(beside);
    if (!value) fail(ErrorKind::kPeer, name, " is not set, but ", beside, " is:", seen_, remedy());
    return *value;
  }
  std::int64_t needed(const std::string& name, const std::string& beside, std::int64_t low, std::int64_t high) {
    needed_text(name, beside);
    return *whole(name, low, high);
  }
  std::string seen() const { return seen_.empty() ? "" : seen_.substr(1); }
  static Remedy remedy() {
    return {"start the ranks with alambic launch, torchrun, mpirun or srun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each; unset all of them for one process alone"};
  }

 private:
  const std::function<std::optional<std::string>(const std::string&)>& value_;
  std::string seen_;
};

std::uint16_t port_from(std::uint64_t number) { return static_cast<std::uint16_t>(20000 + number % 10000); }

/// Reads rank and size under these names, and checks them against each other.
void read_place(Variables& variables, const char* rank, const char* size, LaunchEnvironment& environment) {
  environment.size = static_cast<int>(variables.needed(size, rank, 1, kMostRanks));
  environment.rank = static_cast<int>(variables.needed(rank, size, 0, kMostRanks));
  if (environment.rank >= environment.size)
    fail(ErrorKind::kPeer, rank, "=", environment.rank, " is not below ", size, "=", environment.size, Variables::remedy());
}

/// Error(kPeer) when RANK and WORLD_SIZE are set too and say something else.
void require_no_conflict(Variables& variables, const char* rank, const char* size, const LaunchEnvironment& environment) {
  const auto differs = [&](const char* plain, const char* own, int value) {
    const std::optional<std::int64_t> said = variables.whole(plain, 0, kMostRanks);
    if (said && *said != value)
      fail(ErrorKind::kPeer, plain, "=", *said, ", but ", own, "=", value, ": two launchers say different things (", variables.seen(), ")",
           Remedy{std::string("unset the variables of the one that did not start this process (") + plain + " or " + own + ")"});
  };
  differs("RANK", rank, environment.rank);
  differs("WORLD_SIZE", size, environment.size);
}

/// MASTER_ADDR and MASTER_PORT, where they are given.
void read_master(Variables& variables, LaunchEnvironment& environment) {
  if (const auto host = variables.text("MASTER_ADDR")) environment.host = *host;
  if (const auto port = variables.whole("MASTER_PORT", 1, 65535)) environment.port = static_cast<std::uint16_t>(*port);
}

}  // namespace

std::string first_host(const std::string& list) {
  const std::size_t end = list.find_first_of(",[");
  std::string host = list.substr(0, end);
  if (end != std::string::npos && list[end] == '[') host += list.substr(end + 1, list.find_first_of(",-]", end + 1) - end - 1);
  return host;
}

LaunchEnvironment launch_environment(const std::function<std::optional<std::string>(const std::string& name)>& value) {
  Variables variables(value);
  LaunchEnvironment environment;
  if (variables.has("ALAMBIC_RANK") || variables.has("ALAMBIC_SIZE")) {
    environment.launcher = "alambic launch";
    read_place(variables, "ALAMBIC_RANK", "ALAMBIC_SIZE", environment);
    environment.local_rank = environment.rank, environment.local_size = environment.size;
    environment.host = "127.0.0.1";
    environment.port = static_cast<std::uint16_t>(variables.needed("ALAMBIC_PORT", "ALAMBIC_RANK", 1, 65535));
    environment.store_socket = static_cast<int>(variables.whole("ALAMBIC_STORE_SOCKET", 3, std::numeric_limits<int>::max()).value_or(-1));
    environment.attempt = variables.text("ALAMBIC_ATTEMPT").value_or("0");
  } else if (variables.has("TORCHELASTIC_RUN_ID")) {
    environment.launcher = "torchrun";
    read_place(variables, "RANK", "WORLD_SIZE", environment);
    environment.local_rank = static_cast<int>(variables.needed("LOCAL_RANK", "RANK", 0, kMostRanks));
    environment.local_size = static_cast<int>(variables.whole("LOCAL_WORLD_SIZE", 1, kMostRanks).value_or(1));
    environment.host = variables.needed_text("MASTER_ADDR", "RANK");
    environment.port = static_cast<std::uint16_t>(variables.needed("MASTER_PORT", "RANK", 1, 65535));
    environment.agent_has_store = variables.text("TORCHELASTIC_USE_AGENT_STORE") == "True";
    environment.attempt = variables.text("TORCHELASTIC_RESTART_COUNT").value_or("0");
  } else if (variables.has("OMPI_COMM_WORLD_RANK") || variables.has("OMPI_COMM_WORLD_SIZE")) {
    environment.launcher = "mpirun";
    read_place(variables, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", environment);
    environment.local_rank = static_cast<int>(variables.needed("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_RANK", 0, kMostRanks));
    require_no_conflict(variables, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", environment);
    environment.local_size = static_cast<int>(variables.whole("OMPI_COMM_WORLD_LOCAL_SIZE", 1, kMostRanks).value_or(1));
    if (environment.local_size == environment.size) environment.host = "127.0.0.1";
    if (const auto job = variables.whole("OMPI_MCA_ess_base_jobid", 0, std::numeric_limits<std::int64_t>::max())) environment.port = port_from(static_cast<std::uint64_t>(*job) * 2654435761u >> 8);
    read_master(variables, environment);
    if (environment.size > 1 && environment.host.empty())
      fail(ErrorKind::kPeer, "MASTER_ADDR is not set: mpirun does not tell where rank 0 is when ranks are on several machines (", variables.seen(), ")",
           Remedy{"mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 ..., with the host of the first rank"});
    if (environment.size > 1 && environment.port == 0)
      fail(ErrorKind::kPeer, "MASTER_PORT is not set, nor is OMPI_MCA_ess_base_jobid, from which a port would follow (", variables.seen(), ")", Remedy{"mpirun -x MASTER_PORT=29500 ..."});
  } else if (variables.has("SLURM_STEP_NUM_TASKS")) {  // of srun alone: in a batch script SLURM_PROCID and SLURM_NTASKS are set for one process
    environment.launcher = "srun";
    read_place(variables, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", environment);
    environment.local_rank = static_cast<int>(variables.needed("SLURM_LOCALID", "SLURM_PROCID", 0, kMostRanks));
    require_no_conflict(variables, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", environment);
    const std::uint64_t job = static_cast<std::uint64_t>(variables.needed("SLURM_JOB_ID", "SLURM_PROCID", 0, std::numeric_limits<std::uint32_t>::max()));
    const std::uint64_t step = static_cast<std::uint64_t>(variables.whole("SLURM_STEP_ID", 0, std::numeric_limits<std::uint32_t>::max()).value_or(0));
    environment.port = port_from(job * 97 + step);
    environment.attempt = variables.text("SLURM_RESTART_COUNT").value_or("0");
    const std::int64_t machines = variables.whole("SLURM_STEP_NUM_NODES", 1, kMostRanks).value_or(0);
    if (machines > 0) environment.local_size = static_cast<int>((environment.size + machines - 1) / machines);  // evenly, as srun spreads tasks by default
    if (machines == 1) environment.host = "127.0.0.1";
    else if (environment.size > 1) environment.host = first_host(variables.needed_text("SLURM_STEP_NODELIST", "SLURM_PROCID"));
    read_master(variables, environment);
  } else if (variables.has("RANK") || variables.has("WORLD_SIZE")) {
    environment.launcher = "variables";
    read_place(variables, "RANK", "WORLD_SIZE", environment);
    environment.local_rank = static_cast<int>(variables.whole("LOCAL_RANK", 0, kMostRanks).value_or(0));
    environment.local_size = static_cast<int>(variables.whole("LOCAL_WORLD_SIZE", 1, kMostRanks).value_or(1));
    if (environment.size > 1) {
      variables.needed_text("MASTER_ADDR", "WORLD_SIZE");
      variables.needed_text("MASTER_PORT", "WORLD_SIZE");
      read_master(variables, environment);
    }
  }
  environment.variables = variables.seen();
  return environment;
}

LaunchEnvironment launch_environment() {
  return launch_environment([](const std::string& name) -> std::optional<std::string> {
    const char* const value = std::getenv(name.c_str());
    return value == nullptr ? std::nullopt : std::optional<std::string>(value);
  });
}

}  // namespace alambic::parallel
