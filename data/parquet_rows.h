// SPDX-License-Identifier: Apache-2.0
#pragma once
// A Parquet file as JSON lines, read by the text bridge batch by batch: memory holds one page a column and one batch.
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>

namespace alambic::data {

class ParquetRows {
 public:
  /// Error(kData) naming the file if it is missing, damaged, encrypted or uses an unknown compression.
  explicit ParquetRows(const std::filesystem::path& path);
  ~ParquetRows();
  ParquetRows(ParquetRows&&) noexcept;
  ParquetRows& operator=(ParquetRows&&) noexcept;

  std::uint64_t num_rows() const;  // from the footer
  /// The next row as one JSON object without a line end: columns by name in file order, lists as arrays, structs as
  /// objects, missing values as null, timestamps as text. nullopt after the last. Error(kData) where the file is damaged.
  std::optional<std::string> next_line();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace alambic::data
