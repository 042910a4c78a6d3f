# SPDX-License-Identifier: Apache-2.0
"""Exported GGUF files against llama.cpp: its library loads and runs them, its quantiser makes the same bytes of our F32 file,
its tokenizer gives the ids of the folder's, and its converter writes the same metadata.
"""
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import torch
from gguf import GGUFReader

import llamacpp
import oracle
from gguf_export_checks import assert_same_tensors, export, fields_of, logits_of
from varied_texts import varied_texts

SEED = 20261124
GEMMA = ("gemma2", "gemma3")
TYPES = {"f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18}
TEXT = "Distillation lets a small model learn from a large one. The teacher's probabilities say more than the text alone.\n" * 40


def importance_of(path):
    """The file as llama-quantize reads it: sums divided by counts, in f32."""
    tensors = {t.name: np.array(t.data, dtype=np.float32) for t in GGUFReader(path).tensors}
    return {name[:-len(".in_sum2")]: (values.reshape(-1) / np.float32(tensors[name[:-len(".in_sum2")] + ".counts"].reshape(-1)[0])).astype(np.float32)
            for name, values in tensors.items() if name.endswith(".in_sum2")}


# ---- tiny models of every family, with a byte-level tokenizer ----

def byte_tokenizer(folder, size):
    """A byte-level tokenizer.json of GPT-2's alphabet with a few merges and special tokens, and rows without a token."""
    import tokenizers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u0120", "t"), ("h", "e"), ("\u0120t", "he"), ("i", "n"), ("in", "g")]
    tokens = letters + [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The last one is what transformers adds for Qwen where it is missing.
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|end|>", "<|start|>", "<|endoftext|>")])
    assert tokenizer.get_vocab_size() < size
    tokenizer.save(str(folder / "tokenizer.json"))
    end, start = tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("<|start|>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "bos_token": "<|start|>"}))
    return start, end


def tiny_models():
    import transformers as t
    shared = dict(vocab_size=320, hidden_size=256, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                  max_position_embeddings=512, bos_token_id=262, eos_token_id=261, pad_token_id=None)
    llama3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    longrope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "long_factor": [1.5 + i for i in range(24)], "short_factor": [1.0 + 0.1 * i for i in range(24)]}
    yield "llama", t.LlamaForCausalLM(t.LlamaConfig(**shared, tie_word_embeddings=True, attention_bias=False))
    yield "llama", t.LlamaForCausalLM(t.LlamaConfig(**{**shared, "max_position_embeddings": 131072}, head_dim=32, tie_word_embeddings=False, rope_parameters=llama3))
    yield "llama", t.LlamaForCausalLM(t.LlamaConfig(**shared, attention_bias=True, mlp_bias=True, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}))
    yield "mistral", t.MistralForCausalLM(t.MistralConfig(**{**shared, "num_hidden_layers": 9}, sliding_window=None, head_dim=32))
    yield "qwen2", t.Qwen2ForCausalLM(t.Qwen2Config(**shared, tie_word_embeddings=True))
    yield "qwen2", t.Qwen2ForCausalLM(t.Qwen2Config(**shared, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 128}))
    yield "qwen3", t.Qwen3ForCausalLM(t.Qwen3Config(**shared, head_dim=32, tie_word_embeddings=True))
    yield "smollm3", t.SmolLM3ForCausalLM(t.SmolLM3Config(**{**shared, "num_hidden_layers": 5, "pad_token_id": 261}))
    yield "gemma2", t.Gemma2ForCausalLM(t.Gemma2Config(**{**shared, "pad_token_id": 261}, head_dim=32, query_pre_attn_scalar=32, sliding_window=16, attn_logit_softcapping=2.0,
                                                       final_logit_softcapping=3.0, attn_implementation="eager"))
    yield "gemma3", t.Gemma3ForCausalLM(t.Gemma3TextConfig(**{**shared, "num_hidden_layers": 7, "pad_token_id": 261}, head_dim=32, query_pre_attn_scalar=32, sliding_window=16))
    yield "phi3", t.Phi3ForCausalLM(t.Phi3Config(**{**shared, "pad_token_id": 261}, original_max_position_embeddings=512, tie_word_embeddings=False))
    yield "phi3", t.Phi3ForCausalLM(t.Phi3Config(**{**shared, "max_position_embeddings": 1024, "pad_token_id": 261}, original_max_position_embeddings=256,
                                                 tie_word_embeddings=True, rope_parameters=longrope))


# Keys where we say more than the converter, or know better: docs/gguf.md.
OURS_ALONE = {"tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"}
# What the converter guesses from the folder's name and config.
NAMES = {"general.name", "general.basename", "general.size_label", "general.finetune", "general.version", "general.organization", "general.description",
         "general.license", "general.license.name", "general.license.link", "general.tags", "general.languages", "general.sampling.temp"}


