// SPDX-License-Identifier: Apache-2.0
#pragma once
// --model, --adapter, --compute and --device, and loading what they name.
#include <vector>

#include "checkpoints/hf_folder.h"
#include "cli/options.h"
#include "models/decoder.h"

namespace alambic::cli {

/// compute: the default of --compute.
std::vector<Option> model_options(const std::string& compute);

/// The model of --model with the adapter of --adapter, if any, in the type of --compute, on the --device. linears: as load_decoder has it, for adapters that
/// leave the choice (checkpoints::linears_for).
models::Decoder load_model(const Arguments& arguments);
models::Decoder load_model(const std::filesystem::path& model, const std::filesystem::path& adapter, const std::string& compute, const std::string& device,
                           checkpoints::Linears linears = checkpoints::Linears::kDense);

/// The folder itself where it holds an adapter, its adapter/ where it is a finished run. Error(kData) otherwise.
std::filesystem::path adapter_folder(const std::filesystem::path& folder);

/// Error(kData) with the likely reason when `folder` is not a Hugging Face model folder.
void check_model_folder(const std::filesystem::path& folder);

}  // namespace alambic::cli
