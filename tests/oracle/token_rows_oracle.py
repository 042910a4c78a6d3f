# SPDX-License-Identifier: Apache-2.0
"""Training only some tokens' rows (PEFT's trainable_token_indices): gradients, folders, logits, and a whole run.

Goldens in tests/golden/rows: a folder a case, made by PEFT, with the rows, adapters moved; rows.safetensors with the logits and the
gradients of a cross-entropy sum. Live: alambic scores PEFT's folders, PEFT loads what the test program checkpoints_tests wrote, and
what `alambic extend`, `train` and `merge` make of new tokens.
"""
import json
import os
import pathlib
import subprocess
import tempfile
import warnings

import oracle
from peft_adapter_oracle import IDS, log_probabilities, models, save

warnings.simplefilter("ignore")
SEED = 17
ROWS = [5, 9, 40, 2]
CASES = {
    "llama_tied.rows": dict(r=2, target_modules=["q_proj"], trainable_token_indices=ROWS),
    "llama_tied.rows_of_both": dict(r=2, target_modules=["up_proj"], trainable_token_indices={"embed_tokens": ROWS, "lm_head": ROWS}),
    "llama_untied.rows": dict(r=2, target_modules=["q_proj"], trainable_token_indices=ROWS),
    "llama_untied.rows_of_both": dict(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": ROWS, "lm_head": ROWS}),
    "llama_untied.rows_and_head": dict(r=2, target_modules=["q_proj"], trainable_token_indices=ROWS, modules_to_save=["lm_head"]),
    "gemma3.rows": dict(r=2, target_modules=["q_proj"], use_dora=True, trainable_token_indices=ROWS),
}


def moved(case):
    import peft
    import torch
    model = dict(models())[case.split(".")[0]]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **CASES[case]))
    torch.manual_seed(SEED)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return wrapped.eval()


def make(golden):
    import torch
    ids = torch.tensor(IDS)
    tensors = {"ids": ids}
    for case in CASES:
        wrapped = moved(case)
        save(wrapped, golden / "rows" / case)
        logits = wrapped(input_ids=ids).logits[0]
        tensors[f"{case}.logits"] = logits
        torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").backward()
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                tensors[f"{case}.grad.{name.replace('.default', '').replace('.modules_to_save', '').replace('magnitude_vector.weight', 'magnitude_vector')}"] = parameter.grad
    oracle.save_golden(golden / "rows" / "rows.safetensors", tensors, SEED, packages=("torch", "transformers", "peft"))


def whole_run(alambic, scratch):
    """New tokens added, their rows trained beside an adapter, scored, merged; PEFT and transformers agree at each place."""
    import peft
    import torch
    import transformers

    torch.manual_seed(SEED)
    oracle.run(alambic, "import", oracle.smollm2(), scratch / "smollm2")
    for tied in (True, False):
        name = "tied" if tied else "untied"
        base, extended, run, merged = (scratch / f"{name}.{kind}" for kind in ("base", "extended", "run", "merged"))
        transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=49152, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=64, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied)).save_pretrained(base)
        transformers.AutoTokenizer.from_pretrained(scratch / "smollm2").save_pretrained(base)
        oracle.run(alambic, "extend", base, extended, "--token", "Київ", "--token", "перекладання", "--pad-to-multiple", "8")
        text = scratch / f"{name}.jsonl"
        text.write_text("".join(json.dumps({"text": f"{i} Київ перекладання {i * 7} Київ"}) + "\n" for i in range(40)))
        (scratch / f"{name}.prepare.yaml").write_text(f"tokenizer: {extended}\noutput: {scratch / name}.store\nsources:\n  - {{name: t, paths: [{text}], licence: CC0-1.0, language: uk}}\n")
        oracle.run(alambic, "prepare", scratch / f"{name}.prepare.yaml")
        (scratch / f"{name}.yaml").write_text(
            f"model: {extended}\noutput: {run}\nlora: {{rank: 2, alpha: 4, targets: [q_proj], trainable_tokens: [Київ, '49153'], trainable_tokens_head: true}}\n"
            f"data: {{row_length: 32, mixture: [{{store: {scratch / name}.store}}]}}\noptimizer: {{weight_decay: 0.0}}\nschedule: {{learning_rate: 0.05}}\nlimits: {{max_steps: 5}}\ncompute_type: f32\n")
        oracle.run(alambic, "train", scratch / f"{name}.yaml")
        model = transformers.AutoModelForCausalLM.from_pretrained(extended)
        before = {"embedding": model.get_input_embeddings().weight.detach().clone(), "head": model.get_output_embeddings().weight.detach().clone()}
        wrapped = peft.PeftModel.from_pretrained(model, run / "adapter").eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(extended)
        ids = tokenizer.encode("12 Київ перекладання на Київ")
        assert 49152 in ids and 49153 in ids
        with torch.no_grad():
            logits = wrapped(input_ids=torch.tensor([ids])).logits[0]
        expected = torch.log_softmax(logits[:-1].double(), -1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        told = oracle.run_json(alambic, "score", "--model", extended, "--adapter", run, "--ids", ",".join(map(str, ids)), "--compute", "f32")
        oracle.assert_close(told["logprobs"], expected, 1e-4, 1e-5, f"{name}: alambic score beside PEFT")
        oracle.run(alambic, "merge", run, merged)
        final = transformers.AutoModelForCausalLM.from_pretrained(merged).eval()
        assert final.config.tie_word_embeddings == tied
        with torch.no_grad():
            oracle.assert_close(final(input_ids=torch.tensor([ids])).logits[0], logits, 1e-4, 1e-4, f"{name}: merged")
        for table, now in (("embedding", final.get_input_embeddings().weight.detach()), ("head", final.get_output_embeddings().weight.detach())):
            then = before[table]
            assert now[:49152].equal(then[:49152]) and now[49154:].equal(then[49154:]), f"{table}: a row that was not trained changed"
            assert (now[49152:49154] - then[49152:49154]).abs().amax(1).min() > 1e-3, f"{table}: a row was not trained"
    print("new tokens: extended, trained, scored, merged, as PEFT and transformers compute them")


def live(alambic):
    import peft
    import torch
    from safetensors.torch import load_file
    expected = load_file(oracle.GOLDEN / "rows" / "rows.safetensors")
    for case in CASES:
        told = oracle.run_json(alambic, "score", "--model", oracle.GOLDEN / "peft" / case.split(".")[0], "--adapter", oracle.GOLDEN / "rows" / case,
                               "--ids", ",".join(map(str, IDS[0])), "--compute", "f32")
        oracle.assert_close(told["logprobs"], log_probabilities(expected[f"{case}.logits"]), 1e-4, 1e-5, f"alambic score on PEFT's {case}")
    with tempfile.TemporaryDirectory() as scratch:
        program = alambic.parent.parent / "checkpoints" / "checkpoints_tests"
        subprocess.run([program, "--gtest_filter=*TokenRows*"], check=True, env={**os.environ, "ALAMBIC_TEST_OUTPUT": scratch}, stdout=subprocess.DEVNULL)
        for case in CASES:
            loaded = peft.PeftModel.from_pretrained(dict(models())[case.split(".")[0]], pathlib.Path(scratch) / case).eval()
            with torch.no_grad():
                oracle.assert_close(loaded(input_ids=torch.tensor(IDS)).logits[0], expected[f"{case}.logits"], 1e-5, 1e-5, f"PEFT on our {case}")
        whole_run(alambic, pathlib.Path(scratch))
    print(f"{len(CASES)} adapters with token rows: alambic scores PEFT's, PEFT reads ours")


if __name__ == "__main__":
    oracle.main(make, live)
