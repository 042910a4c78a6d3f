# SPDX-License-Identifier: Apache-2.0
"""Training steps with transformers and PEFT: the same model, ids, labels, rank and optimiser as `alambic_bench step`.

    train_step.py MODEL f32|bf16 [rows=4] [length=512] [labels=1] [method=lora|full] [quantize=none|nf4] [steps=3]

A row is one document, so packed documents of our side are rows here: nothing is padded and no attention crosses them.
"""
import json
import statistics
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from memory import resident_gb

model_folder, dtype = sys.argv[1], {"f32": torch.float32, "bf16": torch.bfloat16}[sys.argv[2]]
wanted = {"rows": "4", "length": "512", "labels": "1", "method": "lora", "quantize": "none", "steps": "3"} | dict(word.split("=", 1) for word in sys.argv[3:])
rows, length, steps = int(wanted["rows"]), int(wanted["length"]), int(wanted["steps"])
options = {}
if wanted["quantize"] == "nf4":
    from transformers import BitsAndBytesConfig
    options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype, **options)
vocabulary = model.config.vocab_size
if wanted["method"] == "lora":
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"))
model.train()
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
i = torch.arange(rows * length)
ids = ((i * 7919 + (i % 31) * 104_729 + 17) % vocabulary).view(rows, length)
labels = ids.clone()
labels[:, :int(length * (1 - float(wanted["labels"])))] = -100

losses, seconds = [], []
for step in range(1 + steps):  # the first one warms up
    start = time.perf_counter()
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses.append(loss.item())
    if step > 0:
        seconds.append(time.perf_counter() - start)
print(json.dumps({"value": rows * length / statistics.median(seconds), "unit": "tokens/s", "peak_memory_gb": resident_gb("VmHWM"), "losses": losses}))
