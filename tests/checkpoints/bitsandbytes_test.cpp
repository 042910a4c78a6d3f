// SPDX-License-Identifier: Apache-2.0
// Folders that bitsandbytes quantised (tests/oracle/bitsandbytes_oracle.py), and dense ones quantised while they are loaded.
#include "checkpoints/bitsandbytes.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <map>

#include "checkpoints/base_weights.h"
#include "checkpoints/peft_folder.h"
#include "checkpoints/safetensors.h"
#include "core/files.h"
#include "lora/adapter.h"
#include "lora/nf4.h"
#include "tests/closeness.h"
#include "tests/golden.h"
#include "tests/support.h"

namespace alambic::checkpoints {
namespace {

using testing::fails_with;
using testing::Golden;
using testing::golden_path;
using testing::is_close_to_scale;
using testing::ScratchFolder;

const lora::BaseQuantization kNf4{.format = "nf4"}, kSingle{.format = "nf4", .double_quant = false}, kInt8{.format = "int8"};
const std::string kQuery = "model.layers.1.self_attn.q_proj.weight", kState = kQuery + ".quant_state.bitsandbytes__nf4";

fs::path stored(const std::string& kind) { return golden_path("bitsandbytes/" + kind); }

at::Tensor logits_of(const models::Decoder& decoder, const at::Tensor& ids_BT) {
  const at::NoGradGuard evaluating;
  const std::int64_t rows = ids_BT.size(0), length = ids_BT.size(1);
  const at::Tensor hidden_TD = decoder.hidden_TD({.tokens_T = ids_BT.flatten(), .positions_T = at::arange(length).repeat({rows}), .document_lengths = std::vector<std::int64_t>(static_cast<std::size_t>(rows), length)});
  return decoder.logits_TV(hidden_TD).view({rows, length, -1});
}

class StoredFolder : public ::testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(All, StoredFolder, ::testing::Values("dense", "nf4", "nf4_single", "int8"), [](const auto& test) { return test.param; });

TEST_P(StoredFolder, GivesTheLogitsOfTransformers) {
  const std::string kind = GetParam();
  const Golden golden("bitsandbytes/steps.safetensors");
  SCOPED_TRACE(golden.provenance());
  models::Decoder decoder = load_decoder(stored(kind), at::kFloat);
  const at::Tensor logits = logits_of(decoder, golden["ids"]);
  EXPECT_TRUE(is_close_to_scale(logits, golden[kind + ".logits"], 1e-5));
  for (const models::NamedLinear& named : decoder.linears())
    EXPECT_EQ(named.linear->quantized ? named.linear->quantized->format() : "", named.layer < 0 || kind == "dense" ? "" : kind == "int8" ? "int8" : "nf4") << named.path;
  if (kind != "dense") {
    EXPECT_FALSE(is_close_to_scale(logits, golden["dense.logits"], 1e-3)) << "the weights are those of the dense model";
    EXPECT_TRUE(fails_with(ErrorKind::kUsage, "is quantised", [&] { lora::train_everything(decoder); }));
  }
}

TEST(QuantizedWhileLoading, GivesTheBitsThatTransformersStores) {
  for (const auto& [kind, quantization] : {std::pair{"nf4", kNf4}, std::pair{"nf4_single", kSingle}}) {
    models::Decoder theirs = load_decoder(stored(kind), at::kFloat), ours = load_decoder(stored("dense"), at::kFloat, quantization);
    const auto their_linears = theirs.linears(), our_linears = ours.linears();
    std::size_t compared = 0;
    for (std::size_t i = 0; i < our_linears.size(); ++i) {
      if (our_linears[i].layer < 0) continue;
      const auto& a = dynamic_cast<const lora::Nf4Weight&>(*our_linears[i].linear->quantized).parts();
      const auto& b = dynamic_cast<const lora::Nf4Weight&>(*their_linears[i].linear->quantized).parts();
      EXPECT_TRUE(a.packed.equal(b.packed) && a.absmax.equal(b.absmax) && a.offset == b.offset) << our_linears[i].path;
      EXPECT_EQ(a.nested_absmax.defined(), quantization.double_quant);
      EXPECT_EQ(b.nested_absmax.defined(), quantization.double_quant);
      if (quantization.double_quant) {
        EXPECT_TRUE(a.nested_absmax.equal(b.nested_absmax) && a.nested_map.equal(b.nested_map));
      }
      ++compared;
    }
    EXPECT_EQ(compared, 14u);
  }
}

TEST(QuantizedWhileLoading, EveryBlockLinearOfEveryStructureAndNothingElse) {
  for (const char* name : {"gemma3", "llama_tied", "llama_untied", "phi3", "qwen2"})
    for (const lora::BaseQuantization& quantization : {kNf4, kSingle, kInt8})
      for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
        const fs::path folder = golden_path(std::string("peft/") + name);
        models::Decoder dense = load_decoder(folder, type), narrow = load_decoder(folder, type, quantization);
        EXPECT_EQ(narrow.compute_type(), type);
        std::map<std::string, at::Tensor> kept;
        for (const models::NamedTensor& named : narrow.tensors()) kept[named.name] = *named.tensor;
        for (const models::NamedTensor& named : dense.tensors()) {
          const auto found = kept.find(named.name);
          EXPECT_TRUE(found == kept.end() || found->second.equal(*named.tensor)) << named.name;
        }
        std::size_t quantised = 0;
        for (const models::NamedLinear& named : narrow.linears()) {
          EXPECT_EQ(named.linear->quantized != nullptr, named.layer >= 0) << named.path;
          EXPECT_EQ(kept.contains(named.path + ".weight"), named.layer < 0 && !narrow.head_tied) << named.path;
          EXPECT_EQ(named.linear->compute_type(), type);
          quantised += named.layer >= 0 ? 1 : 0;
        }
        EXPECT_EQ(quantised + kept.size(), dense.tensors().size());
        const at::Tensor ids = at::arange(1, 17).view({2, 8});
        EXPECT_FALSE(logits_of(dense, ids).equal(logits_of(narrow, ids)));
      }
}

TEST(QuantizedWhileLoading, AnotherFormatThanTheFoldersIsRefused) {
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "is quantised already, as nf4", [] { load_decoder(stored("nf4"), at::kFloat, kInt8); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "is quantised already, as int8", [] { load_decoder(stored("int8"), at::kFloat, kNf4); }));
  load_decoder(stored("nf4"), at::kFloat, kNf4);  // the same
}

