// SPDX-License-Identifier: Apache-2.0
#pragma once
// The one exception alambic throws. The kind decides the exit code and who should act on it.
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace alambic {

enum class ErrorKind {
  kUsage,     // the person must change a flag or a config value      (exit 2)
  kData,      // a file is damaged, missing or of another version     (exit 3)
  kLicence,   // base, teacher or data forbid what was asked for      (exit 4)
  kResource,  // disk, memory or a device ran out or is missing       (exit 5)
  kNumerics,  // a loss or gradient stopped being finite              (exit 6)
  kPeer,      // another rank failed or went silent                   (exit 7)
  kBug,       // alambic broke its own rule: please report            (exit 70)
  kStopped,   // asked to stop; everything is saved and can resume    (exit 75)
};

int exit_code(ErrorKind kind) noexcept;

class Error : public std::runtime_error {
 public:
  /// message  one line: where (file, key, line), what is wrong, the value.
  /// remedy   what the person can do about it; may be empty.
  Error(ErrorKind kind, const std::string& message, std::string remedy = "")
      : std::runtime_error(message), kind_(kind), remedy_(std::move(remedy)) {}
  ErrorKind kind() const noexcept { return kind_; }
  const std::string& remedy() const noexcept { return remedy_; }

 private:
  ErrorKind kind_;
  std::string remedy_;
};

/// The last part of a `fail` call may be a Remedy: fail(kData, path, ": empty file", Remedy{"run prepare again"}).
struct Remedy {
  std::string text;
};

namespace detail {
template <class Part>
void add_part(std::ostringstream& message, std::string& remedy, const Part& part) {
  if constexpr (std::is_same_v<Part, Remedy>) remedy = part.text;
  else message << part;
}
}  // namespace detail

/// Throws Error with the streamed parts joined. A function, not a macro: the caller writes the `if`.
template <class... Parts>
[[noreturn]] void fail(ErrorKind kind, const Parts&... parts) {
  std::ostringstream message;
  std::string remedy;
  (detail::add_part(message, remedy, parts), ...);
  throw Error(kind, message.str(), std::move(remedy));
}

/// The name in `known` nearest to `word` by edit distance, or "" when none is near enough to be a likely typing slip.
std::string nearest_name(const std::string& word, const std::vector<std::string>& known);

}  // namespace alambic
