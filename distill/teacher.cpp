// SPDX-License-Identifier: Apache-2.0
#include "distill/teacher.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <set>

#include "checkpoints/hf_folder.h"
#include "checkpoints/peft_folder.h"
#include "core/error.h"
#include "core/files.h"
#include "core/log.h"
#include "data/tokenizer.h"
#include "models/fused_blocks.h"
#include "train/step.h"

namespace alambic::distill {
namespace {

lora::BaseQuantization quantization_for(const TeacherConfig& teacher, const train::TrainConfig& student, bool same_base) {
  if (teacher.quantize == "auto") return same_base ? train::quantization_of(student) : lora::BaseQuantization{};
  return {.format = teacher.quantize, .double_quant = student.nf4_double_quant};
}

at::ScalarType compute_type_for(const train::TrainConfig& student) {
  if (student.compute_type == "bf16") return at::kBFloat16;
  return student.compute_type == "f32" ? at::kFloat : models::fastest_compute_type();
}

bool contains(const std::vector<std::string>& list, const std::string& name) { return std::find(list.begin(), list.end(), name) != list.end(); }

std::string name_of(const TeacherConfig& teacher) { return (teacher.model.empty() ? teacher.cache : teacher.model).string(); }

// Whether a teacher teaches each source of each store. Error(kUsage) for a name that none of them has.
std::vector<std::vector<bool>> served(const TeacherConfig& teacher, const std::vector<data::TokenStore>& stores) {
  std::set<std::string> sources, languages;
  std::vector<std::vector<bool>> serves;
  for (const data::TokenStore& store : stores) {
    serves.emplace_back();
    for (const data::SourceInfo& source : store.info().sources) {
      sources.insert(source.name), languages.insert(source.language);
      serves.back().push_back((teacher.sources.empty() || contains(teacher.sources, source.name)) && (teacher.languages.empty() || contains(teacher.languages, source.language)));
    }
  }
  const auto require_known = [&](const char* key, const std::vector<std::string>& asked, const std::set<std::string>& known) {
    for (const std::string& name : asked)
      if (!known.contains(name)) {
        const std::string nearest = nearest_name(name, {known.begin(), known.end()});
        fail(ErrorKind::kUsage, "distill.teachers: ", name_of(teacher), ": ", key, ": no store that is learnt from has \"", name, "\"", nearest.empty() ? "" : "; did you mean \"" + nearest + "\"?",
             Remedy{"alambic inspect STORE shows its sources and languages"});
      }
  };
  require_known("sources", teacher.sources, sources);
  require_known("languages", teacher.languages, languages);
  if (std::none_of(serves.begin(), serves.end(), [](const std::vector<bool>& store) { return std::find(store.begin(), store.end(), true) != store.end(); }))
    fail(ErrorKind::kUsage, "distill.teachers: ", name_of(teacher), ": no source has both one of its sources and one of its languages, so it would teach nothing");
  return serves;
}

}  // namespace

void TeacherConfig::visit(FieldVisitor& fields) {
  fields.field("model", model, {.help = "Hugging Face folder of the teacher; the student's own base teaches without a second copy in memory. Needed unless there is a cache, whose teacher it then must be"});
  fields.field("adapter", adapter, {.help = "PEFT folder on the teacher's model; empty: none"});
  fields.field("cache", cache, {.help = "folder that alambic distill --cache made of the teacher and these stores; read instead of the model"});
  fields.field("weight", weight, {.help = "of this teacher, relative to the others of the same text", .low = 1e-6, .high = 1e6});
  fields.field("sources", sources, {.help = "names of sources (alambic inspect STORE) that it teaches; empty: all"});
  fields.field("languages", languages, {.help = "languages of sources that it teaches; empty: all"});
  across.visit(fields);
  fields.field("quantize", quantize, {.help = "keep its linear layers narrow; auto: as quantize_base where it is the student's own base, else none", .choices = {"auto", "none", "nf4", "int8"}});
}

std::int64_t shared_vocabulary(const std::filesystem::path& student, const models::ModelConfig& student_sizes, const std::filesystem::path& teacher,
                               const models::ModelConfig& teacher_sizes, std::vector<std::string>& warnings) {
  std::int64_t shared = std::min(student_sizes.vocabulary_size, teacher_sizes.vocabulary_size);
  for (const std::filesystem::path& folder : {student, teacher})
    if (!std::filesystem::exists(folder / "tokenizer.json")) {
      const std::string warning = folder.string() + ": no tokenizer.json, so it cannot be checked that teacher and student have the same tokens";
      if (!contains(warnings, warning)) warnings.push_back(warning);
      return shared;
    }
  const data::Tokenizer ours = data::Tokenizer::from_file(student), theirs = data::Tokenizer::from_file(teacher);
  shared = std::min<std::int64_t>({shared, ours.vocabulary_size(), theirs.vocabulary_size()});
  if (ours.hash() == theirs.hash()) return shared;
  for (std::int64_t id = 0; id < shared; ++id) {
    const std::optional<std::string> one = ours.token_of(static_cast<std::uint32_t>(id)), other = theirs.token_of(static_cast<std::uint32_t>(id));
    if (one != other)
      fail(ErrorKind::kData, "teacher and student have other tokens: id ", id, " is ", one ? to_line(Json(*one)) : "no token", " of the student ", student.string(), " and ",
           other ? to_line(Json(*other)) : "no token", " of the teacher ", teacher.string(), Remedy{"use a teacher of the student's tokenizer, or set across_tokenizers: exact, uld or gold at this teacher"});
  }
  warnings.push_back(teacher.string() + ": its tokenizer splits text in another way than the student's; their first " + std::to_string(shared) + " tokens are the same");
  return shared;
}

models::Decoder outside_of_linears(const models::Decoder& loaded) {
  models::Decoder outside = loaded;
  for (models::Block& block : outside.blocks) block.linears.clear(), block.grouped.clear();
  return outside;
}

std::optional<models::Decoder> base_of(const models::Decoder& student, const models::Decoder& outside) {
  models::Decoder base = student;
  base.embedding_VD = outside.embedding_VD, base.final_norm_D = outside.final_norm_D;
  base.head = outside.head, base.head_tied = outside.head_tied;
  base.token_rows_ND = at::Tensor(), base.token_row_ids.clear();
  for (std::size_t layer = 0; layer < base.blocks.size(); ++layer) {
    models::Block& block = base.blocks[layer];
    block.norms = outside.blocks[layer].norms;
    for (auto& [slot, linear] : block.linears) {
      if (linear.weight_OI.defined() && linear.weight_OI.requires_grad()) return std::nullopt;
      if (linear.bias_O.defined() && linear.bias_O.requires_grad()) return std::nullopt;
      if (!linear.adapter) continue;
      // What PiSSA and OLoRA took out of the weight is put back as an adapter of the same shape.
      const at::Tensor a_RI = linear.adapter->initial_a_RI, b_OR = linear.adapter->initial_b_OR;
      const double scale = linear.adapter->scale;
      if (a_RI.defined()) linear.adapter = models::Adapter{.a_RI = a_RI, .b_OR = b_OR, .magnitude_O = {}, .scale = scale, .id = linear.adapter->id};
      else linear.adapter.reset();
    }
    // The fused path expects as many rows behind a group's weights as its adapters have ranks.
    for (auto& [first, group_NI] : block.grouped) {
      std::int64_t rows = 0;
      for (const auto& [slot, linear] : block.linears)
        if (linear.weight_OI.defined() && linear.weight_OI.is_alias_of(group_NI)) rows += linear.outputs() + (linear.adapter ? linear.adapter->a_RI.size(0) : 0);
      group_NI = group_NI.narrow(0, 0, rows);
    }
  }
  return base;
}

Teacher::Teacher(const TeacherConfig& config, const DivergenceConfig& divergence, const train::TrainConfig& student, train::Inputs& inputs) : config_(config), student_(student), temperature_(divergence.temperature) {
  if (config.model.empty() && config.cache.empty()) fail(ErrorKind::kUsage, "distill.teachers: a teacher has neither a model nor a cache");
  if (!config.cache.empty()) open_cache(divergence, inputs);
  else open_model(inputs);
  serves_ = served(config, inputs.learnt);
}

void Teacher::open_cache(const DivergenceConfig& divergence, train::Inputs& inputs) {
  if (!config_.adapter.empty()) fail(ErrorKind::kUsage, "distill.teachers: ", config_.cache.string(), ": a cache has no adapter", Remedy{"cache the merged model"});
  if (config_.across.across_tokenizers != "none") fail(ErrorKind::kUsage, "distill.teachers: ", config_.cache.string(), ": a cache is read token by token, so across_tokenizers does not go with it");
  if (objective_named(divergence.objective) != Objective::kForwardKl)
    fail(ErrorKind::kUsage, "distill.objective: ", divergence.objective, " needs the teacher's whole distribution, which ", config_.cache.string(), " has not", Remedy{"use forward_kl, or the teacher's model"});
  cache_.emplace(config_.cache);
  CacheUse use{.tokenizer_hash = inputs.tokenizer_hash, .vocabulary_size = inputs.model.vocabulary_size, .row_length = student_.data.row_length, .split_long = student_.data.split_long,
               .teacher_hash = config_.model.empty() ? "" : checkpoints::base_hash(config_.model), .temperature = divergence.temperature};
  for (const data::TokenStore& store : inputs.learnt) use.store_hashes.push_back(store.hash());
  cache_->use_for(use);
  const CacheHeader& header = cache_->header();
  sha256_ = header.teacher.hash;
  shared_vocabulary_ = header.form.vocabulary_size;
  inputs.contributors.push_back({.folder = config_.cache, .sha256 = sha256_, .licence = checkpoints::find_licence(header.teacher.licence),
                                 .more = {{"family", header.teacher.family}, {"parameters", header.teacher.parameters}, {"weight", config_.weight}, {"name", header.teacher.name}, {"cache_sha256", cache_->hash()}}});
  inputs.sections_identity["teachers"].push_back({{"sha256", sha256_}, {"cache_sha256", cache_->hash()}});
}

void Teacher::open_model(train::Inputs& inputs) {
  const TeacherConfig& config = config_;
  const models::ModelConfig& sizes = sizes_ = models::read_model_config(config.model);
  sha256_ = checkpoints::base_hash(config.model);
  same_base_ = sha256_ == inputs.base_hash;
  if (config.across.across_tokenizers == "none") shared_vocabulary_ = distill::shared_vocabulary(student_.model, inputs.model, config.model, sizes, inputs.warnings);
  else interpreter_.emplace(config.across, student_.model, inputs.model, config.model, sizes, inputs.warnings), shared_vocabulary_ = inputs.model.vocabulary_size;
  for (const data::TokenStore& store : inputs.learnt)
    if (!interpreter_ && store.info().vocabulary_size > sizes.vocabulary_size)
      fail(ErrorKind::kData, config.model.string(), ": the teacher has ", sizes.vocabulary_size, " tokens, ", store.folder().string(), " has ", store.info().vocabulary_size,
           Remedy{"use a teacher that knows every token of the text"});
  Json more = {{"family", sizes.family->model_type}, {"parameters", sizes.num_parameters()}, {"weight", config.weight}};
  if (interpreter_) more["across_tokenizers"] = config.across.across_tokenizers;
  if (!config.adapter.empty()) {
    checkpoints::read_adapter_config(config.adapter);  // what is wrong with it is said before anything is loaded
    more["adapter"] = config.adapter.string();
    more["adapter_sha256"] = sha256_of_file(config.adapter / "adapter_model.safetensors");
  }
  inputs.contributors.push_back({.folder = config.model, .sha256 = sha256_, .licence = checkpoints::licence_of_model(config.model), .more = more});
  inputs.sections_identity["teachers"].push_back({{"sha256", sha256_}, {"adapter_sha256", more.value("adapter_sha256", "")}});
}

void Teacher::load(const models::Decoder& student, const models::Decoder& outside) {
  if (cache_) return;
  const lora::BaseQuantization quantization = quantization_for(config_, student_, same_base_), of_student = train::quantization_of(student_);
  const bool same_weights = same_base_ && lora::name_of(quantization) == lora::name_of(of_student) && student_.method == "lora" && !train::restarts(student_);
  shares_ = same_weights && base_of(student, outside).has_value();
  if (shares_) {
    student_decoder_ = &student, outside_ = outside;
  } else {
    const auto linears = config_.adapter.empty() ? checkpoints::Linears::kAsStored : checkpoints::linears_for(config_.adapter);
    decoder_ = checkpoints::load_decoder(config_.model, compute_type_for(student_), quantization, linears);
    models::make_head_dense(decoder_);  // objectives take logits of every few rows
    make_ready();
    for (const models::NamedTensor& tensor : decoder_.tensors()) num_bytes_ += tensor.tensor->nbytes();
    for (const models::NamedLinear& linear : decoder_.linears())
      if (linear.linear->quantized) num_bytes_ += linear.linear->quantized->num_bytes();
  }
  log_info("teacher ", config_.model.string(), ": ", shares_ ? "the student's base, without a copy" : std::to_string(num_bytes_ >> 20) + " MiB of its own");
}

// Of the student's base at the first pass: until then the student's adapters may begin, and take a part of it with them.
void Teacher::make_ready() {
  if (shares_) decoder_ = *base_of(*student_decoder_, outside_);
  if (!config_.adapter.empty()) {
    if (shares_) {  // the fused path keeps room for the student's adapters only
      decoder_.fused = false;
      for (models::Block& block : decoder_.blocks) block.grouped.clear();
    }
    checkpoints::load_adapter(decoder_, config_.adapter, sha256_);
  }
  if (!shares_)
    if (const std::string reason = models::use_fused_blocks(decoder_); !reason.empty()) log_info("teacher ", config_.model.string(), ": ATen operators, as ", reason);
  is_ready_ = true;
}

TeacherRows Teacher::rows(const data::Batch& batch, const at::Tensor& index_K, const at::Tensor& weights_K, const models::Observer* observer) {
  if (cache_) {
    signal_ = cache_->signal(batch);
    return {.signal = &signal_, .sampled = cache_->header().form.kind != SignalKind::kTopK, .weights_K = weights_K};
  }
  if (!is_ready_) make_ready();
  if (interpreter_) return interpreter_->listen(decoder_, batch, index_K, weights_K, temperature_, observer);
  const at::NoGradGuard constant;
  models::Input input = train::input_of(batch, 0);
  input.observer = observer;
  return {.head = &decoder_.head, .hidden_KD = decoder_.hidden_TD(input).index_select(0, index_K), .weights_K = weights_K};
}

}  // namespace alambic::distill