TEST(QuantizedWhileLoading, WeightsThatAreNotFiniteAreNamed) {
  const ScratchFolder scratch;
  fs::copy(stored("dense"), scratch / "base");
  std::string bytes = read_file(scratch / "base" / "model.safetensors");
  const std::size_t header = 8 + static_cast<std::size_t>(static_cast<unsigned char>(bytes[0]) + 256 * static_cast<unsigned char>(bytes[1]));
  const Json entry = parse_json(bytes.substr(8, header - 8), "header")[kQuery];
  bytes.replace(header + entry["data_offsets"][0].get<std::size_t>() + 2, 2, std::string("\xc0\x7f", 2));  // the dense golden is bf16
  write_file(scratch / "base" / "model.safetensors", bytes);
  for (const lora::BaseQuantization& quantization : {kNf4, kInt8})
    EXPECT_TRUE(fails_with(ErrorKind::kData, "\"" + kQuery + "\" is not finite at element 1", [&] { load_decoder(scratch / "base", at::kFloat, quantization); }));
}

TEST(BaseWeights, TellsWhatIsComputedWith) {
  const BaseWeights plain(stored("dense"), {}), narrow(stored("dense"), kNf4), theirs(stored("nf4"), {});
  EXPECT_EQ(plain.trained_format(), "none");
  EXPECT_EQ(narrow.trained_format(), "nf4");
  EXPECT_EQ(theirs.trained_format(), "nf4");
  EXPECT_TRUE(narrow.tensor(kQuery).equal(theirs.tensor(kQuery)));
  EXPECT_FALSE(narrow.tensor(kQuery).equal(plain.tensor(kQuery)));
  EXPECT_EQ(narrow.tensor(kQuery).scalar_type(), at::kFloat);
  EXPECT_TRUE(narrow.tensor("lm_head.weight").equal(plain.tensor("lm_head.weight")));
  EXPECT_EQ(plain.dense_types(), (std::set<at::ScalarType>{at::kBFloat16}));
  EXPECT_EQ(theirs.dense_types(), (std::set<at::ScalarType>{at::kFloat}));
  EXPECT_EQ(theirs.shape(kQuery), (std::vector<std::int64_t>{64, 64}));
}

