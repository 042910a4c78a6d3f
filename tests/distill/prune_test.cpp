// SPDX-License-Identifier: Apache-2.0
// Importance and students against transformers (tests/oracle/prune_oracle.py), and what needs no other program.
#include "distill/prune.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include "checkpoints/manifest.h"
#include "checkpoints/safetensors.h"
#include "core/log.h"
#include "distill/parts.h"
#include "models/fused_blocks.h"
#include "tests/closeness.h"
#include "tests/distill/students.h"
#include "tests/support.h"

namespace alambic::distill {
namespace {

using testing::decoder_of;
using testing::fails_with;
using testing::Golden;
using testing::is_close;
using testing::is_close_to_scale;
using testing::ScratchFolder;

Golden oracle() { return Golden("prune.safetensors"); }
Json sizes_of(const std::string& family) { return parse_json(oracle().metadata().at("sizes"), "sizes")[family]; }

at::Tensor logits_of(const fs::path& folder, const Golden& golden) {
  const at::NoGradGuard evaluating;
  const models::Decoder decoder = checkpoints::load_decoder(folder, at::kFloat);
  return decoder.logits_TV(decoder.hidden_TD(testing::input_of(golden)));
}

/// One family's model and store in a folder of the test's own, and a config that prunes it.
struct Case {
  Golden golden;
  ScratchFolder scratch;
  PruneConfig config;
  LogSink old = set_log_sink([](LogLevel, std::string_view) {});
  explicit Case(const std::string& family = "llama") : golden("families/" + family + ".safetensors") {
    config.model = scratch / "base";
    config.output = scratch / "student";
    config.calibration.stores = {(scratch / "store").string()};
    testing::write_model(golden, config.model);
    testing::write_store(golden, scratch / "store");
  }
  ~Case() { set_log_sink(old); }
  void set_sizes(const Json& sizes) {
    config.sizes.hidden_size = sizes.value("hidden_size", 0);
    config.sizes.intermediate_size = sizes.value("intermediate_size", 0);
    config.sizes.num_attention_heads = sizes.value("num_attention_heads", 0);
    config.sizes.num_key_value_heads = sizes.value("num_key_value_heads", 0);
    config.sizes.num_hidden_layers = sizes.value("num_hidden_layers", 0);
  }
  ::testing::AssertionResult refused(ErrorKind kind, const std::string& words) const {
    const ::testing::AssertionResult result = fails_with(kind, words, [&] { prune(config); });
    for (const auto& entry : fs::directory_iterator(scratch.path()))
      if (entry.path().filename().string().starts_with(".tmp-") || entry.path() == config.output) return ::testing::AssertionFailure() << "left behind: " << entry.path();
    return result;
  }
};

class FamilyTest : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Families, FamilyTest, ::testing::ValuesIn(testing::family_goldens()), [](const auto& test) { return test.param; });

TEST_P(FamilyTest, ImportanceIsWhatHooksInTransformersSee) {
  const Case test(GetParam());
  const Golden expected = oracle();
  SCOPED_TRACE(expected.provenance());
  const models::Decoder decoder = decoder_of(test.golden);
  std::vector<data::TokenStore> stores;
  stores.emplace_back(test.scratch / "store");
  for (const std::string aggregate : {"mean-l2", "mean", "rms"}) {
    CalibrationConfig config = test.config.calibration;
    config.aggregate = aggregate;
    const Importance importance = measure_importance(decoder, stores, config);
    const auto of = [&](const char* part) { return expected[GetParam() + "." + aggregate + "." + part]; };
    EXPECT_TRUE(is_close(importance.neurons_LF, of("neurons"), {.relative = 1e-5, .absolute = 1e-7})) << aggregate;
    EXPECT_TRUE(is_close(importance.heads_LH, of("heads"), {.relative = 1e-5, .absolute = 1e-7})) << aggregate;
    EXPECT_TRUE(is_close(importance.channels_D, of("channels"), {.relative = 1e-5, .absolute = 1e-7})) << aggregate;
    EXPECT_TRUE(is_close(importance.block_influence_L, expected[GetParam() + ".influence"], {.absolute = 1e-6}));
    EXPECT_EQ(importance.tokens, 20);
    EXPECT_EQ(importance.sequences, 2);
  }
}

TEST_P(FamilyTest, AStudentEqualsTheModelCutByHand) {
  Case test(GetParam());
  const Golden expected = oracle();
  SCOPED_TRACE(expected.provenance());
  test.set_sizes(sizes_of(GetParam()));
  const PruneReport report = prune(test.config);
  EXPECT_TRUE(is_close_to_scale(logits_of(report.output, test.golden), expected[GetParam() + ".logits"], 1e-5));
  EXPECT_EQ(report.parameters, models::read_model_config(report.output).num_parameters());
  EXPECT_LT(report.parameters, report.parameters_before);
  EXPECT_LT(report.bytes, report.bytes_before);
  checkpoints::check_manifest(report.output);
  const std::string card = read_file(report.output / "README.md");
  EXPECT_NE(card.find("license: apache-2.0"), std::string::npos);
  EXPECT_NE(card.find("not trained since"), std::string::npos);
}

TEST_P(FamilyTest, AStudentOfTheFullSizeIsTheModelBitForBit) {
  Case test(GetParam());
  test.config.keep = 1;
  test.config.shrink = {"hidden", "mlp", "heads", "depth"};
  const PruneReport report = prune(test.config);
  EXPECT_EQ(report.parameters, report.parameters_before);
  const checkpoints::FolderTensors before(test.config.model), after(report.output);
  EXPECT_EQ(after.names(), before.names());
  for (const std::string& name : before.names()) EXPECT_TRUE(at::equal(after.tensor(name), before.tensor(name))) << name;
  EXPECT_EQ(read_json_file(report.output / "config.json"), read_json_file(test.config.model / "config.json"));
}

// Neurons and heads whose way out is zero are those of no activation, and the model is the same without them.
TEST_P(FamilyTest, PartsThatAreZeroAreDroppedWithoutAChange) {
  Case test(GetParam());
  const models::ModelConfig model = models::read_model_config(test.config.model);
  const std::int64_t S = model.head_size, kept_heads = model.num_kv_heads;  // one query head of each group is left
  fs::rename(test.config.model, test.scratch / "whole");
  fs::create_directories(test.config.model);
  fs::copy(test.scratch / "whole" / "config.json", test.config.model / "config.json");
  const std::vector<TensorPlace> places = tensor_places(model);
  const checkpoints::FolderTensors whole(test.scratch / "whole");
  const auto rows = [](const at::Tensor& x, std::int64_t first, std::int64_t size) { x.narrow(0, first, size).zero_(); };
  checkpoints::write_weights(test.config.model, models::expected_shapes(model), at::kFloat, [&](std::size_t i) {
    at::Tensor x = whole.tensor(places[i].name).clone();
    const std::int64_t F = model.intermediate_size, gone = F / 2;
    if (places[i].slot == models::Slot::kUp) rows(x, gone, F - gone);
    if (places[i].slot == models::Slot::kGateUp) rows(x, F + gone, F - gone);
    // Values of every second group are zero, so its heads give nothing.
    if (places[i].slot == models::Slot::kValue) rows(x, S, S);
    if (places[i].slot == models::Slot::kQueryKeyValue) rows(x, (model.num_heads + model.num_kv_heads + 1) * S, S);
    return x;
  });
  ASSERT_EQ(kept_heads, 2);
  test.config.sizes.intermediate_size = model.intermediate_size / 2;
  test.config.sizes.num_key_value_heads = 1;
  if (model.rope.long_from > 0) {  // lists of LongRoPE tie a head's size to the hidden size
    EXPECT_TRUE(test.refused(ErrorKind::kUsage, "instead of 8"));
    test.config.sizes.num_key_value_heads = 0;
  }
  const PruneReport report = prune(test.config);
  EXPECT_EQ(report.shape.kv_heads, model.rope.long_from > 0 ? 2 : 1);
  EXPECT_TRUE(is_close_to_scale(logits_of(report.output, test.golden), logits_of(test.config.model, test.golden), 1e-6));
}

TEST_P(FamilyTest, LayersAreKeptWithTheirWindowsAndRotations) {
  Case test(GetParam());
  const models::ModelConfig model = models::read_model_config(test.config.model);
  test.config.calibration.stores = {};  // nothing has to be scored
  test.config.sizes.layers = {std::to_string(model.num_layers - 1)};
  const PruneReport report = prune(test.config);
  const models::ModelConfig student = models::read_model_config(report.output);
  ASSERT_EQ(student.num_layers, 1);
  EXPECT_EQ(student.layers[0].window, model.layers.back().window);
  EXPECT_EQ(student.layers[0].use_rope, model.layers.back().use_rope);
  EXPECT_EQ(student.layers[0].local_rope, model.layers.back().local_rope);
  const models::Decoder expected = with_layers(decoder_of(test.golden), {model.num_layers - 1});
  const at::NoGradGuard evaluating;
  EXPECT_TRUE(is_close_to_scale(logits_of(report.output, test.golden), expected.logits_TV(expected.hidden_TD(testing::input_of(test.golden))), 1e-6));
}

TEST(Importance, DoesNotDependOnWhatStandsBesideASequence) {
  Case test;
  const models::Decoder decoder = decoder_of(test.golden);
  ImportanceSums sums(decoder, "mean-l2");
  const models::Input input = testing::input_of(test.golden);
  sums.add(input.tokens_T.narrow(0, 0, 13));
  sums.add(input.tokens_T.narrow(0, 13, 7));
  const Importance alone = sums.result();
  std::vector<data::TokenStore> stores;
  stores.emplace_back(test.scratch / "store");
  const Importance together = measure_importance(decoder, stores, test.config.calibration);  // the store's two documents are one row
  EXPECT_TRUE(at::equal(alone.neurons_LF, together.neurons_LF));
  EXPECT_TRUE(at::equal(alone.channels_D, together.channels_D));
  EXPECT_TRUE(at::equal(alone.heads_LH, together.heads_LH));
  EXPECT_TRUE(at::equal(alone.block_influence_L, together.block_influence_L));
  models::Decoder fused = decoder_of(test.golden);
  ASSERT_EQ(models::use_fused_blocks(fused), "");
  EXPECT_TRUE(is_close_to_scale(measure_importance(fused, stores, test.config.calibration).neurons_LF, alone.neurons_LF, 1e-6)) << "an observed pass is not fused";
}

TEST(Importance, OfEqualScoresTheEarlierIsKept) {
  EXPECT_EQ(largest(at::tensor({1.0, 3.0, 3.0, 0.0, 3.0}), 2), (std::vector<std::int64_t>{1, 2}));
  EXPECT_EQ(largest(at::tensor({1.0, 3.0, 2.0, 0.0}), 3), (std::vector<std::int64_t>{0, 1, 2}));
}

TEST(Importance, ByLossTheLayerGoesWithoutWhichTheLossIsLeast) {
  Case test("smollm3");
  const at::NoGradGuard evaluating;
  const models::Decoder decoder = decoder_of(test.golden);
  std::vector<data::TokenStore> stores;
  stores.emplace_back(test.scratch / "store");
  const std::vector<std::int64_t> kept = layers_by_loss(decoder, 2, stores, test.config.calibration);
  // Again by hand: the loss of every choice, from logits.
  const auto nats = [&](const std::vector<std::int64_t>& layers) {
    const models::Decoder student = with_layers(decoder, layers);
    double sum = 0;
    for_each_sequence(stores, test.config.calibration, [&](const Sequence& sequence) {
      const std::int64_t T = sequence.tokens_T.size(0);
      const at::Tensor logits = student.logits_TV(student.hidden_TD({.tokens_T = sequence.tokens_T, .positions_T = at::arange(T), .document_lengths = {T}})).to(at::kDouble);
      for (std::int64_t t = 0; t + 1 < T; ++t) sum -= logits[t].log_softmax(0)[sequence.tokens_T[t + 1].item<std::int64_t>()].item<double>();
    });
    return sum;
  };
  std::vector<std::int64_t> left = {0, 1, 2, 3};
  while (left.size() > 2) {
    std::vector<std::int64_t> best;
    for (std::size_t i = 0; i < left.size(); ++i) {
      std::vector<std::int64_t> without = left;
      without.erase(without.begin() + static_cast<std::ptrdiff_t>(i));
      if (best.empty() || nats(without) < nats(best)) best = without;
    }
    left = best;
  }
  EXPECT_EQ(kept, left);
}

TEST(StudentShape, KeepsAShareByOneFactor) {
  models::ModelConfig model = models::read_model_config(parse_json(R"({"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": true})", "config.json"), "config.json");
  const auto shape = [&](double keep, const std::vector<std::string>& shrink, const SizesConfig& sizes = {}) { return chosen_shape(model, sizes, keep, shrink, 32, model.vocabulary_size, false); };
  for (const std::vector<std::string>& shrink : std::vector<std::vector<std::string>>{{"hidden", "mlp"}, {"depth"}, {"hidden", "mlp", "heads", "depth"}, {"mlp"}}) {
    const Shape found = shape(0.6, shrink);
    const double share = static_cast<double>(parameters_of(model, found)) / static_cast<double>(model.num_parameters());
    EXPECT_LE(share, 0.6);
    EXPECT_GT(share, 0.56) << to_line(found.json());
    EXPECT_EQ(found.hidden % 32, 0);
    EXPECT_EQ(found.intermediate % 32, 0);
  }
  EXPECT_EQ(shape(0.6, {"hidden", "mlp"}), (Shape{49152, 416, 1088, 9, 3, 30}));
  EXPECT_EQ(shape(0.6, {"depth"}), (Shape{49152, 576, 1536, 9, 3, 14}));
  EXPECT_EQ(shape(1, {"hidden", "mlp", "heads", "depth"}), shape_of(model));
  // A size that is given stays; the others make up for it.
  const Shape wide = shape(0.6, {"hidden", "mlp"}, {.hidden_size = 512, .layers = {}});
  EXPECT_EQ(wide.hidden, 512);
  EXPECT_LT(wide.intermediate, 1088);
  EXPECT_EQ(shape(0, {}, {.num_attention_heads = 6, .layers = {}}), (Shape{49152, 576, 1536, 6, 3, 30})) << "as many key-value heads as can stay";
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "not a multiple of", [&] { shape(0, {}, {.num_attention_heads = 7, .num_key_value_heads = 3, .layers = {}}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "is more than the 576", [&] { shape(0, {}, {.hidden_size = 640, .layers = {}}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "4 query heads for each", [&] { shape(0, {}, {.num_attention_heads = 8, .num_key_value_heads = 2, .layers = {}}); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "cannot be reached", [&] { shape(0.1, {"depth"}); }));
  EXPECT_EQ(layer_numbers({"3", "0..1"}, 4), (std::vector<std::int64_t>{0, 1, 3}));
  for (const char* wrong : {"4", "-1", "x", "1..", "3..1", "0..4", ""}) EXPECT_TRUE(fails_with(ErrorKind::kUsage, "sizes.layers", [&] { layer_numbers({wrong}, 4); })) << wrong;
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "named twice", [&] { layer_numbers({"0..2", "1"}, 4); }));
}

TEST(Prune, FreshStudentsAreNormalAndTheSameEachTime) {
  for (const std::string family : {"llama", "gemma3_text"}) {
    Case test(family);
    test.config.weights = "fresh";
    test.config.calibration.stores = {};
    test.config.sizes = {.hidden_size = 64, .num_hidden_layers = 5, .layers = {}};  // larger than the model
    const PruneReport report = prune(test.config);
    test.config.output = test.scratch / "again";
    prune(test.config);
    test.config.output = test.scratch / "other";
    test.config.seed = 1;
    prune(test.config);
    const models::ModelConfig student = models::read_model_config(report.output);
    EXPECT_EQ(student.num_layers, 5);
    EXPECT_EQ(student.layers[4].window, models::read_model_config(test.config.model).layers[4 % static_cast<std::size_t>(report.shape_before.layers)].window);
    const checkpoints::FolderTensors first(report.output), again(test.scratch / "again"), other(test.scratch / "other");
    for (const TensorPlace& place : tensor_places(student)) {
      const at::Tensor x = first.tensor(place.name);
      EXPECT_TRUE(at::equal(x, again.tensor(place.name))) << place.name;
      if (place.is_bias) {
        EXPECT_EQ(x.abs().max().item<float>(), 0) << place.name;
      } else if (place.shape.size() == 1) {
        EXPECT_TRUE(at::equal(x + student.family->norm_weight_offset, at::full(place.shape, 1.0f))) << place.name;
      } else {
        EXPECT_NEAR(x.std().item<double>(), 0.02, 0.002) << place.name;
        EXPECT_FALSE(at::equal(x, other.tensor(place.name))) << place.name;
      }
    }
    EXPECT_EQ(first.tensor(tensor_places(student)[0].name)[3].abs().max().item<float>() == 0, student.pad_id == 3) << "transformers begins the padding token at zero";
  }
}

TEST(Prune, KeepsTypesAndIsDoneOnce) {
  Case test;
  const checkpoints::FolderTensors whole(test.config.model);
  fs::create_directories(test.scratch / "bf16");
  fs::copy(test.config.model / "config.json", test.scratch / "bf16" / "config.json");
  std::vector<checkpoints::TensorToWrite> list;  // norms stay f32
  for (const std::string& name : whole.names()) list.push_back({name, whole.shape(name).size() == 2 ? at::kBFloat16 : at::kFloat, whole.shape(name)});
  checkpoints::write_weights(test.scratch / "bf16", list, [&](std::size_t i) { return whole.tensor_as(list[i].name, list[i].type); });
  test.config.model = test.scratch / "bf16";
  test.set_sizes(sizes_of("llama"));
  EXPECT_FALSE(prune(test.config).already_done);
  const checkpoints::FolderTensors student(test.config.output);
  for (const std::string& name : student.names()) EXPECT_EQ(student.type(name), student.shape(name).size() == 2 ? at::kBFloat16 : at::kFloat) << name;
  const PruneReport again = prune(test.config);
  EXPECT_TRUE(again.already_done);
  EXPECT_EQ(again.shape.hidden, 24);
  test.config.sizes.hidden_size = 16;
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, "exists and is another folder", [&] { prune(test.config); }));
  test.config.sizes.hidden_size = 24;
  write_file(test.config.output / "config.json", "{}");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "config.json", [&] { prune(test.config); }));
}

