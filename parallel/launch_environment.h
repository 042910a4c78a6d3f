// SPDX-License-Identifier: Apache-2.0
#pragma once
// Which rank this process is, as its launcher says it in environment variables.
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

namespace alambic::parallel {

struct LaunchEnvironment {
  std::string launcher = "none";  // none, alambic launch, torchrun, mpirun, srun, variables
  int rank = 0, size = 1;
  int local_rank = 0, local_size = 1;  // among the ranks of this machine, as far as the launcher tells; they share its memory
  std::string host;                // where rank 0 is reached; "" for size 1
  std::uint16_t port = 0;          // of the store in which the ranks find each other
  bool agent_has_store = false;    // the launcher serves it (torchrun); else rank 0 does
  int store_socket = -1;           // of rank 0: a socket that listens on the port already
  std::string attempt = "0";       // differs each time the same launcher starts the ranks anew
  std::string variables;           // what was read: "MASTER_ADDR=localhost MASTER_PORT=29500 ...", for messages
};

/// value(name): of a variable; nullopt where it is not set (an empty one counts as not set).
/// The innermost launcher counts: alambic launch (ALAMBIC_RANK ...), torchrun (TORCHELASTIC_RUN_ID and RANK ...), mpirun (OMPI_COMM_WORLD_RANK ...),
/// srun (SLURM_STEP_NUM_TASKS, SLURM_PROCID ...), then plain RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. MASTER_ADDR and MASTER_PORT, where
/// given, win over what mpirun or srun let one guess.
/// Error(kPeer) naming the variables and their values: one of a set is missing, is no number or out of range, or RANK, WORLD_SIZE say
/// something else than the launcher does.
LaunchEnvironment launch_environment(const std::function<std::optional<std::string>(const std::string& name)>& value);
/// That of this process.
LaunchEnvironment launch_environment();

/// The first host of a Slurm list: "node[03-05,9],other" is node03.
std::string first_host(const std::string& list);

}  // namespace alambic::parallel
