# SPDX-License-Identifier: Apache-2.0
"""The tree is the data flow, and this check keeps it so. Python's standard library only.

    layout_test.py [ROOT]

First proves itself: every rule must flag its bad sample and let its good one pass. Then reads every source file under ROOT
(the repository, by default) and prints a line "file:line: rule: ..." for each breach; the exit code is 1 if there is one.
"""
import ast
import io
import pathlib
import re
import sys
import tempfile
import tokenize

# A folder may include only folders to its left.
FOLDERS = ["core", "parallel", "data", "models", "lora", "checkpoints", "train", "distill", "cli"]
OUTSIDE = ["tests", "bench"]  # may include everything
OTHER = ["cmake", "scripts", "configs", "docs"]

C_LIKE = {".h", ".cpp", ".cu", ".cuh", ".c", ".rs"}
HASH_LIKE = {".py", ".sh", ".cmake", ".toml", ".yaml", ".yml"}
SOURCES = C_LIKE | HASH_LIKE

SPDX = re.compile(r"SPDX-License-Identifier: Apache-2\.0\b")
INCLUDE = re.compile(r'^\s*#\s*include\s*["<]([^">]+)[">]')
CONDITION = re.compile(r"^\s*#\s*(?:if|ifdef|ifndef|elif|elifdef|elifndef)\b.*\bALAMBIC_\w+")
FORBIDDEN_NAME = re.compile(r"(?:^|[_/-])(utils?|helpers?|common)(?:[_./-]|$)", re.IGNORECASE)
# A home or work folder written out in full, with something behind it.
MACHINE_PATH = re.compile(r"(?<![\w.}$/~-])/(?:home|root|work|Users|mnt|media|srv)/[\w.-]+")
# A string or character literal, or a comment up to the end of the line.
LITERAL_OR_COMMENT = re.compile(r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|(//.*|/\*.*|\#.*)""")
RAW_STRING = re.compile(r'R"([^(\s"]*)\((.*?)\)\1"', re.DOTALL)
BIG_HEADERS = {"torch/torch.h", "torch/all.h", "torch/extension.h", "ATen/ATen.h"}


def source_files(root):
    """Paths relative to root of everything a person wrote; folders of tools and builds are left out."""
    for top in sorted(root.iterdir()):
        if top.is_file():
            # REUSE.toml is itself a list of licences and has no line of its own.
            if (top.suffix in SOURCES or top.name == "CMakeLists.txt") and top.name != "REUSE.toml":
                yield top.relative_to(root)
        elif top.name in FOLDERS + OUTSIDE + OTHER:
            for path in sorted(top.rglob("*")):
                parts = path.relative_to(root).parts
                if "target" in parts or "__pycache__" in parts or not path.is_file():
                    continue
                if path.suffix in SOURCES or path.name == "CMakeLists.txt":
                    yield path.relative_to(root)


def without_literals(path, text):
    """(line number, text of the line) with literals blanked, since those may hold any letter; comments and docstrings stay."""
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body and ast.get_docstring(node, clean=False):
                for offset, line in enumerate(ast.get_docstring(node, clean=False).split("\n")):
                    yield node.body[0].lineno + offset, line
        return
    if path.suffix in {".h", ".cpp", ".cu", ".cuh"}:
        text = RAW_STRING.sub(lambda literal: "\n" * literal.group().count("\n"), text)
    for number, line in enumerate(text.split("\n"), 1):
        yield number, LITERAL_OR_COMMENT.sub(lambda part: part.group(2) or "", line)


def breaches_of(path, text):
    """(line number, rule, what) for each breach in one file; path is relative to the root."""
    parts = path.parts
    folder = parts[0] if len(parts) > 1 else ""
    lines = text.split("\n")
    found = []

    first = lines[1] if lines[0].startswith("#!") and len(lines) > 1 else lines[0]
    if not SPDX.search(first):
        found.append((1, "licence", "the first line is no SPDX line"))
    if FORBIDDEN_NAME.search("/".join(parts)):
        found.append((1, "name", "say what the file is for: no utils, helpers, common"))

    try:
        for number, line in without_literals(path, text):
            if not line.isascii():
                strange = next(letter for letter in line if not letter.isascii())
                found.append((number, "ascii", f"the letter U+{ord(strange):04X} outside of a literal"))
    except (SyntaxError, tokenize.TokenError) as error:
        found.append((1, "syntax", str(error)))

    for number, line in enumerate(lines, 1):
        if MACHINE_PATH.search(line):
            found.append((number, "path", "a path of one machine: " + MACHINE_PATH.search(line).group()))
        if path.suffix not in {".h", ".cpp", ".cu", ".cuh", ".c"}:
            continue
        if CONDITION.search(line):
            found.append((number, "condition", "a build option chooses files in CMake, not lines in a file"))
        include = INCLUDE.match(line)
        if not include:
            continue
        target = include.group(1)
        if target in BIG_HEADERS:
            found.append((number, "big header", f"{target}: include the operators' own headers"))
        if "../" in target:
            found.append((number, "include", f"{target}: paths begin at the root of the repository"))
        top = target.split("/")[0]
        if folder in FOLDERS:
            if top in FOLDERS and FOLDERS.index(top) > FOLDERS.index(folder):
                found.append((number, "layer", f"{folder} may not include {target}: {top} lies above it"))
            if top in OUTSIDE:
                found.append((number, "layer", f"{folder} may not include {target}"))
    return found


def check(root):
    problems, count = [], 0
    for path in source_files(root):
        count += 1
        try:
            text = (root / path).read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            problems.append(f"{path}:1: utf-8: {error}")
            continue
        problems += [f"{path}:{number}: {rule}: {what}" for number, rule, what in breaches_of(path, text)]
    folders = sorted(top.name for top in root.iterdir() if top.is_dir() and (top / "CMakeLists.txt").exists())
    problems += [f"{name}:1: folder: not in the list of layers" for name in folders if name not in FOLDERS + OUTSIDE]
    return problems, count


CPP, SH = "// SPDX-License-Identifier: Apache-2.0\n", "# SPDX-License-Identifier: Apache-2.0\n"
HOME = "/" + "home/"  # put together, so that this file passes its own check

# file, text, the rule that must flag it ("" = it must pass)
SAMPLES = [
    ("data/reader.cpp", CPP + '#include "core/error.h"\n#include "data/batch.h"\n#include <vector>\n', ""),
    ("data/reader.cpp", CPP + '#include "models/decoder.h"\n', "layer"),
    ("core/error.cpp", CPP + '#include "parallel/communicator.h"\n', "layer"),
    ("models/decoder.h", CPP + '#include <lora/adapter.h>\n', "layer"),
    ("train/loop.cpp", CPP + '#  include "distill/distill.h"\n', "layer"),
    ("train/loop.cpp", CPP + '#include "tests/support.h"\n', "layer"),
    ("distill/distill.cpp", CPP + '#include "train/loop.h"\n', ""),
    ("tests/data/reader_test.cpp", CPP + '#include "cli/options.h"\n', ""),
    ("models/linear.cpp", CPP + "#include <torch/torch.h>\n", "big header"),
    ("models/linear.cpp", CPP + "#include <ATen/ATen.h>\n", "big header"),
    ("models/linear.cpp", CPP + "#include <ATen/ops/mm.h>\n", ""),
    ("models/linear.cpp", CPP + '#include "../core/error.h"\n', "include"),
    ("parallel/communicator.cpp", CPP + "#ifdef ALAMBIC_NCCL\n#endif\n", "condition"),
    ("parallel/communicator.cpp", CPP + "#if defined(__AVX2__) && !defined(ALAMBIC_CUDA)\n#endif\n", "condition"),
    ("parallel/communicator.cpp", CPP + "#ifdef __AVX512BF16__\n#endif\n// if ALAMBIC_NCCL is off, CMake takes another file\n", ""),
    ("core/error.cpp", "// An error.\n", "licence"),
    ("core/error.cpp", "", "licence"),
    ("scripts/setup.sh", "#!/usr/bin/env bash\n" + SH, ""),
    ("scripts/setup.sh", "#!/usr/bin/env bash\nset -e\n", "licence"),
    ("core/CMakeLists.txt", "add_library(core)\n", "licence"),
    ("core/string_utils.h", CPP, "name"),
    ("core/util/text.h", CPP, "name"),
    ("data/helpers.cpp", CPP, "name"),
    ("models/common.h", CPP, "name"),
    ("models/common-parts.h", CPP, "name"),
    ("models/commonality.h", CPP, ""),
    ("train/step.cpp", CPP + "// a dash \N{EM DASH} here\n", "ascii"),
    ("train/step.cpp", CPP + '// a quoted "\N{EM DASH}" here\n', "ascii"),
    ("tests/step.py", SH + '"""A docstring\nwith a \N{EM DASH}.\n"""\n', "ascii"),
    ("tests/step.py", SH + "def f():\n    pass  # a \N{EM DASH}\n", "ascii"),
    ("tests/step.py", SH + 'TEXT = """several lines\nwith a \N{EM DASH}\n"""\n', ""),
    ("tests/step_test.cpp", CPP + 'encode("caf\N{LATIN SMALL LETTER E WITH ACUTE} // \\" x", \'y\');  // in a literal\n', ""),
    ("tests/step_test.cpp", CPP + 'R"(\n"\N{EM DASH}" and // \N{EM DASH}\n)", R"x(\N{EM DASH})x"\n// plain\n', ""),
    ("tests/step_test.cpp", CPP + 'R"(\n)"\n// \N{EM DASH}\n', "ascii"),
    ("scripts/bench.sh", SH + "cd " + HOME + "someone/alambic\n", "path"),
    ("train/step.cpp", CPP + "// see " + "/" + "work/shared/notes\n", "path"),
    ("train/step.cpp", CPP + "// a share of work/time, data/home/x, $HOME" + "/" + "work/x and https://x.org" + HOME + "y\n", ""),
]


def prove_itself():
    for number, (name, text, rule) in enumerate(SAMPLES):
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            (root / name).parent.mkdir(parents=True)
            (root / name).write_text(text, encoding="utf-8")
            problems, count = check(root)
        rules = {problem.split(": ")[1] for problem in problems}
        if count != 1 or rules != ({rule} if rule else set()):
            sys.exit(f"layout_test.py is wrong itself: sample {number} ({name}) gave {problems}, expected rule '{rule}'")
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        (root / "misc").mkdir()
        (root / "misc" / "CMakeLists.txt").write_text(SH)
        if check(root)[0] != ["misc:1: folder: not in the list of layers"]:
            sys.exit("layout_test.py is wrong itself: an unknown folder was not flagged")


def main():
    prove_itself()
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).resolve().parent.parent)
    problems, count = check(root)
    if count < 20:
        problems.append(f"{root}: only {count} source files were found; is this the repository?")
    for problem in problems:
        print(problem)
    print(f"{len(SAMPLES) + 1} samples judged rightly; {count} files read, {len(problems)} breaches")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
