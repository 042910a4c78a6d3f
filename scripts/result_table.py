# SPDX-License-Identifier: Apache-2.0
"""Shows what a finished run changed: result_table.py FOLDER, where FOLDER holds run/ and merged/. Standard library only."""
import json
import pathlib
import sys


def main(folder):
    report = json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))
    print(f"\nBits per UTF-8 byte on held-out text (lower is better), before and after {report['chosen_step']} steps, {report['tokens']} tokens:")
    print(f"  {'text':<14}{'before':>9}{'after':>9}{'change':>9}")
    for row in report["evaluation"]:
        before, after = row["before"]["bits_per_byte"], row["after"]["bits_per_byte"]
        print(f"  {row['name']:<14}{before:>9.3f}{after:>9.3f}{(after / before - 1) * 100:>8.1f}%")
    samples = {}  # prompt -> the first and the last continuation
    for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["kind"].startswith("sample/"):
            samples.setdefault(event["prompt"], []).append(event["text"])
    for prompt, texts in samples.items():
        print(f"\n  {prompt}\n    before: {' '.join(texts[0].split())}\n    after:  {' '.join(texts[-1].split())}")
    print(f"\nThe adapter is in {folder / 'run' / report['result']}, the merged weights with their card and licence in {folder / 'merged'}.")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(pathlib.Path(sys.argv[1]))
