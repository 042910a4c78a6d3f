// SPDX-License-Identifier: Apache-2.0
#pragma once
// Ranks as forked processes of a test, which meet on loopback. A test forks before it computes anything: threads do not survive it.
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"
#include "parallel/communicator.h"
#include "parallel/connect.h"

namespace alambic::testing {

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
inline std::vector<End> run_ranks(int size, const parallel::Patience& patience, const std::function<std::string(parallel::Communicator&)>& act) {
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
      parallel::set_last_word([write_end = ends[1]](const Error& error) {
        const std::string said = std::string("last word: ") + error.what();
        static_cast<void>(!::write(write_end, said.data(), said.size()));
        ::_exit(exit_code(error.kind()));
      });
      std::string said;
      int code = 0;
      try {
        const auto ranks = parallel::connect({.launcher = "test", .rank = rank, .size = size, .host = "127.0.0.1", .port = port.number, .store_socket = rank == 0 ? port.socket : -1, .variables = "MASTER_PORT=" + std::to_string(port.number)}, patience);
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

inline constexpr parallel::Patience kPatient{.timeout_seconds = 60, .connect_timeout_seconds = 60};

inline void expect_all_fine(const std::vector<End>& ends) {
  for (std::size_t rank = 0; rank < ends.size(); ++rank) {
    EXPECT_TRUE(WIFEXITED(ends[rank].status) && WEXITSTATUS(ends[rank].status) == 0) << "rank " << rank << ": status " << ends[rank].status;
    EXPECT_EQ(ends[rank].said, "") << "rank " << rank;
  }
}

/// Of every rank but `lost`: exit code 7 within so many seconds, and all of the words.
inline void expect_lost(const std::vector<End>& ends, std::size_t lost, double seconds, const std::vector<std::string>& words) {
  for (std::size_t rank = 0; rank < ends.size(); ++rank) {
    if (rank == lost) continue;
    SCOPED_TRACE("rank " + std::to_string(rank) + ": " + ends[rank].said);
    EXPECT_TRUE(WIFEXITED(ends[rank].status) && WEXITSTATUS(ends[rank].status) == 7) << ends[rank].status;
    EXPECT_LT(ends[rank].seconds, seconds);
    for (const std::string& word : words) EXPECT_NE(ends[rank].said.find(word), std::string::npos) << word;
  }
}

}  // namespace alambic::testing
