// SPDX-License-Identifier: Apache-2.0
#include "parallel/local_ranks.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <ostream>
#include <thread>
#include <utility>

#include "core/error.h"
#include "core/files.h"

extern char** environ;

namespace alambic::parallel {
namespace {

using Clock = std::chrono::steady_clock;
constexpr double kGraceSeconds = 12;  // for the others, when one has ended badly: they see it within 10
constexpr std::size_t kLongestLine = 1 << 16;
constexpr std::array<int, 3> kForwarded = {SIGTERM, SIGINT, SIGUSR1};

struct Rank {
  pid_t process = -1;
  Descriptor output;           // what it says
  std::string line;            // the part of a line that has come
  std::optional<int> status;   // of waitpid(), once it has ended
  bool was_killed = false;     // by this process
};

[[noreturn]] void cannot(const char* what) { fail(ErrorKind::kResource, "launch: ", what, ": ", std::strerror(errno)); }

/// The signals are read from a descriptor while one lives.
class Signals {
 public:
  Signals() {
    sigset_t set;
    sigemptyset(&set);
    for (const int signal : kForwarded) sigaddset(&set, signal);
    sigaddset(&set, SIGCHLD);
    if (::sigprocmask(SIG_BLOCK, &set, &former_) != 0) cannot("sigprocmask");
    descriptor_ = Descriptor(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
    if (!descriptor_.is_open()) cannot("signalfd");
  }
  ~Signals() { ::sigprocmask(SIG_SETMASK, &former_, nullptr); }
  Signals(const Signals&) = delete;
  Signals& operator=(const Signals&) = delete;
  int descriptor() const { return descriptor_.get(); }
  const sigset_t& former() const { return former_; }
  std::optional<int> next() const {
    signalfd_siginfo info{};
    if (::read(descriptor_.get(), &info, sizeof info) != static_cast<ssize_t>(sizeof info)) return std::nullopt;
    return static_cast<int>(info.ssi_signo);
  }

 private:
  sigset_t former_;
  Descriptor descriptor_;
};

/// A socket on a port of its own, on which rank 0 will serve the meeting of the ranks: so nobody can take the port in between.
std::pair<Descriptor, std::uint16_t> meeting_socket() {
  Descriptor socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  if (!socket.is_open() || ::bind(socket.get(), reinterpret_cast<sockaddr*>(&address), size) != 0 || ::listen(socket.get(), 1024) != 0 ||
      ::getsockname(socket.get(), reinterpret_cast<sockaddr*>(&address), &size) != 0)
    cannot("no port on 127.0.0.1");
  return {std::move(socket), ntohs(address.sin_port)};
}

/// This process's variables with these set.
std::vector<std::string> environment_with(const std::vector<std::pair<std::string, std::string>>& set) {
  std::vector<std::string> all;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const std::string_view text(*variable);
    const auto names_it = [&](const auto& pair) { return text.starts_with(pair.first + "="); };
    if (std::none_of(set.begin(), set.end(), names_it)) all.emplace_back(text);
  }
  for (const auto& [name, value] : set) all.push_back(name + "=" + value);
  return all;
}

std::vector<char*> pointers_to(std::vector<std::string>& texts) {
  std::vector<char*> pointers;
  for (std::string& text : texts) pointers.push_back(text.data());
  pointers.push_back(nullptr);
  return pointers;
}

/// One start of all ranks.
class Attempt {
 public:
  Attempt(const LocalRanks& launch, int number, const Signals& signals, std::ostream& err) : err_(err), signals_(signals), ranks_(static_cast<std::size_t>(launch.size)) {
    const auto [socket, port] = meeting_socket();
    for (int rank = 0; rank < launch.size; ++rank) start(launch, number, rank, socket.get(), port);
  }

  ~Attempt() {  // an exception on the way: nobody stays behind
    for (Rank& rank : ranks_)
      if (rank.process > 0 && !rank.status) {
        ::kill(rank.process, SIGKILL);
        ::waitpid(rank.process, nullptr, 0);
      }
  }
  Attempt(const Attempt&) = delete;
  Attempt& operator=(const Attempt&) = delete;

