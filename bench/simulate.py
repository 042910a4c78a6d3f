# SPDX-License-Identifier: Apache-2.0
"""The schedule of a step on paper: when each block's weights are gathered, computed with and freed, when its gradients are summed.

    simulate.py                    the tables of docs/scaling.md
    simulate.py --measured FILE    steps measured by `scripts/bench.sh ranks --save` beside what this schedule says of them

Standard library only. Seconds and bytes throughout; of a step, what one rank does, as all do the same. docs/scaling.md says where the
figures of GPUs and networks come from, and that none of what is said of them was measured.
"""
import argparse
import dataclasses
import json
import statistics
import sys


# --- The schedule -------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Block:
    """What is gathered at once and freed at once."""
    forward: float           # seconds of compute
    backward: float | None = None  # with what is computed again; None: no gradient goes through it
    gather: float = 0        # before each use
    scatter: float = 0       # of its gradients, after each backward
    reduce: float = 0        # of its gradients, after the last backward of a step


@dataclasses.dataclass(frozen=True)
class Step:
    seconds: float
    compute: float           # of which computing
    network: float           # that the network was busy

    @property
    def exposed(self):
        return self.seconds - self.compute

    @property
    def hidden(self):
        """Share of the network's time during which something was computed."""
        return 1 - self.exposed / self.network if self.network > 0 else 1.0


def uses_of(blocks, micro_batches):
    """(block, is backward, is of the last micro-batch) in the order in which a step computes."""
    for number in range(micro_batches):
        last = number == micro_batches - 1
        for block in blocks:
            yield block, False, last
        for block in reversed(blocks):
            if block.backward is not None:
                yield block, True, last


def replay(blocks, micro_batches=1, ahead=1, overlapped_sums=True, after=0.0, first=()):
    """The step. One thing is computed at a time and one transfer moves at a time, each in the order of their issue.

    ahead: blocks that may be gathered while another computes; each takes the memory of a whole block. 0: a block is gathered when the one before is done.
    overlapped_sums: `reduce` begins behind its block's backward; else when all of the step is computed.
    after: seconds behind the sums: norm and optimiser. first: blocks that are used once before, without a gradient: a live teacher's.
    """
    uses = [(block, False, False) for _ in range(micro_batches) for block in first] + list(uses_of(blocks, micro_batches))
    network_free, network_busy, clock, ends, arrived = 0.0, 0.0, 0.0, [], {}

    def move(ready, seconds):
        nonlocal network_free, network_busy
        if seconds > 0:
            network_free = max(network_free, ready) + seconds
            network_busy += seconds
        return network_free

    def gather(index):
        # The last block of the forward pass is the first of the backward, and stays.
        if index < len(uses) and uses[index][0].gather > 0 and not (index > 0 and uses[index - 1][0] is uses[index][0]):
            freed = index - 1 - ahead  # the use whose end frees the memory
            arrived[index] = move(ends[freed] if freed >= 0 else 0.0, uses[index][0].gather)

    for index in range(ahead + 1):
        gather(index)
    for index, (block, is_backward, last) in enumerate(uses):
        clock = max(clock, arrived.get(index, 0.0)) + (block.backward if is_backward else block.forward)
        ends.append(clock)
        gather(index + 1 + ahead)  # before this block's gradients, as it is needed sooner
        if is_backward:
            move(clock, block.scatter)
            move(clock, block.reduce if last and overlapped_sums else 0.0)
    compute = sum(block.backward if is_backward else block.forward for block, is_backward, _ in uses)
    if not overlapped_sums:
        move(clock, sum(block.reduce for block in blocks))
    return Step(max(clock, network_free) + after, compute + after, network_busy)


