// SPDX-License-Identifier: Apache-2.0
#include "train/memory.h"

#include <gtest/gtest.h>

#include "checkpoints/hf_folder.h"
#include "models/fused_blocks.h"
#include "tests/golden.h"
#include "tests/support.h"
#include "train/run_folder.h"

namespace alambic::train {
namespace {

class PrepareBlocks : public ::testing::Test {
 protected:
  PrepareBlocks() : decoder_(checkpoints::load_decoder(testing::golden_path("peft/llama_tied"), at::kFloat)) {
    config_.lora.rank = 4;
    config_.data.row_length = 1 << 16;  // so long that what is kept outweighs the rest
    make_trainable(decoder_, config_);
  }
  models::Keep chosen(std::uint64_t available, const std::string& memory = "auto") {
    config_.memory = memory;
    EXPECT_EQ(prepare_blocks(decoder_, config_, "", available), "");
    return decoder_.keep;
  }
  /// What a machine must have for a run that keeps so much: the rest of it is left to others.
  std::uint64_t needed(models::Keep keep) {
    EXPECT_EQ(models::use_fused_blocks(decoder_), "");
    decoder_.keep = keep;
    std::uint64_t trained = 0;
    for (const models::NamedTensor& tensor : lora::trainable(decoder_)) trained += tensor.tensor->nbytes();
    return static_cast<std::uint64_t>(static_cast<double>(estimate_memory(decoder_, 2 * trained, config_.data.row_length).total()) / 0.85);
  }

  models::Decoder decoder_;
  TrainConfig config_;
};

TEST_F(PrepareBlocks, AutoKeepsAsMuchAsFits) {
  using models::Keep;
  const std::uint64_t all = needed(Keep::kAll), no_mlp = needed(Keep::kNoMlp), inputs = needed(Keep::kInputs);
  ASSERT_GT(all, no_mlp);
  ASSERT_GT(no_mlp, inputs);
  constexpr std::uint64_t kLittle = 1024;
  EXPECT_EQ(chosen(all + kLittle), Keep::kAll);
  EXPECT_EQ(chosen(all - kLittle), Keep::kNoMlp);
  EXPECT_EQ(chosen(no_mlp + kLittle), Keep::kNoMlp);
  EXPECT_EQ(chosen(no_mlp - kLittle), Keep::kInputs);
  EXPECT_EQ(chosen(inputs + kLittle), Keep::kInputs);
  EXPECT_EQ(chosen(inputs - kLittle), Keep::kInputs);  // nothing fits: the least, and `plan` warns
  EXPECT_EQ(chosen(1), Keep::kInputs);
  EXPECT_EQ(chosen(0), Keep::kAll);  // unknown
}

TEST_F(PrepareBlocks, APolicyThatIsNamedIsTakenWhateverThereIs) {
  EXPECT_EQ(chosen(1, "store"), models::Keep::kAll);
  EXPECT_EQ(chosen(1, "mlp"), models::Keep::kNoMlp);
  EXPECT_EQ(chosen(std::uint64_t{1} << 50, "block"), models::Keep::kInputs);
}

}  // namespace
}  // namespace alambic::train
