# SPDX-License-Identifier: Apache-2.0
"""Twenty LoRA steps by PEFT: same data, order and initial adapter as alambic's step() is given.

Every step accumulates two micro-batches of two padded rows; the loss is the sum over unmasked tokens divided by their number
in the whole step. AdamW, cosine schedule with warm-up, clipping that bites.

live() does it with the real SmolLM2 and the program itself: prepare and train, three steps of two rows of 128 tokens.
"""
import json
import pathlib
import tempfile

import oracle

SEED = 13
STEPS, MICRO_BATCHES, ROWS, LONGEST = 20, 2, 2, 20
LEARNING_RATE, WARMUP, WEIGHT_DECAY, MAX_NORM, RANK, ALPHA = 5e-3, 4, 0.01, 0.5, 4, 8


def models():
    import transformers as t
    common = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    yield "llama", t.LlamaForCausalLM, t.LlamaConfig(**common, tie_word_embeddings=False)
    yield "qwen2", t.Qwen2ForCausalLM, t.Qwen2Config(**common, tie_word_embeddings=True)


def make(folder):
    import peft
    import torch
    import torch.nn.functional as F
    import transformers
    for number, (name, kind, config) in enumerate(models()):
        torch.manual_seed(SEED + number)
        model = kind(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        tensors = {f"base.{key}": value.clone() for key, value in model.state_dict().items()
                   if not (key == "lm_head.weight" and config.tie_word_embeddings)}
        base_config = json.dumps(model.config.to_diff_dict() | {"architectures": [kind.__name__], "model_type": config.model_type})
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear"))
        trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
        with torch.no_grad():
            for key, parameter in trained.items():
                if "lora_B" in key:  # not zero, so that A learns from the first step on
                    parameter.copy_(torch.randn_like(parameter) * 0.05)
        saved = lambda: {key: value.clone() for key, value in peft.get_peft_model_state_dict(model).items()}
        tensors |= {f"initial.{key}": value for key, value in saved().items()}
        assert len(saved()) == len(trained)

        shape = (STEPS, MICRO_BATCHES, ROWS)
        lengths = torch.randint(5, LONGEST + 1, shape)
        ids = torch.randint(3, config.vocab_size, (*shape, LONGEST))
        for place in range(1, LONGEST):  # mostly a fixed successor, so that there is something to learn
            ids[..., place] = torch.where(torch.rand(shape) < 0.8, (ids[..., place - 1] * 5 + 3) % config.vocab_size, ids[..., place])
        mask = (torch.rand(*shape, LONGEST) < 0.6) & (torch.arange(LONGEST) < lengths[..., None])
        mask[..., 0] = False
        mask[..., 2] = True  # at least one kept token a row
        tensors |= {"lengths": lengths, "ids": ids, "mask": mask}

        optimizer = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
        losses, norms = [], []
        model.train()
        for step in range(STEPS):
            kept = mask[step].sum()
            total = 0.0
            for micro in range(MICRO_BATCHES):
                attention = (torch.arange(LONGEST) < lengths[step, micro][:, None]).long()
                logits = model(input_ids=ids[step, micro], attention_mask=attention).logits[:, :-1]
                labels = torch.where(mask[step, micro], ids[step, micro], -100)[:, 1:]
                loss = F.cross_entropy(logits.reshape(-1, config.vocab_size), labels.reshape(-1), ignore_index=-100, reduction="sum") / kept
                loss.backward()
                total += loss.detach().double()
            losses.append(total)
            norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), MAX_NORM).double())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        assert sum(losses[-5:]) < sum(losses[:5]), "the reference run learns nothing"
        assert max(norms) > MAX_NORM, "clipping never bites"
        tensors |= {"losses": torch.stack(losses), "norms": torch.stack(norms)} | {f"final.{key}": value for key, value in saved().items()}
        oracle.save_golden(folder / f"peft_training_{name}.safetensors", tensors, SEED + number, packages=("torch", "transformers", "peft"), config=base_config)


# Two documents, longer than a row, make every step one epoch: the order of the data is then the same here and there.
LIVE_TEXTS = [" ".join(f"Article {n}: everyone has the right to question {n * 7 % 13}, and {noun} may not be taken away." for n in range(1, 40))
              for noun in ("property", "peace")]
LIVE_STEPS, LIVE_ROW, LIVE_RATE = 3, 128, 2e-4


