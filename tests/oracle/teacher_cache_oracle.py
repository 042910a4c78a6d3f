# SPDX-License-Identifier: Apache-2.0
"""A reader of teacher caches written from docs/teacher_cache.md alone, with h5py and numpy; and a comparison of what is cached with
transformers' softmax of the same documents: ids and probabilities of top_k to their rounding, every draw of sampled made again,
and the means of sampled and weighted estimates within their standard errors."""
import hashlib
import json
import pathlib
import re
import shutil
import tempfile

import h5py
import numpy

import oracle
import prepare_oracle
import token_store_oracle

MASK = (1 << 64) - 1


def float_of(codes, mantissa):
    bits = ((codes.astype("u8") + (96 << mantissa)) << (23 - mantissa)).astype("u4")
    return numpy.where(codes == 0, numpy.float32(0), bits.view("f4"))


def bits_of(number):
    return int(number).bit_length()


def number_at(bits, begin, width):
    return sum(int(bits[begin + i]) << i for i in range(width))


def unpack(header, data, rows):
    """[(ids, values, tail)] of one piece."""
    ids_bits, slots = max(1, bits_of(header["vocabulary_size"] - 1)), header["slots"]
    result = []
    if header["kind"] == "top_k":
        words = numpy.frombuffer(data, dtype="<u4").reshape(rows, slots + 1)
        mantissa = min(23, 27 - ids_bits)
        for row in words:
            result.append((row[:slots] & ((1 << ids_bits) - 1), float_of(row[:slots] >> ids_bits, mantissa), row[slots:].view("<f4")[0]))
        return result
    entry_bits = bits_of(slots - 1)
    code_bits = 8 if header["kind"] == "weighted" else entry_bits
    bits, at = numpy.unpackbits(numpy.frombuffer(data, dtype="u1"), bitorder="little"), 0
    for _ in range(rows):
        entries = 1 + number_at(bits, at, entry_bits)
        at += entry_bits
        ids, codes = [], []
        for _ in range(entries):
            ids.append(number_at(bits, at, ids_bits))
            codes.append(number_at(bits, at + ids_bits, code_bits))
            at += ids_bits + code_bits
        assert ids == sorted(set(ids)) and entries <= slots
        if header["kind"] == "sampled":
            counts = numpy.array(codes) + 1
            assert counts.sum() == slots, "sum of counts = draws"
            result.append((numpy.array(ids), counts / slots, 0.0))
        else:
            result.append((numpy.array(ids), float_of(numpy.array(codes), 3).astype("f8") * 256, 0.0))
    assert (at + 7) // 8 == len(data) and not bits[at:].any()
    return result


def read_cache(folder):
    """The header, and {(store, document): a list of pieces, each a list of (ids, values, tail)}, and the bytes of files a row; asserts what the page promises."""
    folder = pathlib.Path(folder)
    lists = sorted(folder.glob("shard-*.json"))
    first, found, rows_of_all, file_bytes = None, {}, 0, 0
    for number, path in enumerate(lists):
        text = path.read_bytes()
        index = json.loads(text)
        seal = index["index_sha256"]
        assert hashlib.sha256(text.replace(seal.encode(), b"0" * 64)).hexdigest() == seal, "the seal of the list"
        header = {key: index[key] for key in index if key not in ("index_sha256", "shard", "totals", "files")}
        first = first or header
        assert header == first and header["format"] == "alambic teacher cache" and header["version"] == 1
        assert index["shard"] == number and header["shards"] == len(lists) and path.name == f"shard-{number:05}-of-{len(lists):05}.json"
        local = 0
        totals = {"documents": 0, "pieces": 0, "rows": 0, "bytes": 0}
        for count, entry in enumerate(index["files"]):
            assert entry["file"] == f"signal-{number:05}-of-{len(lists):05}-{count:06}.h5"
            content = (folder / entry["file"]).read_bytes()
            assert len(content) == entry["file_bytes"] and hashlib.sha256(content).hexdigest() == entry["sha256"]
            file_bytes += len(content)
            for key, value in entry["totals"].items():
                totals[key] += value
            with h5py.File(folder / entry["file"], "r") as file:
                assert sorted(file) == ["first_piece", "first_row", "offsets", "signal"]
                for name in file:
                    column = file[name]
                    assert column.shuffle and column.compression == "gzip" and column.fletcher32 and column.chunks == (min(len(column), 65536 if name == "signal" else 16384),)
                assert file.attrs["format"].decode() == "alambic teacher cache" and file.attrs["version"] == 1
                assert json.loads(file.attrs["header"].decode()) == header and file.attrs["shard"] == number and file.attrs["first_document"] == local
                first_piece, first_row, offsets, signal = (file[name][:] for name in ("first_piece", "first_row", "offsets", "signal"))
                assert [c.dtype.str for c in (first_piece, first_row, offsets)] == ["<u4", "<u4", "<u8"] and signal.dtype == "u1"
            assert len(signal) == offsets[-1] + 8 and not signal[-8:].any()
            for d in range(len(first_piece) - 1):
                group = local // 64 * len(lists) + number
                document, store = group * 64 + local % 64, 0
                while document >= header["stores"][store]["documents"]:
                    document -= header["stores"][store]["documents"]
                    store += 1
                found[store, document] = [unpack(header, signal[int(offsets[p]):int(offsets[p + 1])].tobytes(), int(first_row[p + 1] - first_row[p])) for p in range(first_piece[d], first_piece[d + 1])]
                local += 1
            rows_of_all += int(first_row[-1])
        assert totals == index["totals"]
    assert len(found) == sum(store["documents"] for store in first["stores"]), "every document once"
    return first, found, file_bytes / rows_of_all


