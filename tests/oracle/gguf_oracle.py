# SPDX-License-Identifier: Apache-2.0
"""GGUF: de-quantised values against the gguf package, and imported folders against transformers.

Golden: blocks of every quantised type with random bits and with extreme scales, and the bits of what
gguf.quants.dequantize makes of them (NaN as one pattern, because its sign and payload carry no meaning).
Live: every tensor and the logits of the real SmolLM2 file, and tiny models of every architecture written as GGUF
the way llama.cpp's converter does, imported, and loaded again by transformers.
"""
import json
import pathlib
import subprocess
import tempfile

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter, MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

import oracle

SEED = 20261122
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
# Offsets of the half-precision scales in a block.
SCALES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2],
          "Q5_K": [0, 2], "Q6_K": [208]}
# 0, -0, smallest and largest subnormal, smallest normal, largest, infinities, NaN, 1, -1/3
EXTREMES = [0x0000, 0x8000, 0x0001, 0x83ff, 0x0400, 0x7bff, 0x7c00, 0xfc00, 0x7e01, 0x3c00, 0xb555]


def make(folder):
    rng = np.random.default_rng(SEED)
    tensors = {}
    for name in TYPES:
        kind = Type[name]
        _, num_bytes = GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, size=(len(EXTREMES) + 4, num_bytes), dtype=np.uint8)
        for row, bits in enumerate(EXTREMES):
            for at in SCALES[name]:
                blocks[row, at:at + 2] = np.frombuffer(np.uint16(bits).tobytes(), dtype=np.uint8)
        with np.errstate(all="ignore"):
            values = dequantize(blocks, kind).astype(np.float32)
        bits = values.view(np.int32).copy()
        bits[np.isnan(values)] = 0x7FC00000
        tensors[name + ".blocks"] = torch.from_numpy(blocks)
        tensors[name + ".bits"] = torch.from_numpy(bits.reshape(len(blocks), -1))
    oracle.save_golden(folder / "gguf_blocks.safetensors", tensors, SEED, packages=("gguf", "numpy"))


