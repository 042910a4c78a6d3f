# SPDX-License-Identifier: Apache-2.0
"""A model folder for tests that run the built program. Python's standard library only."""
import json
import math
import struct


def write_tiny_model(folder, phase=0.0, layers=2):
    """A llama (of two layers) over bytes, with a ChatML template. Its numbers mean nothing; `phase` makes another of the same shape."""
    folder.mkdir()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    size = 256 + len(special)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": size, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers,
              "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
              "hidden_act": "silu", "tie_word_embeddings": True, "bos_token_id": 256, "eos_token_id": 258, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))

    shapes = {"model.embed_tokens.weight": [size, 16], "model.norm.weight": [16]}
    for layer in range(layers):
        name = f"model.layers.{layer}."
        shapes |= {name + "input_layernorm.weight": [16], name + "post_attention_layernorm.weight": [16],
                   name + "self_attn.q_proj.weight": [16, 16], name + "self_attn.k_proj.weight": [8, 16], name + "self_attn.v_proj.weight": [8, 16],
                   name + "self_attn.o_proj.weight": [16, 16], name + "mlp.gate_proj.weight": [32, 16], name + "mlp.up_proj.weight": [32, 16],
                   name + "mlp.down_proj.weight": [16, 32]}
    header, data = {}, b""
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        values = [math.sin(1.7 * i + number + phase) for i in range(math.prod(shape))]
        values = [1 + 0.1 * v for v in values] if len(shape) == 1 else [0.3 * v for v in values]
        begin = len(data)
        data += struct.pack(f"<{len(values)}f", *values)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)

    # GPT-2's letters for bytes: printable ones stand for themselves, the others for U+0100 and up.
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in own} | {byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in own)}
    added = [{"id": 256 + n, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
             for n, token in enumerate(special)]
    bytes_of_text = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (folder / "tokenizer.json").write_text(json.dumps(
        {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None, "pre_tokenizer": bytes_of_text,
         "post_processor": None, "decoder": bytes_of_text,
         "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                   "byte_fallback": False, "vocab": {letter: byte for byte, letter in letters.items()}, "merges": []}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[2]}))
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
