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

import tokenizers
import torch
import transformers

import families_oracle
import oracle
import token_store_oracle
from varied_texts import varied_texts

warnings.simplefilter("ignore")
SEED = 41
KEPT = ["The quick brown fox jumps over the lazy dog; a package manager resolves dependencies.", "Перевірка: система встановлює пакунки.", "<|im_start|>user\nhello there<|im_end|>\n",
        "def install(packages):\n    return [p for p in packages if p.is_needed]  # 12 x 34 = 408", "naïve café 你好 🙂"]
# hidden, intermediate, query heads, key-value heads, layers that stay.
SIZES = {
    "llama": (24, 16, 2, 2, 1), "llama_tied": (24, 32, 2, 1, 1), "mistral": (16, 24, 1, 1, 2), "qwen2": (24, 16, 2, 2, 2), "qwen3": (24, 24, 2, 1, 1),
    "gemma2": (24, 16, 2, 2, 1), "gemma3_text": (24, 16, 2, 2, 2), "smollm3": (16, 16, 2, 1, 3), "smollm3_listed": (24, 16, 2, 2, 1), "phi3": (16, 24, 2, 2, 1),
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
        if c.model_type in ("gemma2", "gemma3_text"):  # multiplies embeddings by sqrt(hidden size); the student's are as large as they were
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
    for name in families_oracle.GOLDENS:
        sizes, model = SIZES[name], families_oracle.build(*families_oracle.GOLDENS[name])
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


def prepare(alambic, folder, texts, store):
    """A store of the texts with the folder's tokenizer, and the ids of its documents."""
    file = folder.parent / (store.name + ".jsonl")
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    oracle.run(alambic, "prepare", "--model", folder, "--input", file, "--output", store, "--format", "text", "--set", "end_token=false")
    return [torch.tensor(document["ids"]) for document in token_store_oracle.read_store(store)[1]]


def student(alambic, folder, output, **keys):
    """Runs prune; returns its report and what transformers makes of the folder."""
    config = output.parent / (output.name + ".yaml")
    config.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in {"model": str(folder), "output": str(output), **keys}.items()))
    report = oracle.run_json(alambic, "prune", config)
    model, told = transformers.AutoModelForCausalLM.from_pretrained(output, output_loading_info=True, attn_implementation="eager")
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not told.get(kind), f"{kind}: {told[kind]}"
    assert sum(p.numel() for p in model.parameters()) == report["parameters"], "parameters"
    return report, model.eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0]


def check_logits(alambic, folder, model, expected_of, sequences, what):
    for ids in sequences:
        expected = expected_of(ids)
        oracle.assert_close(logits(model, ids), expected, 0, 1e-5 * float(expected.abs().max()), f"{what}: transformers' logits of the folder")
        told = oracle.run_json(alambic, "score", "--model", folder, "--ids", ",".join(map(str, ids.tolist())), "--compute", "f32")
        oracle.assert_close(told["logprobs"], torch.log_softmax(expected.double(), -1)[:-1].gather(1, ids[1:, None])[:, 0], 1e-4, 1e-4, f"{what}: alambic score")


