# SPDX-License-Identifier: Apache-2.0
"""What scripts/prune_and_recover.sh made: exports it as Q4_K_M, lets llama.cpp run it, and shows bits per byte, sizes and speed.

    recovery_table.py FOLDER     FOLDER holds base, pruned, by-text, distilled and stores
"""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "oracle"))
import llamacpp  # noqa: E402

ALAMBIC = ROOT / "build" / "release" / "cli" / "alambic"


def asked(*words):
    return json.loads(subprocess.run([str(ALAMBIC), *map(str, words), "--json"], check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1])


def main(folder):
    reports = {name: json.loads((folder / name / "report.json").read_text(encoding="utf-8")) for name in ("by-text", "distilled")}
    if reports["by-text"]["tokens"] != reports["distilled"]["tokens"]:
        raise SystemExit(f"recovery_table.py: {reports['by-text']['tokens']} and {reports['distilled']['tokens']} tokens: the two runs did not learn from the same text")
    models = [("the model", folder / "base", "heldout"), ("pruned", folder / "pruned", "student-heldout"),
              ("recovered by text alone", folder / "by-text" / reports["by-text"]["result"], "student-heldout"),
              ("recovered by distillation", folder / "distilled" / reports["distilled"]["result"], "student-heldout")]
    print(f"\nHeld-out chapter, {reports['distilled']['tokens']} tokens of training each; llama.cpp reads 128 tokens, then makes 64, on {os.cpu_count()} cores:")
    print(f"  {'':<28}{'':<6}{'parameters':>12}{'file':>10}{'bits per byte':>15}{'reads':>10}{'makes tokens/s':>16}")
    with tempfile.TemporaryDirectory() as scratch:
        llama = llamacpp.LlamaCpp(scratch)
        for name, model, store in models:
            parameters = asked("inspect", model)["parameters"]
            for kind in ("bf16", "q4_k_m"):
                if kind == "q4_k_m" and name == "pruned":
                    continue
                place = folder / "gguf" / f"{name.replace(' ', '-')}-{kind}"  # the card lies beside the file
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir(parents=True)
                file = place / "model.gguf"
                made = asked("export", model, file, "--type", kind, "--evaluate", folder / "stores" / store, "--max-tokens", 20000)
                reads, makes = llama.speed(file)
                print(f"  {name + ', ' + kind.upper():<34}{parameters / 1e6:>10.1f} M{file.stat().st_size / 1e6:>7.0f} MB{made['evaluation']['bits_per_byte_after']:>15.3f}{reads:>10.0f}{makes:>16.0f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(pathlib.Path(sys.argv[1]))
