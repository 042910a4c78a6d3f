// SPDX-License-Identifier: Apache-2.0
#include "checkpoints/hf_folder.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <map>

#include "checkpoints/safetensors.h"
#include "core/files.h"
#include "core/log.h"
#include "models/fused_blocks.h"
#include "tests/support.h"

namespace alambic::checkpoints {
namespace {

using testing::fails_with;
using testing::ScratchFolder;
using Tensors = std::map<std::string, at::Tensor>;

Json tiny_config(bool tied) {
  return {{"architectures", {"LlamaForCausalLM"}}, {"model_type", "llama"}, {"vocab_size", 16}, {"hidden_size", 8}, {"intermediate_size", 12},
          {"num_hidden_layers", 2}, {"num_attention_heads", 2}, {"num_key_value_heads", 1}, {"max_position_embeddings", 32},
          {"rms_norm_eps", 1e-5}, {"tie_word_embeddings", tied}};
}

// A tiny llama in a folder, whose tensors a test may change before they are written.
class TinyModel {
 public:
  explicit TinyModel(bool tied = true) : config(tiny_config(tied)) {
    for (const auto& [name, shape] : models::expected_shapes(models::read_model_config(config, "tiny"))) tensors[name] = at::randn(shape);
  }
  std::filesystem::path write(const ScratchFolder& scratch, const std::string& name = "model") const {
    const std::filesystem::path folder = scratch / name;
    std::filesystem::create_directories(folder);
    write_file(folder / "config.json", config.dump());
    write_safetensors(folder / "model.safetensors", {tensors.begin(), tensors.end()});
    return folder;
  }
  Json config;
  Tensors tensors;
};

const std::string kQuery = "model.layers.1.self_attn.q_proj.weight", kHead = "lm_head.weight", kEmbedding = "model.embed_tokens.weight";

TEST(LoadDecoder, PutsEveryTensorInItsPlace) {
  const ScratchFolder scratch;
  const TinyModel model(false);
  models::Decoder decoder = load_decoder(model.write(scratch), at::kFloat);
  std::size_t num_tensors = 0;
  for (const models::NamedTensor& named : decoder.tensors()) {
    EXPECT_TRUE(at::equal(*named.tensor, model.tensors.at(named.name))) << named.name;
    ++num_tensors;
  }
  EXPECT_EQ(num_tensors, model.tensors.size());
  EXPECT_FALSE(decoder.head_tied);
  EXPECT_TRUE(at::equal(decoder.head.weight_OI, model.tensors.at(kHead)));
}

TEST(LoadDecoder, ConvertsToTheComputeTypeAndKeepsNormsInF32) {
  const ScratchFolder scratch;
  const TinyModel model;
  models::Decoder decoder = load_decoder(model.write(scratch), at::kBFloat16);
  for (const models::NamedTensor& named : decoder.tensors()) {
    const bool norm = named.name.ends_with("norm.weight");
    EXPECT_EQ(named.tensor->scalar_type(), norm ? at::kFloat : at::kBFloat16) << named.name;
    EXPECT_TRUE(at::equal(*named.tensor, model.tensors.at(named.name).to(named.tensor->scalar_type()))) << named.name;
  }
  EXPECT_TRUE(decoder.head_tied);
  EXPECT_TRUE(decoder.head.weight_OI.is_same(decoder.embedding_VD) || decoder.head.weight_OI.data_ptr() == decoder.embedding_VD.data_ptr());
}

TEST(LoadDecoder, StoredTypesMayDiffer) {
  const ScratchFolder scratch;
  TinyModel model;
  for (auto& [name, tensor] : model.tensors) tensor = tensor.to(name.ends_with("norm.weight") ? at::kBFloat16 : name == kQuery ? at::kDouble : at::kHalf);
  models::Decoder decoder = load_decoder(model.write(scratch), at::kFloat);
  for (const models::NamedTensor& named : decoder.tensors()) EXPECT_TRUE(at::equal(*named.tensor, model.tensors.at(named.name).to(at::kFloat))) << named.name;
}

TEST(LoadDecoder, KeepsMatricesInTheFilesOwnSixteenBits) {
  const ScratchFolder scratch;
  for (const at::ScalarType stored : {at::kBFloat16, at::kHalf}) {
    TinyModel model(false);
    for (auto& [name, tensor] : model.tensors) tensor = tensor.to(name == kQuery ? at::kFloat : stored);
    const std::filesystem::path folder = model.write(scratch, toString(stored));
    models::Decoder dense = load_decoder(folder, at::kFloat), kept = load_decoder(folder, at::kFloat, {}, Linears::kAsStored);
    std::size_t num_kept = 0;
    for (const models::NamedLinear& named : kept.linears()) {
      const bool stays = named.path + ".weight" != kQuery;
      ASSERT_EQ(named.linear->quantized != nullptr, stays) << named.path;
      if (!stays) continue;
      EXPECT_EQ(named.linear->quantized->format(), stored == at::kHalf ? "f16" : "bf16");
      EXPECT_EQ(named.linear->quantized->num_bytes(), static_cast<std::uint64_t>(2 * named.linear->outputs() * named.linear->inputs()));
      EXPECT_TRUE(at::equal(named.linear->dense_OI(at::kFloat), model.tensors.at(named.path + ".weight").to(at::kFloat))) << named.path;
      ++num_kept;
    }
    EXPECT_EQ(num_kept, 14u);
    EXPECT_EQ(kept.embedding_VD.scalar_type(), stored);
    EXPECT_TRUE(at::equal(kept.embedding_VD, model.tensors.at(kEmbedding)));
    for (const models::NamedTensor& named : kept.tensors()) EXPECT_NE(named.name, kHead) << "its weight is not dense";
    const models::Input input{.tokens_T = at::arange(8), .positions_T = at::arange(8), .document_lengths = {8}};
    for (const bool fused : {false, true}) {
      if (fused) {
        ASSERT_EQ(models::use_fused_blocks(dense) + models::use_fused_blocks(kept), "");
      }
      EXPECT_TRUE(at::equal(dense.hidden_TD(input), kept.hidden_TD(input))) << "fused: " << fused;
      EXPECT_TRUE(at::equal(dense.logits_TV(dense.hidden_TD(input)), kept.logits_TV(kept.hidden_TD(input)))) << "fused: " << fused;
    }
    for (const models::NamedLinear& named : load_decoder(folder, at::kBFloat16, {}, Linears::kAsStored).linears()) EXPECT_EQ(named.linear->quantized, nullptr);
  }
  {
    TinyModel model;
    for (auto& [name, tensor] : model.tensors) tensor = tensor.to(at::kBFloat16);
    models::Decoder tied = load_decoder(model.write(scratch, "tied"), at::kFloat, {}, Linears::kAsStored);
    ASSERT_TRUE(tied.head_tied && tied.head.quantized);
    EXPECT_EQ(tied.head.quantized->stored_OI().data_ptr(), tied.embedding_VD.data_ptr()) << "one tensor";
    models::make_head_dense(tied);
    EXPECT_FALSE(tied.head.quantized);
    EXPECT_TRUE(tied.head.weight_OI.is_same(tied.embedding_VD));
    EXPECT_TRUE(at::equal(tied.embedding_VD, model.tensors.at(kEmbedding).to(at::kFloat)));
  }
  TinyModel damaged;
  damaged.tensors.at(kQuery) = at::full({8, 8}, 3.25, at::kBFloat16);
  const std::filesystem::path folder = damaged.write(scratch, "damaged");
  std::string bytes = read_file(folder / "model.safetensors");
  const std::size_t query = bytes.find("\x50\x40\x50\x40\x50\x40\x50\x40");
  ASSERT_NE(query, bytes.npos);
  bytes.replace(query + 6, 2, "\x80\x7f");  // infinity
  write_file(folder / "model.safetensors", bytes);
  EXPECT_TRUE(fails_with(ErrorKind::kData, "\"" + kQuery + "\" is not finite at element 3 as BFloat16", [&] { load_decoder(folder, at::kFloat, {}, Linears::kAsStored); }));
}

TEST(LoadDecoder, ListsEveryDisagreementInOneError) {
  const ScratchFolder scratch;
  TinyModel model;
  model.tensors["model.layers.1.self_attn.q_projj.weight"] = model.tensors.at(kQuery);
  model.tensors.erase(kQuery);
  model.tensors["model.norm.weight"] = at::zeros({9});
  model.tensors["something.else"] = at::zeros({2, 3});
  model.tensors["model.layers.0.mlp.up_proj.weight"] = at::zeros({12, 8}, at::kInt);
  const auto folder = model.write(scratch);
  const auto load = [&] { load_decoder(folder, at::kFloat); };
  EXPECT_TRUE(fails_with(ErrorKind::kData, "disagree in 5 places", load));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "missing \"" + kQuery + "\" [8,8] (did you mean \"model.layers.1.self_attn.q_projj.weight\"?)", load));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "\"model.norm.weight\" has shape [9], config.json asks for [8]", load));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "unclaimed \"something.else\" [2,3]", load));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "unclaimed \"model.layers.1.self_attn.q_projj.weight\" [8,8] (the nearest known name is \"" + kQuery + "\")", load));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "\"model.layers.0.mlp.up_proj.weight\" is stored as Int", load));
}

