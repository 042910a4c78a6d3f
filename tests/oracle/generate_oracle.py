# SPDX-License-Identifier: Apache-2.0
"""Sampling filters against transformers' logits processors, and the real SmolLM2 against transformers on the same GGUF.

Golden generate.safetensors: "logits" [rows, V], "seen" [rows, n], and for each of the settings in the metadata "cases"
"<case>" [rows, V] as the processors leave it (0 where they filter) and "<case>.kept". (Greedy text of the tiny models is in families_oracle.py.)
"""
import json
import pathlib
import tempfile

import torch
import transformers
from transformers.generation import logits_process as processors

import oracle

SEED = 20260903
ROWS, VOCABULARY, SEEN = 4, 50, 12
NEW_TOKENS = 32
CASES = {
    "penalty": dict(repetition_penalty=1.4),
    "temperature": dict(temperature=0.7),
    "top_k": dict(temperature=1.0, top_k=7),
    "top_p": dict(temperature=1.0, top_p=0.6),
    "top_p_zero": dict(temperature=1.0, top_p=0.0),
    "min_p": dict(temperature=1.0, min_p=0.08),
    "min_p_one": dict(temperature=1.0, min_p=1.0),
    "all": dict(repetition_penalty=1.2, temperature=1.3, top_k=20, top_p=0.85, min_p=0.02),
}


def processed(case, seen, logits):
    """The processors transformers makes of these settings, in its own order: GenerationMixin puts them together."""
    class Model(transformers.GenerationMixin):
        config = transformers.LlamaConfig(vocab_size=VOCABULARY)
        device = "cpu"

    settings = transformers.GenerationConfig(do_sample="temperature" in case, num_beams=1, **{"top_k": 0, **case})
    chain = Model()._get_logits_processor(settings, input_ids_seq_length=seen.shape[1])
    assert isinstance(chain, processors.LogitsProcessorList) and len(chain) > 0
    return chain(seen, logits.clone())


def make(folder):
    torch.manual_seed(SEED)
    logits, seen = 3 * torch.randn(ROWS, VOCABULARY), torch.randint(0, VOCABULARY, (ROWS, SEEN))
    logits[1, 10:20] = logits[1].max()  # ties
    tensors = {"logits": logits, "seen": seen}
    for name, case in CASES.items():
        left = processed(case, seen, logits)
        tensors[name], tensors[name + ".kept"] = left.masked_fill(left.isinf(), 0), ~left.isinf()
    oracle.save_golden(folder / "generate.safetensors", tensors, SEED, cases=json.dumps(CASES))


def live(alambic):
    path = oracle.smollm2()
    model = transformers.AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    text = "Die Sonne scheint. The quick brown fox jumps over the lazy dog, and 1 + 1 = 2.\n\ndef f(x):\n    return x ** 2\n" * 8
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) / "smollm2"
        oracle.run(alambic, "import", path, folder)
        with torch.no_grad():
            table = torch.log_softmax(model(ids[None]).logits[0].float(), -1)
        want = table[:-1].gather(1, ids[1:, None])[:, 0]
        out = oracle.run_json(alambic, "score", "--model", folder, "--ids", ",".join(str(int(i)) for i in ids), "--compute", "f32")
        assert out["ids"] == ids.tolist()
        oracle.assert_close(out["logprobs"], want, 1e-4, 1e-4, "SmolLM2")
        print(f"SmolLM2: {len(ids)} tokens of the GGUF scored as transformers scores them")
        for prompt in ("The administrator installs the package with", "Ibu kota Indonesia adalah"):
            given = tokenizer(prompt, return_tensors="pt").input_ids
            with torch.no_grad():
                want = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=NEW_TOKENS, do_sample=False)[0, given.shape[1]:].tolist()
            out = oracle.run_json(alambic, "generate", "--model", folder, "--prompt", prompt, "-n", NEW_TOKENS, "--compute", "f32")
            assert out["prompt_ids"] == given[0].tolist(), f"prompt: {out['prompt_ids']}, expected {given[0].tolist()}"
            assert out["ids"] == want, f"greedy text of {prompt!r}: {out['ids']}, expected {want}"
        print(f"SmolLM2: {NEW_TOKENS} greedy tokens of two prompts as transformers generates them")


if __name__ == "__main__":
    oracle.main(make, live)
