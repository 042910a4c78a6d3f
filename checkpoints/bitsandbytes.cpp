// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/bitsandbytes.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "checkpoints/safetensors.h"
#include "core/error.h"
#include "lora/int8.h"
#include "lora/nf4.h"

namespace alambic::checkpoints {
namespace {

constexpr const char* kStates[] = {".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"};
constexpr std::size_t kLongestState = 4096;  // bytes; about 200 are usual

std::string module_of(const std::string& name) { return name.substr(0, name.rfind('.')); }

// What a tensor must be. Its values are looked at afterwards.
struct Wanted {
  at::ScalarType type;
  std::vector<std::vector<std::int64_t>> shapes;  // any of them
};

class Reader {
 public:
  Reader(const FolderTensors& tensors, const std::string& name, const std::string& folder) : tensors_(tensors), name_(name), folder_(folder) {}

  template <class... Parts>
  [[noreturn]] void refuse(const std::string& tensor, const Parts&... parts) const {
    fail(ErrorKind::kData, folder_, ": tensor \"", tensor, "\" ", parts..., Remedy{"fetch the folder again, or quantise the dense model here: quantize_base"});
  }
  at::Tensor read(const std::string& tensor, const Wanted& wanted) const {
    if (!tensors_.contains(tensor)) refuse(tensor, "is missing, though \"", name_, "\" is quantised");
    const std::vector<std::int64_t> shape = tensors_.shape(tensor);
    if (tensors_.type(tensor) != wanted.type) refuse(tensor, "is stored as ", toString(tensors_.type(tensor)), ", must be ", toString(wanted.type));
    if (std::find(wanted.shapes.begin(), wanted.shapes.end(), shape) == wanted.shapes.end())
      refuse(tensor, "has shape ", to_line(Json(shape)), ", must have ", to_line(Json(wanted.shapes.front())));
    return tensors_.tensor(tensor);
  }
  /// Finite and not below `low`.
  at::Tensor read_numbers(const std::string& tensor, std::int64_t size, float low) const {
    const at::Tensor numbers = read(tensor, {at::kFloat, {{size}}});
    const float* const values = numbers.const_data_ptr<float>();
    for (std::int64_t i = 0; i < size; ++i)
      if (!(std::isfinite(values[i]) && values[i] >= low)) refuse(tensor, "holds ", values[i], " at element ", i, low == 0 ? ", which is no scale" : ", which is no value of a map");
    return numbers;
  }

