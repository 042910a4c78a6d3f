# SPDX-License-Identifier: Apache-2.0
"""Token ids and loss masks of `alambic prepare` against tokenizers and transformers' apply_chat_template.

make() writes a small model folder (byte-level BPE, ChatML template), data in every format, and what transformers makes of it.
"""
import json

import oracle

GOLDEN_MODEL = oracle.GOLDEN / "prepare" / "model"
STOP = "<|im_end|>"
# The same text with and without {% generation %}: transformers masks by the blocks; alambic must find the same spans without.
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
          "{% if message['role'] == 'assistant' %}GEN{{ message['content'] + '<|im_end|>' }}END{{ '\n' }}"
          "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
PLAIN_TEMPLATE = CHATML.replace("GEN", "").replace("END", "")
MARKED_TEMPLATE = CHATML.replace("GEN", "{% generation %}").replace("END", "{% endgeneration %}")

CHATS = [
    [{"role": "system", "content": "Jawab dengan singkat."}, {"role": "user", "content": "Apa ibu kota Indonesia?"},
     {"role": "assistant", "content": "Jakarta."}],
    [{"role": "user", "content": "Halo!"}, {"role": "assistant", "content": "Halo, apa kabar?"},
     {"role": "user", "content": "Baik. Dua tambah dua?"}, {"role": "assistant", "content": "Empat,\nyaitu 4.\n"}],
    [{"role": "user", "content": "日本語で挨拶して"}, {"role": "assistant", "content": "こんにちは 👋🏽 é"}],
    [{"role": "user", "content": "  spasi  "}, {"role": "assistant", "content": " mulai dengan spasi"}],
]
TEXTS = ["Selamat datang di Debian.\nSistem operasi yang bebas.\n", "ꦱꦸꦒꦼꦁ ꦫꦮꦸꦃ 日本語 👩‍👩‍👧 naïve\n"]


def tokenizer(adds_begin):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)  # with True transformers finds no token for an answer that begins with a space, and masks it whole
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
                                  special_tokens=[AddedToken(t, special=True) for t in ["<|endoftext|>", "<|im_start|>", STOP]])
    made.train_from_iterator([m["content"] for c in CHATS for m in c] + TEXTS, trainer)
    if adds_begin:
        made.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", made.token_to_id("<|endoftext|>"))])
    return made


def model_folder(folder, adds_begin):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer(adds_begin).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}))
    (folder / "chat_template.jinja").write_text(PLAIN_TEMPLATE)


def transformers_tokenizer(folder):
    from transformers import PreTrainedTokenizerFast
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def chat_documents(folder, chats):
    """ids and masks of transformers; the first token is never predicted, so its mask is 0."""
    reference = transformers_tokenizer(folder)
    documents = []
    for chat in chats:
        made = reference.apply_chat_template(chat, chat_template=MARKED_TEMPLATE, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        documents.append({"ids": made["input_ids"], "mask": made["assistant_masks"]})
    return documents


def text_documents(folder, texts):
    reference = transformers_tokenizer(folder)
    documents = []
    for text in texts:
        ids = reference(text)["input_ids"] + [reference.eos_token_id]
        mask = [0] + [1] * (len(ids) - 1)
        # The bytes of all tokens but the first, each counted once: what decoding them gives, less what it starts with.
        first = len(reference.decode(ids[:1], skip_special_tokens=True).encode()) if ids[0] != reference.eos_token_id else 0
        documents.append({"ids": ids, "mask": mask, "bytes": len(text.encode()) - first})
    return documents


def make(golden):
    import pyarrow
    import pyarrow.parquet
    folder = golden / "prepare"
    for name, adds_begin in [("model", False), ("model_begin", True)]:
        model_folder(folder / name, adds_begin)
    (folder / "marked.jinja").write_text(MARKED_TEMPLATE)
    lines = "".join(json.dumps({"messages": chat}, ensure_ascii=(i % 2 == 0)) + "\n" for i, chat in enumerate(CHATS))
    (folder / "chats.jsonl").write_text(lines)
    pyarrow.parquet.write_table(pyarrow.table({"messages": CHATS}), folder / "chats.parquet", compression="zstd")
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS, "id": [1, 2]}), folder / "texts.parquet")
    expected = {"chats": chat_documents(folder / "model", CHATS), "texts": text_documents(folder / "model", TEXTS),
                "texts_begin": text_documents(folder / "model_begin", TEXTS)}
    (folder / "expected.json").write_text(json.dumps({"script": "tests/oracle/prepare_oracle.py", "versions": oracle.versions("transformers", "tokenizers", "pyarrow"),
                                                      "seed": "none", **expected}) + "\n")


if __name__ == "__main__":
    oracle.main(make)
