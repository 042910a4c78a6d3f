// SPDX-License-Identifier: Apache-2.0
// What export_gguf writes, chooses and refuses. That llama.cpp runs it, and has the same bytes, is tests/oracle/gguf_export_oracle.py.
#include "checkpoints/gguf_export.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include <limits>
#include <map>

#include "checkpoints/gguf.h"
#include "checkpoints/gguf_header.h"
#include "checkpoints/gguf_mix.h"
#include "checkpoints/gguf_tokenizer.h"
#include "checkpoints/gguf_write.h"
#include "checkpoints/hf_folder.h"
#include "core/files.h"
#include "core/json.h"
#include "tests/golden.h"
#include "tests/support.h"

namespace alambic::checkpoints {
namespace {

using testing::fails_with;
using testing::golden_path;
using testing::ScratchFolder;

Json tiny_config() {
  return {{"architectures", {"LlamaForCausalLM"}}, {"model_type", "llama"}, {"vocab_size", 270}, {"hidden_size", 64}, {"intermediate_size", 96}, {"num_hidden_layers", 2},
          {"num_attention_heads", 4}, {"num_key_value_heads", 2}, {"max_position_embeddings", 128}, {"rms_norm_eps", 1e-5}, {"rope_theta", 10000.0},
          {"tie_word_embeddings", true}, {"hidden_act", "silu"}, {"bos_token_id", 256}, {"eos_token_id", 257}};
}

// Byte-level BPE with one merge and two special tokens; ids up to 258.
Json tiny_tokenizer() {
  Json vocabulary = Json::object();
  const auto letter = [](unsigned code) { return code < 128 ? std::string(1, static_cast<char>(code)) : std::string{static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 63))}; };
  for (unsigned byte = 0, other = 256; byte < 256; ++byte) {
    const bool shown = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    vocabulary[letter(shown ? byte : other++)] = byte;
  }
  vocabulary["\u0120t"] = 258;
  const auto special = [](int id, const char* text) {
    return Json{{"id", id}, {"content", text}, {"single_word", false}, {"lstrip", false}, {"rstrip", false}, {"normalized", false}, {"special", true}};
  };
  return {{"version", "1.0"}, {"added_tokens", {special(256, "<|start|>"), special(257, "<|end|>")}}, {"normalizer", nullptr},
          {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}}}, {"post_processor", nullptr},
          {"decoder", {{"type", "ByteLevel"}}}, {"model", {{"type", "BPE"}, {"vocab", vocabulary}, {"merges", Json::array({Json::array({"\u0120", "t"})})}}}};
}

struct Folder {
  ScratchFolder scratch;
  Json config = tiny_config(), tokenizer = tiny_tokenizer();
  std::map<std::string, at::Tensor> weights;
  GgufExportConfig request;

  Folder() {
    request.folder = scratch / "model";
    request.output = scratch / "out.gguf";
    request.type = "f32";
  }
  void write() {
    fs::create_directories(request.folder);
    write_file(request.folder / "config.json", config.dump(2));
    if (!tokenizer.is_null()) write_file(request.folder / "tokenizer.json", tokenizer.dump());
    write_file(request.folder / "tokenizer_config.json", R"({"bos_token": "<|start|>", "eos_token": "<|end|>"})");
    write_file(request.folder / "README.md", "---\nlicense: apache-2.0\nbase_model: org/parent\nlanguage:\n- de\n---\n# Tiny\n");
    write_file(request.folder / "LICENSE", "terms\n");
    const auto shapes = models::expected_shapes(models::read_model_config(config, "here"));
    for (const auto& [name, shape] : shapes)
      if (!weights.contains(name)) weights[name] = at::randn(shape);
    write_weights(request.folder, shapes, at::kFloat, [&](std::size_t i) { return weights.at(shapes[i].first); });
  }
  ::testing::AssertionResult refused(ErrorKind kind, const std::string& words) const {
    if (const auto failed = fails_with(kind, words, [&] { export_gguf(request); }); !failed) return failed;
    for (const auto& entry : fs::directory_iterator(scratch.path()))
      if (entry.path().filename() != "model") return ::testing::AssertionFailure() << "left behind: " << entry.path();
    return ::testing::AssertionSuccess();
  }
};

