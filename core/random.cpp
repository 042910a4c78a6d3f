// SPDX-License-Identifier: Apache-2.0
#include "core/random.h"

#include <bit>

#include "core/error.h"

namespace alambic {

std::uint64_t derive_seed(std::uint64_t run_seed, std::string_view purpose, std::initializer_list<std::uint64_t> numbers) {
  std::uint64_t seed = mix64(run_seed);
  for (const char letter : purpose) seed = mix64(seed ^ static_cast<unsigned char>(letter));
  for (const std::uint64_t number : numbers) seed = mix64(seed ^ mix64(number));
  return seed;
}

KeyedPermutation::KeyedPermutation(std::uint64_t size, std::uint64_t key) : size_(size), key_(key) {
  if (size == 0 || size > (1ull << 62)) fail(ErrorKind::kBug, "a permutation of ", size, " elements was asked for");
  // Two halves of equal width; the domain is at most 4 times the size, so cycle walking takes under 4 rounds on average.
  half_bits_ = (static_cast<int>(std::bit_width(size - 1)) + 1) / 2;
  if (half_bits_ == 0) half_bits_ = 1;
}

std::uint64_t KeyedPermutation::operator()(std::uint64_t index) const {
  if (index >= size_) fail(ErrorKind::kBug, "element ", index, " of a permutation of ", size_);
  const std::uint64_t mask = (1ull << half_bits_) - 1;
  do {
    std::uint64_t left = index >> half_bits_, right = index & mask;
    for (std::uint64_t round = 0; round < 6; ++round) {
      const std::uint64_t next = left ^ (mix64(right ^ mix64(key_ + round)) & mask);
      left = right;
      right = next;
    }
    index = (left << half_bits_) | right;
  } while (index >= size_);
  return index;
}

}  // namespace alambic
