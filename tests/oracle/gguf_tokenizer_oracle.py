# SPDX-License-Identifier: Apache-2.0
"""tokenizer.json made from GGUF metadata against transformers' AutoTokenizer(gguf_file=...) and the sentencepiece package.

Small GGUF files are written with the gguf package; the golden holds their metadata, texts, and the ids of the reference.
"""
import io
import json
import os
import pathlib
import random
import tempfile

import gguf
import numpy
import sentencepiece
import tokenizers

import oracle
from varied_texts import WORDS, varied_texts

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
SPLITS = ["default", "gpt-2", "smollm", "llama-bpe", "tekken", "qwen2", "deepseek-r1-qwen", "qwen35", "gpt-4o"]


def byte_level(pre):
    """Byte-level BPE with few merges, among them ones that only some pre-tokenizers allow to happen."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens, merges = list(letters), []
    for word in ["\u0120the", "ing", "llo", "He", "\u0120qu", "ick", "123", "12345", "00", "\u0120\u0120\u0120\u0120", "\u010a\u010a", "\u010d\u010a", "'re", "'S", "\u0120'", "!!", "...", "\u00c3\u00a9",
                 "\u0120\u00d0\u0141\u00d1\u0122", "://", "/\u010a", "WORLD", "camelCase", "\u0120a", "n't", "\u00e4\u00bd\u0142"]:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append(f"{word[:end - 1]} {word[end - 1]}")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    types = [NORMAL] * len(tokens) + [CONTROL] * len(special) + [USER, USER]
    tokens += special + ["<think>", "</think>"]
    at = tokens.index
    return {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": merges, "tokenizer.ggml.bos_token_id": at("<|im_start|>"),
            "tokenizer.ggml.eos_token_id": at("<|im_end|>"), "tokenizer.ggml.unknown_token_id": at("<|endoftext|>"),
            "tokenizer.ggml.padding_token_id": at("<|im_end|>"), "tokenizer.ggml.add_bos_token": pre == "llama-bpe"}


def trained_sentencepiece(kind):
    out = io.BytesIO()
    unigram = kind == "unigram"
    rng = random.Random(3)
    lines = [" ".join(rng.choice(WORDS) for _ in range(rng.randrange(3, 12))) + rng.choice([" 12", "  .", "!", ""]) for _ in range(1500)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, model_type=kind,
        vocab_size=900, character_coverage=0.98, byte_fallback=not unigram, normalization_rule_name="nmt_nfkc" if unigram else "identity",
        remove_extra_whitespaces=unigram, split_digits=True, hard_vocab_limit=False, control_symbols=["<|im_end|>"], num_threads=1, minloglevel=2)
    return out.getvalue()


def sentencepiece_metadata(model, unigram, architecture="llama"):
    """What llama.cpp's converter writes for a SentencePiece model."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens, scores, types = [], [], []
    for i in range(processor.get_piece_size()):
        tokens.append(processor.id_to_piece(i))
        scores.append(processor.get_score(i))
        types.append(UNKNOWN if processor.is_unknown(i) else CONTROL if processor.is_control(i) else BYTE if processor.is_byte(i) else NORMAL)
    metadata = {"general.architecture": architecture, "tokenizer.ggml.model": "t5" if unigram else "llama", "tokenizer.ggml.pre": "default",
                "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores, "tokenizer.ggml.token_type": types,
                "tokenizer.ggml.bos_token_id": processor.bos_id(), "tokenizer.ggml.eos_token_id": processor.eos_id(),
                "tokenizer.ggml.unknown_token_id": processor.unk_id(), "tokenizer.ggml.add_bos_token": not unigram, "tokenizer.ggml.add_eos_token": False}
    if unigram:
        from sentencepiece import sentencepiece_model_pb2
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(model)
        metadata["tokenizer.ggml.precompiled_charsmap"] = list(proto.normalizer_spec.precompiled_charsmap)
        metadata["tokenizer.ggml.remove_extra_whitespaces"] = True
    return metadata


def gemma_metadata():
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    types = [CONTROL, CONTROL, CONTROL, UNKNOWN] + [BYTE] * 256
    words = ["  ", "    ", "\u2581", "\u2581t", "\u2581th", "\u2581the", "in", "ing", "ll", "llo", "He", "Hello", "\n", "\n\n", "<start_of_turn>"] + [chr(c) for c in range(33, 127)] + list("éüñ世界")
    tokens += words
    types += [USER if w in ("\n", "\n\n") else CONTROL if w == "<start_of_turn>" else USER if not w.strip() else NORMAL for w in words]
    return {"general.architecture": "gemma3", "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [-float(i % 7) for i in range(len(tokens))], "tokenizer.ggml.token_type": types, "tokenizer.ggml.bos_token_id": 2,
            "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.unknown_token_id": 3, "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.add_space_prefix": False}


