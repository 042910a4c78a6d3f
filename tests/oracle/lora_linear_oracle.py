# SPDX-License-Identifier: Apache-2.0
"""One adapted Linear against PEFT: LoRA and DoRA, with and without dropout and bias, values and all gradients.

PEFT's nn.Dropout is replaced by the mask of models/linear.h (a pure function of a seed), so that the rule by which PEFT
applies dropout is compared with the very same zeros. Golden lora_linear.safetensors: "<case>.<tensor>".
"""
import peft
import torch

import oracle

SEED = 20260902
TOKENS, INPUTS, OUTPUTS, RANK = 7, 10, 6, 3
CASES = {  # name: (dora, rslora, dropout, bias)
    "lora": (False, False, 0.0, False),
    "lora_bias_dropout": (False, True, 0.25, True),
    "dora_bias": (True, False, 0.0, True),
    "dora_bias_dropout": (True, False, 0.25, True),
}
BITS = (1 << 64) - 1


def mix64(x):
    x = (x + 0x9E3779B97F4A7C15) & BITS
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & BITS
    return x ^ (x >> 31)


def derive_seed(run_seed, purpose, numbers):  # core/random.h
    seed = mix64(run_seed)
    for letter in purpose.encode():
        seed = mix64(seed ^ letter)
    for number in numbers:
        seed = mix64(seed ^ mix64(number))
    return seed


class SeededDropout(torch.nn.Module):
    def __init__(self, probability, seed):
        super().__init__()
        self.probability, self.seed = probability, seed

    def forward(self, x):
        threshold = round(self.probability * 65536)
        keep = [((mix64((self.seed + i // 4) & BITS) >> (16 * (i % 4))) & 0xFFFF) >= threshold for i in range(x.numel())]
        return x * torch.tensor(keep, dtype=x.dtype).reshape(x.shape) / (1 - self.probability)


def make(folder):
    tensors = {}
    for name, (dora, rslora, dropout, bias) in CASES.items():
        torch.manual_seed(SEED)
        model = torch.nn.Sequential(torch.nn.Linear(INPUTS, OUTPUTS, bias=bias))
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=5, target_modules=["0"], use_dora=dora, use_rslora=rslora,
                                                           lora_dropout=dropout)).train()
        layer = model.base_model.model[0]
        if dropout:
            layer.lora_dropout["default"] = SeededDropout(dropout, derive_seed(77, "adapter", [3]))
        with torch.no_grad():
            layer.lora_B["default"].weight.normal_()
            if dora:  # away from the norm it starts at
                layer.lora_magnitude_vector["default"].weight.mul_(torch.rand(OUTPUTS) + 0.5)
        x = torch.randn(TOKENS, INPUTS, requires_grad=True)
        gradient = torch.randn(TOKENS, OUTPUTS)
        for parameter in layer.parameters():
            parameter.requires_grad_(True)
        y = layer(x)
        y.backward(gradient)
        parts = {"x": x, "weight": layer.base_layer.weight, "bias": layer.base_layer.bias, "a": layer.lora_A["default"].weight,
                 "b": layer.lora_B["default"].weight, "magnitude": layer.lora_magnitude_vector["default"].weight if dora else None}
        for part, tensor in parts.items():
            if tensor is not None:
                tensors[f"{name}.{part}"] = tensor
                tensors[f"{name}.grad.{part}"] = tensor.grad
        tensors[f"{name}.y"], tensors[f"{name}.grad.y"] = y, gradient
        tensors[f"{name}.scale"] = torch.tensor(layer.scaling["default"], dtype=torch.float64)
        tensors[f"{name}.dropout"] = torch.tensor(dropout, dtype=torch.float64)
    oracle.save_golden(folder / "lora_linear.safetensors", tensors, SEED, packages=("torch", "peft"))


if __name__ == "__main__":
    oracle.main(make)