TEST(GgufExport, Gemma2KeepsItsSoftCaps) {
  const auto gemma = [](Folder& folder) {
    folder.config.update({{"architectures", {"Gemma2ForCausalLM"}}, {"model_type", "gemma2"}, {"hidden_activation", "gelu_pytorch_tanh"}, {"head_dim", 16}, {"query_pre_attn_scalar", 16},
                          {"sliding_window", 32}, {"attn_logit_softcapping", 20.0}, {"final_logit_softcapping", 10.0}});
  };
  Folder folder;
  gemma(folder);
  folder.write();
  export_gguf(folder.request);
  const Json keys = GgufFile(folder.request.output).metadata();
  EXPECT_EQ(keys["general.architecture"], "gemma2");
  EXPECT_EQ(keys["gemma2.attn_logit_softcapping"], 20);
  EXPECT_EQ(keys["gemma2.final_logit_softcapping"], 10);
  EXPECT_EQ(keys["gemma2.attention.sliding_window"], 32);
  import_gguf(folder.request.output, folder.scratch / "back");
  const models::ModelConfig back = models::read_model_config(folder.scratch / "back");
  EXPECT_EQ(back.attention_soft_cap, 20);
  EXPECT_EQ(back.logit_soft_cap, 10);
  EXPECT_EQ(back.layers[0].window, 32);
  EXPECT_EQ(back.layers[1].window, 0);
  for (const auto& [words, change] : std::map<std::string, std::function<void(Json&)>>{
           {"Gemma 2 without soft caps", [](Json& config) { config["final_logit_softcapping"] = nullptr; }},
           {"a rope_theta other than 10000", [](Json& config) { config["rope_theta"] = 500.0; }},
           {"layer 1: every second layer sees everything", [](Json& config) { config["layer_types"] = {"sliding_attention", "sliding_attention"}; }},
           {"query_pre_attn_scalar other than 16", [](Json& config) { config["query_pre_attn_scalar"] = 12; }}}) {
    Folder other;
    gemma(other);
    change(other.config);
    other.write();
    EXPECT_TRUE(other.refused(ErrorKind::kData, words)) << words;
  }
}

TEST(GgufExport, ComesBackBitForBit) {
  Folder folder;
  folder.write();
  const GgufExportReport report = export_gguf(folder.request);
  EXPECT_EQ(report.sha256, sha256_of_file(folder.request.output));
  EXPECT_EQ(report.num_bytes, fs::file_size(folder.request.output));
  const GgufFile file(folder.request.output);
  const Json& keys = file.metadata();
  EXPECT_EQ(keys.begin().key(), "general.architecture");
  EXPECT_EQ(keys["general.license"], "apache-2.0");
  EXPECT_EQ(keys["general.base_model.0.repo_url"], "https://huggingface.co/org/parent");
  EXPECT_EQ(keys["general.languages"], Json::array({"de"}));
  EXPECT_EQ(keys["general.file_type"], 0);
  EXPECT_EQ(keys["llama.rope.dimension_count"], 16);
  EXPECT_EQ(keys["tokenizer.ggml.pre"], "gpt-2");
  EXPECT_EQ(keys["tokenizer.ggml.tokens"].size(), 270u);
  EXPECT_EQ(keys["tokenizer.ggml.tokens"][265], "[PAD265]");
  EXPECT_EQ(keys["tokenizer.ggml.token_type"][265], 5);
  EXPECT_EQ(keys["tokenizer.ggml.token_type"][257], 3);
  EXPECT_EQ(keys["tokenizer.ggml.merges"], Json::array({"\u0120 t"}));
  EXPECT_EQ(keys["tokenizer.ggml.eos_token_id"], 257);

  import_gguf(folder.request.output, folder.scratch / "back");
  const FolderTensors back(folder.scratch / "back");
  EXPECT_EQ(back.names().size(), folder.weights.size());
  for (const auto& [name, tensor] : folder.weights) EXPECT_TRUE(at::equal(back.tensor(name), tensor)) << name;
  // Rows of q lie in pairs in the file: row 1 of GGUF's is row 8 of a head of 16.
  EXPECT_TRUE(at::equal(file.tensor("blk.0.attn_q.weight")[1], folder.weights["model.layers.0.self_attn.q_proj.weight"][8]));

  const models::Decoder decoder = load_gguf(folder.request.output);
  EXPECT_TRUE(at::equal(decoder.blocks[1].linears.at(models::Slot::kKey).weight_OI, folder.weights["model.layers.1.self_attn.k_proj.weight"]));
  EXPECT_TRUE(decoder.head_tied);
}

