# SPDX-License-Identifier: Apache-2.0
"""LoRA steps with transformers and PEFT: the same model, ids, rank and optimiser as `alambic_bench step`.

    train_step.py MODEL f32|bf16 ROWS LENGTH
"""
import json
import statistics
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from memory import resident_gb

model_folder, dtype, rows, length = sys.argv[1], {"f32": torch.float32, "bf16": torch.bfloat16}[sys.argv[2]], int(sys.argv[3]), int(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
vocabulary = model.config.vocab_size
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"))
model.train()
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
i = torch.arange(rows * length)
ids = ((i * 7919 + (i % 31) * 104_729 + 17) % vocabulary).view(rows, length)

losses, seconds = [], []
for step in range(1 + max(2, 1024 // (rows * length))):  # the first one warms up
    start = time.perf_counter()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses.append(loss.item())
    if step > 0:
        seconds.append(time.perf_counter() - start)
print(json.dumps({"value": rows * length / statistics.median(seconds), "unit": "tokens/s", "peak_memory_gb": resident_gb("VmHWM"), "losses": losses}))
