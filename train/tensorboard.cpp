// SPDX-License-Identifier: Apache-2.0
#include "train/tensorboard.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstring>

#include "core/error.h"

namespace alambic::train {
namespace {

constexpr std::array<std::uint32_t, 256> make_table() {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t value = i;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) ? 0x82f63b78u : 0u);  // the polynomial, reversed
    table[i] = value;
  }
  return table;
}

// Little-endian bytes of an integer, as both the record format and protobuf's fixed types want them.
template <class Integer>
std::string little_endian(Integer value) {
  std::string bytes;
  for (std::size_t i = 0; i < sizeof(Integer); ++i) bytes += static_cast<char>((value >> (8 * i)) & 0xff);
  return bytes;
}

std::string varint(std::uint64_t value) {
  std::string bytes;
  for (; value >= 0x80; value >>= 7) bytes += static_cast<char>((value & 0x7f) | 0x80);
  return bytes + static_cast<char>(value);
}

// Protobuf fields: (number << 3 | wire type), then the value.
std::string number_field(std::uint64_t field, std::uint64_t value) { return varint(field << 3) + varint(value); }
std::string bytes_field(std::uint64_t field, std::string_view value) { return varint(field << 3 | 2) + varint(value.size()) + std::string(value); }
std::string double_field(std::uint64_t field, double value) { return varint(field << 3 | 1) + little_endian(std::bit_cast<std::uint64_t>(value)); }
std::string float_field(std::uint64_t field, float value) { return varint(field << 3 | 5) + little_endian(std::bit_cast<std::uint32_t>(value)); }

std::uint32_t masked(std::uint32_t crc) { return ((crc >> 15) | (crc << 17)) + 0xa282ead8u; }

double seconds_now() { return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count(); }

}  // namespace

std::uint32_t crc32c(std::string_view bytes) {
  static constexpr std::array<std::uint32_t, 256> table = make_table();
  std::uint32_t crc = 0xffffffffu;
  for (const char byte : bytes) crc = (crc >> 8) ^ table[(crc ^ static_cast<unsigned char>(byte)) & 0xff];
  return ~crc;
}

EventWriter::EventWriter(const std::filesystem::path& folder, std::int64_t first_step) {
  std::array<char, 128> host{};
  ::gethostname(host.data(), host.size() - 1);
  const std::string stem = "events.out.tfevents." + std::to_string(static_cast<std::int64_t>(seconds_now())) + "." + host.data() + "." + std::to_string(::getpid());
  for (int attempt = 0; descriptor_ < 0; ++attempt) {
    path_ = folder / (attempt == 0 ? stem : stem + "." + std::to_string(attempt));
    descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (descriptor_ < 0 && errno != EEXIST) fail(ErrorKind::kResource, path_.string(), ": cannot be created: ", std::strerror(errno));
  }
  event(0, bytes_field(3, "brain.Event:2"));                             // Event.file_version
  if (first_step > 0) event(first_step + 1, bytes_field(7, number_field(1, 1)));  // Event.session_log.status = START
  flush();
}

EventWriter::~EventWriter() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void EventWriter::scalar(std::int64_t step, std::string_view tag, double value) {
  event(step, bytes_field(5, bytes_field(1, bytes_field(1, tag) + float_field(2, static_cast<float>(value)))));  // summary.value{tag, simple_value}
}

void EventWriter::text(std::int64_t step, std::string_view tag, std::string_view markdown) {
  // TensorProto{dtype = DT_STRING, tensor_shape{dim{size = 1}}, string_val}
  const std::string tensor = number_field(1, 7) + bytes_field(2, bytes_field(2, number_field(1, 1))) + bytes_field(8, markdown);
  const std::string metadata = bytes_field(1, bytes_field(1, "text"));  // plugin_data{plugin_name}
  event(step, bytes_field(5, bytes_field(1, bytes_field(1, tag) + bytes_field(8, tensor) + bytes_field(9, metadata))));
}

void EventWriter::event(std::int64_t step, std::string_view fields) {
  const std::string message = double_field(1, seconds_now()) + number_field(2, static_cast<std::uint64_t>(step)) + std::string(fields);
  const std::string length = little_endian(static_cast<std::uint64_t>(message.size()));
  pending_ += length + little_endian(masked(crc32c(length))) + message + little_endian(masked(crc32c(message)));
}

void EventWriter::flush() {
  for (std::size_t done = 0; done < pending_.size();) {
    const ssize_t put = ::write(descriptor_, pending_.data() + done, pending_.size() - done);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) fail(ErrorKind::kResource, path_.string(), ": cannot be written: ", std::strerror(errno), Remedy{"free space on the disk, then resume"});
    done += static_cast<std::size_t>(put);
  }
  pending_.clear();
}

}  // namespace alambic::train
