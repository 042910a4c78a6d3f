# SPDX-License-Identifier: Apache-2.0
"""Several ranks on one run, started by alambic launch and by hand: the same result as one rank, and what happens when one is lost.
Python's standard library only.

usage: launch_test.py ALAMBIC
"""
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import unittest

from scene import Scene, WithScene, children, environment, free_port, is_alive, kill_ranks, rank_of, wait_until, write_tiny_model

ALAMBIC = WithScene.alambic = os.path.abspath(sys.argv.pop(1))


class Launch(WithScene):
    def pids(self, process, ranks=2):
        """Processes by rank, once all of them are the program."""
        wait_until(lambda: sorted(rank_of(pid) for pid in children(process.pid) if rank_of(pid) is not None) == list(range(ranks)), what="all ranks")
        return {rank_of(pid): pid for pid in children(process.pid)}

    def losses(self, run):
        lines = (self.scene.root / run / "metrics.jsonl").read_text().splitlines()
        return [line["loss"] for line in map(json.loads, lines) if line["kind"] == "train"]

    def test_one_two_and_four_ranks_give_the_same_bytes(self):
        for ranks in (2, 4):
            done = self.scene.train(f"of{ranks}", ranks=ranks)
            self.assertEqual(self.scene.fingerprint(f"of{ranks}"), self.whole)
            # The result is told once, on stdout, and the log comes from rank 0.
            self.assertTrue(done.stdout.startswith(str(self.scene.root / f"of{ranks}/adapter")), done.stdout)
            self.assertEqual(done.stdout.count("bits per byte"), 1)
            self.assertTrue(all(line.startswith("[rank 0] ") for line in done.stderr.splitlines()), done.stderr)
            self.assertIn(f"by {ranks} ranks", done.stderr)

    def test_json_comes_through(self):
        done = self.scene.train("json", "--json", "--set", "limits.max_steps=2", ranks=2)
        self.assertEqual(json.loads(done.stdout)["steps"], 2)

    def test_without_deterministic_the_losses_agree_and_repeat(self):
        calm = ("--set", "deterministic=false", "--set", "schedule.learning_rate=1e-4")
        self.scene.train("plain1", *calm)
        for run in ("plain4", "again4"):
            self.scene.train(run, *calm, ranks=4)
        self.assertEqual(self.scene.fingerprint("plain4"), self.scene.fingerprint("again4"))
        one, four = self.losses("plain1"), self.losses("plain4")
        self.assertEqual(one[0], four[0])  # the first step's loss has the same bits whatever the order of gradients
        for a, b in zip(one, four, strict=True):
            self.assertAlmostEqual(a, b, delta=2e-6 * abs(a))

    def test_full_fine_tune(self):
        full = ("--set", "method=full", "--set", "schedule.learning_rate=1e-3", "--set", "limits.max_steps=6")
        self.scene.train("full1", *full)
        self.scene.train("full2", *full, ranks=2)
        for name in ("metrics.jsonl", "checkpoint-6/state.safetensors", "weights/model.safetensors"):
            self.assertEqual((self.scene.root / "full1" / name).read_bytes(), (self.scene.root / "full2" / name).read_bytes(), name)

    def test_ranks_that_share_rows(self):
        long = ("--set", "data.row_length=256", "--set", "schedule.learning_rate=1e-4", "--set", "neftune_alpha=5")
        self.scene.train("row1", *long)
        done = self.scene.train("row2", *long, "--set", "ranks.context=2", ranks=2)
        self.assertIn("by 2 ranks, 2 to a row", done.stderr)
        self.scene.train("row22", *long, "--set", "ranks.context=2", ranks=4)
        self.scene.train("row4", *long, "--set", "ranks.context=4", ranks=4)
        # Groups of the same number of ranks come to the same bytes, however many there are.
        self.assertEqual(self.scene.fingerprint("row2"), self.scene.fingerprint("row22"))
        for run in ("row2", "row4"):
            self.assert_losses_are_near("row1", run)
        # A run of two is gone on with by one, and one of one by two.
        for run, before, after in (("two-one", ("2", 2), ("1", 1)), ("one-two", ("1", 1), ("2", 2))):
            process = self.scene.start(run, *long, "--set", f"ranks.context={before[0]}", ranks=before[1])
            wait_until(lambda run=run: self.scene.steps_done(run) >= 3)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
            self.assertEqual(process.returncode, 75, err)
            self.assertLess(self.scene.steps_done(run), 20)
            done = self.scene.train(run, *long, "--set", f"ranks.context={after[0]}", "--resume", ranks=after[1])
            self.assertIn("context: ", done.stderr)  # a warning: other bits
            self.assert_losses_are_near("row1", run)

    def assert_losses_are_near(self, expected, run):
        one, other = self.losses(expected), self.losses(run)
        for a, b in zip(one, other, strict=True):
            self.assertAlmostEqual(a, b, delta=3e-6 * abs(a))
        self.assertGreater(len(one), 10)

    def test_a_dead_rank_of_a_shared_row_ends_all(self):
        for victim in (0, 1):
            process = self.scene.start(f"dead-row{victim}", "--set", "limits.max_steps=100000", "--set", "data.row_length=256", "--set", "ranks.context=2")
            wait_until(lambda run=f"dead-row{victim}": self.scene.steps_done(run) >= 5)
            pids = self.pids(process)
            began = time.monotonic()
            os.kill(pids[victim], signal.SIGKILL)
            _, err = process.communicate(timeout=60)
            self.assertLess(time.monotonic() - began, 10)
            self.assertEqual(process.returncode, 7, err)
            self.assertRegex(err, rf"\[rank {1 - victim}\] alambic: rank {victim} died in step \d+, [a-z ]+; this is rank {1 - victim}, in step \d+, [a-z ]+\n")
            self.assertFalse(any(map(is_alive, pids.values())))

    def test_ranks_that_cannot_share_rows(self):
        for ranks, more, said in ((2, ("ranks.context=3", "data.row_length=512"), "ranks.context: 3 ranks are to share each row, but 2 ranks were started"),
                                  (4, ("ranks.context=2", "data.batches_per_step=3"), "data.batches_per_step: 3 micro-batches cannot be shared evenly by 2 groups of 2 ranks (ranks.context)"),
                                  (2, ("ranks.context=2", "data.row_length=32"), "ranks.context: 2 ranks cannot share the 64 tokens of a micro-batch"),
                                  (2, ("ranks.context=2", "lora.dora=true"), "ranks.context: rows are shared by the fused blocks alone, which do not compute DoRA"),
                                  (2, ("ranks.context=0",), "ranks.context")):
            done = self.scene.train("unshared", *[word for each in more for word in ("--set", each)], ranks=ranks, check=2)
            self.assertIn(said, done.stderr)
        section = f"{{teachers: [{{model: {self.scene.root}/model, quantize: none}}]}}"
        config = self.scene.config("unshared", distill=section)
        done = subprocess.run([ALAMBIC, "launch", "-n", "2", "distill", str(config), "--set", "ranks.context=2"], env=environment(), capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn("ranks.context: distill computes each row on one rank", done.stderr)

    def test_distillation(self):
        write_tiny_model(self.scene.root / "teacher", phase=0.5)
        cache = self.scene.root / "cache.yaml"
        cache.write_text(f"model: {self.scene.root}/teacher\nstores: [{{store: {self.scene.root}/text}}]\noutput: {self.scene.root}/cache\nkind: sampled\ndraws: 8\nrow_length: 64\n"
                         "compute_type: f32\n")
        subprocess.run([ALAMBIC, "distill", "--cache", cache, "-q"], env=environment(), check=True, stdout=subprocess.DEVNULL)
        live = f"teachers: [{{model: {self.scene.root}/teacher, quantize: none}}], alpha: 0.7"
        kinds = {"live": live, "own": f"teachers: [{{model: {self.scene.root}/model, quantize: none}}], objective: reverse_kl", "cached": f"teachers: [{{cache: {self.scene.root}/cache}}]",
                 "policy": live + ", objective: jensen_shannon, on_policy: {lambda: 0.5, max_new_tokens: 8, prompt_tokens: 4}"}
        for kind, section in kinds.items():
            for ranks in (1, 2, 4):
                run = f"{kind}{ranks}"
                config = self.scene.config(run, distill="{" + section + "}", log_every=100)
                words = [ALAMBIC, *(["launch", "-n", str(ranks)] if ranks > 1 else []), "distill", str(config), "--set", "limits.max_steps=8"]
                done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=200)
                self.assertEqual(done.returncode, 0, done.stderr)
                for name in ("metrics.jsonl", "checkpoint-8/state.safetensors"):
                    self.assertEqual((self.scene.root / run / name).read_bytes(), (self.scene.root / f"{kind}1" / name).read_bytes(), f"{run}: {name}")
            figures = [line for line in map(json.loads, (self.scene.root / f"{kind}4/metrics.jsonl").read_text().splitlines()) if line["kind"] == "train"]
            self.assertTrue(all(line["divergence"] > 0 for line in figures[2:]), figures)
            self.assertEqual(kind == "policy" and max(line["own_tokens"] for line in figures) > 0, kind == "policy")

    def test_a_base_that_the_run_changes_travels_in_its_checkpoints(self):
        for name, more in {"pissa": ("--set", "lora.init=pissa"), "restarted": ("--set", "lora.restart_every=8", "--set", "lora.restart_warmup_steps=2")}.items():
            self.scene.train(name + "1", *more)
            self.scene.train(name + "2", *more, "--set", "limits.max_steps=20", ranks=2)
            self.assertEqual(*[(self.scene.root / run / "metrics.jsonl").read_bytes() for run in (name + "1", name + "2")])
            process = self.scene.start(name + "3", *more)
            wait_until(lambda run=name + "3": self.scene.steps_done(run) >= 11 or process.poll() is not None)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
            self.scene.train(name + "3", *more, "--resume", ranks=4)
            self.assertEqual(*[(self.scene.root / run / "checkpoint-20/state.safetensors").read_bytes() for run in (name + "1", name + "3")])

    def test_stopped_and_gone_on_with_by_another_number_of_ranks(self):
        process = self.scene.start("stopped", ranks=2)
        wait_until(lambda: self.scene.steps_done("stopped") >= 3)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 75, err)
        self.assertEqual(err.count("stopped on request"), 2, err)  # both ranks, after the same step
        self.assertEqual(len({line.split("after step ")[1].split()[0] for line in err.splitlines() if "after step " in line}), 1, err)
        self.assertLess(self.scene.steps_done("stopped"), 20)
        # A wish that reaches one rank alone stops all of them.
        process = self.scene.start("stopped", "--resume", ranks=4)
        before = self.scene.steps_done("stopped")
        wait_until(lambda: self.scene.steps_done("stopped") > before)
        os.kill(self.pids(process, 4)[2], signal.SIGUSR1)
        _, err = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 75, err)
        self.assertEqual(err.count("stopped on request"), 4, err)
        self.scene.train("stopped", "--resume")
        self.assertEqual(self.scene.fingerprint("stopped"), self.whole)
        done = self.scene.train("stopped", "--resume", ranks=2)
        self.assertIn("nothing was done", done.stdout)

    def test_killed_ranks_are_started_again_and_come_to_the_same_bytes(self):
        scene = Scene(ALAMBIC, steps=200)
        try:
            scene.train("whole")
            hits = sum(kill_ranks(scene, f"killed{ranks}", kills, ranks, seed=ranks) for ranks, kills in ((2, 20), (4, 8)))
            self.assertGreaterEqual(hits, 20)
            for ranks in (2, 4):
                self.assertEqual(scene.fingerprint(f"killed{ranks}"), scene.fingerprint("whole"))
        finally:
            scene.close()

    def test_a_dead_rank_ends_all_within_ten_seconds(self):
        for victim in (0, 1):
            process = self.scene.start(f"dead{victim}", "--set", "limits.max_steps=100000")
            wait_until(lambda run=f"dead{victim}": self.scene.steps_done(run) >= 5)
            pids = self.pids(process)
            began = time.monotonic()
            os.kill(pids[victim], signal.SIGKILL)
            _, err = process.communicate(timeout=60)
            self.assertLess(time.monotonic() - began, 10)
            self.assertEqual(process.returncode, 7, err)
            self.assertRegex(err, rf"\[rank {1 - victim}\] alambic: rank {victim} died in step \d+, [a-z ]+; this is rank {1 - victim}, in step \d+, [a-z ]+\n")
            self.assertIn(f"alambic: rank {victim} was ended by signal 9 (Killed)", err)
            self.assertFalse(any(map(is_alive, pids.values())))

    def test_a_hung_rank_ends_all_after_the_timeout(self):
        for victim in (0, 1):
            process = self.scene.start(f"hung{victim}", "--set", "limits.max_steps=100000", "--set", "ranks.timeout=5")
            wait_until(lambda run=f"hung{victim}": self.scene.steps_done(run) >= 5)
            pids = self.pids(process)
            began = time.monotonic()
            os.kill(pids[victim], signal.SIGSTOP)
            wait_until(lambda other=pids[1 - victim]: not is_alive(other), 5 + 10, "the end of the other rank")
            self.assertGreater(time.monotonic() - began, 5)
            _, err = process.communicate(timeout=60)
            self.assertEqual(process.returncode, 7, err)
            self.assertRegex(err, rf"\[rank {1 - victim}\] alambic: rank {victim} hangs in step \d+, [a-z ]+: .*; this is rank {1 - victim}, in step \d+, ")
            self.assertIn(f"rank {victim} did not end by itself and was killed", err)
            self.assertFalse(any(map(is_alive, pids.values())))

    def test_a_wish_to_stop_at_any_moment_ends_with_75(self):
        for number in range(8):
            process = self.scene.start("early75", "--set", "limits.max_steps=100000", "--resume")
            wait_until(lambda process=process: len(children(process.pid)) == 2, what="the start of both ranks")
            time.sleep(0.12 * number)
            process.send_signal((signal.SIGTERM, signal.SIGUSR1)[number % 2])
            _, err = process.communicate(timeout=60)
            self.assertEqual(process.returncode, 75, err)

    def test_no_rank_outlives_a_killed_launch(self):
        for one_is_stopped in (False, True):
            run = f"orphans{one_is_stopped}"
            process = self.scene.start(run, "--set", "limits.max_steps=100000")
            wait_until(lambda run=run: self.scene.steps_done(run) >= 2)
            pids = self.pids(process)
            if one_is_stopped:
                os.kill(pids[1], signal.SIGSTOP)
            process.kill()
            wait_until(lambda pids=pids: not any(map(is_alive, pids.values())), 10, "the end of all ranks")
            process.communicate()

    def by_hand(self, configs, port=None, seconds=60):
        """Starts a rank for each config by plain variables; returns (exit code, stderr) of each."""
        port = port or free_port()
        started = [subprocess.Popen([ALAMBIC, "train", str(config)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                    env=environment(RANK=str(rank), WORLD_SIZE=str(len(configs)), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)))
                   for rank, config in enumerate(configs)]
        ends = [process.communicate(timeout=seconds) for process in started]
        return [(process.returncode, err) for process, (_, err) in zip(started, ends, strict=True)]

    def test_plain_variables(self):
        config = self.scene.config("byhand")
        for code, err in self.by_hand([config, config]):
            self.assertEqual(code, 0, err)
        self.assertEqual(self.scene.fingerprint("byhand"), self.whole)

    def test_ranks_that_disagree_end_before_the_first_step(self):
        self.scene.write_store("other", 121, 3)
        own = self.scene.config("disagree").read_text()
        cases = {"config.schedule.learning_rate: 0.01 on rank 0, 0.02 on rank 1": own.replace("learning_rate: 0.01", "learning_rate: 0.02"),
                 "config.seed: 5 on rank 0, 6 on rank 1": own.replace("seed: 5", "seed: 6"),
                 "config.checkpoint.every: 4 on rank 0, 5 on rank 1": own.replace("checkpoint: {every: 4}", "checkpoint: {every: 5}"),
                 "data.data[0]: ": own.replace("store: " + str(self.scene.root / "text"), "store: " + str(self.scene.root / "other"))}
        changed = self.scene.root / "changed"
        changed.mkdir()
        for path in (self.scene.root / "model").iterdir():
            data = bytearray(path.read_bytes())
            if path.name == "model.safetensors":
                data[-1] ^= 1
            (changed / path.name).write_bytes(data)
        cases["base: "] = own.replace("model: " + str(self.scene.root / "model"), "model: " + str(changed))
        for words, text in cases.items():
            other = self.scene.root / "disagree-other.yaml"
            other.write_text(text)
            for code, err in self.by_hand([self.scene.config("disagree"), other]):
                self.assertEqual(code, 7, err)
                self.assertIn("the ranks disagree (before the first step)", err)
                self.assertIn(words, err)
            self.assertEqual(self.scene.steps_done("disagree"), 0)

    def test_another_program_is_named(self):
        copy = self.scene.root / "alambic"
        copy.write_bytes(pathlib.Path(ALAMBIC).read_bytes() + b"\0")
        copy.chmod(0o755)
        config, port = self.scene.config("program"), free_port()
        started = [subprocess.Popen([program, "train", str(config)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                    env=environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)))
                   for rank, program in enumerate((ALAMBIC, str(copy)))]
        for process in started:
            _, err = process.communicate(timeout=60)
            self.assertEqual(process.returncode, 7, err)
            self.assertIn("code.program: ", err)

    def test_a_rank_that_fails_tells_the_others_why(self):
        broken = self.scene.root / "broken.yaml"
        broken.write_text(self.scene.config("failed").read_text().replace("store: " + str(self.scene.root / "held"), "store: " + str(self.scene.root / "absent")))
        (code0, err0), (code1, err1) = self.by_hand([self.scene.config("failed"), broken])
        self.assertEqual((code0, code1), (7, 3), err0 + err1)
        self.assertIn("rank 1 failed in step 0, ", err0)
        self.assertIn(str(self.scene.root / "absent"), err0)

    def test_a_loss_that_is_not_finite_is_seen_by_all(self):
        burst = ("--set", "schedule.shape=constant", "--set", "schedule.learning_rate=1", "--set", "lora.alpha=1e30", "--set", "optimizer.max_grad_norm=0", "--set", "evaluation.stores=[]")
        one = self.scene.train("burst1", *burst, check=6)
        two = self.scene.train("burst2", *burst, ranks=2, check=6)
        said = [line for line in one.stderr.splitlines() if "steps in a row" in line]
        self.assertEqual(len(said), 1, one.stderr)
        self.assertEqual(sorted(line for line in two.stderr.splitlines() if "steps in a row" in line), ["[rank 0] " + said[0], "[rank 1] " + said[0]])
        self.assertEqual(*[(self.scene.root / run / "metrics.jsonl").read_bytes() for run in ("burst1", "burst2")])

    def test_early_stop_and_limits_in_tokens(self):
        for name, more in {"early": ("--set", "limits.max_steps=60", "--set", "limits.patience=2", "--set", "evaluation.every=2", "--set", "schedule.shape=constant", "--set", "schedule.learning_rate=0.5"),
                           "tokens": ("--set", "limits.max_steps=0", "--set", "limits.max_tokens=1500")}.items():
            reports = [json.loads(self.scene.train(f"{name}{ranks}", "--json", *more, ranks=ranks).stdout) for ranks in (1, 2)]
            for report in reports:
                del report["config"]
            self.assertEqual(*reports)
            self.assertEqual(reports[0]["ended"] == "early stop", name == "early")
            self.assertLess(reports[0]["steps"], 60)
            self.assertEqual(*[(self.scene.root / f"{name}{ranks}/metrics.jsonl").read_bytes() for ranks in (1, 2)])

    def test_what_is_wrong_with_the_command_is_said_once(self):
        for words, code, said in ((("launch", "-n", "2", "score", "x"), 2, "VERB must be one of train, distill"),
                                  (("launch", "train", "x.yaml"), 2, "--ranks is missing"),
                                  (("launch", "-n", "2", "train", "x.yaml", "--resumee"), 2, "did you mean --resume"),
                                  (("launch", "-n", "0", "train", "x.yaml"), 2, "--ranks"),
                                  (("launch", "-n", "2", "distill", "x.yaml", "--cache"), 2, "work in one process")):
            done = subprocess.run([ALAMBIC, *words], env=environment(), capture_output=True, text=True, timeout=60)
            self.assertEqual(done.returncode, code, done.stderr)
            self.assertIn(said, done.stderr)
            self.assertNotIn("[rank", done.stderr)
        done = subprocess.run([ALAMBIC, "launch", "-n", "2", "train", "x.yaml"], env=environment(RANK="0", WORLD_SIZE="1"), capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 2)
        self.assertIn("this is a rank already, of variables (WORLD_SIZE=1 RANK=0)", done.stderr)
        self.assertEqual(subprocess.run([ALAMBIC, "launch", "-n", "2", "train", "--help"], capture_output=True, env=environment(), timeout=60).stdout,
                         subprocess.run([ALAMBIC, "train", "--help"], capture_output=True, env=environment(), timeout=60).stdout)

    def test_numbers_of_ranks_that_cannot_share_a_step(self):
        done = self.scene.train("uneven", ranks=3, check=2)
        self.assertIn("3 ranks cannot share a binary tree", done.stderr)
        done = self.scene.train("uneven3", "--set", "deterministic=false", ranks=3, check=2)
        self.assertIn("4 micro-batches cannot be shared evenly by 3 ranks", done.stderr)
        self.scene.train("three", "--set", "deterministic=false", "--set", "data.batches_per_step=6", "--set", "limits.max_steps=2", ranks=3)

    def test_a_run_of_one_rank_may_be_gone_on_with_by_two_with_a_warning(self):
        plain = ("--set", "deterministic=false")
        process = subprocess.Popen(self.scene.words("warned", *plain, "--set", "limits.max_steps=400"), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: self.scene.steps_done("warned") >= 3)
        process.terminate()
        self.assertEqual(process.wait(timeout=60), 75)
        done = self.scene.train("warned", *plain, "--set", "limits.max_steps=400", "--set", "log_every=100", "--resume", ranks=2)
        self.assertIn("ranks: absent then, 2 now", done.stderr)


if __name__ == "__main__":
    unittest.main()