  /// Until all have ended and all that they said is written.
  void wait() {
    while (!all_ended() || any_open()) {
      std::vector<pollfd> waits = {{.fd = signals_.descriptor(), .events = POLLIN, .revents = 0}};
      for (const Rank& rank : ranks_)
        if (rank.output.is_open()) waits.push_back({.fd = rank.output.get(), .events = POLLIN, .revents = 0});
      ::poll(waits.data(), waits.size(), 200);
      while (const std::optional<int> signal = signals_.next())
        if (*signal != SIGCHLD) forward(*signal);
      for (std::size_t number = 0; number < ranks_.size(); ++number) relay(number);
      collect();
      if (failed_at_ && !all_ended() && std::chrono::duration<double>(Clock::now() - *failed_at_).count() > kGraceSeconds) kill_rest();
      // A pipe may be held by a process that a rank started; it is not waited for.
      if (all_ended() && ++looks_after_end_ > 5) break;
    }
    for (std::size_t number = 0; number < ranks_.size(); ++number)
      if (!ranks_[number].line.empty()) say(number, std::exchange(ranks_[number].line, ""));
  }

  bool was_stopped() const { return was_stopped_; }

  /// The exit code of the whole, and whether starting again may help.
  std::pair<int, bool> outcome() {
    bool any_lost = false;
    for (const auto& [number, status] : ends_) {
      // A wish to stop that came before the rank could listen to it: there is nothing to save, and --resume begins.
      if (was_stopped_ && WIFSIGNALED(status) && std::find(kForwarded.begin(), kForwarded.end(), WTERMSIG(status)) != kForwarded.end()) return {exit_code(ErrorKind::kStopped), false};
      const bool lost = WIFSIGNALED(status) || WEXITSTATUS(status) == exit_code(ErrorKind::kPeer);
      if (!lost && WEXITSTATUS(status) != 0) return {WEXITSTATUS(status), false};
      any_lost |= lost;
    }
    return {any_lost ? exit_code(ErrorKind::kPeer) : 0, any_lost};
  }
  /// Of the first rank that was ended by a signal, for a line in the log.
  std::string first_loss() const {
    for (const auto& [number, status] : ends_)
      if (WIFSIGNALED(status) && !ranks_[number].was_killed) return "rank " + std::to_string(number) + " was ended by signal " + std::to_string(WTERMSIG(status)) + " (" + ::strsignal(WTERMSIG(status)) + ")";
    for (const auto& [number, status] : ends_)
      if (WIFSIGNALED(status)) return "rank " + std::to_string(number) + " did not end by itself and was killed";
    return "a rank was lost";
  }

 private:
  void start(const LocalRanks& launch, int attempt, int number, int socket, std::uint16_t port) {
    Rank& rank = ranks_[static_cast<std::size_t>(number)];
    int pipe[2];
    if (::pipe2(pipe, O_CLOEXEC) != 0) cannot("pipe");
    rank.output = Descriptor(pipe[0]);
    const Descriptor write_end(pipe[1]);
    ::fcntl(pipe[0], F_SETFL, O_NONBLOCK);

    std::vector<std::pair<std::string, std::string>> set = {{"ALAMBIC_RANK", std::to_string(number)}, {"ALAMBIC_SIZE", std::to_string(launch.size)}, {"ALAMBIC_PORT", std::to_string(port)},
                                                            {"ALAMBIC_STORE_SOCKET", number == 0 ? std::to_string(socket) : ""}, {"ALAMBIC_ATTEMPT", std::to_string(attempt)}};
    // The ranks share the processor, unless the user has decided.
    if (std::getenv("OMP_NUM_THREADS") == nullptr)
      set.emplace_back("OMP_NUM_THREADS", std::to_string(std::max(1u, std::thread::hardware_concurrency() / static_cast<unsigned>(launch.size))));
    std::vector<std::string> words = attempt == 0 ? launch.command : launch.again, variables = environment_with(set);
    const std::vector<char*> arguments = pointers_to(words), environment = pointers_to(variables);
    const pid_t parent = ::getpid();

    rank.process = ::fork();
    if (rank.process < 0) cannot("fork");
    if (rank.process > 0) return;
    // The child: nothing but system calls until the program is another one.
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(1);  // it died before the line above
    ::setpgid(0, 0);                        // Ctrl-C comes through this process alone, once
    const int nothing = ::open("/dev/null", O_RDONLY);
    ::dup2(nothing, STDIN_FILENO);
    ::dup2(write_end.get(), STDERR_FILENO);
    if (number > 0) ::dup2(write_end.get(), STDOUT_FILENO);
    else ::fcntl(socket, F_SETFD, 0);
    ::sigprocmask(SIG_SETMASK, &signals_.former(), nullptr);
    ::execve(arguments[0], arguments.data(), environment.data());
    static_cast<void>(!::write(STDERR_FILENO, "cannot be started\n", 18));
    ::_exit(exit_code(ErrorKind::kResource));
  }

