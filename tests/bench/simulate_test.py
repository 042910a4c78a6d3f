# SPDX-License-Identifier: Apache-2.0
"""The simulated schedule against what can be said of it on paper, docs/scaling.md against what it prints, and the measured steps against what
it says of them. Python's standard library only.

usage: simulate_test.py ROOT
"""
import dataclasses
import io
import json
import pathlib
import random
import sys
import unittest

ROOT = pathlib.Path(sys.argv.pop(1)).resolve()
sys.path.insert(0, str(ROOT / "bench"))
import simulate  # noqa: E402
from simulate import Block, Cluster, replay  # noqa: E402


class Schedule(unittest.TestCase):
    def blocks(self, count, **seconds):
        return [Block(**seconds) for _ in range(count)]

    def same(self, a, b):
        self.assertAlmostEqual(a, b, delta=1e-9 * max(abs(a), abs(b), 1))

    def test_a_network_that_takes_no_time_leaves_the_compute(self):
        step = replay(self.blocks(7, forward=1, backward=2), micro_batches=3, after=0.5)
        self.same(step.seconds, 3 * 7 * 3 + 0.5)
        self.same(step.exposed, 0)
        self.assertEqual(step.hidden, 1)

    def test_without_overlap_everything_adds_up(self):
        step = replay(self.blocks(5, forward=1, backward=2, gather=0.25, reduce=0.5), micro_batches=2, ahead=0, overlapped_sums=False)
        # A block stays where it is used twice in a row: at the top, and at the bottom between two micro-batches.
        self.same(step.network, (5 + 4 + 4 + 4) * 0.25 + 5 * 0.5)
        self.same(step.seconds, 2 * 5 * 3 + step.network)
        self.same(step.hidden, 0)

    def test_a_gather_in_flight_costs_the_longer_of_the_two(self):
        for gather in (0.3, 1.0, 2.5):
            step = replay(self.blocks(6, forward=1, gather=gather))
            self.same(step.seconds, gather + 5 * max(1, gather) + 1)

    def test_no_more_blocks_are_held_than_said(self):
        # A slow block holds the memory that the one after the next is waiting for.
        blocks = [Block(forward=1, gather=1), Block(forward=10, gather=1), Block(forward=1, gather=1), Block(forward=1, gather=1)]
        self.same(replay(blocks, ahead=1).seconds, 1 + 1 + 10 + 1 + 1)
        blocks[3] = Block(forward=1, gather=20)  # begins when the slow one has ended, at 12
        self.same(replay(blocks, ahead=1).seconds, 12 + 20 + 1)
        self.same(replay(blocks, ahead=2).seconds, 3 + 20 + 1)  # begins as soon as the network is free, when the first has ended

    def test_sums_behind_their_blocks_expose_the_last_one(self):
        self.same(replay(self.blocks(4, forward=1, backward=2, reduce=0.5)).exposed, 0.5)
        self.same(replay(self.blocks(4, forward=1, backward=2, reduce=3)).seconds, 4 + 2 + 4 * 3)
        self.same(replay(self.blocks(4, forward=1, backward=2, reduce=0.5), micro_batches=5).network, 4 * 0.5)  # once a step
        self.same(replay(self.blocks(4, forward=1, backward=2, scatter=0.5), micro_batches=5).network, 5 * 4 * 0.5)  # each time

    def test_a_frozen_block_at_the_bottom_has_no_backward(self):
        step = replay([Block(forward=1, gather=0.5), Block(forward=1, backward=2, gather=0.5)], ahead=0)
        self.same(step.compute, 1 + 1 + 2)
        self.same(step.network, 2 * 0.5)

    def test_a_teacher_is_used_once_a_micro_batch(self):
        step = replay(self.blocks(3, forward=1, backward=2), micro_batches=2, first=self.blocks(4, forward=5))
        self.same(step.compute, 2 * (3 * 3 + 4 * 5))

    def test_between_the_longer_of_the_two_and_their_sum(self):
        draw = random.Random(1)
        for _ in range(300):
            blocks = [Block(draw.random(), draw.random(), draw.random(), draw.choice([0, draw.random()]), draw.random()) for _ in range(draw.randint(1, 9))]
            step = replay(blocks, draw.randint(1, 3), draw.randint(0, 3), draw.random() < 0.5)
            self.assertGreaterEqual(step.seconds, max(step.compute, step.network) - 1e-9)
            self.assertLessEqual(step.seconds, step.compute + step.network + 1e-9)


