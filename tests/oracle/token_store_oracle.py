# SPDX-License-Identifier: Apache-2.0
"""A reader of token stores written from docs/token_store.md alone, with h5py; and a comparison of what `alambic prepare`
stores with what tokenizers and transformers make of the same inputs (prepare_oracle.py)."""
import hashlib
import json
import pathlib
import re
import tempfile

import h5py
import numpy

import oracle
import prepare_oracle


def read_store(folder):
    """The index, and the documents as dictionaries {ids, mask, source, num_bytes, num_words}; asserts what the page promises."""
    folder = pathlib.Path(folder)
    text = (folder / "index.json").read_bytes()
    index = json.loads(text)
    seal = index["index_sha256"]
    assert hashlib.sha256(text.replace(seal.encode(), b"0" * 64)).hexdigest() == seal, "the seal of index.json"
    assert index["format"] == "alambic token store" and index["version"] == 1
    documents = []
    for shard in index["shards"]:
        assert re.fullmatch(r"tokens-\d{5}-\d{6}\.h5", shard["file"])
        path = folder / shard["file"]
        assert path.stat().st_size == shard["file_bytes"] and hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        with h5py.File(path, "r") as file:
            columns = ["ids", "mask", "offsets", "source", "num_bytes", "num_words"]
            assert sorted(file) == sorted(columns)
            for name in columns:
                column = file[name]
                assert column.shuffle and column.compression == "gzip" and column.fletcher32, name
                assert column.chunks == (min(len(column), 16384),), name
            assert file["ids"].dtype == ("<u2" if index["vocabulary_size"] <= 65536 else "<u4")
            assert file["offsets"].dtype == "<u8" and file["source"].dtype == "<u2" and file["mask"].dtype == "u1"
            assert file.attrs["tokenizer_hash"].decode() == index["tokenizer_hash"]
            assert json.loads(file.attrs["sources"].decode()) == index["sources"]
            for name, value in shard["totals"].items():
                assert file.attrs[name] == value, name
            ids, offsets = file["ids"][:], file["offsets"][:]
            mask = numpy.unpackbits(file["mask"][:], bitorder="little")
            assert not mask[len(ids):].any() and mask[:len(ids)].sum() == shard["totals"]["trained_tokens"]
            assert ids.min() == shard["min_id"] and ids.max() == shard["max_id"] < index["vocabulary_size"]
            assert offsets[0] == 0 and offsets[-1] == len(ids) and (numpy.diff(offsets.astype("i8")) > 0).all()
            source, num_bytes, num_words = file["source"][:], file["num_bytes"][:], file["num_words"][:]
            for d in range(len(offsets) - 1):
                begin, end = int(offsets[d]), int(offsets[d + 1])
                assert mask[begin] == 0
                documents.append({"ids": ids[begin:end].tolist(), "mask": mask[begin:end].tolist(), "source": index["sources"][source[d]],
                                  "num_bytes": int(num_bytes[d]), "num_words": int(num_words[d])})
    assert index["totals"]["documents"] == len(documents)
    assert index["totals"]["tokens"] == sum(len(d["ids"]) for d in documents)
    assert index["totals"]["bytes"] == sum(d["num_bytes"] for d in documents)
    assert index["totals"]["words"] == sum(d["num_words"] for d in documents)
    return index, documents


def compare(found, expected, what):
    assert len(found) == len(expected), f"{what}: {len(found)} documents, expected {len(expected)}"
    for number, (document, wanted) in enumerate(zip(found, expected)):
        for key in ("ids", "mask"):
            assert document[key] == list(wanted[key]), f"{what}: {key} of document {number} differ"
        if "bytes" in wanted:
            assert document["num_bytes"] == wanted["bytes"], f"{what}: bytes of document {number}"


def live(alambic):
    chats = [[{"role": "user", "content": f"soal {i} " + "kata " * (i % 7)}, {"role": "assistant", "content": f"jawaban {i}\n\n日本 " * (1 + i % 3) + "."},
              {"role": "user", "content": "lagi"}, {"role": "assistant", "content": "  ya"}] for i in range(400)]
    texts = [f"Alinea {i} ini naïve 👋🏽.\nBaris dua.\n" * (1 + i % 40) for i in range(300)]
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        model = prepare_oracle.GOLDEN_MODEL
        (scratch / "chats.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats))
        (scratch / "texts.jsonl").write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts))
        for name, shards in [("chats", 1000), ("texts", 5000)]:
            expected = prepare_oracle.chat_documents(model, chats) if name == "chats" else prepare_oracle.text_documents(model, texts)
            report = oracle.run_json(alambic, "prepare", "-m", model, "-i", scratch / f"{name}.jsonl", "-o", scratch / name, "--licence", "CC0-1.0",
                                     "--language", "id", "--origin", "made up", "--set", f"tokens_per_shard={shards}")
            index, documents = read_store(scratch / name)
            compare(documents, expected, name)
            assert len(index["shards"]) > 3, "several shards were wanted"
            assert report["totals"] == index["totals"]
            assert documents[0]["source"] == {"name": "text", "origin": "made up", "licence": "CC0-1.0", "language": "id"}
            if name == "texts":
                assert [d["num_words"] for d in documents] == [len(t.split()) for t in texts]
    print(f"h5py reads {len(chats)} conversations and {len(texts)} texts as transformers makes them")


if __name__ == "__main__":
    oracle.main(None, live)
