# SPDX-License-Identifier: Apache-2.0
"""Merged folders, loaded by transformers: their logits are those of base + adapter in PEFT. Live only.

Tiny models in several shards (adapters of every kind, the tied head in all its ways), and SmolLM2-135M imported from GGUF.
"""
import json
import pathlib
import tempfile
import warnings

import oracle

warnings.simplefilter("ignore")
SEED = 23
IDS = [[3, 170, 41, 5, 5, 220, 9, 3000, 1, 44, 12, 8]]

CASES = {
    "tied.lora": dict(r=8, lora_alpha=16, target_modules="all-linear"),
    "tied.dora_rslora": dict(r=4, lora_alpha=8, use_dora=True, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    "tied.save_embedding": dict(r=4, target_modules="all-linear", modules_to_save=["embed_tokens"]),
    "tied.save_head": dict(r=4, target_modules="all-linear", modules_to_save=["lm_head"]),
    "tied.save_tied": dict(r=4, target_modules="all-linear", modules_to_save=["lm_head"], ensure_weight_tying=True),
    "tied.head": dict(r=4, target_modules=["q_proj", "lm_head"]),
    "untied.save_both": dict(r=4, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"]),
}


def adapter_on(model, settings, size):
    """A PEFT model whose trained tensors, B included, were all moved by random values."""
    import peft
    import torch
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    return wrapped.eval()


def logits(model):
    import torch
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits[0]


def load(folder, head_tied):
    import torch
    import transformers
    model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not told.get(kind), f"{folder}: {kind}: {told[kind]}"
    assert model.config.tie_word_embeddings == head_tied, f"{folder}: tie_word_embeddings is {model.config.tie_word_embeddings}"
    return model.eval()


def tiny(alambic, scratch):
    import torch
    import transformers
    for case, settings in CASES.items():
        tied = case.startswith("tied")
        torch.manual_seed(SEED)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=4000, hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied)).eval()
        base, adapter, merged = (scratch / f"{case}.{kind}" for kind in ("base", "adapter", "merged"))
        model.save_pretrained(base)
        wrapped = adapter_on(model, settings, 0.05)
        wrapped.save_pretrained(adapter)
        report = oracle.run_json(alambic, "merge", adapter, merged, "--base", base, "--max-shard-megabytes", 1)
        assert len(list(merged.glob("model-*-of-*.safetensors"))) > 1, "one shard only"
        keeps_tie = case in ("tied.lora", "tied.dora_rslora", "tied.save_tied")
        assert report["head_tied"] == keeps_tie, case
        oracle.assert_close(logits(load(merged, keeps_tie)), logits(wrapped), 1e-4, 1e-4, case)
        oracle.run(alambic, "merge", adapter, merged, "--base", base, "--max-shard-megabytes", 1)  # done already
        oracle.run(alambic, "merge", adapter, merged, "--base", base, "--weights", "bf16", expect=2)  # another merge
    print(f"{len(CASES)} tiny merges load in transformers with PEFT's logits")


def smollm2(alambic, scratch):
    import torch
    import transformers
    base, adapter = scratch / "smollm2", scratch / "smollm2.adapter"
    oracle.run(alambic, "import", oracle.smollm2(), base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    before = logits(model)
    wrapped = adapter_on(model, dict(r=8, lora_alpha=16, target_modules="all-linear"), 0.01)
    wrapped.save_pretrained(adapter)
    expected = logits(wrapped)
    assert (expected - before).abs().max() > 0.5, "the adapter changes nothing: the test is void"
    for weights, relative in (("auto", 1e-4), ("bf16", 5e-2)):
        merged = scratch / f"smollm2.{weights}"
        report = oracle.run_json(alambic, "merge", adapter, merged, "--base", base, "--weights", weights)
        again = load(merged, True)
        oracle.assert_close(logits(again), expected, 0, relative * float(expected.abs().max()), f"SmolLM2, {weights}")
        assert transformers.AutoTokenizer.from_pretrained(merged).chat_template, "the chat template was lost"
        config = json.loads((merged / "config.json").read_text())
        assert config.get("dtype", config.get("torch_dtype")) == {"f32": "float32", "bf16": "bfloat16"}[report["weights"]], config
        print(f"SmolLM2 merged as {report['weights']}: KL {report['probe']['kl']:.2g} nats a token, {report['megabytes_per_second']:.0f} MB/s")


def live(alambic):
    with tempfile.TemporaryDirectory() as scratch:
        tiny(alambic, pathlib.Path(scratch))
        smollm2(alambic, pathlib.Path(scratch))


if __name__ == "__main__":
    oracle.main(live=live)
