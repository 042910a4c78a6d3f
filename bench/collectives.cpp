// SPDX-License-Identifier: Apache-2.0
#include "bench/collectives.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"
#include "core/files.h"

namespace alambic::bench {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// From the first rank's begin to the last one's end: processes of one machine have one steady clock.
double median_seconds(parallel::Communicator& ranks, int repeats, const std::function<void()>& call) {
  std::vector<double> seconds;
  for (int i = 0; i < repeats + 1; ++i) {  // the first one pays for pages and buffers
    ranks.barrier("before a measurement");
    at::Tensor times = at::full({2}, now(), at::kDouble);
    call();
    times[1].fill_(now());
    const at::Tensor all = ranks.all_gather(times, "times");
    if (i > 0) seconds.push_back(all.select(1, 1).max().item<double>() - all.select(1, 0).min().item<double>());
  }
  std::sort(seconds.begin(), seconds.end());
  return (seconds[(seconds.size() - 1) / 2] + seconds[seconds.size() / 2]) / 2;
}

/// A connection between ranks 0 and 1; of the others nothing.
Descriptor plain_connection(parallel::Communicator& ranks) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  const auto must = [](bool done) {
    if (!done) fail(ErrorKind::kResource, "a plain socket on 127.0.0.1 cannot be had");
  };
  const Descriptor socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  must(socket.is_open());
  if (ranks.rank() == 0) must(::bind(socket.get(), reinterpret_cast<sockaddr*>(&address), size) == 0 && ::listen(socket.get(), 1) == 0 && ::getsockname(socket.get(), reinterpret_cast<sockaddr*>(&address), &size) == 0);
  const std::string port = broadcast_text(ranks, std::to_string(ntohs(address.sin_port)), 0, "port of a plain socket");
  Descriptor connection;
  if (ranks.rank() == 0) connection = Descriptor(::accept4(socket.get(), nullptr, nullptr, SOCK_CLOEXEC));
  if (ranks.rank() == 1) {
    address.sin_port = htons(static_cast<std::uint16_t>(std::stoi(port)));
    connection = Descriptor(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    must(::connect(connection.get(), reinterpret_cast<sockaddr*>(&address), size) == 0);
  }
  const int yes = 1;
  if (ranks.rank() < 2) must(connection.is_open() && ::setsockopt(connection.get(), IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes) == 0);
  return connection;
}

template <class Act>
void move_all(char* data, std::size_t size, const Act& act) {
  while (size > 0) {
    const ssize_t moved = act(data, size);
    if (moved <= 0) fail(ErrorKind::kPeer, "the plain socket broke");
    data += moved, size -= static_cast<std::size_t>(moved);
  }
}

void send_all(const Descriptor& connection, const at::Tensor& bytes) {
  move_all(static_cast<char*>(bytes.mutable_data_ptr()), bytes.nbytes(), [&](char* data, std::size_t size) { return ::send(connection.get(), data, size, MSG_NOSIGNAL); });
}

void receive_all(const Descriptor& connection, const at::Tensor& bytes) {
  move_all(static_cast<char*>(bytes.mutable_data_ptr()), bytes.nbytes(), [&](char* data, std::size_t size) { return ::recv(connection.get(), data, size, 0); });
}

}  // namespace

Json measure_collectives(parallel::Communicator& ranks, std::int64_t bytes, int repeats) {
  const std::int64_t size = ranks.size(), share = bytes / 4 / size;
  if (size < 2) fail(ErrorKind::kUsage, "collectives: at least 2 ranks are needed");
  if (share < 1 || repeats < 1) fail(ErrorKind::kUsage, "collectives: at least ", 4 * size, " bytes and 1 repeat are needed");
  const double whole = static_cast<double>(4 * share * size), others = whole * static_cast<double>(size - 1) / static_cast<double>(size);
  const double one = ranks.rank() + 1.0;
  Json report = {{"size", size}, {"bytes", 4 * share * size}};
  const auto measure = [&](const char* name, double received, const std::function<at::Tensor()>& call, double expected) {
    at::Tensor result;
    const double seconds = median_seconds(ranks, repeats, [&] { result = call(); });
    // A result that is wrong is worth no figure.
    if (result.numel() > 0 && result.flatten()[-1].item<float>() != static_cast<float>(expected)) fail(ErrorKind::kBug, name, " gave ", result.flatten()[-1].item<float>(), ", not ", expected);
    report[name] = {{"seconds", seconds}, {"received", received}};
  };
  const at::Tensor own = at::full({share}, one);
  const std::vector<std::vector<at::Tensor>> parts(static_cast<std::size_t>(size), {own});
  const double sum_of_ones = static_cast<double>(size * (size + 1)) / 2;
  at::Tensor tensor = at::full({share * size}, one);
  // Sums of sums would grow: each call has one tensor anew, whose filling counts little beside a sum.
  measure("sum", 2 * others, [&] { tensor.fill_(one), ranks.sum_in_place({&tensor, 1}, "sum"); return tensor; }, sum_of_ones);
  measure("all_gather", others, [&] { return ranks.all_gather(own, "all_gather"); }, static_cast<double>(size));
  at::Tensor scattered = at::full({share}, 0.0);
  measure("reduce_scatter", others, [&] { ranks.start_reduce_scatter(parts, {&scattered, 1}, "reduce_scatter"), ranks.finish_sums("reduce_scatter"); return scattered; }, sum_of_ones);
  tensor.fill_(one);
  measure("broadcast", whole, [&] { ranks.broadcast_in_place({&tensor, 1}, 0, "broadcast"); return tensor; }, 1.0);

  const Descriptor connection = plain_connection(ranks);
  const at::Tensor sent = at::full({share * size}, one), received = at::full({share * size}, 0.0);
  measure("socket_one_way", whole, [&] {
    if (ranks.rank() == 0) send_all(connection, sent);
    if (ranks.rank() == 1) receive_all(connection, received);
    return ranks.rank() == 1 ? received : at::Tensor(at::full({0}, 0.0));
  }, 1.0);
  measure("socket_both_ways", whole, [&] {
    if (ranks.rank() > 1) return at::Tensor(at::full({0}, 0.0));
    std::thread sender([&] { send_all(connection, sent); });
    receive_all(connection, received);
    sender.join();
    return received;
  }, ranks.rank() == 0 ? 2.0 : 1.0);
  return report;
}

}  // namespace alambic::bench