// A copy of a golden folder, free to be changed.
struct Damaged {
  ScratchFolder scratch;
  fs::path folder = scratch / "model";
  std::map<std::string, at::Tensor> tensors;
  Json config;

  explicit Damaged(const std::string& kind) {
    fs::create_directories(folder);
    config = read_json_file(stored(kind) / "config.json");
    const SafetensorsFile file(stored(kind) / "model.safetensors");
    for (const auto& [name, entry] : file.entries()) tensors[name] = file.tensor(name).clone();
  }
  void state(const std::function<void(Json&)>& change) {
    const at::Tensor& bytes = tensors.at(kState);
    Json json = parse_json({reinterpret_cast<const char*>(bytes.const_data_ptr<std::uint8_t>()), static_cast<std::size_t>(bytes.numel())}, "state");
    change(json);
    text(to_line(json));
  }
  void text(const std::string& said) { tensors[kState] = at::tensor(std::vector<std::uint8_t>(said.begin(), said.end()), at::kByte); }
  ::testing::AssertionResult refused(const std::string& words) const {
    write_file(folder / "config.json", config.dump());
    write_safetensors(folder / "model.safetensors", {tensors.begin(), tensors.end()});
    return fails_with(ErrorKind::kData, words, [&] { load_decoder(folder, at::kFloat); });
  }
};

struct Damage {
  const char* name;
  const char* kind;
  std::function<void(Damaged&)> make;
  std::string words;
};
void PrintTo(const Damage& damage, std::ostream* out) { *out << damage.name; }
const float kInfinity = std::numeric_limits<float>::infinity();

