// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/licence.h"

#include <algorithm>
#include <cctype>

#include "checkpoints/hf_folder.h"
#include "core/files.h"

namespace alambic::checkpoints {
namespace {

constexpr const char* kAttribution = "Name the authors and say what was changed.";
constexpr const char* kShareAlikeDuty = "What is derived must be passed on under the same licence, naming the authors.";
constexpr const char* kCopyleftDuty = "What is derived must be passed on under the same licence, with its source.";
constexpr const char* kNonCommercial = "Commercial use is not allowed.";
constexpr const char* kLlamaDuty =
    "Show \"Built with Llama\", begin the names of derived models with \"Llama\", pass on the licence and the use policy; no use by services of more than 700 million users.";
constexpr const char* kUseLimits = "Some fields of use are forbidden, and derived models must pass that on.";

struct Row {
  const char* spdx;
  const char* hub_id;  // "" where the Hub has none
  LicenceClass kind;
  const char* duty;
};
using enum LicenceClass;

// Within a class, the rows that bind less come first: of "A OR B" the earlier row is chosen.
constexpr Row kRows[] = {
    {"CC0-1.0", "cc0-1.0", kPermissive, ""},
    {"Unlicense", "unlicense", kPermissive, ""},
    {"PDDL-1.0", "pddl", kPermissive, ""},
    {"WTFPL", "wtfpl", kPermissive, ""},
    {"0BSD", "", kPermissive, ""},
    {"MIT-0", "", kPermissive, ""},
    {"LicenseRef-public-domain", "", kPermissive, ""},
    {"MIT", "mit", kPermissive, "Pass on the copyright line and the licence text."},
    {"Apache-2.0", "apache-2.0", kPermissive, "Pass on the licence text and NOTICE, and say what was changed."},
    {"BSD-2-Clause", "bsd-2-clause", kPermissive, "Pass on the copyright line and the licence text."},
    {"BSD-3-Clause", "bsd-3-clause", kPermissive, "Pass on the copyright line and the licence text."},
    {"BSD-3-Clause-Clear", "bsd-3-clause-clear", kPermissive, "Pass on the copyright line and the licence text."},
    {"ISC", "isc", kPermissive, "Pass on the copyright line and the licence text."},
    {"Zlib", "zlib", kPermissive, "Do not misrepresent the origin."},
    {"BSL-1.0", "bsl-1.0", kPermissive, "Pass on the licence text."},
    {"NCSA", "ncsa", kPermissive, "Pass on the copyright line and the licence text."},
    {"PostgreSQL", "postgresql", kPermissive, "Pass on the copyright line and the licence text."},
    {"AFL-3.0", "afl-3.0", kPermissive, kAttribution},
    {"ECL-2.0", "ecl-2.0", kPermissive, "Pass on the licence text and NOTICE, and say what was changed."},
    {"Artistic-2.0", "artistic-2.0", kPermissive, "Mark changed versions as changed."},
    {"CDLA-Permissive-1.0", "cdla-permissive-1.0", kPermissive, "Pass on the licence text with the data."},
    {"CDLA-Permissive-2.0", "cdla-permissive-2.0", kPermissive, "Pass on the licence text with the data."},
    {"ODC-By-1.0", "odc-by", kPermissive, kAttribution},
    {"CC-BY-2.0", "cc-by-2.0", kPermissive, kAttribution},
    {"CC-BY-2.5", "cc-by-2.5", kPermissive, kAttribution},
    {"CC-BY-3.0", "cc-by-3.0", kPermissive, kAttribution},
    {"CC-BY-4.0", "cc-by-4.0", kPermissive, kAttribution},
    {"CC-BY-SA-4.0", "cc-by-sa-4.0", kShareAlike, kShareAlikeDuty},
    {"CC-BY-SA-3.0", "cc-by-sa-3.0", kShareAlike, kShareAlikeDuty},
    {"CC-BY-SA-2.5", "", kShareAlike, kShareAlikeDuty},
    {"CC-BY-SA-2.0", "", kShareAlike, kShareAlikeDuty},
    {"ODbL-1.0", "odbl", kShareAlike, kShareAlikeDuty},
    {"CDLA-Sharing-1.0", "cdla-sharing-1.0", kShareAlike, kShareAlikeDuty},
    {"MPL-2.0", "mpl-2.0", kShareAlike, "Changed files must be passed on under the same licence."},
    {"EPL-2.0", "epl-2.0", kShareAlike, kCopyleftDuty},
    {"EUPL-1.2", "eupl-1.2", kShareAlike, kCopyleftDuty},
    {"LGPL-2.1-or-later", "lgpl-2.1", kShareAlike, kCopyleftDuty},
    {"LGPL-2.1-only", "lgpl-2.1", kShareAlike, kCopyleftDuty},
    {"LGPL-3.0-or-later", "lgpl-3.0", kShareAlike, kCopyleftDuty},
    {"LGPL-3.0-only", "lgpl-3.0", kShareAlike, kCopyleftDuty},
    {"GPL-2.0-or-later", "gpl-2.0", kShareAlike, kCopyleftDuty},
    {"GPL-2.0-only", "gpl-2.0", kShareAlike, kCopyleftDuty},
    {"GPL-3.0-or-later", "gpl-3.0", kShareAlike, kCopyleftDuty},
    {"GPL-3.0-only", "gpl-3.0", kShareAlike, kCopyleftDuty},
    {"AGPL-3.0-or-later", "agpl-3.0", kShareAlike, kCopyleftDuty},
    {"AGPL-3.0-only", "agpl-3.0", kShareAlike, kCopyleftDuty},
    {"GFDL-1.3-or-later", "gfdl", kShareAlike, kCopyleftDuty},
    {"OSL-3.0", "osl-3.0", kShareAlike, kCopyleftDuty},
    {"LicenseRef-modified-mit", "", kRestricted, "Products above 100 million monthly users or 20 million dollars a month must show the model's name."},
    {"LicenseRef-gemma", "gemma", kRestricted,
     "The Gemma Terms of Use and their prohibited uses must be passed on; they cover models trained on its outputs as well."},
    {"LicenseRef-llama2", "llama2", kRestricted, kLlamaDuty},
    {"LicenseRef-llama3", "llama3", kRestricted, kLlamaDuty},
    {"LicenseRef-llama3.1", "llama3.1", kRestricted, kLlamaDuty},
    {"LicenseRef-llama3.2", "llama3.2", kRestricted, kLlamaDuty},
    {"LicenseRef-llama3.3", "llama3.3", kRestricted, kLlamaDuty},
    {"LicenseRef-llama4", "llama4", kRestricted, kLlamaDuty},
    {"LicenseRef-qwen", "", kRestricted, "Show \"Built with Qwen\" or \"Improved using Qwen\"; ask for a licence above 100 million monthly users."},
    {"LicenseRef-qwen-research", "", kRestricted, kNonCommercial},
    {"LicenseRef-mnpl", "", kRestricted, kNonCommercial},
    {"LicenseRef-mrl", "", kRestricted, kNonCommercial},
    {"LicenseRef-tencent-hunyuan-community", "", kRestricted, "Void in the European Union, the United Kingdom and South Korea; some uses are forbidden."},
    {"LicenseRef-minimax", "", kRestricted, kUseLimits},
    {"LicenseRef-deepseek", "", kRestricted, kUseLimits},
    {"LicenseRef-glm-4", "", kRestricted, "Commercial use needs registration, and some uses are forbidden."},
    {"LicenseRef-openrail", "openrail", kRestricted, kUseLimits},
    {"LicenseRef-openrail-plus-plus", "openrail++", kRestricted, kUseLimits},
    {"LicenseRef-bigscience-bloom-rail-1.0", "bigscience-bloom-rail-1.0", kRestricted, kUseLimits},
    {"LicenseRef-bigscience-openrail-m", "bigscience-openrail-m", kRestricted, kUseLimits},
    {"LicenseRef-bigcode-openrail-m", "bigcode-openrail-m", kRestricted, kUseLimits},
    {"LicenseRef-creativeml-openrail-m", "creativeml-openrail-m", kRestricted, kUseLimits},
    {"LicenseRef-apple-amlr", "apple-amlr", kRestricted, "Research use only."},
    {"LicenseRef-fair-noncommercial-research", "fair-noncommercial-research-license", kRestricted, kNonCommercial},
    {"CC-BY-ND-4.0", "cc-by-nd-4.0", kRestricted, "Derivatives may not be passed on."},
    {"CC-BY-NC-2.0", "cc-by-nc-2.0", kRestricted, kNonCommercial},
    {"CC-BY-NC-3.0", "cc-by-nc-3.0", kRestricted, kNonCommercial},
    {"CC-BY-NC-4.0", "cc-by-nc-4.0", kRestricted, kNonCommercial},
    {"CC-BY-NC-SA-2.0", "cc-by-nc-sa-2.0", kRestricted, kNonCommercial},
    {"CC-BY-NC-SA-3.0", "cc-by-nc-sa-3.0", kRestricted, kNonCommercial},
    {"CC-BY-NC-SA-4.0", "cc-by-nc-sa-4.0", kRestricted, kNonCommercial},
    {"CC-BY-NC-ND-3.0", "cc-by-nc-nd-3.0", kRestricted, "Neither commercial use nor derivatives are allowed."},
    {"CC-BY-NC-ND-4.0", "cc-by-nc-nd-4.0", kRestricted, "Neither commercial use nor derivatives are allowed."},
};

// Other ways in which the same licences are written. "+" and "-or-later" are handled by find_row.
struct Alias {
  const char* name;
  const char* spdx;
};
constexpr Alias kAliases[] = {
    {"apache 2.0", "Apache-2.0"},       {"apache2", "Apache-2.0"},          {"apache-2", "Apache-2.0"},         {"expat", "MIT"},
    {"gpl-2.0", "GPL-2.0-only"},        {"gpl-3.0", "GPL-3.0-only"},        {"gpl-2", "GPL-2.0-only"},          {"gpl-3", "GPL-3.0-only"},
    {"lgpl-2.1", "LGPL-2.1-only"},      {"lgpl-3.0", "LGPL-3.0-only"},      {"agpl-3.0", "AGPL-3.0-only"},      {"gpl-2-or-later", "GPL-2.0-or-later"},
    {"gpl-3-or-later", "GPL-3.0-or-later"}, {"gfdl-1.3", "GFDL-1.3-or-later"}, {"odc-by-1.0", "ODC-By-1.0"},    {"public domain", "LicenseRef-public-domain"},
    {"public-domain", "LicenseRef-public-domain"}, {"modified-mit", "LicenseRef-modified-mit"}, {"qwen", "LicenseRef-qwen"}, {"qwen-license", "LicenseRef-qwen"},
    {"tongyi-qianwen", "LicenseRef-qwen"}, {"qwen-research", "LicenseRef-qwen-research"}, {"mnpl", "LicenseRef-mnpl"}, {"mrl", "LicenseRef-mrl"},
    {"mnpl-0.1", "LicenseRef-mnpl"},    {"tencent-hunyuan-community", "LicenseRef-tencent-hunyuan-community"}, {"deepseek", "LicenseRef-deepseek"},
    {"deepseek-license", "LicenseRef-deepseek"}, {"glm-4", "LicenseRef-glm-4"}, {"openrail-m", "LicenseRef-openrail"},
};

std::string lower(std::string_view text) {
  std::string result(text);
  for (char& letter : result) letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
  return result;
}

std::string_view trimmed(std::string_view text) {
  const auto is_space = [](char letter) { return letter == ' ' || letter == '\t' || letter == '\r' || letter == '\n'; };
  while (!text.empty() && is_space(text.front())) text.remove_prefix(1);
  while (!text.empty() && is_space(text.back())) text.remove_suffix(1);
  return text;
}

const Row* find_row(std::string name) {
  name = lower(trimmed(name));
  if (name.ends_with('+') && name != "openrail++") name = name.substr(0, name.size() - 1) + "-or-later";
  // A Hub id of the GNU family names a version and not the "or later"; the alias says so before the rows are searched.
  for (const Alias& alias : kAliases)
    if (name == alias.name) name = lower(alias.spdx);
  for (const Row& row : kRows)
    if (name == lower(row.spdx) || (*row.hub_id && name == row.hub_id)) return &row;
  return nullptr;
}

Licence unknown(std::string_view given) {
  Licence licence;
  licence.hub_id = "other";
  licence.given = given;
  return licence;
}

Licence single(std::string_view name) {
  // "GPL-2.0-only WITH Classpath-exception-2.0": an exception only allows more, so the licence itself decides.
  const std::size_t with = lower(name).find(" with ");
  const Row* row = find_row(std::string(name.substr(0, with)));
  if (!row) return unknown(trimmed(name));
  Licence licence{row->spdx, *row->hub_id ? row->hub_id : "other", row->kind == kPermissive, row->duty, row->kind, std::string(trimmed(name))};
  if (with != std::string::npos) licence.spdx += " WITH " + std::string(trimmed(name.substr(with + 6)));
  return licence;
}

std::size_t strictness(const Licence& licence) {
  const auto row = std::find_if(std::begin(kRows), std::end(kRows), [&](const Row& candidate) { return licence.spdx.starts_with(candidate.spdx); });
  return static_cast<std::size_t>(licence.kind) * 1000 + static_cast<std::size_t>(row - std::begin(kRows));
}

// expression := term {OR term};  term := factor {AND factor};  factor := "(" expression ")" | words
class ExpressionParser {
 public:
  explicit ExpressionParser(std::string_view text) {
    std::string token;
    const auto flush = [&] {
      if (!token.empty()) tokens_.push_back(std::exchange(token, ""));
    };
    for (const char letter : text) {
      if (letter == '(' || letter == ')') flush(), tokens_.push_back(std::string(1, letter));
      else if (letter == ' ' || letter == '\t' || letter == '\n' || letter == '\r') flush();
      else token += letter;
    }
    flush();
  }

