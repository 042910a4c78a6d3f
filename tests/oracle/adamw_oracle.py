# SPDX-License-Identifier: Apache-2.0
"""torch.optim.AdamW over 20 steps with clipping, and transformers' learning-rate schedules."""
import oracle

SEED = 12
SHAPES = {"layers.0.lora_A.weight": (4, 6), "layers.0.lora_B.weight": (6, 4), "embed_tokens.weight": (9, 5), "q_proj.bias": (6,),
          "input_layernorm.weight": (5,), "norm.weight": (5,)}
STEPS = 20


def make(folder):
    import torch
    import transformers
    generator = torch.Generator().manual_seed(SEED)
    parameters = {name: torch.nn.Parameter(torch.randn(*shape, generator=generator)) for name, shape in SHAPES.items()}
    # What the Trainer decays: by its own patterns.
    tensors = {f"initial.{name}": value.detach().clone() for name, value in parameters.items()}
    forbidden = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    import re
    decays = {name: not any(re.search(pattern, name.lower()) for pattern in forbidden) for name in parameters}
    optimizer = torch.optim.AdamW(
        [{"params": [p for n, p in parameters.items() if decays[n]], "weight_decay": 0.1},
         {"params": [p for n, p in parameters.items() if not decays[n]], "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.98), eps=1e-7)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 3, STEPS)
    norms = []
    for step in range(STEPS):
        for name, parameter in parameters.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * (0.02 if step % 3 == 0 else 0.5)
            tensors[f"gradient.{step}.{name}"] = parameter.grad.clone()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0).double())
        optimizer.step()
        schedule.step()
    tensors["norms"] = torch.stack(norms)
    tensors["decays"] = torch.tensor([decays[name] for name in SHAPES])
    tensors.update({f"final.{name}": value.detach() for name, value in parameters.items()})

    def factors(make_schedule, **arguments):
        dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        lr = make_schedule(dummy, **arguments)
        values = []
        for _ in range(60):
            values.append(lr.get_last_lr()[0])
            dummy.step()
            lr.step()
        return torch.tensor(values, dtype=torch.float64)

    warm = dict(num_warmup_steps=7)
    tensors["schedule.cosine"] = factors(transformers.get_cosine_schedule_with_warmup, num_training_steps=50, **warm)
    tensors["schedule.cosine_floor"] = factors(transformers.optimization.get_cosine_with_min_lr_schedule_with_warmup,
                                               num_training_steps=50, min_lr_rate=0.1, **warm)
    tensors["schedule.linear"] = factors(transformers.get_linear_schedule_with_warmup, num_training_steps=50, **warm)
    tensors["schedule.constant"] = factors(transformers.get_constant_schedule_with_warmup, **warm)
    tensors["schedule.wsd"] = factors(transformers.get_wsd_schedule, num_training_steps=50, num_decay_steps=10, **warm)
    oracle.save_golden(folder / "adamw.safetensors", tensors, SEED)


if __name__ == "__main__":
    oracle.main(make)