const Damage kDamages[] = {
    {"NoState", "nf4", [](Damaged& d) { d.tensors.erase(kState); }, kState + "\" is missing"},
    {"NoAbsmax", "nf4", [](Damaged& d) { d.tensors.erase(kQuery + ".absmax"); }, kQuery + ".absmax\" is missing"},
    {"NoMap", "nf4", [](Damaged& d) { d.tensors.erase(kQuery + ".quant_map"); }, kQuery + ".quant_map\" is missing"},
    {"NoNestedAbsmax", "nf4", [](Damaged& d) { d.tensors.erase(kQuery + ".nested_absmax"); }, kQuery + ".nested_absmax\" is missing"},
    {"NoNestedMap", "nf4", [](Damaged& d) { d.tensors.erase(kQuery + ".nested_quant_map"); }, kQuery + ".nested_quant_map\" is missing"},
    {"NothingButTheCodes", "nf4", [](Damaged& d) { std::erase_if(d.tensors, [](const auto& t) { return t.first.starts_with(kQuery + "."); }); }, kState + "\" is missing"},
    {"CodesCut", "nf4", [](Damaged& d) { d.tensors[kQuery] = d.tensors[kQuery].narrow(0, 0, 2047); }, kQuery + "\" has shape [2047,1], must have [2048,1]"},
    {"AbsmaxCut", "nf4", [](Damaged& d) { d.tensors[kQuery + ".absmax"] = at::zeros({63}, at::kByte); }, ".absmax\" has shape [63], must have [64]"},
    {"AbsmaxWide", "nf4", [](Damaged& d) { d.tensors[kQuery + ".absmax"] = at::zeros({64}); }, ".absmax\" is stored as Float, must be Byte"},
    {"NestedAbsmaxLong", "nf4", [](Damaged& d) { d.tensors[kQuery + ".nested_absmax"] = at::zeros({2}); }, ".nested_absmax\" has shape [2], must have [1]"},
    {"NestedAbsmaxNegative", "nf4", [](Damaged& d) { d.tensors[kQuery + ".nested_absmax"].fill_(-1); }, ".nested_absmax\" holds -1 at element 0, which is no scale"},
    {"NestedAbsmaxHuge", "nf4", [](Damaged& d) { d.tensors[kQuery + ".nested_absmax"].fill_(3e38); d.state([](Json& s) { s["nested_offset"] = 3e38; }); }, "with which the weights are not finite"},
    {"NestedMapFalls", "nf4", [](Damaged& d) { d.tensors[kQuery + ".nested_quant_map"].fill_(0)[3] = 1; }, ".nested_quant_map\" does not rise"},
    {"NestedMapLarge", "nf4", [](Damaged& d) { d.tensors[kQuery + ".nested_quant_map"][255] = 2; }, ".nested_quant_map\" does not rise from -1 to 1"},
    {"NestedMapLow", "nf4", [](Damaged& d) { d.tensors[kQuery + ".nested_quant_map"][0] = -7; }, ".nested_quant_map\" holds -7 at element 0"},
    {"MapOfAnother", "nf4", [](Damaged& d) { d.tensors[kQuery + ".quant_map"][3] = -0.4; }, ".quant_map\" holds -0.4 for code 3"},
    {"SingleNegative", "nf4_single", [](Damaged& d) { d.tensors[kQuery + ".absmax"][2] = -1; }, ".absmax\" holds -1 at element 2"},
    {"SingleUnknownPart", "nf4_single", [](Damaged& d) { d.tensors[kQuery + ".absmin"] = at::zeros({16}); }, "unclaimed \"" + kQuery + ".absmin\""},
    {"Fp4", "nf4", [](Damaged& d) { d.tensors[kQuery + ".quant_state.bitsandbytes__fp4"] = d.tensors[kState]; }, "bitsandbytes__fp4\" tells of FP4"},
    {"StateFp4", "nf4", [](Damaged& d) { d.state([](Json& s) { s["quant_type"] = "fp4"; }); }, "says quant_type = \"fp4\"; only \"nf4\""},
    {"StateBlocks", "nf4", [](Damaged& d) { d.state([](Json& s) { s["blocksize"] = 128; }); }, "says blocksize = 128; only 64"},
    {"StateNestedBlocks", "nf4", [](Damaged& d) { d.state([](Json& s) { s["nested_blocksize"] = 4096; }); }, "says nested_blocksize = 4096; only 256"},
    {"StateNoOffset", "nf4", [](Damaged& d) { d.state([](Json& s) { s.erase("nested_offset"); }); }, "nested_offset"},
    {"StateOffsetText", "nf4", [](Damaged& d) { d.state([](Json& s) { s["nested_offset"] = "0"; }); }, "nested_offset"},
    {"StateOffsetHuge", "nf4", [](Damaged& d) { d.state([](Json& s) { s["nested_offset"] = 1e300; }); }, "with which the weights are not finite"},
    {"StateShape", "nf4", [](Damaged& d) { d.state([](Json& s) { s["shape"] = {32, 128}; }); }, "says shape = [32,128]; only [64,64]"},
    {"StateShapeHuge", "nf4", [](Damaged& d) { d.state([](Json& s) { s["shape"] = {1ll << 40, 1ll << 40}; }); }, "says shape = "},
    {"StateDtype", "nf4", [](Damaged& d) { d.state([](Json& s) { s["dtype"] = "int8"; }); }, "says dtype = \"int8\""},
    {"StateUnknown", "nf4", [](Damaged& d) { d.state([](Json& s) { s["rotated"] = true; }); }, "has the unknown key \"rotated\""},
    {"StateNoJson", "nf4", [](Damaged& d) { d.text("{\"quant_type\": "); }, kState},
    {"StateList", "nf4", [](Damaged& d) { d.text("[1]"); }, "holds no JSON object"},
    {"StateLong", "nf4", [](Damaged& d) { d.text(std::string(5000, ' ')); }, "is no JSON text of at most 4096 bytes"},
    {"StateWide", "nf4", [](Damaged& d) { d.tensors[kState] = at::zeros({20}); }, "is no JSON text"},
    {"EmbeddingInCodes", "nf4", [](Damaged& d) { d.tensors["model.embed_tokens.weight"] = at::zeros({1536, 1}, at::kByte); }, "model.embed_tokens.weight"},
    {"ConfigFp4", "nf4", [](Damaged& d) { d.config["quantization_config"]["bnb_4bit_quant_type"] = "fp4"; }, "bnb_4bit_quant_type \"fp4\" is not read here"},
    {"ConfigStorage", "nf4", [](Damaged& d) { d.config["quantization_config"]["bnb_4bit_quant_storage"] = "bfloat16"; }, "bnb_4bit_quant_storage \"bfloat16\""},
    {"ConfigBoth", "nf4", [](Damaged& d) { d.config["quantization_config"]["load_in_8bit"] = true; }, "both 4 and 8 bits"},
    {"ConfigNeither", "nf4", [](Damaged& d) { d.config["quantization_config"]["load_in_4bit"] = false, d.config["quantization_config"]["_load_in_4bit"] = false; }, "neither 4 nor 8 bits"},
    {"ConfigUnknown", "nf4", [](Damaged& d) { d.config["quantization_config"]["bnb_4bit_rotation"] = 3; }, "the key \"bnb_4bit_rotation\" is unknown"},
    {"ConfigWords", "nf4", [](Damaged& d) { d.config["quantization_config"]["load_in_4bit"] = "yes"; }, "load_in_4bit"},
    {"ConfigOther", "nf4", [](Damaged& d) { d.config["quantization_config"]["quant_method"] = "gptq"; }, "quantization_config"},
    {"ConfigAbsent", "nf4", [](Damaged& d) { d.config.erase("quantization_config"); }, "disagree"},
    {"DenseCalledQuantised", "dense", [](Damaged& d) { d.config["quantization_config"] = {{"quant_method", "bitsandbytes"}, {"load_in_4bit", true}, {"bnb_4bit_quant_type", "nf4"}}; }, "but none of them is"},
    {"EightNoScale", "int8", [](Damaged& d) { d.tensors.erase("model.layers.1.self_attn.q_proj.SCB"); }, "q_proj.SCB\" is missing"},
    {"EightScaleShort", "int8", [](Damaged& d) { d.tensors["model.layers.1.self_attn.q_proj.SCB"] = at::zeros({63}); }, "SCB\" has shape [63], must have [64]"},
    {"EightScaleNegative", "int8", [](Damaged& d) { d.tensors["model.layers.1.self_attn.q_proj.SCB"].fill_(-2); }, "SCB\" holds -2 at element 0"},
    {"EightLayout", "int8", [](Damaged& d) { d.tensors["model.layers.1.self_attn.q_proj.weight_format"].fill_(2); }, "names a layout other than rows"},
    {"EightCodesShort", "int8", [](Damaged& d) { d.tensors[kQuery] = d.tensors[kQuery].narrow(1, 0, 63).contiguous(); }, "has shape [64,63], must have [64,64]"},
};

