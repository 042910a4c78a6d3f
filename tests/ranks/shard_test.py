# SPDX-License-Identifier: Apache-2.0
"""Ranks that share the frozen base, or gradients and moments (ranks.shard): the same bytes as ranks that each hold the whole, and as one rank. Python's standard
library only.

usage: shard_test.py ALAMBIC
"""
import os
import signal
import subprocess
import sys
import unittest

from scene import Scene, children, environment, kill_ranks, rank_of, wait_until, write_tiny_model

ALAMBIC = os.path.abspath(sys.argv.pop(1))


def setting(**values):
    return tuple(word for name, value in values.items() for word in ("--set", f"{name.replace('__', '.')}={value}"))


SHARD = setting(ranks__shard="true")
GROUPS = setting(ranks__shard_group="2")
KINDS = {
    "fused": (),
    "bf16": setting(compute_type="bf16"),
    "recomputed": setting(memory="block"),
    "mlp": setting(memory="mlp"),
    "nf4": setting(quantize_base="nf4"),
    "nf4single": setting(quantize_base="nf4", nf4_double_quant="false"),
    "int8": setting(quantize_base="int8", compute_type="bf16"),
    "dora": setting(lora__dora="true"),  # the blocks that are no autograd node of their own
    "doranf4": setting(lora__dora="true", quantize_base="nf4"),
    "upper": setting(lora__targets="[model.layers.3.mlp.down_proj, model.layers.4.self_attn.q_proj]"),
    "samples": setting(samples__prompts='["alpha beta"]', samples__max_new_tokens="5", samples__every="8"),
}


