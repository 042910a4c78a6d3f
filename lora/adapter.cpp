// SPDX-License-Identifier: Apache-2.0
#include "lora/adapter.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>

#include <ATen/ops/tensor.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <set>

#include "core/config.h"
#include "core/error.h"
#include "core/log.h"
#include "lora/initialise.h"
#include "lora/module_match.h"

namespace alambic::lora {
namespace {

constexpr std::int64_t kMaxRank = 65536;  // wider than any hidden size here: more is a damaged config
constexpr std::string_view kRegexPrefix = "regex:";

std::string leaf_of(const std::string& path) { return path.substr(path.rfind('.') + 1); }

/// "model.layers.0.mlp.up_proj.weight" -> "model.layers.0.mlp.up_proj"
std::string module_of(const std::string& tensor_name) { return tensor_name.substr(0, tensor_name.rfind('.')); }

/// A list of names, or one regular expression.
class Selection {
 public:
  Selection(const std::vector<std::string>& entries, std::string_view where) : entries_(entries), used_(entries.size(), false) {
    for (const std::string& entry : entries) {
      if (!entry.starts_with(kRegexPrefix)) continue;
      if (entries.size() > 1) fail(ErrorKind::kUsage, where, ": \"", entry, "\" must stand alone; it cannot be mixed with names");
      pattern_.emplace(entry.substr(kRegexPrefix.size()), where);
    }
  }
  bool holds(const std::string& path) {
    bool found = false;
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      const bool hit = pattern_ ? pattern_->matches_whole(path) : names_module(entries_[i], path);
      if (hit) used_[i] = found = true;
    }
    return found;
  }
  std::vector<std::string> unused() const {
    std::vector<std::string> names;
    for (std::size_t i = 0; i < entries_.size(); ++i)
      if (!used_[i]) names.push_back(entries_[i]);
    return names;
  }

 private:
  std::vector<std::string> entries_;
  std::vector<bool> used_;
  std::optional<Pattern> pattern_;
};

bool is_all_linear(const LoraConfig& config) { return config.targets.size() == 1 && config.targets[0] == "all-linear"; }

/// PEFT wraps every module whose path ends with the text of an entry, whole components or not; what such a module contains
/// is trained with it.
bool saved_whole(const std::vector<std::string>& entries, const std::string& module, std::vector<bool>& used) {
  bool found = false;
  for (std::string path = module; !path.empty(); path = path.find('.') == std::string::npos ? "" : module_of(path))
    for (std::size_t i = 0; i < entries.size(); ++i)
      if (path.ends_with(entries[i])) used[i] = found = true;
  return found;
}

template <class Map>
std::vector<std::string> keys_of(const Map& map) {
  std::vector<std::string> keys;
  for (const auto& [key, value] : map) keys.push_back(key);
  return keys;
}

at::Tensor trained_copy(const at::Tensor& tensor) {
  return tensor.detach().to(at::kFloat, /*non_blocking=*/false, /*copy=*/true).contiguous().requires_grad_(true);
}

std::string join(const std::vector<std::string>& lines) {
  std::string text;
  for (const std::string& line : lines) text += (text.empty() ? "" : "\n") + line;
  return text;
}

double scale_of(const LoraConfig& config, const PlannedAdapter& adapter) {
  const double rank = static_cast<double>(adapter.rank);
  return adapter.alpha / (config.rslora ? std::sqrt(rank) : rank);
}

}  // namespace