TEST(LoadDecoder, PassesOverRotaryFrequenciesOfOldFolders) {
  const ScratchFolder scratch;
  TinyModel model;
  model.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = at::zeros({2});
  EXPECT_NO_THROW(load_decoder(model.write(scratch), at::kFloat));
}

TEST(LoadDecoder, DecidesTheTieFromTheData) {
  const ScratchFolder scratch;
  std::string said;
  const LogSink before = set_log_sink([&](LogLevel, std::string_view line) { said += line; });
  TinyModel same;
  same.tensors[kHead] = same.tensors.at(kEmbedding);
  EXPECT_TRUE(load_decoder(same.write(scratch, "same"), at::kFloat).head_tied);
  EXPECT_EQ(said, "");

  TinyModel other;
  other.tensors[kHead] = other.tensors.at(kEmbedding) + 1;
  const models::Decoder decoder = load_decoder(other.write(scratch, "other"), at::kFloat);
  set_log_sink(before);
  EXPECT_FALSE(decoder.head_tied);
  EXPECT_FALSE(decoder.config.tied_head);
  EXPECT_EQ(decoder.config.source.at("tie_word_embeddings"), false);
  EXPECT_TRUE(at::equal(decoder.head.weight_OI, other.tensors.at(kHead)));
  EXPECT_NE(said.find("stored with other values"), std::string::npos);

  TinyModel missing(false);
  missing.tensors.erase(kHead);
  EXPECT_TRUE(fails_with(ErrorKind::kData, "missing \"lm_head.weight\"", [&] { load_decoder(missing.write(scratch, "missing"), at::kFloat); }));
}

