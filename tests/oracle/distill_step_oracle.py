# SPDX-License-Identifier: Apache-2.0
"""A whole distillation step by transformers and PEFT: full-vocabulary KL of two models, mixed with cross-entropy; loss and all
gradients of the student's LoRA. The teacher is another model with a vocabulary that is padded further.
"""
import json

import oracle

SEED = 31
ROWS, LONGEST, VOCABULARY, PADDED = 3, 18, 60, 64
ALPHA, TEMPERATURE, RANK, LORA_ALPHA = 0.7, 2.0, 4, 8


def make(folder):
    import peft
    import torch
    import torch.nn.functional as F
    import transformers as t
    torch.manual_seed(SEED)
    common = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    configs = {"student": t.LlamaConfig(**common, vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, num_hidden_layers=2, tie_word_embeddings=True),
               "teacher": t.Qwen2Config(**common, vocab_size=PADDED, hidden_size=32, intermediate_size=48, num_hidden_layers=3, tie_word_embeddings=False)}
    models, tensors, metadata = {}, {}, {}
    for name, config in configs.items():
        model = t.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
        tensors |= {f"{name}.{key}": value.clone() for key, value in model.state_dict().items() if not (key == "lm_head.weight" and config.tie_word_embeddings)}
        metadata[f"{name}.config"] = json.dumps(model.config.to_diff_dict() | {"architectures": [type(model).__name__], "model_type": config.model_type})
        models[name] = model.eval()
    student = peft.get_peft_model(models["student"], peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear"))
    trained = {key: parameter for key, parameter in student.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for key, parameter in trained.items():
            if "lora_B" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    tensors |= {f"adapter.{key}": value.clone() for key, value in peft.get_peft_model_state_dict(student).items()}

    ids = torch.randint(3, VOCABULARY, (ROWS, LONGEST))
    keep = torch.rand(ROWS, LONGEST) < 0.6
    keep[:, -1] = False  # nothing follows
    s, p = student(input_ids=ids).logits, models["teacher"](input_ids=ids).logits.detach()
    kept_s, kept_p = s[keep], p[keep]
    targets = ids.roll(-1, 1)[keep]
    text = F.cross_entropy(kept_s, targets, reduction="sum")
    log_p = F.log_softmax(kept_p[:, :VOCABULARY] / TEMPERATURE, -1)
    imitation = F.kl_div(F.log_softmax(kept_s / TEMPERATURE, -1), log_p, reduction="sum", log_target=True) * TEMPERATURE ** 2
    loss = (1 - ALPHA) * text + ALPHA * imitation
    loss.backward()
    gradients = {key.replace(".default.", "."): parameter.grad for key, parameter in trained.items()}
    tensors |= {f"gradient.{key}": value for key, value in gradients.items()}
    assert len(gradients) == 28
    tensors |= {"ids": ids, "keep": keep, "text": text.double(), "imitation": imitation.double(), "loss": loss.double()}
    oracle.save_golden(folder / "distill_step.safetensors", tensors, SEED, packages=("torch", "transformers", "peft"), **metadata)


if __name__ == "__main__":
    oracle.main(make)
