# SPDX-License-Identifier: Apache-2.0
"""Our tokenizer against Hugging Face's tokenizers in Python: ids, byte offsets, decoded text.

The golden holds five small tokenizers of different kinds (trained here, or built by hand), texts, and what Python made of
them. `check` keeps the tokenizers of the committed golden, for training again need not give the same vocabulary.
"""
import json

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

import oracle
from varied_texts import WORDS, varied_texts

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<unk>"]
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def trained():
    corpus = varied_texts(400, seed=5)
    made = {}

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=SPECIAL, show_progress=False))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 0)])
    bpe.add_tokens([AddedToken("plain added", normalized=True), AddedToken("<think>", lstrip=True, rstrip=True)])
    bpe.enable_truncation(3)  # must be dropped by the reader: ids are those of the whole text
    bpe.enable_padding(length=7)
    made["byte_level_bpe"] = bpe

    letters = sorted({letter for text in corpus for letter in text if letter.isalpha() and ord(letter) < 0x250})
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581"] + letters
    pairs = []
    for word in ["\u2581the", "\u2581qu", "\u2581Hello", "er", "in", "\u2581\u2581", "\u2581\u2581\u2581\u2581", "naïve"]:
        for end in range(2, len(word) + 1):
            piece = word[:end]
            if piece not in tokens and piece[:-1] in tokens and piece[-1] in tokens:
                tokens.append(piece)
                pairs.append((piece[:-1], piece[-1]))
    spm = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spm.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    spm.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    spm.add_special_tokens(["<unk>", "<s>", "</s>"])
    spm.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B", special_tokens=[("<s>", 1), ("</s>", 2)])
    made["sentencepiece_bpe"] = spm

    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("\u2581", -3.0)] + [(letter, -6.0 - 0.01 * i) for i, letter in enumerate(letters)]
    pieces += [(piece, -4.0 - 0.1 * i) for i, piece in enumerate(["\u2581the", "\u2581Hello", "ll", "er", "\u2581W", "OR", "\u2581caf", "café", "\u2581can", "in", "on"])]
    unigram = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    unigram.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    unigram.decoder = decoders.Metaspace(prepend_scheme="always")
    unigram.add_special_tokens(["</s>"])
    made["unigram"] = unigram

    word_piece = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    word_piece.normalizer = normalizers.BertNormalizer(lowercase=True)
    word_piece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    word_piece.decoder = decoders.WordPiece()
    word_piece.train_from_iterator([" ".join(WORDS[:40])] * 3, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False))
    word_piece.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    made["word_piece"] = word_piece

    words = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *dict.fromkeys(WORDS[:60])])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Whitespace()])
    made["word_level"] = words
    return {name: json.loads(one.to_str()) for name, one in made.items()}


def row(tokenizer, text):
    """[text, ids, ids with what the post-processor adds, begins, ends, decoded, decoded without special tokens]"""
    plain, added = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)
    at = [0]  # Python counts characters, we count bytes
    for letter in text:
        at.append(at[-1] + len(letter.encode()))
    return [text, plain.ids, added.ids, [at[a] for a, _ in plain.offsets], [at[b] for _, b in plain.offsets],
            tokenizer.decode(added.ids, skip_special_tokens=False), tokenizer.decode(added.ids, skip_special_tokens=True)]


def unlimited(description):
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def make(folder):
    folder.mkdir(parents=True, exist_ok=True)
    committed = oracle.GOLDEN / "tokenizers.json"
    descriptions = trained() if folder == oracle.GOLDEN else {name: one["tokenizer"] for name, one in json.loads(committed.read_text("utf-8"))["cases"].items()}
    out = {"script": "tests/oracle/tokenizer_oracle.py", "versions": oracle.versions("tokenizers"), "seed": "7", "cases": {}}
    for name, description in descriptions.items():
        tokenizer = unlimited(description)
        texts = varied_texts(70, seed=7, special=SPECIAL[1:4] + ["plain added", "<think>"])
        out["cases"][name] = {"tokenizer": description, "vocabulary_size": tokenizer.get_vocab_size(), "rows": [row(tokenizer, text) for text in texts]}
    (folder / "tokenizers.json").write_text(json.dumps(out, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8", newline="")


def live(alambic):
    """Each kind on some thousand more texts."""
    cases = {}
    for name, one in json.loads((oracle.GOLDEN / "tokenizers.json").read_text("utf-8"))["cases"].items():
        tokenizer = unlimited(one["tokenizer"])
        texts = varied_texts(3000, seed=11, special=SPECIAL)
        cases[name] = {"tokenizer": one["tokenizer"], "vocabulary_size": tokenizer.get_vocab_size(), "rows": [row(tokenizer, text) for text in texts]}
    oracle.run_test_program(alambic, "data", "TokenizerOracle.*", json.dumps({"cases": cases}))


if __name__ == "__main__":
    oracle.main(make, live)