TEST(GgufExport, WritesACardAndTheLicenceBesideTheFile) {
  Folder folder;
  folder.write();
  fs::create_directories(folder.scratch / "published");
  folder.request.output = folder.scratch / "published" / "tiny.gguf";
  folder.request.type = "q8_0";
  GgufExportReport report = export_gguf(folder.request);
  report.card.measures.push_back({"bits per UTF-8 byte", "1.0", "1.1"});
  EXPECT_EQ(write_export_card(report, folder.request.folder), folder.scratch / "published" / "README.md");
  const std::string card = read_file(folder.scratch / "published" / "README.md");
  for (const char* words : {"license: apache-2.0", "base_model:\n- org/parent", "library_name: gguf", "| bits per UTF-8 byte | 1.0 | 1.1 |", "tiny.gguf"})
    EXPECT_NE(card.find(words), std::string::npos) << words << " in " << card;
  EXPECT_NE(card.find(report.sha256), std::string::npos);
  EXPECT_EQ(read_file(folder.scratch / "published" / "LICENSE"), "terms\n");
  folder.request.output = folder.scratch / "published" / "second.gguf";
  EXPECT_EQ(write_export_card(export_gguf(folder.request), folder.request.folder), folder.scratch / "published" / "second.md");
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "second.md: exists already, and so does README.md", [&] { export_card_path(folder.request.output); }));
}

TEST(GgufExport, RefusesWithNothingLeft) {
  {
    Folder folder;
    folder.tokenizer = nullptr;
    folder.write();
    EXPECT_TRUE(folder.refused(ErrorKind::kData, "holds no tokenizer.json"));
  }
  {
    Folder folder;
    const float mark = 12345.678f, not_a_number = std::numeric_limits<float>::quiet_NaN();
    folder.weights["model.layers.1.mlp.up_proj.weight"] = at::ones({96, 64});
    folder.weights["model.layers.1.mlp.up_proj.weight"].mutable_data_ptr<float>()[64 * 7 + 5] = mark;
    folder.write();
    std::string bytes = read_file(folder.request.folder / "model.safetensors");  // no writer of ours lets NaN through
    bytes.replace(bytes.find(std::string(reinterpret_cast<const char*>(&mark), 4)), 4, std::string(reinterpret_cast<const char*>(&not_a_number), 4));
    write_file(folder.request.folder / "model.safetensors", bytes);
    for (const char* type : {"f32", "q4_0", "q8_0"}) {
      folder.request.type = type;
      EXPECT_TRUE(folder.refused(ErrorKind::kData, "model.layers.1.mlp.up_proj.weight\": the value in row 7, column 5 is not finite"));
    }
  }
  {
    Folder folder;
    folder.config["hidden_size"] = 40;
    folder.config["num_attention_heads"] = 4, folder.config["head_dim"] = 10;
    folder.write();
    folder.request.type = "q8_0";
    EXPECT_TRUE(folder.refused(ErrorKind::kData, "rows of 40 values are not a multiple of the 32 in a block of Q8_0"));
    folder.request.type = "f16";
    EXPECT_EQ(export_gguf(folder.request).tensors_of_type.at("F16"), 15);
  }
  {
    Folder folder;
    folder.write();
    folder.request.type = "q4_k_mm";
    EXPECT_TRUE(folder.refused(ErrorKind::kUsage, "did you mean q4_k_m?"));
    folder.request.type = "f32";
    write_file(folder.request.output, "mine");
    EXPECT_TRUE(fails_with(ErrorKind::kUsage, "exists already and is never overwritten", [&] { export_gguf(folder.request); }));
    EXPECT_EQ(read_file(folder.request.output), "mine");
  }
  {
    Folder folder;
    folder.config["rope_scaling"] = {{"rope_type", "longrope"}, {"long_factor", std::vector<double>(8, 2.0)}, {"short_factor", std::vector<double>(8, 1.0)}};
    folder.write();
    EXPECT_TRUE(folder.refused(ErrorKind::kData, "llama.cpp's llama has not: RoPE scaling of type longrope"));
  }
  for (const auto& [words, change] : std::map<std::string, std::function<void(Json&)>>{
           {"llama.cpp has no name for this pre-tokenizer", [](Json& t) { t["pre_tokenizer"]["add_prefix_space"] = true; }},
           {"the normaliser Lowercase has no counterpart", [](Json& t) { t["normalizer"] = {{"type", "Lowercase"}}; }},
           {"a tokenizer of type \"WordPiece\" is not exported", [](Json& t) { t["model"]["type"] = "WordPiece"; }},
           {"has id 270, and the model has 270 rows", [](Json& t) { t["model"]["vocab"]["x1"] = 270; }},
           {"the token \"<|end|>\" has two ids", [](Json& t) { t["model"]["vocab"]["<|end|>"] = 260; }},
           {"neither byte-level BPE nor one with byte fallback", [](Json& t) { t["pre_tokenizer"] = nullptr; }}}) {
    Folder folder;
    change(folder.tokenizer);
    folder.write();
    EXPECT_TRUE(folder.refused(ErrorKind::kData, words)) << words;
  }
}