def check_family(alambic, scratch, name, class_name, settings):
    model = families_oracle.build(class_name, settings)
    base = scratch / name
    model.save_pretrained(base)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(model.config.vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(base)
    generator = torch.Generator().manual_seed(5)
    texts = [" ".join(f"w{i}" for i in torch.randint(1, model.config.vocab_size, (length,), generator=generator).tolist()) for length in (17, 9, 24, 5)]
    sequences = prepare(alambic, base, texts, scratch / f"{name}-store")
    calibration = {"stores": [str(scratch / f"{name}-store")]}
    hidden, neurons, heads, groups, layers = SIZES[name]
    sizes = dict(hidden_size=hidden, intermediate_size=neurons, num_attention_heads=heads, num_key_value_heads=groups, num_hidden_layers=layers)
    _, pruned = student(alambic, base, scratch / f"{name}-all", calibration=calibration, sizes=sizes)
    by_hand = cut(model, sequences, (hidden, neurons, heads, groups, layers))
    for key, value in by_hand.state_dict().items():
        assert pruned.state_dict()[key].shape == value.shape, key
    check_logits(alambic, scratch / f"{name}-all", pruned, lambda ids: logits(by_hand, ids), sequences, name)

    # Neurons and heads alone: the same model with their ways out at zero. LongRoPE's lists tie a head's size to the hidden size.
    if class_name == "Phi3":
        heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    _, pruned = student(alambic, base, scratch / f"{name}-inner", calibration=calibration, sizes=dict(intermediate_size=neurons, num_attention_heads=heads, num_key_value_heads=groups))
    scores = importance(model, sequences)[0]["mean-l2"]
    per_group = model.config.num_attention_heads // model.config.num_key_value_heads
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            gone = torch.ones(model.config.intermediate_size, dtype=torch.bool)
            gone[top(scores["neurons"][i], neurons)] = False
            layer.mlp.down_proj.weight[:, gone] = 0
            by_group = scores["heads"][i].view(-1, per_group)
            stay = torch.zeros(by_group.shape, dtype=torch.bool)
            for group in top(by_group.sum(1), groups).tolist():
                stay[group, top(by_group[group], heads // groups)] = True
            layer.self_attn.o_proj.weight.view(model.config.hidden_size, stay.numel(), -1)[:, ~stay.flatten()] = 0
    check_logits(alambic, scratch / f"{name}-inner", pruned, lambda ids: logits(model, ids), sequences, f"{name}, masked")
    _, fresh = student(alambic, base, scratch / f"{name}-fresh", weights="fresh", sizes=dict(hidden_size=40, num_hidden_layers=5, **({"num_attention_heads": 5, "num_key_value_heads": 1} if class_name == "Phi3" else {})))
    assert fresh.config.num_hidden_layers == 5 and 0.015 < float(fresh.model.layers[4].mlp.down_proj.weight.std()) < 0.025
    print(f"{name}: cut by hand and masked, {len(sequences)} sequences; fresh of other sizes")


def check_vocabulary(alambic, scratch, name, base, kept_texts, other_texts, may_lose):
    theirs = transformers.AutoTokenizer.from_pretrained(base)
    prepare(alambic, base, kept_texts, scratch / f"{name}-store")
    output = scratch / f"{name}-smaller"
    report, model = student(alambic, base, output, vocabulary={"stores": [str(scratch / f"{name}-store")], "pad_to_multiple": 8})
    ours = transformers.AutoTokenizer.from_pretrained(output)
    plain, smaller = (tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (base, output))
    for tokenizer in (plain, smaller):
        tokenizer.no_truncation()
        tokenizer.no_padding()
    old_ids = json.loads((output / "vocabulary_map.json").read_text())["old_ids"]
    new_of = {old: new for new, old in enumerate(old_ids)}
    assert len(old_ids) < plain.get_vocab_size() and report["shape"]["vocab_size"] % 8 == 0 == model.config.vocab_size % 8
    for text in kept_texts:
        assert [new_of[i] for i in plain.encode(text).ids] == smaller.encode(text).ids, text
        assert [new_of[i] for i in theirs.encode(text)] == ours.encode(text), f"as transformers loads it: {text}"
    longer = 0
    for text in other_texts:
        before, after = plain.encode(text, add_special_tokens=False).ids, smaller.encode(text, add_special_tokens=False).ids
        longer += len(after) > len(before)
        assert smaller.decode(after, skip_special_tokens=False) == plain.decode(before, skip_special_tokens=False), f"{text!r}"
    assert may_lose or longer > 10, "no text needed other pieces"
    for special in theirs.all_special_tokens:
        if plain.token_to_id(special) is None:
            continue  # transformers adds a padding token of its own to a tokenizer.json that pads
        assert new_of[theirs.convert_tokens_to_ids(special)] == ours.convert_tokens_to_ids(special), special
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        was = getattr(transformers.AutoConfig.from_pretrained(base), key)
        assert getattr(model.config, key) == (new_of[was] if isinstance(was, int) else was), key
    whole = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    for text in kept_texts[:6]:
        ids = torch.tensor(plain.encode(text).ids[:200])
        if len(ids):
            expected = logits(whole, ids)[:, old_ids]
            oracle.assert_close(logits(model, torch.tensor([new_of[i] for i in ids.tolist()]))[:, :len(old_ids)], expected, 0, 1e-5 * float(expected.abs().max()), f"{name}: logits of {text!r}")
    print(f"{name}: {plain.get_vocab_size()} tokens -> {len(old_ids)}; {len(kept_texts)} texts in the same pieces, {len(other_texts)} others ({longer} of them in more) come back")


def live(alambic):
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        for name, (class_name, settings) in {**families_oracle.GOLDENS, "smollm3_listed": families_oracle.MORE["smollm3_listed"]}.items():
            check_family(alambic, scratch, name, class_name, settings)
        made = json.loads((oracle.GOLDEN / "tokenizers.json").read_text("utf-8"))["cases"]
        for name in ("byte_level_bpe", "sentencepiece_bpe", "unigram"):
            base = scratch / name
            torch.manual_seed(SEED)
            size = made[name]["vocabulary_size"]
            transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=size + 3, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=2048,
                                                                   bos_token_id=1, eos_token_id=2, pad_token_id=size + 1)).save_pretrained(base)
            (base / "tokenizer.json").write_text(json.dumps(made[name]["tokenizer"]), encoding="utf-8")
            (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
            texts = [text for text in varied_texts(60, seed=3) if text.strip()]
            check_vocabulary(alambic, scratch, name, base, texts[30:], varied_texts(800, seed=4), name == "unigram")
        smollm2 = scratch / "smollm2"
        oracle.run(alambic, "import", oracle.smollm2(), smollm2)
        check_vocabulary(alambic, scratch, "smollm2", smollm2, KEPT, varied_texts(2000, seed=6, special=["<|im_start|>", "<|im_end|>"]) + ["The administrator recompiled the kernel."], False)


if __name__ == "__main__":
    oracle.main(make, live)
