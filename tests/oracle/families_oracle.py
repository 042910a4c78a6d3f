# SPDX-License-Identifier: Apache-2.0
"""Every model family against transformers: a tiny random model each, its logits, every parameter's gradient, its greedy text.

Golden families/<case>.safetensors: the weights under their published names, "grad.<name>" for each, tokens, targets and
weights of two documents lying one behind the other, "logits", "greedy" (tokens after "prompt") and "greedy_penalised".
Metadata: "config" is config.json as transformers writes it, "defaults" and "rope_theta" come from its config class.
"""
import copy
import dataclasses
import json
import pathlib
import tempfile

import torch
import transformers

import oracle

DOCUMENTS = [13, 7]
SEED = 20260901


def case(class_name, **settings):
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return class_name, {**sizes, **settings}


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 500.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.5, 6.0]}
GOLDENS = {
    # Llama 3 scaling, an untied head, all biases, a padding token among the tokens (its embedding gets no gradient).
    "llama": case("Llama", rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True, pad_token_id=3),
    "llama_tied": case("Llama", tie_word_embeddings=True, head_dim=12),
    "mistral": case("Mistral", sliding_window=5, head_dim=6),
    "qwen2": case("Qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=4, max_window_layers=1,
                  intermediate_size=24),
    "qwen3": case("Qwen3", head_dim=12, tie_word_embeddings=True,
                  rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}),
    "gemma3_text": case("Gemma3Text", num_hidden_layers=3, head_dim=8, sliding_window=4, query_pre_attn_scalar=12,
                        layer_types=["sliding_attention", "sliding_attention", "full_attention"], intermediate_size=24,
                        rope_parameters={"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                                         "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}),
    # Caps about as large as what they cap.
    "gemma2": case("Gemma2", head_dim=12, sliding_window=4, query_pre_attn_scalar=10, intermediate_size=24,
                   attn_logit_softcapping=1.5, final_logit_softcapping=4.0),
    "smollm3": case("SmolLM3", num_hidden_layers=4, hidden_size=24, intermediate_size=24, tie_word_embeddings=True),
    # The first document is longer than the 8 tokens of pre-training, the second is not.
    "phi3": case("Phi3", rope_parameters=LONGROPE, original_max_position_embeddings=8, max_position_embeddings=64),
}
# Checked live only: the older spelling of the same, and switches that the goldens leave at their defaults.
MORE = {
    "llama_linear": case("Llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
    "llama_yarn": case("Llama", rope_parameters={"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8, "rope_theta": 50.0,
                                                 "mscale": 1.2, "mscale_all_dim": 0.7, "beta_fast": 4.0, "truncate": False}),
    "llama_longrope": case("Llama", rope_parameters={**{k: v for k, v in LONGROPE.items() if k != "partial_rotary_factor"}, "factor": 3.0,
                                                     "short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.0, 2.5, 6.0, 9.0],
                                                     "original_max_position_embeddings": 8}),
    "mistral_full": case("Mistral", sliding_window=None),
    "phi3_plain": case("Phi3", sliding_window=6, tie_word_embeddings=True),
    "gemma3_pattern": case("Gemma3Text", num_hidden_layers=7, head_dim=8, sliding_window=3),
    "gemma2_uncapped": case("Gemma2", head_dim=8, sliding_window=3, attn_logit_softcapping=None, final_logit_softcapping=None),
    "qwen3_bias": case("Qwen3", head_dim=8, attention_bias=True, layer_types=["sliding_attention", "full_attention"],
                       use_sliding_window=True, sliding_window=3),
    "smollm3_listed": case("SmolLM3", no_rope_layers=[0, 1], mlp_bias=True, attention_bias=True, use_sliding_window=True, sliding_window=5),
}


def build(class_name, settings):
    torch.manual_seed(SEED)
    config = getattr(transformers, class_name + "Config")(**copy.deepcopy(settings))
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:  # large enough that attention is far from uniform and errors show
                parameter.normal_(std=1.5 / parameter.shape[1] ** 0.5)
            elif name.endswith("norm.weight") and not class_name.startswith("Gemma"):
                parameter.normal_(mean=1.0, std=0.3)
            else:
                parameter.normal_(std=0.3)
    return model


def sample(model):
    generator = torch.Generator().manual_seed(SEED + 1)
    total = sum(DOCUMENTS)
    tokens = torch.randint(0, model.config.vocab_size, (total,), generator=generator)
    tokens[2] = 3  # the padding token of one case
    targets = torch.randint(0, model.config.vocab_size, (total,), generator=generator)
    weights = torch.rand(total, generator=generator)
    weights[::4] = 0
    return tokens, targets, weights


def logits_of(model, tokens):
    return torch.cat([model(part[None]).logits[0] for part in tokens.split(DOCUMENTS)])


def greedy(model, prompt, count, **settings):
    out = model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=count, do_sample=False, **settings)
    return out[0, len(prompt):]