# --- Networks -----------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs; bandwidths are bytes a second of one GPU in one direction, latencies are seconds."""
    flops: float = 989.4e12 * 0.40   # H100 SXM, dense bf16, and the share of it that training reaches
    memory: float = 80e9
    nvlink: float = 18 * 20.6e9
    network: float = 40e9            # of 50: one 400 Gb/s adapter a GPU
    per_node: int = 8
    start: float = 8.4e-6
    nvlink_hop: float = 3.4e-6
    network_hop: float = 9.6e-6

    def hops(self, ranks):
        nodes = -(-ranks // self.per_node)
        return (ranks - nodes) * self.nvlink_hop + (nodes - 1) * self.network_hop

    def ring(self, num_bytes, ranks):
        """All-gather or reduce-scatter of so many bytes in all, by rings through every adapter of a node."""
        if ranks == 1 or num_bytes == 0:
            return 0.0
        slowest = self.nvlink if ranks <= self.per_node else min(self.nvlink, self.per_node * self.network)
        return self.start + self.hops(ranks) + received(num_bytes, ranks) / slowest

    def all_to_all(self, num_bytes, ranks):
        """Each rank sends each other its share of so many bytes; what leaves the node goes through the rank's own adapter."""
        if ranks == 1 or num_bytes == 0:
            return 0.0
        inside = min(ranks, self.per_node)
        outside = num_bytes * (ranks - inside) / ranks / self.network
        return self.start + self.nvlink_hop + (self.network_hop if ranks > inside else 0) + max(num_bytes * (inside - 1) / ranks / self.nvlink, outside)

    def exact_sum(self, num_bytes, ranks):
        """alambic's sum: all to all, added in the order of the tree, then gathered. The adding itself is not counted."""
        return self.all_to_all(num_bytes, ranks) + self.ring(num_bytes, ranks)


def received(num_bytes, ranks):
    return num_bytes * (ranks - 1) / ranks


# --- Models -------------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Model:
    """Weights by block, as config.json of the named model gives them."""
    name: str
    hidden: int
    vocabulary: int
    heads: int
    query: int              # width of all heads' queries, and of their values
    value: int
    blocks: tuple           # (how many, weights of attention, weights of the MLP, of which used by a token, linear layers as (inputs, outputs) that get an adapter)

    def weights(self):
        return sum(count * (attention + mlp) for count, attention, mlp, _, _ in self.blocks) + 2 * self.vocabulary * self.hidden

    def used(self):
        """By one token; the embedding's row is not counted."""
        return sum(count * (attention + active) for count, attention, _, active, _ in self.blocks) + self.vocabulary * self.hidden

    def adapters(self, rank):
        return sum(count * rank * sum(map(sum, linears)) for count, _, _, _, linears in self.blocks)


def dense(name, hidden, inner, heads, kv_heads, head, layers, vocabulary):
    query, key = heads * head, kv_heads * head
    linears = ((hidden, query), (hidden, key), (hidden, key), (query, hidden), (hidden, inner), (hidden, inner), (inner, hidden))
    attention, mlp = 2 * hidden * query + 2 * hidden * key, 3 * hidden * inner
    return Model(name, hidden, vocabulary, heads, query, query, ((layers, attention, mlp, mlp, linears),))


def deepseek_v3():
    D, heads, nope, rope, value, q_rank, kv_rank, F, expert, experts, chosen = 7168, 128, 128, 64, 128, 1536, 512, 18432, 2048, 256, 8
    projections = ((D, q_rank), (q_rank, heads * (nope + rope)), (D, kv_rank + rope), (kv_rank, heads * (nope + value)), (heads * value, D))
    attention = sum(i * o for i, o in projections)
    three = ((D, F), (D, F), (F, D))
    shared = ((D, expert), (D, expert), (expert, D))  # adapters sit on attention and the shared expert: on every expert they would be 6.7e9 weights
    one, router = 3 * D * expert, D * experts
    return Model("671B MoE", D, 129280, heads, heads * (nope + rope), heads * value,
                 ((3, attention, 3 * D * F, 3 * D * F, projections + three), (58, attention, (experts + 1) * one + router, (chosen + 1) * one + router, projections + shared)))


MODELS = [dense("8B", 4096, 14336, 32, 8, 128, 32, 128256), dense("70B", 8192, 28672, 64, 8, 128, 80, 128256), deepseek_v3()]
METHODS = ["LoRA", "QLoRA", "full", "distillation"]
TOKENS = 8192           # of a micro-batch of one rank, one row of one document; a step has one micro-batch
ADAPTER_RANK = 16
BF16, F32, NF4 = 2, 4, 4.127 / 8  # bytes a weight
LIBRARIES = 2e9         # CUDA context, NCCL's buffers, workspaces: assumed


def seconds_of(cluster, model, attention, active, length, passes, attention_passes):
    """Of one block and a micro-batch; below the diagonal attention's two products are 2 x length x (width of q + of v) / 2 a token."""
    return length * (2 * passes * active + 2 * passes * attention + attention_passes * length * (model.query + model.value)) / cluster.flops


@dataclasses.dataclass(frozen=True)
class Case:
    """A rank of a run: its schedule and what it holds."""
    step: Step
    memory: float           # bytes
    received: float         # bytes that a rank gets in a step
    tokens: int


def blocks_of(cluster, model, method, ranks, shard, tokens, trains=True):
    """(blocks of the schedule, bytes that a rank receives in a step). shard: ranks that share the weights; the others hold the same shares."""
    bytes_a_weight = NF4 if method == "QLoRA" else BF16
    full = method == "full"
    replicas = ranks // shard
    blocks, moved = [], 0.0

    def add(weights, forward, backward, adapter_weights, gathers, is_trained):
        nonlocal moved
        whole = weights * bytes_a_weight
        scatter = cluster.all_to_all(weights * F32, shard) if full and is_trained else 0.0
        if full and is_trained:
            share = weights / shard * F32
            # Replicas lie in other nodes: a rank of each node holds this share.
            across = dataclasses.replace(cluster, per_node=1)
            reduce, summed = across.exact_sum(share, replicas), 2 * received(share, replicas) + received(weights * F32, shard)
        else:
            reduce, summed = cluster.exact_sum(adapter_weights * F32, ranks), 2 * received(adapter_weights * F32, ranks)
        blocks.append(Block(forward, backward, cluster.ring(whole, shard), scatter if trains else 0.0, reduce if trains else 0.0))
        moved += gathers * received(whole, shard) + (summed if trains else 0.0)

    table = model.vocabulary * model.hidden
    add(table if bytes_a_weight == BF16 else table * BF16 / NF4, 0.0, 0.0 if full and trains else None, 0, 1 if not (full and trains) else 2, full)
    for count, attention, mlp, active, linears in model.blocks:
        forward = seconds_of(cluster, model, attention, active, tokens, 1, 1)
        # Backward: the block is computed again, then the gradient of its input, and of its weights where they train; attention takes 2.5 times its forward.
        backward = seconds_of(cluster, model, attention, active, tokens, 3 if full else 2, 1 + 2.5) if trains else None
        adapters = ADAPTER_RANK * sum(map(sum, linears)) if not full else 0
        for _ in range(count):
            add(attention + mlp, forward, backward, adapters, 2 if trains else 1, True)
    head_seconds = tokens * 2 * table / cluster.flops
    add(table if bytes_a_weight == BF16 else table * BF16 / NF4, head_seconds, (2 if full else 1) * head_seconds if trains else None, 0, 1, full)
    return blocks, moved


def memory_of(model, method, shard, tokens, trains=True):
    """Bytes of a rank: see docs/scaling.md."""
    bytes_a_weight = NF4 if method == "QLoRA" else BF16
    largest = max(attention + mlp for _, attention, mlp, _, _ in model.blocks)
    table = model.vocabulary * model.hidden
    layers = sum(count for count, *_ in model.blocks)
    body = model.weights() - 2 * table
    at_once = max(2 * largest * bytes_a_weight, largest * bytes_a_weight + table * BF16)  # one block in use, the next in flight
    if not trains:
        return (body * bytes_a_weight + 2 * table * BF16) / shard + at_once
    if method == "full":
        kept = 16 * model.weights() / shard + 2 * largest * F32  # masters, gradients, two moments; a block's gradients, and those before on their way
    else:
        kept = (body * bytes_a_weight + 2 * table * BF16) / shard + 16 * model.adapters(ADAPTER_RANK)
        if method == "QLoRA":
            kept += 2 * max(i * o for *_, linears in model.blocks for i, o in linears) * BF16  # gate and up made dense at once
    D, q = model.hidden, model.query
    active = max(active // model.hidden for _, _, _, active, _ in model.blocks)  # 3 x the inner width
    work = 14 * D + max(BF16 * (2 * D + active), F32 * 8 * q + BF16 * (4 * q + D))
    activations = tokens * (F32 * D * layers + work + 3 * D * BF16) + 512 * model.vocabulary * F32
    return kept + at_once + activations + LIBRARIES


STUDENT = MODELS[0]


def case(cluster, model, method, ranks, shard=None, tokens=TOKENS):
    """shard: None for all ranks. Distillation: a full fine-tune of the 8B student, taught by `model`, frozen and live."""
    shard = ranks if shard is None else shard
    if method != "distillation":
        blocks, moved = blocks_of(cluster, model, method, ranks, shard, tokens)
        return Case(replay(blocks), memory_of(model, method, shard, tokens), moved, tokens * ranks)
    teacher, taught = blocks_of(cluster, model, "LoRA", ranks, shard, tokens, trains=False)
    blocks, moved = blocks_of(cluster, STUDENT, "full", ranks, shard, tokens)
    return Case(replay(blocks, first=teacher), memory_of(STUDENT, "full", shard, tokens) + memory_of(model, "LoRA", shard, tokens, trains=False), taught + moved, tokens * ranks)


def rows_of(cluster, sizes, shard_of):
    for model in MODELS:
        for method in METHODS:
            for ranks in sizes:
                found = case(cluster, model, method, ranks, shard_of(ranks))
                step = found.step
                yield [model.name, method, f"{ranks:,}", f"{found.memory / 1e9:,.1f}" + ("" if found.memory <= cluster.memory else " (too much)"), f"{found.received / 1e9:,.1f}",
                       f"{step.compute:.2f}", f"{step.network:.2f}", f"{step.exposed:.2f}", f"{100 * step.hidden:.0f} %", f"{TOKENS / step.seconds:,.0f}"]


HEADINGS = ["model", "method", "GPUs", "GB a rank", "GB received", "compute s", "network s", "exposed s", "hidden", "tokens/s a GPU"]


def table(headings, rows):
    return "\n".join(["| " + " | ".join(headings) + " |", "| " + " | ".join("---" for _ in headings) + " |"] + ["| " + " | ".join(row) + " |" for row in rows])


def model_rows():
    for model in MODELS:
        yield [model.name, f"{model.weights() / 1e9:.1f}", f"{model.used() / 1e9:.1f}", f"{model.adapters(ADAPTER_RANK) / 1e6:.0f}", str(sum(count for count, *_ in model.blocks)),
               f"{max(attention + mlp for _, attention, mlp, _, _ in model.blocks) * BF16 / 1e9:.2f}"]


def transfer_rows(cluster):
    for ranks in (8, 64, 256, 1024):
        yield [f"{ranks:,}"] + [f"{1e3 * seconds:.2f}" for size in (0.436e9, 1.711e9) for seconds in
                                (cluster.ring(size, ranks), cluster.all_to_all(size, ranks), cluster.exact_sum(size, ranks))] + [f"{1e3 * (cluster.start + cluster.hops(ranks)):.2f}"]


def length_rows(cluster):
    for method in ("LoRA", "QLoRA", "full"):
        yield [method] + [f"{100 * step.exposed / step.seconds:.0f} %" for tokens in (256, 512, 1024, 2048, 4096, 8192) for step in [case(cluster, MODELS[1], method, 64, tokens=tokens).step]]


def print_tables(out):
    cluster = Cluster()
    print("<!-- models -->", table(["model", "weights, 10^9", "used by a token, 10^9", "adapters, 10^6", "blocks", "largest block, GB in bf16"], model_rows()), sep="\n", file=out)
    print("<!-- transfers -->", table(["GPUs", "ring 0.436 GB, ms", "all-to-all", "exact sum", "ring 1.711 GB, ms", "all-to-all", "exact sum", "of a ring, latency"], transfer_rows(cluster)), sep="\n", file=out)
    print("<!-- lengths -->", table(["tokens a rank"] + [f"{tokens:,}" for tokens in (256, 512, 1024, 2048, 4096, 8192)], length_rows(cluster)), sep="\n", file=out)
    print("<!-- over all ranks -->", table(HEADINGS, rows_of(cluster, (8, 64, 256, 1024), lambda ranks: ranks)), sep="\n", file=out)
    print("<!-- inside a node -->", table(HEADINGS, rows_of(cluster, (64, 1024), lambda ranks: 8)), sep="\n", file=out)


# --- What was measured --------------------------------------------------------------------------------------------------------

def line_through(points):
    """(seconds at 0 bytes, seconds a byte) of the least and the most of (bytes, seconds)."""
    (less, short), (more, long) = min(points), max(points)
    slope = (long - short) / (more - less)
    return max(0.0, short - slope * less), slope


def simulated_seconds(run, layers=30):
    """A data-parallel step over Gloo where all cores compute: each rank its micro-batches, the sum of gradients, then the optimiser. The sum begins in the
    backward pass, but Gloo moves and ranks add on the cores that compute, so that it takes its time from them: nothing is hidden.

    run: "ranks", "batches" of all ranks, "gradient_bytes"; "micro_batch_seconds" and "optimizer_seconds" of a rank that shares the machine with
    as many others but says nothing to them; "sums": [[bytes, seconds], ...] of the same number of ranks.
    """
    start, a_byte = line_through([tuple(point) for point in run["sums"]]) if run["ranks"] > 1 else (0.0, 0.0)
    one = run["micro_batch_seconds"]
    reduce = (start + a_byte * run["gradient_bytes"]) / layers if run["ranks"] > 1 else 0.0
    blocks = [Block(one / 3 / layers, 2 * one / 3 / layers, reduce=reduce) for _ in range(layers)]
    return replay(blocks, run["batches"] // run["ranks"], overlapped_sums=False, after=run["optimizer_seconds"]).seconds


def measured_rows(lines):
    for line in lines:
        run = line["more"].get("run")
        if run is None:
            continue
        said = simulated_seconds(run)
        yield [line["case"], str(run["ranks"]), f"{run['micro_batch_seconds']:.2f}", f"{run['gradient_bytes'] / 1e6:.1f}", f"{said:.2f}", f"{run['seconds']:.2f}", f"{said / run['seconds']:.2f}"]


def main():
    parser = argparse.ArgumentParser(description="A step's schedule on paper; without options the tables of docs/scaling.md.")
    parser.add_argument("--measured", metavar="FILE", help="what scripts/bench.sh ranks --save wrote")
    options = parser.parse_args()
    if options.measured:
        with open(options.measured, encoding="utf-8") as lines:
            print(table(["case", "ranks", "s a micro-batch", "MB of gradients", "simulated s", "measured s", "ratio"], measured_rows(map(json.loads, lines))))
    else:
        print_tables(sys.stdout)


if __name__ == "__main__":
    main()
