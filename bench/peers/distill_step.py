# SPDX-License-Identifier: Apache-2.0
"""Distillation steps with transformers and PEFT: two of the same model, full-vocabulary forward KL, LoRA on the student, AdamW.

    distill_step.py MODEL f32|bf16 [rows=1] [length=512] [steps=3]
"""
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from memory import resident_gb

model_folder, dtype = sys.argv[1], {"f32": torch.float32, "bf16": torch.bfloat16}[sys.argv[2]]
wanted = {"rows": "1", "length": "512", "steps": "3"} | dict(word.split("=", 1) for word in sys.argv[3:])
rows, length, steps = int(wanted["rows"]), int(wanted["length"]), int(wanted["steps"])
teacher = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype).eval()
model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
vocabulary = model.config.vocab_size
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"))
model.train()
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
with torch.no_grad():  # adapters that change something, the same here and there
    for parameter in trained:
        i = torch.arange(parameter.numel())
        parameter.copy_(((((i * 7919 + (i % 31) * 104_729 + 17) % 1000).float() / 1000 - 0.5) * 0.1).view_as(parameter))
optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
i = torch.arange(rows * length)
ids = ((i * 7919 + (i % 31) * 104_729 + 17) % vocabulary).view(rows, length)

losses, seconds = [], []
for step in range(1 + steps):  # the first one warms up
    start = time.perf_counter()
    with torch.no_grad():
        teacher_logits = teacher(input_ids=ids, use_cache=False).logits[:, :-1]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    log_p, log_q = F.log_softmax(teacher_logits.float(), -1), F.log_softmax(logits.float(), -1)
    loss = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / (rows * (length - 1))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses.append(loss.item())
    if step > 0:
        seconds.append(time.perf_counter() - start)
print(json.dumps({"value": rows * length / statistics.median(seconds), "unit": "tokens/s", "peak_memory_gb": resident_gb("VmHWM"), "losses": losses}))