  Licence parse(std::string_view whole) {
    Licence licence = expression(0);
    if (position_ != tokens_.size() || broken_) return unknown(trimmed(whole));
    licence.given = trimmed(whole);
    return licence;
  }

 private:
  bool accept(const char* word) {
    if (position_ >= tokens_.size() || lower(tokens_[position_]) != word) return false;
    ++position_;
    return true;
  }
  Licence expression(int depth) {
    Licence best = term(depth);
    while (accept("or")) {
      Licence other = term(depth);
      if (strictness(other) < strictness(best)) best = std::move(other);
    }
    return best;
  }
  Licence term(int depth) {
    std::vector<Licence> parts{factor(depth)};
    while (accept("and")) parts.push_back(factor(depth));
    return parts.size() == 1 ? parts.front() : combined(parts);
  }
  Licence factor(int depth) {
    if (accept("(")) {
      Licence inside = depth < 20 ? expression(depth + 1) : unknown("");
      broken_ = broken_ || !accept(")");
      return inside;
    }
    std::string words;
    while (position_ < tokens_.size()) {
      const std::string token = lower(tokens_[position_]);
      if (token == "or" || token == "and" || token == "(" || token == ")") break;
      words += (words.empty() ? "" : " ") + tokens_[position_++];
    }
    broken_ = broken_ || words.empty();
    return single(words);
  }