  bool all_ended() const {
    return std::all_of(ranks_.begin(), ranks_.end(), [](const Rank& rank) { return rank.status.has_value(); });
  }
  bool any_open() const {
    return std::any_of(ranks_.begin(), ranks_.end(), [](const Rank& rank) { return rank.output.is_open(); });
  }

  void forward(int signal) {
    was_stopped_ = true;
    for (const Rank& rank : ranks_)
      if (!rank.status) ::kill(rank.process, signal);
  }

  void kill_rest() {
    for (Rank& rank : ranks_)
      if (!rank.status && !rank.was_killed) {
        rank.was_killed = true;
        ::kill(rank.process, SIGKILL);
      }
  }

  void collect() {
    for (std::size_t number = 0; number < ranks_.size(); ++number) {
      Rank& rank = ranks_[number];
      int status = 0;
      if (rank.status || ::waitpid(rank.process, &status, WNOHANG) != rank.process) continue;
      rank.status = status;
      ends_.emplace_back(number, status);
      if (status != 0 && !failed_at_) failed_at_ = Clock::now();
    }
  }

  void say(std::size_t number, std::string_view line) { err_ << "[rank " << number << "] " << line << "\n" << std::flush; }

  void relay(std::size_t number) {
    Rank& rank = ranks_[number];
    char buffer[1 << 14];
    while (rank.output.is_open()) {
      const ssize_t got = ::read(rank.output.get(), buffer, sizeof buffer);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0 && errno == EAGAIN) return;
      if (got <= 0) {
        rank.output.close();
        return;
      }
      rank.line.append(buffer, static_cast<std::size_t>(got));
      for (std::size_t end; (end = rank.line.find('\n')) != std::string::npos;) {
        say(number, std::string_view(rank.line).substr(0, end));
        rank.line.erase(0, end + 1);
      }
      if (rank.line.size() > kLongestLine) say(number, std::exchange(rank.line, ""));
    }
  }

  std::ostream& err_;
  const Signals& signals_;
  std::vector<Rank> ranks_;
  std::vector<std::pair<std::size_t, int>> ends_;  // in the order of their ends
  std::optional<Clock::time_point> failed_at_;
  bool was_stopped_ = false;
  int looks_after_end_ = 0;
};

}  // namespace

int run_local_ranks(const LocalRanks& ranks, std::ostream& err) {
  const Signals signals;
  for (int number = 0;; ++number) {
    Attempt attempt(ranks, number, signals, err);
    attempt.wait();
    const auto [code, may_help] = attempt.outcome();
    if (code == exit_code(ErrorKind::kPeer)) err << "alambic: " << attempt.first_loss() << std::endl;
    if (!may_help || attempt.was_stopped() || number == ranks.restarts) return code;
    err << "alambic: all ranks are started again (restart " << number + 1 << " of " << ranks.restarts << ")" << std::endl;
  }
}

}  // namespace alambic::parallel
