# SPDX-License-Identifier: Apache-2.0
"""Seconds until transformers has a model's weights in memory, and the most memory that took.

    load.py MODEL f32|bf16
"""
import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM

from memory import resident_gb

dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[sys.argv[2]]
before = resident_gb("VmRSS")
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype)
total = sum(float(parameter.detach().flatten()[::1024].sum()) for parameter in model.parameters())  # touches every mapped page
seconds = time.perf_counter() - start
assert total == total
print(json.dumps({"value": seconds, "unit": "s", "peak_memory_gb": resident_gb("VmHWM"), "libraries_gb": before}))