  std::vector<std::string> tokens_;
  std::size_t position_ = 0;
  bool broken_ = false;
};

}  // namespace

std::vector<std::string> front_matter(std::string_view readme, std::string_view key) {
  std::vector<std::string> values;
  const auto unquoted = [](std::string_view text) {
    text = trimmed(text);
    if (text.size() >= 2 && (text.front() == '"' || text.front() == '\'') && text.back() == text.front()) text = text.substr(1, text.size() - 2);
    return std::string(text);
  };
  bool first = true, in_list = false;
  while (!readme.empty()) {
    const std::size_t end = std::min(readme.find('\n'), readme.size());
    const std::string_view line = readme.substr(0, end);
    readme.remove_prefix(std::min(end + 1, readme.size()));
    if (std::exchange(first, false)) {
      if (trimmed(line) != "---") return values;
      continue;
    }
    if (trimmed(line) == "---") return values;
    if (in_list && trimmed(line).starts_with("-")) {
      values.push_back(unquoted(trimmed(line).substr(1)));
      continue;
    }
    in_list = false;
    if (!line.starts_with(key) || line.size() <= key.size() || line[key.size()] != ':') continue;
    std::string_view value = trimmed(line.substr(key.size() + 1));
    if (value.empty()) in_list = true;
    else if (value.front() == '[' && value.back() == ']') {
      value = value.substr(1, value.size() - 2);
      while (!value.empty()) {
        const std::size_t comma = std::min(value.find(','), value.size());
        values.push_back(unquoted(value.substr(0, comma)));
        value.remove_prefix(std::min(comma + 1, value.size()));
      }
    } else values.push_back(unquoted(value));
  }
  return {};  // the front matter never ended
}

Licence find_licence(std::string_view id) {
  constexpr std::size_t kLongest = 1000;
  if (trimmed(id).empty() || id.size() > kLongest) return unknown(id.substr(0, kLongest));
  if (find_row(std::string(id))) return single(id);  // names with spaces, "Apache 2.0"
  return ExpressionParser(id).parse(id);
}

Licence combined(const std::vector<Licence>& parts) {
  Licence all;
  std::vector<std::string> seen;
  for (const Licence& part : parts) {
    const std::string& name = part.spdx.empty() ? part.given : part.spdx;
    if (std::find(seen.begin(), seen.end(), name) != seen.end()) continue;
    if (seen.empty()) all = part;
    else {
      all.given += " AND " + part.given;
      all.spdx = all.spdx.empty() || part.spdx.empty() ? "" : all.spdx + " AND " + part.spdx;
      all.hub_id = "other";
      if (!part.duty.empty() && all.duty.find(part.duty) == std::string::npos) all.duty += (all.duty.empty() ? "" : " ") + part.duty;
      all.kind = std::max(all.kind, part.kind);
    }
    seen.push_back(name);
  }
  all.permissive = all.kind == kPermissive;
  return all;
}

Licence licence_of_text(std::string_view text) {
  struct Title {
    const char* words;  // lower case, all of them in the text's beginning
    const char* spdx;
  };
  // Longer titles first where one contains another.
  static constexpr Title kTitles[] = {
      {"apache license", "Apache-2.0"},
      {"llama 4 community license", "LicenseRef-llama4"},
      {"llama 3.3 community license", "LicenseRef-llama3.3"},
      {"llama 3.2 community license", "LicenseRef-llama3.2"},
      {"llama 3.1 community license", "LicenseRef-llama3.1"},
      {"llama 3 community license", "LicenseRef-llama3"},
      {"llama 2 community license", "LicenseRef-llama2"},
      {"gemma terms of use", "LicenseRef-gemma"},
      {"qwen research license", "LicenseRef-qwen-research"},
      {"qwen license", "LicenseRef-qwen"},
      {"tongyi qianwen license", "LicenseRef-qwen"},
      {"tencent hunyuan community license", "LicenseRef-tencent-hunyuan-community"},
      {"deepseek license", "LicenseRef-deepseek"},
      {"deepseek model license", "LicenseRef-deepseek"},
      {"mistral ai non-production license", "LicenseRef-mnpl"},
      {"mistral ai research license", "LicenseRef-mrl"},
      {"glm-4 license", "LicenseRef-glm-4"},
      {"modified mit license", "LicenseRef-modified-mit"},
      {"gnu affero general public license", "AGPL-3.0-only"},
      {"gnu lesser general public license", "LGPL-3.0-only"},
      {"attribution-noncommercial-sharealike 4.0", "CC-BY-NC-SA-4.0"},
      {"attribution-noncommercial-noderivatives 4.0", "CC-BY-NC-ND-4.0"},
      {"attribution-noncommercial 4.0", "CC-BY-NC-4.0"},
      {"attribution-noderivatives 4.0", "CC-BY-ND-4.0"},
      {"attribution-sharealike 4.0", "CC-BY-SA-4.0"},
      {"attribution 4.0 international", "CC-BY-4.0"},
      {"cc0 1.0 universal", "CC0-1.0"},
      {"this is free and unencumbered software released into the public domain", "Unlicense"},
      {"mozilla public license version 2.0", "MPL-2.0"},
      {"neither the name of", "BSD-3-Clause"},
      {"redistributions in binary form", "BSD-2-Clause"},
      {"permission is hereby granted, free of charge", "MIT"},
  };
  std::string start;  // the first lines, with runs of white space as one space
  for (const char letter : lower(text.substr(0, 2500))) {
    const bool space = letter == ' ' || letter == '\n' || letter == '\r' || letter == '\t';
    if (!space) start += letter;
    else if (!start.empty() && start.back() != ' ') start += ' ';
  }
  if (start.find("gnu general public license") < 200) {
    if (start.find("version 3") < 300) return find_licence("GPL-3.0-only");
    if (start.find("version 2") < 300) return find_licence("GPL-2.0-only");
  }
  // A text that begins with the MIT permission but goes on with conditions is recognised by its own title above it.
  for (const Title& title : kTitles)
    if (start.find(title.words) != std::string::npos) {
      if (std::string_view(title.spdx) == "Apache-2.0" && start.find("version 2.0") == std::string::npos) continue;
      return find_licence(title.spdx);
    }
  return unknown("");
}

Licence licence_of_model(const std::filesystem::path& folder) {
  constexpr std::uint64_t kLongestText = 16 << 20;
  std::vector<Licence> found;
  if (const auto readme = file_of_folder(folder, "README.md"); !readme.empty()) {
    const std::string text = read_file(readme, kLongestText);
    for (const std::string& name : front_matter(text, "license"))
      if (lower(name) != "other") found.push_back(find_licence(name));
    if (found.empty())
      for (const std::string& name : front_matter(text, "license_name")) found.push_back(find_licence(name));
  }
  for (const char* name : {"LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING"}) {
    const auto file = file_of_folder(folder, name);
    if (file.empty()) continue;
    Licence by_text = licence_of_text(read_file(file, kLongestText));
    by_text.given = std::string(name) + " file";
    // A text that is not recognised says nothing against what the card names.
    if (by_text.kind == kUnknown && !found.empty()) break;
    // "or later" is said outside of the text.
    const bool same_family = !found.empty() && by_text.spdx.ends_with("-only") && found.front().spdx.starts_with(by_text.spdx.substr(0, by_text.spdx.size() - 4));
    if (!same_family) found.push_back(by_text);
    break;
  }
  return found.empty() ? unknown("") : combined(found);
}

}  // namespace alambic::checkpoints
