// SPDX-License-Identifier: Apache-2.0
#include "distill/distill.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/nonzero.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>

#include "core/config.h"
#include "core/error.h"
#include "distill/imitation.h"
#include "distill/match.h"
#include "train/device.h"
#include "train/plan.h"
#include "train/recipe.h"

namespace alambic::distill {
namespace {

// What a run holds between its steps.
struct Classroom {
  std::vector<Teacher> teachers;
  std::vector<Match> matches;  // of each teacher, where the inside of the student is matched; else empty
  MatchSums match_sums;        // of the step that is being made
  models::Decoder outside;  // of the student's linear layers, as loaded
  Nats nats;                // of the step that is being made
  std::int64_t own_tokens = 0;  // of the student's own text in that step
};

// A teacher's weight on each kept row, such that those of all teachers come to 1 where there is one.
std::vector<at::Tensor> weights_of(const std::vector<Teacher>& teachers, const data::Batch& batch, const at::Tensor& index_K) {
  std::vector<at::Tensor> weights_T(teachers.size());
  for (at::Tensor& weights : weights_T) weights = at::empty({batch.tokens_T.numel()}, at::kFloat);
  std::int64_t first = 0;
  for (std::size_t document = 0; document < batch.document_lengths.size(); ++document) {
    double total = 0;
    for (const Teacher& teacher : teachers) total += teacher.weight_of(batch.origins[document]);
    for (std::size_t i = 0; i < teachers.size(); ++i)
      weights_T[i].narrow(0, first, batch.document_lengths[document]).fill_(total == 0 ? 0 : teachers[i].weight_of(batch.origins[document]) / total);
    first += batch.document_lengths[document];
  }
  for (at::Tensor& weights : weights_T) weights = weights.index_select(0, index_K);
  return weights_T;
}

// What the teachers of a batch say and, for the matches, what they thought.
struct Lesson {
  std::vector<TeacherRows> rows;
  std::vector<const Match*> matches;  // of the rows' teachers, as are the states
  std::vector<States> states;
  at::Tensor index_K;
};

Lesson listen(Classroom& room, const MatchConfig& config, const data::Batch& batch) {
  Lesson lesson{.rows = {}, .matches = {}, .states = {}, .index_K = batch.keep_T.nonzero().squeeze(1)};
  const std::vector<at::Tensor> weights_K = weights_of(room.teachers, batch, lesson.index_K);
  for (std::size_t i = 0; i < room.teachers.size(); ++i) {
    if (!weights_K[i].ne(0).any().item<bool>()) continue;
    Teacher& teacher = room.teachers[i];
    if (room.matches.empty()) {
      lesson.rows.push_back(teacher.rows(batch, lesson.index_K, weights_K[i]));
      continue;
    }
    lesson.matches.push_back(&room.matches[i]);
    room.matches[i].want_of_teacher(lesson.states.emplace_back());
    const models::Observer observer = filling(lesson.states.back(), config, teacher.decoder(), batch, 0, lesson.index_K);
    lesson.rows.push_back(teacher.rows(batch, lesson.index_K, weights_K[i], &observer));
  }
  return lesson;
}

// The student's pass and its loss. What the loss is made of is added to `nats` and `sums`.
at::Tensor loss_of(const models::Decoder& student, const data::Batch& batch, std::uint64_t dropout_seed, double neftune_alpha, const Mix& mix, const MatchConfig& config, const Lesson& lesson, Nats& nats,
                   MatchSums& sums) {
  models::Input input = train::input_of(batch, dropout_seed, neftune_alpha);
  States states;
  for (const Match* match : lesson.matches) match->want_of_student(states);
  const models::Observer observer = filling(states, config, student, batch, dropout_seed, lesson.index_K);
  if (!lesson.matches.empty()) input.observer = &observer;
  const at::Tensor hidden_TD = student.hidden_TD(input);
  at::Tensor loss = imitation_sum(hidden_TD, student.head, batch.targets_T, batch.keep_T, dropout_seed, mix, lesson.rows, nats);
  for (std::size_t i = 0; i < lesson.matches.size(); ++i) loss = loss + lesson.matches[i]->loss(states, lesson.states[i], batch, lesson.index_K, lesson.rows[i].weights_K, sums);
  return loss;
}

train::Recipe recipe_of(const DistillConfig& config) {
  const auto room = std::make_shared<Classroom>();
  const MatchConfig match = config.distill.match;
  return {
      .verb = "distill",
      .open = [=](train::Inputs& inputs) {
        inputs.sections = {{"distill", resolved_config(config)["distill"]}};
        Json settings = inputs.sections["distill"];
        if (!match.is_on()) settings.erase("match");  // a run that matches nothing is the one that it was before there was a match
        for (Json& teacher : settings["teachers"]) teacher.erase("model"), teacher.erase("adapter"), teacher.erase("cache");  // their hashes stand for them
        inputs.sections_identity = {{"distill", settings}, {"teachers", Json::array()}};
        for (const TeacherConfig& teacher : config.distill.teachers) room->teachers.emplace_back(teacher, config.distill.divergence, config.train, inputs);
        if (match.is_on())
          for (std::size_t i = 0; i < room->teachers.size(); ++i) room->matches.emplace_back(match, inputs.model, room->teachers[i].sizes(), config.distill.teachers[i].model.string());
      },
      .see_base = [=](const models::Decoder& loaded) { room->outside = outside_of_linears(loaded); },
      .not_fused = match.is_on() ? "distill.match looks between the blocks" : "",
      .loss = [=](models::Decoder& student, const train::Inputs&, std::vector<models::NamedTensor>& trained) -> train::LossSum {
        Mix mix{.cross_entropy = 1 - config.distill.alpha, .divergence = config.distill.alpha, .text = config.train.loss, .imitation = config.distill.divergence,
                .shared_vocabulary = student.config.vocabulary_size};
        if (mix.divergence == 0 && !match.is_on()) room->teachers.clear();  // nobody listens to them
        for (std::size_t i = 0; i < room->matches.size(); ++i) {
          room->matches[i].make_projections(config.train.seed, i);
          for (const models::NamedTensor& projection : room->matches[i].projections()) trained.push_back(projection);
        }
        for (Teacher& teacher : room->teachers) teacher.load(student, room->outside), mix.shared_vocabulary = std::min(mix.shared_vocabulary, teacher.shared_vocabulary());
        room->outside = {};  // a teacher that shares the base has its own handles; else the base's file would stay mapped beside trained copies
        const Mix own_mix = on_policy_mix(mix);
        const auto is_taught = [=](const data::Origin& origin) {
          return std::any_of(room->teachers.begin(), room->teachers.end(), [&](const Teacher& teacher) { return teacher.weight_of(origin) > 0; });
        };
        return [=, &student](const data::Batch& corpus, std::uint64_t dropout_seed) {
          const train::DataConfig& sizes = config.train.data;
          std::optional<data::Batch> own;
          if (is_on_policy(config.distill.on_policy, dropout_seed))
            own = on_policy_batch(config.distill.on_policy, student, corpus, dropout_seed, sizes.row_length, sizes.row_length * sizes.rows_per_batch, is_taught);
          const data::Batch& batch = own ? *own : corpus;
          // The teachers first: one that is the student's base uses the student's memory.
          const Lesson lesson = listen(*room, match, batch);
          if (!own) return loss_of(student, batch, dropout_seed, config.train.neftune_alpha, mix, match, lesson, room->nats, room->match_sums);
          Nats nats;
          MatchSums sums;
          const at::Tensor loss = loss_of(student, batch, dropout_seed, config.train.neftune_alpha, own_mix, match, lesson, nats, sums);
          // The step divides by the corpus' kept tokens: the student's text weighs as much as the text that it stands for.
          const double share = static_cast<double>(corpus.num_kept) / static_cast<double>(batch.num_kept);
          room->nats.divergence += share * nats.divergence, room->own_tokens += batch.num_kept;
          room->match_sums.hidden += share * sums.hidden, room->match_sums.attention += share * sums.attention;
          return loss * share;
        };
      },
      .figures = [=](std::int64_t kept_tokens) {
        const auto figure = [&](double nats) { return std::isfinite(nats) ? Json(nats / static_cast<double>(kept_tokens)) : Json(nullptr); };
        const Nats nats = std::exchange(room->nats, {});
        Json figures = {{"cross_entropy", figure(nats.cross_entropy)}, {"divergence", figure(nats.divergence)}};
        const MatchSums sums = std::exchange(room->match_sums, {});
        if (match.hidden > 0) figures["hidden_loss"] = figure(sums.hidden);
        if (match.attention > 0) figures["attention_loss"] = figure(sums.attention);
        if (config.distill.on_policy.lambda > 0) figures["own_tokens"] = std::exchange(room->own_tokens, 0);
        return figures;
      },
      .memory = [=] {
        std::uint64_t bytes = 0;
        for (const Teacher& teacher : room->teachers) bytes += teacher.num_bytes();
        for (const Match& one : room->matches) bytes += one.num_bytes(config.train.data.row_length * config.train.data.rows_per_batch);
        return bytes;
      },
  };
}

}  // namespace

void SignalConfig::visit(FieldVisitor& fields) {
  fields.list("teachers", teachers, {.help = "models whose distributions the student learns", .required = true});
  fields.field("alpha", alpha, {.help = "the loss is (1 - alpha) cross-entropy + alpha divergence", .low = 0, .high = 1});
  divergence.visit(fields);
  fields.group("match", "hidden states and attention of the student made like the teacher's (docs/distillation.md)", match);
  fields.group("on_policy", "text that the student writes and the teachers judge (docs/on_policy.md)", on_policy);
}

void DistillConfig::visit(FieldVisitor& fields) {
  train.visit(fields);
  fields.group("distill", "what the student learns from besides the text", distill);
  fields.group("generate", "distill --generate: a corpus of the teacher's answers (docs/on_policy.md)", generate);
}

void check(const DistillConfig& config) {
  if (config.distill.teachers.empty()) fail(ErrorKind::kUsage, "distill.teachers: no teacher to learn from");
  if (config.distill.on_policy.lambda > 0 && config.distill.alpha == 0)
    fail(ErrorKind::kUsage, "distill.on_policy.lambda is ", config.distill.on_policy.lambda, ", but distill.alpha is 0: nobody would judge what the student writes", Remedy{"set distill.alpha above 0"});
  for (const TeacherConfig& teacher : config.distill.teachers)
    if (config.distill.on_policy.lambda > 0 && !teacher.cache.empty())
      fail(ErrorKind::kUsage, "distill.on_policy.lambda is ", config.distill.on_policy.lambda, ", but ", teacher.cache.string(), " knows nothing of what the student will write",
           Remedy{"use the teacher's model, or set distill.on_policy.lambda to 0"});
  check(config.distill.match);
  for (const TeacherConfig& teacher : config.distill.teachers) {
    if (!config.distill.match.is_on()) break;
    if (!teacher.cache.empty())
      fail(ErrorKind::kUsage, "distill.match: ", teacher.cache.string(), " holds the teacher's words, but neither its hidden states nor its attention", Remedy{"use the teacher's model, or set distill.match.hidden and distill.match.attention to 0"});
    if (const std::string& across = teacher.across.across_tokenizers; across != "none" && across != "exact")
      fail(ErrorKind::kUsage, "distill.match: ", teacher.model.string(), " reads the text in other tokens (across_tokenizers: ", across, "), so that its states belong to none of the student's",
           Remedy{"use a teacher of the student's tokens, or set distill.match.hidden and distill.match.attention to 0"});
  }
  const std::string& objective = config.distill.divergence.objective;
  for (const TeacherConfig& teacher : config.distill.teachers)
    if (teacher.across.across_tokenizers == "gold" && objective != "forward_kl" && objective != "reverse_kl" && objective != "jensen_shannon")
      fail(ErrorKind::kUsage, "distill.objective: across_tokenizers: gold knows no ", objective, " of masses that do not sum to 1", Remedy{"use jensen_shannon, forward_kl or reverse_kl"});
  train::check(config.train);
  if (!config.train.ranks.shard || config.train.method == "full") return;
  // Else ranks would not pass through the student's blocks alike.
  if (config.distill.on_policy.lambda > 0)
    fail(ErrorKind::kUsage, "ranks.shard: distill.on_policy.lambda is ", config.distill.on_policy.lambda, ", and blocks that ranks share cannot write a text of each rank's own", Remedy{"set distill.on_policy.lambda to 0, or ranks.shard to false"});
  for (const TeacherConfig& teacher : config.distill.teachers)
    if (teacher.cache.empty())
      fail(ErrorKind::kUsage, "ranks.shard: ", teacher.model.string(), " is a teacher that may use the student's blocks, of which each rank keeps a part", Remedy{"keep the teacher's words first (alambic distill --cache), or use ranks.shard: false"});
}

train::TrainReport distill(const DistillConfig& config, bool resume, const std::function<bool()>& stop_requested) {
  check(config);
  DistillConfig own = config;
  own.train = train::on_processor(config.train, "distill");
  return train::run_recipe(own.train, resume, stop_requested, recipe_of(own));
}

Json plan(const DistillConfig& config, bool probe, int num_ranks) {
  check(config);
  DistillConfig own_config = config;
  own_config.train = train::on_processor(config.train, "distill");
  Json result = train::plan(own_config.train, probe, recipe_of(own_config), num_ranks);
  if (const OnPolicyConfig& own = config.distill.on_policy; own.lambda > 0 && own.lambda < 1 && !result["time"].is_null())
    result["warnings"].push_back(std::string("time: measured on a micro-batch ") + (is_on_policy(own, train::kProbeSeed) ? "that the student writes" : "of the corpus") +
                                 "; distill.on_policy.lambda of them are written by the student, which takes another time");
  return result;
}

}  // namespace alambic::distill