class Networks(unittest.TestCase):
    def test_one_rank_says_nothing(self):
        for call in (Cluster().ring, Cluster().all_to_all, Cluster().exact_sum):
            self.assertEqual(call(1e9, 1), 0)

    def test_bandwidth_alone(self):
        fast = Cluster(nvlink=100.0, network=5.0, start=0, nvlink_hop=0, network_hop=0)
        self.assertAlmostEqual(fast.ring(800, 8), 7.0)                  # 700 bytes at 100 a second
        self.assertAlmostEqual(fast.ring(800, 16), 750 / (8 * 5))       # all adapters of a node carry the ring
        self.assertAlmostEqual(fast.all_to_all(800, 8), 7.0)
        self.assertAlmostEqual(fast.all_to_all(800, 16), 400 / 5)       # what leaves the node goes through one's own adapter
        self.assertAlmostEqual(fast.exact_sum(800, 16), 80 + 18.75)

    def test_latency_alone(self):
        endless = Cluster(nvlink=float("inf"), network=float("inf"), start=1, nvlink_hop=2, network_hop=5)
        self.assertAlmostEqual(endless.ring(1, 8), 1 + 7 * 2)
        self.assertAlmostEqual(endless.ring(1, 1024), 1 + (1024 - 128) * 2 + 127 * 5)


class Models(unittest.TestCase):
    def test_sizes_are_those_that_were_published(self):
        for model, weights, used in zip(simulate.MODELS, (8.03e9, 70.55e9, 671.0e9), (7.5e9, 69.5e9, 36.6e9), strict=True):
            self.assertLess(abs(model.weights() / weights - 1), 2e-3, model.name)
            self.assertLess(abs(model.used() / used - 1), 2e-3, model.name)

    def test_shares_shrink_with_the_ranks(self):
        model = simulate.MODELS[1]
        lora = [simulate.memory_of(model, "LoRA", ranks, 1024) for ranks in (8, 16)]
        self.assertAlmostEqual((lora[0] - lora[1]) / (model.weights() * 2 / 16), 1)
        full = [simulate.memory_of(model, "full", ranks, 1024) for ranks in (8, 16)]
        self.assertAlmostEqual((full[0] - full[1]) / (model.weights() * 16 / 16), 1)

    def test_a_dense_block_is_two_operations_a_weight(self):
        model = dataclasses.replace(simulate.MODELS[0], query=0, value=0)  # without attention's own products
        blocks, _ = simulate.blocks_of(Cluster(), model, "full", 8, 8, 1000)
        step = replay(blocks)
        body, head = 32 * (41_943_040 + 176_160_768), 128256 * 4096
        self.assertAlmostEqual(step.compute * Cluster().flops / 1000 / (8 * body + 6 * head), 1)  # 6, and 2 for what is computed again

    def test_bytes_of_a_step(self):
        model = simulate.MODELS[0]
        table, body = 128256 * 4096, 32 * (41_943_040 + 176_160_768)
        _, moved = simulate.blocks_of(Cluster(), model, "LoRA", 8, 8, 1000)
        # The body twice, embedding and head once; adapters to and fro.
        self.assertAlmostEqual(moved / (7 / 8 * (2 * (2 * body + 2 * table) + 2 * 4 * model.adapters(16))), 1)


class Document(unittest.TestCase):
    def test_it_holds_the_tables_that_the_command_prints(self):
        printed = io.StringIO()
        simulate.print_tables(printed)
        text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
        for part in printed.getvalue().split("<!-- ")[1:]:
            name, rows = part.split(" -->\n")
            self.assertIn(rows.strip(), text, f"docs/scaling.md: the table '{name}' is not what bench/simulate.py prints")


class Measured(unittest.TestCase):
    def test_the_schedule_reproduces_measured_steps_within_a_fifth(self):
        files = sorted((ROOT / "bench" / "results").glob("*-ranks.json"))
        if not files:
            self.skipTest("no saved results: scripts/bench.sh ranks --save makes them")
        compared = set()
        for file in files:
            for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
                run = line["more"].get("run")
                if run:
                    compared.add(run["ranks"])
                    share = simulate.simulated_seconds(run) / run["seconds"]
                    self.assertTrue(0.8 <= share <= 1.2, f"{file.name}: {line['case']}: simulated {share:.3f} of what was measured")
        self.assertTrue({1, 2} <= compared, compared)


if __name__ == "__main__":
    unittest.main()