def mix64(x):
    x = (x + 0x9e3779b97f4a7c15) & MASK
    x = ((x ^ (x >> 30)) * 0xbf58476d1ce4e5b9) & MASK
    x = ((x ^ (x >> 27)) * 0x94d049bb133111eb) & MASK
    return x ^ (x >> 31)


def derive_seed(seed, purpose, values):
    seed = mix64(seed)
    for letter in purpose.encode():
        seed = mix64(seed ^ letter)
    for value in values:
        seed = mix64(seed ^ mix64(value))
    return seed


class Softmaxes:
    """transformers' softmax after each token of a piece, in f64; each piece is asked for once."""

    def __init__(self, model):
        self.model, self.known = model, {}

    def __call__(self, ids, vocabulary, temperature):
        import torch
        key = tuple(ids)
        if key not in self.known:
            with torch.no_grad():
                self.known[key] = self.model(torch.tensor([ids])).logits[0].double().numpy()
        logits = self.known[key][:, :vocabulary] / temperature
        p = numpy.exp(logits - logits.max(-1, keepdims=True))
        return p / p.sum(-1, keepdims=True)


def compare(folder, stores, softmaxes):
    header, found, bytes_a_row = read_cache(folder)
    vocabulary, slots, exponent = header["vocabulary_size"], header["slots"], header["proposal_exponent"]
    mantissa = min(23, 27 - max(1, bits_of(vocabulary - 1)))
    difference, variance, rows, draws, other_draws = numpy.zeros(vocabulary), numpy.zeros(vocabulary), 0, 0, 0
    for (store, number), pieces in sorted(found.items()):
        document = stores[store][number]
        ids, mask, length = document["ids"], document["mask"], header["row_length"]
        assert len(ids) > 1
        firsts = [0] if not header["split_long"] else list(range(0, len(ids) - 1, length - 1))
        assert len(pieces) == len(firsts), f"pieces of document {number}"
        for first, piece in zip(firsts, pieces):
            own = ids[first:first + length]
            targets = [t for t in range(1, len(own)) if mask[first + t]]
            assert len(targets) == len(piece), f"rows of document {number}"
            if not targets:
                continue
            p_TV = softmaxes(own, vocabulary, header["temperature"])
            for t, (slot_ids, values, tail) in zip(targets, piece):
                p, rows = p_TV[t - 1], rows + 1
                if header["kind"] == "top_k":
                    best = numpy.sort(p)[::-1][:slots]
                    assert (numpy.abs(p[slot_ids] - best) <= 1e-4 * best).all(), "the likeliest ids"
                    assert (numpy.abs(values - p[slot_ids]) <= (2.0 ** -(mantissa + 1) + 1e-4) * p[slot_ids] + 2.0 ** -31).all(), "probabilities"
                    assert len(set(slot_ids.tolist())) == slots
                    assert abs(tail - (1 - best.sum())) <= 1e-4 * (1 - best.sum()) + 1e-7, "the tail"
                    continue
                q = p ** exponent
                q /= q.sum()
                w = numpy.zeros(vocabulary)
                w[slot_ids] = values
                difference += w - p
                variance += (p * p / q - p * p) / slots
                s = derive_seed(header["seed"], "teacher draws", [int(header["stores"][store]["sha256"][:16], 16), number, first + t])
                drawn = numpy.searchsorted(numpy.cumsum(q), [(mix64((s + j) & MASK) >> 11) * 2.0 ** -53 for j in range(slots)], side="right")
                again, counts = numpy.unique(drawn, return_counts=True)
                draws += slots
                if header["kind"] == "sampled":
                    expected = numpy.zeros(vocabulary)
                    expected[again] = counts / slots
                    other_draws += int(round(numpy.abs(expected - w).sum() / 2 * slots))
                    continue
                other_draws += len(set(again.tolist()) ^ set(slot_ids.tolist()))
                for v, count in zip(again, counts):  # one of the two neighbours of float(3): at most an eighth away
                    weight = count * p[v] / q[v] / slots
                    if w[v] > 0:
                        assert abs(w[v] - weight) <= weight / 8 * 1.001, f"weight {w[v]} of {weight}"
    assert rows > 2000, rows
    story = f"{header['kind']} of {slots}: {rows} rows, {bytes_a_row:.1f} bytes a row in files"
    if header["kind"] == "top_k":
        print(story)
        return
    # The order of sums differs, so a draw at the border of two ids may fall on the other side.
    assert other_draws <= 2e-3 * draws, f"{other_draws} of {draws} draws differ"
    seen = variance > 1e-3 * variance.max()
    z = difference[seen] / numpy.sqrt(variance[seen])
    assert numpy.abs(z).max() < 4.8, numpy.abs(z).max()
    assert abs((z * z).mean() - 1) < 5 * (2 / len(z)) ** 0.5, (z * z).mean()
    assert bytes_a_row <= 40
    print(f"{story}; {draws - other_draws} of {draws} draws made again; means: largest |z| {numpy.abs(z).max():.2f} of {len(z)}, mean z^2 {(z * z).mean():.3f}")


