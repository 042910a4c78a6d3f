// SPDX-License-Identifier: Apache-2.0
#include "data/packer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "core/random.h"

namespace alambic::data {
namespace {

// Documents in the order of their numbers.
Window window_of(const std::vector<std::uint32_t>& lengths, const Packing& packing, std::uint64_t first = 0) {
  return make_window([&](std::uint64_t position) { return Sized{position, lengths.at(position)}; }, first, lengths.size(), packing);
}

std::vector<std::vector<std::uint32_t>> lengths_of(const Window& window) {
  std::vector<std::vector<std::uint32_t>> result;
  for (const Row& row : window.rows) {
    result.emplace_back();
    for (const Piece& piece : row) result.back().push_back(piece.length);
  }
  return result;
}

// A number in (0, 1) that depends on `index` alone.
double uniform(std::uint64_t index) { return (static_cast<double>(mix64(index) >> 11) + 0.5) / 9007199254740992.0; }

// A log-normal length, as of real documents.
std::uint32_t log_normal(std::uint64_t index, double median, double sigma) {
  const double normal = std::sqrt(-2 * std::log(uniform(2 * index))) * std::cos(6.283185307179586 * uniform(2 * index + 1));
  return static_cast<std::uint32_t>(std::clamp(median * std::exp(sigma * normal), 2.0, 1e6));
}

TEST(Packer, TakesTheRowWithTheLeastRoomThatIsEnough) {
  const Window window = window_of({3, 9, 5, 1, 6, 0, 2, 4}, {.row_length = 10});
  // Longest first: 9 | 6, 4 | 5, 3, 2; the single token and the empty document have nothing to predict.
  EXPECT_EQ(lengths_of(window), (std::vector<std::vector<std::uint32_t>>{{9}, {6, 4}, {5, 3, 2}}));
  EXPECT_EQ(window.num_documents, 8u);
  EXPECT_EQ(window.num_skipped, 2u);
}

TEST(Packer, CutsOrSplitsWhatIsTooLong) {
  const Window cut = window_of({23}, {.row_length = 10});
  ASSERT_EQ(cut.rows.size(), 1u);
  EXPECT_EQ(cut.rows[0], (Row{{.document = 0, .first_token = 0, .length = 10, .cut = 13}}));

  // 22 steps from a token to the next: 9 + 9 + 4. Each piece begins with the token that the last one ended with.
  const Window split = window_of({23}, {.row_length = 10, .split_long = true});
  ASSERT_EQ(split.rows.size(), 3u);
  EXPECT_EQ(split.rows[0], (Row{{.document = 0, .first_token = 0, .length = 10}}));
  EXPECT_EQ(split.rows[1], (Row{{.document = 0, .first_token = 9, .length = 10}}));
  EXPECT_EQ(split.rows[2], (Row{{.document = 0, .first_token = 18, .length = 5}}));
}

TEST(Packer, SplittingPredictsEachTokenOnce) {
  for (std::uint32_t row_length : {2u, 3u, 7u, 64u}) {
    for (std::uint32_t length = 2; length < 200; ++length) {
      std::vector<int> predicted(length, 0);
      for (const Row& row : window_of({length}, {.row_length = row_length, .split_long = true}).rows)
        for (const Piece& piece : row) {
          EXPECT_EQ(piece.cut, 0u);
          EXPECT_GE(piece.length, 2u);
          EXPECT_LE(piece.length, row_length);
          for (std::uint32_t i = 1; i < piece.length; ++i) ++predicted.at(piece.first_token + i);
        }
      EXPECT_EQ(predicted[0], 0);
      EXPECT_EQ(std::count(predicted.begin() + 1, predicted.end(), 1), length - 1) << length << " in rows of " << row_length;
    }
  }
}

TEST(Packer, WithoutPackingADocumentIsARow) {
  const Window window = window_of({3, 12, 1, 5}, {.row_length = 10, .pack = false});
  EXPECT_EQ(lengths_of(window), (std::vector<std::vector<std::uint32_t>>{{3}, {10}, {5}}));
}

TEST(Packer, WindowsFollowOneAnotherAndCoverTheEpoch) {
  std::vector<std::uint32_t> lengths;
  for (std::uint64_t i = 0; i < 20'000; ++i) lengths.push_back(log_normal(i, 300, 1.2));
  for (const bool split : {false, true}) {
    std::map<std::uint64_t, std::uint64_t> seen;  // document -> tokens
    std::uint64_t first = 0, windows = 0;
    for (; first < lengths.size(); ++windows) {
      const Window window = window_of(lengths, {.row_length = 512, .split_long = split}, first);
      ASSERT_GT(window.num_documents, 0u);
      ASSERT_LE(window.num_documents, 4096u);
      for (const Row& row : window.rows) {
        std::uint64_t tokens = 0;
        for (const Piece& piece : row) {
          EXPECT_TRUE(piece.document >= first && piece.document < first + window.num_documents);
          tokens += piece.length;
          seen[piece.document] += piece.length + piece.cut - (piece.first_token > 0 ? 1 : 0);
        }
        EXPECT_LE(tokens, 512u);
      }
      first += window.num_documents;
    }
    EXPECT_EQ(first, lengths.size());
    EXPECT_GT(windows, 4u);
    for (std::uint64_t i = 0; i < lengths.size(); ++i) ASSERT_EQ(seen[i], lengths[i]) << i;
  }
}

TEST(Packer, AWindowEndsBeforeItHoldsTooMuch) {
  // 4096 documents of a million tokens would be 8 million pieces; the window ends at 1024 rows' worth.
  const std::vector<std::uint32_t> lengths(5000, 1'000'000);
  const Window window = window_of(lengths, {.row_length = 512, .split_long = true});
  EXPECT_EQ(window.num_documents, 1u);
  EXPECT_EQ(window.rows.size(), 1957u);  // ceil(999999 / 511)
}

TEST(Packer, FillsRowsOfRealisticLengths) {
  struct Mix {
    const char* name;
    double median, sigma;
    std::int64_t row_length;
    double at_least;
  };
  for (const Mix& mix : {Mix{"chats", 250, 0.9, 1024, 0.98}, Mix{"chats in long rows", 250, 0.9, 4096, 0.98}, Mix{"web pages", 700, 1.1, 2048, 0.95},
                         Mix{"sentences", 40, 0.5, 512, 0.98}}) {
    std::uint64_t first = 0, tokens = 0, rows = 0;
    const std::uint64_t num_documents = 40'000;
    while (first < num_documents) {
      const Window window = make_window([&](std::uint64_t i) { return Sized{i, log_normal(i, mix.median, mix.sigma)}; }, first, num_documents,
                                        {.row_length = mix.row_length});
      first += window.num_documents;
      rows += window.rows.size();
      for (const Row& row : window.rows)
        for (const Piece& piece : row) tokens += piece.length;
    }
    const double fill = static_cast<double>(tokens) / (static_cast<double>(rows) * static_cast<double>(mix.row_length));
    RecordProperty(mix.name, std::to_string(fill));
    std::cout << mix.name << ": fill " << fill << "\n";
    EXPECT_GE(fill, mix.at_least) << mix.name;
  }
}

TEST(Packer, ShufflingKeepsTheRows) {
  std::vector<Row> rows;
  for (std::uint64_t i = 0; i < 100; ++i) rows.push_back({{.document = i, .length = 2}});
  std::vector<Row> same = rows, other = rows;
  const std::vector<Row> before = rows;
  shuffle_rows(rows, 1);
  shuffle_rows(same, 1);
  shuffle_rows(other, 2);
  EXPECT_EQ(rows, same);
  EXPECT_NE(rows, other);
  EXPECT_NE(rows, before);
  std::sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a[0].document < b[0].document; });
  EXPECT_EQ(rows, before);
}

}  // namespace
}  // namespace alambic::data
