# SPDX-License-Identifier: Apache-2.0
"""Hidden-state and attention matching by transformers, PEFT and plain torch: a Mistral student with sliding windows and LoRA, a
Qwen3 teacher (normalised queries and keys, other widths and heads). Losses and all gradients, those of the projections included.
"""
import json
import math

import oracle

SEED = 37
ROWS, LONGEST, VOCABULARY, WINDOW = 3, 18, 48, 7
PAIRS = [(1, 0), (2, 1)]  # (teacher, student): uniform, three blocks on two
RELATION_HEADS, RANK, LORA_ALPHA = 4, 4, 8
# name: hidden, attention, loss, projections, relations, relation heads
CASES = {"shared": (0.5, 2.0, "mse", 1, ["qk"], 0), "layer": (2.0, 0.5, "cosine", 2, ["qq", "kk", "vv"], RELATION_HEADS)}


def make(folder):
    import peft
    import torch
    import torch.nn.functional as F
    import transformers as t
    torch.manual_seed(SEED)
    common = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=None, tie_word_embeddings=True, attn_implementation="eager")
    configs = {"student": t.MistralConfig(**common, vocab_size=VOCABULARY, hidden_size=24, head_dim=6, intermediate_size=24, num_hidden_layers=2, sliding_window=WINDOW),
               "teacher": t.Qwen3Config(**common, vocab_size=VOCABULARY, hidden_size=32, head_dim=8, intermediate_size=24, num_hidden_layers=3)}
    models, tensors, metadata, seen = {}, {}, {}, {}
    for name, config in configs.items():
        model = t.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
        tensors |= {f"{name}.{key}": value.clone() for key, value in model.state_dict().items() if key != "lm_head.weight"}
        metadata[f"{name}.config"] = json.dumps(model.config.to_diff_dict() | {"architectures": [type(model).__name__], "model_type": config.model_type})
        models[name] = model.eval()
        # What blocks and their attention make: transformers' hidden_states show the last one normalised.
        for number, block in enumerate(model.model.layers):
            def keep_at(key):
                return lambda module, inputs, output: seen.__setitem__(key, output[0] if isinstance(output, tuple) else output)
            block.register_forward_hook(keep_at((name, "hidden", number)))
            attention = block.self_attn
            for kind, module in (("q", getattr(attention, "q_norm", attention.q_proj)), ("k", getattr(attention, "k_norm", attention.k_proj)), ("v", attention.v_proj)):
                if name == "student":
                    continue  # PEFT wraps its projections below
                module.register_forward_hook(keep_at((name, kind, number)))
    student = peft.get_peft_model(models["student"], peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear"))
    for number, block in enumerate(student.base_model.model.model.layers):
        for kind in "qkv":
            getattr(block.self_attn, f"{kind}_proj").register_forward_hook(lambda module, inputs, output, key=("student", kind, number): seen.__setitem__(key, output))
    trained = {key: parameter for key, parameter in student.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for key, parameter in trained.items():
            if "lora_B" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    tensors |= {f"adapter.{key}": value.clone() for key, value in peft.get_peft_model_state_dict(student).items()}

    ids = torch.randint(3, VOCABULARY, (ROWS, LONGEST))
    keep = torch.rand(ROWS, LONGEST) < 0.6
    keep[:, -1] = False
    weights = torch.where(torch.rand(int(keep.sum())) < 0.2, 0.0, torch.rand(int(keep.sum())) + 0.5)  # of the kept rows
    place = torch.arange(LONGEST)
    visible = (place[None, :] <= place[:, None]) & (place[:, None] - place[None, :] < WINDOW)

    def relation(name, kind, number, heads):
        x = seen[name, kind, number].flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)
        return (x @ x.transpose(2, 3) / math.sqrt(x.shape[-1])).masked_fill(~visible, -math.inf).softmax(-1)

    for case, (hidden, attention, loss_kind, count, relations, heads) in CASES.items():
        with torch.no_grad():
            theirs = models["teacher"](input_ids=ids, output_attentions=True).attentions
        projections = [torch.nn.Parameter(torch.randn(32, 24) * 0.2) for _ in range(count)]
        tensors |= {f"{case}.projection.{i}": projection.clone() for i, projection in enumerate(projections)}
        for parameter in trained.values():
            parameter.grad = None
        ours = student(input_ids=ids, output_attentions=True).attentions
        hidden_sum = attention_sum = 0
        for i, (teacher_block, student_block) in enumerate(PAIRS):
            mapped = F.linear(seen["student", "hidden", student_block], projections[i if count > 1 else 0])
            expected = seen["teacher", "hidden", teacher_block].detach()
            each = F.mse_loss(mapped, expected, reduction="none").mean(-1) if loss_kind == "mse" else 1 - F.cosine_similarity(mapped, expected, dim=-1)
            hidden_sum = hidden_sum + (each[keep] * weights).sum() / len(PAIRS)
            for kind in relations:
                if kind == "qk":  # the attention itself; the teacher's, which has no window, over what the student sees
                    p, q = theirs[teacher_block].masked_fill(~visible, 0), ours[student_block]
                    p = p / p.sum(-1, keepdim=True)
                else:
                    p, q = relation("teacher", kind[0], teacher_block, heads).detach(), relation("student", kind[0], student_block, heads)
                kl = torch.where(visible, p * (torch.where(visible, p, 1).log() - torch.where(visible, q, 1).log()), 0).sum(-1).mean(1)
                attention_sum = attention_sum + (kl[keep] * weights).sum() / len(PAIRS)
        loss = hidden * hidden_sum + attention * attention_sum
        loss.backward()
        tensors |= {f"{case}.gradient.{key.replace('.default.', '.')}": torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone() for key, parameter in trained.items()}
        tensors |= {f"{case}.projection_gradient.{i}": projection.grad for i, projection in enumerate(projections)}
        tensors |= {f"{case}.hidden": hidden_sum.double(), f"{case}.attention": attention_sum.double(), f"{case}.loss": loss.double()}
    tensors |= {"ids": ids, "keep": keep, "weights": weights}
    oracle.save_golden(folder / "match.safetensors", tensors, SEED, packages=("torch", "transformers", "peft"), **metadata)


if __name__ == "__main__":
    oracle.main(make)
