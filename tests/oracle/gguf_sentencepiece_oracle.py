# SPDX-License-Identifier: Apache-2.0
"""A real model with a SentencePiece vocabulary (Gemma 3 270M): imported, exported as F32, and compared with llama.cpp and transformers:
metadata of the published file, token ids, logits, greedy tokens; and Q4_K_M with what llama.cpp's quantiser makes of our F32 file.
"""
import pathlib
import tempfile

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import llamacpp
import oracle
from gguf_export_checks import assert_same_tensors, export, fields_of, logits_of
from varied_texts import varied_texts

SEED = 20261124
TEXT = "A small model learns from a large one; what it has learnt depends on how the text is cut into pieces. " * 3


def live(alambic):
    published = oracle.gemma3()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        cpp = llamacpp.LlamaCpp(scratch)
        folder, gguf = scratch / "gemma3", scratch / "gemma3.gguf"
        oracle.run(alambic, "import", published, folder, "--weights", "f32")
        export(alambic, folder, gguf, "f32")

        ours, theirs = fields_of(gguf), fields_of(published)
        # <unk> is "unknown" here and "control" there. Scores come from the order of merges; the tokens that come out are compared below.
        assert ours["tokenizer.ggml.tokens"] == theirs["tokenizer.ggml.tokens"]
        differ = [token for token, a, b in zip(ours["tokenizer.ggml.tokens"], ours["tokenizer.ggml.token_type"], theirs["tokenizer.ggml.token_type"]) if a != b]
        assert differ in ([], ["<unk>"]), f"kinds of {differ[:10]}"
        for key, value in theirs.items():
            if key.startswith(("tokenizer.ggml.", "gemma3.")) and key.split(".")[-1] not in ("tokens", "token_type", "scores", "pre") and key in ours:
                same = abs(ours[key] - value) <= 1e-6 * abs(value) if isinstance(value, float) else ours[key] == value
                assert same, f"{key}: {str(ours[key])[:200]}, published {str(value)[:200]}"

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        texts = varied_texts(400, SEED, ["<start_of_turn>", "<end_of_turn>"]) + [" " * n + "x" for n in range(1, 80)]  # runs of spaces are tokens
        for file in (published, gguf):
            for text, actual in zip(texts, cpp.tokenize(file, texts)):
                wanted = tokenizer.encode(text, add_special_tokens=False).ids
                assert actual == wanted, f"{file.name}: {text!r}: llama.cpp {actual}, the folder's tokenizer {wanted}"

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        ids = tokenizer.encode(TEXT).ids[:64]
        values, greedy = cpp.logits(gguf, ids, greedy=8)
        expected = logits_of(model, ids)
        # llama.cpp's Gemma approximates GELU by a table of halves.
        oracle.assert_close(values, expected, 0, 5e-3 * float(expected.abs().max()), "logits of Gemma 3 in llama.cpp")
        following = list(ids)
        for _ in greedy:
            following.append(int(logits_of(model, following)[-1].argmax()))
        assert greedy == following[len(ids):], "greedy tokens of Gemma 3"

        quantised, reference = scratch / "ours-q.gguf", scratch / "theirs-q.gguf"
        export(alambic, folder, quantised, "q4_k_m")
        cpp.quantize(gguf, reference, 15)
        assert_same_tensors(quantised, reference, "Gemma 3 as q4_k_m")


oracle.main(live=live)