TEST(LoadDecoder, RefusesWeightsThatAreNotFinite) {
  const ScratchFolder scratch;
  TinyModel model;
  model.tensors.at(kQuery) = at::full({8, 8}, 1e300, at::kDouble);  // finite as stored, infinite as f32
  EXPECT_TRUE(fails_with(ErrorKind::kData, "\"" + kQuery + "\" is not finite at element 0 as Float", [&] { load_decoder(model.write(scratch), at::kFloat); }));
}

TEST(LoadDecoder, TrainingInPlaceNeverReachesTheFile) {
  const ScratchFolder scratch;
  const TinyModel model;
  const auto folder = model.write(scratch);
  const std::string before = base_hash(folder);
  models::Decoder decoder = load_decoder(folder, at::kFloat);
  for (const models::NamedTensor& named : decoder.tensors()) named.tensor->zero_();
  EXPECT_EQ(base_hash(folder), before);
}

TEST(FolderTensors, SaysWhatIsThereInsteadOfWeights) {
  const ScratchFolder scratch;
  const auto open = [&] { FolderTensors tensors(scratch.path()); };
  EXPECT_TRUE(fails_with(ErrorKind::kData, "holds neither model.safetensors", open));
  write_file(scratch / "x.gguf", "GGUF");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "alambic import", open));
  std::filesystem::remove(scratch / "x.gguf");
  write_file(scratch / "pytorch_model.bin", "\x80\x02");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "can run code when opened and are never read", open));
  write_file(scratch / "adapter_model.safetensors", "");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "--adapter", open));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "is not a model folder", [&] { FolderTensors tensors(scratch / "absent"); }));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "alambic import", [&] { FolderTensors tensors(scratch / "model.gguf"); }));
}

// Two shards of one tensor each, with an index that a test may bend.
class Shards {
 public:
  explicit Shards(const ScratchFolder& scratch) : folder(scratch.path()) {
    write_safetensors(folder / kFirst, {{"a", at::full({2}, 1.0)}});
    write_safetensors(folder / kSecond, {{"b", at::full({3}, 2.0)}});
  }
  void index(const Json& weight_map) const { write_file(folder / "model.safetensors.index.json", Json{{"metadata", Json::object()}, {"weight_map", weight_map}}.dump()); }
  void open() const { FolderTensors tensors(folder); }
  std::filesystem::path folder;
  static constexpr const char *kFirst = "model-00001-of-00002.safetensors", *kSecond = "model-00002-of-00002.safetensors";
};

