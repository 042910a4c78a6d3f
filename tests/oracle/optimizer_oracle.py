# SPDX-License-Identifier: Apache-2.0
"""Twenty steps of every optimiser but plain AdamW (adamw_oracle.py), by whoever made it: bitsandbytes' AdamW8bit, transformers'
Adafactor, torch's Muon; the learning rates that PEFT's LoRA+ gives to the parameters of a model; the noise of transformers'
NEFTune hook.

Gradients of step t are one stored tensor, rolled by 37 t places and times a factor: the C++ test makes them again exactly.
"""
import json

import oracle

SEED = 21
STEPS = 20
RATE, DECAY = 1e-2, 0.1
MATRICES = {"layers.0.self_attn.q_proj.weight": (24, 40), "layers.0.mlp.down_proj.weight": (40, 24), "layers.0.self_attn.o_proj.weight": (16, 16)}
VECTORS = {"layers.0.input_layernorm.weight": (40,), "layers.0.self_attn.q_proj.bias": (24,)}
WHOLE = {"embed_tokens.weight": (30, 8)}


def gradient_of(base, step):
    return base.flatten().roll(37 * step).view(base.shape) * (0.02 if step % 3 == 0 else 0.5)


def parameters_of(shapes, generator, torch, wide=False):
    tensors, parameters = {}, {}
    for name, shape in shapes.items():
        parameters[name] = torch.nn.Parameter(torch.randn(*shape, generator=generator))
        base = torch.randn(*shape, generator=generator)
        if wide:  # all decades of the 8-bit format, and zeros
            base *= 10 ** (-8 * torch.rand(*shape, generator=generator))
            base[torch.rand(*shape, generator=generator) < 0.1] = 0
        tensors[f"initial.{name}"], tensors[f"gradient.{name}"] = parameters[name].detach().clone(), base
    return parameters, tensors


def train(parameters, tensors, *optimizers, after=lambda step: None):
    for step in range(STEPS):
        for name, parameter in parameters.items():
            parameter.grad = gradient_of(tensors[f"gradient.{name}"], step)
        for optimizer in optimizers:
            optimizer.step()
        after(step)
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def make_adamw8bit(folder, torch):
    import bitsandbytes
    shapes = {"layers.0.mlp.up_proj.weight": (66, 70), "layers.0.input_layernorm.weight": (4100,), "layers.0.self_attn.q_proj.weight": (20, 9)}
    generator = torch.Generator().manual_seed(SEED)
    parameters, tensors = parameters_of(shapes, generator, torch, wide=True)
    tensors["signed_map"] = bitsandbytes.functional.create_dynamic_map(signed=True)
    tensors["unsigned_map"] = bitsandbytes.functional.create_dynamic_map(signed=False)
    decayed = [p for name, p in parameters.items() if "layernorm" not in name]
    exempt = [p for name, p in parameters.items() if "layernorm" in name]
    optimizer = bitsandbytes.optim.AdamW8bit([{"params": decayed, "weight_decay": DECAY}, {"params": exempt, "weight_decay": 0.0}],
                                             lr=RATE, betas=(0.9, 0.98), eps=1e-7)

    def after(step):
        for name, parameter in parameters.items():
            state = optimizer.state[parameter]
            assert (state["state1"].dtype == torch.uint8) == (parameter.numel() >= 4096)
            if step in (0, 9, STEPS - 1) and parameter.numel() >= 4096:
                for key, ours in (("state1", "mean"), ("state2", "square"), ("absmax1", "mean_scale"), ("absmax2", "square_scale")):
                    tensors[f"{step}.{ours}.{name}"] = state[key].clone()
    tensors.update({f"final.{name}": value for name, value in train(parameters, tensors, optimizer, after=after).items()})
    oracle.save_golden(folder / "adamw8bit.safetensors", tensors, SEED, packages=("torch", "bitsandbytes"))


