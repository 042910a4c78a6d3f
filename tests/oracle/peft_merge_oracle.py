# SPDX-License-Identifier: Apache-2.0
"""PEFT's merge_and_unload() on one Linear, for every variant that alambic merges."""
import math

import oracle

SEED = 11
VARIANTS = {
    "lora": dict(r=4, lora_alpha=8),
    "lora_alpha_below_rank": dict(r=8, lora_alpha=1),
    "rslora": dict(r=4, lora_alpha=8, use_rslora=True),
    "dora": dict(r=4, lora_alpha=8, use_dora=True),
    "dora_rslora": dict(r=2, lora_alpha=16, use_dora=True, use_rslora=True),
    "rank_one": dict(r=1, lora_alpha=3),
    "rank_above_size": dict(r=24, lora_alpha=24),
}


def make(golden):
    import peft
    import torch
    tensors = {}
    for number, (name, settings) in enumerate(VARIANTS.items()):
        for bias in (False, True):
            torch.manual_seed(SEED + number)
            model = torch.nn.Sequential(torch.nn.Linear(20, 12, bias=bias))
            wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], **settings)).eval()
            layer = wrapped.base_model.model[0]
            with torch.no_grad():
                for parameter in wrapped.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter) * 0.3)
            x = torch.randn(5, 20)
            case = name + (".bias" if bias else "")
            tensors[f"{case}.x_TI"] = x
            tensors[f"{case}.adapted_y_TO"] = wrapped(x)
            tensors[f"{case}.base_OI"] = layer.base_layer.weight.clone()
            if bias:
                tensors[f"{case}.bias_O"] = layer.base_layer.bias.clone()
            tensors[f"{case}.a_RI"] = layer.lora_A["default"].weight
            tensors[f"{case}.b_OR"] = layer.lora_B["default"].weight
            if settings.get("use_dora"):
                tensors[f"{case}.magnitude_O"] = layer.lora_magnitude_vector["default"].weight
            scale = settings["lora_alpha"] / (math.sqrt(settings["r"]) if settings.get("use_rslora") else settings["r"])
            assert math.isclose(scale, layer.scaling["default"]), "PEFT's scale is not what the config says"
            tensors[f"{case}.scale"] = torch.tensor(scale, dtype=torch.float64)
            tensors[f"{case}.merged_OI"] = wrapped.merge_and_unload()[0].weight
    oracle.save_golden(golden / "peft_merge.safetensors", tensors, SEED, packages=("torch", "peft"))


if __name__ == "__main__":
    oracle.main(make)
