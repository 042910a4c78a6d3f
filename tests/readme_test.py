# SPDX-License-Identifier: Apache-2.0
"""What README.md and docs/ tell a reader to type is true. Python's standard library only.

usage: readme_test.py ALAMBIC [ROOT]

Runs every block behind `<!-- run: tiny -->` in README.md, a command at a time as a reader would, with $MODEL a tiny random
model made here and $WORK a scratch folder; and looks up every `alambic VERB ... --option` of README.md and docs/*.md in
that verb's --help.
"""
import json
import math
import os
import pathlib
import re
import struct
import subprocess
import sys
import tempfile
import unittest

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
                found = re.search(r"(?:^|\s)(?:\S*/)?alambic\s+([a-z][a-z-]*)(?=\s|$)(.*)", call)
                if found:
                    yield found[1], re.findall(r"(?<!\S)(--[a-z][a-z-]*|-[a-z])(?![a-z])", found[2])


def write_tiny_model(folder):
    """A llama of two layers over bytes, with a ChatML template. Its numbers mean nothing."""
    folder.mkdir()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    size = 256 + len(special)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": size, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
              "hidden_act": "silu", "tie_word_embeddings": True, "bos_token_id": 256, "eos_token_id": 258, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))

    shapes = {"model.embed_tokens.weight": [size, 16], "model.norm.weight": [16]}
    for layer in range(2):
        name = f"model.layers.{layer}."
        shapes |= {name + "input_layernorm.weight": [16], name + "post_attention_layernorm.weight": [16],
                   name + "self_attn.q_proj.weight": [16, 16], name + "self_attn.k_proj.weight": [8, 16], name + "self_attn.v_proj.weight": [8, 16],
                   name + "self_attn.o_proj.weight": [16, 16], name + "mlp.gate_proj.weight": [32, 16], name + "mlp.up_proj.weight": [32, 16],
                   name + "mlp.down_proj.weight": [16, 32]}
    header, data = {}, b""
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        values = [math.sin(1.7 * i + number) for i in range(math.prod(shape))]
        values = [1 + 0.1 * v for v in values] if len(shape) == 1 else [0.3 * v for v in values]
        begin = len(data)
        data += struct.pack(f"<{len(values)}f", *values)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)

    # GPT-2's letters for bytes: printable ones stand for themselves, the others for U+0100 and up.
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in own} | {byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in own)}
    added = [{"id": 256 + n, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
             for n, token in enumerate(special)]
    bytes_of_text = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (folder / "tokenizer.json").write_text(json.dumps(
        {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None, "pre_tokenizer": bytes_of_text,
         "post_processor": None, "decoder": bytes_of_text,
         "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                   "byte_fallback": False, "vocab": {letter: byte for byte, letter in letters.items()}, "merges": []}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[2]}))
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")


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