void LoraConfig::visit(FieldVisitor& fields) {
  fields.field("rank", rank, {.help = "rank of the update", .low = 1, .high = static_cast<double>(kMaxRank)});
  fields.field("alpha", alpha, {.help = "the update is scaled by alpha / rank", .low = 0});
  fields.field("dropout", dropout, {.help = "probability that an input of the adapter is zeroed while training", .low = 0, .high = 0.99});
  fields.field("targets", targets, {.help = "modules with an adapter: names or path ends, one \"regex:...\", or all-linear (all but the head)"});
  fields.field("exclude", exclude, {.help = "modules without one, of those that targets names: names or path ends, or one \"regex:...\""});
  fields.field("rank_pattern", rank_pattern, {.help = "regular expression of a path's end -> rank of those modules"});
  fields.field("alpha_pattern", alpha_pattern, {.help = "regular expression of a path's end -> alpha of those modules"});
  fields.field("rslora", rslora, {.help = "scale by alpha / sqrt(rank) (arXiv:2312.03732)"});
  fields.field("dora", dora, {.help = "train the rows' magnitudes apart from their directions (arXiv:2402.09353)"});
  fields.field("init", init, {.help = "first values: kaiming; gaussian; pissa, or pissa_niter_16 by a fast projection (arXiv:2404.02948); olora (arXiv:2406.01775); "
                                      "false: all random. pissa and olora move a part of the frozen weights into the adapter"});
  fields.field("restart_every", restart_every,
               {.help = "merge the adapters into the base and begin them anew every n steps (arXiv:2307.05695); the result is a weights folder; 0: never", .unit = "steps", .low = 0, .high = 1e12});
  fields.field("restart_warmup_steps", restart_warmup_steps, {.help = "steps in which the learning rate rises again from 0 after a restart", .unit = "steps", .low = 0, .high = 1e12});
  fields.field("modules_to_save", modules_to_save, {.help = "modules that are trained and saved whole, such as embed_tokens and lm_head"});
  fields.field("ensure_weight_tying", ensure_weight_tying,
               {.help = "keep a tied head and embedding one tensor where modules_to_save names either; without it they part"});
  fields.field("trainable_tokens", trainable_tokens,
               {.help = "tokens whose rows of the embedding are trained, the rest of it frozen: ids, ranges (49152..49200) or texts; a tied head follows"});
  fields.field("trainable_tokens_head", trainable_tokens_head, {.help = "train these tokens' rows of the head too, where it is not tied"});
}

