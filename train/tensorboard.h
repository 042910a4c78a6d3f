// SPDX-License-Identifier: Apache-2.0
#pragma once
// TensorBoard event files, written without protobuf: records of (length, masked crc32c, bytes, masked crc32c) around
// hand-encoded tensorflow.Event messages (tensorflow/core/util/event.proto, tensorflow/core/lib/io/record_writer.h).
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace alambic::train {

/// CRC-32C (Castagnoli), as RFC 3720 appendix B.4 gives it.
std::uint32_t crc32c(std::string_view bytes);

class EventWriter {
 public:
  /// Opens a new events.out.tfevents.<seconds>.<host>.<pid>[.<n>] in `folder`. With first_step > 0 (finished) TensorBoard is told to
  /// forget events of later steps, which a run that was killed had written and a resumed one writes again.
  EventWriter(const std::filesystem::path& folder, std::int64_t first_step);
  ~EventWriter();
  EventWriter(const EventWriter&) = delete;
  EventWriter& operator=(const EventWriter&) = delete;

  void scalar(std::int64_t step, std::string_view tag, double value);
  void text(std::int64_t step, std::string_view tag, std::string_view markdown);
  void flush();  // to the kernel, so that a viewer sees it

 private:
  void event(std::int64_t step, std::string_view fields);
  int descriptor_ = -1;
  std::filesystem::path path_;
  std::string pending_;
};

}  // namespace alambic::train