def live(alambic):
    import torch
    import transformers
    chats = [[{"role": "user", "content": f"soal {i} " + "kata " * (i % 7)}, {"role": "assistant", "content": f"jawaban {i}\n\n日本 " * (1 + i % 3) + "."}] for i in range(70)]
    texts = [f"Alinea {i} ini naïve 👋🏽.\nBaris dua.\n" * (1 + i % 4) for i in range(80)]
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        tokenizer = prepare_oracle.GOLDEN_MODEL
        for name, lines in [("chats", [{"messages": c} for c in chats]), ("texts", [{"text": t} for t in texts])]:
            (scratch / f"{name}.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            oracle.run(alambic, "prepare", "-m", tokenizer, "-i", scratch / f"{name}.jsonl", "-o", scratch / name, "--licence", "CC0-1.0", "--language", "id")
        index, first = token_store_oracle.read_store(scratch / "chats")
        stores = [first, token_store_oracle.read_store(scratch / "texts")[1]]
        # The head has columns of padding behind the tokenizer's ids.
        torch.manual_seed(5)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=index["vocabulary_size"] + 24, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128, initializer_range=0.35, bos_token_id=None, eos_token_id=None)).eval()
        model.save_pretrained(scratch / "model")
        shutil.copy(tokenizer / "tokenizer.json", scratch / "model")
        common = {"model": str(scratch / "model"), "stores": [{"store": str(scratch / "chats")}, {"store": str(scratch / "texts")}], "row_length": 48, "compute_type": "f32", "threads": 2,
                  "rows_per_file": 1500, "seed": 11}
        cases = {"top": {"kind": "top_k", "k": 20}, "top-hot": {"kind": "top_k", "k": 5, "temperature": 2.5, "split_long": True, "shard": "0/1"}, "sampled": {"split_long": True},
                 "sampled-parts": {"split_long": True, "shard": "i/2"}, "many": {"draws": 50, "temperature": 0.7}, "weighted": {"proposal_exponent": 0.8, "split_long": True}}
        configs = []
        for name, case in cases.items():
            for shard in (["0/2", "1/2"] if case.get("shard") == "i/2" else [case.get("shard", "0/1")]):
                configs.append({**common, **case, "shard": shard, "output": str(scratch / name)})
        oracle.run_test_program(alambic, "distill", "TeacherCacheOracle.*", json.dumps(configs))
        softmaxes = Softmaxes(model)
        for name in cases:
            compare(scratch / name, stores, softmaxes)
        whole, parts = read_cache(scratch / "sampled")[1], read_cache(scratch / "sampled-parts")[1]
        assert str(sorted(whole.items())) == str(sorted(parts.items())), "two shards hold the same draws"
        assert re.fullmatch(r"[0-9a-f]{64}", read_cache(scratch / "top")[0]["teacher"]["sha256"])


if __name__ == "__main__":
    oracle.main(None, live)
