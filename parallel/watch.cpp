// SPDX-License-Identifier: Apache-2.0
#include "parallel/watch.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cinttypes>
#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <sstream>
#include <thread>
#include <vector>

#include "core/error.h"
#include "core/files.h"
#include "parallel/communicator.h"

namespace alambic::parallel {
namespace {

using Clock = std::chrono::steady_clock;
constexpr double kBeatSeconds = 0.5;        // between two signs of life
constexpr double kSilentSeconds = 2;        // without one: the process does not run
constexpr double kSecondsToNotice = 5;      // that the main thread gets to see a loss before the watch ends the process
constexpr double kSecondsToEnd = 8;         // since the loss, when it has seen it
constexpr double kAnswerSeconds = 4;        // that rank 0 takes at most to say who is behind
constexpr int kMostToldAtOnce = 64;         // ranks that rank 0 tells at once where it is; more learn it by its signs of life
constexpr std::size_t kLongestLine = 1 << 14;

std::mutex last_word_mutex;
LastWord& last_word_slot() {
  static LastWord slot;
  return slot;
}

double seconds_since(Clock::time_point then) { return std::chrono::duration<double>(Clock::now() - then).count(); }

/// What a rank last said, as the hub (or, of the hub, a member) knows it.
struct Peer {
  Descriptor socket;
  std::string received;     // up to the next end of line
  Place place = {};
  double silent_seconds = 0;
  bool has_left = false;    // said goodbye, or is lost
};

std::string one_line(std::string_view text) {
  std::string line(text.substr(0, kLongestLine / 2));
  std::replace(line.begin(), line.end(), '\n', ' ');
  return line;
}

/// A line is short and a socket's buffer is not, so this does not wait; a peer that reads nothing for so long that the buffer fills misses lines.
void send_line(const Descriptor& socket, const std::string& line) {
  if (socket.is_open()) static_cast<void>(::send(socket.get(), (line + "\n").data(), line.size() + 1, MSG_NOSIGNAL | MSG_DONTWAIT));
}

std::string told(const Place& place) { return std::to_string(place.number) + " " + std::to_string(place.step) + " " + one_line(place.what); }

bool read_place(std::istringstream& words, Place& place) {
  Place read;
  if (!(words >> read.number >> read.step)) return false;
  words.get();
  std::getline(words, read.what);
  place = read;
  return true;
}

std::string where(const Place& place) { return "in step " + std::to_string(place.step) + ", " + place.what; }

/// Appends what has arrived; false when the other end is closed.
bool receive(Peer& peer) {
  char buffer[4096];
  while (true) {
    const ssize_t got = ::recv(peer.socket.get(), buffer, sizeof buffer, MSG_DONTWAIT);
    if (got > 0) {
      peer.received.append(buffer, static_cast<std::size_t>(got));
      peer.silent_seconds = 0;
      if (peer.received.size() > 4 * kLongestLine) return false;
      continue;
    }
    if (got < 0 && errno == EINTR) continue;
    return got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
  }
}

std::optional<std::string> take_line(Peer& peer) {
  const std::size_t end = peer.received.find('\n');
  if (end == std::string::npos) return std::nullopt;
  std::string line = peer.received.substr(0, end);
  peer.received.erase(0, end + 1);
  return line;
}

struct Addresses {
  addrinfo* first = nullptr;
  int problem = 0;
  Addresses(const std::string& host, std::uint16_t port) {
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    problem = ::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &first);
  }
  ~Addresses() {
    if (first != nullptr) ::freeaddrinfo(first);
  }
  Addresses(const Addresses&) = delete;
  Addresses& operator=(const Addresses&) = delete;
};

std::uint16_t bound_port(int descriptor) {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  if (::getsockname(descriptor, reinterpret_cast<sockaddr*>(&address), &size) != 0) return 0;
  return ntohs(address.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&address)->sin6_port : reinterpret_cast<sockaddr_in*>(&address)->sin_port);
}

