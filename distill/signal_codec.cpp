// SPDX-License-Identifier: Apache-2.0
#include "distill/signal_codec.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/error.h"

namespace alambic::distill {
namespace {

constexpr std::uint32_t kLowestExponent = 96;  // of an f32's exponent field: 2^-31
constexpr std::int64_t kMostSlots = 4096;
constexpr int kFewestMantissaBits = 3;
constexpr std::uint32_t kLargestVocabulary = 1u << 30;

// Bits from the least significant on.
class BitWriter {
 public:
  explicit BitWriter(std::vector<std::uint8_t>& bytes) : bytes_(bytes) {}
  void put(std::uint32_t value, int bits) {
    held_ |= static_cast<std::uint64_t>(value) << num_held_;
    for (num_held_ += bits; num_held_ >= 8; num_held_ -= 8) {
      bytes_.push_back(static_cast<std::uint8_t>(held_));
      held_ >>= 8;
    }
  }
  void finish() {
    if (num_held_ > 0) bytes_.push_back(static_cast<std::uint8_t>(held_));
    held_ = 0;
    num_held_ = 0;
  }

 private:
  std::vector<std::uint8_t>& bytes_;
  std::uint64_t held_ = 0;
  int num_held_ = 0;
};

std::uint64_t load64(const std::uint8_t* bytes) {
  std::uint64_t value;
  std::memcpy(&value, bytes, sizeof value);
  if constexpr (std::endian::native == std::endian::big) value = __builtin_bswap64(value);
  return value;
}

std::uint32_t load32(const std::uint8_t* bytes) {
  return static_cast<std::uint32_t>(bytes[0]) | static_cast<std::uint32_t>(bytes[1]) << 8 | static_cast<std::uint32_t>(bytes[2]) << 16 | static_cast<std::uint32_t>(bytes[3]) << 24;
}

void append32(std::vector<std::uint8_t>& bytes, std::uint32_t value) {
  for (int i = 0; i < 4; ++i) bytes.push_back(static_cast<std::uint8_t>(value >> (8 * i)));
}

std::string at_row(std::int64_t row, const std::string& what) { return "row " + std::to_string(row) + ": " + what; }

std::string unpack_top_k(const SignalForm& form, std::int64_t rows, std::span<const std::uint8_t> bytes, std::int32_t* ids, float* probabilities, float* tails) {
  if (bytes.size() != form.most_bytes(static_cast<std::uint64_t>(rows))) return std::to_string(bytes.size()) + " bytes for " + std::to_string(rows) + " rows";
  const int id_bits = form.id_bits(), mantissa_bits = form.mantissa_bits();
  const std::uint32_t id_mask = (1u << id_bits) - 1, one = 31u << mantissa_bits;
  const std::uint8_t* from = bytes.data();
  for (std::int64_t row = 0; row < rows; ++row) {
    std::uint32_t before = one;
    for (std::int64_t n = 0; n < form.slots; ++n, from += 4) {
      const std::uint32_t word = load32(from), id = word & id_mask, code = word >> id_bits;
      if (id >= form.vocabulary_size) return at_row(row, "id " + std::to_string(id) + " in a vocabulary of " + std::to_string(form.vocabulary_size));
      if (code > before) return at_row(row, "its probabilities rise");
      before = code;
      *ids++ = static_cast<std::int32_t>(id);
      *probabilities++ = widen(code, mantissa_bits);
    }
    const float tail = std::bit_cast<float>(load32(from));
    if (!(tail >= 0 && tail <= 1)) return at_row(row, "its tail is not between 0 and 1");
    *tails++ = tail;
    from += 4;
  }
  return "";
}

std::string unpack_sampled(const SignalForm& form, std::int64_t rows, std::span<const std::uint8_t> bytes, std::int32_t* ids, float* probabilities, float* tails) {
  const int entries_bits = form.num_entries_bits(), id_bits = form.id_bits(), code_bits = form.entry_code_bits();
  const auto mask = [](int bits) { return (1ull << bits) - 1; };
  const std::uint64_t end = bytes.size() * 8;
  const auto draws = static_cast<std::uint64_t>(form.slots);
  const float share = 1 / static_cast<float>(form.slots);
  std::uint64_t at = 0;
  // At most 57 bits lie behind any bit of a 64-bit word that begins at its byte.
  const auto bits_at = [&](std::uint64_t bit) { return load64(bytes.data() + bit / 8) >> (bit % 8); };
  for (std::int64_t row = 0; row < rows; ++row, ids += form.slots, probabilities += form.slots) {
    if (at + static_cast<std::uint64_t>(entries_bits) > end) return at_row(row, "the bytes end before it");
    const std::uint64_t entries = 1 + (bits_at(at) & mask(entries_bits));
    at += static_cast<std::uint64_t>(entries_bits);
    if (entries > draws) return at_row(row, std::to_string(entries) + " ids of " + std::to_string(draws) + " draws");
    if (at + entries * static_cast<std::uint64_t>(id_bits + code_bits) > end) return at_row(row, "the bytes end within it");
    std::uint64_t sum = 0;
    std::int64_t before = -1;
    for (std::uint64_t n = 0; n < entries; ++n) {
      const std::uint64_t word = bits_at(at), id = word & mask(id_bits), code = word >> id_bits & mask(code_bits);
      at += static_cast<std::uint64_t>(id_bits + code_bits);
      if (id >= form.vocabulary_size) return at_row(row, "id " + std::to_string(id) + " in a vocabulary of " + std::to_string(form.vocabulary_size));
      if (static_cast<std::int64_t>(id) <= before) return at_row(row, "its ids do not rise");
      before = static_cast<std::int64_t>(id);
      ids[n] = static_cast<std::int32_t>(id);
      if (form.kind == SignalKind::kSampled) {
        sum += code + 1;
        probabilities[n] = static_cast<float>(code + 1) * share;
      } else {
        if (code > 31u << kWeightMantissaBits) return at_row(row, "a weight above the largest");
        probabilities[n] = widen(static_cast<std::uint32_t>(code), kWeightMantissaBits) * kLargestWeight;
      }
    }
    if (form.kind == SignalKind::kSampled && sum != draws) return at_row(row, "its counts sum to " + std::to_string(sum) + ", but there were " + std::to_string(draws) + " draws");
    std::fill(ids + entries, ids + form.slots, -1);
    std::fill(probabilities + entries, probabilities + form.slots, 0.0f);
    *tails++ = 0;
  }
  if ((at + 7) / 8 != bytes.size()) return std::to_string(bytes.size()) + " bytes for " + std::to_string(rows) + " rows that end in byte " + std::to_string((at + 7) / 8);
  if (at % 8 != 0 && bytes[at / 8] >> (at % 8) != 0) return "bits behind its last row";
  return "";
}

}  // namespace

std::uint32_t narrow(float value, int mantissa_bits) {
  const int shift = 23 - mantissa_bits;
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t lowest = kLowestExponent << mantissa_bits, kept = shift == 0 ? bits : (bits + ((1u << (shift - 1)) - 1) + (bits >> shift & 1)) >> shift;
  return value > 0 && kept > lowest ? kept - lowest : 0;
}

std::uint32_t narrow_unbiased(float value, int mantissa_bits, std::uint32_t random) {
  if (!(value > 0)) return 0;
  const float smallest = widen(1, mantissa_bits);
  if (value < smallest) return static_cast<double>(random) < static_cast<double>(value) / static_cast<double>(smallest) * 4294967296.0 ? 1 : 0;
  // Within an octave, and up to the first value of the next, an f32 is linear in its bits.
  const int shift = 23 - mantissa_bits;
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return ((bits + (random & ((1u << shift) - 1))) >> shift) - (kLowestExponent << mantissa_bits);
}

float widen(std::uint32_t code, int mantissa_bits) {
  return code == 0 ? 0.0f : std::bit_cast<float>((code + (kLowestExponent << mantissa_bits)) << (23 - mantissa_bits));
}

int SignalForm::id_bits() const { return std::max(1, static_cast<int>(std::bit_width(vocabulary_size - 1))); }
int SignalForm::mantissa_bits() const { return std::min(23, 32 - 5 - id_bits()); }
int SignalForm::num_entries_bits() const { return static_cast<int>(std::bit_width(static_cast<std::uint64_t>(slots) - 1)); }
int SignalForm::entry_code_bits() const { return kind == SignalKind::kWeighted ? 5 + kWeightMantissaBits : num_entries_bits(); }

std::uint64_t SignalForm::most_bytes(std::uint64_t rows) const {
  const auto n = static_cast<std::uint64_t>(slots);
  if (kind == SignalKind::kTopK) return rows * (4 * n + 4);
  return (rows * (static_cast<std::uint64_t>(num_entries_bits()) + n * static_cast<std::uint64_t>(id_bits() + entry_code_bits())) + 7) / 8;
}

void check(const SignalForm& form) {
  if (form.vocabulary_size < 2 || form.vocabulary_size > kLargestVocabulary) fail(ErrorKind::kUsage, "a vocabulary of ", form.vocabulary_size, " ids cannot be cached");
  if (form.kind == SignalKind::kTopK) {
    if (form.mantissa_bits() < kFewestMantissaBits)
      fail(ErrorKind::kUsage, "a vocabulary of ", form.vocabulary_size, " ids leaves no room for a probability in 4 bytes", Remedy{"use kind: sampled"});
    if (form.slots < 1 || form.slots > std::min<std::int64_t>(kMostSlots, form.vocabulary_size))
      fail(ErrorKind::kUsage, "k: ", form.slots, " is not between 1 and ", std::min<std::int64_t>(kMostSlots, form.vocabulary_size), ", the ids there are");
  } else if (form.slots < 1 || form.slots > kMostSlots) {
    fail(ErrorKind::kUsage, "draws: ", form.slots, " is not between 1 and ", kMostSlots);
  }
}

void pack(const SignalForm& form, std::int64_t rows, const std::int32_t* ids, const std::uint32_t* codes, const float* tails, std::vector<std::uint8_t>& bytes) {
  const int id_bits = form.id_bits();
  if (form.kind == SignalKind::kTopK) {
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t n = 0; n < form.slots; ++n) append32(bytes, static_cast<std::uint32_t>(*ids++) | *codes++ << id_bits);
      append32(bytes, std::bit_cast<std::uint32_t>(*tails++));
    }
    return;
  }
  const int entries_bits = form.num_entries_bits(), code_bits = form.entry_code_bits();
  const std::uint32_t less = form.kind == SignalKind::kSampled ? 1 : 0;
  BitWriter writer(bytes);
  for (std::int64_t row = 0; row < rows; ++row, ids += form.slots, codes += form.slots) {
    const auto entries = static_cast<std::int64_t>(std::find(ids, ids + form.slots, -1) - ids);
    if (entries == 0) fail(ErrorKind::kBug, "a sampled row without an id");
    writer.put(static_cast<std::uint32_t>(entries - 1), entries_bits);
    for (std::int64_t n = 0; n < entries; ++n) {
      writer.put(static_cast<std::uint32_t>(ids[n]), id_bits);
      writer.put(codes[n] - less, code_bits);
    }
  }
  writer.finish();
}

std::string unpack(const SignalForm& form, std::int64_t rows, std::span<const std::uint8_t> bytes, std::int32_t* ids, float* probabilities, float* tails) {
  return form.kind == SignalKind::kTopK ? unpack_top_k(form, rows, bytes, ids, probabilities, tails) : unpack_sampled(form, rows, bytes, ids, probabilities, tails);
}

}  // namespace alambic::distill
