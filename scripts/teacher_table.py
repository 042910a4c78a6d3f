# SPDX-License-Identifier: Apache-2.0
"""What scripts/distill_qwen_coder.sh made: teacher_table.py FOLDER, where FOLDER holds none, cached and live. Standard library only."""
import json
import pathlib
import sys


def main(folder):
    runs = {name: json.loads((folder / name / "report.json").read_text(encoding="utf-8")) for name in ("none", "cached", "live")}
    if len({run["tokens"] for run in runs.values()}) != 1:
        raise SystemExit(f"teacher_table.py: {[run['tokens'] for run in runs.values()]} tokens: the runs did not learn from the same text")
    print(f"\nHeld-out text, {runs['none']['tokens']} tokens of training each:\n  {'teacher':<10}{'bits per byte before':>22}{'after':>8}{'tokens/s':>11}")
    for name, run in runs.items():
        rates = [line["tokens_per_second"] for line in map(json.loads, (folder / name / "speed.jsonl").read_text(encoding="utf-8").splitlines()) if "tokens_per_second" in line]
        held_out = run["evaluation"][0]
        print(f"  {name:<10}{held_out['before']['bits_per_byte']:>22.4f}{held_out['after']['bits_per_byte']:>8.4f}{sorted(rates)[len(rates) // 2]:>11.0f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(pathlib.Path(sys.argv[1]))
