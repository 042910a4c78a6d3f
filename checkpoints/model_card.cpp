// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/model_card.h"

#include <algorithm>
#include <cctype>
#include <set>

#include "checkpoints/manifest.h"
#include "core/json.h"

namespace alambic::checkpoints {
namespace {

bool is_word_letter(char letter) { return std::isalnum(static_cast<unsigned char>(letter)) != 0; }

// Plain where YAML 1.1 and 1.2 can read it as nothing but this string; else double-quoted, whose escapes are JSON's.
std::string yaml(const std::string& text) {
  static const std::set<std::string> kOtherMeanings = {"y", "n", "yes", "no", "true", "false", "on", "off", "null", "nan", "inf"};
  std::string lower = text;
  for (char& letter : lower) letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
  const bool plain = !text.empty() && std::isalpha(static_cast<unsigned char>(text[0])) && !kOtherMeanings.contains(lower) &&
                     std::all_of(text.begin(), text.end(), [](char letter) { return is_word_letter(letter) || letter == '.' || letter == '_' || letter == '/' || letter == '-'; });
  return plain ? text : to_line(Json(text));
}

// One line of Markdown that shows these very letters.
std::string markdown(const std::string& text) {
  std::string line;
  for (const char letter : text) {
    switch (letter) {
      case '\n': case '\r': case '\t': line += ' '; break;
      case '<': line += "&lt;"; break;
      case '>': line += "&gt;"; break;
      case '&': line += "&amp;"; break;
      case '|': case '*': case '_': case '`': case '[': case ']': case '#': case '\\': line += '\\', line += letter; break;
      default: line += letter;
    }
  }
  return line;
}

// "org/name" or "name", as the Hub allows in base_model and datasets.
bool is_hub_id(const std::string& text) {
  return !text.empty() && text.size() <= 96 && is_word_letter(text.front()) && is_word_letter(text.back()) && std::count(text.begin(), text.end(), '/') <= 1 &&
         text.find("..") == std::string::npos && text.find("--") == std::string::npos &&
         std::all_of(text.begin(), text.end(), [](char letter) { return is_word_letter(letter) || letter == '.' || letter == '_' || letter == '/' || letter == '-'; });
}

bool is_language_code(const std::string& text) {
  return (text.size() == 2 || text.size() == 3) && std::all_of(text.begin(), text.end(), [](char letter) { return letter >= 'a' && letter <= 'z'; });
}

void add_list(std::string& card, const char* key, const std::vector<std::string>& values) {
  if (values.empty()) return;
  card += std::string(key) + ":\n";
  for (const std::string& value : values) card += "- " + yaml(value) + "\n";
}

void add_table(std::string& card, const char* title, const std::vector<std::pair<std::string, std::string>>& rows) {
  if (rows.empty()) return;
  card += std::string("\n## ") + title + "\n\n| | |\n| --- | --- |\n";
  for (const auto& [name, value] : rows) card += "| " + markdown(name) + " | " + markdown(value) + " |\n";
}

std::string shown_name(const Licence& licence) {
  if (!licence.spdx.empty()) return licence.spdx;
  return licence.given.empty() ? "not stated" : licence.given + " (not known to alambic)";
}

std::string warning_of(const std::string& what, const Licence& licence) {
  switch (licence.kind) {
    case LicenceClass::kPermissive: return "";
    case LicenceClass::kShareAlike: return what + " is under " + shown_name(licence) + ", a share-alike licence. " + licence.duty;
    case LicenceClass::kRestricted: return what + " is under " + shown_name(licence) + ", which is not a permissive licence. " + licence.duty;
    case LicenceClass::kUnknown: break;
  }
  return "The licence of " + what + " is " + (licence.given.empty() ? "not stated" : "\"" + licence.given + "\", which is not known to alambic") +
         ". Find out its terms before you publish or use this.";
}

std::string front_matter(const CardInfo& info) {
  std::string card = "---\n";
  if (info.licence.kind == LicenceClass::kUnknown && info.licence.given.empty()) card += "license: unknown\n";
  else if (info.licence.hub_id != "other") card += "license: " + yaml(info.licence.hub_id) + "\n";
  else {
    card += "license: other\nlicense_name: " + yaml(info.licence.spdx.empty() ? info.licence.given : info.licence.spdx) + "\n";
    card += "license_link: " + yaml(info.licence_link.empty() ? "LICENSE" : info.licence_link) + "\n";
  }
  std::vector<std::string> bases, languages, datasets;
  std::copy_if(info.base_models.begin(), info.base_models.end(), std::back_inserter(bases), is_hub_id);
  std::copy_if(info.languages.begin(), info.languages.end(), std::back_inserter(languages), is_language_code);
  for (const CardData& data : info.data)
    if (is_hub_id(data.name) && data.name.find('/') != std::string::npos) datasets.push_back(data.name);
  add_list(card, "base_model", bases);
  if (!bases.empty() && !info.base_relation.empty()) card += "base_model_relation: " + yaml(info.base_relation) + "\n";
  add_list(card, "language", languages);
  add_list(card, "datasets", datasets);
  card += "pipeline_tag: text-generation\nlibrary_name: " + yaml(info.library_name) + "\n";
  std::vector<std::string> tags = info.tags;
  tags.push_back("alambic");
  add_list(card, "tags", tags);
  return card + "---\n";
}

}  // namespace

std::vector<std::string> licence_warnings(const CardInfo& info) {
  std::vector<std::string> warnings;
  const auto add = [&](const std::string& warning) {
    if (!warning.empty()) warnings.push_back(warning);
  };
  if (info.base_models.empty()) add(warning_of("this model", info.licence));
  std::string bases;
  for (const std::string& base : info.base_models) bases += (bases.empty() ? "" : ", ") + base;
  if (!bases.empty()) add(warning_of("the base model " + bases, info.base_licence));
  for (const auto& [name, licence] : info.teachers) add(warning_of("the teacher " + name, licence));
  for (const CardData& data : info.data) add(warning_of("the corpus \"" + data.name + "\"", find_licence(data.licence)));
  return warnings;
}

std::string model_card(const CardInfo& info) {
  std::string card = front_matter(info);
  card += "\n# " + markdown(info.title) + "\n\n" + markdown(info.summary) + "\n";

  std::vector<std::string> warnings = licence_warnings(info);
  warnings.insert(warnings.end(), info.warnings.begin(), info.warnings.end());
  if (!warnings.empty()) {
    card += "\n## Before you use or publish this\n\n";
    for (const std::string& warning : warnings) card += "- " + markdown(warning) + "\n";
  }

  if (!info.base_models.empty()) {
    card += "\n## What it is made from\n\n";
    for (const std::string& base : info.base_models) card += "- Base model: " + markdown(base) + " (licence: " + markdown(shown_name(info.base_licence)) + ")\n";
    for (const auto& [name, licence] : info.teachers) card += "- Teacher: " + markdown(name) + " (licence: " + markdown(shown_name(licence)) + ")\n";
  }
  if (!info.data.empty()) {
    card += "\n## What it was trained on\n\n| corpus | licence | origin | language | amount |\n| --- | --- | --- | --- | --- |\n";
    for (const CardData& data : info.data)
      card += "| " + markdown(data.name) + " | " + markdown(data.licence.empty() ? "not stated" : data.licence) + " | " +
              markdown(data.origin.empty() ? "not stated" : data.origin) + " | " + markdown(data.language) + " | " + markdown(data.amount) + " |\n";
  }
  if (!info.measures.empty()) {
    card += "\n## Measured before and after\n\n| measure | before | after |\n| --- | --- | --- |\n";
    for (const CardMeasure& measure : info.measures) card += "| " + markdown(measure.what) + " | " + markdown(measure.before) + " | " + markdown(measure.after) + " |\n";
  }
  add_table(card, "How it was trained", info.training);
  add_table(card, "Proof of the merge", info.proof);
  add_table(card, "Origin", info.origin);

  card += "\n## Licence\n\n" + markdown(shown_name(info.licence)) + ".";
  if (!info.licence.duty.empty()) card += " " + markdown(info.licence.duty);
  card += "\n\nMade with alambic " + alambic_version() + ". The SHA-256 of every file is in manifest.json.\n";
  return card;
}

}  // namespace alambic::checkpoints
