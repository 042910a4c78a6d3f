# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy summed over kept rows, and its gradients, by torch in f64: plain head, head with a bias, head with LoRA."""
import oracle

SEED = 11


def make(folder):
    import torch
    import torch.nn.functional as F
    generator = torch.Generator().manual_seed(SEED)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    T, D, V, R, scale = 1100, 8, 40, 3, 0.75  # more kept rows than fit into one chunk of 512
    values = {"hidden": random(T, D), "weight": random(V, D), "bias": random(V), "a": random(R, D), "b": random(V, R)}
    values["hidden"][5] *= 40  # large logits, where a softmax without its maximum overflows
    values = {name: value.float() for name, value in values.items()}
    targets = torch.randint(0, V, (T,), generator=generator)
    keep = torch.rand(T, generator=generator) < 0.7
    targets[~keep] = -7  # masked targets may hold anything
    tensors = {**values, "targets": targets, "keep": keep}
    for case, names in {"plain": ["hidden", "weight"], "bias": ["hidden", "weight", "bias"], "lora": ["hidden", "a", "b"]}.items():
        leaf = {name: value.double().requires_grad_(name in names) for name, value in values.items()}
        logits = leaf["hidden"] @ leaf["weight"].T
        if case == "bias":
            logits = logits + leaf["bias"]
        if case == "lora":
            logits = logits + scale * (leaf["hidden"] @ leaf["a"].T) @ leaf["b"].T
        loss = F.cross_entropy(logits[keep], targets[keep], reduction="sum")
        loss.backward()
        tensors[f"{case}.loss"] = loss.detach()
        for name in names:
            if not (case == "bias" and name == "hidden"):
                tensors[f"{case}.d_{name}"] = leaf[name].grad.float()
    oracle.save_golden(folder / "cross_entropy.safetensors", tensors, SEED, packages=("torch",), scale=str(scale))


if __name__ == "__main__":
    oracle.main(make)
