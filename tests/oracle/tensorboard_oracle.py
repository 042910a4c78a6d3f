# SPDX-License-Identifier: Apache-2.0
"""The tensorboard package reads the event files that the test program train_tests writes."""
import os
import subprocess
import tempfile

import oracle


def live(alambic):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    with tempfile.TemporaryDirectory() as scratch:
        program = alambic.parent.parent / "train" / "train_tests"
        subprocess.run([program, "--gtest_filter=EventWriter.WritesWhatTensorBoardReads"], check=True,
                       env={**os.environ, "ALAMBIC_TEST_OUTPUT": scratch}, stdout=subprocess.DEVNULL)
        events = EventAccumulator(scratch)
        events.Reload()
        read = [(event.step, event.value) for event in events.Scalars("train/loss")]
        # The resumed writer took steps 5 and 6 back and wrote step 5 again.
        expected = [(step, 1 / step) for step in range(1, 5)] + [(5, 50.0)]
        assert [step for step, _ in read] == [step for step, _ in expected], read
        oracle.assert_close([value for _, value in read], [value for _, value in expected], 1e-7, 0, "scalars")
        assert events.Tags()["tensors"] == ["sample/0"], events.Tags()
        text = events.Tensors("sample/0")[0]
        assert text.step == 6 and text.tensor_proto.string_val[0].decode() == "Il-Malti huwa lingwa \u0121dida"
        assert events.SummaryMetadata("sample/0").plugin_data.plugin_name == "text"
    print("tensorboard reads our scalars, our text and the take-back at a resume")


if __name__ == "__main__":
    oracle.main(live=live)