namespace {

constexpr std::int64_t kMostRows = 1 << 24;

/// "5" is 5 .. 5, "5..9" is 5 .. 9.
std::optional<std::pair<std::int64_t, std::int64_t>> range_of(const std::string& entry) {
  const auto number = [](std::string_view text) -> std::optional<std::int64_t> {
    std::int64_t value = 0;
    const auto [stop, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (problem != std::errc() || stop != text.data() + text.size() || text.empty() || text[0] == '-') return std::nullopt;
    return value;
  };
  const std::size_t dots = entry.find("..");
  const auto first = number(std::string_view(entry).substr(0, dots)), last = dots == entry.npos ? first : number(std::string_view(entry).substr(dots + 2));
  if (!first || !last) return std::nullopt;
  return std::pair(*first, *last);
}

}  // namespace

bool names_ids(const std::string& entry) { return range_of(entry).has_value(); }

std::vector<std::int64_t> token_ids_of(const std::vector<std::string>& entries, std::int64_t vocabulary_size) {
  std::vector<std::int64_t> ids;
  std::set<std::int64_t> seen;
  for (const std::string& entry : entries) {
    const auto range = range_of(entry);
    if (!range) fail(ErrorKind::kUsage, "lora.trainable_tokens: \"", entry, "\" is neither an id nor a range of ids such as 49152..49200");
    const auto [first, last] = *range;
    if (first > last) fail(ErrorKind::kUsage, "lora.trainable_tokens: the range ", entry, " is empty");
    if (last >= vocabulary_size) fail(ErrorKind::kUsage, "lora.trainable_tokens: ", entry, " is outside the model's ", vocabulary_size, " tokens");
    if (last - first >= kMostRows) fail(ErrorKind::kUsage, "lora.trainable_tokens: ", entry, ": more than ", kMostRows, " rows");
    for (std::int64_t id = first; id <= last; ++id) {
      if (!seen.insert(id).second) fail(ErrorKind::kUsage, "lora.trainable_tokens: the id ", id, " is named twice");
      ids.push_back(id);
    }
  }
  return ids;
}

void make_trained_dense(models::Decoder& decoder, const LoraConfig& config) {
  std::vector<bool> ignored(config.modules_to_save.size());
  const auto trains = [&](const std::string& path) { return saved_whole(config.modules_to_save, path, ignored); };
  bool trains_head = false;
  for (const models::NamedTensor& tensor : decoder.tensors())
    if (tensor.tensor == &decoder.embedding_VD) trains_head = decoder.head_tied && trains(module_of(tensor.name));
  for (const models::NamedLinear& named : decoder.linears()) {
    models::Linear& linear = *named.linear;
    if (!linear.quantized || !linear.quantized->stored_OI().defined() || !(trains(named.path) || (named.layer < 0 && trains_head))) continue;
    if (named.layer < 0) models::make_head_dense(decoder);
    else linear.weight_OI = linear.dense_OI(linear.compute_type()), linear.quantized = nullptr;
  }
}

AdapterPlan plan_adapters(models::Decoder& decoder, const LoraConfig& config, Unmatched unmatched) {
  std::vector<std::string> problems;
  const auto problem = [&](const auto&... parts) {
    std::ostringstream line;
    (line << ... << parts);
    problems.push_back(line.str());
  };
  const auto range = [&](std::string_view what, double value, bool fits, std::string_view wanted) {
    if (!fits) problem("lora.", what, ": ", value, ", must be ", wanted);
  };
  const auto rank_fits = [](std::int64_t rank) { return rank >= 1 && rank <= kMaxRank; };
  const auto alpha_fits = [](double alpha) { return std::isfinite(alpha) && alpha > 0; };
  range("rank", static_cast<double>(config.rank), rank_fits(config.rank), "from 1 to 65536");
  range("alpha", config.alpha, alpha_fits(config.alpha), "above 0");
  range("dropout", config.dropout, config.dropout >= 0 && config.dropout < 1, "at least 0 and below 1");
  for (const auto& [key, rank] : config.rank_pattern) range("rank_pattern." + key, static_cast<double>(rank), rank_fits(rank), "from 1 to 65536");
  for (const auto& [key, alpha] : config.alpha_pattern) range("alpha_pattern." + key, alpha, alpha_fits(alpha), "above 0");
  for (const auto* names : {&config.targets, &config.exclude, &config.modules_to_save})
    if (std::find(names->begin(), names->end(), "") != names->end()) problem("lora: an empty module name");
  if (config.targets.empty()) problem("lora.targets: empty; nothing would be adapted");
  Init init;
  try {
    init = parse_init(config.init);
  } catch (const Error& error) {
    problem(error.what());
  }
  if (!problems.empty()) fail(ErrorKind::kUsage, join(problems));

  Selection targets(config.targets, "lora.targets"), exclude(config.exclude, "lora.exclude");
  const PatternKeys rank_keys(keys_of(config.rank_pattern), "lora.rank_pattern");
  const PatternKeys alpha_keys(keys_of(config.alpha_pattern), "lora.alpha_pattern");
  std::vector<bool> rank_used(rank_keys.size(), false), alpha_used(alpha_keys.size(), false), saved_used(config.modules_to_save.size(), false);

  const std::vector<models::NamedLinear> linears = decoder.linears();
  const std::vector<models::NamedTensor> tensors = decoder.tensors();
  const std::string head_name = linears.back().path + ".weight";
  std::string embedding_name;
  std::set<std::string> linear_paths, other_modules;  // the latter: what PEFT sees as modules and cannot adapt, or we do not
  for (const models::NamedLinear& linear : linears) linear_paths.insert(linear.path);
  for (const models::NamedTensor& tensor : tensors) {
    if (tensor.tensor == &decoder.embedding_VD) embedding_name = tensor.name;
    for (std::string path = module_of(tensor.name); !path.empty(); path = path.find('.') == std::string::npos ? "" : module_of(path))
      if (!linear_paths.contains(path)) other_modules.insert(path);
  }

  AdapterPlan plan;
  // Modules trained whole come first: PEFT keeps adapters away from them.
  const bool embedding_saved = saved_whole(config.modules_to_save, module_of(embedding_name), saved_used);
  const bool head_saved = saved_whole(config.modules_to_save, linears.back().path, saved_used);
  plan.keep_tie = config.ensure_weight_tying && decoder.head_tied && (embedding_saved || head_saved);
  for (const models::NamedTensor& tensor : tensors) {
    bool whole = saved_whole(config.modules_to_save, module_of(tensor.name), saved_used);
    if (tensor.tensor == &decoder.embedding_VD) whole = embedding_saved || plan.keep_tie;
    if (whole) plan.trained_whole.push_back(tensor);
  }
  if (decoder.compute_type() != at::kFloat)
    for (const models::NamedLinear& linear : linears)
      for (const models::NamedTensor& tensor : plan.trained_whole)
        if (linear.layer >= 0 && module_of(tensor.name) == linear.path)
          problem("lora.modules_to_save: ", linear.path, " can be trained whole only when computing in f32, not in ", toString(decoder.compute_type()));
  for (const models::NamedLinear& linear : linears)
    if (linear.linear->quantized && saved_whole(config.modules_to_save, linear.path, saved_used))
      problem("lora.modules_to_save: ", linear.path, linear.linear->quantized->format() == "sharded" ? " is shared by the ranks (ranks.shard)" : " is quantised", " and cannot be trained whole");
  if (head_saved && decoder.head_tied && !plan.keep_tie) plan.trained_whole.push_back({head_name, &decoder.head.weight_OI});

  for (const models::NamedLinear& linear : linears) {
    const bool excluded = exclude.holds(linear.path);  // asked first, so that every entry that matches counts as used
    const bool whole = std::any_of(config.modules_to_save.begin(), config.modules_to_save.end(),
                                   [&](const std::string& entry) { return names_component(entry, linear.path); });
    const bool targeted = is_all_linear(config) ? linear.layer >= 0 : targets.holds(linear.path);
    if (!targeted || excluded || whole) continue;
    std::vector<bool> ignored(config.modules_to_save.size());
    if (saved_whole(config.modules_to_save, linear.path, ignored))
      problem("lora.modules_to_save: ", linear.path, " would be trained whole and have an adapter; name whole modules, or exclude it");
    if (plan.keep_tie && linear.layer < 0) problem("lora.targets: ", linear.path, " is tied to the trained embedding and cannot have an adapter too");
    if (config.ensure_weight_tying && decoder.head_tied && !plan.keep_tie && linear.layer < 0)
      problem("lora.ensure_weight_tying: an adapter on ", linear.path, " that is tied to one on the embedding is not implemented");
    PlannedAdapter adapter{.path = linear.path, .linear = linear.linear, .rank = config.rank, .alpha = config.alpha};
    if (const std::size_t key = rank_keys.find(linear.path); key < rank_keys.size())
      adapter.rank = std::next(config.rank_pattern.begin(), static_cast<std::ptrdiff_t>(key))->second;
    if (const std::size_t key = alpha_keys.find(linear.path); key < alpha_keys.size())
      adapter.alpha = std::next(config.alpha_pattern.begin(), static_cast<std::ptrdiff_t>(key))->second;
    for (std::size_t key = 0; key < rank_keys.size(); ++key) rank_used[key] = rank_used[key] || rank_keys.matches(key, linear.path);
    for (std::size_t key = 0; key < alpha_keys.size(); ++key) alpha_used[key] = alpha_used[key] || alpha_keys.matches(key, linear.path);
    plan.adapters.push_back(adapter);
    const std::int64_t smaller_side = std::min(linear.linear->outputs(), linear.linear->inputs());
    if (init.changes_base() && linear.layer < 0 && decoder.head_tied)
      problem("lora.init: ", config.init, " would change ", linear.path, ", which is tied to the embedding; exclude it, or start it as kaiming");
    if (init.changes_base() && linear.linear->quantized)
      problem("lora.init: ", config.init, " takes the adapter's start out of the base, but ", linear.path, " is quantised (", linear.linear->quantized->format(), ") and cannot be changed");
    if (init.changes_base() && adapter.rank > smaller_side)
      problem("lora.init: ", config.init, " of ", linear.path, " needs a rank of at most ", smaller_side, ", the smaller side of its weight, not ", adapter.rank);
  }
  if (!is_all_linear(config))
    for (const std::string& path : other_modules)
      if (targets.holds(path) && !exclude.holds(path) && !saved_whole(config.modules_to_save, path, saved_used))
        problem("lora.targets: ", path, " is no linear layer; ",
                path == module_of(embedding_name) ? "train it whole with modules_to_save" : "only linear layers can have an adapter");

  try {
    plan.token_ids = token_ids_of(config.trainable_tokens, decoder.config.vocabulary_size);
  } catch (const Error& error) {
    problem(error.what());
  }
  plan.token_head = !plan.token_ids.empty() && config.trainable_tokens_head && !decoder.head_tied;
  if (!plan.token_ids.empty()) {
    const bool head_has_rows = decoder.head_tied || plan.token_head;
    if (embedding_saved || plan.keep_tie) problem("lora.trainable_tokens: modules_to_save trains the whole embedding; name one of the two");
    if (head_saved && head_has_rows) problem("lora.trainable_tokens: modules_to_save trains the whole head, whose rows of these tokens would train too; name one of the two");
    if (head_has_rows && std::any_of(plan.adapters.begin(), plan.adapters.end(), [&](const PlannedAdapter& adapter) { return adapter.linear == &decoder.head; }))
      problem("lora.trainable_tokens: ", linears.back().path, " would have an adapter and trained rows; exclude it");
  } else if (config.trainable_tokens_head) {
    problem("lora.trainable_tokens_head: lora.trainable_tokens names no tokens");
  }

  std::vector<std::string> leaves;
  for (const models::NamedLinear& linear : linears)
    if (std::find(leaves.begin(), leaves.end(), leaf_of(linear.path)) == leaves.end()) leaves.push_back(leaf_of(linear.path));
  std::string known;
  for (const std::string& leaf : leaves) known += (known.empty() ? "" : ", ") + leaf;
  const auto unmatched_line = [&](std::string_view field, const std::string& entry) {
    std::vector<std::string> names = leaves;
    names.push_back(leaf_of(module_of(embedding_name)));
    const std::string nearest = nearest_name(leaf_of(entry), names);
    std::string line = "lora." + std::string(field) + ": \"" + entry + "\" matches no module";
    if (!nearest.empty()) line += "; did you mean \"" + nearest + "\"?";
    if (unmatched == Unmatched::kRefused) problems.push_back(line + " (linear layers here: " + known + ")");
    else log_warning(line, "; it is ignored");
  };
  if (!is_all_linear(config))
    for (const std::string& entry : targets.unused()) unmatched_line("targets", entry);
  for (const std::string& entry : exclude.unused()) unmatched_line("exclude", entry);
  for (std::size_t i = 0; i < saved_used.size(); ++i)
    if (!saved_used[i]) unmatched_line("modules_to_save", config.modules_to_save[i]);
  for (std::size_t i = 0; i < rank_used.size(); ++i)
    if (!rank_used[i]) unmatched_line("rank_pattern", keys_of(config.rank_pattern)[i]);
  for (std::size_t i = 0; i < alpha_used.size(); ++i)
    if (!alpha_used[i]) unmatched_line("alpha_pattern", keys_of(config.alpha_pattern)[i]);
  if (plan.adapters.empty() && problems.empty()) problem("lora.targets: no module is left to adapt (linear layers here: ", known, ")");
  if (!problems.empty()) fail(ErrorKind::kUsage, join(problems));
  return plan;
}

LoraConfig relative_to_base(const LoraConfig& config) {
  if (!parse_init(config.init).changes_base()) return config;
  LoraConfig ordinary = config;
  ordinary.init = "kaiming";
  ordinary.rank *= 2;
  for (auto& [path, rank] : ordinary.rank_pattern) rank *= 2;
  const double more = config.rslora ? std::sqrt(2.0) : 2;  // what keeps the scale
  ordinary.alpha *= more;
  for (auto& [path, alpha] : ordinary.alpha_pattern) alpha *= more;
  return ordinary;
}

Factors relative_to_base(const at::Tensor& a_RI, const at::Tensor& b_OR, const Factors& initial) {
  const at::NoGradGuard no_gradients;
  return {.a_RI = at::cat({a_RI, initial.a_RI}, 0), .b_OR = at::cat({b_OR, -initial.b_OR}, 1)};
}

void attach(models::Decoder& decoder, const LoraConfig& config, std::uint64_t seed, Unmatched unmatched) {
  attach_empty(decoder, config, unmatched);
  initialise(decoder, config, seed);
}

void attach_empty(models::Decoder& decoder, const LoraConfig& config, Unmatched unmatched) {
  const AdapterPlan plan = plan_adapters(decoder, config, unmatched);
  for (const models::NamedTensor& tensor : decoder.tensors()) tensor.tensor->set_requires_grad(false);

  std::uint64_t id = 0;
  for (const PlannedAdapter& planned : plan.adapters) {
    const std::int64_t outputs = planned.linear->outputs(), inputs = planned.linear->inputs();
    models::Adapter adapter;
    const at::TensorOptions beside_weight = at::TensorOptions(at::kFloat).device(planned.linear->device());
    adapter.a_RI = at::zeros({planned.rank, inputs}, beside_weight).requires_grad_(true);
    adapter.b_OR = at::zeros({outputs, planned.rank}, beside_weight).requires_grad_(true);
    if (config.dora) adapter.magnitude_O = at::zeros({outputs}, beside_weight).requires_grad_(true);
    adapter.scale = scale_of(config, planned);
    adapter.dropout = config.dropout;
    adapter.id = id++;
    planned.linear->adapter = std::move(adapter);
  }

  for (const models::NamedTensor& tensor : plan.trained_whole) *tensor.tensor = trained_copy(*tensor.tensor);
  if (!plan.token_ids.empty()) {
    const auto rows_of = [&](const at::Tensor& table_VD) { return trained_copy(table_VD.index_select(0, at::tensor(plan.token_ids, at::kLong).to(table_VD.device()))); };
    decoder.token_row_ids = plan.token_ids;
    decoder.token_rows_ND = rows_of(decoder.embedding_VD);
    if (decoder.head_tied) decoder.head.token_rows_ND = decoder.token_rows_ND;
    if (plan.token_head) decoder.head.token_rows_ND = rows_of(decoder.head.quantized ? decoder.head.quantized->stored_OI() : decoder.head.weight_OI);
    if (decoder.head.token_rows_ND.defined()) decoder.head.token_row_ids = plan.token_ids;
  }
  if (!decoder.head_tied) return;
  const bool parted = !decoder.head.quantized && decoder.head.weight_OI.unsafeGetTensorImpl() != decoder.embedding_VD.unsafeGetTensorImpl();
  if (parted && plan.keep_tie) decoder.head.weight_OI = decoder.embedding_VD;
  if (parted && !plan.keep_tie) {
    decoder.head_tied = false;
    log_warning("modules_to_save: the head was tied to the embedding; each now has weights of its own (ensure_weight_tying keeps the tie)");
  }
}

void train_everything(models::Decoder& decoder) {
  for (const models::NamedLinear& linear : decoder.linears())
    if (linear.linear->quantized) fail(ErrorKind::kUsage, "method: full: ", linear.path, " is quantised (", linear.linear->quantized->format(), ") and cannot be trained itself", Remedy{"train an adapter: method: lora"});
  for (const models::NamedTensor& tensor : decoder.tensors()) *tensor.tensor = trained_copy(*tensor.tensor);
  if (decoder.head_tied) decoder.head.weight_OI = decoder.embedding_VD;
}

namespace {

/// PEFT's keys of the embedding's rows and of the head's.
std::vector<std::string> token_row_keys(models::Decoder& decoder) {
  std::string embedding;
  for (const models::NamedTensor& tensor : decoder.tensors())
    if (tensor.tensor == &decoder.embedding_VD) embedding = module_of(tensor.name);
  std::vector<std::string> keys;
  for (const std::string& path : {embedding, decoder.linears().back().path}) keys.push_back(std::string(kPeftPrefix) + path + ".token_adapter.trainable_tokens_delta");
  return keys;
}

}  // namespace

std::vector<models::NamedTensor> trainable(models::Decoder& decoder) {
  std::vector<models::NamedTensor> found;
  std::vector<models::NamedLinear> linears = decoder.linears();
  const bool has_adapters = std::any_of(linears.begin(), linears.end(), [](const models::NamedLinear& linear) { return linear.linear->adapter.has_value(); });
  const std::string prefix = has_adapters ? std::string(kPeftPrefix) : "";
  for (const models::NamedLinear& linear : linears) {
    if (!linear.linear->adapter) continue;
    models::Adapter& adapter = *linear.linear->adapter;
    found.push_back({prefix + linear.path + ".lora_A.weight", &adapter.a_RI});
    found.push_back({prefix + linear.path + ".lora_B.weight", &adapter.b_OR});
    if (adapter.magnitude_O.defined()) found.push_back({prefix + linear.path + ".lora_magnitude_vector", &adapter.magnitude_O});
  }
  for (const models::NamedTensor& tensor : decoder.tensors())
    if (tensor.tensor->requires_grad()) found.push_back({prefix + tensor.name, tensor.tensor});
  const std::vector<std::string> row_keys = token_row_keys(decoder);
  if (decoder.token_rows_ND.defined()) found.push_back({row_keys.front(), &decoder.token_rows_ND});
  if (decoder.head.token_rows_ND.defined() && !decoder.head_tied) found.push_back({row_keys.back(), &decoder.head.token_rows_ND});
  return found;
}

std::vector<std::pair<std::string, std::vector<std::int64_t>>> expected_keys(models::Decoder& decoder, const AdapterPlan& plan, bool dora) {
  std::vector<std::pair<std::string, std::vector<std::int64_t>>> keys;
  for (const PlannedAdapter& adapter : plan.adapters) {
    const std::string path = std::string(kPeftPrefix) + adapter.path;
    const std::int64_t outputs = adapter.linear->outputs(), inputs = adapter.linear->inputs();
    keys.push_back({path + ".lora_A.weight", {adapter.rank, inputs}});
    keys.push_back({path + ".lora_B.weight", {outputs, adapter.rank}});
    if (dora) keys.push_back({path + ".lora_magnitude_vector", {outputs}});
  }
  for (const models::NamedTensor& tensor : plan.trained_whole) keys.push_back({std::string(kPeftPrefix) + tensor.name, tensor.tensor->sizes().vec()});
  if (plan.keep_tie) keys.push_back({std::string(kPeftPrefix) + decoder.linears().back().path + ".weight", decoder.embedding_VD.sizes().vec()});
  const std::vector<std::int64_t> rows = {static_cast<std::int64_t>(plan.token_ids.size()), decoder.config.hidden_size};
  const std::vector<std::string> row_keys = token_row_keys(decoder);
  if (!plan.token_ids.empty()) keys.push_back({row_keys.front(), rows});
  if (plan.token_head) keys.push_back({row_keys.back(), rows});
  std::sort(keys.begin(), keys.end());
  return keys;
}

}  // namespace alambic::lora