class StoredDamage : public ::testing::TestWithParam<Damage> {};
INSTANTIATE_TEST_SUITE_P(All, StoredDamage, ::testing::ValuesIn(kDamages), [](const auto& test) { return test.param.name; });

TEST_P(StoredDamage, IsNamed) {
  Damaged damaged(GetParam().kind);
  GetParam().make(damaged);
  EXPECT_TRUE(damaged.refused(GetParam().words));
}

TEST(StoredFolders, ScalesThatAreNotFiniteAreNamed) {  // the writer refuses them, so the bits are set in the file
  for (const auto& [kind, name] : {std::pair{"nf4", kQuery + ".nested_absmax"}, std::pair{"nf4_single", kQuery + ".absmax"}, std::pair{"int8", std::string("model.layers.1.self_attn.q_proj.SCB")}})
    for (const char* bits : {"\x00\x00\xc0\x7f", "\x00\x00\x80\x7f"}) {
      const ScratchFolder scratch;
      fs::copy(stored(kind), scratch / "base");
      std::string bytes = read_file(scratch / "base" / "model.safetensors");
      const std::size_t header = 8 + static_cast<std::size_t>(static_cast<unsigned char>(bytes[0]) + 256 * static_cast<unsigned char>(bytes[1]));
      const Json entry = parse_json(bytes.substr(8, header - 8), "header")[name];
      bytes.replace(header + entry["data_offsets"][0].get<std::size_t>(), 4, std::string(bits, 4));
      write_file(scratch / "base" / "model.safetensors", bytes);
      EXPECT_TRUE(fails_with(ErrorKind::kData, name + "\" holds ", [&] { load_decoder(scratch / "base", at::kFloat); }));
    }
}

