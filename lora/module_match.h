// SPDX-License-Identifier: Apache-2.0
#pragma once
// Which modules a config names, by PEFT's rules (peft 0.21.2: check_target_module_exists, get_pattern_key, _set_trainable),
// so that an adapter means the same modules here and there. Paths are module paths: "model.layers.0.self_attn.q_proj".
#include <regex>
#include <string>
#include <string_view>
#include <vector>

namespace alambic::lora {

/// A regular expression that Python's `re` and ours read alike. What they would read differently (look-behind, named
/// groups, inline flags, \A, possessive quantifiers, back-references ...) is refused by name rather than guessed.
/// Matching takes polynomial time whatever the expression, so a hostile adapter_config.json cannot hang a run.
class Pattern {
 public:
  /// Throws Error(kUsage): "where: ..." with what is wrong in the expression.
  Pattern(const std::string& expression, std::string_view where);
  bool matches_whole(const std::string& path) const;

 private:
  std::regex regex_;
};

/// PEFT's rule for a list entry: the whole path, or its end after a dot.
bool names_module(std::string_view entry, std::string_view path);

/// PEFT's rule for what modules_to_save keeps free of adapters: the entry is one or more whole components of the path.
bool names_component(std::string_view entry, std::string_view path);

/// The first of `keys` whose pattern matches the end of the path (whole components), or keys.size().
/// PEFT's rule for rank_pattern and alpha_pattern: (.*\.)?(key)$.
class PatternKeys {
 public:
  PatternKeys(std::vector<std::string> keys, std::string_view where);
  std::size_t find(const std::string& path) const;
  bool matches(std::size_t key, const std::string& path) const { return patterns_[key].matches_whole(path); }
  std::size_t size() const { return patterns_.size(); }

 private:
  std::vector<Pattern> patterns_;
};

}  // namespace alambic::lora