def convert(folder, out):
    """llama.cpp's converter in a process of its own; its table of known pre-tokenizers does not hold test vocabularies."""
    source = llamacpp.FOLDER / "source"
    code = ("import sys, runpy; sys.path.insert(0, sys.argv.pop(1)); import conversion.base as b; b.TextModel.get_vocab_base_pre = lambda self, t: 'gpt-2'; "
            "sys.argv[0] = 'convert_hf_to_gguf.py'; runpy.run_path(sys.argv.pop(1), run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code, str(source), str(source / "convert_hf_to_gguf.py"), str(folder), "--outfile", str(out), "--outtype", "f32"], capture_output=True, text=True)
    return done.returncode == 0, done.stderr[-1500:]


def assert_same_metadata(ours, theirs, what):
    a, e = fields_of(ours), fields_of(theirs)
    for key in e.keys() - NAMES:
        assert key in a, f"{what}: the converter writes {key} = {str(e[key])[:80]}, we do not"
        same = np.allclose(a[key], e[key], rtol=1e-6, atol=0) if isinstance(e[key], float) else a[key] == e[key]
        assert same, f"{what}: {key} is {str(a[key])[:80]}, the converter writes {str(e[key])[:80]}"
    extra = a.keys() - e.keys() - NAMES - OURS_ALONE
    assert not extra, f"{what}: the converter does not write {sorted(extra)}"


def check_families(alambic, scratch, cpp):
    torch.manual_seed(SEED)
    seen, converted = set(), 0
    for number, (architecture, model) in enumerate(tiny_models()):
        seen.add(architecture)
        with torch.no_grad():  # norms and biases that are all ones or zeros would hide a wrong place
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.eval()
        what = f"{architecture} {number}"
        folder = scratch / f"tiny-{number}"  # llama.cpp expects special tokens in what is called phi-3
        model.save_pretrained(folder)
        byte_tokenizer(folder, 320)
        gguf = scratch / f"{number}.gguf"
        report = export(alambic, folder, gguf)
        assert report["tensors"].keys() == {"F32"}, report
        for length in (40, 300):
            ids = torch.randint(0, 260, (length,)).tolist()
            values, greedy = cpp.logits(gguf, ids, greedy=16 if length == 40 else 0)
            expected = logits_of(model, ids)
            # llama.cpp's GELU goes through a table of halves.
            oracle.assert_close(values, expected, 0, (5e-3 if architecture in GEMMA else 2e-5) * float(expected.abs().max()), f"{what}, {length} tokens: logits in llama.cpp")
            if greedy and architecture not in GEMMA:
                following = list(ids)
                for _ in greedy:
                    following.append(int(logits_of(model, following)[-1].argmax()))
                assert greedy == following[length:], f"{what}: greedy {greedy}, transformers {following[length:]}"
        # Import brings every bit back (gemma's norms through w + 1).
        back = scratch / f"back-{number}"
        oracle.run(alambic, "import", gguf, back)
        from safetensors.torch import load_file
        original, again = load_file(folder / "model.safetensors"), load_file(back / "model.safetensors")
        assert original.keys() == again.keys(), (what, original.keys() ^ again.keys())
        for name, tensor in original.items():
            if architecture in GEMMA and name.endswith("norm.weight"):
                oracle.assert_close(again[name], tensor, 0, 1.2e-7, f"{what}: {name} after import")
            else:
                assert torch.equal(again[name], tensor), f"{what}: {name} is not the same after export and import"
        ok, said = convert(folder, scratch / f"their-{number}.gguf")
        if ok:
            converted += 1
            assert_same_metadata(gguf, scratch / f"their-{number}.gguf", what)
            # For Gemma the converter drops rows of the embedding that have no token.
            assert_same_tensors(gguf, scratch / f"their-{number}.gguf", what + " against the converter", but={"token_embd.weight"} if architecture in GEMMA else set())
        else:
            assert architecture in ("gemma2", "phi3") and "tokenizer.model" in said, f"{what}: the converter failed: {said}"
        for kind in ("q4_k_m", "q5_k_s", "q4_k_s", "q5_k_m", "q6_k", "q8_0", "q4_0"):
            quantised, theirs = scratch / f"{number}-{kind}.gguf", scratch / f"their-{number}-{kind}.gguf"
            export(alambic, folder, quantised, kind)
            cpp.quantize(gguf, theirs, TYPES[kind])
            assert_same_tensors(quantised, theirs, f"{what} as {kind}")
            quantised.unlink(), theirs.unlink()
    assert seen == {"llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3", "phi3"}, seen
    print(f"{number + 1} tiny models run in llama.cpp, {converted} have the converter's metadata", flush=True)


# ---- SmolLM2 ----

def check_smollm2(alambic, scratch, cpp):
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM
    folder, gguf = scratch / "smollm2", scratch / "smollm2.gguf"
    oracle.run(alambic, "import", oracle.smollm2(), folder, "--weights", "f32")
    report = export(alambic, folder, gguf, "f32", "--base-name", "HuggingFaceTB/SmolLM2-135M-Instruct")
    fields = fields_of(gguf)
    assert fields["general.license"] == "apache-2.0" and fields["general.base_model.0.repo_url"] == "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct", fields
    assert fields["tokenizer.chat_template"] == (folder / "chat_template.jinja").read_text()
    assert "base_model_relation: quantized" in pathlib.Path(report["card"]).read_text()

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(TEXT).ids[:256]
    values, greedy = cpp.logits(gguf, ids, greedy=24)
    expected = logits_of(model, ids)
    oracle.assert_close(values, expected, 0, 3e-5 * float(expected.abs().max()), "logits of SmolLM2 in llama.cpp")
    loss = lambda logits: float(torch.nn.functional.cross_entropy(torch.as_tensor(logits[:-1]).double(), torch.tensor(ids[1:])))
    assert abs(loss(values) - loss(expected)) < 1e-5, (loss(values), loss(expected))
    following = list(ids)
    for _ in greedy:
        following.append(int(logits_of(model, following)[-1].argmax()))
    assert greedy == following[len(ids):], "greedy tokens of SmolLM2"

    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    texts = varied_texts(400, SEED, special)
    for text, actual in zip(texts, cpp.tokenize(gguf, texts)):
        wanted = tokenizer.encode(text, add_special_tokens=False).ids
        assert actual == wanted, f"{text!r}: llama.cpp {actual}, the folder's tokenizer {wanted}"

    (scratch / "calibration.txt").write_text(TEXT)
    matrix = scratch / "matrix.gguf"
    for importance in (None, matrix):
        for kind, number in TYPES.items():
            quantised, theirs = scratch / "ours-q.gguf", scratch / "theirs-q.gguf"
            more = []
            if importance is not None:
                if kind in ("f16", "bf16", "q8_0"):
                    continue
                more = ["--importance", matrix] if matrix.exists() else ["--calibration", scratch / "calibration.txt", "--write-importance", matrix]
            export(alambic, folder, quantised, kind, *more)
            cpp.quantize(gguf, theirs, number, importance_of(matrix) if importance is not None else None)
            assert_same_tensors(quantised, theirs, f"SmolLM2 as {kind}{' with importances' if importance else ''}")
            for path in (quantised, theirs):
                path.unlink()
    check_importance(folder, matrix, model, tokenizer)


def check_importance(folder, matrix, model, tokenizer):
    """The written sums against those of forward hooks in transformers, over the same pieces of 512 tokens."""
    sums, ids = {}, tokenizer.encode(TEXT, add_special_tokens=False).ids
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    hooks = []
    for layer, block in enumerate(model.model.layers):
        for path, name in names.items():
            key = f"blk.{layer}.{name}.weight"
            hooks.append(block.get_submodule(path).register_forward_hook(
                lambda module, inputs, output, key=key: sums.__setitem__(key, sums.get(key, 0) + inputs[0].double().square().sum((0, 1)))))
    for begin in range(0, len(ids), 512):
        logits_of(model, ids[begin:begin + 512])
    for hook in hooks:
        hook.remove()
    written = {t.name: np.array(t.data).reshape(-1) for t in GGUFReader(matrix).tensors}
    assert {n[:-len(".in_sum2")] for n in written if n.endswith(".in_sum2")} == sums.keys()
    for key, expected in sums.items():
        assert written[key + ".counts"][0] == len(ids), (key, written[key + ".counts"])
        oracle.assert_close(written[key + ".in_sum2"], expected, 2e-4, 1e-5 * float(expected.max()), f"importance of {key}")


# ---- an adapter ----

def check_adapters(alambic, scratch, cpp):
    import peft
    import transformers as t
    torch.manual_seed(SEED)
    config = t.LlamaConfig(vocab_size=320, hidden_size=256, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                           bos_token_id=262, eos_token_id=261)
    base = scratch / "adapter-base"
    t.LlamaForCausalLM(config).save_pretrained(base)
    byte_tokenizer(base, 320)
    export(alambic, base, scratch / "adapter-base.gguf")
    ids = torch.randint(0, 260, (60,)).tolist()
    for name, lora in {"plain": dict(r=8, lora_alpha=16), "rslora": dict(r=8, lora_alpha=16, use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"k_proj": 5})}.items():
        adapted = peft.get_peft_model(t.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32),
                                      peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], **lora))
        with torch.no_grad():
            for parameter_name, parameter in adapted.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(scratch / f"adapter-{name}")
        gguf = scratch / f"adapter-{name}.gguf"
        report = oracle.run_json(alambic, "export", scratch / f"adapter-{name}", gguf, "--base", base)
        assert report["tensors"] == {"F32": 42}, report
        adapted.eval()
        plain, _ = cpp.logits(scratch / "adapter-base.gguf", ids)
        values, _ = cpp.logits(scratch / "adapter-base.gguf", ids, lora=gguf)
        expected = logits_of(adapted, ids)
        assert np.abs(plain - expected.numpy()).max() > 1e-2 * float(expected.abs().max()), "the adapter changes nothing"
        oracle.assert_close(values, expected, 0, 2e-5 * float(expected.abs().max()), f"logits of base + {name} adapter in llama.cpp")


def live(alambic):
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        cpp = llamacpp.LlamaCpp(scratch)
        check_adapters(alambic, scratch, cpp)
        check_families(alambic, scratch, cpp)
        check_smollm2(alambic, scratch, cpp)


oracle.main(live=live)
