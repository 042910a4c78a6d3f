// SPDX-License-Identifier: Apache-2.0
#pragma once
// Randomness as a pure function: a seed is derived from what it is for, never from what was drawn before.
// So a resumed run draws what the uninterrupted run would have drawn, and no generator state is ever saved.
#include <cstdint>
#include <initializer_list>
#include <string_view>

namespace alambic {

/// One 64-bit seed from a run's seed, a purpose ("dropout", "order", ...) and numbers (rank, step, layer, ...).
std::uint64_t derive_seed(std::uint64_t run_seed, std::string_view purpose, std::initializer_list<std::uint64_t> numbers = {});

/// Finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection on 64 bits that mixes well.
constexpr std::uint64_t mix64(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

/// A bijection of 0 .. size - 1 chosen by a key, computed one element at a time (Feistel network with cycle walking):
/// no index array, so a corpus of 10^12 samples costs nothing to shuffle or to resume.
class KeyedPermutation {
 public:
  KeyedPermutation(std::uint64_t size, std::uint64_t key);
  std::uint64_t operator()(std::uint64_t index) const;  // index < size

 private:
  std::uint64_t size_, key_;
  int half_bits_;
};

}  // namespace alambic