TEST(GgufExport, AnImportanceMatrixMustBeThisModels) {
  Folder folder;
  folder.write();
  folder.request.type = "q4_0";
  ImportanceMatrix matrix;
  matrix.datasets = {"here"};
  matrix.entries["blk.0.attn_q.weight"] = {.squares_I = at::ones({64}), .tokens = 2};
  folder.request.importance = &matrix;
  const GgufExportReport report = export_gguf(folder.request);
  EXPECT_EQ(report.num_weighted, 1);
  EXPECT_EQ(GgufFile(folder.request.output).metadata()["quantize.imatrix.dataset"], "here");
  fs::remove(folder.request.output);
  matrix.entries["blk.0.attn_q.weight"].squares_I = at::ones({32});
  EXPECT_TRUE(folder.refused(ErrorKind::kData, "the importance matrix has 32 columns for \"blk.0.attn_q.weight\", the model 64"));
  matrix.entries.clear();
  matrix.entries["blk.9.attn_q.weight"] = {.squares_I = at::ones({64}), .tokens = 2};
  EXPECT_TRUE(folder.refused(ErrorKind::kData, "has an entry \"blk.9.attn_q.weight\", and the model no such tensor"));
}

TEST(ImportanceMatrix, IsWrittenAndRead) {
  const ScratchFolder scratch;
  ImportanceMatrix matrix;
  matrix.datasets = {"a", "b"};
  matrix.chunk_size = 512;
  matrix.entries["blk.0.attn_q.weight"] = {.squares_I = at::rand({64}) * 1e9, .tokens = 1000};
  write_importance_matrix(matrix, scratch / "matrix.gguf");
  const ImportanceMatrix back = read_importance_matrix(scratch / "matrix.gguf");
  EXPECT_EQ(back.datasets, matrix.datasets);
  EXPECT_EQ(back.chunk_size, 512u);
  EXPECT_EQ(back.entries.at("blk.0.attn_q.weight").tokens, 1000);
  EXPECT_TRUE(at::equal(back.entries.at("blk.0.attn_q.weight").squares_I, matrix.entries["blk.0.attn_q.weight"].squares_I));
  EXPECT_EQ(GgufFile(scratch / "matrix.gguf").metadata()["imatrix.chunk_count"], 2);
  matrix.entries["blk.0.attn_q.weight"].squares_I = at::full({64}, -1.0);
  write_importance_matrix(matrix, scratch / "negative.gguf");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "column 0 is -1, and no sum of squares", [&] { read_importance_matrix(scratch / "negative.gguf"); }));
  write_gguf(scratch / "other.gguf", {{"general.type", std::string("model")}}, {}, {});
  EXPECT_TRUE(fails_with(ErrorKind::kData, "is a GGUF file, but no importance matrix", [&] { read_importance_matrix(scratch / "other.gguf"); }));
}

