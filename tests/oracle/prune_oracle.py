# SPDX-License-Identifier: Apache-2.0
"""Students against transformers: importance by forward hooks, weights cut by hand in torch, folders that transformers loads.

Golden prune.safetensors, for each family: "<case>.<aggregate>.neurons|heads|channels" and "<case>.influence" over two sequences of
its model in families/<case>.safetensors, and "<case>.logits": of the model cut by hand to the sizes in the metadata. Live, the
program prunes folders of every family from a token store, and SmolLM2's vocabulary.
"""
import copy
import json
import pathlib
import re
import tempfile
import warnings

import torch
import transformers

import families_oracle
import oracle

warnings.simplefilter("ignore")
# hidden, intermediate, query heads, key-value heads, layers that stay.
SIZES = {
    "llama": (24, 16, 2, 2, 1), "llama_tied": (24, 32, 2, 1, 1), "mistral": (16, 24, 1, 1, 2), "qwen2": (24, 16, 2, 2, 2), "qwen3": (24, 24, 2, 1, 1),
    "gemma3_text": (24, 16, 2, 2, 2), "smollm3": (16, 16, 2, 1, 3), "phi3": (16, 24, 2, 2, 1),
}


def importance(model, sequences):
    """Scores by hooks on transformers' own modules: neurons at the input of down_proj, heads at that of o_proj, channels at the outputs of norms."""
    layers, base = model.model.layers, model.model
    seen = {}

    def input_of(key):
        return lambda module, inputs: seen.__setitem__(key, inputs[0][0].double())

    def output_of(key):
        return lambda module, inputs, output: seen.__setitem__(key, (output[0] if isinstance(output, tuple) else output)[0].double())

    hooks = [base.norm.register_forward_hook(output_of("last"))]
    for i, layer in enumerate(layers):
        before_mlp = getattr(layer, "pre_feedforward_layernorm", None) or layer.post_attention_layernorm
        hooks += [layer.mlp.down_proj.register_forward_pre_hook(input_of(("neurons", i))), layer.self_attn.o_proj.register_forward_pre_hook(input_of(("heads", i))),
                  layer.input_layernorm.register_forward_hook(output_of(("norm1", i))), before_mlp.register_forward_hook(output_of(("norm2", i))),
                  layer.register_forward_pre_hook(input_of(("in", i))), layer.register_forward_hook(output_of(("out", i)))]
    tables, cosines = {}, [0.0] * len(layers)
    for ids in sequences:
        with torch.no_grad():
            model(input_ids=ids[None])
        for i in range(len(layers)):
            cosines[i] += torch.nn.functional.cosine_similarity(seen[("in", i)], seen[("out", i)], dim=-1).sum().item()
            heads = seen[("heads", i)]
            seen[("heads", i)] = heads.view(len(ids), model.config.num_attention_heads, -1).norm(dim=-1)
        for key, value in seen.items():
            if not isinstance(key, tuple) or key[0] not in ("in", "out"):
                tables.setdefault(key, []).append(value.abs())
    for hook in hooks:
        hook.remove()
    tokens = sum(len(ids) for ids in sequences)
    ways = {"mean-l2": lambda parts: torch.stack([part.mean(0) for part in parts]).norm(dim=0),
            "mean": lambda parts: torch.cat(parts).mean(0),
            "rms": lambda parts: torch.cat(parts).square().mean(0).sqrt()}
    scores = {}
    for way, reduce in ways.items():
        of = {key: reduce(parts) for key, parts in tables.items()}
        scores[way] = {"neurons": torch.stack([of[("neurons", i)] for i in range(len(layers))]), "heads": torch.stack([of[("heads", i)] for i in range(len(layers))]),
                       "channels": of["last"] + sum(of[(norm, i)] for norm in ("norm1", "norm2") for i in range(len(layers)))}
    return scores, 1 - torch.tensor(cosines, dtype=torch.float64) / tokens


def top(scores, count):
    return torch.sort(torch.sort(scores, descending=True, stable=True).indices[:count]).values


