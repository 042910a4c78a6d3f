// SPDX-License-Identifier: Apache-2.0
#include "data/packer.h"

#include <algorithm>
#include <set>
#include <utility>

#include "core/error.h"
#include "core/random.h"

namespace alambic::data {

namespace {

constexpr std::uint64_t kWindowDocuments = 4096, kWindowRows = 1024;

// Appends the pieces of one document in the order of the text.
void add_pieces(std::vector<Piece>& pieces, const Sized& sized, const Packing& packing) {
  const auto row_length = static_cast<std::uint32_t>(packing.row_length);
  if (sized.length <= row_length || !packing.split_long) {
    const std::uint32_t length = std::min(sized.length, row_length);
    pieces.push_back({.document = sized.document, .first_token = 0, .length = length, .cut = sized.length - length});
    return;
  }
  // A piece's last token is the next piece's first, so that the step from one to the other is predicted as well.
  std::uint32_t first = 0;
  for (; sized.length - first > row_length; first += row_length - 1)
    pieces.push_back({.document = sized.document, .first_token = first, .length = row_length});
  pieces.push_back({.document = sized.document, .first_token = first, .length = sized.length - first});
}

std::vector<Row> best_fit(std::vector<Piece> pieces, std::int64_t row_length) {
  std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.length > b.length; });
  std::vector<Row> rows;
  std::set<std::pair<std::int64_t, std::size_t>> open;  // (room, row): least room first, of equals the oldest row
  for (const Piece& piece : pieces) {
    const std::int64_t length = piece.length;
    const auto found = open.lower_bound({length, 0});
    std::int64_t room = row_length;
    std::size_t row = rows.size();
    if (found != open.end()) {
      std::tie(room, row) = *found;
      open.erase(found);
    } else {
      rows.emplace_back();
    }
    rows[row].push_back(piece);
    if (room - length >= 2) open.insert({room - length, row});  // no piece is shorter
  }
  return rows;
}

}  // namespace

Window make_window(const DocumentAt& document_at, std::uint64_t first, std::uint64_t num_documents, const Packing& packing) {
  if (first >= num_documents) fail(ErrorKind::kBug, "a window at document ", first, " of ", num_documents);
  Window window;
  std::vector<Piece> pieces;
  std::uint64_t num_tokens = 0;
  const std::uint64_t end = first + std::min(kWindowDocuments, num_documents - first);
  for (std::uint64_t position = first; position < end; ++position) {
    const std::size_t before = pieces.size();
    const Sized sized = document_at(position);
    ++window.num_documents;
    if (sized.length < 2) {
      ++window.num_skipped;
      continue;
    }
    add_pieces(pieces, sized, packing);
    for (std::size_t i = before; i < pieces.size(); ++i) num_tokens += pieces[i].length;
    if (num_tokens >= kWindowRows * static_cast<std::uint64_t>(packing.row_length)) break;
  }
  if (packing.pack) {
    window.rows = best_fit(std::move(pieces), packing.row_length);
  } else {
    for (const Piece& piece : pieces) window.rows.push_back({piece});
  }
  return window;
}

void shuffle_rows(std::vector<Row>& rows, std::uint64_t key) {
  if (rows.empty()) return;
  const KeyedPermutation order(rows.size(), key);
  std::vector<Row> shuffled(rows.size());
  for (std::uint64_t i = 0; i < rows.size(); ++i) shuffled[i] = std::move(rows[order(i)]);
  rows = std::move(shuffled);
}

}  // namespace alambic::data