def write_gguf(path, metadata):
    """The metadata and what transformers needs to make a config, by the gguf package."""
    architecture = metadata["general.architecture"]
    writer = gguf.GGUFWriter(str(path), architecture)
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length"):
        writer.add_uint32(f"{architecture}.{key}", 64)
    writer.add_uint32(f"{architecture}.attention.head_count", 4)
    writer.add_uint32(f"{architecture}.attention.head_count_kv", 4)
    writer.add_uint32(f"{architecture}.attention.key_length", 16)
    writer.add_uint32(f"{architecture}.attention.sliding_window", 16)
    writer.add_uint32(f"{architecture}.rope.dimension_count", 16)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{architecture}.rope.freq_base", 10000.0)
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif key.endswith("charsmap"):
            writer.add_array(key, numpy.frombuffer(bytes(value), dtype=numpy.uint8).tolist())
        else:
            writer.add_array(key, value)
    writer.add_tensor("token_embd.weight", numpy.zeros((len(metadata["tokenizer.ggml.tokens"]), 64), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def by_transformers(metadata):
    from transformers import AutoTokenizer
    with tempfile.TemporaryDirectory() as scratch:
        write_gguf(pathlib.Path(scratch) / "x.gguf", metadata)
        return AutoTokenizer.from_pretrained(scratch, gguf_file="x.gguf")


def rows_of(tokenizer, texts):
    return [[text, tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)] for text in texts]


def table(count, bpe):
    """Cases with transformers as the reference; each text as [text, ids, ids with BOS]. bpe: metadata of a SentencePiece model."""
    cases = {}
    for pre in SPLITS:
        metadata = byte_level(pre)
        texts = varied_texts(count, seed=len(pre), special=["<|im_start|>", "<think>", "<|endoftext|>"])
        cases["byte_level " + pre] = {"metadata": metadata, "rows": rows_of(by_transformers(metadata), texts)}
    metadata = gemma_metadata()
    cases["gemma3"] = {"metadata": metadata, "rows": rows_of(by_transformers(metadata), varied_texts(count, seed=21, special=["<start_of_turn>", "<eos>"]))}
    texts = varied_texts(count, seed=22, special=["<|im_end|>", "</s>"])
    cases["sentencepiece bpe"] = {"metadata": bpe, "rows": rows_of(by_transformers(bpe), texts)}
    phi3 = {**bpe, "general.architecture": "phi3"}
    cases["phi3"] = {"metadata": phi3, "rows": rows_of(by_transformers(phi3), texts)}
    return cases


def by_sentencepiece(model, texts):
    """The package's own ids. It treats control tokens as text and maps NUL away, so texts have neither; the reference for
    a text with white space at its ends or line ends is transformers (Metaspace), not the package."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [[text, processor.encode(text), None] for text in texts]


def plain_texts(count):
    keep = [t for t in varied_texts(4 * count, seed=31) if "\x00" not in t and "\u2581" not in t and "<0x" not in t and t.strip() and t == t.strip() and not any(c in t for c in "\n\r\t\v\f\x85\u2028\u2029\u1680\x1c\x1d\x1e\x1f")]
    return keep[:count]


def make(folder):
    folder.mkdir(parents=True, exist_ok=True)
    committed = oracle.GOLDEN / "gguf_tokenizers.json"
    out = {"script": "tests/oracle/gguf_tokenizer_oracle.py", "versions": oracle.versions("transformers", "tokenizers", "gguf"), "seed": "len(name), 21, 22", "cases": {}}
    # Training again need not give the same model, so `check` keeps the committed one.
    bpe = (sentencepiece_metadata(trained_sentencepiece("bpe"), False) if folder == oracle.GOLDEN
           else json.loads(committed.read_text("utf-8"))["cases"]["sentencepiece bpe"]["metadata"])
    out["cases"] = table(34, bpe)
    del out["cases"]["phi3"]  # the same metadata again: live only
    (folder / "gguf_tokenizers.json").write_text(json.dumps(out, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8", newline="")


def live(alambic):
    """The real SmolLM2 file and every small one on many texts; SentencePiece models also against the package itself."""
    from transformers import AutoTokenizer
    trained = {kind: trained_sentencepiece(kind) for kind in ("bpe", "unigram")}
    models = {kind: sentencepiece_metadata(model, kind == "unigram") for kind, model in trained.items()}
    cases = table(600, models["bpe"])
    for kind, model in trained.items():
        cases["package " + kind] = {"metadata": models[kind], "rows": by_sentencepiece(model, plain_texts(1500))}
    smollm2 = oracle.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(str(smollm2.parent), gguf_file=smollm2.name)
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<file_sep>"]
    cases["smollm2"] = {"gguf": str(smollm2), "rows": rows_of(tokenizer, varied_texts(4000, seed=41, special=special))}
    oracle.run_test_program(alambic, "checkpoints", "GgufTokenizerOracle.*", json.dumps({"cases": cases}))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    oracle.main(make, live)