TEST(GgufMix, ChoosesAsLlamaQuantize) {  // the whole choice is compared by the oracle; here the shape of it
  Json json = tiny_config();
  json["num_hidden_layers"] = 16, json["hidden_size"] = 512, json["intermediate_size"] = 768;
  const auto types = [&](const char* mix, bool importance = false) {
    const models::ModelConfig config = models::read_model_config(json, "here");
    std::map<std::string, std::string> chosen;
    const std::vector<GgufMove> moves = gguf_moves(config, gguf_architectures()[0]);
    const auto all = gguf_types_of(find_gguf_mix(mix), config, moves, importance);
    for (std::size_t i = 0; i < moves.size(); ++i) chosen[moves[i].gguf] = all[i]->name;
    return chosen;
  };
  auto q4 = types("q4_k_m");
  EXPECT_EQ(q4["token_embd.weight"], "Q6_K");  // it is the output too
  EXPECT_EQ(q4["blk.0.attn_norm.weight"], "F32");
  for (int layer = 0; layer < 16; ++layer) {
    const bool more = layer < 2 || layer >= 14 || (layer - 2) % 3 == 2;
    EXPECT_EQ(q4["blk." + std::to_string(layer) + ".attn_v.weight"], more ? "Q6_K" : "Q4_K") << layer;
    EXPECT_EQ(q4["blk." + std::to_string(layer) + ".ffn_down.weight"], more ? "Q6_K" : "Q4_K") << layer;
    EXPECT_EQ(q4["blk." + std::to_string(layer) + ".attn_k.weight"], "Q4_K") << layer;
  }
  EXPECT_EQ(types("q4_0", true)["blk.1.ffn_down.weight"], "Q4_1");
  EXPECT_EQ(types("q4_0", false)["blk.1.ffn_down.weight"], "Q4_0");
  EXPECT_EQ(types("q4_0", true)["blk.2.ffn_down.weight"], "Q4_0");
  json["tie_word_embeddings"] = false;
  EXPECT_EQ(types("q5_k_m")["token_embd.weight"], "Q5_K");
  EXPECT_EQ(types("q5_k_m")["output.weight"], "Q6_K");
  json["hidden_size"] = 576, json["head_dim"] = 64, json["num_attention_heads"] = 9, json["num_key_value_heads"] = 3;  // SmolLM2
  q4 = types("q4_k_m");
  EXPECT_EQ(q4["output.weight"], "Q8_0");
  EXPECT_EQ(q4["blk.0.attn_q.weight"], "Q5_0");
  EXPECT_EQ(q4["blk.0.attn_v.weight"], "Q8_0");
  EXPECT_EQ(q4["blk.0.ffn_down.weight"], "Q6_K");
  EXPECT_EQ(types("q5_k_m")["blk.0.attn_q.weight"], "Q5_1");
}

TEST(GgufPreTokenizer, IsTheInverseOfTheImportedOne) {
  Json metadata = {{"general.architecture", "llama"}, {"tokenizer.ggml.model", "gpt2"}, {"tokenizer.ggml.tokens", {"a", "b", "ab"}}, {"tokenizer.ggml.merges", {"a b"}}};
  for (const auto& [name, ignore, expected] : {std::tuple{"gpt-2", false, "gpt-2"}, std::tuple{"llama-bpe", true, "llama-bpe"}, std::tuple{"llama-bpe", false, "smaug-bpe"}, std::tuple{"qwen2", false, "qwen2"},
                                              std::tuple{"qwen35", false, "qwen35"}, std::tuple{"tekken", true, "tekken"}, std::tuple{"gpt-4o", false, "gpt-4o"}}) {
    metadata["tokenizer.ggml.pre"] = name;
    const Json tokenizer = tokenizer_json_from_gguf(metadata, "here");
    EXPECT_EQ(gguf_pre_tokenizer(tokenizer["pre_tokenizer"], ignore, "here").name, expected);
    EXPECT_EQ(gguf_pre_tokenizer(tokenizer["pre_tokenizer"], ignore, "here").ignore_merges, ignore);
  }
  // The real SmolLM2's: digits one by one.
  const Json smollm = parse_json(R"({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]})", "here");
  EXPECT_EQ(gguf_pre_tokenizer(smollm, false, "here").name, "smollm");
}

