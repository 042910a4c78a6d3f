# SPDX-License-Identifier: Apache-2.0
"""PEFT adapters on tiny random models: which modules a config names, the folders PEFT writes, and the logits they give.

Goldens: tests/golden/peft/matching.json (config -> adapted paths, ranks, scales, trained keys), one base folder a family,
adapter folders made by PEFT, and their logits. Live: alambic scores PEFT's folders, and PEFT loads the folders that the test
program checkpoints_tests wrote.
"""
import json
import os
import pathlib
import re
import subprocess
import tempfile
import warnings

import oracle

warnings.simplefilter("ignore")
SEED = 7
IDS = [[3, 17, 41, 5, 5, 22, 9, 30, 1, 44, 12, 8]]


def models():
    """name -> transformers model; tiny, in f32, all weights random (norms and biases too)."""
    import torch
    import transformers as t
    common = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=1, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    made = {
        "gemma2": (t.Gemma2ForCausalLM, t.Gemma2Config(**common, head_dim=8, sliding_window=8, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, final_logit_softcapping=4.0)),
        "llama_tied": (t.LlamaForCausalLM, t.LlamaConfig(**common, tie_word_embeddings=True)),
        "llama_untied": (t.LlamaForCausalLM, t.LlamaConfig(**common, tie_word_embeddings=False)),
        "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config(**common, tie_word_embeddings=True)),
        "phi3": (t.Phi3ForCausalLM, t.Phi3Config(**common, tie_word_embeddings=False)),
        "gemma3": (t.Gemma3ForCausalLM, t.Gemma3TextConfig(**common, head_dim=8, sliding_window=8, query_pre_attn_scalar=8,
                                                           layer_types=["sliding_attention", "full_attention"])),
    }
    for number, (name, (kind, config)) in enumerate(made.items(), -1):  # what PEFT draws follows the last one: newer ones come first
        torch.manual_seed(SEED + number)
        model = kind(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        yield name, model


# What is trained and how: each becomes a PEFT folder. A name before the dot is the model.
FOLDERS = {
    "llama_tied.lora": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "mlp.down_proj"]),
    "llama_tied.patterns": dict(r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear",
                                rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.(up|gate)_proj": 3}, alpha_pattern={"0.mlp.down_proj": 32}),
    "llama_tied.dora": dict(r=3, lora_alpha=6, use_dora=True, target_modules="all-linear", lora_dropout=0.1),
    "llama_tied.save_embedding": dict(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "llama_tied.save_head": dict(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "llama_tied.save_both": dict(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "llama_tied.save_tied": dict(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "llama_tied.head": dict(r=2, lora_alpha=16, target_modules=["lm_head", "o_proj"]),
    "llama_untied.save_both": dict(r=2, target_modules=r".*\.self_attn\.[qk]_proj", modules_to_save=["embed_tokens", "lm_head"]),
    "llama_untied.exclude": dict(r=2, target_modules="all-linear", exclude_modules=r".*layers\.0\..*", modules_to_save=["norm"]),
    "qwen2.dora_rslora": dict(r=4, lora_alpha=2, use_dora=True, use_rslora=True, target_modules=["k_proj", "o_proj", "up_proj"]),
    "phi3.lora": dict(r=4, lora_alpha=8, target_modules="all-linear"),
    "phi3.dora": dict(r=4, lora_alpha=8, use_dora=True, target_modules=["qkv_proj", "gate_up_proj"]),
    "gemma3.lora": dict(r=4, lora_alpha=8, target_modules="all-linear", modules_to_save=["embed_tokens"]),
    "gemma2.lora": dict(r=4, lora_alpha=8, target_modules="all-linear"),
}

# Configs of which only the matching is asked; an entry may be one that PEFT refuses.
MATCHING = {
    "suffix": dict(target_modules=["proj"]),
    "suffix_whole": dict(target_modules=["q_proj"]),
    "suffix_two_parts": dict(target_modules=["mlp.up_proj", "self_attn.o_proj"]),
    "full_path": dict(target_modules=["model.layers.1.self_attn.q_proj"]),
    "no_substring": dict(target_modules=["_proj"]),
    "all_linear": dict(target_modules="all-linear"),
    "all_linear_upper": dict(target_modules="All-Linear"),
    "head": dict(target_modules=["lm_head", "q_proj"]),
    "regex": dict(target_modules=r"model\.layers\.\d+\.mlp\.(gate|up)_proj"),
    "regex_needs_whole": dict(target_modules=r"layers\.0\.mlp\.up_proj"),
    "regex_head": dict(target_modules=r"(lm_head|.*q_proj)"),
    "regex_lookahead": dict(target_modules=r"(?!.*layers\.0).*\.(q|k|v)_proj"),
    "regex_lazy": dict(target_modules=r".*?\.0\..*?proj"),
    "regex_container": dict(target_modules=r".*mlp.*"),
    "container": dict(target_modules=["mlp"]),
    "embedding": dict(target_modules=["embed_tokens2", "q_proj"]),
    "exclude_list": dict(target_modules="all-linear", exclude_modules=["down_proj", "model.layers.0.self_attn.q_proj"]),
    "exclude_regex": dict(target_modules=["q_proj", "k_proj"], exclude_modules=r".*\.1\..*"),
    "rank_pattern": dict(target_modules="all-linear", rank_pattern={"q_proj": 2, "mlp.*": 3, "layers.1.self_attn.k_proj": 5}),
    "rank_first_wins": dict(target_modules="all-linear", rank_pattern={"model.layers.0.mlp.up_proj": 2, "up_proj": 3}),
    "rank_no_substring": dict(target_modules=["q_proj"], rank_pattern={"proj": 2}),
    "rank_alternatives": dict(target_modules="all-linear", rank_pattern={"q_proj|k_proj": 2, "^model.layers.1.mlp.down_proj": 7}),
    "alpha_pattern": dict(target_modules="all-linear", alpha_pattern={r"layers\.0\..*": 3, "lm_head": 9}, use_rslora=True),
    "save_container": dict(target_modules="all-linear", modules_to_save=["layers.0.mlp"]),
    "save_norms": dict(target_modules=["q_proj"], modules_to_save=["norm"]),
    "save_head": dict(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]),
    "save_embedding": dict(target_modules="all-linear", modules_to_save=["embed_tokens"]),
    "save_path": dict(target_modules="all-linear", modules_to_save=["model.layers.1.self_attn.v_proj"]),
}


def peft_model(model, settings, seed=None):
    import peft
    import torch
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    if seed is not None:  # B is zero in a new adapter; make everything count
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return wrapped.eval()


def matching(model, settings):
    from peft.tuners.lora import LoraLayer
    try:
        wrapped = peft_model(model, settings)
    except ValueError as error:
        return {"refused": type(error).__name__}
    adapted = {name.removeprefix("base_model.model."): [module.r["default"], module.scaling["default"]]
               for name, module in wrapped.named_modules() if isinstance(module, LoraLayer)}
    trained = sorted(re.sub(r"\.modules_to_save\.default|\.default", "", name) for name, p in wrapped.named_parameters() if p.requires_grad)
    return {"adapted": adapted, "trained": trained}


def save(model_or_adapter, folder):
    """save_pretrained without what differs from run to run: the order of sets, model cards."""
    model_or_adapter.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for file in folder.glob("*.json"):
        content = json.loads(file.read_text())
        for key in ("target_modules", "exclude_modules"):
            if isinstance(content.get(key), list):
                content[key] = sorted(content[key])
        content.pop("base_model_name_or_path", None)
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def make(golden):
    import torch
    ids = torch.tensor(IDS)
    logits, cases = {"ids": ids}, {}
    for name, model in models():
        save(model, golden / "peft" / name)
        with torch.no_grad():
            logits[name] = model(input_ids=ids).logits[0]
    for case, settings in FOLDERS.items():
        model = dict(models())[case.split(".")[0]]
        wrapped = peft_model(model, settings, SEED)
        save(wrapped, golden / "peft" / case)
        with torch.no_grad():
            logits[case] = wrapped(input_ids=ids).logits[0]
    for case, settings in MATCHING.items():
        for name in ("llama_tied", "phi3"):
            cases[f"{name}.{case}"] = {"config": settings, **matching(dict(models())[name], settings)}
    oracle.save_golden(golden / "peft" / "logits.safetensors", logits, SEED, packages=("torch", "transformers", "peft"))
    story = {"script": "tests/oracle/peft_adapter_oracle.py", "versions": oracle.versions("torch", "transformers", "peft"), "seed": str(SEED)}
    (golden / "peft" / "matching.json").write_text(json.dumps({"": story, **cases}, indent=1) + "\n")


def log_probabilities(logits):
    import torch
    chosen = torch.log_softmax(logits[:-1].double(), dim=-1)
    return [chosen[i, IDS[0][i + 1]].item() for i in range(len(chosen))]


def live(alambic):
    import peft
    import torch
    expected = __import__("safetensors.torch", fromlist=["load_file"]).load_file(oracle.GOLDEN / "peft" / "logits.safetensors")
    for case in FOLDERS:
        base = oracle.GOLDEN / "peft" / case.split(".")[0]
        told = oracle.run_json(alambic, "score", "--model", base, "--adapter", oracle.GOLDEN / "peft" / case,
                               "--ids", ",".join(map(str, IDS[0])), "--compute", "f32")
        oracle.assert_close(told["logprobs"], log_probabilities(expected[case]), 1e-4, 1e-5, f"alambic score on PEFT's {case}")
    with tempfile.TemporaryDirectory() as scratch:
        program = alambic.parent.parent / "checkpoints" / "checkpoints_tests"
        subprocess.run([program, "--gtest_filter=*WritesWhatPeftReads*"], check=True, env={**os.environ, "ALAMBIC_TEST_OUTPUT": scratch},
                       stdout=subprocess.DEVNULL)
        for case in FOLDERS:
            model = dict(models())[case.split(".")[0]]
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                wrapped = peft.PeftModel.from_pretrained(model, pathlib.Path(scratch) / case).eval()
            with torch.no_grad():
                oracle.assert_close(wrapped(input_ids=torch.tensor(IDS)).logits[0], expected[case], 1e-5, 1e-5, f"PEFT on our {case}")
    print(f"{len(FOLDERS)} adapters: alambic scores PEFT's as PEFT does, PEFT reads ours")


if __name__ == "__main__":
    oracle.main(make, live)
