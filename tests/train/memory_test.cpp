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
    EXPECT_EQ(prepare_blocks(decoder_, config_, "", num_ranks_, available), "");
    return decoder_.keep;
  }
  /// What a machine must have for a run that keeps so much: the rest of it is left to others.
  std::uint64_t needed(models::Keep keep) {
    EXPECT_EQ(models::use_fused_blocks(decoder_), "");
    decoder_.keep = keep;
    std::uint64_t trained = 0;
    for (const models::NamedTensor& tensor : lora::trainable(decoder_)) trained += tensor.tensor->nbytes();
    return static_cast<std::uint64_t>(static_cast<double>(shared_by(estimate_memory(decoder_, 2 * trained, config_.data.row_length), decoder_, config_, num_ranks_).total()) / 0.85);
  }

  models::Decoder decoder_;
  TrainConfig config_;
  int num_ranks_ = 1;
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

TEST_F(PrepareBlocks, AutoCountsWhatARankShares) {
  using models::Keep;
  constexpr std::uint64_t kLittle = 1024;
  for (const char* method : {"lora", "full"}) {
    num_ranks_ = 1;
    config_.method = method;
    config_.ranks.shard = false;
    config_.data.row_length = 64;  // so short that what is shared is much of the whole
    decoder_ = checkpoints::load_decoder(testing::golden_path("peft/llama_tied"), at::kFloat);
    make_trainable(decoder_, config_);
    const std::uint64_t whole = needed(Keep::kAll);
    EXPECT_EQ(chosen(whole + kLittle), Keep::kAll);
    num_ranks_ = 4;
    EXPECT_EQ(needed(Keep::kAll), whole);
    config_.ranks.shard = true;
    config_.data.batches_per_step = 8;
    const std::uint64_t of_four = needed(Keep::kAll);
    ASSERT_NE(of_four, whole) << method;
    EXPECT_EQ(chosen(of_four + kLittle), Keep::kAll) << method;
    EXPECT_NE(chosen(of_four - kLittle), Keep::kAll) << method;
  }
}

TEST_F(PrepareBlocks, RanksOfAMachineShareItsMemory) {
  const std::uint64_t all = available_to_rank(at::kCPU, 1), a_quarter = available_to_rank(at::kCPU, 4);
  EXPECT_GT(a_quarter, 0u);
  EXPECT_NEAR(static_cast<double>(a_quarter), static_cast<double>(all) / 4, 0.05 * static_cast<double>(all));  // others take and give meanwhile
}

TEST_F(PrepareBlocks, APolicyThatIsNamedIsTakenWhateverThereIs) {
  EXPECT_EQ(chosen(1, "store"), models::Keep::kAll);
  EXPECT_EQ(chosen(1, "mlp"), models::Keep::kNoMlp);
  EXPECT_EQ(chosen(std::uint64_t{1} << 50, "block"), models::Keep::kInputs);
}

}  // namespace
}  // namespace alambic::train
