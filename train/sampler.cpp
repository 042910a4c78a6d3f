// SPDX-License-Identifier: Apache-2.0
#include "train/sampler.h"

#include "core/error.h"
#include "data/chat_template.h"
#include "models/generate.h"

namespace alambic::train {

Sampler::Sampler(const TrainConfig& config, const models::Decoder& decoder) : decoder_(decoder), config_(config.samples) {
  if (config_.prompts.empty()) return;
  if (!std::filesystem::exists(config.model / "tokenizer.json"))
    fail(ErrorKind::kUsage, "samples.prompts: ", config.model.string(), " has no tokenizer.json", Remedy{"leave samples.prompts empty"});
  tokenizer_ = data::Tokenizer::from_file(config.model);
  const auto chat = config_.chat ? data::read_chat_template(config.model) : std::nullopt;
  if (config_.chat && !chat) fail(ErrorKind::kUsage, "samples.chat: ", config.model.string(), " has no chat template", Remedy{"set samples.chat to false"});
  for (const std::string& prompt : config_.prompts) {
    const std::string text = chat ? chat->render(Json::array({{{"role", "user"}, {"content", prompt}}}), nullptr, /*add_generation_prompt=*/true).text : prompt;
    const std::vector<std::uint32_t> ids = tokenizer_->encode(text, /*add_special_tokens=*/!chat);
    if (ids.empty()) fail(ErrorKind::kUsage, "samples.prompts: an empty prompt gives no token to begin with");
    prompts_.emplace_back(ids.begin(), ids.end());
  }
}

Json Sampler::samples() const {
  const at::NoGradGuard no_grad;
  Json all = Json::array();
  for (std::size_t i = 0; i < prompts_.size(); ++i) {
    const std::vector<std::int64_t> ids = models::generate(decoder_, prompts_[i], {.max_new_tokens = config_.max_new_tokens}, decoder_.config.eos_ids);
    const std::vector<std::uint32_t> unsigned_ids(ids.begin(), ids.end());
    all.push_back({{"prompt", config_.prompts[i]}, {"text", tokenizer_->decode(unsigned_ids, /*skip_special_tokens=*/true)}});
  }
  return all;
}

}  // namespace alambic::train