TEST(FolderTensors, ReadsShards) {
  const ScratchFolder scratch;
  const Shards shards(scratch);
  shards.index({{"a", Shards::kFirst}, {"b", Shards::kSecond}});
  const FolderTensors tensors(shards.folder);
  EXPECT_EQ(tensors.names(), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(tensors.tensor("b")[2].item<float>(), 2);
  EXPECT_EQ(tensors.shape("b"), std::vector<std::int64_t>{3});
  EXPECT_TRUE(fails_with(ErrorKind::kData, "holds no tensor \"c\"", [&] { tensors.tensor("c"); }));
}

TEST(FolderTensors, NamesNeverLeaveTheFolder) {
  const ScratchFolder scratch;
  const Shards shards(scratch);
  for (const char* name : {"../model-00002-of-00002.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "x.bin"}) {
    shards.index({{"a", Shards::kFirst}, {"b", name}});
    EXPECT_TRUE(fails_with(ErrorKind::kData, "which is no name of a safetensors file in this folder", [&] { shards.open(); })) << name;
  }
  shards.index({{"a", Shards::kFirst}, {"b", 7}});
  EXPECT_TRUE(fails_with(ErrorKind::kData, "no name of a safetensors file", [&] { shards.open(); }));
}

TEST(FolderTensors, IndexAndShardsMustAgree) {
  const ScratchFolder scratch;
  const Shards shards(scratch);
  const auto open = [&] { shards.open(); };
  shards.index({{"a", Shards::kFirst}});
  EXPECT_TRUE(fails_with(ErrorKind::kData, "model-00002-of-00002.safetensors is in the folder but not in the index", open));
  shards.index({{"a", Shards::kFirst}, {"b", Shards::kSecond}, {"c", "model-00003-of-00003.safetensors"}});
  EXPECT_TRUE(fails_with(ErrorKind::kData, "model-00003-of-00003.safetensors is missing", open));
  shards.index({{"a", Shards::kSecond}, {"b", Shards::kFirst}});
  EXPECT_TRUE(fails_with(ErrorKind::kData, "tensor \"b\" is not in model-00001-of-00002.safetensors", open));
  EXPECT_TRUE(fails_with(ErrorKind::kData, "tensor \"b\" in model-00002-of-00002.safetensors is not listed for it", open));
  shards.index({{"a", Shards::kFirst}, {"b", Shards::kSecond}, {"c", Shards::kSecond}});
  EXPECT_TRUE(fails_with(ErrorKind::kData, "tensor \"c\" is not in model-00002-of-00002.safetensors", open));
  shards.index(Json::object());
  EXPECT_TRUE(fails_with(ErrorKind::kData, "\"weight_map\" must name", open));
  write_file(shards.folder / "model.safetensors.index.json", R"({"weight_map":{"a":"x.safetensors","a":"y.safetensors"}})");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "\"a\" is given twice", open));
  shards.index({{"a", Shards::kFirst}, {"b", Shards::kSecond}});
  write_safetensors(shards.folder / "model.safetensors", {{"a", at::zeros({1})}});
  EXPECT_TRUE(fails_with(ErrorKind::kData, "holds both", open));
}

TEST(FolderTensors, FollowsLinksOnlyWithinTheFolderOrTheHubCache) {
  const ScratchFolder scratch;
  const std::filesystem::path outside = scratch / "outside", folder = scratch / "folder", snapshot = scratch / "repo/snapshots/abc", blobs = scratch / "repo/blobs";
  for (const auto& made : {outside, folder, snapshot, blobs}) std::filesystem::create_directories(made);
  write_safetensors(outside / "w", {{"a", at::zeros({1})}});
  std::filesystem::create_symlink(outside / "w", folder / "model.safetensors");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "symbolic link out of the folder", [&] { FolderTensors tensors(folder); }));

  std::filesystem::remove(folder / "model.safetensors");
  std::filesystem::copy_file(outside / "w", folder / "weights");
  std::filesystem::create_symlink("weights", folder / "model.safetensors");
  EXPECT_EQ(FolderTensors(folder).names().size(), 1u);

  std::filesystem::copy_file(outside / "w", blobs / "0123");
  std::filesystem::create_symlink("../../blobs/0123", snapshot / "model.safetensors");
  EXPECT_EQ(FolderTensors(snapshot).names().size(), 1u);
  std::filesystem::remove(snapshot / "model.safetensors");
  std::filesystem::create_symlink(outside / "w", snapshot / "model.safetensors");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "symbolic link out of the folder", [&] { FolderTensors tensors(snapshot); }));
  std::filesystem::remove(snapshot / "model.safetensors");
  std::filesystem::create_symlink("../../blobs/4567", snapshot / "model.safetensors");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "leads nowhere", [&] { FolderTensors tensors(snapshot); }));
  std::filesystem::create_directory(folder / "model.safetensors.index.json");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "not a regular file", [&] { FolderTensors tensors(folder); }));
}

