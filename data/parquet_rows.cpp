// SPDX-License-Identifier: Apache-2.0
#include "data/parquet_rows.h"

#include <string_view>

#include "core/error.h"
#include "data/text_bridge/ownership.h"

namespace alambic::data {
namespace {

// One call across the border fetches this much, so that its cost does not show.
constexpr std::uint64_t kRowsPerBatch = 1024, kBytesPerBatch = 1ull << 20;

}  // namespace

struct ParquetRows::State {
  AlambicRows* rows = nullptr;
  std::string path;
  std::uint64_t num_rows = 0;
  OwnedText batch;
  std::string_view rest;  // of the batch

  State() = default;
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() { alambic_rows_free(rows); }
};

ParquetRows::ParquetRows(const std::filesystem::path& path) : state_(std::make_unique<State>()) {
  state_->path = path.string();
  OwnedText error;
  if (!alambic_rows_open(state_->path.data(), state_->path.size(), &state_->rows, &state_->num_rows, &error.text))
    fail(ErrorKind::kData, state_->path, ": not a Parquet file that can be read: ", error.view());
}

ParquetRows::~ParquetRows() = default;
ParquetRows::ParquetRows(ParquetRows&&) noexcept = default;
ParquetRows& ParquetRows::operator=(ParquetRows&&) noexcept = default;

std::uint64_t ParquetRows::num_rows() const { return state_->num_rows; }

std::optional<std::string> ParquetRows::next_line() {
  if (state_->rest.empty()) {
    OwnedText next, error;
    if (!alambic_rows_next(state_->rows, kRowsPerBatch, kBytesPerBatch, &next.text, &error.text))
      fail(ErrorKind::kData, state_->path, ": ", error.view());
    std::swap(state_->batch.text, next.text);
    state_->rest = state_->batch.view();
    if (state_->rest.empty()) return std::nullopt;
  }
  const std::size_t end = state_->rest.find('\n');
  std::string line(state_->rest.substr(0, end));
  state_->rest.remove_prefix(end + 1);
  return line;
}

}  // namespace alambic::data
