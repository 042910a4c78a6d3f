// SPDX-License-Identifier: Apache-2.0
#include "distill/match.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/diagonal.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/config.h"
#include "core/error.h"
#include "core/random.h"
#include "models/norm.h"
#include "models/rope.h"
#include "train/base_state.h"
#include "train/known_gradients.h"

namespace alambic::distill {
namespace {

constexpr std::int64_t kScoresAtOnce = 1 << 16;  // of a thread; some six tensors of this size exist at a time
constexpr std::int64_t kLeastRows = 64;           // that a block of rows spans under a narrow window, where the budget allows
constexpr double kTiny = 1e-12;                  // under a norm: a stream of zeros has no direction

bool contains(const std::vector<std::string>& list, const char* name) { return std::find(list.begin(), list.end(), name) != list.end(); }

bool wants_content(const MatchConfig& config) { return contains(config.relations, "qq") || contains(config.relations, "kk") || contains(config.relations, "vv"); }

std::int64_t width_of(const std::string& relation, const models::ModelConfig& model) { return (relation == "kk" || relation == "vv" ? model.num_kv_heads : model.num_heads) * model.head_size; }

std::int64_t heads_of(const std::string& relation, const models::ModelConfig& model) { return relation == "kk" || relation == "vv" ? model.num_kv_heads : model.num_heads; }

// f64 stays; everything else is computed in f32.
at::Tensor working(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? x : x.to(at::kFloat); }

// [T, H, S] -> [H, T, S]
at::Tensor by_head(const at::Tensor& x_THS) { return working(x_THS.detach()).transpose(0, 1).contiguous(); }

}  // namespace

void LayerPair::visit(FieldVisitor& fields) {
  fields.field("teacher", teacher, {.help = "block of the teacher, from 0", .low = 0, .high = 9999, .required = true});
  fields.field("student", student, {.help = "block of the student that is made like it, from 0", .low = 0, .high = 9999, .required = true});
}

void MatchConfig::visit(FieldVisitor& fields) {
  fields.field("hidden", hidden, {.help = "weight of the distance between hidden states behind blocks, besides alpha and 1 - alpha; 0: they are not matched", .low = 0, .high = 1e6});
  fields.field("attention", attention, {.help = "weight of the divergence between attention relations; 0: they are not matched", .low = 0, .high = 1e6});
  fields.field("layers", layers, {.help = "which blocks are matched: uniform: each of the student's, spread over the teacher's depth; last: the last with the last; pairs: those of `pairs`", .choices = {"uniform", "last", "pairs"}});
  fields.list("pairs", pairs, {.help = "blocks to match, with layers: pairs"});
  fields.field("loss", loss, {.help = "between hidden states: mean squared error, or 1 - cosine", .choices = {"mse", "cosine"}});
  fields.field("projection", projection, {.help = "learnt map from the student's width to the teacher's: one for all pairs of blocks, one for each, or none where the widths agree", .choices = {"shared", "layer", "none"}});
  fields.field("relations", relations, {.help = "of attention: qk is its distribution, head by head; qq, kk and vv are what queries, keys and values are to each other", .choices = {"qk", "qq", "kk", "vv"}});
  fields.field("relation_heads", relation_heads, {.help = "heads into which queries, keys and values are split anew for qq, kk and vv, so that models of other heads can be matched; 0: their own", .low = 0, .high = 4096});
}

void check(const MatchConfig& config) {
  if (config.layers == "pairs" && config.pairs.empty()) fail(ErrorKind::kUsage, "distill.match.layers: pairs, but distill.match.pairs has none", Remedy{"list them: pairs: [{teacher: 11, student: 5}]"});
  if (config.layers != "pairs" && !config.pairs.empty()) fail(ErrorKind::kUsage, "distill.match.pairs are given, but distill.match.layers is ", config.layers, Remedy{"set layers: pairs, or leave the pairs out"});
  for (auto pair = config.pairs.begin(); pair != config.pairs.end(); ++pair)
    if (std::find(config.pairs.begin(), pair, *pair) != pair)
      fail(ErrorKind::kUsage, "distill.match.pairs: block ", pair->teacher, " of the teacher and ", pair->student, " of the student stand twice", Remedy{"raise distill.match.hidden or distill.match.attention for more weight"});
  if (!config.is_on() && !config.pairs.empty())
    fail(ErrorKind::kUsage, "distill.match.pairs are given, but distill.match.hidden and distill.match.attention are 0, so that nothing is matched", Remedy{"set one of them above 0"});
  if (config.attention > 0 && config.relations.empty()) fail(ErrorKind::kUsage, "distill.match.attention is ", config.attention, ", but distill.match.relations is empty", Remedy{"use relations: [qk], or [qq, kk, vv]"});
  for (auto relation = config.relations.begin(); relation != config.relations.end(); ++relation) {
    if (!contains({"qk", "qq", "kk", "vv"}, relation->c_str())) fail(ErrorKind::kUsage, "distill.match.relations: \"", *relation, "\" is unknown", Remedy{"use qk, qq, kk or vv"});
    if (std::find(config.relations.begin(), relation, *relation) != relation) fail(ErrorKind::kUsage, "distill.match.relations: ", *relation, " stands twice");
  }
  if (config.relation_heads > 0 && !wants_content(config))
    fail(ErrorKind::kUsage, "distill.match.relation_heads is ", config.relation_heads, ", but of distill.match.relations only qk is asked for, which has the models' own heads", Remedy{"leave it out, or use relations: [qq, kk, vv]"});
}

std::vector<LayerPair> layer_pairs(const MatchConfig& config, std::int64_t teacher_layers, std::int64_t student_layers, const std::string& teacher) {
  if (config.layers == "last") return {{.teacher = teacher_layers - 1, .student = student_layers - 1}};
  std::vector<LayerPair> pairs;
  if (config.layers == "uniform") {
    for (std::int64_t s = 0; s < student_layers; ++s) pairs.push_back({.teacher = ((s + 1) * teacher_layers + student_layers - 1) / student_layers - 1, .student = s});
    return pairs;
  }
  for (const LayerPair& pair : config.pairs) {
    const auto require = [&](std::int64_t block, std::int64_t layers, const std::string& whose) {
      if (block < 0 || block >= layers)
        fail(ErrorKind::kUsage, "distill.match.pairs: block ", block, " of the ", whose, ", which has ", layers, " blocks", Remedy{"they are counted from 0: name one of 0 to " + std::to_string(layers - 1)});
    };
    require(pair.teacher, teacher_layers, "teacher " + teacher), require(pair.student, student_layers, "student");
  }
  return config.pairs;
}

at::Tensor hidden_distance_sum(const std::string& loss, const at::Tensor& student_KD, const at::Tensor& projection_DD, const at::Tensor& teacher_KD, const at::Tensor& weights_K) {
  const at::Tensor mapped_KD = projection_DD.defined() ? at::matmul(student_KD, projection_DD.t()) : student_KD;
  const auto unit = [](const at::Tensor& x_KD) { return x_KD / at::linalg_vector_norm(x_KD, 2, at::IntArrayRef{1}, /*keepdim=*/true).clamp_min(kTiny); };
  const at::Tensor apart_KD = loss == "mse" ? mapped_KD - teacher_KD : unit(mapped_KD) - unit(teacher_KD);
  const double scale = loss == "mse" ? 1.0 / static_cast<double>(teacher_KD.size(1)) : 0.5;
  return ((apart_KD * apart_KD).sum(at::IntArrayRef{1}, false, at::kDouble) * weights_K.to(at::kDouble)).sum() * scale;
}

at::Tensor relation_divergence_sum(const Relation& student, const Relation& teacher, const std::vector<std::int64_t>& document_lengths, std::int64_t window, const at::Tensor& index_K,
                                   const at::Tensor& weights_K) {
  const std::int64_t H = student.left_THS.size(1);
  if (teacher.left_THS.size(1) != H || teacher.left_THS.size(0) != student.left_THS.size(0)) fail(ErrorKind::kBug, "relations of ", student.left_THS.sizes(), " and ", teacher.left_THS.sizes());
  const bool differentiable = at::GradMode::is_enabled() && (student.left_THS.requires_grad() || student.right_THS.requires_grad());
  const at::Tensor left_HTS = by_head(student.left_THS), right_HTS = by_head(student.right_THS), teacher_left_HTS = by_head(teacher.left_THS), teacher_right_HTS = by_head(teacher.right_THS);
  at::Tensor d_left_HTS, d_right_HTS;
  if (differentiable) d_left_HTS = at::zeros(left_HTS.sizes(), left_HTS.options()), d_right_HTS = at::zeros(right_HTS.sizes(), right_HTS.options());
  const at::Tensor index = index_K.contiguous(), weights = weights_K.to(left_HTS.scalar_type());
  const std::int64_t *const rows = index.const_data_ptr<std::int64_t>(), num_rows = index.numel();

  const auto of_head = [&](std::int64_t h) {
    const at::Tensor left_TS = left_HTS[h], right_TS = right_HTS[h], teacher_left_TS = teacher_left_HTS[h], teacher_right_TS = teacher_right_HTS[h];
    double sum = 0;
    std::int64_t first = 0, k = 0;  // of the document, and of its kept rows that are still to do
    for (const std::int64_t length : document_lengths) {
      while (k < num_rows && rows[k] < first + length) {
        const std::int64_t begin = window > 0 ? std::max(first, rows[k] - window + 1) : first, furthest = window > 0 ? rows[k] + std::max(window, kLeastRows) : first + length;
        std::int64_t count = 1;
        while (k + count < num_rows && rows[k + count] < std::min(first + length, furthest) && (count + 1) * (rows[k + count] + 1 - begin) <= kScoresAtOnce) ++count;
        const std::int64_t end = rows[k + count - 1] + 1;
        const at::Tensor index_R = index.narrow(0, k, count), row_R1 = index_R.unsqueeze(1), key_J = at::arange(begin, end, index.options());
        at::Tensor hidden_RJ = key_J > row_R1;
        if (window > 0) hidden_RJ.logical_or_(key_J <= row_R1 - window);
        const auto log_softmax_of = [&](const at::Tensor& l_TS, const at::Tensor& r_TS, double scale) {
          const at::Tensor scores_RJ = at::mm(l_TS.index_select(0, index_R), r_TS.narrow(0, begin, end - begin).t()).mul_(scale);
          return at::log_softmax(scores_RJ.masked_fill_(hidden_RJ, -std::numeric_limits<double>::infinity()), 1);
        };
        const at::Tensor log_q_RJ = log_softmax_of(left_TS, right_TS, student.scale), log_p_RJ = log_softmax_of(teacher_left_TS, teacher_right_TS, teacher.scale), p_RJ = log_p_RJ.exp();
        const at::Tensor weight_R = weights.narrow(0, k, count) / static_cast<double>(H);
        const at::Tensor kl_R = (log_p_RJ - log_q_RJ).masked_fill_(hidden_RJ, 0).mul_(p_RJ).sum(at::IntArrayRef{1}, false, at::kDouble);
        sum += (kl_R * weight_R).sum().item<double>();
        if (differentiable) {
          const at::Tensor d_RJ = log_q_RJ.exp().sub_(p_RJ).mul_(weight_R.unsqueeze(1) * student.scale);
          d_left_HTS[h].index_copy_(0, index_R, at::mm(d_RJ, right_TS.narrow(0, begin, end - begin)));
          d_right_HTS[h].narrow(0, begin, end - begin).add_(at::mm(d_RJ.t(), left_TS.index_select(0, index_R)));
        }
        k += count;
      }
      first += length;
    }
    return sum;
  };
  std::vector<double> sums(static_cast<std::size_t>(H));
  at::parallel_for(0, H, 1, [&](std::int64_t begin, std::int64_t end) {  // a head is the work of one thread, so that no operator inside waits for others
    const at::NoGradGuard by_hand;
    for (std::int64_t h = begin; h < end; ++h) sums[static_cast<std::size_t>(h)] = of_head(h);
  });
  const double sum = std::accumulate(sums.begin(), sums.end(), 0.0);
  const at::Tensor value = at::scalar_tensor(sum, at::kDouble);
  if (!differentiable) return value;
  const auto gradient = [](const at::Tensor& d_HTS, const at::Tensor& like) { return d_HTS.transpose(0, 1).to(like.scalar_type()); };
  return train::with_known_gradients(value, {student.left_THS, student.right_THS}, {gradient(d_left_HTS, student.left_THS), gradient(d_right_HTS, student.right_THS)});
}

models::Observer filling(States& into, const MatchConfig& config, const models::Decoder& decoder, const data::Batch& batch, std::uint64_t dropout_seed, const at::Tensor& index_K) {
  // The projections are made again from what they read, as models/decoder.cpp makes them: the same bits, dropout included.
  const bool hidden = config.hidden > 0, rotated = config.attention > 0 && contains(config.relations, "qk"), content = config.attention > 0 && wants_content(config);
  return [=, &into, &decoder, &batch](models::Place place, std::size_t layer, const at::Tensor& x) {
    const auto found = into.find(layer);
    if (found == into.end()) return;
    LayerStates& states = found->second;
    if (place == models::Place::kBlockOutput && hidden) states.hidden_KD = x.index_select(0, index_K);
    if (place != models::Place::kAttentionInput || !(rotated || content)) return;
    const models::ModelConfig& model = decoder.config;
    const models::Block& block = decoder.blocks[layer];
    const models::LayerConfig& kind = model.layers[layer];
    const auto project = [&](models::Slot slot) { return block.linears.at(slot)(x, dropout_seed); };
    const std::int64_t queries = model.num_heads * model.head_size, keys = model.num_kv_heads * model.head_size;
    at::Tensor q_TX, k_TX, v_TX;
    if (block.linears.contains(models::Slot::kQueryKeyValue)) {
      const at::Tensor all = project(models::Slot::kQueryKeyValue);
      q_TX = all.narrow(1, 0, queries), k_TX = all.narrow(1, queries, keys), v_TX = all.narrow(1, queries + keys, keys);
    } else {
      q_TX = project(models::Slot::kQuery), k_TX = project(models::Slot::kKey);
      if (content) v_TX = project(models::Slot::kValue);
    }
    at::Tensor q_THS = q_TX.unflatten(1, {-1, model.head_size}), k_THS = k_TX.unflatten(1, {-1, model.head_size});
    const auto normalise = [&](models::Slot slot, at::Tensor& x_THS) {
      if (const auto norm = block.norms.find(slot); norm != block.norms.end())
        x_THS = models::rms_norm(x_THS, norm->second, model.family->norm_weight_offset, model.norm_epsilon, decoder.compute_type());
    };
    normalise(models::Slot::kQueryNorm, q_THS), normalise(models::Slot::kKeyNorm, k_THS);
    if (content) states.content_q_TX = q_THS.flatten(1), states.content_k_TX = k_THS.flatten(1), states.content_v_TX = v_TX;
    if (!rotated) return;
    if (kind.use_rope) {
      const models::RotaryTable table = models::rotary_table(kind.local_rope ? model.local_rope : model.rope, batch.positions_T, batch.document_lengths);
      q_THS = models::rotate(q_THS, table), k_THS = models::rotate(k_THS, table);
    }
    states.q_THS = q_THS, states.k_THS = k_THS.repeat_interleave(model.num_heads / model.num_kv_heads, 1);
  };
}

Match::Match(const MatchConfig& config, const models::ModelConfig& student, const models::ModelConfig& teacher, const std::string& teacher_name)
    : config_(config), student_(student), teacher_(teacher), pairs_(layer_pairs(config, teacher.num_layers, student.num_layers, teacher_name)) {
  if (config.hidden > 0 && config.projection == "none" && student.hidden_size != teacher.hidden_size)
    fail(ErrorKind::kUsage, "distill.match.projection: none, but the student is ", student.hidden_size, " wide and the teacher ", teacher_name, " ", teacher.hidden_size, Remedy{"use projection: shared or layer"});
  if (config.attention == 0) return;
  for (const std::string& relation : config.relations) {
    if (relation == "qk" && (student.attention_soft_cap > 0 || teacher.attention_soft_cap > 0))
      fail(ErrorKind::kUsage, "distill.match.relations: qk is not implemented for attention with soft-capped scores, which the ", student.attention_soft_cap > 0 ? "student" : "teacher " + teacher_name, " has",
           Remedy{"use relations: [qq, kk, vv]"});
    const std::int64_t ours = heads_of(relation, student), theirs = heads_of(relation, teacher);
    const char* const what = relation == "kk" ? "keys" : relation == "vv" ? "values" : "queries";
    if (relation == "qk" || config.relation_heads == 0) {
      if (ours == theirs) continue;
      fail(ErrorKind::kUsage, "distill.match.relations: ", relation, " is compared head by head, but the student has ", ours, " heads of ", what, " and the teacher ", teacher_name, " ", theirs,
           Remedy{relation == "qk" ? "use relations: [qq, kk, vv] with relation_heads" : "set relation_heads to a number that divides the widths of both"});
    }
    for (const auto& [name, model] : {std::pair<std::string, const models::ModelConfig*>{"student", &student}, {"teacher " + teacher_name, &teacher}})
      if (width_of(relation, *model) % config.relation_heads != 0)
        fail(ErrorKind::kUsage, "distill.match.relation_heads: ", config.relation_heads, " does not divide the ", width_of(relation, *model), " numbers of ", what, " of the ", name,
             Remedy{"use a divisor of " + std::to_string(std::gcd(width_of(relation, student), width_of(relation, teacher)))});
  }
}

void Match::make_projections(std::uint64_t seed, std::size_t number) {
  projections_.clear(), number_ = number;
  if (config_.hidden == 0 || config_.projection == "none") return;
  const at::NoGradGuard constant;
  const std::int64_t in = student_.hidden_size, out = teacher_.hidden_size;
  const std::size_t count = config_.projection == "shared" ? 1 : pairs_.size();
  for (std::size_t i = 0; i < count; ++i) {
    at::Tensor weight_OI = at::eye(out, at::kFloat);
    if (in != out) {
      // As torch.nn.init.orthogonal_: the signs of R's diagonal make the draw uniform.
      const at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(derive_seed(seed, "match", {number, i}));
      const auto [q, r] = at::linalg_qr(at::randn({std::max(in, out), std::min(in, out)}, generator, at::TensorOptions(at::kFloat)));
      weight_OI = q * r.diagonal().sign();
      if (in > out) weight_OI = weight_OI.t();
    }
    projections_.push_back(weight_OI.contiguous().requires_grad_(true));
  }
}

std::vector<models::NamedTensor> Match::projections() {
  std::vector<models::NamedTensor> named;
  for (std::size_t i = 0; i < projections_.size(); ++i)
    named.push_back({std::string(train::kBesideModel) + "match." + std::to_string(number_) + "." + std::to_string(i) + ".projection.weight", &projections_[i]});
  return named;
}

void Match::want_of_teacher(States& states) const {
  for (const LayerPair& pair : pairs_) states[static_cast<std::size_t>(pair.teacher)];
}

void Match::want_of_student(States& states) const {
  for (const LayerPair& pair : pairs_) states[static_cast<std::size_t>(pair.student)];
}

Relation Match::relation_of(const std::string& kind, const LayerStates& states, const models::ModelConfig& model) const {
  if (kind == "qk") return {.left_THS = states.q_THS, .right_THS = states.k_THS, .scale = model.attention_scale};
  const at::Tensor& x_TX = kind == "qq" ? states.content_q_TX : kind == "kk" ? states.content_k_TX : states.content_v_TX;
  const std::int64_t heads = config_.relation_heads > 0 ? config_.relation_heads : heads_of(kind, model);
  const at::Tensor x_THS = x_TX.unflatten(1, {heads, -1});
  return {.left_THS = x_THS, .right_THS = x_THS, .scale = 1 / std::sqrt(static_cast<double>(x_THS.size(2)))};
}

at::Tensor Match::loss(const States& student, const States& teacher, const data::Batch& batch, const at::Tensor& index_K, const at::Tensor& weights_K, MatchSums& sums) const {
  at::Tensor total = at::scalar_tensor(0, at::kDouble);
  const double share = 1 / static_cast<double>(pairs_.size());
  const auto add = [&](const at::Tensor& part, double weight, double& sum) {
    sum += part.item<double>() * share;
    total = total + part * (weight * share);
  };
  // Rows of weight 0 are passed over, whatever stands in them.
  const at::Tensor of_weight = weights_K.nonzero().squeeze(1);
  const auto chosen = [&](const at::Tensor& x_K) { return of_weight.numel() == weights_K.numel() ? x_K : x_K.index_select(0, of_weight); };
  const at::Tensor weights = chosen(weights_K), index = chosen(index_K);
  for (std::size_t i = 0; i < pairs_.size(); ++i) {
    const LayerPair& pair = pairs_[i];
    const LayerStates &ours = student.at(static_cast<std::size_t>(pair.student)), &theirs = teacher.at(static_cast<std::size_t>(pair.teacher));
    if (config_.hidden > 0) {
      const at::Tensor projection = projections_.empty() ? at::Tensor() : projections_[projections_.size() == 1 ? 0 : i];
      add(hidden_distance_sum(config_.loss, chosen(ours.hidden_KD), projection, chosen(theirs.hidden_KD), weights), config_.hidden, sums.hidden);
    }
    if (config_.attention == 0) continue;
    const std::int64_t one = student_.layers[static_cast<std::size_t>(pair.student)].window, other = teacher_.layers[static_cast<std::size_t>(pair.teacher)].window;
    const std::int64_t window = one == 0 || other == 0 ? std::max(one, other) : std::min(one, other);  // what both can see
    for (const std::string& relation : config_.relations)
      add(relation_divergence_sum(relation_of(relation, ours, student_), relation_of(relation, theirs, teacher_), batch.document_lengths, window, index, weights), config_.attention, sums.attention);
  }
  return total;
}

std::uint64_t Match::num_bytes(std::int64_t tokens) const {
  std::uint64_t bytes = 0;
  for (const at::Tensor& projection : projections_) bytes += 2 * projection.nbytes();
  // Hidden states of both, the mapped ones and their distance; queries, keys and values of both, and gradients of the student's.
  double per_token = 0;
  if (config_.hidden > 0) per_token += 4.0 * static_cast<double>(student_.hidden_size + 3 * teacher_.hidden_size);
  if (config_.attention > 0)
    for (const std::string& relation : config_.relations) {
      const std::int64_t tensors = relation == "qk" ? 2 : 1;
      per_token += 4.0 * static_cast<double>(tensors * (2 * width_of(relation, student_) + width_of(relation, teacher_)));
    }
  // One relation at a time: four tensors of heads and two gradients, f32.
  std::int64_t widest = 0;
  if (config_.attention > 0)
    for (const std::string& relation : config_.relations) widest = std::max({widest, width_of(relation, student_), width_of(relation, teacher_)});
  return bytes + static_cast<std::uint64_t>(static_cast<double>(tokens) * (per_token * static_cast<double>(pairs_.size()) + 6.0 * 4 * static_cast<double>(widest)));
}

}  // namespace alambic::distill
