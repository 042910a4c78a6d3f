// SPDX-License-Identifier: Apache-2.0
#include "core/error.h"

#include <algorithm>
#include <numeric>

namespace alambic {

int exit_code(ErrorKind kind) noexcept {
  switch (kind) {
    case ErrorKind::kUsage: return 2;
    case ErrorKind::kData: return 3;
    case ErrorKind::kLicence: return 4;
    case ErrorKind::kResource: return 5;
    case ErrorKind::kNumerics: return 6;
    case ErrorKind::kPeer: return 7;
    case ErrorKind::kBug: return 70;
    case ErrorKind::kStopped: return 75;
  }
  return 70;
}

namespace {

// Insertions, deletions, replacements and swaps of two neighbours (the commonest slip of all) cost one each.
std::size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<std::size_t> before_last, last(b.size() + 1), row(b.size() + 1);
  std::iota(last.begin(), last.end(), std::size_t{0});
  for (std::size_t i = 1; i <= a.size(); ++i) {
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      row[j] = std::min({last[j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1), last[j] + 1, row[j - 1] + 1});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) row[j] = std::min(row[j], before_last[j - 2] + 1);
    }
    before_last = last;
    last = row;
  }
  return last.back();
}

}  // namespace

std::string nearest_name(const std::string& word, const std::vector<std::string>& known) {
  constexpr std::size_t kLongestWord = 256;  // hostile input must not make this quadratic loop expensive
  if (word.size() > kLongestWord) return "";
  std::string best;
  // A third of the letters may be wrong; more than that is another word, not a slip.
  std::size_t best_distance = std::max<std::size_t>(1, word.size() / 3) + 1;
  for (const std::string& name : known) {
    if (name.size() > kLongestWord) continue;
    const std::size_t distance = edit_distance(word, name);
    if (distance < best_distance) best_distance = distance, best = name;
  }
  return best;
}

}  // namespace alambic
