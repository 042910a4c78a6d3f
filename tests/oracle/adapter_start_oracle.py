# SPDX-License-Identifier: Apache-2.0
"""PiSSA and OLoRA in PEFT: the first A and B, the residual base, and the conversion into an ordinary adapter.

Goldens in tests/golden/start: start.safetensors (single weights, and the first A and B on a tiny llama), for each case the
folder PEFT saves as it is (<case>.raw) and the one it converts (<case>), and the logits of what was trained. Live: alambic scores
both folders as PEFT computes them, and PEFT loads what the test program checkpoints_tests wrote, on the base as it was.
"""
import os
import pathlib
import subprocess
import tempfile
import warnings

import oracle
from peft_adapter_oracle import IDS, log_probabilities, models, save

warnings.simplefilter("ignore")
SEED = 11
BASE = "llama_tied"
CASES = {
    "pissa": dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa"),
    "pissa_rslora": dict(r=3, lora_alpha=5, use_rslora=True, target_modules=["k_proj", "up_proj"], init_lora_weights="pissa"),
    "pissa_dora": dict(r=4, lora_alpha=4, use_dora=True, target_modules=["v_proj", "gate_proj"], init_lora_weights="pissa"),
    "pissa_patterns": dict(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"], rank_pattern={"o_proj": 2}, alpha_pattern={"0.self_attn.q_proj": 6},
                           init_lora_weights="pissa"),
    "olora": dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights="olora"),
}


def started(settings):
    """A PEFT model just made on the tiny llama, and its first A and B by path."""
    import peft
    model = dict(models())[BASE]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    first = {name.removeprefix("base_model.model.").replace(".default.weight", ""): p for name, p in wrapped.named_parameters() if "lora_A" in name or "lora_B" in name}
    return wrapped, {name: p.detach().clone() for name, p in first.items()}


def move(wrapped):
    import torch
    torch.manual_seed(SEED)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return wrapped


def logits_of(model):
    import torch
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits[0]


def single_weights():
    """name -> weight; a tall and a wide one, and one in bf16."""
    import torch
    torch.manual_seed(SEED)
    return {"tall": torch.randn(24, 16), "wide": torch.randn(16, 24), "narrow": torch.randn(20, 12).to(torch.bfloat16)}


def make(golden):
    import peft
    import torch
    tensors, folder = {}, golden / "start"
    for name, weight in single_weights().items():
        tensors[name] = weight
        for init in ("pissa", "pissa_niter_3", "olora"):
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            layer.weight.data = weight.clone()
            torch.manual_seed(SEED)  # peft draws nothing else before the projection once A and B exist
            model = torch.nn.ModuleDict({"layer": layer})
            config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], init_lora_weights=init)
            drawn = []
            original = torch.randn
            torch.randn = lambda *a, **k: drawn.append(original(*a, **k)) or drawn[-1]
            try:
                wrapped = peft.get_peft_model(model, config)
            finally:
                torch.randn = original
            adapted = wrapped.base_model.model["layer"]
            tensors[f"{name}.{init}.a"] = adapted.lora_A["default"].weight
            tensors[f"{name}.{init}.b"] = adapted.lora_B["default"].weight
            tensors[f"{name}.{init}.residual"] = adapted.get_base_layer().weight
            if drawn:
                tensors[f"{name}.{init}.projection"] = drawn[0]
    logits = {"ids": torch.tensor(IDS), BASE: logits_of(dict(models())[BASE])}
    for case, settings in CASES.items():
        wrapped, first = started(settings)
        tensors.update({f"{case}.{name}": value for name, value in first.items()})
        oracle.assert_close(logits_of(wrapped), logits[BASE], 1e-4, 1e-4, f"{case}: the start changes the model")
        move(wrapped)
        logits[case] = logits_of(wrapped)
        save(wrapped, folder / f"{case}.raw")
        if settings.get("use_dora"):  # peft 0.21.2 loses the magnitudes when it converts
            continue
        # Conversion, as PEFT documents it, of a fresh model.
        wrapped, _ = started(settings)
        with tempfile.TemporaryDirectory() as scratch:
            initial = pathlib.Path(scratch) / "initial"
            wrapped.peft_config["default"].init_lora_weights = True
            wrapped.save_pretrained(initial)
            wrapped.peft_config["default"].init_lora_weights = settings["init_lora_weights"]
            move(wrapped)

            class Saver:
                def save_pretrained(self, to):
                    wrapped.save_pretrained(to, path_initial_model_for_weight_conversion=str(initial))

            save(Saver(), folder / case)
    oracle.save_golden(folder / "start.safetensors", tensors, SEED, packages=("torch", "transformers", "peft"))
    oracle.save_golden(folder / "logits.safetensors", logits, SEED, packages=("torch", "transformers", "peft"))


def live(alambic):
    import peft
    from safetensors.torch import load_file
    expected = load_file(oracle.GOLDEN / "start" / "logits.safetensors")
    base = oracle.GOLDEN / "peft" / BASE
    for case in CASES:
        for folder in (case, f"{case}.raw"):
            if not (oracle.GOLDEN / "start" / folder).exists():
                continue
            loaded = peft.PeftModel.from_pretrained(dict(models())[BASE], oracle.GOLDEN / "start" / folder).eval()
            oracle.assert_close(logits_of(loaded), expected[case], 1e-4, 1e-4, f"PEFT on its own {folder}")
            told = oracle.run_json(alambic, "score", "--model", base, "--adapter", oracle.GOLDEN / "start" / folder,
                                   "--ids", ",".join(map(str, IDS[0])), "--compute", "f32")
            oracle.assert_close(told["logprobs"], log_probabilities(expected[case]), 1e-4, 1e-5, f"alambic score on PEFT's {folder}")
    with tempfile.TemporaryDirectory() as scratch:
        program = alambic.parent.parent / "checkpoints" / "checkpoints_tests"
        subprocess.run([program, "--gtest_filter=*StartedInside*"], check=True, env={**os.environ, "ALAMBIC_TEST_OUTPUT": scratch}, stdout=subprocess.DEVNULL)
        for case in CASES:
            loaded = peft.PeftModel.from_pretrained(dict(models())[BASE], pathlib.Path(scratch) / case).eval()
            oracle.assert_close(logits_of(loaded), expected[case], 1e-4, 1e-4, f"PEFT on our {case}")
    print(f"{len(CASES)} adapters started inside the base: alambic scores PEFT's, PEFT reads ours")


if __name__ == "__main__":
    oracle.main(make, live)
