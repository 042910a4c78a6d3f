// SPDX-License-Identifier: Apache-2.0
#pragma once
// Starts the ranks of a run as processes of this machine, and stays until all have ended.
#include <iosfwd>
#include <string>
#include <vector>

namespace alambic::parallel {

struct LocalRanks {
  int size = 1;
  std::vector<std::string> command;  // the program's file, then its arguments
  std::vector<std::string> again;    // the command of a restart
  int restarts = 0;                  // at most; after a rank died or was lost, not after an error that would come again
};

/// Lines of the ranks' stderr (and of the stdout of all but rank 0) go to `err` behind "[rank N] "; rank 0's stdout is this process's own.
/// SIGTERM, SIGINT and SIGUSR1 go on to all ranks. They die with this process, however it ends. When one ends badly the others get
/// some seconds to end by themselves. Returns the exit code of the whole: 0 when all ranks say so; else that of the first rank that
/// ended for a reason of its own; 7 when one was ended by a signal or was lost.
int run_local_ranks(const LocalRanks& ranks, std::ostream& err);

}  // namespace alambic::parallel