TEST(Prune, MeasuresBothWhereAStoreIsGiven) {
  Case test;
  test.set_sizes(sizes_of("llama"));
  test.config.evaluation.stores.push_back({.name = "held-out", .store = test.scratch / "store"});
  const PruneReport report = prune(test.config);
  ASSERT_EQ(report.evaluation.size(), 1u);
  for (const char* when : {"before", "after"}) {
    EXPECT_EQ(report.evaluation[0][when]["tokens"], 18) << when;
    EXPECT_GT(report.evaluation[0][when]["bits_per_byte"].get<double>(), 0);
  }
  EXPECT_NE(report.evaluation[0]["before"]["nats"], report.evaluation[0]["after"]["nats"]);
  EXPECT_NE(read_file(report.output / "README.md").find("bits per UTF-8 byte, held-out"), std::string::npos);
}

TEST(Prune, RefusesWhatCannotBeMeantOrRead) {
  Case test;
  EXPECT_TRUE(test.refused(ErrorKind::kUsage, "nothing would be pruned"));
  test.config.keep = 0.8;
  test.config.shrink = {"hiden"};
  EXPECT_TRUE(test.refused(ErrorKind::kUsage, "did you mean hidden?"));
  test.config.shrink = {"mlp", "heads"};
  test.config.round_to = 8;
  test.config.calibration.stores = {};
  EXPECT_TRUE(test.refused(ErrorKind::kUsage, "calibration.stores"));
  test.config.calibration.stores = {(test.scratch / "none").string()};
  EXPECT_TRUE(test.refused(ErrorKind::kData, "none"));
  test.config.calibration.stores = {(test.scratch / "store").string()};
  test.config.keep = 0.01;
  EXPECT_TRUE(test.refused(ErrorKind::kUsage, "cannot be reached"));
  test.config.keep = 0.8;
  test.config.sizes.layers = {"0..5"};
  EXPECT_TRUE(test.refused(ErrorKind::kUsage, "sizes.layers"));
  test.config.sizes.layers = {"0"};
  test.config.weights = "fresh";
  EXPECT_TRUE(test.refused(ErrorKind::kUsage, "fresh weights come from no layer"));
  test.config.weights = "pruned";
  test.config.sizes.layers = {};
  testing::write_store(test.golden, test.scratch / "wide", "", 1000);
  test.config.calibration.stores = {(test.scratch / "wide").string()};
  EXPECT_TRUE(test.refused(ErrorKind::kData, "vocabulary"));
  test.config.calibration.stores = {(test.scratch / "store").string()};
  // Weights that overflow in a product.
  const checkpoints::FolderTensors whole(test.config.model);
  fs::create_directories(test.scratch / "wild");
  fs::copy(test.config.model / "config.json", test.scratch / "wild" / "config.json");
  const auto shapes = models::expected_shapes(models::read_model_config(test.config.model));
  checkpoints::write_weights(test.scratch / "wild", shapes, at::kFloat, [&](std::size_t i) { return whole.tensor(shapes[i].first) * (shapes[i].first.find("mlp.") == std::string::npos ? 1 : 1e13); });
  test.config.model = test.scratch / "wild";
  EXPECT_TRUE(test.refused(ErrorKind::kNumerics, "not finite"));
}

}  // namespace
}  // namespace alambic::distill
