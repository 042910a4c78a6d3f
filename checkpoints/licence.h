// SPDX-License-Identifier: Apache-2.0
#pragma once
// Licences by name: Hugging Face ids against SPDX, and whether open, unrestricted weights may come of them. Sorting texts
// into classes is an aid for the person who publishes, and no legal advice.
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace alambic::checkpoints {

/// From what may be passed on most freely to what is not known at all; a larger value binds more.
enum class LicenceClass {
  kPermissive,  // anyone may use, change and pass on, for any purpose, keeping at most notices
  kShareAlike,  // the same, but what is derived must stay under the same terms (copyleft)
  kRestricted,  // fields of use, users, sizes or names are limited, or derivatives are forbidden
  kUnknown,
};

struct Licence {
  std::string spdx;     // "Apache-2.0", "LicenseRef-gemma", "MIT AND CC-BY-4.0"; "" = unknown
  std::string hub_id;   // "apache-2.0"; "other" where the Hub has none
  bool permissive = false;
  std::string duty;     // what else must be kept in mind, one sentence; may be empty
  LicenceClass kind = LicenceClass::kUnknown;
  std::string given;    // as it was written: the whole expression when this is its best branch, an unknown name, ...

  /// Weights under these terms may be published for everybody: permissive or share-alike.
  bool open() const { return kind == LicenceClass::kPermissive || kind == LicenceClass::kShareAlike; }
};

/// id: a Hub id, an SPDX id or an SPDX expression with OR, AND, WITH and brackets; any case. Of an OR, the branch that binds
/// least is returned (`given` holds the whole); an AND binds by the stricter of its parts. Unknown: spdx "", kind kUnknown.
Licence find_licence(std::string_view id);

/// The terms of something made from all of these: the parts joined by AND, each once.
Licence combined(const std::vector<Licence>& parts);

/// Of a model folder: README.md's front matter (license, license_name) and the first lines of its LICENSE text. Where the
/// two name different licences, both bind. Nothing found: unknown.
Licence licence_of_model(const std::filesystem::path& folder);

/// Values of one key of a README's YAML front matter: a scalar, or a list below it. Only what model cards use is understood.
std::vector<std::string> front_matter(std::string_view readme, std::string_view key);

/// The licence whose text this is, by its title; unknown otherwise.
Licence licence_of_text(std::string_view text);

/// The full text where it is the same for every work and known here (Apache-2.0), else "".
std::string_view licence_text(std::string_view spdx);

}  // namespace alambic::checkpoints
