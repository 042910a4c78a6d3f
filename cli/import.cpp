// SPDX-License-Identifier: Apache-2.0
#include <chrono>
#include <ostream>

#include "checkpoints/gguf.h"
#include "cli/verbs.h"
#include "core/error.h"
#include "core/log.h"
#include "models/config.h"

namespace alambic::cli {
namespace {

int run_import(const Arguments& arguments, const Terminal& terminal) {
  apply_threads(arguments);
  const std::filesystem::path gguf = arguments.positional(0), folder = arguments.positional(1);
  const std::string& weights = arguments.text("weights");
  const at::ScalarType type = weights == "f32" ? at::kFloat : weights == "bf16" ? at::kBFloat16 : at::kHalf;
  const bool there = std::filesystem::exists(folder) && checkpoints::is_complete_import(gguf, folder, type);
  const auto begin = std::chrono::steady_clock::now();
  if (there) log_info(printable(folder.string()), ": this import is there already, whole; nothing was written");
  else checkpoints::import_gguf(gguf, folder, type);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();

  const models::ModelConfig config = models::read_model_config(folder);
  if (arguments.has("json")) {
    print_json(terminal, {{"model", printable(folder.string())},
                          {"family", std::string(config.family->model_type)},
                          {"parameters", config.num_parameters()},
                          {"weights", weights},
                          {"already_done", there},
                          {"seconds", seconds}});
  } else {
    terminal.out << printable(folder.string()) << ": " << config.family->model_type << ", " << config.num_parameters() << " parameters in " << weights << "\n";
  }
  return 0;
}

}  // namespace

Verb import_verb() {
  return {.name = "import",
          .summary = "GGUF file -> Hugging Face model folder",
          .description = "De-quantises a GGUF file (F32, F16, BF16, Q4_0 to Q8_0, Q2_K to Q6_K) into a folder with config.json, safetensors, tokenizer, chat template and "
                         "licence. The folder appears when it is complete; an import that is there already is left as it is.",
          .positionals = {{.name = "GGUF", .help = "the file to read"}, {.name = "FOLDER", .help = "the model folder to make", .kind = Kind::kFolder}},
          .options = {{.name = "weights", .kind = Kind::kText, .value = "TYPE", .help = "type of the weights written", .otherwise = "f32", .choices = {"f32", "bf16", "f16"}},
                      json_option(),
                      threads_option()},
          .examples = {{"alambic import SmolLM2-135M-Instruct.Q4_1.gguf runs/base", "a model to train on"}},
          .run = run_import};
}

}  // namespace alambic::cli
