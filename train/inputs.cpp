// SPDX-License-Identifier: Apache-2.0
#include "train/inputs.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/headeronly/version.h>

#include "checkpoints/hf_folder.h"
#include "checkpoints/licence.h"
#include "core/error.h"
#include "data/tokenizer.h"
#include "train/device.h"

namespace alambic::train {

Inputs open_inputs(const TrainConfig& config) {
  check(config);
  Inputs inputs;
  inputs.model = models::read_model_config(config.model);
  inputs.base_hash = checkpoints::base_hash(config.model);
  if (std::filesystem::exists(config.model / "tokenizer.json")) inputs.tokenizer_hash = data::Tokenizer::from_file(config.model).hash();
  else inputs.warnings.push_back(config.model.string() + ": no tokenizer.json, so it cannot be checked that the data were made for this model");

  const auto open = [&](const std::filesystem::path& folder) {
    data::TokenStore store(folder);
    if (!inputs.tokenizer_hash.empty() && store.info().tokenizer_hash != inputs.tokenizer_hash)
      fail(ErrorKind::kData, folder.string(), ": was made with another tokenizer (", store.info().tokenizer_hash, ") than that of ", config.model.string(), " (",
           inputs.tokenizer_hash, ")", Remedy{"prepare the text again with the tokenizer of this model"});
    if (store.info().vocabulary_size > inputs.model.vocabulary_size)
      fail(ErrorKind::kData, folder.string(), ": its tokenizer has ", store.info().vocabulary_size, " tokens, the model only ", inputs.model.vocabulary_size,
           Remedy{"prepare the text again with the tokenizer of this model"});
    return store;
  };
  for (const MixtureItem& item : config.data.mixture) inputs.learnt.push_back(open(item.store));
  for (const EvaluationItem& item : config.evaluation.stores) {
    inputs.held_out.emplace_back(item.name, open(item.store));
    for (const data::TokenStore& store : inputs.learnt)
      if (store.hash() == inputs.held_out.back().second.hash())
        inputs.warnings.push_back("evaluation store \"" + item.name + "\" is also learnt from: its figures will flatter");
  }
  return inputs;
}

Json resolved_config_of(const TrainConfig& config, const Inputs& inputs) {
  Json resolved = resolved_config(config);
  resolved.update(inputs.sections);
  return resolved;
}

Json identity_of(const TrainConfig& config, const Inputs& inputs) {
  Json run = resolved_config(config);
  for (const char* key : {"output", "model", "samples", "checkpoint", "log_every", "threads", "memory", "ranks", "device"}) run.erase(key);
  if (!config.deterministic) run.erase("deterministic");  // as in checkpoints older than it
  for (Json& item : run["data"]["mixture"]) item.erase("store");
  for (Json& item : run["evaluation"]["stores"]) item.erase("store");
  run["compute_type"] = toString(compute_type_of(config));  // what "auto" came to
  run["base_sha256"] = inputs.base_hash;
  for (std::size_t i = 0; i < inputs.learnt.size(); ++i) run["data"]["mixture"][i]["sha256"] = inputs.learnt[i].hash();
  for (std::size_t i = 0; i < inputs.held_out.size(); ++i) run["evaluation"]["stores"][i]["sha256"] = inputs.held_out[i].second.hash();
  run.update(inputs.sections_identity);
  Json machine = {{"threads", at::get_num_threads()}, {"processor", at::get_cpu_capability()}, {"libtorch", TORCH_VERSION}};
  if (is_on_gpu(config)) machine["gpu"] = parallel::gpus().seen.front();  // of a processor nothing is said, as in checkpoints older than this
  return {{"run", run}, {"machine", machine}};
}

Json describe_store(const std::string& use, const std::filesystem::path& folder, const data::TokenStore& store) {
  Json sources = Json::array();
  for (const data::SourceInfo& source : store.info().sources)
    sources.push_back({{"name", source.name}, {"origin", source.origin}, {"licence", source.licence}, {"language", source.language}});
  return {{"use", use}, {"store", folder.string()}, {"sha256", store.hash()}, {"documents", store.totals().documents},
          {"tokens", store.totals().tokens}, {"trained_tokens", store.totals().trained_tokens}, {"sources", sources}};
}

Json describe_data(const TrainConfig& config, const Inputs& inputs) {
  Json all = Json::array();
  for (std::size_t i = 0; i < inputs.learnt.size(); ++i) all.push_back(describe_store("train", config.data.mixture[i].store, inputs.learnt[i]));
  for (std::size_t i = 0; i < inputs.held_out.size(); ++i) all.push_back(describe_store(inputs.held_out[i].first, config.evaluation.stores[i].store, inputs.held_out[i].second));
  return all;
}

Json describe_contributors(const Inputs& inputs) {
  Json all = Json::array();
  for (const Contributor& contributor : inputs.contributors) {
    Json one = {{"folder", contributor.folder.string()}, {"sha256", contributor.sha256}, {"licence", contributor.licence.spdx}};
    one.update(contributor.more);
    all.push_back(one);
  }
  return all;
}

Json licence_verdict(const TrainConfig& config, const Inputs& inputs) {
  bool unknown = false, restricted = false;
  Json reasons = Json::array();
  const auto judge = [&](const std::string& what, const checkpoints::Licence& licence) {
    if (licence.spdx.empty()) unknown = true, reasons.push_back(what + ": licence unknown");
    else if (!licence.permissive) restricted = true, reasons.push_back(what + ": " + licence.spdx + (licence.duty.empty() ? "" : ". " + licence.duty));
  };
  judge(config.model.string(), checkpoints::licence_of_model(config.model));
  for (const Contributor& contributor : inputs.contributors)
    if (contributor.sha256 != inputs.base_hash) judge(contributor.folder.string(), contributor.licence);
  for (const data::TokenStore& store : inputs.learnt)
    for (const data::SourceInfo& source : store.info().sources) judge(store.folder().string() + ": " + source.name, checkpoints::find_licence(source.licence));
  return {{"verdict", restricted ? "restricted" : unknown ? "unknown" : "open"}, {"reasons", reasons}};
}

}  // namespace alambic::train
