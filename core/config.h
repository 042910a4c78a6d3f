// SPDX-License-Identifier: Apache-2.0
#pragma once
// One strict YAML for a run. A config struct names its fields once, in visit(); parsing, range checks, --help and the
// resolved config that goes into every checkpoint all walk that list.
//
//   struct ScheduleConfig {
//     double peak_learning_rate = 2e-4;
//     std::string shape = "cosine";
//     void visit(FieldVisitor& fields) {
//       fields.field("learning_rate", peak_learning_rate, {.help = "highest learning rate", .low = 0, .high = 1});
//       fields.field("shape", shape, {.help = "how it falls after the warm-up", .choices = {"cosine", "linear", "constant", "wsd"}});
//     }
//   };
//   struct TrainConfig { ...  void visit(FieldVisitor& fields) { fields.group("schedule", "learning rate over time", schedule); } };
//   const TrainConfig config = read_config<TrainConfig>("run.yaml", {"schedule.shape=linear"});
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/json.h"

namespace alambic {

struct FieldInfo {
  std::string help;
  std::string unit = "";
  double low = -std::numeric_limits<double>::infinity();  // of numbers, inclusive
  double high = std::numeric_limits<double>::infinity();
  std::vector<std::string> choices = {};                  // of strings
  bool required = false;                                  // must stand in the file or in --set
};

/// Walks a config struct. Relative paths in a YAML file are relative to the current folder, not to the file.
/// The field's type alone decides how a value is read, never its look: `language: no` is the text "no", `rank: "8"` is not a
/// number. Whole numbers are digits without a leading zero (8, -1; not 010, 0x10, 1_000 or 1e6); other numbers are JSON's
/// (0.5, 2e-4; not .5, inf or nan); booleans are true and false.
class FieldVisitor {
 public:
  virtual ~FieldVisitor() = default;
  virtual void field(const std::string& key, bool& value, const FieldInfo& info) = 0;
  virtual void field(const std::string& key, std::int64_t& value, const FieldInfo& info) = 0;
  virtual void field(const std::string& key, std::uint64_t& value, const FieldInfo& info) = 0;
  virtual void field(const std::string& key, double& value, const FieldInfo& info) = 0;
  virtual void field(const std::string& key, std::string& value, const FieldInfo& info) = 0;
  virtual void field(const std::string& key, std::filesystem::path& value, const FieldInfo& info) = 0;
  virtual void field(const std::string& key, std::vector<std::string>& value, const FieldInfo& info) = 0;
  virtual void field(const std::string& key, std::map<std::string, std::string>& value, const FieldInfo& info) = 0;
  virtual void field(const std::string& key, std::map<std::string, std::int64_t>& value, const FieldInfo& info) = 0;
  virtual void field(const std::string& key, std::map<std::string, double>& value, const FieldInfo& info) = 0;

  template <class Struct>
  void group(const std::string& key, const std::string& help, Struct& value) {
    begin_group(key, help);
    value.visit(*this);
    end_group();
  }

  /// A YAML sequence of mappings.
  template <class Struct>
  void list(const std::string& key, std::vector<Struct>& values, const FieldInfo& info) {
    if (const std::optional<std::size_t> size = begin_list(key, values.size(), info)) values.assign(*size, Struct{});
    for (std::size_t i = 0; i < values.size(); ++i) {
      begin_item(i);
      values[i].visit(*this);
      end_item();
    }
    if (values.empty()) {  // --help still shows what an entry may hold
      Struct example;
      if (wants_example()) begin_item(0), example.visit(*this), end_item();
    }
    end_list();
  }

 protected:
  virtual void begin_group(const std::string& key, const std::string& help) = 0;
  virtual void end_group() = 0;
  /// The number of entries that will be read, or nullopt: the entries that are there stay.
  virtual std::optional<std::size_t> begin_list(const std::string& key, std::size_t current_size, const FieldInfo& info) = 0;
  virtual void begin_item(std::size_t index) = 0;
  virtual void end_item() = 0;
  virtual void end_list() = 0;
  virtual bool wants_example() const { return false; }
};

namespace detail {
using Visit = std::function<void(FieldVisitor&)>;
void read_config_into(const std::filesystem::path& file, const std::vector<std::string>& overrides, const Visit& visit);
Json resolved_config_of(const Visit& visit);
std::string config_help_of(const Visit& visit);
}  // namespace detail

/// Reads `file` (may be empty: defaults only), then the overrides "a.b=v" in order. All problems are collected and thrown
/// as one Error(kUsage), a line each, "file:line:column: ..." with the nearest key: unknown or duplicate keys, wrong
/// types, values out of range, `010`, `yes`, tabs, anchors and merges, a missing required field. A file that is missing,
/// larger than 1 MiB or not UTF-8 is Error(kData).
/// An override's value is flow YAML ("data.mixture.0.weight=2", "lora.targets=[q_proj, v_proj]") and is reported as
/// "--set a.b: ..."; it replaces what the file says there. A number in the path is the place in a list; the place
/// behind the last one appends.
template <class Config>
Config read_config(const std::filesystem::path& file, const std::vector<std::string>& overrides = {}) {
  Config config;
  detail::read_config_into(file, overrides, [&](FieldVisitor& fields) { config.visit(fields); });
  return config;
}

/// Whether a config (as read_config takes it) has this key at its top: which of several kinds it is. What is no YAML has none.
bool has_top_key(const std::filesystem::path& file, const std::vector<std::string>& overrides, const std::string& key);

/// Every field with its value, in order.
template <class Config>
Json resolved_config(Config config) {
  return detail::resolved_config_of([&](FieldVisitor& fields) { config.visit(fields); });
}

/// Text for --help: every key with type, unit, range, default and meaning.
template <class Config>
std::string config_help() {
  Config config;
  return detail::config_help_of([&](FieldVisitor& fields) { config.visit(fields); });
}

}  // namespace alambic