def class_defaults(class_name):
    cls = getattr(transformers, class_name + "Config")
    ours = {f.name: f.default for f in dataclasses.fields(cls)}
    common = {f.name for f in dataclasses.fields(transformers.PreTrainedConfig)}
    return {k: v for k, v in ours.items() if k not in common}, cls.default_theta


def make(folder):
    for name, (class_name, settings) in GOLDENS.items():
        model = build(class_name, settings)
        tokens, targets, weights = sample(model)
        logits = logits_of(model, tokens)
        loss = (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum()
        loss.backward()
        tensors = {"tokens": tokens, "targets": targets, "weights": weights, "documents": torch.tensor(DOCUMENTS), "logits": logits,
                   "loss": loss}
        for key, parameter in model.named_parameters():
            tensors[key] = parameter
            tensors["grad." + key] = parameter.grad
        prompt = tokens[:6]
        tensors["prompt"] = prompt
        tensors["greedy"] = greedy(model, prompt, 24)
        tensors["greedy_penalised"] = greedy(model, prompt, 24, repetition_penalty=1.7)
        defaults, theta = class_defaults(class_name)
        oracle.save_golden(folder / "families" / f"{name}.safetensors", tensors, SEED, config=model.config.to_json_string(),
                           defaults=json.dumps(defaults), rope_theta=json.dumps(theta))


def old_spelling(config):
    """config.json as transformers 4 wrote it: rope_theta and rope_scaling beside each other."""
    old = {k: v for k, v in config.items() if k != "rope_parameters"}
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:
        old["rope_theta"] = rope["full_attention"]["rope_theta"]
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = {k: v for k, v in rope["full_attention"].items()}
    old["rope_theta"] = rope.pop("rope_theta", old.get("rope_theta"))
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if rope.get("rope_type", "default") != "default":
        if "rope_local_base_freq" not in old:  # Gemma 3 always wrote the newer key
            rope["type"] = rope.pop("rope_type")
        old["rope_scaling"] = rope
    return old


def score(alambic, folder, tokens, *more):
    out = oracle.run_json(alambic, "score", "--model", folder, "--ids", ",".join(str(int(t)) for t in tokens), "--compute", "f32", *more)
    assert out["ids"] == [int(t) for t in tokens]
    return torch.tensor(out["logprobs"])


def expected_score(model, tokens):
    with torch.no_grad():
        table = torch.log_softmax(model(tokens[None]).logits[0].float(), -1)
    return table[:-1].gather(1, tokens[1:, None])[:, 0]


def live(alambic):
    for name, (class_name, settings) in {**GOLDENS, **MORE}.items():
        model = build(class_name, settings)
        tokens, _, _ = sample(model)
        want = expected_score(model, tokens)
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch)
            oracle.assert_close(score(alambic, scratch, tokens), want, 1e-4, 1e-5, name)
            file = pathlib.Path(scratch) / "config.json"
            file.write_text(json.dumps(old_spelling(json.loads(file.read_text()))))
            again = expected_score(transformers.AutoModelForCausalLM.from_pretrained(scratch), tokens)
            oracle.assert_close(again, want, 1e-5, 1e-6, f"{name}: transformers reads its older spelling")
            oracle.assert_close(score(alambic, scratch, tokens), want, 1e-4, 1e-5, f"{name}, older spelling")
        print(f"{name}: {len(tokens)} tokens scored as transformers scores them, in both spellings")


if __name__ == "__main__":
    oracle.main(make, live)
