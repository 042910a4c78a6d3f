# SPDX-License-Identifier: Apache-2.0
"""What README.md and docs/ tell a reader to type is true. Python's standard library only.

usage: readme_test.py ALAMBIC [ROOT]

Runs every block behind `<!-- run: tiny -->` in README.md, a command at a time as a reader would, with $MODEL a tiny random
model made here and $WORK a scratch folder; and looks up every `alambic VERB ... --option` of README.md and docs/*.md in
that verb's --help.
"""
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

from tiny_model import write_tiny_model

ALAMBIC = os.path.abspath(sys.argv.pop(1))
ROOT = pathlib.Path(sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else pathlib.Path(__file__).parent.parent)

MARKED = re.compile(r"^<!-- run: tiny -->\n+```(?:console|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = "<!-- run: tiny -->"
FENCE = re.compile(r"^```(?:console|sh|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")


def commands_of(block):
    """What a reader types: the lines behind `$ ` where there are such lines, else all of it."""
    lines = block.splitlines()
    prompted = [line[2:] for line in lines if line.startswith("$ ")]
    return "\n".join(prompted or lines) + "\n"


def calls_in(text):
    """(verb, options) of every `alambic VERB ...` in fenced blocks and inline code."""
    for code in [commands_of(block) for block in FENCE.findall(text)] + INLINE.findall(FENCE.sub("", text)):
        for line in code.replace("\\\n", " ").splitlines():
            line = re.sub(r"(^|\s)#.*", "", line)
            line = re.sub(r"'[^']*'|\"[^\"]*\"", "TEXT", line)
            for call in re.split(r"[|;&()]", line):
                call = re.sub(r"\balambic launch(?: -n \S+| --restarts \S+)+ (?=[a-z])", "alambic ", call)  # the options behind are the other verb's
                found = re.search(r"(?:^|\s)(?:\S*/)?alambic\s+([a-z][a-z-]*)(?=\s|$)(.*)", call)
                if found:
                    yield found[1], re.findall(r"(?<!\S)(--[a-z][a-z-]*|-[a-z])(?![a-z])", found[2])


class Readme(unittest.TestCase):
    def test_the_marked_blocks_run(self):
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        blocks = MARKED.findall(text)
        self.assertGreater(len(blocks), 0, "README.md has no block behind " + MARK)
        self.assertEqual(len(blocks), text.count(MARK), "a mark in README.md stands before no console or sh block")
        with tempfile.TemporaryDirectory() as scratch:
            root = pathlib.Path(scratch)
            write_tiny_model(root / "model")
            (root / "work").mkdir()
            (root / "bin").mkdir()
            (root / "bin/alambic").symlink_to(ALAMBIC)
            env = dict(os.environ, MODEL=str(root / "model"), WORK=str(root / "work"), PATH=f"{root / 'bin'}:{os.environ['PATH']}", OMP_NUM_THREADS="2")
            for block in blocks:
                self.assertIn("alambic ", block)
                done = subprocess.run(["bash", "-euo", "pipefail", "-c", commands_of(block)], cwd=root / "work", env=env, capture_output=True, text=True, timeout=600)
                self.assertEqual(done.returncode, 0, f"{block}\n{done.stdout}\n{done.stderr}")

    def test_every_option_named_exists(self):
        options, num_calls = {}, 0
        overview = subprocess.run([ALAMBIC, "--help"], capture_output=True, text=True, check=True, timeout=60).stdout
        verbs = set(re.findall(r"^  ([a-z]+) ", overview, re.MULTILINE))
        for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
            for verb, named in calls_in(path.read_text(encoding="utf-8")):
                num_calls += 1
                self.assertIn(verb, verbs, f"{path.name}: alambic {verb}")
                if verb not in options:
                    text = subprocess.run([ALAMBIC, verb, "--help"], capture_output=True, text=True, check=True, timeout=60).stdout
                    options[verb] = set(re.findall(r"^ +(?:-[a-z], )?(--[a-z-]+)(?= |$)", text, re.MULTILINE)) | set(re.findall(r"^ +(-[a-z]), --", text, re.MULTILINE))
                for option in named:
                    self.assertIn(option, options[verb], f"{path.name}: alambic {verb} {option}")
        self.assertGreater(num_calls, 5)

    def test_calls_are_found(self):
        text = "`alambic train run.yaml --resume`\n```sh\nbuild/alambic score -m x \\\n  --ids 1 | jq '--not ours'  # --nor this\n```\n```console\n$ alambic man --wrong\nalambic out --put\n```\n"
        self.assertEqual(list(calls_in(text)), [("score", ["-m", "--ids"]), ("man", ["--wrong"]), ("train", ["--resume"])])


if __name__ == "__main__":
    unittest.main()
