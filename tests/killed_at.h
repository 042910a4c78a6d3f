// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <gtest/gtest.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <functional>
#include <stdexcept>

namespace alambic::testing {

/// Runs `work` in a child that is killed just before its `kill_at`-th system call of those that change files; returns
/// false when the child got to its end first. Every such call of the whole run is thus a point of death once. A forked
/// child has this thread alone, so `work` may start none and take no lock that another thread may have held; an alarm ends
/// it if it hangs all the same.
inline bool killed_at(int kill_at, const std::function<void()>& work) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::ptrace(PTRACE_TRACEME, 0, nullptr, nullptr);
    ::raise(SIGSTOP);
    ::alarm(120);
    try {
      work();
    } catch (...) {
      ::_exit(1);
    }
    ::_exit(0);
  }
  int status = 0, seen = 0;
  bool entering = true;
  ::waitpid(child, &status, 0);
  ::ptrace(PTRACE_SETOPTIONS, child, nullptr, PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL);
  for (;;) {
    ::ptrace(PTRACE_SYSCALL, child, nullptr, nullptr);
    ::waitpid(child, &status, 0);
    if (WIFEXITED(status)) {
      EXPECT_EQ(WEXITSTATUS(status), 0);
      return false;
    }
    if (WIFSTOPPED(status) && WSTOPSIG(status) == SIGALRM) {
      ::kill(child, SIGKILL);
      ::waitpid(child, &status, 0);
      throw std::runtime_error("the child hangs");
    }
    if (!WIFSTOPPED(status) || WSTOPSIG(status) != (SIGTRAP | 0x80)) continue;
    if (entering) {
      user_regs_struct registers{};
      ::ptrace(PTRACE_GETREGS, child, nullptr, &registers);
      switch (registers.orig_rax) {
        case SYS_write: case SYS_pwrite64: case SYS_rename: case SYS_renameat: case SYS_fsync: case SYS_ftruncate:
        case SYS_unlink: case SYS_unlinkat: case SYS_mkdir: case SYS_rmdir: case SYS_openat:
          if (seen++ == kill_at) {
            ::kill(child, SIGKILL);
            ::waitpid(child, &status, 0);
            return true;
          }
          break;
        default: break;
      }
    }
    entering = !entering;
  }
}

}  // namespace alambic::testing
