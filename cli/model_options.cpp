// SPDX-License-Identifier: Apache-2.0
#include "cli/model_options.h"

#include "checkpoints/peft_folder.h"
#include "cli/verbs.h"
#include "core/error.h"
#include "core/log.h"
#include "models/device.h"
#include "models/fused_blocks.h"
#include "train/device.h"

namespace alambic::cli {

std::vector<Option> model_options(const std::string& compute) {
  return {
      {.name = "model", .kind = Kind::kFolder, .value = "FOLDER", .help = "a Hugging Face model folder: config.json, safetensors, tokenizer.json", .letter = 'm'},
      {.name = "adapter", .kind = Kind::kFolder, .value = "FOLDER", .help = "a PEFT adapter folder, or the folder of a finished run"},
      {.name = "compute",
       .kind = Kind::kText,
       .value = "TYPE",
       .help = "type to compute in; auto is bf16 on a GPU and where the processor multiplies it natively, and f32 elsewhere",
       .otherwise = compute,
       .choices = {"auto", "f32", "bf16"}},
      {.name = "device",
       .kind = Kind::kText,
       .value = "DEVICE",
       .help = "where to compute; auto is cuda where this build has CUDA and the machine a GPU, the first of which is used, and cpu elsewhere",
       .otherwise = "auto",
       .choices = {"auto", "cpu", "cuda"}},
  };
}

void check_model_folder(const std::filesystem::path& folder) {
  const std::string name = printable(folder.string());
  if (!std::filesystem::exists(folder)) fail(ErrorKind::kData, name, ": there is no such folder", Remedy{"give the folder of a model; alambic import makes one from a GGUF file"});
  if (!std::filesystem::is_directory(folder))
    fail(ErrorKind::kData, name, ": a file, not a model folder",
         Remedy{folder.extension() == ".gguf" ? "alambic import " + name + " FOLDER makes a folder of it" : "give the folder that holds config.json"});
  if (std::filesystem::exists(folder / "metrics.jsonl"))  // its config.json is that of the training
    fail(ErrorKind::kData, name, ": a run, not a model",
         Remedy{std::filesystem::exists(folder / "weights") ? "give " + name + "/weights" : "give its base as --model and this folder as --adapter; alambic merge makes a model of both"});
  if (std::filesystem::exists(folder / "config.json")) return;
  if (std::filesystem::exists(folder / "adapter_config.json"))
    fail(ErrorKind::kData, name, ": an adapter, not a model", Remedy{"give its base as --model and this folder as --adapter"});
  fail(ErrorKind::kData, name, ": not a model folder: it holds no config.json", Remedy{"alambic inspect " + name + " tells what it is"});
}

std::filesystem::path adapter_folder(const std::filesystem::path& folder) {
  const std::string name = printable(folder.string());
  if (!std::filesystem::is_directory(folder)) fail(ErrorKind::kData, name, ": there is no such folder", Remedy{"give a PEFT adapter folder or the folder of a finished run"});
  if (std::filesystem::exists(folder / "adapter_config.json")) return folder;
  if (std::filesystem::exists(folder / "adapter" / "adapter_config.json")) return folder / "adapter";
  fail(ErrorKind::kData, name, ": not an adapter: it holds neither adapter_config.json nor the adapter/ of a finished run",
       Remedy{"alambic inspect " + name + " tells what it is"});
}

models::Decoder load_model(const std::filesystem::path& model, const std::filesystem::path& adapter, const std::string& compute, const std::string& device, checkpoints::Linears linears) {
  check_model_folder(model);
  const std::filesystem::path adapter_path = adapter.empty() ? adapter : adapter_folder(adapter);
  train::TrainConfig where;
  where.device = device;
  const bool on_gpu = train::with_device(where).device == "cuda";
  const at::ScalarType type = compute == "f32" ? at::kFloat : compute == "bf16" || on_gpu ? at::kBFloat16 : models::fastest_compute_type();
  // An adapter meets the base it was trained on, quantised as it was then.
  const lora::BaseQuantization quantization = adapter_path.empty() ? lora::BaseQuantization{} : checkpoints::adapter_quantization(adapter_path);
  if (!adapter_path.empty() && checkpoints::linears_for(adapter_path) == checkpoints::Linears::kDense) linears = checkpoints::Linears::kDense;
  models::Decoder decoder = checkpoints::load_decoder(model, type, quantization, linears);
  if (!adapter_path.empty()) checkpoints::load_adapter(decoder, adapter_path, checkpoints::base_hash(model));
  if (on_gpu) {
    const train::OnDevice settings(at::Device(at::kCUDA, 0), /*deterministic=*/false);
    models::move_to(decoder, at::Device(at::kCUDA, 0));
    return decoder;
  }
  models::use_fused_blocks(decoder);  // so that figures are the bits that training computes; what it cannot take, ATen operators do
  return decoder;
}

models::Decoder load_model(const Arguments& arguments) {
  return load_model(arguments.path("model"), arguments.path("adapter"), arguments.text("compute"), arguments.text("device"));
}

}  // namespace alambic::cli
