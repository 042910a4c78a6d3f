# SPDX-License-Identifier: Apache-2.0
"""What the tests of ranks share: a tiny model with data in a scratch folder, runs of it, and what must be equal. Standard library only."""
import hashlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from tiny_model import write_tiny_model  # noqa: E402

CONFIG = """
model: {root}/model
output: {output}
lora: {{rank: 4, alpha: 8, dropout: 0.1}}
data:
  mixture: [{{store: {root}/text}}]
  row_length: 64
  rows_per_batch: 2
  batches_per_step: 4
evaluation:
  stores: [{{name: held, store: {root}/held}}]
  every: 6
schedule: {{learning_rate: 0.01, warmup_steps: 3}}
limits: {{max_steps: {steps}}}
checkpoint: {{every: 4}}
ranks: {{timeout: 60, connect_timeout: 60}}
deterministic: true
compute_type: f32
threads: 1
seed: 5
"""


def environment(**more):
    """This process's, without what a launcher around it may have set."""
    own = {name: value for name, value in os.environ.items()
           if not name.startswith(("SLURM", "OMPI", "PMIX", "ALAMBIC", "TORCHELASTIC")) and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    return own | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"} | more


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class WithScene(unittest.TestCase):
    """A scene for all tests of a class, and what a run that nothing disturbs leaves there."""
    alambic = None  # set before the tests run

    @classmethod
    def setUpClass(cls):
        cls.scene = Scene(cls.alambic)
        cls.scene.train("whole")
        cls.whole = cls.scene.fingerprint("whole")

    @classmethod
    def tearDownClass(cls):
        cls.scene.close()


class Scene:
    def __init__(self, alambic, steps=20, layers=2, settings=()):
        """settings: words that every run of the scene has, such as --set a.b=v."""
        self.alambic, self.steps, self.settings = str(alambic), steps, settings
        self.folder = tempfile.TemporaryDirectory(prefix="alambic-ranks-")
        self.root = pathlib.Path(self.folder.name)
        write_tiny_model(self.root / "model", layers=layers)
        self.write_store("text", 120, 1)
        self.write_store("held", 20, 2)

    def close(self):
        self.folder.cleanup()

    def write_store(self, name, documents, seed):
        draw = random.Random(seed)
        words = ["alpha", "beta", "gamma", "delta", "rho", "tau", "phi", "chi"]
        lines = [json.dumps({"text": " ".join(draw.choice(words) for _ in range(draw.randint(3, 20)))}) for _ in range(documents)]
        (self.root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        subprocess.run([self.alambic, "prepare", "-q", "-m", self.root / "model", "-i", self.root / f"{name}.jsonl", "-o", self.root / name],
                       check=True, env=environment(), stdout=subprocess.DEVNULL)

    def config(self, run, **more):
        path = self.root / f"{run}.yaml"
        path.write_text(CONFIG.format(root=self.root, output=self.root / run, steps=self.steps) + "".join(f"{key}: {value}\n" for key, value in more.items()))
        return path

    def words(self, run, *more, verb="train"):
        """The program's words for a run into root/run."""
        return [self.alambic, verb, str(self.config(run)), *self.settings, *more]

    def train(self, run, *more, ranks=1, restarts=0, env=None, check=0):
        """Runs to the end; checks the exit code."""
        words = self.words(run, *more)
        if ranks > 1:
            words = [words[0], "launch", "-n", str(ranks), "--restarts", str(restarts), *words[1:]]
        done = subprocess.run(words, env=env or environment(), capture_output=True, text=True, timeout=280)
        assert done.returncode == check, f"exit code {done.returncode}, expected {check}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, run, *more, ranks=2, restarts=0):
        words = self.words(run, *more)
        return subprocess.Popen([words[0], "launch", "-n", str(ranks), "--restarts", str(restarts), *words[1:]], env=environment(),
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def steps_done(self, run):
        try:
            return (self.root / run / "metrics.jsonl").read_text().count('"kind":"train"')
        except FileNotFoundError:
            return 0

    def fingerprint(self, run):
        """Hashes of everything that must be the same bytes."""
        names = ["metrics.jsonl", "adapter/adapter_model.safetensors", f"checkpoint-{self.steps}/state.safetensors", f"checkpoint-{self.steps}/progress.json"]
        return {name: hashlib.sha256((self.root / run / name).read_bytes()).hexdigest() for name in names}


def children(process):
    try:
        return [int(word) for word in pathlib.Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def rank_of(process):
    """The rank of a process that alambic launch started; None while it is not the program yet."""
    try:
        for variable in pathlib.Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
            if variable.startswith(b"ALAMBIC_RANK="):
                return int(variable.split(b"=")[1])
    except (FileNotFoundError, ProcessLookupError):
        pass
    return None


def is_alive(process):
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(fact, seconds=60, what="it"):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if fact():
            return
        time.sleep(0.01)
    raise AssertionError(f"{what} did not come within {seconds} s")


def kill_ranks(scene, run, kills, ranks=2, seed=0, say=lambda text: None):
    """A run by `launch --restarts` in which random ranks are killed at random moments, `kills` times; returns how many hit before the end."""
    draw = random.Random(seed)
    process = scene.start(run, ranks=ranks, restarts=kills + 1)
    hits = 0
    try:
        while hits < kills and process.poll() is None:
            # From a start that is not even connected to well into its steps.
            before, past_start = scene.steps_done(run), time.monotonic() + 20
            if draw.random() < 0.7:
                while scene.steps_done(run) == before and process.poll() is None and time.monotonic() < past_start:
                    time.sleep(0.01)
            time.sleep(draw.random() * 0.4)
            alive = children(process.pid)
            if not alive:
                continue
            victim = draw.choice(alive)
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                continue
            hits += 1
            say(f"kill {hits} of {kills}: process {victim}, {before} to {scene.steps_done(run)} steps on disk")
            wait_until(lambda: process.poll() is not None or not set(alive) & set(children(process.pid)), 60, "the end of the others")
        _, err = process.communicate(timeout=250)
    finally:
        process.kill()
    assert process.returncode == 0, f"exit code {process.returncode} after {hits} kills\n{err[-4000:]}"
    return hits
