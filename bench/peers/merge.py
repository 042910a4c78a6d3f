# SPDX-License-Identifier: Apache-2.0
"""Merging a PEFT adapter into its base with PEFT itself: load, merge_and_unload, save_pretrained.

    merge.py make BASE ADAPTER          an adapter whose B is not zero, to merge
    merge.py merge BASE ADAPTER OUTPUT  prints the seconds after the imports
"""
import json
import sys
import time

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

base_folder, adapter_folder = sys.argv[2], sys.argv[3]
start = time.perf_counter()
base = AutoModelForCausalLM.from_pretrained(base_folder, dtype="auto")
if sys.argv[1] == "make":
    torch.manual_seed(1)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.01)
    model.save_pretrained(adapter_folder)
else:
    PeftModel.from_pretrained(base, adapter_folder).merge_and_unload().save_pretrained(sys.argv[4])
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(sys.argv[4])
    print(json.dumps({"seconds": time.perf_counter() - start}))