def make_adafactor(folder, torch):
    import transformers
    generator = torch.Generator().manual_seed(SEED + 1)
    initial, tensors = parameters_of({**MATRICES, **VECTORS, **WHOLE}, generator, torch)
    for scaled in (False, True):
        parameters = {name: torch.nn.Parameter(value.detach().clone()) for name, value in initial.items()}
        groups = [{"params": [p], "weight_decay": 0.0 if "norm" in name or "bias" in name else DECAY} for name, p in parameters.items()]
        optimizer = transformers.Adafactor(groups, lr=RATE, scale_parameter=scaled, relative_step=False, warmup_init=False)
        tensors.update({f"{'scaled' if scaled else 'plain'}.{name}": value for name, value in train(parameters, tensors, optimizer).items()})
    oracle.save_golden(folder / "adafactor.safetensors", tensors, SEED + 1)


class InF32:
    """torch, but for the type of the Newton-Schulz products."""
    def __init__(self, torch):
        self._torch, self.bfloat16 = torch, torch.float32

    def __getattr__(self, name):
        return getattr(self._torch, name)


def make_muon(folder, torch):
    import importlib
    module = importlib.import_module("torch.optim._muon")
    generator = torch.Generator().manual_seed(SEED + 2)
    initial, tensors = parameters_of({**MATRICES, **VECTORS, **WHOLE}, generator, torch)
    for products in ("bf16", "f32"):
        if products == "f32":
            module.torch = InF32(torch)
        for rule in ("match_rms_adamw", "original", "spectral_unclamped"):
            parameters = {name: torch.nn.Parameter(value.detach().clone()) for name, value in initial.items()}
            muon = torch.optim.Muon([parameters[name] for name in MATRICES], lr=RATE, weight_decay=DECAY, momentum=0.9, adjust_lr_fn=rule)
            rest = torch.optim.AdamW([{"params": [parameters[name] for name in WHOLE], "weight_decay": DECAY},
                                      {"params": [parameters[name] for name in VECTORS], "weight_decay": 0.0}], lr=RATE)
            tensors.update({f"{products}.{rule}.{name}": value for name, value in train(parameters, tensors, muon, rest).items()})
    module.torch = torch
    oracle.save_golden(folder / "muon.safetensors", tensors, SEED + 2)


def make_rates(folder, torch):
    """Which parameter gets which rate and decay, by PEFT's function, on the tiny model of the PEFT goldens."""
    import peft
    import transformers
    from peft.optimizers import create_loraplus_optimizer
    transformers.logging.set_verbosity_error()
    base = transformers.AutoModelForCausalLM.from_pretrained(str(oracle.GOLDEN / "peft" / "llama_untied"))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head", "norm"]))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=16.0, loraplus_weight_decay=DECAY)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)].replace("modules_to_save.default.", "").replace(".default", "")
            rates[name.replace("magnitude_vector.weight", "magnitude_vector")] = [group["lr"], group["weight_decay"]]
    oracle.save_golden(folder / "loraplus.safetensors", {"nothing": torch.zeros(1)}, SEED, packages=("torch", "transformers", "peft"), rates=json.dumps(rates, sort_keys=True))


def make_neftune(folder, torch):
    from transformers.integrations.neftune import neftune_post_forward_hook
    torch.manual_seed(SEED + 3)
    module = torch.nn.Embedding(4, 32)
    tensors = {}
    for alpha, length in ((5.0, 3), (5.0, 50), (15.0, 50)):
        module.neftune_noise_alpha = alpha
        tensors[f"{alpha:g}.{length}"] = neftune_post_forward_hook(module, None, torch.zeros(1, length, 32))[0]
    oracle.save_golden(folder / "neftune.safetensors", tensors, SEED + 3)


def make(folder):
    import torch
    for part in (make_adamw8bit, make_adafactor, make_muon, make_rates, make_neftune):
        part(folder, torch)


if __name__ == "__main__":
    oracle.main(make)
