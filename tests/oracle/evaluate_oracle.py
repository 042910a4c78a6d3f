# SPDX-License-Identifier: Apache-2.0
"""Bits per UTF-8 byte of `alambic evaluate` on the real SmolLM2, computed again from the texts alone.

What is predicted, and how many bytes it stands for, comes from HF tokenizers' offsets; the nats from transformers' logits.
"""
import json
import math
import pathlib
import tempfile

import oracle

ROW_LENGTH = 48  # shorter than some documents: their context is cut there, and every token is still predicted once
TEXTS = ["Debian adalah sistem operasi yang bebas.\n" * 8, "naïve 日本語 👩‍👩‍👧 ꦱꦸꦒꦼꦁ\n", "The quick brown fox jumps over the lazy dog.\n"]
CHATS = [[{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "2 + 2 = 4."}],
         [{"role": "system", "content": "Jawab singkat."}, {"role": "user", "content": "Ibu kota?"}, {"role": "assistant", "content": "Jakarta – tentu."},
          {"role": "user", "content": "日本は？"}, {"role": "assistant", "content": "東京 👍"}]]
STOP = "<|im_end|>"


def text_document(tokenizer, text):
    """Ids, mask and bytes of plain text: all but the first token, and the token of its end, which stands for no text."""
    made = tokenizer(text, return_offsets_mapping=True)
    ids, offsets = made["input_ids"], made["offset_mapping"]
    first_own = next((begin for begin, end in offsets[1:] if begin >= offsets[0][1]), len(text))
    num_bytes = len(text[max(first_own, offsets[0][1]):].encode())
    return ids + [tokenizer.eos_token_id], [0] + [1] * len(ids), num_bytes


def chat_document(tokenizer, chat):
    """Trained: what an assistant says and its stop token, which is text of the template and so has its bytes."""
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    spans, at = [], 0
    for message in chat:
        at = text.index(message["content"] + STOP, at)
        if message["role"] == "assistant":
            spans.append((at, at + len(message["content"]) + len(STOP)))
        at += len(message["content"])
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [int(any(begin < end_ and end > begin_ for begin_, end_ in spans)) for begin, end in made["offset_mapping"]]
    return made["input_ids"], mask, sum(len(text[begin:end].encode()) for begin, end in spans)


def live(alambic):
    import torch
    import transformers
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        oracle.run(alambic, "import", oracle.smollm2(), folder / "base")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
        records = {"text": [{"text": text} for text in TEXTS], "chat": [{"messages": chat} for chat in CHATS]}
        documents = {"text": [text_document(tokenizer, text) for text in TEXTS], "chat": [chat_document(tokenizer, chat) for chat in CHATS]}
        for kind, lines in records.items():
            (folder / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            oracle.run(alambic, "prepare", "-m", folder / "base", "-i", folder / f"{kind}.jsonl", "-o", folder / kind)
            out = oracle.run_json(alambic, "evaluate", "--model", folder / "base", "--store", folder / kind, "--row-length", ROW_LENGTH, "--compute", "f32")
            got = out["stores"][0]
            nats = tokens = num_bytes = 0
            for ids, mask, document_bytes in documents[kind]:
                num_bytes += document_bytes
                # Pieces overlap by the token that the next one begins with.
                for first in range(0, len(ids) - 1, ROW_LENGTH - 1):
                    piece, keep = torch.tensor(ids[first:first + ROW_LENGTH]), torch.tensor(mask[first:first + ROW_LENGTH])
                    with torch.no_grad():
                        table = torch.log_softmax(model(piece[None]).logits[0].double(), -1)
                    nats -= float((table[:-1].gather(1, piece[1:, None])[:, 0] * keep[1:]).sum())
                    tokens += int(keep[1:].sum())
            assert (got["tokens"], got["bytes"]) == (tokens, num_bytes), f"{kind}: {got['tokens']} tokens, {got['bytes']} bytes; expected {tokens}, {num_bytes}"
            oracle.assert_close(got["nats"], nats, 1e-5, 0, f"{kind}: nats")
            oracle.assert_close(got["bits_per_byte"], nats / math.log(2) / num_bytes, 1e-5, 0, f"{kind}: bits per byte")
            print(f"SmolLM2, {kind}: {got['bits_per_byte']:.4f} bits per byte over {tokens} tokens and {num_bytes} bytes, as computed from the texts")


if __name__ == "__main__":
    oracle.main(None, live)
