# SPDX-License-Identifier: Apache-2.0
"""Twenty LoRA steps by PEFT: same data, order and initial adapter as alambic's step() is given.

Every step accumulates two micro-batches of two padded rows; the loss is the sum over unmasked tokens divided by their number
in the whole step. AdamW, cosine schedule with warm-up, clipping that bites.
"""
import json

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


if __name__ == "__main__":
    oracle.main(make)