class Shard(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.scene = Scene(ALAMBIC, layers=5)

    @classmethod
    def tearDownClass(cls):
        cls.scene.close()

    def test_every_kind_of_base_gives_the_bytes_of_one_rank(self):
        for kind, settings in KINDS.items():
            with self.subTest(kind):
                self.scene.train(kind, *settings)
                for ranks in (1, 2, 4) if kind == "fused" else (2, 4):
                    run = f"{kind}-of{ranks}"
                    self.scene.train(run, *settings, *SHARD, ranks=ranks)
                    self.assertEqual(self.scene.fingerprint(run), self.scene.fingerprint(kind), run)

    def test_ranks_that_share_rows_share_the_base_and_moments_too(self):
        rows = setting(data__row_length="256", ranks__context="2", limits__max_steps="8")
        full = setting(method="full", schedule__learning_rate="1e-3")
        for kind, ranks, both, shared in (("base", 2, (), ()), ("groups", 4, (), GROUPS), ("again", 2, setting(memory="block"), ()), ("moments", 2, full, ())):
            with self.subTest(kind):
                self.scene.train(f"rows-{kind}", *rows, *both, ranks=ranks)
                self.scene.train(f"rows-{kind}-shared", *rows, *both, *SHARD, *shared, ranks=ranks)
                for name in ("metrics.jsonl", "checkpoint-8/state.safetensors"):
                    self.assertEqual(*[(self.scene.root / run / name).read_bytes() for run in (f"rows-{kind}", f"rows-{kind}-shared")], name)

    def test_a_full_fine_tune_shares_its_gradients_of_any_number_of_micro_batches(self):
        names = ("metrics.jsonl", "checkpoint-8/state.safetensors", "weights/model.safetensors")
        full = setting(method="full", schedule__learning_rate="1e-3", limits__max_steps="8")
        for kind in ("adamw", "adamw8bit"):
            for deterministic in ("true", "false"):
                for batches, ranks in ((2, 2), (12, 2), (12, 4)):
                    with self.subTest(kind, deterministic=deterministic, batches=batches, ranks=ranks):
                        run = f"gradients-{kind}-{deterministic}-{batches}-{ranks}"
                        words = full + setting(optimizer__kind=kind, deterministic=deterministic, data__batches_per_step=batches)
                        # The tree has the bits of one rank; otherwise as many ranks have them.
                        self.scene.train(run, *words, ranks=1 if deterministic == "true" else ranks)
                        self.scene.train(f"{run}-shared", *words, *SHARD, ranks=ranks)
                        for name in names:
                            self.assertEqual(*[(self.scene.root / each / name).read_bytes() for each in (run, f"{run}-shared")], name)

    def test_a_full_fine_tune_shares_its_moments(self):
        names = ("metrics.jsonl", "checkpoint-8/state.safetensors", "weights/model.safetensors")
        for kind in ("adamw", "adamw8bit"):
            full = setting(method="full", optimizer__kind=kind, schedule__learning_rate="1e-3", limits__max_steps="8")
            self.scene.train(f"full-{kind}", *full)
            for ranks, shared in ((1, SHARD), (2, SHARD), (4, SHARD), (4, SHARD + GROUPS)):
                run = f"full-{kind}-of{ranks}" + ("-in-groups" if shared != SHARD else "")
                self.scene.train(run, *full, *shared, ranks=ranks)
                for name in names:
                    self.assertEqual(*[(self.scene.root / folder / name).read_bytes() for folder in (f"full-{kind}", run)], f"{run}: {name}")
            # Gone on with by other ranks that share or do not.
            for ranks, more in ((2, SHARD), (4, SHARD + GROUPS), (2, ()), (1, ()), (4, SHARD)):
                resume = ["--resume"] if self.scene.steps_done(f"parts-{kind}") else []
                process = self.scene.start(f"parts-{kind}", *full, *more, *resume, ranks=ranks)
                before = self.scene.steps_done(f"parts-{kind}")
                wait_until(lambda: self.scene.steps_done(f"parts-{kind}") > before or process.poll() is not None)
                process.send_signal(signal.SIGTERM)
                _, err = process.communicate(timeout=60)
                self.assertIn(process.returncode, (0, 75), err)
            self.scene.train(f"parts-{kind}", *full, *SHARD, "--resume", ranks=2)
            for name in names:
                self.assertEqual(*[(self.scene.root / folder / name).read_bytes() for folder in (f"full-{kind}", f"parts-{kind}")], f"{kind}: {name}")

    def test_without_deterministic_it_gives_the_bytes_of_as_many_ranks(self):
        for ranks in (2, 4):
            plain = setting(deterministic="false")
            self.scene.train(f"plain{ranks}", *plain, ranks=ranks)
            self.scene.train(f"plain-shared{ranks}", *plain, *SHARD, ranks=ranks)
            self.assertEqual(self.scene.fingerprint(f"plain-shared{ranks}"), self.scene.fingerprint(f"plain{ranks}"))

    def test_groups_of_ranks_share_a_model_each(self):
        for kind in ("fused", "nf4"):
            run = f"groups-{kind}"
            self.scene.train(run + "1", *KINDS[kind])
            self.scene.train(run, *KINDS[kind], *SHARD, *GROUPS, ranks=4)
            self.assertEqual(self.scene.fingerprint(run), self.scene.fingerprint(run + "1"), kind)
        done = self.scene.train("groups-uneven", *SHARD, *setting(ranks__shard_group="3"), ranks=4, check=2)
        self.assertIn("ranks.shard_group: 4 ranks are no whole number of groups of 3", done.stderr)
        done = self.scene.train("groups-alone", *GROUPS, check=2)
        self.assertIn("ranks.shard_group: is read only with ranks.shard", done.stderr)

    def test_three_ranks_share_unevenly(self):
        uneven = setting(deterministic="false", data__batches_per_step="6", limits__max_steps="20")
        self.scene.train("three", *uneven, ranks=3)
        self.scene.train("three-shared", *uneven, *SHARD, ranks=3)
        self.assertEqual(self.scene.fingerprint("three-shared"), self.scene.fingerprint("three"))

    def test_a_loss_that_is_not_finite_is_seen_by_all(self):
        burst = setting(schedule__shape="constant", schedule__learning_rate="1", lora__alpha="1e30", optimizer__max_grad_norm="0", evaluation__stores="[]")
        self.scene.train("burst", *burst, check=6)
        self.scene.train("burst-shared", *burst, *SHARD, ranks=2, check=6)
        self.assertEqual(*[(self.scene.root / run / "metrics.jsonl").read_bytes() for run in ("burst", "burst-shared")])

    def test_stopped_and_gone_on_with_by_other_ranks_that_share_or_do_not(self):
        self.scene.train("whole")
        for ranks, more in ((2, SHARD), (4, SHARD), (2, ())):
            process = self.scene.start("stopped", *more, *(["--resume"] if self.scene.steps_done("stopped") else []), ranks=ranks)
            before = self.scene.steps_done("stopped")
            wait_until(lambda before=before, process=process: self.scene.steps_done("stopped") > before + 2 or process.poll() is not None)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
            self.assertEqual(process.returncode, 75, err)
            self.assertEqual(err.count("stopped on request"), ranks, err)
        self.scene.train("stopped", *SHARD, "--resume", ranks=2)
        self.assertEqual(self.scene.fingerprint("stopped"), self.scene.fingerprint("whole"))

    def test_killed_ranks_are_started_again_and_come_to_the_same_bytes(self):
        for method, result in (("lora", "adapter/adapter_model.safetensors"), ("full", "weights/model.safetensors")):
            scene = Scene(ALAMBIC, steps=200, layers=5, settings=SHARD + setting(method=method, schedule__learning_rate="1e-3"))
            try:
                scene.train("whole")
                self.assertEqual(kill_ranks(scene, "killed", 2), 2)
                for name in ("metrics.jsonl", "checkpoint-200/state.safetensors", result):
                    self.assertEqual(*[(scene.root / run / name).read_bytes() for run in ("whole", "killed")], f"{method}: {name}")
            finally:
                scene.close()

    def test_a_stopped_rank_is_named(self):
        process = self.scene.start("hangs", *SHARD, *setting(ranks__timeout="3", limits__max_steps="100000", checkpoint__every="100000"))
        wait_until(lambda: self.scene.steps_done("hangs") >= 2)
        pids = {rank_of(pid): pid for pid in children(process.pid)}
        os.kill(pids[1], signal.SIGSTOP)
        _, err = process.communicate(timeout=30)
        self.assertEqual(process.returncode, 7, err)
        self.assertRegex(err, r"rank 1 hangs in step \d+, [a-z]")

    def test_a_killed_rank_is_named(self):
        process = self.scene.start("dies", *SHARD, *setting(limits__max_steps="100000", checkpoint__every="100000"))
        wait_until(lambda: self.scene.steps_done("dies") >= 2)
        pids = {rank_of(pid): pid for pid in children(process.pid)}
        os.kill(pids[1], signal.SIGKILL)
        _, err = process.communicate(timeout=30)
        self.assertEqual(process.returncode, 7, err)
        self.assertRegex(err, r"rank 1 died in step \d+, [a-z]")

    def test_what_cannot_be_shared_is_refused(self):
        for settings, words in ((setting(method="full", optimizer__kind="adafactor"), "optimizer.kind: adafactor looks at whole matrices"),
                                (setting(method="full", optimizer__kind="muon"), "optimizer.kind: muon looks at whole matrices"),
                                (setting(lora__init="pissa"), "lora.init: pissa changes the base"),
                                (setting(lora__restart_every="8"), "lora.restart_every: adapters are merged into the base"),
                                (setting(lora__modules_to_save="[model.layers.2.mlp.up_proj]"), "is shared by the ranks (ranks.shard) and cannot be trained whole")):
            self.assertIn(words, self.scene.train("refused", *settings, *SHARD, ranks=2, check=2).stderr)
        for more, words in (("", "is a teacher that may use the student's blocks"), (", on_policy: {lambda: 0.5}", "ranks.shard: distill.on_policy.lambda is 0.5")):
            done = self.distill("refused", f"teachers: [{{model: {self.scene.root}/model, quantize: none}}]{more}", ranks=2)
            self.assertEqual(done.returncode, 2, done.stderr)
            self.assertIn(words, done.stderr)
        done = subprocess.run([ALAMBIC, "launch", "-n", "2", "evaluate", *SHARD], env=environment(), capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 2, done.stderr)

    def test_one_rank_says_that_it_shares_with_nobody(self):
        done = self.scene.train("alone", *SHARD, *setting(limits__max_steps="1"))
        self.assertIn("ranks.shard: one rank alone keeps everything", done.stderr)

    def distill(self, run, section, *more, ranks=1):
        config = self.scene.config(run, distill="{" + section + "}")
        words = [ALAMBIC, *(["launch", "-n", str(ranks)] if ranks > 1 else []), "distill", str(config), *(SHARD if ranks > 1 else ()), *more]
        return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=200)

    def test_distillation_from_a_cache(self):
        write_tiny_model(self.scene.root / "teacher", phase=0.5)
        cache = self.scene.root / "cache.yaml"
        cache.write_text(f"model: {self.scene.root}/teacher\nstores: [{{store: {self.scene.root}/text}}]\noutput: {self.scene.root}/cache\nkind: sampled\ndraws: 8\nrow_length: 64\n"
                         "compute_type: f32\n")
        subprocess.run([ALAMBIC, "distill", "--cache", cache, "-q"], env=environment(), check=True, stdout=subprocess.DEVNULL)
        for ranks in (1, 2, 4):
            done = self.distill(f"cached{ranks}", f"teachers: [{{cache: {self.scene.root}/cache}}]", *setting(limits__max_steps="8"), ranks=ranks)
            self.assertEqual(done.returncode, 0, done.stderr)
            for name in ("metrics.jsonl", "checkpoint-8/state.safetensors"):
                self.assertEqual(*[(self.scene.root / run / name).read_bytes() for run in ("cached1", f"cached{ranks}")], f"{ranks}: {name}")


if __name__ == "__main__":
    unittest.main()