TEST(BaseHash, IsOfTheContentsAndNotOfThePlace) {
  const ScratchFolder scratch;
  TinyModel model;
  const std::string first = base_hash(model.write(scratch, "one"));
  EXPECT_EQ(first.size(), 64u);
  EXPECT_EQ(base_hash(model.write(scratch, "two")), first);
  model.tensors.at(kQuery)[0][0] += 1;
  const std::string second = base_hash(model.write(scratch, "three"));
  EXPECT_NE(second, first);
  model.config["rms_norm_eps"] = 1e-6;
  EXPECT_NE(base_hash(model.write(scratch, "four")), second);
}

TEST(WriteWeights, OneFileOrShardsThatReadBack) {
  const ScratchFolder scratch;
  const std::vector<std::pair<std::string, std::vector<std::int64_t>>> shapes = {{"c", {10}}, {"a", {4, 5}}, {"b", {30}}, {"d", {}}};
  std::vector<at::Tensor> values;
  for (const auto& [name, shape] : shapes) values.push_back(at::randn(shape));
  std::vector<std::size_t> asked;
  const auto make = [&](std::size_t i) {
    asked.push_back(i);
    return values[i];
  };

  std::filesystem::create_directories(scratch / "one");
  const auto one = write_weights(scratch / "one", shapes, at::kBFloat16, make);
  ASSERT_EQ(one.size(), 1u);
  EXPECT_EQ(one[0].first, "model.safetensors");
  EXPECT_EQ(one[0].second, sha256_of_file(scratch / "one/model.safetensors"));
  std::sort(asked.begin(), asked.end());
  EXPECT_EQ(asked, (std::vector<std::size_t>{0, 1, 2, 3}));
  EXPECT_TRUE(at::equal(FolderTensors(scratch / "one").tensor("a"), values[1].to(at::kBFloat16)));

  std::filesystem::create_directories(scratch / "many");
  const auto many = write_weights(scratch / "many", shapes, at::kFloat, make, 120);  // c and a fit into 120 bytes, b fills a shard alone
  std::vector<std::string> names;
  for (const auto& [name, hash] : many) {
    names.push_back(name);
    EXPECT_EQ(hash, sha256_of_file(scratch / "many" / name));
  }
  EXPECT_EQ(names, (std::vector<std::string>{"model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors", "model.safetensors.index.json"}));
  const Json index = read_json_file(scratch / "many/model.safetensors.index.json");
  EXPECT_EQ(index["metadata"]["total_size"], 61 * 4);
  EXPECT_EQ(index["metadata"]["total_parameters"], 61);
  EXPECT_EQ(index["weight_map"]["a"], "model-00001-of-00003.safetensors");
  EXPECT_EQ(index["weight_map"]["d"], "model-00003-of-00003.safetensors");
  const FolderTensors read(scratch / "many");
  for (std::size_t i = 0; i < shapes.size(); ++i) EXPECT_TRUE(at::equal(read.tensor(shapes[i].first), values[i])) << shapes[i].first;
}

TEST(CopyCompanions, TakesTextsAndTokenizerButNeverTheCardOrWeights) {
  const ScratchFolder scratch;
  const auto from = scratch / "from", to = scratch / "to";
  std::filesystem::create_directories(from / "additional_chat_templates");
  std::filesystem::create_directories(to);
  const std::vector<std::string> wanted = {"LICENSE", "NOTICE.txt", "USE_POLICY.md", "additional_chat_templates/tool_use.jinja", "chat_template.jinja", "config.json",
                                           "generation_config.json", "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"};
  for (const std::string& name : wanted) write_file(from / name, "text of " + name);
  for (const char* name : {"README.md", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "additional_chat_templates/x.txt", "training_args.bin"}) write_file(from / name, "x");
  EXPECT_EQ(copy_companions(from, to), wanted);
  std::vector<std::string> copied;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(to))
    if (entry.is_regular_file()) copied.push_back(entry.path().lexically_relative(to).string());
  std::sort(copied.begin(), copied.end());
  EXPECT_EQ(copied, wanted);
  EXPECT_EQ(read_file(to / "LICENSE"), "text of LICENSE");
  write_file(scratch / "secret", "x");
  std::filesystem::create_symlink(scratch / "secret", from / "NOTICE");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "symbolic link out of the folder", [&] { copy_companions(from, to); }));
}

}  // namespace
}  // namespace alambic::checkpoints
