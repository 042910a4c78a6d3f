// SPDX-License-Identifier: Apache-2.0
#include "tests/fuzz/fuzz.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <malloc.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <iostream>
#include <new>

#include "core/error.h"
#include "core/files.h"
#include "core/log.h"
#include "core/random.h"

namespace {

std::atomic<std::size_t> held_bytes = 0, most_bytes = 0;

void* counted(void* memory) noexcept {
  if (!memory) return nullptr;
  const std::size_t now = held_bytes += malloc_usable_size(memory);
  std::size_t most = most_bytes;
  while (now > most && !most_bytes.compare_exchange_weak(most, now)) {}
  return memory;
}

void release(void* memory) noexcept {
  if (!memory) return;
  held_bytes -= malloc_usable_size(memory);
  std::free(memory);
}

}  // namespace

// All of C++'s memory passes here, so that a parser that builds much from a small input is seen.
void* operator new(std::size_t size) {
  void* const memory = counted(std::malloc(std::max<std::size_t>(size, 1)));
  if (!memory) throw std::bad_alloc();
  return memory;
}
void* operator new[](std::size_t size) { return operator new(size); }
void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return counted(std::malloc(std::max<std::size_t>(size, 1))); }
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept { return counted(std::malloc(std::max<std::size_t>(size, 1))); }
void operator delete(void* memory) noexcept { release(memory); }
void operator delete[](void* memory) noexcept { release(memory); }
void operator delete(void* memory, std::size_t) noexcept { release(memory); }
void operator delete[](void* memory, std::size_t) noexcept { release(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { release(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { release(memory); }

namespace alambic::testing {
namespace {

constexpr std::size_t kLargestInput = 1 << 18;
constexpr std::size_t kFreeBytes = 64 << 20;

class Draws {
 public:
  explicit Draws(std::uint64_t seed) : state_(seed) {}
  std::uint64_t operator()() { return mix64(state_++); }
  std::size_t below(std::size_t limit) { return limit == 0 ? 0 : static_cast<std::size_t>(operator()() % limit); }
  template <class List>
  const auto& one_of(const List& list) { return list[below(std::size(list))]; }

 private:
  std::uint64_t state_;
};

constexpr std::uint64_t kNumbers[] = {0, 1, 2, 3, 7, 8, 9, 16, 31, 32, 63, 64, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 0x7fffffff, 0x80000000, 0xffffffff,
                                      0x100000000, 0x3fffffffffffffff, 0x7fffffffffffffff, 0x8000000000000000, 0xfffffffffffffff8, 0xffffffffffffffff};
constexpr const char* kDecimals[] = {"0", "-1", "1", "-0", "2147483648", "4294967296", "9223372036854775807", "9223372036854775808", "18446744073709551615",
                                     "18446744073709551616", "-9223372036854775808", "1e308", "1e400", "-1e400", "1e-400", "0.5", "1000000", "16777216"};

// A place and a length within the text, short ones more often.
std::pair<std::size_t, std::size_t> range(const std::string& text, Draws& draw) {
  const std::size_t begin = draw.below(text.size());
  const std::size_t limit = draw.below(2) == 0 ? 16 : text.size();
  return {begin, draw.below(std::min(limit, text.size() - begin)) + (text.empty() ? 0 : 1)};
}

void change(std::string& text, const FuzzedParser& parser, Draws& draw) {
  const auto [begin, length] = range(text, draw);
  switch (draw.below(13)) {
    case 0: if (!text.empty()) text[begin] = static_cast<char>(text[begin] ^ (1 << draw.below(8))); break;
    case 1: if (!text.empty()) text[begin] = static_cast<char>(draw.below(256)); break;
    case 2: text.resize(draw.below(text.size() + 1)); break;
    case 3: text.erase(begin, length); break;
    case 4: text.insert(draw.below(text.size() + 1), text.substr(begin, length)); break;
    case 5: {  // a piece of another sample
      const std::string& other = draw.one_of(parser.samples);
      const auto [from, count] = range(other, draw);
      text.replace(begin, draw.below(2) == 0 ? 0 : length, other, from, count);
      break;
    }
    case 6: {  // a binary number of 1, 2, 4 or 8 bytes, or one near what stands there
      const std::size_t width = std::size_t{1} << draw.below(4);
      if (text.size() < begin + width) break;
      std::uint64_t number = 0;
      std::memcpy(&number, &text[begin], width);
      number = draw.below(3) == 0 ? number + draw.below(33) - 16 : draw.one_of(kNumbers);
      std::memcpy(&text[begin], &number, width);
      break;
    }
    case 7: {  // a decimal number
      const std::size_t from = text.find_first_of("0123456789", begin);
      if (from == text.npos) break;
      const std::size_t end = std::min(text.find_first_not_of("0123456789.eE+-", from), text.size());
      text.replace(from, end - from, draw.one_of(kDecimals));
      break;
    }
    case 8: case 9:
      if (!parser.words.empty()) text.replace(begin, draw.below(2) == 0 ? 0 : length, draw.one_of(parser.words));
      break;
    case 10: {  // the same again and again: depth and length
      const std::string piece = parser.words.empty() || draw.below(2) == 0 ? text.substr(begin, draw.below(8) + 1) : draw.one_of(parser.words);
      std::string many;
      for (std::size_t count = std::size_t{1} << draw.below(13); count > 0 && many.size() < kLargestInput; --count) many += piece;
      text.insert(begin, many);
      break;
    }
    case 11: {  // two pieces change places
      const std::string piece = text.substr(begin, length);
      text.erase(begin, length);
      text.insert(draw.below(text.size() + 1), piece);
      break;
    }
    case 12: text.insert(begin, std::string(draw.below(64), static_cast<char>(draw.below(256)))); break;
  }
  if (text.size() > kLargestInput) text.resize(kLargestInput);
}

double processor_seconds() {
  timespec time{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// A file that holds the input that is being parsed, also after the process died.
class LastInput {
 public:
  explicit LastInput(const std::string& test) : path_(fs::temp_directory_path() / ("alambic-fuzz-" + test + ".last")) {
    const int file = ::open(path_.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (file < 0 || ::ftruncate(file, kSize) != 0) fail(ErrorKind::kResource, path_.string(), ": cannot be written");
    memory_ = static_cast<char*>(::mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
    ::close(file);
    if (memory_ == MAP_FAILED) fail(ErrorKind::kResource, path_.string(), ": cannot be mapped");
  }
  ~LastInput() {
    ::munmap(memory_, kSize);
    std::error_code ignored;
    fs::remove(path_, ignored);
  }
  LastInput(const LastInput&) = delete;
  LastInput& operator=(const LastInput&) = delete;
  void set(const std::string& input) {  // 8 bytes of length, then the input
    const std::uint64_t size = input.size();
    std::memcpy(memory_, &size, sizeof size);
    std::memcpy(memory_ + sizeof size, input.data(), std::min(input.size(), kSize - sizeof size));
  }

 private:
  static constexpr std::size_t kSize = 2 * kLargestInput;  // repair() may add a little
  fs::path path_;
  char* memory_ = nullptr;
};

double number_of_environment(const char* name, double otherwise) {
  const char* const text = std::getenv(name);
  return text ? std::atof(text) : otherwise;
}

}  // namespace

std::string damaged(const FuzzedParser& parser, std::uint64_t seed, std::uint64_t number) {
  Draws draw(derive_seed(seed, "fuzz", {number}));
  std::string text = draw.one_of(parser.samples);
  for (std::size_t changes = 1 + draw.below(draw.below(2) == 0 ? 2 : 8); changes > 0; --changes) change(text, parser, draw);
  if (parser.repair && draw.below(2) == 0) text = parser.repair(std::move(text));
  return text;
}

void fuzz(const FuzzedParser& parser) {
  const std::string test = ::testing::UnitTest::GetInstance()->current_test_info()->name();
  const double seconds = number_of_environment("ALAMBIC_FUZZ_SECONDS", 8);
  const auto seed = static_cast<std::uint64_t>(number_of_environment("ALAMBIC_FUZZ_SEED", 1));
  const std::uint64_t most_inputs = std::getenv("ALAMBIC_FUZZ_SECONDS") ? UINT64_MAX : 100'000;
  struct QuietLog {
    LogSink former = set_log_sink([](LogLevel, std::string_view) {});
    ~QuietLog() { set_log_sink(std::move(former)); }
  } quiet;

  for (const std::string& sample : parser.samples) ASSERT_NO_THROW(parser.parse(sample)) << sample.substr(0, 2000);

  LastInput last(test);
  std::uint64_t number = 0, taken = 0, refused = 0;
  int failures = 0;
  double slowest = 0;
  std::size_t largest = 0;
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  for (; number < most_inputs && failures < 3 && std::chrono::steady_clock::now() < end; ++number) {
    const std::string input = damaged(parser, seed, number);
    last.set(input);
    std::string problem;
    const std::size_t before = held_bytes;
    most_bytes = before;
    const double started = processor_seconds();
    try {
      parser.parse(input);
      ++taken;
    } catch (const Error& error) {
      ++refused;
      if (error.kind() == ErrorKind::kBug) problem = std::string("said to be a bug: ") + error.what();
    } catch (const std::exception& error) {
      problem = std::string("another exception: ") + error.what();
    }
    const double took = processor_seconds() - started;
    const std::size_t used = most_bytes - before;
    slowest = std::max(slowest, took);
    largest = std::max(largest, used);
    if (took > parser.most_seconds) problem = std::to_string(took) + " s of processor time";
    if (used > kFreeBytes + 2 * input.size()) problem = std::to_string(used) + " bytes of memory for an input of " + std::to_string(input.size());
    if (problem.empty()) continue;
    ++failures;
    const fs::path kept = fs::temp_directory_path() / ("alambic-fuzz-" + test + "-" + std::to_string(seed) + "-" + std::to_string(number));
    write_file(kept, input);
    ADD_FAILURE() << "seed " << seed << ", input " << number << " (kept as " << kept << "): " << problem;
  }
  std::cout << test << ": " << number << " inputs, " << taken << " taken, " << refused << " refused; slowest " << slowest << " s, most memory " << largest << " bytes\n";
  EXPECT_GT(taken, 0u) << "every input was refused, so little of the parser ran";
  EXPECT_GT(refused, 0u) << "no input was refused";
}

}  // namespace alambic::testing