 private:
  const FolderTensors& tensors_;
  const std::string& name_;
  const std::string& folder_;
};

lora::Nf4Parts read_nf4(const Reader& reader, const std::string& name, const std::vector<std::int64_t>& shape, const std::string& state_name, const Json& state) {
  const std::int64_t count = shape[0] * shape[1], blocks = (count + lora::kNf4Block - 1) / lora::kNf4Block;
  const std::int64_t nested_blocks = (blocks + lora::kNf4NestedBlock - 1) / lora::kNf4NestedBlock, bytes = (count + 1) / 2;
  const auto expect = [&](const char* key, const Json& wanted) {
    const auto found = state.find(key);
    if (found == state.end() || *found != wanted) reader.refuse(state_name, "says ", key, " = ", found == state.end() ? "nothing" : to_line(*found).substr(0, 80), "; only ", to_line(wanted), " is read here");
  };
  const bool nested = state.contains("nested_blocksize") || state.contains("nested_offset") || state.contains("nested_dtype");
  std::set<std::string> known = {"quant_type", "blocksize", "dtype", "shape"};
  expect("quant_type", "nf4");
  expect("blocksize", lora::kNf4Block);
  expect("shape", shape);
  if (nested) {
    known.insert({"nested_blocksize", "nested_dtype", "nested_offset"});
    expect("nested_blocksize", lora::kNf4NestedBlock);
    expect("nested_dtype", "float32");
  }
  const std::string dtype = value_or<std::string>(state, "dtype", "", state_name);
  if (dtype != "float32" && dtype != "bfloat16" && dtype != "float16") reader.refuse(state_name, "says dtype = \"", dtype, "\", which is no type of weights");
  for (const auto& [key, value] : state.items())
    if (!known.contains(key)) reader.refuse(state_name, "has the unknown key \"", key, "\"");

  lora::Nf4Parts parts;
  parts.packed = reader.read(name, {at::kByte, {{bytes, 1}, {1, bytes}, {bytes}}}).view({bytes});
  const at::Tensor map = reader.read(name + ".quant_map", {at::kFloat, {{16}}});
  for (unsigned code = 0; code < 16; ++code)
    if (map.const_data_ptr<float>()[code] != lora::nf4_value(code))
      reader.refuse(name + ".quant_map", "holds ", map.const_data_ptr<float>()[code], " for code ", code, "; NF4 has ", lora::nf4_value(code));
  if (!nested) {
    parts.absmax = reader.read_numbers(name + ".absmax", blocks, 0);
    return parts;
  }
  parts.absmax = reader.read(name + ".absmax", {at::kByte, {{blocks}}});
  parts.nested_absmax = reader.read_numbers(name + ".nested_absmax", nested_blocks, 0);
  parts.nested_map = reader.read_numbers(name + ".nested_quant_map", 256, -1);
  const float* const values = parts.nested_map.const_data_ptr<float>();
  if (!std::is_sorted(values, values + 256) || values[255] > 1) reader.refuse(name + ".nested_quant_map", "does not rise from -1 to 1");
  const double offset = require<double>(state, "nested_offset", state_name);
  parts.offset = static_cast<float>(offset);
  const float* const scales = parts.nested_absmax.const_data_ptr<float>();
  if (!std::isfinite(parts.offset) || !std::isfinite(std::abs(parts.offset) + *std::max_element(scales, scales + nested_blocks)))
    reader.refuse(state_name, "says nested_offset = ", offset, ", with which the weights are not finite");
  return parts;
}

}  // namespace

std::string stored_format(const Json& config, std::string_view source) {
  const auto found = config.find("quantization_config");
  if (found == config.end() || found->is_null()) return "none";
  std::vector<std::string> problems;
  const std::string where = std::string(source) + ": quantization_config";
  const Json& given = *found;
  if (!given.is_object()) fail(ErrorKind::kData, where, " must be an object");
  const auto flag = [&](const char* key) { return value_or<bool>(given, key, false, where); };
  const std::string method = value_or<std::string>(given, "quant_method", "", where);
  if (method != "bitsandbytes") fail(ErrorKind::kData, where, ": quant_method \"", method, "\" is not read here", Remedy{"take the dense model and quantise it here: quantize_base"});
  const bool four = flag("load_in_4bit") || flag("_load_in_4bit"), eight = flag("load_in_8bit") || flag("_load_in_8bit");
  if (four == eight) problems.push_back(four ? "both 4 and 8 bits are asked for" : "neither 4 nor 8 bits are asked for");
  if (four) {
    if (const std::string type = value_or<std::string>(given, "bnb_4bit_quant_type", "fp4", where); type != "nf4") problems.push_back("bnb_4bit_quant_type \"" + type + "\" is not read here, only nf4");
    if (const std::string storage = value_or<std::string>(given, "bnb_4bit_quant_storage", "uint8", where); storage != "uint8") problems.push_back("bnb_4bit_quant_storage \"" + storage + "\" is not read here, only uint8");
  }
  if (flag("llm_int8_has_fp16_weight")) problems.push_back("llm_int8_has_fp16_weight is not read here");
  // The others choose how bitsandbytes multiplies, or say again what the tensors tell.
  static const std::set<std::string> kKnown = {"quant_method", "load_in_4bit", "_load_in_4bit", "load_in_8bit", "_load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_quant_storage",
                                               "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight",
                                               "llm_int8_skip_modules", "llm_int8_threshold", "modules_to_not_convert"};
  for (const auto& [key, value] : given.items())
    if (!kKnown.contains(key) && !value.is_null()) problems.push_back("the key \"" + key + "\" is unknown");
  if (!problems.empty()) {
    std::string lines;
    for (const std::string& problem : problems) lines += (lines.empty() ? "" : "; ") + problem;
    fail(ErrorKind::kData, where, ": ", lines, Remedy{"take the dense model and quantise it here: quantize_base"});
  }
  return four ? "nf4" : "int8";
}

std::vector<std::string> quantized_parts(const FolderTensors& tensors, const std::string& name, const std::string& format) {
  std::vector<std::string> parts;
  const auto add = [&](const std::string& part) {
    if (tensors.contains(part)) parts.push_back(part);
  };
  if (format == "nf4" && tensors.contains(name) && !at::isFloatingType(tensors.type(name))) {
    for (const char* end : {".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"}) add(name + end);
    for (const char* state : kStates) add(name + state);
    if (parts.empty()) parts.push_back(name + kStates[0]);  // reading will say that it is missing
  } else if (format == "int8" && tensors.contains(name) && tensors.type(name) == at::kChar) {
    for (const char* end : {".SCB", ".weight_format"}) add(module_of(name) + end);
    if (parts.empty()) parts.push_back(module_of(name) + ".SCB");
  }
  return parts;
}

std::shared_ptr<const models::FrozenWeight> load_quantized(const FolderTensors& tensors, const std::string& name, const std::vector<std::int64_t>& shape,
                                                           const std::string& format, const std::string& folder) {
  const Reader reader(tensors, name, folder);
  if (format == "int8") {
    const std::string scales = module_of(name) + ".SCB", layout = module_of(name) + ".weight_format";
    lora::Int8Parts parts{.codes_OI = reader.read(name, {at::kChar, {shape}}), .scale_O = reader.read_numbers(scales, shape[0], 0)};
    if (tensors.contains(layout) && reader.read(layout, {at::kByte, {{}, {1}}}).item<int>() != 0) reader.refuse(layout, "names a layout other than rows");
    return std::make_shared<lora::Int8Weight>(std::move(parts));
  }
  const std::string state_name = name + kStates[0];
  if (tensors.contains(name + kStates[1])) reader.refuse(name + kStates[1], "tells of FP4, which is not read here");
  if (!tensors.contains(state_name)) reader.refuse(state_name, "is missing, though \"", name, "\" is quantised");
  const std::vector<std::int64_t> state_shape = tensors.shape(state_name);
  if (tensors.type(state_name) != at::kByte || state_shape.size() != 1 || state_shape[0] < 2 || state_shape[0] > static_cast<std::int64_t>(kLongestState))
    reader.refuse(state_name, "is no JSON text of at most ", kLongestState, " bytes");
  const at::Tensor bytes = tensors.tensor(state_name);
  const std::string where = folder + ": " + state_name;
  const Json state = parse_json({reinterpret_cast<const char*>(bytes.const_data_ptr<std::uint8_t>()), static_cast<std::size_t>(bytes.numel())}, where);
  if (!state.is_object()) reader.refuse(state_name, "holds no JSON object");
  return std::make_shared<lora::Nf4Weight>(shape[0], shape[1], read_nf4(reader, name, shape, state_name, state));
}

}  // namespace alambic::checkpoints