def run_import(alambic, gguf, folder, *more):
    done = subprocess.run([str(alambic), "import", str(gguf), str(folder), *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def check_real_file(alambic, scratch):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    gguf = oracle.smollm2()
    folder = run_import(alambic, gguf, scratch / "smollm2", "--weights", "f32")
    ours = load_file(folder / "model.safetensors")
    reader = GGUFReader(gguf)
    heads = {"attn_q": 9, "attn_k": 3}
    modules = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
               "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(list(reversed([int(n) for n in tensor.shape])))
        if tensor.name.startswith("blk."):
            _, layer, module, kind = tensor.name.split(".")
            name = f"model.layers.{layer}.{modules[module]}.{kind}"
            if module in heads:
                n = heads[module]
                values = values.reshape(n, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        else:
            name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[tensor.name]
        assert np.array_equal(ours.pop(name).numpy().view(np.int32), np.ascontiguousarray(values).view(np.int32)), f"{tensor.name}: bits differ"
    assert not ours, f"tensors of no GGUF origin: {sorted(ours)}"

    ids = [1, 4093, 198, 2683, 359, 260, 6858, 30, 2, 198, 1, 520, 9531, 198]
    expected = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    actual = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    oracle.assert_close(logits_of(actual, ids), logits_of(expected, ids), 0, 0, "logits of the imported SmolLM2")


# Keys that llama.cpp's converter writes for a text model, from the model's config.
def write_gguf(model, path, architecture, tokenizer_metadata):
    config = model.config
    writer = GGUFWriter(str(path), architecture)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_name("tiny " + architecture)
    writer.add_license("mit")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture in ("qwen3", "gemma2", "gemma3", "smollm3") or head_size * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)
    if architecture in ("llama", "smollm3"):
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head_size)
    if architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    permute = architecture in ("llama", "smollm3")
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf_scaling("linear"))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf_scaling("yarn"))
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        base = 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_size, 2).float() / head_size))
        factors = []
        low, high = (rope["original_max_position_embeddings"] / rope[k] for k in ("low_freq_factor", "high_freq_factor"))
        for frequency in base:
            wave = 2 * np.pi / frequency
            if wave < high:
                factors.append(1.0)
            elif wave > low:
                factors.append(rope["factor"])
            else:
                smooth = (rope["original_max_position_embeddings"] / wave - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
                factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
        writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))
    if architecture == "phi3":
        writer.add_rope_dimension_count(int(head_size * rope.get("partial_rotary_factor", 1.0)))
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_sliding_window(config.sliding_window or 0)
        if rope["rope_type"] == "longrope":
            scale = config.max_position_embeddings / config.original_max_position_embeddings
            writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(scale) / np.log(config.original_max_position_embeddings))))
            writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], dtype=np.float32))
            writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], dtype=np.float32))
    tokenizer_metadata(writer, config.vocab_size)

    arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        values = tensor.detach().float().numpy()
        if permute and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            values = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            values = values + 1
        stem, kind = name.rsplit(".", 1)
        writer.add_tensor(names.get_name(stem) + "." + kind, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_scaling(name):
    from gguf import RopeScalingType
    return {"linear": RopeScalingType.LINEAR, "yarn": RopeScalingType.YARN}[name]


def byte_tokenizer(writer, size):
    """A byte-level vocabulary of `size` tokens: the 256 bytes, special tokens, one merged token, and unused ones."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    tokens = list(bytes_to_unicode().values()) + ["<|end|>", "<|start|>", "\u0120t"]
    tokens += [f"<|unused{i}|>" for i in range(size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3, 1] + [3] * (size - 259))
    writer.add_token_merges(["\u0120 t"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(256)


def tiny_models():
    import transformers as t
    shared = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                  max_position_embeddings=512, bos_token_id=257, eos_token_id=256, pad_token_id=None)
    llama3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}
    longrope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "long_factor": [1.5 + i for i in range(6)],
                "short_factor": [1.0 + 0.1 * i for i in range(6)]}
    yield "llama", t.LlamaForCausalLM(t.LlamaConfig(**shared, tie_word_embeddings=True, attention_bias=False))
    yield "llama", t.LlamaForCausalLM(t.LlamaConfig(**{**shared, "max_position_embeddings": 131072}, head_dim=32, tie_word_embeddings=False, rope_parameters=llama3))
    yield "llama", t.LlamaForCausalLM(t.LlamaConfig(**shared, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}))
    yield "qwen2", t.Qwen2ForCausalLM(t.Qwen2Config(**shared, tie_word_embeddings=True))
    yield "qwen2", t.Qwen2ForCausalLM(t.Qwen2Config(**shared, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6,
                                                                              "original_max_position_embeddings": 128}))
    yield "qwen3", t.Qwen3ForCausalLM(t.Qwen3Config(**shared, head_dim=32, tie_word_embeddings=True))
    yield "smollm3", t.SmolLM3ForCausalLM(t.SmolLM3Config(**{**shared, "num_hidden_layers": 5, "pad_token_id": 256}))
    yield "gemma2", t.Gemma2ForCausalLM(t.Gemma2Config(**{**shared, "pad_token_id": 256}, head_dim=32, query_pre_attn_scalar=32, sliding_window=16, attn_logit_softcapping=2.0,
                                                       final_logit_softcapping=3.0, attn_implementation="eager"))
    yield "gemma3", t.Gemma3ForCausalLM(t.Gemma3TextConfig(**{**shared, "num_hidden_layers": 7, "pad_token_id": 256}, head_dim=32, query_pre_attn_scalar=32,
                                                           sliding_window=16))
    yield "phi3", t.Phi3ForCausalLM(t.Phi3Config(**{**shared, "pad_token_id": 256}, original_max_position_embeddings=512, tie_word_embeddings=False))
    yield "phi3", t.Phi3ForCausalLM(t.Phi3Config(**{**shared, "max_position_embeddings": 1024, "pad_token_id": 256}, original_max_position_embeddings=64,
                                                 tie_word_embeddings=True, rope_parameters=longrope))


def check_architectures(alambic, scratch):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    torch.manual_seed(SEED)
    seen = set()
    for number, (architecture, model) in enumerate(tiny_models()):
        seen.add(architecture)
        with torch.no_grad():  # norms and biases that are all ones or zeros would hide a wrong place
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.eval()
        gguf = scratch / f"{number}-{architecture}.gguf"
        write_gguf(model, gguf, architecture, byte_tokenizer)
        folder = run_import(alambic, gguf, scratch / f"{number}-{architecture}", "--weights", "f32")
        loaded, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (architecture, report)
        assert type(loaded) is type(model), (type(loaded), type(model))
        # f32 rounding of (w + 1) - 1 and of metadata is all that may differ.
        for length in (40, 120):
            ids = torch.randint(0, 320, (length,)).tolist()
            expected = logits_of(model, ids)
            oracle.assert_close(logits_of(loaded, ids), expected, 0, 2e-5 * float(expected.abs().max()), f"{architecture} {number}: logits of the imported folder")
        assert AutoTokenizer.from_pretrained(folder)("Hello")["input_ids"], architecture
        card = (folder / "README.md").read_text()
        assert card.startswith("---\nlicense: mit\n"), card[:200]
    assert seen == {"llama", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3", "phi3"}, seen


def live(alambic):
    with tempfile.TemporaryDirectory() as scratch:
        check_real_file(alambic, pathlib.Path(scratch))
        check_architectures(alambic, pathlib.Path(scratch))


oracle.main(make, live)
