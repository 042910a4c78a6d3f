# SPDX-License-Identifier: Apache-2.0
"""A step of on-policy distillation by transformers, PEFT and TRL, on the models of distill_step.safetensors: the student (with its
adapter) generates greedily from prompts by transformers' generate(), and TRL's generalized_jsd_loss judges the new tokens.

Tensors: "prompts", "prompt_lengths", "lengths" (prompt and new tokens), "ids" (all behind each other); "<case>.loss" and
"<case>.gradient.<adapter tensor>".
"""
import json

import oracle
from divergence_oracle import trl_jsd

SEED = 37
NEW_TOKENS, TEMPERATURE = 12, 2.0
CASES = {"jensen_shannon": 0.5, "skewed": 0.1, "reverse_kl": 1.0}  # beta
PROMPTS = [[3, 17, 40], [9], [25, 31, 5, 5, 44, 12, 58], [50, 7]]


def make(folder):
    import peft
    import torch
    import transformers as t
    from safetensors import safe_open
    with safe_open(oracle.GOLDEN / "distill_step.safetensors", "pt") as file:
        golden, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()

    def model(name):
        config = json.loads(metadata[f"{name}.config"])
        made = t.AutoModelForCausalLM.from_config(t.AutoConfig.for_model(**config))
        missing, unexpected = made.load_state_dict({k[len(name) + 1:]: v for k, v in golden.items() if k.startswith(name + ".")}, strict=False)
        assert set(missing) <= {"lm_head.weight"} and not unexpected
        made.tie_weights()
        return made.eval()
    student, teacher = model("student"), model("teacher")
    vocabulary = student.config.vocab_size
    student = peft.get_peft_model(student, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"))
    peft.set_peft_model_state_dict(student, {k[len("adapter."):]: v for k, v in golden.items() if k.startswith("adapter.")})
    student.eval()
    settings = dict(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    free = student.generate(input_ids=torch.tensor([PROMPTS[0]]), eos_token_id=-1, **settings)[0].tolist()
    stop = free[len(PROMPTS[0]) + 4]  # so that one document ends early
    rows = [student.generate(input_ids=torch.tensor([prompt]), eos_token_id=stop, **settings)[0].tolist() for prompt in PROMPTS]
    assert len(rows[0]) < len(PROMPTS[0]) + NEW_TOKENS and max(map(len, rows)) >= 1 + NEW_TOKENS

    longest = max(map(len, rows))
    ids, labels = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -100)
    for i, (prompt, row) in enumerate(zip(PROMPTS, rows)):
        ids[i, :len(row)] = torch.tensor(row)
        labels[i, len(prompt):len(row)] = torch.tensor(row[len(prompt):])
    mask = torch.tensor([[j < len(row) for j in range(longest)] for row in rows]).long()
    tensors = {"prompts": torch.tensor(sum(PROMPTS, [])), "prompt_lengths": torch.tensor([len(p) for p in PROMPTS]),
               "lengths": torch.tensor([len(row) for row in rows]), "ids": torch.tensor(sum(rows, [])), "stop": torch.tensor(stop)}
    jsd = trl_jsd()
    with torch.no_grad():
        judged = teacher(input_ids=ids, attention_mask=mask).logits[:, :-1, :vocabulary]
    for case, beta in CASES.items():
        student.zero_grad()
        said = student(input_ids=ids, attention_mask=mask).logits[:, :-1]
        # TRL's loss has no t^2, which ours has (arXiv:1503.02531, section 2).
        loss = jsd(said, judged, labels=labels[:, 1:], beta=beta, temperature=TEMPERATURE, reduction="sum") * TEMPERATURE ** 2
        loss.backward()
        gradients = {key.replace(".default.", "."): p.grad for key, p in student.named_parameters() if p.requires_grad}
        assert len(gradients) == 28
        tensors |= {f"{case}.loss": loss.double()} | {f"{case}.gradient.{key}": value for key, value in gradients.items()}
    oracle.save_golden(folder / "on_policy.safetensors", tensors, SEED, packages=("torch", "transformers", "peft", "trl"))


if __name__ == "__main__":
    oracle.main(make)