def live(alambic):
    import peft
    import safetensors.torch
    import torch
    import torch.nn.functional as F
    import transformers

    import token_store_oracle
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        oracle.run(alambic, "import", oracle.smollm2(), folder / "base")
        (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in LIVE_TEXTS))
        oracle.run(alambic, "prepare", "-m", folder / "base", "-i", folder / "texts.jsonl", "-o", folder / "store")
        config = {"model": str(folder / "base"), "lora": {"rank": 8, "alpha": 16}, "compute_type": "f32", "seed": SEED,
                  "data": {"mixture": [{"store": str(folder / "store")}], "row_length": LIVE_ROW, "rows_per_batch": 2, "batches_per_step": 1},
                  "optimizer": {"weight_decay": 0.01, "max_grad_norm": 1.0}}

        def train(name, steps, rate):
            settings = config | {"output": str(folder / name), "limits": {"max_steps": steps},
                                 "schedule": {"shape": "cosine", "learning_rate": rate, "warmup_steps": 0}}
            (folder / f"{name}.yaml").write_text(json.dumps(settings))  # JSON is YAML
            oracle.run(alambic, "train", folder / f"{name}.yaml")
            lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
            return [line for line in lines if line["kind"] == "train"]

        train("start", 1, 0.0)  # a step of length 0: the adapter as it begins
        ours = train("run", LIVE_STEPS, LIVE_RATE)
        assert len(ours) == LIVE_STEPS

        _, documents = token_store_oracle.read_store(folder / "store")
        assert len(documents) == 2 and all(len(document["ids"]) > LIVE_ROW and all(document["mask"][1:]) for document in documents)
        ids = torch.tensor([[int(token) for token in document["ids"][:LIVE_ROW]] for document in documents])

        def peft_run(dtype):
            """PEFT's own run in f32, held against ours step by step, or in f64: the exact result."""
            model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
            model = peft.PeftModel.from_pretrained(model, folder / "start" / "adapter", is_trainable=True, autocast_adapter_dtype=False).to(dtype)
            model.train()
            trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
            assert len(trained) == 30 * 7 * 2 and all(bool((parameter == 0).all()) == ("lora_B" in key) for key, parameter in trained.items())
            optimizer = torch.optim.AdamW(trained.values(), lr=LIVE_RATE, weight_decay=0.01)
            schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 0, LIVE_STEPS)
            for step in range(LIVE_STEPS):
                logits = model(input_ids=ids).logits[:, :-1]
                loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
                assert ours[step]["kept_tokens"] == ids[:, 1:].numel() and ours[step]["learning_rate"] == schedule.get_last_lr()[0]
                oracle.assert_close(ours[step]["loss"], loss.detach(), 1e-4, 0, f"SmolLM2, step {step + 1}: loss")
                oracle.assert_close(ours[step]["grad_norm"], norm, 1e-3, 0, f"SmolLM2, step {step + 1}: gradient norm")
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            return {key: value.detach().double() for key, value in peft.get_peft_model_state_dict(model).items()}

        theirs, exact = peft_run(torch.float32), peft_run(torch.float64)
        assert ours[-1]["loss"] < ours[0]["loss"]
        mine = {key: value.double() for key, value in safetensors.torch.load_file(folder / "run" / "adapter" / "adapter_model.safetensors").items()}
        assert mine.keys() == theirs.keys() == exact.keys()
        start = safetensors.torch.load_file(folder / "start" / "adapter" / "adapter_model.safetensors")
        moved = sum(float((value - start[key].double()).square().sum()) for key, value in exact.items()) ** 0.5

        def error(adapter):  # of f32's rounding: (share of the way that was gone, largest of an element, share of elements beyond 1e-4)
            differences = torch.cat([(adapter[key] - value).abs().flatten() for key, value in exact.items()])
            return float(differences.square().sum()) ** 0.5 / moved, float(differences.max()), float((differences > 1e-4).double().mean())

        # AdamW's first steps are as long where a gradient is all but zero as elsewhere, so that single elements part further in any
        # f32 run, PEFT's too. Ours must be as near to the exact result as PEFT's.
        own, peers = error(mine), error(theirs)
        print(f"SmolLM2: {LIVE_STEPS} steps beside PEFT in f64 (share of the way, largest element, share of elements beyond 1e-4): ours {own}, PEFT in f32 {peers}")
        assert own[0] < 1.5 * peers[0] and own[0] < 1e-2, "SmolLM2: the adapter is further from the exact result than PEFT's in f32"
        assert own[1] < 3 * LIVE_RATE and own[2] < 1e-5, "SmolLM2: elements are further from the exact result than a rounding can move them"


if __name__ == "__main__":
    oracle.main(make, live)
