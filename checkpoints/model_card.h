// SPDX-License-Identifier: Apache-2.0
#pragma once
// README.md of a published folder: the Hub's front matter, then a report in plain language.
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "checkpoints/licence.h"

namespace alambic::checkpoints {

struct CardData {
  std::string name;      // of the corpus; a Hub id ("org/name") also goes into the front matter
  std::string licence;   // SPDX id or expression as recorded in the token store
  std::string origin;    // where it came from: address, package and version
  std::string language;  // ISO 639 code, may be empty
  std::string amount;    // "1,234 documents, 2.3 MB", may be empty
};

struct CardMeasure {
  std::string what;       // "bits per UTF-8 byte, held-out Indonesian"
  std::string before, after;
};

struct CardInfo {
  std::string title;
  std::string summary;                    // what this is, one or two sentences
  Licence licence;                        // of this folder's weights
  std::string licence_link;               // where its text is, when the Hub has no id for it
  std::vector<std::string> base_models;   // Hub ids or names
  std::string base_relation;              // merge, adapter, finetune or quantized; empty: this is no derivative
  Licence base_licence;                   // of the base, for the warnings; kUnknown with empty `given` and no base: not mentioned
  std::vector<std::pair<std::string, Licence>> teachers;  // of a distilled model: name, licence
  std::vector<std::string> languages;     // ISO 639 codes
  std::string library_name = "transformers";
  std::vector<std::string> tags;
  std::vector<CardData> data;             // what it was trained on
  std::vector<std::pair<std::string, std::string>> training;  // setting, value
  std::vector<CardMeasure> measures;
  std::vector<std::pair<std::string, std::string>> proof;     // of a merge: "largest logit difference", "0.0012"
  std::vector<std::pair<std::string, std::string>> origin;    // further facts on where it came from: fact, value
  std::vector<std::string> warnings;      // besides those that follow from the licences
};

/// What must be said about these licences before the weights are published: one line for each base, teacher or corpus that is
/// share-alike, restricted or unknown. Empty when all are permissive. For the terminal and for the card.
std::vector<std::string> licence_warnings(const CardInfo& info);

/// The whole README.md. Values from outside are quoted (YAML) or escaped (Markdown, HTML).
std::string model_card(const CardInfo& info);

}  // namespace alambic::checkpoints
