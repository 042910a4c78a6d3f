// SPDX-License-Identifier: Apache-2.0
#pragma once
// A PEFT adapter folder: adapter_config.json + adapter_model.safetensors, readable by PEFT and read from PEFT.
#include <filesystem>
#include <string>

#include "lora/adapter.h"

namespace alambic::checkpoints {

/// Reads adapter_config.json; Error(kData) naming each field that differs from its default and is not implemented here.
lora::LoraConfig read_adapter_config(const std::filesystem::path& folder);

/// Attaches the folder's adapter with its weights. Every tensor must be used exactly once; else Error(kData) lists them.
void load_adapter(models::Decoder& decoder, const std::filesystem::path& folder);

/// Writes the adapter (and modules_to_save) of a decoder; base_name goes into base_model_name_or_path.
void write_adapter(models::Decoder& decoder, const lora::LoraConfig& config, const std::string& base_name, const std::filesystem::path& folder);

}  // namespace alambic::checkpoints
