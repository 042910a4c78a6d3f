// SPDX-License-Identifier: Apache-2.0
#pragma once
// A PEFT adapter folder: adapter_config.json + adapter_model.safetensors, readable by PEFT and read from PEFT.
// Keys (peft 0.21.2): base_model.model.<module path>.lora_A.weight [rank, inputs], .lora_B.weight [outputs, rank],
// .lora_magnitude_vector [outputs]; base_model.model.<published name> for tensors of modules_to_save.
#include <filesystem>
#include <map>
#include <string>

#include "checkpoints/hf_folder.h"
#include "lora/adapter.h"
#include "lora/quantize.h"

namespace alambic::checkpoints {

/// Reads adapter_config.json. Error(kData), a line each: a field that differs from its default and is not implemented
/// here, an unknown field, a wrong type. Fields that do not change what a trained adapter computes are ignored.
lora::LoraConfig read_adapter_config(const std::filesystem::path& folder);

/// Attaches the folder's adapter with its weights, which then are trainable. Every tensor must be used exactly once:
/// Error(kData) lists the missing, unexpected, misshapen and non-finite ones, before anything is allocated for them.
/// Where the folder names the base it was trained on by its hash (write_adapter) and base_hash is given and another, that
/// is Error(kData) too. A copy of an adapted base weight, which PEFT writes beside an adapter on the head, must equal the
/// decoder's own. An adapter that was trained on a quantised base (adapter_quantization) is refused on a dense one: Error(kUsage).
/// Returns the config. An adapter that PEFT started as pissa or olora, and saved without its conversion, becomes an
/// ordinary one of twice the rank (lora::relative_to_base), in the decoder and in the config.
lora::LoraConfig load_adapter(models::Decoder& decoder, const std::filesystem::path& folder, const std::string& base_hash = "");

/// How load_decoder should keep the base's matrices for this adapter: as stored, unless it is relative to what a start took out of them.
Linears linears_for(const std::filesystem::path& folder);

/// Writes the adapter (and modules_to_save) of a decoder, with a card; the folder is made if need be, and files of these
/// names in it are replaced. base_name goes into base_model_name_or_path and the card; base_hash (FolderTensors::hash)
/// and quantization into the file's metadata, which PEFT ignores. One that took a part of the base out (PiSSA, OLoRA) is written relative to the base
/// as it was published, as an ordinary adapter of twice the rank: who reads it needs nothing but that base. Error(kNumerics) names the first value that is not finite.
void write_adapter(models::Decoder& decoder, const lora::LoraConfig& trained, const std::string& base_name, const std::filesystem::path& folder,
                   const std::string& base_hash = "", const lora::BaseQuantization& quantization = {});

/// How the base was quantised when the folder's adapter was trained by alambic: what load_decoder must be asked for, so that
/// the adapter meets the base that it learnt on. Off where the file does not tell.
lora::BaseQuantization adapter_quantization(const std::filesystem::path& folder);

/// Metadata key of an adapter file that holds the base's hash.
inline constexpr const char* kBaseHashKey = "alambic.base_sha256";
/// And the one that holds lora::name_of(quantization); absent where the base was not quantised by the run.
inline constexpr const char* kBaseQuantizationKey = "alambic.base_quantization";

}  // namespace alambic::checkpoints