def with_config(model, **settings):
    config = copy.deepcopy(model.config)
    for key, value in settings.items():
        setattr(config, key, value)
    config._attn_implementation = "eager"
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def drop_layers(model, kept):
    lists = {key: [getattr(model.config, key)[i] for i in kept] for key in ("layer_types", "no_rope_layers") if getattr(model.config, key, None)}
    student = with_config(model, num_hidden_layers=len(kept), **lists)
    state = {}
    for name, value in model.state_dict().items():
        match = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if not match:
            state[name] = value
        elif int(match.group(1)) in kept:
            state[f"model.layers.{kept.index(int(match.group(1)))}.{match.group(2)}"] = value
    student.load_state_dict(state)
    return student


def cut(model, sequences, sizes):
    """Drops the layers of least influence, then keeps channels, neurons and heads of the largest scores: tensor by tensor, by name."""
    hidden, neurons, heads, groups, layers = sizes
    _, influence = importance(model, sequences)
    model = drop_layers(model, top(influence, layers).tolist())
    scores = importance(model, sequences)[0]["mean-l2"]
    c = model.config
    size, per_group = model.state_dict()["model.layers.0.self_attn.o_proj.weight"].shape[1] // c.num_attention_heads, c.num_attention_heads // c.num_key_value_heads
    channels = top(scores["channels"], hidden)
    student = with_config(model, hidden_size=hidden, intermediate_size=neurons, num_attention_heads=heads, num_key_value_heads=groups, head_dim=size)
    rows = lambda numbers: torch.cat([torch.arange(n * size, (n + 1) * size) for n in numbers.tolist()])  # noqa: E731
    state = {}
    for name, value in model.state_dict().items():
        match = re.match(r"model\.layers\.(\d+)\.", name)
        if match:
            layer = int(match.group(1))
            kept = top(scores["neurons"][layer], neurons)
            by_group = scores["heads"][layer].view(c.num_key_value_heads, per_group)
            kept_groups = top(by_group.sum(1), groups)
            kept_heads = torch.cat([g * per_group + top(by_group[g], heads // groups) for g in kept_groups.tolist()])
        kind, is_bias = name.split(".")[-2], name.endswith(".bias")
        first = {"q_proj": lambda: rows(kept_heads), "k_proj": lambda: rows(kept_groups), "v_proj": lambda: rows(kept_groups), "o_proj": lambda: channels,
                 "qkv_proj": lambda: torch.cat([rows(kept_heads), c.num_attention_heads * size + rows(kept_groups), (c.num_attention_heads + c.num_key_value_heads) * size + rows(kept_groups)]),
                 "gate_proj": lambda: kept, "up_proj": lambda: kept, "gate_up_proj": lambda: torch.cat([kept, c.intermediate_size + kept]), "down_proj": lambda: channels,
                 "q_norm": lambda: slice(None), "k_norm": lambda: slice(None), "embed_tokens": lambda: slice(None), "lm_head": lambda: slice(None)}.get(kind, lambda: channels)()
        value = value[first]
        if value.dim() == 2:
            value = value[:, {"o_proj": lambda: rows(kept_heads), "down_proj": lambda: kept}.get(kind, lambda: channels)()]
        if c.model_type == "gemma3_text":  # multiplies embeddings by sqrt(hidden size); the student's are as large as they were
            lost = (c.hidden_size / hidden) ** 0.5
            if kind in ("embed_tokens", "lm_head"):
                value = value * lost
            elif name == "model.norm.weight":
                value = (value + 1) / lost - 1
        state[name] = value
    student.load_state_dict(state)
    return student


def make(folder):
    tensors, config = {}, {}
    for name, sizes in SIZES.items():
        model = families_oracle.build(*families_oracle.GOLDENS[name])
        sequences = families_oracle.sample(model)[0].split(families_oracle.DOCUMENTS)
        scores, tensors[f"{name}.influence"] = importance(model, sequences)
        for way, of in scores.items():
            for part, values in of.items():
                tensors[f"{name}.{way}.{part}"] = values
        student = cut(model, sequences, sizes)
        with torch.no_grad():
            tensors[f"{name}.logits"] = families_oracle.logits_of(student, torch.cat(sequences))
        config[name] = dict(zip(("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"), sizes))
    oracle.save_golden(folder / "prune.safetensors", tensors, families_oracle.SEED, sizes=json.dumps(config))


if __name__ == "__main__":
    oracle.main(make)