TEST(StoredFolders, ALayerThatWasLeftDenseIsDense) {
  Damaged mixed("nf4");
  std::erase_if(mixed.tensors, [](const auto& t) { return t.first.starts_with(kQuery); });
  mixed.tensors[kQuery] = SafetensorsFile(stored("dense") / "model.safetensors").tensor(kQuery).clone();
  write_file(mixed.folder / "config.json", mixed.config.dump());
  write_safetensors(mixed.folder / "model.safetensors", {mixed.tensors.begin(), mixed.tensors.end()});
  models::Decoder decoder = load_decoder(mixed.folder, at::kFloat);
  for (const models::NamedLinear& named : decoder.linears())
    EXPECT_EQ(named.linear->quantized == nullptr, named.layer < 0 || named.path + ".weight" == kQuery) << named.path;
}

TEST(AdapterOfAQuantizedBase, RemembersItAndIsRefusedOnAnother) {
  const ScratchFolder scratch;
  lora::LoraConfig config;
  config.rank = 2;
  for (const lora::BaseQuantization& quantization : {lora::BaseQuantization{}, kNf4, kSingle, kInt8}) {
    const fs::path folder = scratch / lora::name_of(quantization);
    models::Decoder trained = load_decoder(stored("dense"), at::kFloat, quantization);
    lora::attach(trained, config, 1);
    write_adapter(trained, config, "base", folder, "", quantization);
    EXPECT_EQ(adapter_quantization(folder), quantization);
    models::Decoder same = load_decoder(stored("dense"), at::kFloat, quantization);
    load_adapter(same, folder);
    if (!quantization.is_on()) continue;
    models::Decoder dense = load_decoder(stored("dense"), at::kFloat), other = load_decoder(stored("dense"), at::kFloat, quantization == kInt8 ? kNf4 : kInt8);
    EXPECT_TRUE(fails_with(ErrorKind::kUsage, "this one is not quantised", [&] { load_adapter(dense, folder); }));
    EXPECT_TRUE(fails_with(ErrorKind::kUsage, "this one is quantised as", [&] { load_adapter(other, folder); }));
    EXPECT_NE(read_file(folder / "README.md").find("trained on the base quantised as " + lora::name_of(quantization)), std::string::npos);
  }
  models::Decoder theirs = load_decoder(stored("nf4"), at::kFloat);  // the very same values
  load_adapter(theirs, scratch / "nf4");
}

}  // namespace
}  // namespace alambic::checkpoints
