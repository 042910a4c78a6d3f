// SPDX-License-Identifier: Apache-2.0
#include "train/tensorboard.h"

#include <gtest/gtest.h>

#include <cstdlib>

#include "core/files.h"
#include "tests/support.h"
#include "train/run_log.h"

namespace alambic::train {
namespace {

TEST(EventWriter, Crc32cOfRfc3720) {  // appendix B.4
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8a9136aau);
  EXPECT_EQ(crc32c(std::string(32, '\xff')), 0x62a8ab43u);
  EXPECT_EQ(crc32c("123456789"), 0xe3069283u);
}

TEST(EventWriter, WritesWhatTensorBoardReads) {  // read back by tests/oracle/tensorboard_oracle.py, which sets the variable
  const testing::ScratchFolder scratch;
  const char* const wanted = std::getenv("ALAMBIC_TEST_OUTPUT");
  const fs::path folder = wanted ? fs::path(wanted) : scratch.path();
  {
    EventWriter first(folder, 0);
    for (int step = 1; step <= 6; ++step) first.scalar(step, "train/loss", 1.0 / step);
    first.text(6, "sample/0", "Il-Malti huwa lingwa \xc4\xa1" "dida");
    first.flush();
  }
  {
    EventWriter resumed(folder, 4);  // steps 5 and 6 are made again
    resumed.scalar(5, "train/loss", 50);
    resumed.flush();
  }
  std::size_t files = 0;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) files += entry.file_size() > 40;
  EXPECT_EQ(files, 2u);
}

TEST(LineFile, CutsWhatWasNotCommitted) {
  const testing::ScratchFolder folder;
  std::uint64_t committed = 0;
  {
    LineFile file(folder / "metrics.jsonl", 0);
    file.line({{"step", 1}});
    committed = file.sync();
    file.line({{"step", 2}});
  }
  LineFile resumed(folder / "metrics.jsonl", committed);
  resumed.line({{"step", 3}});
  EXPECT_EQ(read_file(folder / "metrics.jsonl"), "{\"step\":1}\n{\"step\":3}\n");
}

TEST(RunLog, DurationsReadWell) {
  EXPECT_EQ(duration_text(8.4), "8s");
  EXPECT_EQ(duration_text(200), "3m20s");
  EXPECT_EQ(duration_text(3720), "1h02m");
}

}  // namespace
}  // namespace alambic::train