TEST(GgufExport, WritesAdaptersOnlyWhereLlamaCppCanAddThem) {
  const ScratchFolder scratch;
  const auto request = [&](const std::string& name, const char* type = "f32") { return GgufExportConfig{.folder = {}, .output = scratch / name, .type = type}; };
  const GgufExportReport report = export_gguf_adapter(golden_path("peft/llama_tied"), golden_path("peft/llama_tied.patterns"), request("a.gguf"));
  const GgufFile file(scratch / "a.gguf");
  EXPECT_EQ(file.metadata()["general.type"], "adapter");
  EXPECT_EQ(file.metadata()["adapter.type"], "lora");
  EXPECT_GT(report.num_parameters, 0);
  for (const GgufTensor& tensor : file.tensors()) EXPECT_TRUE(tensor.name.ends_with(".weight.lora_a") || tensor.name.ends_with(".weight.lora_b")) << tensor.name;
  for (const auto& [folder, words] : {std::pair{"llama_tied.dora", "DoRA"}, std::pair{"llama_tied.save_embedding", "trained whole"}, std::pair{"llama_tied.head", "head that is the embedding"}})
    EXPECT_TRUE(fails_with(ErrorKind::kUsage, words, [&] { export_gguf_adapter(golden_path("peft/llama_tied"), golden_path(std::string("peft/") + folder), request("b.gguf")); })) << folder;
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "an adapter is written as f32, f16 or bf16", [&] { export_gguf_adapter(golden_path("peft/llama_tied"), golden_path("peft/llama_tied.lora"), request("b.gguf", "q8_0")); }));
  EXPECT_FALSE(fs::exists(scratch / "b.gguf"));
}

TEST(GgufWrite, IsReadBack) {
  const ScratchFolder scratch;
  const GgufKeys keys = {{"general.architecture", std::string("x")}, {"a", std::uint32_t{7}}, {"b", std::int32_t{-7}}, {"c", 0.5f}, {"d", true},
                         {"e", std::vector<std::string>{"", "two"}}, {"f", std::vector<float>{1, 2}}, {"g", std::vector<std::int32_t>{-1, 3}}};
  const GgufType* f32 = find_gguf_type(0);
  const std::vector<GgufTensorToWrite> tensors = {{"one", f32, {3}}, {"two", f32, {2, 5}}};
  const std::string sha = write_gguf(scratch / "x.gguf", keys, tensors, [](std::size_t i, std::byte* out) {
    for (std::size_t k = 0; k < (i == 0 ? 3u : 10u); ++k) {
      const float value = static_cast<float>(100 * i + k);
      std::memcpy(out + 4 * k, &value, 4);
    }
  });
  const std::string bytes = read_file(scratch / "x.gguf");
  EXPECT_EQ(sha, sha256_of(bytes));
  EXPECT_EQ(bytes.size(), gguf_file_bytes(keys, tensors));
  const GgufHeader header = parse_gguf_header(bytes, "x");
  EXPECT_EQ(header.version, 3u);
  EXPECT_EQ(to_line(header.metadata), R"({"general.architecture":"x","a":7,"b":-7,"c":0.5,"d":true,"e":["","two"],"f":[1.0,2.0],"g":[-1,3]})");
  ASSERT_EQ(header.entries.size(), 2u);
  EXPECT_EQ(header.entries[1].shape, (std::vector<std::int64_t>{2, 5}));
  EXPECT_EQ(header.entries[1].begin % 32, 0u);
  float last = 0;
  std::memcpy(&last, bytes.data() + header.entries[1].begin + 36, 4);
  EXPECT_EQ(last, 109);
}

TEST(GgufWrite, LeavesNothingWhenATensorFailsOrTheDiskIsTooSmall) {
  const ScratchFolder scratch;
  const std::vector<GgufTensorToWrite> tensors = {{"one", find_gguf_type(0), {3}}, {"two", find_gguf_type(0), {3}}};
  EXPECT_TRUE(fails_with(ErrorKind::kData, "broken", [&] { write_gguf(scratch / "x.gguf", {}, tensors, [](std::size_t i, std::byte*) { if (i == 1) fail(ErrorKind::kData, "broken"); }); }));
  EXPECT_TRUE(fails_with(ErrorKind::kResource, "bytes are needed", [&] { write_gguf(scratch / "x.gguf", {}, {{"huge", find_gguf_type(0), {1ll << 50}}}, {}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kBug, "given twice", [&] { write_gguf(scratch / "x.gguf", {}, {tensors[0], tensors[0]}, {}); }));
  EXPECT_TRUE(fs::is_empty(scratch.path()));
}

}  // namespace
}  // namespace alambic::checkpoints