Descriptor listening_on(const std::string& host) {
  const Addresses own(host, 0);
  for (const addrinfo* address = own.first; address != nullptr; address = address->ai_next) {
    Descriptor socket(::socket(address->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (socket.is_open() && ::bind(socket.get(), address->ai_addr, address->ai_addrlen) == 0 && ::listen(socket.get(), 1024) == 0) return socket;
  }
  // The host is a name or an address that others use for this machine; then any of its own will do.
  for (const int family : {AF_INET6, AF_INET}) {
    Descriptor socket(::socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!socket.is_open()) continue;
    sockaddr_storage any{};
    any.ss_family = static_cast<sa_family_t>(family);
    if (::bind(socket.get(), reinterpret_cast<sockaddr*>(&any), family == AF_INET6 ? sizeof(sockaddr_in6) : sizeof(sockaddr_in)) == 0 && ::listen(socket.get(), 1024) == 0) return socket;
  }
  fail(ErrorKind::kPeer, "rank 0 cannot listen for the other ranks: ", std::strerror(errno));
}

std::string random_token() {
  std::random_device device;
  std::ostringstream text;
  for (int i = 0; i < 4; ++i) text << std::hex << device() << (i < 3 ? "-" : "");
  return text.str();
}

}  // namespace

struct Watch::State {
  int rank = 0, size = 1;
  Descriptor listener, wake_read, wake_write;
  std::string token;
  std::map<int, Peer> peers;          // of the hub: all others; of a member: rank 0 alone
  std::vector<Peer> strangers;        // connected, not yet introduced

  mutable std::mutex mutex;
  mutable std::condition_variable changed;
  Place place;
  std::string loss;                   // "": none
  Clock::time_point lost_at;
  bool acknowledged = false, has_failed = false, has_spoken = false;
  std::optional<double> late_seconds;  // this rank waits for so long
  std::atomic<bool> ends = false;
  std::thread thread;                 // joined before anything it uses goes away

  void wake() { static_cast<void>(!::write(wake_write.get(), "w", 1)); }

  void start() {
    int ends_of_pipe[2];
    if (::pipe2(ends_of_pipe, O_CLOEXEC | O_NONBLOCK) != 0) alambic::fail(ErrorKind::kResource, "pipe: ", std::strerror(errno));
    wake_read = Descriptor(ends_of_pipe[0]), wake_write = Descriptor(ends_of_pipe[1]);
    thread = std::thread([this] { work(); });
  }

  // The mutex is held in all of the following.

  void lose(const std::string& text) {
    if (!loss.empty()) return;
    loss = text, lost_at = Clock::now();
    if (rank == 0)
      for (auto& [number, peer] : peers)
        if (!peer.has_left) send_line(peer.socket, "lost " + one_line(text));
    changed.notify_all();
  }

  void lose_rank(int number, Peer& peer, const std::string& how) {
    peer.has_left = true;
    lose("rank " + std::to_string(number) + " " + how);
  }

  /// Of the hub: who keeps a rank waiting that is in this place.
  void judge(int waiting, const Place& at, double waited_seconds) {
    const std::string waited = " (rank " + std::to_string(waiting) + " has waited " + std::to_string(static_cast<std::int64_t>(waited_seconds)) + " s " + where(at) + ")";
    const Peer* behind = nullptr;
    int number_behind = 0;
    for (const auto& [number, peer] : peers) {  // one whose process does not run, before one that is merely slow
      if (peer.has_left || number == waiting) continue;
      const bool silent = peer.silent_seconds > kSilentSeconds;
      if (!silent && peer.place.number >= at.number) continue;
      if (behind != nullptr && (behind->silent_seconds > kSilentSeconds) && !silent) continue;
      if (behind == nullptr || (silent && behind->silent_seconds <= kSilentSeconds) || peer.place.number < behind->place.number) behind = &peer, number_behind = number;
    }
    if (behind != nullptr && behind->silent_seconds > kSilentSeconds)
      lose("rank " + std::to_string(number_behind) + " hangs " + where(behind->place) + ": no sign of life for " + std::to_string(static_cast<std::int64_t>(behind->silent_seconds)) + " s" + waited);
    else if (waiting != 0 && place.number < at.number && (behind == nullptr || place.number < behind->place.number))
      lose("rank 0 is late " + where(place) + waited);
    else if (behind != nullptr)
      lose("rank " + std::to_string(number_behind) + " is late " + where(behind->place) + waited);
    else
      lose("no rank is behind, so the network has lost something" + waited);
  }

  /// Of the hub: all ranks make the same calls.
  void compare(int number, const Peer& peer) {
    if (rank == 0 && peer.place.number == place.number && peer.place.what != one_line(place.what))
      lose("rank " + std::to_string(number) + " disagrees: it is " + where(peer.place) + ", while rank 0 is " + where(place));
  }

  void hear(int number, Peer& peer, const std::string& line) {
    std::istringstream words(line);
    std::string verb;
    words >> verb;
    if (verb == "at") {
      read_place(words, peer.place);
      compare(number, peer);
    } else if (verb == "bye") {
      peer.has_left = true;
      peer.socket.close();
    } else if (verb == "failed") {
      words.get();
      std::string text;
      std::getline(words, text);
      lose_rank(number, peer, "failed " + where(peer.place) + ": " + text);
    } else if (verb == "late" && rank == 0) {
      double waited = 0;
      words >> waited;
      if (read_place(words, peer.place)) judge(number, peer.place, waited);
    } else if (verb == "lost" && rank != 0) {
      words.get();
      std::string text;
      std::getline(words, text);
      peer.has_left = true;  // rank 0 ends now too, which is no news
      lose(text);
    }
  }

  void admit() {
    Descriptor socket(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (!socket.is_open()) return;
    const int yes = 1;
    ::setsockopt(socket.get(), IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    Peer stranger;
    stranger.socket = std::move(socket);
    if (strangers.size() < static_cast<std::size_t>(2 * size)) strangers.push_back(std::move(stranger));
  }

  void introduce() {
    for (auto stranger = strangers.begin(); stranger != strangers.end();) {
      const bool open = receive(*stranger);
      if (const std::optional<std::string> line = take_line(*stranger)) {
        std::istringstream words(*line);
        std::string verb, said;
        int number = 0;
        if (words >> verb >> said >> number && verb == "hello" && said == token && number > 0 && number < size && !peers.contains(number)) {
          Peer& peer = peers[number] = std::move(*stranger);
          if (!loss.empty()) send_line(peer.socket, "lost " + one_line(loss));
        }
        stranger = strangers.erase(stranger);
      } else if (!open) {
        stranger = strangers.erase(stranger);
      } else {
        ++stranger;
      }
    }
  }

  void beat() {
    for (auto& [number, peer] : peers)
      if (!peer.has_left) send_line(peer.socket, "at " + told(place));
  }

  // The thread.

  void work() {
    Clock::time_point last = Clock::now(), asked_at{};
    double since_beat = kBeatSeconds;
    bool asked = false;
    while (true) {
      std::vector<pollfd> waits = {{.fd = wake_read.get(), .events = POLLIN, .revents = 0}};
      std::vector<int> numbers = {-1};
      {
        const std::lock_guard lock(mutex);
        if (listener.is_open() && peers.size() + 1 < static_cast<std::size_t>(size)) waits.push_back({.fd = listener.get(), .events = POLLIN, .revents = 0});
        for (const Peer& stranger : strangers) waits.push_back({.fd = stranger.socket.get(), .events = POLLIN, .revents = 0});
        for (const auto& [number, peer] : peers)
          if (peer.socket.is_open() && !peer.has_left) waits.push_back({.fd = peer.socket.get(), .events = POLLIN, .revents = 0});
      }
      ::poll(waits.data(), waits.size(), static_cast<int>(kBeatSeconds * 1000));
      if (ends) return;
      char drained[64];
      while (::read(wake_read.get(), drained, sizeof drained) > 0) {}

      std::unique_lock lock(mutex);
      // A pause of this process itself (a stopped or starved machine) is nobody's silence: it counts as one beat.
      const double passed = std::min(seconds_since(last), 2 * kBeatSeconds);
      last = Clock::now();
      if (waits.size() > 1 && waits[1].fd == listener.get() && (waits[1].revents & POLLIN) != 0) admit();
      introduce();
      for (auto& [number, peer] : peers) {
        if (!peer.socket.is_open() || peer.has_left) continue;
        peer.silent_seconds += passed;
        const bool open = receive(peer);
        while (!peer.has_left) {
          const std::optional<std::string> line = take_line(peer);
          if (!line) break;
          hear(number, peer, *line);
        }
        if (!open && !peer.has_left) lose_rank(number, peer, "died " + where(peer.place));
      }
      if ((since_beat += passed) >= kBeatSeconds) beat(), since_beat = 0;
      if (late_seconds && loss.empty()) {
        if (rank == 0) {
          judge(0, place, *late_seconds);
        } else if (!asked) {
          send_line(peers[0].socket, "late " + std::to_string(*late_seconds) + " " + told(place));
          asked = true, asked_at = last;
        } else if (seconds_since(asked_at) > kAnswerSeconds) {
          lose("rank 0 hangs " + where(peers[0].place) + ": no answer for " + std::to_string(static_cast<std::int64_t>(kAnswerSeconds)) + " s (rank " + std::to_string(rank) + " has waited " +
               std::to_string(static_cast<std::int64_t>(*late_seconds)) + " s " + where(place) + ")");
        }
      }
      if (!loss.empty() && !has_spoken && seconds_since(lost_at) > (acknowledged || has_failed ? kSecondsToEnd : kSecondsToNotice)) {
        has_spoken = true;
        const Error last_error(ErrorKind::kPeer, loss + "; this is rank " + std::to_string(rank) + ", " + where(place) + ", computing", "start all ranks again with --resume");
        lock.unlock();
        say_last_word(last_error);
      }
    }
  }

  static void say_last_word(const Error& error) {
    LastWord say;
    {
      const std::lock_guard lock(last_word_mutex);
      say = last_word_slot();
    }
    if (say) say(error);
  }
};

Watch::Watch(std::unique_ptr<State> state) : state_(std::move(state)) { state_->start(); }

std::unique_ptr<Watch> Watch::hub(int size, const std::string& host) {
  auto state = std::make_unique<State>();
  state->size = size;
  state->listener = listening_on(host);
  state->token = random_token();
  return std::unique_ptr<Watch>(new Watch(std::move(state)));
}

std::unique_ptr<Watch> Watch::member(int rank, const std::string& host, std::uint16_t port, const std::string& token, double timeout_seconds) {
  auto state = std::make_unique<State>();
  state->rank = rank;
  state->token = token;
  const Clock::time_point began = Clock::now();
  std::string problem;
  while (!state->peers[0].socket.is_open()) {
    const Addresses there(host, port);
    if (there.problem != 0) problem = ::gai_strerror(there.problem);
    for (const addrinfo* address = there.first; address != nullptr; address = address->ai_next) {
      Descriptor socket(::socket(address->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
      if (socket.is_open() && ::connect(socket.get(), address->ai_addr, address->ai_addrlen) == 0) {
        const int yes = 1;
        ::setsockopt(socket.get(), IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
        state->peers[0].socket = std::move(socket);
        break;
      }
      problem = std::strerror(errno);
    }
    if (state->peers[0].socket.is_open()) break;
    if (seconds_since(began) > timeout_seconds)
      alambic::fail(ErrorKind::kPeer, "rank ", rank, " cannot reach rank 0 at ", host, ":", port, ": ", problem, Remedy{"check MASTER_ADDR and whether a firewall stands between the machines"});
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  send_line(state->peers[0].socket, "hello " + token + " " + std::to_string(rank));
  return std::unique_ptr<Watch>(new Watch(std::move(state)));
}

Watch::~Watch() {
  {
    const std::lock_guard lock(state_->mutex);
    if (state_->loss.empty() && !state_->has_failed)
      for (auto& [number, peer] : state_->peers)
        if (!peer.has_left) send_line(peer.socket, "bye");
  }
  state_->ends = true;
  state_->wake();
  state_->thread.join();
}

std::uint16_t Watch::port() const { return bound_port(state_->listener.get()); }
const std::string& Watch::token() const { return state_->token; }

void Watch::enter(const Place& place) {
  const std::lock_guard lock(state_->mutex);
  state_->place = place;
  state_->late_seconds.reset();
  if (state_->size <= kMostToldAtOnce) state_->beat();
  if (state_->rank == 0)
    for (const auto& [number, peer] : state_->peers)
      if (!peer.has_left) state_->compare(number, peer);
}

std::optional<std::string> Watch::loss() const {
  const std::lock_guard lock(state_->mutex);
  return state_->loss.empty() ? std::nullopt : std::optional(state_->loss);
}

std::optional<std::string> Watch::loss_within(double seconds) const {
  std::unique_lock lock(state_->mutex);
  state_->changed.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return !state_->loss.empty(); });
  return state_->loss.empty() ? std::nullopt : std::optional(state_->loss);
}

void Watch::late(double waited_seconds) {
  {
    const std::lock_guard lock(state_->mutex);
    if (state_->late_seconds) return;
    state_->late_seconds = waited_seconds;
  }
  state_->wake();
}

void Watch::fail(std::string_view message) noexcept {
  try {
    const std::lock_guard lock(state_->mutex);
    if (!state_->loss.empty() || state_->has_failed) return;
    state_->has_failed = true;
    if (state_->rank == 0) state_->lose("rank 0 failed " + where(state_->place) + ": " + std::string(message));
    else send_line(state_->peers[0].socket, "failed " + one_line(message));
  } catch (...) {  // the process ends anyway, which tells as much
  }
}

void Watch::acknowledge() {
  const std::lock_guard lock(state_->mutex);
  state_->acknowledged = true;
}

LastWord set_last_word(LastWord last_word) {
  const std::lock_guard lock(last_word_mutex);
  return std::exchange(last_word_slot(), std::move(last_word));
}

}  // namespace alambic::parallel
